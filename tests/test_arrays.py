"""Image arrays on disk: their bytes, reading by row, and what is refused of them."""

import hashlib
import io
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import write_annotations, write_arrays
from project import reproduced_project

from classifier.data.arrays import ArrayFiles, ImageArrays, array_files, differing_rows
from classifier.data.dataset import CustomImageDataset
from classifier.pipeline.errors import PipelineError

PIXELS = (np.arange(40 * 3 * 4 * 5) * 7919 % 251).astype(np.uint8).reshape(40, 3, 4, 5)
RESULTS = ("models/model_weights.pth", "metrics/")
TEN_IMAGES = 10 * 3 * 4 * 5  # bytes


@pytest.fixture(params=[TEN_IMAGES, TEN_IMAGES + 59, 40 * 60], ids=["full files", "not quite", "one file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_arrays(tmp_path / "images", PIXELS, request.param)


@pytest.fixture
def four(tmp_path: Path) -> Path:
    return write_arrays(tmp_path / "four", PIXELS, TEN_IMAGES)


def test_images_are_read_by_row(folder: Path) -> None:
    arrays = ImageArrays(folder)
    assert (arrays.count, arrays.image_shape) == (40, (3, 4, 5))
    for rows in ([0], [39, 0, 10, 9, 10, 25], [], range(40)):
        assert np.array_equal(arrays.read(np.array(rows, np.int64)), PIXELS[list(rows)])
    out = np.empty((2, 3, 4, 5), np.uint8)
    assert arrays.read(np.array([11, 3]), out) is out
    assert np.array_equal(out, PIXELS[[11, 3]])
    assert np.array_equal(pickle.loads(pickle.dumps(arrays)).read(np.array([17])), PIXELS[[17]])  # noqa: S301, our own


def test_the_files_are_those_of_numpy(four: Path) -> None:
    assert [path.name for path in array_files(four)] == [f"images-{number:05}.npy" for number in range(4)]
    for number, path in enumerate(array_files(four)):
        file = io.BytesIO()
        np.save(file, PIXELS[number * 10 :][:10])
        assert path.read_bytes() == file.getvalue()


def test_the_bytes_are_pinned(tmp_path: Path) -> None:
    """Other bytes would change data/images for everyone."""
    write_arrays(tmp_path / "one", PIXELS)
    content = (tmp_path / "one/images-00000.npy").read_bytes()
    assert hashlib.md5(content, usedforsecurity=False).hexdigest() == "582d26b240bdae691c2eecbe8877bb94"


def test_rows_may_be_written_in_any_order_and_across_files(tmp_path: Path, four: Path) -> None:
    (tmp_path / "other").mkdir()
    files = ArrayFiles(tmp_path / "other", 40, (3, 4, 5), TEN_IMAGES)
    for first, last in [(25, 40), (0, 7), (7, 25)]:
        files.write(first, PIXELS[first:last])
    for one, other in zip(array_files(four), array_files(tmp_path / "other"), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_a_changed_image_changes_one_file(four: Path, tmp_path: Path) -> None:
    changed = PIXELS.copy()
    changed[[15, 18], 0, 0, 0] ^= 1
    other = write_arrays(tmp_path / "other", changed, TEN_IMAGES)
    pairs = zip(array_files(four), array_files(other), strict=True)
    assert [one.name for one, two in pairs if one.read_bytes() != two.read_bytes()] == ["images-00001.npy"]
    assert differing_rows(ImageArrays(four), ImageArrays(other)) == [15, 18]


def test_fewer_images_or_other_shapes_differ(four: Path, tmp_path: Path) -> None:
    fewer = ImageArrays(write_arrays(tmp_path / "fewer", PIXELS[:38]))
    assert differing_rows(ImageArrays(four), fewer) == differing_rows(fewer, ImageArrays(four)) == [38, 39]
    turned = ImageArrays(write_arrays(tmp_path / "turned", PIXELS.transpose(0, 1, 3, 2)))
    assert differing_rows(fewer, turned) == list(range(40))


def test_no_images(tmp_path: Path) -> None:
    arrays = ImageArrays(write_arrays(tmp_path / "images", PIXELS[:0]))
    assert (arrays.count, arrays.image_shape) == (0, (3, 4, 5))


def saved(folder: Path, number: int, array: Any) -> None:
    np.save(folder / f"images-{number:05}.npy", array)


FAULTS: dict[str, tuple[Any, str]] = {
    "missing": (lambda folder: (folder / "images-00001.npy").unlink(), "images-00001.npy is missing; `dvc checkout "),
    "cut off": (
        lambda folder: (folder / "images-00001.npy").write_bytes((folder / "images-00001.npy").read_bytes()[:-1]),
        r"images-00001\.npy: not readable as a NumPy array: mmap length",
    ),
    "empty": (lambda folder: (folder / "images-00002.npy").write_bytes(b""), r"images-00002\.npy: not readable as a "),
    "junk": (lambda folder: (folder / "images-00002.npy").write_bytes(b"?" * 500), r"images-00002\.npy: not readable"),
    "objects": (lambda folder: saved(folder, 2, np.array([{}])), r"images-00002\.npy: not readable as a NumPy array"),
    "floats": (
        lambda folder: saved(folder, 3, PIXELS[:2] / 255),
        r"images-00003\.npy: float64 of shape \(2, 3, 4, 5\)",
    ),
    "flat": (
        lambda folder: saved(folder, 3, PIXELS[0]),
        r"images-00003\.npy: uint8 of shape \(3, 4, 5\), not uint8 \(",
    ),
    "order": (
        lambda folder: saved(folder, 3, np.asfortranarray(PIXELS[:10])),
        r"images-00003\.npy: uint8 of shape \(10, 3, 4, 5\), not uint8",
    ),
    "shape": (lambda folder: saved(folder, 3, PIXELS[:10, :1]), r"images-00003\.npy: shape \(10, 1, 4, 5\) does not "),
    "short": (
        lambda folder: saved(folder, 1, PIXELS[:9]),
        r"images-00001\.npy: shape \(9, 3, 4, 5\) does not continue",
    ),
    "long": (
        lambda folder: saved(folder, 3, PIXELS[:11]),
        r"images-00003\.npy: shape \(11, 3, 4, 5\) does not continue",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_file_is_one_line(four: Path, fault: str) -> None:
    spoil, complaint = FAULTS[fault]
    spoil(four)
    with pytest.raises(PipelineError, match=complaint) as caught:
        ImageArrays(four)
    assert "\n" not in str(caught.value)


def test_a_folder_without_arrays_is_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"no images-00000\.npy in it; `dvc repro` makes it"):
        ImageArrays(tmp_path)


def test_arrays_need_annotations_that_say_the_row(four: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\na.png,0\n")
    with pytest.raises(PipelineError, match=r"labels\.csv: no column row, which .*four needs"):
        CustomImageDataset(tmp_path / "labels.csv", four)


def test_rows_beyond_the_arrays_are_refused(four: Path, tmp_path: Path) -> None:
    write_annotations(tmp_path / "labels.csv", [0] * 41)
    with pytest.raises(PipelineError, match=r"labels\.csv, row 42: row '40' is not one of 0\.\.39"):
        CustomImageDataset(tmp_path / "labels.csv", four)


def test_opening_takes_no_memory_for_the_images(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    ArrayFiles(tmp_path / "images", 100_000, (3, 224, 224))  # 14 GiB, which take no room on disk
    tracemalloc.start()
    try:
        arrays = ImageArrays(tmp_path / "images")
        assert arrays.read(np.array([99_999, 5])).sum() == 0
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_several_files_give_the_results_of_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    one = reproduced_project(tmp_path_factory, export_formats="[pth]")
    several = one.copy_without_results(tmp_path_factory.mktemp("several") / "project")
    code = several.root / "classifier/data/arrays.py"
    small = code.read_text().replace("SHARD_BYTES = 2**30", "SHARD_BYTES = 2**16")
    assert small != code.read_text()
    code.write_text(small)
    several.dvc("repro")
    assert len(array_files(several.root / "data/images")) > 2
    results = [
        {path: md5 for path, md5 in project.outputs().items() if path.startswith(("data/annotations", *RESULTS))}
        for project in (one, several)
    ]
    assert len(results[0]) > 10
    assert results[0] == results[1]
