"""Progress without a terminal: a line every ten seconds; the tests shorten the interval."""

import subprocess
import sys

import pytest
from imports import ROOT

from classifier.progress import Lines, progress

SCRIPT = """
import time
from classifier import progress
progress.EVERY_SECONDS = 1
progress.report("train")
time.sleep(1.6)
with progress.progress("decoding", "image", 1000) as bar:
    bar.update(250)
    time.sleep(1)
for epoch in range(8):
    with progress.progress("quick epoch", "image", 1000) as bar:
        time.sleep(0.1)
    progress.say(f"Epoch {epoch}")
"""


def test_a_line_is_due_after_a_while_and_quick_work_has_none() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second, *more = done.stderr.splitlines()
    assert first == "train stage: 00:01 elapsed"
    assert second.startswith("decoding: 250 of 1,000 images (25%), 00:0")
    assert more == []
    assert done.stdout.splitlines() == [f"Epoch {epoch}" for epoch in range(8)]


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ((("epoch 3", "image", 55_000), 11_000), "epoch 3: 11,000 of 55,000 images (20%), 01:20 left"),
        ((("epoch 3", "image", 55_000, 33_000), 11_000), "epoch 3: 44,000 of 55,000 images (80%), 00:20 left"),
        ((("writing model.onnx", "step", 5), 0), "writing model.onnx: 0 of 5 steps (0%), 00:20 elapsed"),
        ((("x.gz", "B", 26_421_880), 10_000_000), "x.gz: 10.0MB of 26.4MB (38%), 00:32 left"),
        ((("x.gz", "B"), 10_000_000), "x.gz: 10.0MB, 00:20 elapsed"),
        ((("export stage",), 0), "export stage: 00:20 elapsed"),
    ],
)
def test_a_line_says_what_how_far_and_the_time_left_after_20_seconds(
    lines: tuple[tuple[object, ...], int], text: str
) -> None:
    arguments, done = lines
    bar = Lines(*arguments)  # type: ignore[arg-type]
    bar.update(done)
    bar.started -= 20
    assert str(bar) == text


def test_figures_stand_at_the_end_of_a_line() -> None:
    bar = Lines("epoch 3", "image", 100)
    bar.set_postfix(loss="0.4213", refresh=False)
    assert str(bar).endswith(", loss 0.4213")


def test_what_is_hidden_says_nothing(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress("predicting", "image", 100, hidden=True) as bar:
        bar.update(100)
    assert capfd.readouterr() == ("", "")
