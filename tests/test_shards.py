"""Images that are too many for one zip: a folder of zips, and everything as with one."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from imports import ROOT
from project import Project, reproduced_project

from classifier.pipeline.archive import Images, shards, write_images
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import hash_file
from classifier.pipeline.zip_format import write_zip

FILES = {f"train/{index:02d}.png": bytes([index]) * 100 for index in range(40)}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_images(tmp_path / "images.zip", FILES.items(), shard_bytes=1000)
    return tmp_path / "images.zip"


def test_images_of_few_bytes_are_in_one_zip(tmp_path: Path) -> None:
    write_images(tmp_path / "images.zip", FILES.items(), shard_bytes=4000)
    write_zip(tmp_path / "one.zip", FILES.items())
    assert (tmp_path / "images.zip").read_bytes() == (tmp_path / "one.zip").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.zip", "one.zip"]


def test_no_images_are_in_one_zip_too(tmp_path: Path) -> None:
    write_images(tmp_path / "images.zip", [])
    assert list(Images(tmp_path / "images.zip").names()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["images.zip"]


def test_images_of_more_bytes_are_in_several_zips(sharded: Path) -> None:
    assert [path.name for path in shards(sharded)] == [f"images-{number:05}.zip" for number in range(4)]
    inner = [zipfile.ZipFile(path).namelist() for path in shards(sharded)]
    assert [len(names) for names in inner] == [10] * 4
    assert [name for names in inner for name in names] == list(FILES)
    assert [path.name for path in sharded.parent.iterdir()] == ["images.zip"]


def test_a_zip_is_full_when_its_images_have_that_many_bytes(tmp_path: Path) -> None:
    write_images(tmp_path / "images.zip", [("a", bytes(9)), ("b", bytes(1)), ("c", bytes(5))], shard_bytes=10)
    assert [zipfile.ZipFile(path).namelist() for path in shards(tmp_path / "images.zip")] == [["a", "b"], ["c"]]


def test_several_zips_are_read_as_one(sharded: Path) -> None:
    images = Images(sharded)
    assert {name: images.read(name) for name in images.names()} == FILES


def test_the_same_images_give_the_same_zips(sharded: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "again", FILES.items(), shard_bytes=1000)
    digests = [list(map(hash_file, shards(folder))) for folder in (sharded, tmp_path / "again")]
    assert digests[0] == digests[1]


def test_a_changed_image_changes_one_zip(sharded: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "other", (FILES | {"train/15.png": bytes(100)}).items(), shard_bytes=1000)
    changed = [
        before.name
        for before, after in zip(shards(sharded), shards(tmp_path / "other"), strict=True)
        if before.read_bytes() != after.read_bytes()
    ]
    assert changed == ["images-00001.zip"]


def test_an_image_that_is_in_two_zips_is_refused(sharded: Path) -> None:
    write_zip(sharded / "images-00003.zip", [("train/05.png", b"another")])
    with pytest.raises(PipelineError, match=r"train/05\.png in .*images\.zip is not readable: it is there more than"):
        Images(sharded).read("train/05.png")


def test_a_broken_zip_is_named(sharded: Path) -> None:
    (sharded / "images-00002.zip").write_bytes(b"no zip")
    with pytest.raises(PipelineError, match=r"images-00002\.zip: not readable as a zip: File is not a zip file"):
        Images(sharded)


READ_ALL = """
import resource, sys
from pathlib import Path
from classifier.pipeline.archive import Images
from classifier.pipeline.errors import run_main
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[3])))
def main():
    images = Images(Path(sys.argv[1]))
    print(sum(len(images.read(name)) for name in images.names()))
run_main(main)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize(("allowed", "on_demand"), [(64, 256), (64, 64)])
def test_more_zips_than_files_may_be_open_are_read_where_the_system_allows_it_and_else_told(
    tmp_path: Path, allowed: int, on_demand: int
) -> None:
    write_images(tmp_path / "images.zip", ((f"{n}.png", bytes(10)) for n in range(100)), shard_bytes=10)
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, tmp_path / "images.zip", str(allowed), str(on_demand)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if on_demand > 100:
        assert (done.returncode, done.stdout) == (0, "1000\n")
    else:
        assert done.returncode == 1
        assert "its 100 zips are more files than this process may have open; allow more: ulimit -Hn 1100" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_folder_with_other_files_too_is_a_folder_of_images(sharded: Path) -> None:
    (sharded / "photo.png").write_bytes(b"")
    assert list(Images(sharded).names()) == [*(f"images-{number:05}.zip" for number in range(4)), "photo.png"]


def test_a_pipe_with_the_name_of_a_zip_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "images-00000.zip")
    with pytest.raises(PipelineError, match=r"images-00000\.zip in .* is not readable: it is not a regular file"):
        Images(tmp_path).read("images-00000.zip")


@pytest.mark.slow
def test_the_results_are_those_of_one_zip(tmp_path_factory: pytest.TempPathFactory) -> None:
    one = reproduced_project(tmp_path_factory, export_formats="[pth]")
    several = one.copy_without_results(tmp_path_factory.mktemp("several") / "project")
    code = several.root / "classifier/pipeline/archive.py"
    small = code.read_text().replace("SHARD_BYTES = 2**30", "SHARD_BYTES = 2**16")
    assert small != code.read_text()
    code.write_text(small)
    several.dvc("repro")
    several.commit()
    assert len(shards(several.root / "data/images.zip")) > 2
    assert results(several) == results(one)

    shard = several.root / "data/images.zip/images-00001.zip"
    kept = Images(shard)
    names = list(kept.names())
    contents = [(name, kept.read(name)) for name in names]
    shard.unlink()
    write_zip(shard, contents[1:])
    changed = several.run(sys.executable, "-m", "classifier", "verify", check=False)
    assert changed.returncode == 1
    assert [line.split()[0] for line in changed.stdout.splitlines() if "DRIFTED" in line] == ["data/images.zip"]
    assert "models/model_weights.pth  bit-identical" in changed.stdout
    assert f"differing images: {names[0]}" in changed.stdout
    refused = several.run(sys.executable, "-m", "stages", "train", check=False)
    assert "data/images.zip: changed since the stage that wrote it" in refused.stderr


def results(project: Project) -> dict[str, str]:
    """The md5 of what is made of the images."""
    return {
        path: md5
        for path, md5 in project.outputs().items()
        if path.startswith(("data/annotations", "models/model_weights.pth", "metrics/"))
    }
