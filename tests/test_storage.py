"""DVC's cache and remote outside a repository."""

from collections.abc import Callable
from pathlib import Path

import pytest

from classifier.cli.experiment_queue import recover
from classifier.pipeline.errors import PipelineError
from classifier.provenance.storage import Storage, push_results


@pytest.mark.parametrize("ask", [Storage, push_results, recover])
@pytest.mark.parametrize("kind", ["no Git", "no DVC"])
def test_outside_of_a_repository_the_way_on_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[], object], kind: str
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    if kind == "no Git":  # for example a downloaded archive
        (tmp_path / ".dvc").mkdir()
        (tmp_path / ".dvc/config").write_text("")
    with pytest.raises(PipelineError) as told:
        ask()
    assert str(told.value).endswith("`git init`, or use a clone")
    assert str(tmp_path) in str(told.value)
