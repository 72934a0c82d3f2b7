"""From the images of a source to image arrays: one shape, the same pixels, and all unusable images listed."""

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from imports import ROOT
from pictures import write_zip
from PIL import Image
from tracker import wait_for

from classifier.data.arrays import ImageArrays
from classifier.data.decoding import decode_image
from classifier.pipeline.errors import PipelineError
from classifier.preparation import preprocessing, workers
from classifier.preparation.preprocessing import Recipe, image_names, rows_of, write_images
from classifier.sources import LabelledImages
from classifier.sources.folder import fetch, read

GENERATOR = np.random.default_rng(0)


def encoded(height: int, width: int, channels: int = 3, kind: str = "PNG", **options: Any) -> bytes:
    shape = (height, width) if channels == 1 else (height, width, channels)
    file = io.BytesIO()
    Image.fromarray(GENERATOR.integers(0, 256, shape, dtype=np.uint8)).save(file, kind, **options)
    return file.getvalue()


def images(*contents: Any) -> LabelledImages:
    return LabelledImages(contents, np.zeros(len(contents), np.int64))


def common_shape(splits: dict[str, LabelledImages], image_size: int | None, channels: int | None) -> Any:
    with workers.start_workers(preprocessing.count_files(splits)) as pool:
        return preprocessing.common_shape(pool, splits, (image_size, image_size) if image_size else None, channels)


def written(folder: Path, splits: dict[str, LabelledImages], shape: tuple[int, int, int]) -> tuple[Any, Any]:
    """The pixels (N, C, H, W) of the arrays, and the SHA-256 of each image."""
    folder.mkdir()
    with workers.start_workers(preprocessing.count_files(splits)) as pool:
        digests, faults = write_images(pool, splits, Recipe(shape, "crop", (255, 255, 255), "full"), folder)
    assert faults == {}
    arrays = ImageArrays(folder)
    return arrays.read(np.arange(arrays.count)), digests


GREY, COLOUR = encoded(20, 30, 1), encoded(20, 30)


@pytest.mark.parametrize(
    ("contents", "image_size", "channels", "shape"),
    [
        ([GREY, GREY], None, None, (1, 20, 30)),
        ([GREY, COLOUR], None, None, (3, 20, 30)),
        ([COLOUR, COLOUR], None, 1, (1, 20, 30)),
        ([GREY, encoded(30, 20, 1)], None, None, (1, 128, 128)),
        ([encoded(129, 30, 1)], None, None, (1, 128, 128)),
        ([encoded(128, 30, 1)], None, None, (1, 128, 30)),
        ([GREY], 16, None, (1, 16, 16)),
        ([GREY], 16, 3, (3, 16, 16)),
        ([np.zeros((6, 5), np.uint8)], None, None, (1, 6, 5)),
        ([np.zeros((6, 5, 3), np.uint8)], None, None, (3, 6, 5)),
        ([np.zeros((6, 5), np.uint8), np.zeros((5, 6), np.uint8)], None, None, (1, 128, 128)),
    ],
)
def test_the_shape_that_all_are_brought_to(
    contents: list[Any], image_size: int | None, channels: int | None, shape: tuple[int, int, int]
) -> None:
    assert common_shape({"train": images(*contents)}, image_size, channels) == shape


def test_the_shape_is_of_all_splits() -> None:
    assert common_shape({"train": images(GREY), "test": images(COLOUR)}, None, None) == (3, 20, 30)


def test_a_picture_that_is_turned_has_its_upright_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(20, 30, kind="JPEG", exif=exif)
    assert common_shape({"train": images(turned)}, None, None) == (3, 30, 20) == decode_image(turned).shape


@pytest.mark.parametrize("shape", [(1, 20, 30), (3, 20, 30), (3, 8, 8), (1, 64, 32)])
def test_images_are_decoded_scaled_and_written_in_order(shape: tuple[int, int, int], tmp_path: Path) -> None:
    contents = [encoded(20 + index % 3, 30, (1, 3)[index % 2]) for index in range(150)]
    splits = {"train": images(*contents[:100]), "test": images(*contents[100:])}
    pixels, digests = written(tmp_path / "images", splits, shape)
    assert pixels.shape == (150, *shape)
    for image, digest, content in zip(pixels, digests, contents, strict=True):
        assert np.array_equal(image, decode_image(content, shape[1:], shape[0], fit="crop"))
        assert bytes(digest) == hashlib.sha256(image.tobytes()).digest()
    assert {split: (rows[0], rows[-1]) for split, rows in rows_of(splits).items()} == {
        "train": (0, 99),
        "test": (100, 149),
    }
    assert image_names("test", splits["test"])[49] == "test/00049.png"


def test_processes_write_the_same_bytes_as_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They read the files of a zip themselves."""
    contents = [(f"{index % 2}/{index}.png", encoded(9, 12)) for index in range(50)]
    write_zip(tmp_path / "images.zip", contents)
    fetch(tmp_path / "raw", tmp_path / "images.zip")
    splits = read(tmp_path / "raw")
    threads, _ = written(tmp_path / "threads", splits, (3, 8, 8))
    monkeypatch.setattr(workers, "FILES_FOR_PROCESSES", 10)
    monkeypatch.setattr(workers, "usable_cores", lambda: 2)
    processes, digests = written(tmp_path / "processes", splits, (3, 8, 8))
    assert np.array_equal(threads, processes)
    assert len(np.unique(digests)) == 50
    assert processes[0].tolist() == decode_image(contents[0][1], (8, 8), 3, fit="crop").tolist()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """The address of a Dask cluster of two processes, which work in another folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    python = sys.executable
    with contextlib.ExitStack() as stack:
        scheduler = subprocess.Popen(
            [python, "-m", "distributed.cli.dask_scheduler", "--port", "0", "--host", "127.0.0.1", "--no-dashboard",
             "--scheduler-file", tmp_path / "scheduler.json"],
            cwd=tmp_path, stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        stack.callback(scheduler.wait)
        stack.callback(scheduler.terminate)
        wait_for(lambda: (tmp_path / "scheduler.json").exists())
        workers = subprocess.Popen(
            [python, "-m", "distributed.cli.dask_worker", "--scheduler-file", tmp_path / "scheduler.json", "--nworkers",
             "2", "--nthreads", "1", "--no-dashboard"],
            cwd=tmp_path, stderr=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        stack.callback(workers.wait)
        stack.callback(workers.terminate)
        address = json.loads((tmp_path / "scheduler.json").read_text())["address"]
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
        yield address


@pytest.mark.slow
def test_a_cluster_writes_the_same_bytes_as_this_machine(tmp_path: Path, cluster: str) -> None:
    contents = [(f"{index % 2}/{index}.png", encoded(9, 12)) for index in range(300)]
    write_zip(tmp_path / "images.zip", contents)
    fetch(tmp_path / "raw", tmp_path / "images.zip")
    splits = read(tmp_path / "raw")
    here, _ = written(tmp_path / "here", splits, (3, 8, 8))
    (tmp_path / "there").mkdir()
    with workers.start_workers(300, cluster) as pool:
        assert pool.workers == 2
        recipe = Recipe((3, 8, 8), "crop", (255, 255, 255), "full")
        assert preprocessing.common_shape(pool, splits, None, None) == (3, 9, 12)
        made = write_images(pool, splits, recipe, tmp_path / "there")
        assert made.faults == {}
        broken = {"train": images(GREY, b"?", GREY, b"?")}
        (tmp_path / "broken").mkdir()
        with pytest.raises(PipelineError, match=r"2 images cannot be used:\n  train/00001.*\n  train/00003"):
            write_images(pool, broken, recipe, tmp_path / "broken")
    for name in ("here", "there"):
        assert (tmp_path / name / "images-00000.npy").stat().st_size == 128 + here.size
    assert (tmp_path / "here/images-00000.npy").read_bytes() == (tmp_path / "there/images-00000.npy").read_bytes()


def test_a_cluster_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CLUSTER_SECONDS", 0.5)
    for address in ("tcp://127.0.0.1:9", "nonsense://x"):
        with (
            pytest.raises(PipelineError, match=rf"cluster: {address}: no Dask scheduler answers there: .*") as caught,
            workers.start_workers(10, address),
        ):
            pass
        assert "\n" not in str(caught.value)


def test_unusable_images_are_listed_by_processes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "FILES_FOR_PROCESSES", 1)
    monkeypatch.setattr(workers, "usable_cores", lambda: 2)
    with pytest.raises(PipelineError, match=r"2 images cannot be used:\n  train/00001.*\n  train/00003"):
        written(tmp_path / "images", {"train": images(GREY, b"?", GREY, b"?")}, (1, 8, 8))


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_become_what_files_of_them_become(channels: int, tmp_path: Path) -> None:
    pixels = GENERATOR.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    for number, shape in enumerate([(channels, 9, 12), (channels, 6, 6)]):
        (first, second), _ = written(tmp_path / str(number), {"train": images(pixels, file.getvalue())}, shape)
        assert np.array_equal(first, second)


def test_all_images_that_cannot_be_used_are_told_by_their_names(tmp_path: Path) -> None:
    contents: list[Any] = [COLOUR, b"no image", COLOUR[:40], np.zeros((4, 4), np.uint16)]
    names = ("cat/0.jpg", "cat/1.jpg", "dog/2.jpg", "dog/3.jpg")
    data = {"train": LabelledImages(contents, np.zeros(4, np.int64), names)}
    assert common_shape(data, None, None) == (3, 20, 30)  # of those that can be used
    with pytest.raises(PipelineError) as caught:
        written(tmp_path / "images", data, (3, 8, 8))
    first, *faults, last = str(caught.value).splitlines()
    assert first == "3 images cannot be used:"
    assert [fault.split(": ")[0].strip() for fault in faults] == ["cat/1.jpg", "dog/2.jpg", "dog/3.jpg"]
    assert faults[2].endswith("uint16 of shape (4, 4), not uint8 (height, width) or (height, width, 3)")
    assert last == "Fix or remove them, or set on_bad_image: skip."


def test_of_many_faults_twenty_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with pytest.raises(PipelineError, match=r"50 images cannot be used, .*; the first 20:") as caught:
        written(tmp_path / "images", {"train": images(*[b""] * 50)}, (1, 8, 8))
    assert len(str(caught.value).splitlines()) == 22


@pytest.mark.parametrize("bad", [3, 30])
def test_images_without_a_header_and_those_that_cannot_be_decoded_are_listed_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    kinds = [b"no image\x1b", COLOUR[: len(COLOUR) // 2], b"", GREY]
    contents = [kinds[number % 4] for number in range(bad // 3 * 4)]
    with pytest.raises(PipelineError) as told:
        written(tmp_path / "images", {"train": images(*contents), "test": images(GREY)}, (1, 8, 8))
    lines = str(told.value).splitlines()
    assert lines[0].startswith(f"{bad} images cannot be used")
    assert len(lines) == 2 + min(bad, 20)
    expected = [f"train/{number:05d}.png" for number in range(len(contents)) if number % 4 != 3]
    assert [line.split(":")[0].strip() for line in lines[1:-1]] == expected[:20]
    everything = tmp_path / "reports/unusable-images.txt"
    assert everything.exists() == (bad > 20)
    if bad > 20:
        assert f"all of which are listed in {everything}; the first 20:" in lines[0]
        assert [line.split(":")[0] for line in everything.read_text().splitlines()] == expected
        assert everything.read_text().replace("\n", "").isprintable()


def test_few_unusable_images_may_be_left_out(tmp_path: Path) -> None:
    splits = {"train": images(*[GREY] * 38, b"?"), "test": images(b"", GREY)}
    recipe = Recipe((1, 8, 8), "pad", (255, 255, 255), "full")
    for share, complaint in [(0.05, ""), (0.04, "on_bad_image: skip leaves out 4% of the images at most. Fix or")]:
        folder = tmp_path / str(share)
        folder.mkdir()
        with workers.start_workers(preprocessing.count_files(splits)) as pool:
            if complaint:
                with pytest.raises(PipelineError, match=complaint):
                    write_images(pool, splits, recipe, folder, share)
                continue
            made = write_images(pool, splits, recipe, folder, share)
        assert {row: why.split(",")[0] for row, why in made.faults.items()} == dict.fromkeys(
            (38, 39), "it is none of AVIF"
        )
        assert not ImageArrays(folder).read(np.array([38, 39])).any()
