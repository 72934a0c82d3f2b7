"""Your own images: a folder for each class, or tables (CSV) that give images their classes; in a folder or a zip.

Layouts, all in any depth of folders above them:

<class>/x.jpg                       the splits are cut from all images
{train,val,test}/<class>/x.jpg      val and test are cut from train where they are not there
labels.csv beside images            columns for file and class, and maybe for the split
{train,val,test}.csv beside images  a table for each split; a test table without classes is passed over, and its images

Images lie in a class's folder in any depth. A table has a header, or two columns without one. The classes are numbered
in the order of their names, by value where all are numbers.
"""

import os
import re
import shutil
import subprocess
import unicodedata
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from classifier.pipeline.annotations import (
    CONTROL,
    LISTED_FAULTS,
    Names,
    faulty_rows,
    name_fault,
    parse_rows,
    shown,
)
from classifier.pipeline.errors import PipelineError, printable
from classifier.pipeline.image_files import IMAGE_SUFFIXES, ImageFiles
from classifier.pipeline.outputs import atomic
from classifier.progress import progress
from classifier.sources import LabelledImages

ZIP = "images.zip"  # in data/raw, whatever it was called, so that a new name does not make the data look changed
SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
# Headers of columns, without case, spaces and underscores
FILE_COLUMNS = ("file", "filename", "filepath", "image", "imagename", "imageid", "imagepath", "path", "id", "name")
LABEL_COLUMNS = ("label", "class", "classname", "category", "target", "species", "breed", "labels")
SPLIT_COLUMNS = ("split", "subset", "set", "fold")
TABLE_SUFFIXES = (".csv", ".tsv")
UNLABELLED = "they have no classes; `classifier predict` answers for them"


class Entries:
    """Images with their classes, in little more memory than their names have bytes."""

    def __init__(self) -> None:
        self.names = Names()
        self.classes: list[str] = []
        self._numbers: dict[str, int] = {}  # of the classes
        self._class_of = array("q")

    def append(self, name: str, class_name: str) -> None:
        self.names.append(name)
        if class_name not in self._numbers:
            self._numbers[class_name] = len(self.classes)
            self.classes.append(class_name)
        self._class_of.append(self._numbers[class_name])

    def labels(self, label_of: Mapping[str, int]) -> np.ndarray:
        """(N,) int64, by the labels of the classes."""
        return np.array([label_of[name] for name in self.classes], np.int64)[np.frombuffer(self._class_of, np.int64)]


class Layout(NamedTuple):
    """Entries by split, "train" at least; the tables they come from; what of the data is not used, for people."""

    splits: dict[str, Entries]
    tables: list[str]
    unused: list[str]


def fetch(raw: Path, data_path: Path) -> None:
    """Copy the images that are used, and their tables, from `data_path` into `raw`; a zip as it is.

    Raises PipelineError if there is no image, no class or no sense to be made of it, and if `dvc exp run` would commit
    the data to Git.
    """
    if not data_path.exists():
        raise PipelineError(f"data_path: {data_path} does not exist")
    _keep_out_of_git(data_path)
    images = ImageFiles(data_path)
    layout = find_layout(images)
    for text in layout.unused:
        print(f"not used: {printable(text)}", flush=True)
    with atomic(raw) as folder:
        folder.mkdir()
        if data_path.is_file():
            shutil.copyfile(data_path, folder / ZIP)
            return
        names = [*layout.tables, *(name for entries in layout.splits.values() for name in entries.names)]
        with progress("copying", "file", len(names)) as bar:
            for name in names:
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(images.read(name))
                bar.update()


def class_names(raw: Path) -> list[str]:
    """The names of the classes, by label."""
    return _names_of_classes(find_layout(_open(raw)))


def read(raw: Path) -> dict[str, LabelledImages]:
    """The splits that the data has, each in the order of label and name; all is "train" where it has none."""
    images = _open(raw)
    layout = find_layout(images)
    labels = {name: label for label, name in enumerate(_names_of_classes(layout))}
    splits = {}
    for split, entries in layout.splits.items():
        order = entries.names.order()
        of_names = entries.labels(labels)[order]
        by_label = np.argsort(of_names, kind="stable")
        names = Names(entries.names[place] for place in order[by_label])
        splits[split] = LabelledImages(_Contents(images, names), of_names[by_label], names)
    return splits


class _Contents(Sequence[bytes]):
    """The contents of files, read when they are asked for."""

    def __init__(self, images: ImageFiles, names: Sequence[str]) -> None:
        self.images = images
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return _Contents(self.images, self.names[index])
        return self.images.read(self.names[index])


def _open(raw: Path) -> ImageFiles:
    return ImageFiles(raw / ZIP if (raw / ZIP).is_file() else raw)


def _without_suffix(name: str) -> str:
    return name[: len(name) - len(PurePosixPath(name).suffix)]


def _names_of_classes(layout: Layout) -> list[str]:
    names = {name for entries in layout.splits.values() for name in entries.classes}
    if all(name.isdecimal() and name.isascii() for name in names):
        return sorted(names, key=lambda name: (int(name), name))  # 1 and 01 are two classes
    return sorted(names)


# What is where


def find_layout(images: ImageFiles) -> Layout:
    """Find the images with their classes. Raises PipelineError, with all files or rows at fault, if it is not clear."""
    where = str(images.path)
    names = images.names()
    if faults := [fault for name in names if (fault := name_fault(name))]:
        raise PipelineError(f"{where}: {_listed(faults, 'files cannot be named like this')}")
    pictures = Names(name for name in names if _suffix(name) in IMAGE_SUFFIXES)
    tables = [name for name in names if _suffix(name) in TABLE_SUFFIXES]
    used = {*IMAGE_SUFFIXES, *TABLE_SUFFIXES}
    others = Counter(suffix or "no suffix" for name in names if (suffix := _suffix(name)) not in used)
    if not pictures:
        zips = [name for name in names if _suffix(name) == ".zip"]
        hint = f"; for the zip in it, set data_path: {images.path / zips[0]}" if zips and images.path.is_dir() else ""
        raise PipelineError(f"{where}: no images in it, which end in {', '.join(sorted(IMAGE_SUFFIXES))}{hint}")
    del names  # they take as much memory as what is made of them
    layout = _from_tables(images, pictures, tables) if tables else _from_folders(where, pictures)
    classes = _names_of_classes(layout)
    if strange := [shown(name) for name in classes if CONTROL.search(name) or not name.strip()]:
        raise PipelineError(f"{where}: {', '.join(strange)} cannot be the name of a class")
    if len(classes) < 2:
        raise PipelineError(
            f"{where}: all images are of one class, {shown(classes[0])}; two are needed, each in a folder of its own"
        )
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(others.items()))
    return layout._replace(
        unused=[*layout.unused, *([f"files that are no images by their names: {kinds}"] * bool(kinds))]
    )


def _from_folders(where: str, pictures: Names) -> Layout:
    root = _common_folder(pictures)
    if root and len(pictures) == sum(name.rfind("/") == len(root) - 1 for name in pictures):
        root = root[: root.rfind("/", 0, -1) + 1]  # all images are in one folder: it is that of a class
    tops = {name[len(root) :].partition("/")[0] for name in pictures if "/" in name[len(root) :]}
    has_splits = "train" in {SPLITS.get(top.casefold()) for top in tops}
    splits: dict[str, Entries] = defaultdict(Entries)
    stray: dict[str, list[str]] = defaultdict(list)
    beside: Counter[str] = Counter()
    for name in pictures:
        path = name[len(root) :].split("/")
        split = SPLITS.get(path[0].casefold()) if has_splits else "train"
        above = path[has_splits:-1]
        if split is None or (has_splits and len(path) == 1):
            beside[path[0] if len(path) > 1 else "no folder"] += 1
        elif above:
            splits[split].append(name, above[0])
        else:
            stray[split].append(name)
    unused = [f"{count} images in {folder}, beside the folders of the splits" for folder, count in beside.items()]
    if "test" in stray and "test" not in splits:
        unused.append(f"{len(stray.pop('test'))} images of test: {UNLABELLED}")
    if faults := [name for names in stray.values() for name in names]:
        raise PipelineError(f"{where}: {_listed(faults, 'images are in no folder of a class')}")
    return Layout({split: splits[split] for split in ("train", "val", "test") if split in splits}, [], unused)


def _from_tables(images: ImageFiles, pictures: Names, tables: list[str]) -> Layout:
    depth = min(name.count("/") for name in tables)
    tables = [name for name in tables if name.count("/") == depth and "submission" not in name.casefold()]
    by_split = {split: name for name in tables if (split := _split_of_table(name))}
    chosen = by_split if "train" in by_split else {"": tables[0]} if len(tables) == 1 else {}
    if not chosen:
        which = f"several tables, {', '.join(tables)}" if tables else "no table that gives the images their classes"
        raise PipelineError(f"{images.path}: {which}; keep one, or call them train.csv, val.csv and test.csv")
    find = _finder(pictures)
    splits: dict[str, list[tuple[str, str]]] = defaultdict(list)
    used: list[str] = []
    unused = [f"table {name}" for name in tables if name not in chosen.values()]
    seen: dict[str, str] = {}
    for given, table in sorted(chosen.items()):
        rows = _read_table(images, table, given, find, seen)
        if rows is None:
            unused.append(f"table {table}: it has no column of classes; `classifier predict` answers for such images")
            continue
        used.append(table)
        for split, name, class_name in rows:
            splits[split].append((name, class_name))
    if not splits["train"]:
        raise PipelineError(f"{images.path}: no training images in {', '.join(used)}")
    if left := len(pictures) - len(seen):
        unused.append(f"{left} images that no row names")
    entries: dict[str, Entries] = {}
    for split in ("train", "val", "test"):
        if rows_of_split := splits.get(split):
            entries[split] = Entries()
            for name, class_name in rows_of_split:
                entries[split].append(name, class_name)
    return Layout(entries, used, unused)


def _read_table(
    images: ImageFiles, table: str, given: str, find: Callable[[str, str], list[str]], seen: dict[str, str]
) -> list[tuple[str, str, str]] | None:
    """Split, image and class of each row, or None if a table of test images has no classes.

    given: the split that the table is for, or nothing. seen: image and the row that named it, of all tables.
    """
    where = f"{images.path / table}" if images.path.is_dir() else f"{table} in {images.path}"
    content = images.read(table)
    first_line = content[: content.find(b"\n")] if b"\n" in content else content
    delimiter = "," if b"," in first_line else "\t" if b"\t" in first_line else ";"
    columns: tuple[int, int, int | None] | None = None
    width = 2
    header: tuple[int, list[str]] | None = None
    rows: list[tuple[str, str, str]] = []
    faults: list[tuple[int, str]] = []
    for row, values in parse_rows(where, content, delimiter):
        if isinstance(values, str):
            faults.append((row, values))
            continue
        if columns is None:
            width = len(values)
            names_image = find(values[0], given) or _suffix(values[0]) in IMAGE_SUFFIXES
            if width == 2 and names_image and not _is_header(values):
                columns = (0, 1, None)  # no header
            else:
                found = _columns(values)
                if found is None and given == "test":
                    return None
                if found is None:
                    raise PipelineError(
                        f"{where}, row {row}: no columns of files and classes in {shown(delimiter.join(values))}; call "
                        "them file and label"
                    )
                columns, header = found, (row, values)
                continue
        if len(values) != width:
            faults.append((row, f"columns: {len(values)} instead of {width}"))
            continue
        file_column, label_column, split_column = columns
        matches, class_name = find(values[file_column].strip(), given), values[label_column].strip()
        split = given or "train"
        if split_column is not None and not given:
            split = SPLITS.get(values[split_column].strip().casefold(), "")
        if not split:
            faults.append((row, f"split {shown(values[split_column or 0])} is none of train, val and test"))
        elif not class_name:
            faults.append((row, "no class"))
        elif not matches:
            faults.append((row, f"no image is called {shown(values[file_column])}"))
        elif len(matches) > 1:
            faults.append((row, f"{shown(values[file_column])} may be {matches[0]} or {matches[1]}"))
        elif matches[0] in seen:
            faults.append((row, f"{matches[0]} is also in {seen[matches[0]]}"))
        else:
            seen[matches[0]] = f"row {row} of {table}"
            rows.append((split, matches[0], class_name))
    if header and columns:
        number, names = header
        file_name, label = names[columns[0]], names[columns[1]].strip()
        if label.casefold() not in LABEL_COLUMNS and label in {class_name for _, _, class_name in rows}:
            faults.insert(0, (number, f"no image is called {shown(file_name)}"))  # a row like the others
    if faults:
        raise faulty_rows(where, faults)
    return rows


def _column_name(value: str) -> str:
    return re.sub(r"[\s_-]", "", value.casefold())


def _is_header(values: list[str]) -> bool:
    """Whether a row of two says `image,label` or the like, also where an image is called image.png."""
    file, label = map(_column_name, values)
    return (file in FILE_COLUMNS and label in LABEL_COLUMNS) or (label in FILE_COLUMNS and file in LABEL_COLUMNS)


def _columns(header: list[str]) -> tuple[int, int, int | None] | None:
    """Where the files, the classes and maybe the splits are."""
    names = [_column_name(value) for value in header]

    def place(wanted: tuple[str, ...]) -> int | None:
        return next((names.index(name) for name in wanted if name in names), None)

    file, label, split = place(FILE_COLUMNS), place(LABEL_COLUMNS), place(SPLIT_COLUMNS)
    if len(header) == 2 and split is None:
        file, label = (0, 1) if file is None and label is None else (file, label)
        file = 1 - label if file is None and label is not None else file
        label = 1 - file if label is None and file is not None else label
    return None if file is None or label is None or file == label else (file, label, split)


def _split_of_table(name: str) -> str | None:
    found = re.fullmatch(r"([a-z]+?)[_-]?(labels?|annotations?|set)?", PurePosixPath(name).stem.casefold())
    return SPLITS.get(found[1]) if found else None


def _finder(pictures: Names) -> Callable[[str, str], list[str]]:
    """A function that gives the images that a table for a split can mean by a name, in part or without suffix.

    Of several, those in a folder of the split, or else the one of which it is the whole name. `é` is found whether it
    is one character or two, as macOS has it in names of files.
    """
    # From behind, names that end alike stand side by side
    ends = sorted(
        (f"/{unicodedata.normalize('NFC', end)}"[::-1], place)
        for place, name in enumerate(pictures)
        for end in {name, _without_suffix(name)}
    )

    def find(text: str, split: str) -> list[str]:
        text = re.sub(r"^(\./)+", "", text.replace("\\", "/"))
        end = f"/{unicodedata.normalize('NFC', text)}"[::-1]
        first = last = bisect_left(ends, (end, 0))
        while last < len(ends) and ends[last][0].startswith(end):
            last += 1
        places = {place for _, place in ends[first:last]}
        found = [pictures[place] for place in sorted(places)]
        of_split = [name for name in found if split in {SPLITS.get(part.casefold()) for part in name.split("/")[:-1]}]
        return found if len(found) < 2 else of_split or [name for name in found if name == text] or found

    return find


def _common_folder(names: Sequence[str]) -> str:
    """The folder that all names are in, with a slash at its end, or nothing."""
    folders = {name.rpartition("/")[0] for name in names}
    folder = os.path.commonpath(folders) if all(folders) else ""
    return f"{folder}/" if folder else ""


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _listed(names: Iterable[str], what: str) -> str:
    names = list(names)
    more = f", the first {LISTED_FAULTS}" if len(names) > LISTED_FAULTS else ""
    return f"{len(names)} {what}{more}: " + ", ".join(names[:LISTED_FAULTS])


def _keep_out_of_git(data_path: Path) -> None:
    """Raise PipelineError if Git has one of the images, or would take it with the next experiment of DVC's."""
    try:
        done = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", data_path],
            capture_output=True,
        )
    except OSError:  # no git here
        return
    # It fails where there is no repository, or for data outside of it
    names = done.stdout.decode(errors="surrogateescape").split("\0") if done.returncode == 0 else []
    if taken := [name for name in names if _suffix(name) in {*IMAGE_SUFFIXES, ".zip"}]:
        raise PipelineError(
            f"data_path: {taken[0]} is in Git, or would get into it with the next `dvc exp run`; give it to DVC "
            f"(`dvc add {data_path}`), or move {data_path} into data/own/ or out of the repository"
        )
