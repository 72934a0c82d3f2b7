"""Restore the committed parameters, dvc.lock and metrics, and the outputs in that dvc.lock.

Code and the user's own data are not touched.
"""

from pathlib import Path

from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import atomic
from classifier.pipeline.paths import LOCK, METRICS, PARAMS
from classifier.provenance.storage import Restored, lock_storage, restore_outputs
from classifier.tracking.git import changes, commit_of, git, restore

PATCH = "changes.patch"


def restore_committed(aside: Path) -> list[str]:
    """Restore the committed state; return lines of text on what was done.

    aside: a folder for what would otherwise be lost: a patch of uncommitted changes, and outputs that no cache has.
    Raises PipelineError if there is no commit, or, after restoring everything else, if an output is not available.
    """
    if not commit_of("HEAD"):
        raise PipelineError("There is no commit to restore: create one with `git commit`")
    with lock_storage() as storage:
        names, patch = changes(str(PARAMS), str(LOCK), str(METRICS), takes=lambda _: False)
        if names:
            with atomic(aside / PATCH) as path:
                path.write_bytes(patch)
            restore(names)
        restored = restore_outputs(storage, aside)
    lines = _summary(names, restored, aside)
    if restored.missing:
        remote = f" (the remote: {restored.remote_fault})" if restored.remote_fault not in ("", "none") else ""
        raise PipelineError(
            "\n".join(lines) + f"\n{', '.join(restored.missing)}: not restored: no cache has them{remote}, and no run "
            "here made them from this code, data and parameters. `dvc repro` rebuilds them."
        )
    return lines


def _summary(names: list[str], restored: Restored, aside: Path) -> list[str]:
    """Describe what was restored. names: of the files restored from Git."""
    branch = git("symbolic-ref", "--short", "--quiet", "HEAD")
    if not branch:  # for example after a killed `dvc exp run`
        tips = git("for-each-ref", "--points-at=HEAD", "--format=%(refname:short)", "refs/heads").splitlines()
        branch = f"detached HEAD: `git switch {tips[0] if len(tips) == 1 else 'BRANCH'}` returns to your branch"
    lines = [f"Commit {git('rev-parse', '--short', 'HEAD')} ({branch}):"]
    if names:
        lines.append(f"restored from Git: {', '.join(names)}")
        lines.append(f"  `git apply {aside / PATCH}` restores the uncommitted changes")
    if restored.aside:
        lines.append(f"moved to {aside}, because no cache has them: {', '.join(restored.aside)}")
    if restored.as_locked:
        lines.append(f"restored from DVC: {', '.join(restored.as_locked)}")
    if restored.from_runs:
        lines.append(f"restored from an earlier run here: {', '.join(restored.from_runs)}")
        if changes(str(LOCK), str(METRICS))[0]:
            lines.append(
                f"  {LOCK} and {METRICS} now differ from the commit, whose results are others. To commit them:"
            )
            lines.append(f"  `git add {LOCK} {METRICS} && git commit`")
    if len(lines) == 1:
        lines.append("all parameters and results are as committed")
    if kept := [
        name for name in changes()[0] if name not in (str(PARAMS), str(LOCK)) and METRICS not in Path(name).parents
    ]:
        more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
        lines.append(f"not touched, but different from the commit: {', '.join(kept[:3])}{more}")
    return lines
