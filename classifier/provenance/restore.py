"""The way back: parameters, dvc.lock and metrics as they are committed, and the outputs that belong to them.

Code, and data of one's own, are not touched.
"""

from pathlib import Path

from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import atomic
from classifier.pipeline.paths import LOCK, METRICS, PARAMS
from classifier.provenance.storage import Returned, exclusive, return_outputs
from classifier.tracking.git import changes, commit_of, git, restore

PATCH = "changes.patch"


def restore_committed(aside: Path) -> list[str]:
    """Bring the committed state back, and return what was done, as lines for a person.

    aside: a folder for what would be lost by it: a patch of what was not committed, and outputs that no cache has.
    Raises PipelineError if there is no commit, or if an output is to be had nowhere; all the others are back then.
    """
    if not commit_of("HEAD"):
        raise PipelineError("There is no commit here to go back to: `git commit` makes the first")
    with exclusive() as storage:
        names, patch = changes(str(PARAMS), str(LOCK), str(METRICS), takes=lambda _: False)
        if names:
            with atomic(aside / PATCH) as path:
                path.write_bytes(patch)
            restore(names)
        returned = return_outputs(storage, aside)
    lines = _told(names, returned, aside)
    if returned.missing:
        asked = f" (the remote: {returned.remote_fault})" if returned.remote_fault not in ("", "none") else ""
        raise PipelineError(
            "\n".join(lines) + f"\n{', '.join(returned.missing)}: not restored, in no cache{asked}, and no run here "
            "made them from this code, data and these parameters. `dvc repro` makes them."
        )
    return lines


def _told(names: list[str], returned: Returned, aside: Path) -> list[str]:
    branch = git("symbolic-ref", "--short", "--quiet", "HEAD")
    if not branch:  # as where `dvc exp run` was killed
        tips = git("for-each-ref", "--points-at=HEAD", "--format=%(refname:short)", "refs/heads").splitlines()
        branch = f"on no branch: `git switch {tips[0] if len(tips) == 1 else 'BRANCH'}` goes to yours"
    lines = [f"Commit {git('rev-parse', '--short', 'HEAD')} ({branch}):"]
    if names:
        lines.append(f"restored from Git: {', '.join(names)}")
        lines.append(f"  `git apply {aside / PATCH}` brings back what was not committed")
    if returned.aside:
        lines.append(f"moved to {aside}, since no cache has them: {', '.join(returned.aside)}")
    if returned.as_locked:
        lines.append(f"restored from DVC: {', '.join(returned.as_locked)}")
    if returned.from_runs:
        lines.append(f"restored from an earlier run here: {', '.join(returned.from_runs)}")
        if changes(str(LOCK), str(METRICS))[0]:
            lines.append(
                f"  The commit has other results, or none: {LOCK} and {METRICS} differ from it now. To commit these:"
            )
            lines.append(f"  `git add {LOCK} {METRICS} && git commit`")
    if len(lines) == 1:
        lines.append("all parameters and results are as committed")
    if kept := [
        name for name in changes()[0] if name not in (str(PARAMS), str(LOCK)) and METRICS not in Path(name).parents
    ]:
        more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
        lines.append(f"not touched, and other than committed: {', '.join(kept[:3])}{more}")
    return lines
