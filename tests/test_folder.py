"""Your own images, in the layouts that people have: which are taken, what they become, and what is told."""

import io
import os
import subprocess
import unicodedata
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from digits import LAYOUTS, write_digits
from PIL import Image
from project import Project

from classifier.pipeline.annotations import Names
from classifier.pipeline.errors import PipelineError
from classifier.pipeline.image_files import IMAGE_SUFFIXES, ImageFiles
from classifier.sources.folder import Layout, _finder, class_names, fetch, find_layout, read

PICTURE = io.BytesIO()
Image.new("L", (5, 4), 90).save(PICTURE, "PNG")


def write(target: Path, files: Mapping[str, str | bytes] | list[str]) -> Path:
    """A folder, or a zip if it is called so, of texts, bytes and (for a list of names) pictures."""
    files = files if isinstance(files, Mapping) else dict.fromkeys(files, PICTURE.getvalue())
    contents = {name: content.encode() if isinstance(content, str) else content for name, content in files.items()}
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
        return target
    for name, content in contents.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    return target


def pictures(*names: str) -> dict[str, str | bytes]:
    return dict.fromkeys(names, PICTURE.getvalue())


def layout(target: Path, files: Mapping[str, str | bytes] | list[str]) -> Layout:
    return find_layout(ImageFiles(write(target, files)))


def found(layout: Layout) -> dict[str, list[tuple[str, str]]]:
    """Class, and name below the folder of the class or of all images, of each image, by split."""
    splits = {}
    for split, entries in layout.splits.items():
        numbers = entries.labels({name: number for number, name in enumerate(entries.classes)})
        top = os.path.commonpath([os.path.dirname(f"/{name}") for name in entries.names])[1:]  # noqa: PTH120
        splits[split] = sorted(
            (label, name.removeprefix(top).lstrip("/") if layout.tables else name.split(f"{label}/", 1)[1])
            for label, name in zip([entries.classes[number] for number in numbers], entries.names, strict=True)
        )
    return splits


def refused(target: Path, files: Mapping[str, str | bytes] | list[str]) -> str:
    with pytest.raises(PipelineError) as caught:
        layout(target, files)
    return str(caught.value).replace(str(target), "photos")


# A folder for each class


@pytest.mark.parametrize("above", ["", "photos/", "my/own photos/"])
@pytest.mark.parametrize("kind", ["photos", "photos.zip"])
def test_a_folder_for_each_class(tmp_path: Path, kind: str, above: str) -> None:
    names = [f"{above}{name}" for name in ("cat/a.jpg", "cat/b/a.PNG", "dog/a.webp")]
    assert found(layout(tmp_path / kind, names)) == {"train": [("cat", "a.jpg"), ("cat", "b/a.PNG"), ("dog", "a.webp")]}


@pytest.mark.parametrize(
    "splits", [("train", "val", "test"), ("Training", "valid", "TEST"), ("train", "dev", "testing")]
)
def test_folders_for_the_splits_above_them(tmp_path: Path, splits: tuple[str, str, str]) -> None:
    names = [f"data/{split}/{name}/1.bmp" for split in splits for name in ("cat", "dog")]
    assert found(layout(tmp_path / "photos", names)) == {
        split: [("cat", "1.bmp"), ("dog", "1.bmp")] for split in ("train", "val", "test")
    }


def test_a_class_may_be_called_test_where_there_is_no_train(tmp_path: Path) -> None:
    assert found(layout(tmp_path / "photos", ["test/1.png", "blank/1.png"])) == {
        "train": [("blank", "1.png"), ("test", "1.png")]
    }


def test_test_images_without_classes_are_passed_over_and_that_is_said(tmp_path: Path) -> None:
    made = layout(tmp_path / "photos", ["train/cat/1.png", "train/dog/1.png", "test/1.png", "test/2.png"])
    assert list(made.splits) == ["train"]
    assert made.unused == ["2 images of test: they have no classes; `classifier predict` answers for them"]


def test_what_is_not_used_is_counted_and_clutter_passed_over(tmp_path: Path) -> None:
    files = pictures("train/cat/1.png", "train/dog/1.png", "old/1.png", "train/.hidden.png", "__MACOSX/train/cat/1.png")
    made = layout(tmp_path / "photos", files | {"README.txt": "x", "notes/a.txt": "x", "LICENSE": "x", "Thumbs.db": ""})
    assert made.unused == [
        "1 images in old, beside the folders of the splits",
        "files that are no images by their names: 2 .txt, 1 no suffix",
    ]


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ([], "photos: no images in it, which end in .avif, .bmp, .gif, .heic, .heif, .hif, .j2k,"),
        (["cat/1.png", "cat/2.png"], "photos: all images are of one class, 'cat'; two are needed, each in a folder of"),
        (["1.png", "2.png"], "photos: 2 images are in no folder of a class: 1.png, 2.png"),
        (["cat/1.png", "dog/1.png", "x.png"], "photos: 1 images are in no folder of a class: x.png"),
        (
            ["train/cat/1.png", "train/dog/1.png", "val/1.png"],
            "photos: 1 images are in no folder of a class: val/1.png",
        ),
        (
            ["cat/1\n.png", "dog/1.png"],
            "photos: 1 files cannot be named like this: file name 'cat/1\\n.png' has control",
        ),
        ([" /1.png", "dog/1.png"], "photos: ' ' cannot be the name of a class"),
    ],
)
def test_folders_without_sense_are_told(tmp_path: Path, files: list[str], complaint: str) -> None:
    (tmp_path / "photos").mkdir()
    assert refused(tmp_path / "photos", files).startswith(complaint)


def test_for_a_zip_in_a_folder_the_way_is_shown(tmp_path: Path) -> None:
    assert refused(tmp_path / "photos", {"x.zip": "z", "README.md": ""}).endswith(
        "; for the zip in it, set data_path: photos/x.zip"
    )


def test_a_name_that_leads_out_of_a_zip_is_refused(tmp_path: Path) -> None:
    assert "leads out of the image folder" in refused(tmp_path / "photos.zip", ["../cat/1.png", "dog/1.png"])


def test_a_link_to_a_folder_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "photos", ["cat/1.png", "dog/1.png"])
    (tmp_path / "photos/mouse").symlink_to(tmp_path / "photos/cat")
    with pytest.raises(PipelineError, match="photos/mouse: a symbolic link to a folder; put the folder itself there"):
        find_layout(ImageFiles(tmp_path / "photos"))


def test_a_link_that_leads_out_is_not_copied(tmp_path: Path) -> None:
    write(tmp_path / "photos", ["cat/1.png", "dog/1.png"])
    (tmp_path / "secret.png").write_text("secret")
    (tmp_path / "photos/cat/2.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(PipelineError, match=r"cat/2\.png in .*photos is not readable: it leads out"):
        fetch(tmp_path / "raw", tmp_path / "photos")
    assert not (tmp_path / "raw").exists()


# Tables

CATS_AND_DOGS = pictures("images/1.jpg", "images/2.jpg", "images/3.jpg")
EXPECTED = {"train": [("cat", "1.jpg"), ("cat", "3.jpg"), ("dog", "2.jpg")]}


@pytest.mark.parametrize(
    "table",
    [
        "file,label\n1.jpg,cat\n2.jpg,dog\n3.jpg,cat\n",
        "1.jpg,cat\n2.jpg,dog\n3.jpg,cat\n",
        "Image_ID,Breed\n1,cat\n2,dog\n3,cat\n",
        "photo,kind\nimages/1.jpg,cat\n./images/2.jpg,dog\nimages\\3.jpg,cat\n",
        "label,photo\ncat,1.jpg\ndog,2.jpg\ncat,3.jpg\n",
        "nr;class;filename;by\n1;cat;1.jpg;x\n2;dog;2.jpg;y\n3; cat ;3.jpg;\n",
        "\ufefffile\tlabel\r\n1.jpg\tcat\r\n\r\n2.jpg\tdog\r\n3.jpg\tcat\r\n",
    ],
)
@pytest.mark.parametrize("kind", ["photos", "photos.zip"])
def test_a_table_beside_images(tmp_path: Path, kind: str, table: str) -> None:
    made = layout(tmp_path / kind, CATS_AND_DOGS | {"labels.csv": table})
    assert found(made) == EXPECTED
    assert made.tables == ["labels.csv"]
    assert made.unused == []


def test_a_table_for_each_split(tmp_path: Path) -> None:
    files = pictures("train/1.jpg", "train/2.jpg", "test/1.jpg", "test/2.jpg")
    made = layout(
        tmp_path / "photos",
        files | {"train.csv": "id,label\n1,cat\n2,dog\n", "test_labels.csv": "1.jpg,dog\n2.jpg,cat\n"},
    )
    assert found(made) == {"train": [("cat", "1.jpg"), ("dog", "2.jpg")], "test": [("cat", "2.jpg"), ("dog", "1.jpg")]}


def test_as_kaggle_packs_it(tmp_path: Path) -> None:
    files = pictures("train/a1.jpg", "train/b2.jpg", "test/c3.jpg")
    tables = {
        "train.csv": "id,breed\na1,cat\nb2,dog\n",
        "test.csv": "id\nc3\n",
        "sample_submission.csv": "id,cat,dog\nc3,.5,.5\n",
    }
    made = layout(tmp_path / "photos.zip", files | tables)
    assert found(made) == {"train": [("cat", "a1.jpg"), ("dog", "b2.jpg")]}
    assert made.tables == ["train.csv"]
    assert made.unused == [
        "table test.csv: it has no column of classes; `classifier predict` answers for such images",
        "1 images that no row names",
    ]


def test_a_column_of_splits(tmp_path: Path) -> None:
    table = "file,label,split\n1.jpg,cat,train\n2.jpg,dog,Validation\n3.jpg,cat,test\n"
    assert found(layout(tmp_path / "photos", CATS_AND_DOGS | {"labels.csv": table})) == {
        "train": [("cat", "1.jpg")], "val": [("dog", "2.jpg")], "test": [("cat", "3.jpg")],
    }  # fmt: skip


def test_a_first_row_whose_class_others_have_is_no_header(tmp_path: Path) -> None:
    table = "0,cat\n1,cat\n2,dog\n3,cat\n"
    complaint = "photos/labels.csv, row 1: no image is called '0'"
    assert refused(tmp_path / "photos", CATS_AND_DOGS | {"labels.csv": table}) == complaint


@pytest.mark.parametrize("header", ["image,label", "Label,Image"])
def test_a_header_is_one_also_where_an_image_is_called_like_it(tmp_path: Path, header: str) -> None:
    rows = ["cat/image.png,cat", "dog/image.png,dog", "image.png,dog"]
    if header == "Label,Image":
        rows = [",".join(reversed(row.split(","))) for row in rows]
    files = pictures("cat/image.png", "dog/image.png", "image.png") | {"labels.csv": "\n".join([header, *rows]) + "\n"}
    names = [("cat", "cat/image.png"), ("dog", "dog/image.png"), ("dog", "image.png")]
    assert found(layout(tmp_path / "photos", files)) == {"train": names}


def test_a_name_is_found_in_either_form_of_its_accents(tmp_path: Path) -> None:
    """macOS has `é` as two characters in names of files, tables have one."""
    one, two = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))
    for name, told in [(one, two), (two, one)]:
        target = tmp_path / str(len(name))
        files = pictures(name, "2.png") | {"labels.csv": f"file,label\n{told},cat\n2.png,dog\n"}
        assert found(layout(target, files)) == {"train": [("cat", name), ("dog", "2.png")]}


def test_many_images_with_one_last_name_are_found_by_the_folders_above_them() -> None:
    """As patient00001/study1/view1_frontal.jpg: looking through all of that name for each row would take an hour."""
    names = [f"patient{number:05}/study1/view1_frontal.jpg" for number in range(20_000)]
    find = _finder(Names(names))
    assert [find(name, "") for name in names] == [[name] for name in names]
    assert [find(name.removesuffix(".jpg"), "") for name in names[:10]] == [[name] for name in names[:10]]
    assert find("view1_frontal.jpg", "")[:2] == names[:2]


def test_a_whole_name_wins_over_one_that_ends_like_it(tmp_path: Path) -> None:
    files = pictures("1.jpg", "2.jpg", "thumbs/1.jpg", "thumbs/2.jpg")
    made = layout(tmp_path / "photos", files | {"labels.csv": "file,label\n1.jpg,cat\n2.jpg,dog\n"})
    assert found(made) == {"train": [("cat", "1.jpg"), ("dog", "2.jpg")]}
    assert made.unused == ["2 images that no row names"]


def test_all_faulty_rows_of_a_table_are_told(tmp_path: Path) -> None:
    files = pictures("a/1.jpg", "b/1.jpg", "2.jpg") | {
        "labels.csv": "file,label\n2.jpg,cat\n2.jpg,dog\n3.jpg,cat\n1.jpg,cat\na/1.jpg,\nb/1.jpg\n"
    }
    assert refused(tmp_path / "photos", files).splitlines() == [
        "photos/labels.csv: 5 faults:",
        "  row 3: 2.jpg is also in row 2 of labels.csv",
        "  row 4: no image is called '3.jpg'",
        "  row 5: '1.jpg' may be a/1.jpg or b/1.jpg",
        "  row 6: no class",
        "  row 7: columns: 1 instead of 2",
    ]


@pytest.mark.parametrize(
    ("tables", "complaint"),
    [
        ({"a.csv": "1.jpg,cat\n", "b.csv": "2.jpg,dog\n"}, "photos: several tables, a.csv, b.csv; keep one, or call"),
        (
            {"a.csv": "file,size,day\n1.jpg,3,4\n"},
            "photos/a.csv, row 1: no columns of files and classes in 'file,size,",
        ),
        ({"a.csv": "file,label,split\n1.jpg,cat,x\n"}, "photos/a.csv, row 2: split 'x' is none of train, val and test"),
        ({"a.csv": "file,label,split\n1.jpg,cat,test\n"}, "photos: no training images in a.csv"),
        ({"a.csv": ""}, "photos/a.csv: empty, without even a header"),
        ({"a.csv": b"1.jpg,caf\xe9\n"}, "photos/a.csv, row 1: not UTF-8"),
        ({"sample_submission.csv": "id,cat\n"}, "photos: no table that gives the images their classes"),
        (
            {"train.csv": "1.jpg,cat\n", "test.csv": "1.jpg,dog\n"},
            "photos/train.csv, row 1: images/1.jpg is also in row 1",
        ),
    ],
)
def test_tables_without_sense_are_told(tmp_path: Path, tables: dict[str, str | bytes], complaint: str) -> None:
    assert refused(tmp_path / "photos", CATS_AND_DOGS | tables).startswith(complaint)


# What they become


def test_classes_are_numbered_in_the_order_of_their_names_and_of_their_numbers(tmp_path: Path) -> None:
    for names, order in [(["b", "a", "10"], ["10", "a", "b"]), (["10", "9", "2"], ["2", "9", "10"])]:
        target = tmp_path / "-".join(order)
        fetch(target / "raw", write(target / "photos", [f"{name}/1.png" for name in names]))
        assert class_names(target / "raw") == order
        assert read(target / "raw")["train"].labels.tolist() == [0, 1, 2]


def test_two_classes_with_the_same_number_have_one_order(tmp_path: Path) -> None:
    names = [f"{'0' * zeros}{number}" for number in (1, 2) for zeros in range(4)]
    fetch(tmp_path / "raw", write(tmp_path / "photos", [f"{name}/1.png" for name in names]))
    assert class_names(tmp_path / "raw") == ["0001", "001", "01", "1", "0002", "002", "02", "2"]


def test_names_in_a_zip_are_utf8_also_where_no_flag_says_so(tmp_path: Path) -> None:
    """As Info-ZIP and macOS write them; what is not UTF-8 is in the code page of the first PCs."""
    archive = write(tmp_path / "photos.zip", ["cafXX/1.png", "thX/1.png", "thX/2.png"])
    content = archive.read_bytes().replace(b"cafXX", "café".encode()).replace(b"thX/1", b"th\x82/1")
    archive.write_bytes(content.replace(b"thX/2", b"th\x82/2"))
    fetch(tmp_path / "raw", archive)
    assert class_names(tmp_path / "raw") == ["café", "thé"]


def test_images_have_names_of_their_own_and_one_order(tmp_path: Path) -> None:
    files = ["dog/b.png", "dog/a.jpg", "dog/a.png", "cat/x/a.jpg", "cat/c.tar.png"]
    fetch(tmp_path / "raw", write(tmp_path / "photos", files))
    data = read(tmp_path / "raw")["train"]
    assert data.names == ["cat/c.tar.png", "cat/x/a.jpg", "dog/a.jpg", "dog/a.png", "dog/b.png"]
    assert data.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.images[4] == PICTURE.getvalue()


def test_only_what_is_used_is_copied(tmp_path: Path) -> None:
    files = pictures("train/cat/1.png", "train/dog/1.png", "test/1.png") | {"README.md": "x"}
    fetch(tmp_path / "raw", write(tmp_path / "photos", files))
    copied = [path.relative_to(tmp_path / "raw").as_posix() for path in (tmp_path / "raw").rglob("*.*")]
    assert sorted(copied) == ["train/cat/1.png", "train/dog/1.png"]


def test_a_zip_is_kept_as_it_is(tmp_path: Path) -> None:
    source = write(tmp_path / "photos.zip", ["cat/1.png", "dog/1.png"])
    fetch(tmp_path / "raw", source)
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["images.zip"]
    assert (tmp_path / "raw/images.zip").read_bytes() == source.read_bytes()
    assert class_names(tmp_path / "raw") == ["cat", "dog"]


def test_the_layouts_of_the_same_images_are_read_alike(tmp_path: Path) -> None:
    everything = []
    for kind in LAYOUTS:
        target = tmp_path / f"digits{'.zip' if kind == 'zip' else f'-{kind}'}"
        write_digits(target, kind)
        fetch(tmp_path / kind, target)
        data = read(tmp_path / kind)["train"]
        assert len(data.images) == 1797
        everything.append((class_names(tmp_path / kind), data.labels.tolist(), list(data.images)))
    assert everything[0][0] == [str(digit) for digit in range(10)]
    assert everything[0] == everything[1] == everything[2]


def test_there_is_nothing_at_the_path(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"data_path: .*nowhere does not exist"):
        fetch(tmp_path / "raw", tmp_path / "nowhere")


# Git


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    project = Project(tmp_path / "repository")
    (project.root / "data/own").mkdir(parents=True)
    (project.root / ".gitignore").write_text("/data/own/?*\n!/data/own/README.md\n")
    (project.root / "data/own/README.md").write_text("Your own images\n")
    project.commit()
    monkeypatch.chdir(project.root)
    return project.root


@pytest.mark.parametrize("place", ["data/own", "data/own/photos", "data/own/photos.zip", "../photos"])
def test_images_that_git_does_not_take_are_taken(repository: Path, place: str) -> None:
    write(Path(place), ["cat/1.png", "dog/1.png"])
    fetch(Path("data/raw"), Path(place))
    assert class_names(Path("data/raw")) == ["cat", "dog"]


@pytest.mark.parametrize("place", ["photos", "photos.zip", "data/photos"])
@pytest.mark.parametrize("added", [False, True])
def test_images_that_git_would_take_are_refused(repository: Path, place: str, added: bool) -> None:
    write(Path(place), ["cat/1.png", "dog/1.png"])
    if added:
        subprocess.run(["git", "add", place], check=True)
    with pytest.raises(PipelineError, match=rf"is in Git, or would get into it .*`dvc add {place}`"):
        fetch(Path("data/raw"), Path(place))


def test_the_suffixes_are_pillows_for_the_formats_that_are_decoded() -> None:
    from classifier.data.decoding import FORMATS

    Image.init()
    of_pillow = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    assert of_pillow >= IMAGE_SUFFIXES
    rare = {".apng", ".avifs", ".dib", ".heics", ".heifs", ".j2c", ".jpc", ".jpf", ".pfm"}
    assert of_pillow - IMAGE_SUFFIXES <= rare
