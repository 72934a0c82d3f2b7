"""The report: its content, the state it is compared with, and its display in a browser without a network."""

import html
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from browser import new_page, started_browser
from imports import ROOT
from PIL import Image
from project import Project

from classifier.cli.report import write_report
from classifier.pipeline.annotations import write_csv
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import hash_file

NAMES = ["T-shirt/top", "Trouser", "Ankle boot"]
COLOURS = """["body", ".matrix .right", "svg text"].map(place => {
    const style = getComputedStyle(document.querySelector(place));
    return style.backgroundColor + style.fill;
})"""
PICTURES = {"samples": (480, 582), "mistakes": (800, 582), "saliency": (1280, 388), "reliability": (480, 540)}
CONFIDENCE = 0.75  # of each prediction
TRAIN = {"epoch": 2, "train_loss": 0.75, "val_loss": 0.5, "val_accuracy": 0.875}


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_outputs(root: Path, names: Sequence[str] = NAMES, loss: float = 0.5) -> None:
    """Write the outputs of train and evaluate for eight images per class; two of the first are misclassified."""
    answers = [(name, name) for name in names for _ in range(8)]
    answers[:2] = [(names[0], names[-1])] * 2
    accuracy = 1 - 2 / len(answers)
    write_json(root / "metrics/test.json", {"accuracy": accuracy, "loss": loss, "accuracy_ci95": [0.7415, 0.9768]})
    write_json(root / "metrics/train.json", TRAIN)
    write_json(root / "metrics/environment.json", [{"device": "cpu", "threads": 2, "torch": "2.0"}])
    epochs = [{"epoch": 1, "train_loss": 1.25, "val_loss": 1.0, "val_accuracy": 0.625}, TRAIN]
    pd.DataFrame(epochs).to_csv(root / "metrics/epochs.csv", index=False)
    scores = {"precision": 1.0, "recall": 0.75, "f1": 0.8571428571428571, "images": 8}
    pd.DataFrame([{"class": name, **scores} for name in names]).to_csv(root / "metrics/classes.csv", index=False)
    write_predictions(root, answers)
    (root / "data/annotations").mkdir(parents=True, exist_ok=True)
    for split, count in {"train": 1600, "val": 8, "test": 8}.items():
        rows = "".join(
            f"{split}/{label}-{index}.png,{label}\n" for label in range(len(names)) for index in range(count)
        )
        (root / f"data/annotations/{split}.csv").write_text(f"file,label\n{rows}")
    write_csv(root / "data/annotations/classes.csv", {"label": range(len(names)), "name": names})
    write_lock(root)
    (root / "metrics/plots").mkdir(exist_ok=True)
    pd.DataFrame(answers, columns=["actual", "predicted"]).to_csv(root / "metrics/plots/confusion.csv", index=False)
    for name, size in PICTURES.items():
        Image.new("RGB", size, "grey").save(root / f"metrics/plots/{name}.png")


def write_predictions(root: Path, answers: list[tuple[str, str]]) -> None:
    """Write the table of predictions, with the same answers for the validation and the test images."""
    classes = list(dict.fromkeys(name for name, _ in answers))
    others = (1 - CONFIDENCE) / (len(classes) - 1)
    rows = [
        [f"photos/{index}.jpg", split, *pair, *(CONFIDENCE if name == pair[1] else others for name in classes)]
        for split in ("val", "test")
        for index, pair in enumerate(answers)
    ]
    columns = ["file", "split", "label", "predicted", *(f"P({name})" for name in classes)]
    pd.DataFrame(rows, columns=columns).to_csv(root / "metrics/predictions.csv", index=False)


def write_lock(root: Path, images: str = "a" * 32, annotations: str = f"{'b' * 32}.dir") -> None:
    """Write a dvc.lock with the md5s of the images and annotations."""
    md5s = {"data/images": images, "data/annotations": annotations}
    outs = [{"path": path, "md5": md5} for path, md5 in md5s.items()]
    (root / "dvc.lock").write_text(json.dumps({"stages": {"annotate": {"outs": outs}}}))


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with parameters and outputs but no repository, set as the current folder."""
    (tmp_path / "outputs").mkdir()
    shutil.copy(ROOT / "params.yaml", tmp_path / "outputs")
    write_outputs(tmp_path / "outputs")
    monkeypatch.chdir(tmp_path / "outputs")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    return tmp_path / "outputs"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A repository with one commit and its outputs, set as the current folder."""
    project = Project.create(tmp_path / "project")
    write_outputs(project.root)
    project.commit()
    monkeypatch.chdir(project.root)
    return project


def report(against: str | None = None, lineage: str = "") -> str:
    """Return the HTML of a report about the current folder."""
    target = Path("../report.html")
    write_report(target, against, lineage)
    return target.read_text(encoding="utf-8")


def words(page: str) -> str:
    """Return the text of a page without the intervals in its table, with single spaces."""
    body = re.sub(r'<span class="interval">[^<]*', "", page[page.index("<body>") :])
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


def head(project: Project, revision: str = "HEAD") -> str:
    return project.run("git", "rev-parse", "--short=7", revision).stdout.strip()


def test_it_shows_the_accuracy_and_the_commit(project: Project) -> None:
    page = report()
    assert f"<title>fashion-mnist at {head(project)}: 91.67% test accuracy</title>" in page
    text = words(page)
    assert f"Commit {head(project)} of " in text
    assert (
        ": State under test All files are identical to this commit. 91.67% of 24 test images are classified correctly"
        in text
    )
    assert "95 % interval 74.15% to 97.68% · test loss 0.50000 The training time is unknown: " in text
    (project.root / "README.md").write_text("changed")
    (project.root / "classifier/networks/<new> & net.py").write_text("")
    assert "2 files differ from this commit README.md classifier/networks/<new> & net.py" in words(report())


def test_it_holds_scores_confusions_epochs_environment_and_lineage(project: Project) -> None:
    page = report(lineage="  weights <- data\n  run 1234 & more")
    assert 'title="true: T-shirt/top, predicted: Ankle boot: 2 of 8">2</td>' in page
    text = words(page)
    assert "T-shirt/top 100.00% 75.00% 85.71% 1,600 8 8" in text
    assert "True class Predicted as Images Share of true class T-shirt/top Ankle boot 2 25.00%" in text
    assert (
        "File True class Predicted as Probability photos/0.jpg T-shirt/top Ankle boot 75.00% "
        "photos/1.jpg T-shirt/top Ankle boot 75.00% Pictures" in text
    )
    assert "1 1.25000 1.00000 62.50% 2 (kept) 0.75000 0.50000 87.50%" in text
    assert text.count("kept: epoch 2") == 2
    assert "device cpu threads 2 torch 2.0" in text
    assert text.endswith("Lineage weights <- data run 1234 & more")


def test_confusions_are_sorted_by_frequency(project: Project) -> None:
    path = project.root / "metrics/plots/confusion.csv"
    path.write_text(path.read_text().replace("Trouser,Trouser\n" * 3, "Trouser,Ankle boot\n" * 3, 1))
    write_predictions(project.root, [*pd.read_csv(path).itertuples(index=False, name=None)])
    write_json(project.root / "metrics/test.json", {"accuracy": 19 / 24, "loss": 0.5, "accuracy_ci95": [0.6, 0.9]})
    assert "Share of true class Trouser Ankle boot 3 37.50% T-shirt/top Ankle boot 2 25.00% Scores" in words(report())


def test_outdated_outputs_are_reported(project: Project) -> None:
    assert "outdated" not in words(report())
    code = hash_file(project.root / "stages/train.py")
    lock = {"deps": [{"path": "stages/train.py", "md5": code}], "params": {"params.yaml": {"lr": 0.0005}}}
    (project.root / "dvc.lock").write_text(json.dumps({"stages": {"train": lock}}))
    project.set_params(lr="5e-4")  # the same value
    assert "outdated" not in words(report())
    (project.root / "stages/train.py").write_text("changed")
    project.set_params(lr="6e-4")
    assert "The outputs are outdated: changed since are stages/train.py, lr in params.yaml." in words(report())


def test_changed_metrics_are_compared_with_head(project: Project) -> None:
    write_outputs(project.root, loss=0.625)
    text = words(report())
    assert f"Compared with the metrics committed in {head(project)} ." in text
    assert "Test accuracy 91.67% 91.67% unchanged Test loss 0.50000 0.62500 +0.12500 worse" in text
    write_outputs(project.root, loss=0.5 - 1e-7)
    assert "Test loss 0.50000 0.50000 unchanged" in words(report())


def test_headline_figures_have_95_percent_intervals(project: Project) -> None:
    test = json.loads((project.root / "metrics/test.json").read_text())
    write_json(project.root / "metrics/test.json", test | {"macro_f1": 0.9155, "ece": 0.0625})
    page = report()
    cells = re.findall(
        r'<tr><th scope="row">([^<]*)</th>.*?<td class="number">[^<]*(?:<span class="interval">([^<]*))?', page
    )
    shown = dict(cells)
    assert shown["Test accuracy"] == shown["Validation accuracy"] == "74.2% to 97.7%"
    low, high = (float(end.rstrip("%")) for end in shown["Macro F1"].split(" to "))
    assert 70 < low < 91.55 < high <= 100
    low, high = map(float, shown["Test loss"].split(" to "))
    assert low < (22 * -math.log(CONFIDENCE) + 2 * -math.log((1 - CONFIDENCE) / 2)) / 24 < high
    assert shown["Calibration error"] == shown["Training loss"] == shown["Epoch kept"] == ""


def test_figures_of_other_images_are_shown_and_not_subtracted(project: Project) -> None:
    write_outputs(project.root, loss=0.625)
    write_lock(project.root, images="c" * 32)
    text = words(report())
    assert "Test accuracy 91.67% 91.67% other images Test loss 0.50000 0.62500 other images Validation" in text
    assert "Epoch kept 2 2 unchanged" in text
    assert "Other images: the two values may come from different images, so no difference is shown." in text


def test_figures_are_subtracted_by_split_where_only_the_other_splits_differ(project: Project) -> None:
    """As after a change of val_size: the tables in DVC's cache show that the test images are the same."""
    folders = {
        "b" * 32: {"test.csv": "1" * 32, "val.csv": "2" * 32},
        "c" * 32: {"test.csv": "1" * 32, "val.csv": "3" * 32},
    }
    for md5, listed in folders.items():
        content = [{"md5": of_file, "relpath": name} for name, of_file in listed.items()]
        write_json(project.root / f".dvc/cache/files/md5/{md5[:2]}/{md5[2:]}.dir", content)
    write_outputs(project.root, loss=0.625)
    write_lock(project.root, annotations=f"{'c' * 32}.dir")
    text = words(report())
    assert "Test accuracy 91.67% 91.67% unchanged Test loss 0.50000 0.62500 +0.12500 worse" in text
    assert "Validation accuracy 87.50% 87.50% other images" in text


def test_scores_that_only_one_state_has_are_shown_without_a_difference(project: Project) -> None:
    test = json.loads((project.root / "metrics/test.json").read_text())
    write_json(project.root / "metrics/test.json", test | {"macro_f1": 0.9, "ece": 0.0625})
    text = words(report())
    assert "Macro F1 – 90.00% Calibration error – 6.25% Validation accuracy" in text
    assert "Top-3 accuracy" not in text
    project.commit()
    write_json(project.root / "metrics/test.json", test | {"macro_f1": 0.9, "ece": 0.05})
    assert "Macro F1 90.00% 90.00% unchanged Calibration error 6.25% 5.00% −1.25 points better" in words(report())


def test_committed_metrics_are_compared_with_the_commit_before(project: Project) -> None:
    write_outputs(project.root, [*NAMES, "Bag"], loss=0.375)
    project.commit()
    text = words(report())
    assert f"Compared with commit {head(project, 'HEAD~1')} of" in text
    assert "Test accuracy 91.67% 93.75% +2.08 points better Test loss 0.50000 0.37500 −0.12500 better" in text
    assert "Epoch kept 2 2 unchanged" in text


def test_it_is_compared_with_the_commit_or_experiment_that_is_named(project: Project) -> None:
    for loss in (0.25, 0.375):
        write_outputs(project.root, loss=loss)
        project.commit()
    baseline = project.run("git", "rev-parse", "HEAD~2").stdout.strip()
    project.run("git", "update-ref", f"refs/exps/{baseline[:2]}/{baseline[2:]}/puny-barn", "HEAD~1")
    assert "Test loss 0.50000 0.37500 −0.12500 better" in words(report("HEAD~2"))
    text = words(report("puny-barn"))
    assert ": experiment puny-barn " in text
    assert "Test loss 0.25000 0.37500 +0.12500 worse" in text


def test_the_first_commit_has_nothing_to_compare_with(project: Project) -> None:
    text = words(report())
    assert f"Nothing to compare with: the metrics are those of {head(project)} , which has no earlier commit." in text
    assert "Test accuracy – 91.67%" in text


@pytest.mark.parametrize(("path", "content"), [("metrics/test.json", None), ("params.yaml", "{")])
def test_unreadable_files_of_the_baseline_are_reported(project: Project, path: str, content: str | None) -> None:
    before = (project.root / path).read_text()
    if content is None:
        (project.root / path).unlink()
    else:
        (project.root / path).write_text(content)
    project.commit()
    (project.root / path).write_text(before)
    assert f"It has no readable {path}." in words(report("HEAD"))


def test_without_a_repository_it_reports_that_there_is_no_commit(outputs: Path) -> None:
    text = words(report())
    assert "There is no Git commit." in text
    assert "Nothing to compare with: there is no Git commit." in text


@pytest.mark.parametrize("against", ["no-such-branch", "HEAD:params.yaml"])
def test_an_unknown_commit_is_an_error_that_names_it(project: Project, against: str) -> None:
    with pytest.raises(PipelineError, match=f"^against: {re.escape(repr(against))} is not a commit or experiment; "):
        report(against)


def test_parameters_that_differ_are_shown_and_no_others(project: Project) -> None:
    project.set_params(lr="1e-06", momentum="0.0")
    project.commit()
    project.set_params(lr="0.000001", momentum="0")  # equal values
    assert f"The parameters are the same as in {head(project)}." in words(report("HEAD"))
    project.set_params(lr="0.01", augment="[crop, flip]", threads="2", shuffle="false", weights="old.pth")
    text = words(report("HEAD"))
    shown = text[text.index("Parameters ") : text.index(" Training Loss")]
    assert shown.endswith(
        'Here threads auto 2 weights null old.pth shuffle true false lr 1e-06 0.01 augment [] ["crop", "flip"]'
    )


def test_names_and_contents_are_escaped(outputs: Path) -> None:
    write_outputs(outputs, ["<b>T-shirt</b>", "NA", 'a "quoted", name'])
    write_json(outputs / "metrics/environment.json", [{"<i>key": "</td><script>alert(1)</script>"}])
    page = report(lineage="</pre><script>alert(2)</script>")
    assert not re.search("<b>|<i>|<script", page)
    assert 'title="true: &lt;b&gt;T-shirt&lt;/b&gt;, predicted: a &#34;quoted&#34;, name: 2 of 8"' in page
    text = words(page)
    assert "NA 100.00%" in text
    assert "</pre><script>alert(2)</script>" in text


def test_quotes_for_spreadsheets_are_removed(outputs: Path) -> None:
    write_outputs(outputs, ["'=1+1", "Trouser"])
    text = words(report())
    assert "=1+1 Trouser 2 25.00%" in text
    assert "'=1+1" not in text


@pytest.mark.parametrize(("count", "numbers"), [(2, 3), (20, 21), (100, 0)])
def test_the_matrix_has_numbers_up_to_20_classes(outputs: Path, count: int, numbers: int) -> None:
    write_outputs(outputs, [f"class {index}" for index in range(count)])
    page = report()
    cells = re.findall(r'<td class="(right|wrong)[^>]*title="true: class[^>]*>(\d*)</td>', page)
    assert [kind for kind, _ in cells].count("right") == count
    assert [kind for kind, _ in cells].count("wrong") == 1
    assert sum(number != "" for _, number in cells) == numbers
    assert len(page) < 1_000_000


def test_with_more_than_100_classes_there_is_no_matrix(outputs: Path) -> None:
    write_outputs(outputs, [f"class {index}" for index in range(150)])
    text = words(report())
    assert "A matrix of 150 classes would be unreadable. The table lists the most frequent confusions." in text
    assert "class 0 class 149 2 25.00%" in text


def test_the_same_state_gives_the_same_bytes(project: Project) -> None:
    assert report() == report()


@pytest.mark.parametrize(
    "path",
    ["metrics/epochs.csv", "metrics/plots/mistakes.png", "metrics/predictions.csv", "data/annotations/train.csv"],
)
def test_a_missing_output_is_an_error_and_the_earlier_report_stays(outputs: Path, path: str) -> None:
    before = report()
    (outputs / path).unlink()
    with pytest.raises(PipelineError, match=f"^{path}: missing; `dvc repro` makes it, "):
        report()
    assert Path("../report.html").read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("metrics/test.json", b'{"accuracy": 0.5'),
        ("metrics/epochs.csv", b"epoch,train_loss,val_loss,val_accuracy\n1,high,1.0,0.5\n"),
        ("metrics/plots/confusion.csv", b"\xff\xfe\0"),
        ("metrics/predictions.csv", b"file,split,label,predicted,P(a)\n1.jpg,test,a,a,high\n"),
    ],
)
def test_a_malformed_output_is_an_error(outputs: Path, path: str, content: bytes) -> None:
    (outputs / path).write_bytes(content)
    with pytest.raises(PipelineError, match=rf"^{path}: .+ \(.+\); `dvc repro` "):
        report()


@pytest.mark.parametrize(
    ("path", "old", "new", "pair"),
    [
        ("metrics/train.json", "0.75", "0.7", "metrics/epochs.csv and metrics/train.json"),
        ("metrics/classes.csv", "Trouser", "Skirt", "metrics/plots/confusion.csv and metrics/classes.csv"),
        ("metrics/test.json", "0.91", "0.93", "metrics/plots/confusion.csv and metrics/test.json"),
        (
            "metrics/predictions.csv",
            "test,Trouser",
            "test,Ankle boot",
            "metrics/predictions.csv and metrics/plots/conf",
        ),
        ("data/annotations/test.csv", "0-0.png,0", "0-0.png,1", "metrics/classes.csv and data/annotations"),
    ],
)
def test_outputs_of_different_runs_are_an_error(outputs: Path, path: str, old: str, new: str, pair: str) -> None:
    (outputs / path).write_text((outputs / path).read_text().replace(old, new, 1))
    with pytest.raises(PipelineError, match=f"^{pair}.* belong to different runs; run `dvc checkout` or `dvc repro`$"):
        report()


def test_a_browser_without_a_network_shows_all_of_it(project: Project) -> None:
    write_outputs(project.root, [*NAMES, "<b>Hat</b> & scarf", "a shirt that was washed far too hot"])
    report(lineage="commit -> data -> weights")
    address = (project.root.parent / "report.html").as_uri()
    requests: list[str] = []
    complaints: list[str] = []
    with started_browser() as browser, new_page(browser) as page:
        page.context.set_offline(True)
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)

        shown = page.locator("body").inner_text()
        assert "95.00%" in shown
        assert "95 % interval 74.15% to 97.68%" in shown
        assert "+3.33 points better" in shown
        assert "photos/0.jpg" in shown
        assert "<b>Hat</b> & scarf" in shown
        assert "commit -> data -> weights" in shown
        assert page.locator("table.matrix").get_by_text("6", exact=True).is_visible()
        assert page.locator("svg").get_by_text("kept: epoch 2").count() == 2
        page.get_by_text("Values by epoch").click()
        assert page.get_by_text("2 (kept)").is_visible()

        widths = page.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
        assert widths == [480, 800, 1280, 480]
        colours = []
        for width, dark in ((1200, False), (400, True)):
            page.set_viewport_size({"width": width, "height": 800})
            page.emulate_media(color_scheme="dark" if dark else "light")
            assert page.evaluate("document.documentElement.scrollWidth") == width  # wide parts scroll separately
            colours.append(page.evaluate(COLOURS))
    assert all(light != dark for light, dark in zip(*colours, strict=True))
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}
    assert [url for url in requests if url.startswith("file:")] == [address]
    assert complaints == []
