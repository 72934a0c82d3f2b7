"""The CSV tables between the stages, and of users: read with every faulty row named, and written.

A table is UTF-8, with or without a byte-order mark; lines may end in LF, CR LF or CR. A row number is the one that a
spreadsheet shows: the first row is 1, a header and blank lines count. Blank lines are passed over.
"""

import csv
import io
import os
import re
from array import array
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple, overload

import numpy as np

from classifier.pipeline.errors import PipelineError
from classifier.pipeline.outputs import existing

LISTED_FAULTS = 20
# What formulas begin with; and the apostrophe, so that what is quoted stays different from what is not
FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠", "'")
CONTROL = re.compile(r"[\0-\x1f\x7f-\x9f]")
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what the codec's surrogateescape makes of such bytes
LONGEST_NAME = 1000
PLAIN_BYTES = 2**20  # of a table that are read at a time
# In names of one line each: what needs quotes or a look by `name_fault`
NOT_PLAIN = re.compile(r"""^/|(?:^|/)\.{0,2}(?:/|$)|[",\0-\x09\x0b-\x1f\x7f-\x9f]""", re.MULTILINE)
LONGEST_SORTED = 200  # bytes; names are sorted with the memory of so many of the longest, or as Python objects
# A name that cannot be taken as it is: with a part that is empty, `.` or `..`, or a control character, or too long
UNUSUAL = re.compile(rf"(^|/)\.{{0,2}}(/|$)|{CONTROL.pattern}|.{{{LONGEST_NAME + 1}}}")


class Names(Sequence[str]):
    """Texts in as many bytes as they have in UTF-8, and 8 for each: a list of a million names has 80 MB."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._content = bytearray()
        self._ends = array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        self._content += text.encode(errors="surrogatepass")  # names of files may be no Unicode
        self._ends.append(len(self._content))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # which may be negative, or too large
        return self._content[self._ends[place] : self._ends[place + 1]].decode(errors="surrogatepass")

    def order(self) -> np.ndarray:
        """The places of the texts in the order of the texts, (N,) int64."""
        longest = int(np.diff(self._ends).max(initial=1))
        if longest > LONGEST_SORTED:
            return np.array(sorted(range(len(self)), key=self.__getitem__), np.int64)
        # As bytes of one length: UTF-8 has the order of the characters
        encoded = (text.encode(errors="surrogatepass") for text in self)
        places: np.ndarray = np.fromiter(encoded, f"S{longest}", len(self)).argsort(kind="stable")
        return places

    def sorted(self) -> "Names":
        return Names(self[place] for place in self.order())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]


class Annotations(NamedTuple):
    """N images.

    files: their names. labels: (N,) int64. table_rows: the row of the table that names each. array_rows: (N,) int64,
    the row of each in the image arrays, if the table has that column.
    """

    files: Sequence[str]
    labels: np.ndarray
    table_rows: Sequence[int]
    array_rows: np.ndarray | None


def repeated(values: Iterable[Hashable]) -> set[int]:
    """The hashes that more than one of the values has: those of all that are there more than once, and hardly another.

    It takes 8 bytes for each value, where a set or a Counter of them takes more than a hundred.
    """
    hashes = np.fromiter(map(hash, values), np.int64)
    hashes.sort()
    return set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())


def read_annotations(path: Path, *, classes: int | None = None, images: int | None = None) -> Annotations:
    """Read a CSV of file name and label, with or without a header; or of file name, label and array row.

    The first row is a header if its second value starts with a letter and its first has no dot. A label is a whole
    number from 0 on, below `classes` if that is given; an array row likewise, below `images`. A file name is relative
    to the image folder, does not leave it, has no control characters, and stands in one row; `./a//b.png` is read as
    `a/b.png`. A header without rows is a table of no images. Raises PipelineError that lists the rows at fault, if
    anything else is in the file.
    """
    if images is not None and (plain := _read_plain(path, classes, images)):
        return plain
    # Of a million names, only those that are there twice are remembered with their rows
    again = repeated(_clean(values[0]) for _, values in read_rows(path) if len(values) in (2, 3))
    files, labels, table_rows, array_rows = Names(), array("q"), array("q"), array("q")
    faults: list[tuple[int, str]] = []
    seen: dict[str, tuple[int, int | None]] = {}
    known: dict[str, int | None] = {}
    width = 0
    for row, values in read_rows(path):
        if isinstance(values, str):
            faults.append((row, values))
            continue
        is_first, width = width == 0, width or len(values)
        if len(values) != width or width not in (2, 3):
            expected = "three, file, label and row" if width == 3 else "two, the file name and the label"
            faults.append((row, f"columns: {len(values)} instead of {expected}"))
            continue
        if is_first and "." not in values[0] and re.match(r"[^\W\d]", values[1].strip()):
            continue  # a header; boot.png,boot is none
        name, text = values[:2]
        if text not in known:
            known[text] = _number(text, classes)
        label = known[text]
        if label is None:
            faults.append((row, f"label {shown(text)} is not {_expected(classes)}"))
        array_row = _number(values[2], images) if width == 3 else 0
        if array_row is None:
            faults.append((row, f"row {shown(values[2])} is not {_expected(images)}"))
        if _is_unusual(name):
            if fault := name_fault(name):
                faults.append((row, fault))
                continue
            name = _clean(name)
        if name in seen:
            first_row, first_label = seen[name]
            if None in (label, first_label) or label == first_label:
                faults.append((row, f"{name} is also in row {first_row}"))
            else:
                faults.append((row, f"{name} has label {label}, but label {first_label} in row {first_row}"))
        elif label is not None and array_row is not None:
            files.append(name)
            labels.append(label)
            table_rows.append(row)
            array_rows.append(array_row)
        if hash(name) in again:
            seen.setdefault(name, (row, label))
    if faults:
        raise faulty_rows(path, faults)
    in_arrays = np.frombuffer(array_rows, np.int64) if width == 3 else None
    return Annotations(files, np.frombuffer(labels, np.int64), table_rows, in_arrays)


def _read_plain(path: Path, classes: int | None, images: int) -> Annotations | None:
    """Read a table of `annotate` whose names need no quotes, ten times as fast; None for any other, or a faulty one."""
    files, labels, array_rows, hashes = Names(), array("q"), array("q"), array("q")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if file.readline() != "file,label,row\n":
                return None
            while lines := file.readlines(PLAIN_BYTES):
                names, *numbers = zip(*(line.rsplit(",", 2) for line in lines), strict=True)
                of_labels, of_rows = (np.array([*map(int, column)], np.int64) for column in numbers)
                text = "\n".join(names)
                if NOT_PLAIN.search(text) or len(max(names, key=len)) > LONGEST_NAME or not lines[-1].endswith("\n"):
                    return None
                if not "".join(numbers[0] + numbers[1]).replace("\n", "").isdecimal():  # int() takes signs and spaces
                    return None
                if of_labels.max() >= (classes or 2**63) or of_rows.max() >= images:
                    return None
                for name in names:
                    files.append(name)
                labels.frombytes(of_labels.tobytes())
                array_rows.frombytes(of_rows.tobytes())
                hashes.extend(map(hash, names))
    except (OSError, ValueError, TypeError, OverflowError):
        return None
    if len(np.unique(np.frombuffer(hashes, np.int64))) < len(files):
        return None
    in_arrays = np.frombuffer(array_rows, np.int64)
    return Annotations(files, np.frombuffer(labels, np.int64), range(2, len(files) + 2), in_arrays)


def _is_unusual(name: str) -> bool:
    return UNUSUAL.search(name) is not None or os.name == "nt"


def _clean(name: str) -> str:
    """The name without what can be left out of it."""
    return str(PurePosixPath(name)) if _is_unusual(name) else name


def class_names(folder: Path) -> list[str]:
    """The names in <folder>/classes.csv, by label.

    Its header is label,name; its n rows have the labels 0 to n - 1 and the names each once, in any order. Raises
    PipelineError, with all rows at fault, if not, or if there is no row.
    """
    path = folder / "classes.csv"
    (_, header), *rows = read_rows(path)
    if header != ["label", "name"]:
        raise PipelineError(f"{path}, row 1: not the header label,name")
    if not rows:
        raise PipelineError(f"{path}: has no class")
    faults: list[tuple[int, str]] = []
    names: dict[int, str] = {}
    seen: dict[str, int] = {}
    for row, values in rows:
        if isinstance(values, str):
            faults.append((row, values))
            continue
        if len(values) != 2:
            faults.append((row, f"columns: {len(values)} instead of two, the label and the name"))
            continue
        label, name = _number(values[0], len(rows)), values[1]
        if label is None:
            faults.append((row, f"label {shown(values[0])} is not {_expected(len(rows))}"))
        if not name.strip() or CONTROL.search(name):
            faults.append((row, f"{shown(name)} is no name of a class"))
        for value in [f"name {shown(name)}"] if label is None else [f"label {label}", f"name {shown(name)}"]:
            if seen.setdefault(value, row) != row:
                faults.append((row, f"{value} is also in row {seen[value]}"))
        names[-1 if label is None else label] = name
    if faults:
        raise faulty_rows(path, faults)
    return [names[label] for label in range(len(rows))]


def faulty_rows(path: Path | str, faults: Sequence[tuple[int, str]]) -> PipelineError:
    """The error that lists faults of a table by row: the first twenty and their count."""
    if len(faults) == 1:
        return PipelineError(f"{path}, row {faults[0][0]}: {faults[0][1]}")
    listed = "".join(f"\n  row {row}: {fault}" for row, fault in faults[:LISTED_FAULTS])
    which = f", the first {LISTED_FAULTS}" if len(faults) > LISTED_FAULTS else ""
    return PipelineError(f"{path}: {len(faults)} faults{which}:{listed}")


def write_csv(path: Path, columns: Mapping[str, Sequence[object] | np.ndarray]) -> None:
    """Write columns of equal length with a header and Unix line ends."""
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        table.writerows(zip(*columns.values(), strict=True))


def csv_cell(text: str) -> str:
    """Return a text as a cell for people's spreadsheets: behind an apostrophe if it would be taken for a formula.

    Numbers stay as they are. Source: OWASP, CSV Injection.
    """
    if not text.startswith(FORMULA):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def read_rows(path: Path) -> Iterator[tuple[int, list[str] | str]]:
    """Number and values of each row of a CSV that is not blank, or number and fault of one that is not CSV in UTF-8.

    Raises PipelineError if the file is missing, unreadable or empty.
    """
    try:
        if not existing(path).is_file():
            raise PipelineError(f"{path}: not a file")
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            yield from _parsed(str(path), file, ",")
    except OSError as error:
        raise PipelineError(f"{path}: not readable: {error.strerror}") from None


def parse_rows(name: str, content: bytes, delimiter: str = ",") -> Iterator[tuple[int, list[str] | str]]:
    """The rows, as `read_rows` gives them, of the content of a file called `name` in errors."""
    text = content.decode("utf-8-sig", errors="surrogateescape")
    return _parsed(name, io.StringIO(text, newline=""), delimiter)


def _parsed(name: str, lines: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str] | str]]:
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    row, is_empty = 0, True
    while True:
        row += 1
        try:
            values = next(table)
        except StopIteration:
            break
        except csv.Error as error:  # a quote that never ends, text behind one, a value beyond csv.field_size_limit()
            is_empty = False
            yield row, f"not CSV: {error}"
            continue
        if values:
            is_empty = False
            text = "".join(values)
            yield row, "not UTF-8" if not text.isascii() and NOT_UTF8.search(text) else values
    if is_empty:
        raise PipelineError(f"{name}: empty, without even a header")


def _number(text: str, below: int | None) -> int | None:
    """The number that a text of at most 18 digits is, or None if it is none or not below the limit."""
    digits = text.strip()
    if not re.fullmatch(r"[0-9]{1,18}", digits):  # 18 digits fit into int64
        return None
    return int(digits) if below is None or int(digits) < below else None


def _expected(classes: int | None) -> str:
    return "a whole number of at most 18 digits, 0 or more" if classes is None else f"one of 0..{classes - 1}"


def name_fault(name: str) -> str | None:
    """What is wrong with the name of a file in an image folder, if something is."""
    if not name:
        return "no file name"
    if len(name) > LONGEST_NAME:
        return f"file name {shown(name)} has more than {LONGEST_NAME} characters"
    if CONTROL.search(name):
        return f"file name {shown(name)} has control characters"
    if name.startswith("/") or ".." in name.split("/") or (os.name == "nt" and re.search(r"[\\:]", name)):
        return f"file name {shown(name)} leads out of the image folder"
    return f"file name {shown(name)} is the image folder itself" if str(PurePosixPath(name)) == "." else None


def shown(text: str) -> str:
    """A text from a file in a message: quoted, escaped, and not too long."""
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
