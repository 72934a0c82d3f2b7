"""The CSV tables as users write them: read with every faulty row named, and written."""

import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

from classifier.pipeline import annotations
from classifier.pipeline.annotations import (
    Annotations,
    Names,
    class_names,
    csv_cell,
    read_annotations,
    repeated,
    write_csv,
)
from classifier.pipeline.errors import PipelineError


def read(folder: Path, content: str | bytes, classes: int | None = None) -> Annotations:
    (folder / "labels.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    return read_annotations(folder / "labels.csv", classes=classes)


def complaints(folder: Path, content: str | bytes, classes: int | None = None) -> list[str]:
    """The faults that are listed, each with its row."""
    with pytest.raises(PipelineError) as caught:
        read(folder, content, classes)
    title, *lines = str(caught.value).splitlines()
    path = folder / "labels.csv"
    if not lines:
        assert title.startswith(f"{path}, row ")
        return [title.removeprefix(f"{path}, ")]
    assert title.startswith(f"{path}: {len(lines)} faults:")
    return [line.removeprefix("  ") for line in lines]


# What is taken


@pytest.mark.parametrize(
    "text",
    [
        "a.png,3\nb.png,0\n",
        "file,label\na.png,3\nb.png,0\n",
        "a.png,3\r\nb.png,0",
        "file,label\ra.png,3\rb.png,0\r",
        "\ufefffile,label\na.png,3\nb.png,0\n",
        "\ufeffa.png,3\nb.png,0\n",
        "a.png, 3\nb.png, 0 \n",
        '"a.png","3"\n"b.png","0"\n',
        "\nfile,label\n\n\r\na.png,3\n\nb.png,000\n\n",
        "./a.png,3\n.//b.png,0\n",
    ],
    ids=[
        "no header",
        "header",
        "Windows",
        "old Mac",
        "byte-order mark",
        "mark, no header",
        "spaces",
        "quotes",
        "blank lines",
        "dots",
    ],
)
def test_ways_to_write_a_table(tmp_path: Path, text: str) -> None:
    files, labels, rows, array_rows = read(tmp_path, text, classes=4)
    assert array_rows is None
    assert files == ["a.png", "b.png"]
    assert labels.tolist() == [3, 0]
    assert labels.dtype == np.int64
    assert len(rows) == 2


def test_rows_are_numbered_as_in_a_spreadsheet(tmp_path: Path) -> None:
    """A header and blank lines count."""
    assert [*read(tmp_path, "a,1\nb,2\n").table_rows] == [1, 2]
    assert [*read(tmp_path, "file,label\r\na,1\r\n\r\nb,2\r\n").table_rows] == [2, 4]


def test_names_are_taken_literally(tmp_path: Path) -> None:
    names = ["NA", "007", "a,b", 'a "b"', "null", " c ", "..d", "e..", "grün/ä.png", "#1", "=1+1"]
    write_csv(tmp_path / "labels.csv", {"file": names, "label": range(len(names))})
    assert read_annotations(tmp_path / "labels.csv").files == names


@pytest.mark.skipif(os.name == "nt", reason="these lead out of a folder there")
def test_backslashes_and_colons_are_letters_but_on_windows(tmp_path: Path) -> None:
    assert read(tmp_path, "..\\a.png,1\nC:\\b.png,2\n").files == ["..\\a.png", "C:\\b.png"]


@pytest.mark.parametrize("text", ["file,label\n", "file,label", "\ufefffile,label\r\n\r\n"])
def test_a_header_alone_is_a_table_of_no_images(tmp_path: Path, text: str) -> None:
    files, labels, rows, _ = read(tmp_path, text)
    assert not files
    assert not rows
    assert not len(labels)
    assert labels.dtype == np.int64


def test_sixty_thousand_rows_are_read_in_a_moment(tmp_path: Path) -> None:
    write_csv(tmp_path / "labels.csv", {"file": [f"{n:05}.png" for n in range(60_000)], "label": [7] * 60_000})
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        assert len(read_annotations(tmp_path / "labels.csv", classes=10).files) == 60_000
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 5  # of the processor, also where others use it


def test_names_are_a_sequence_of_texts() -> None:
    texts = ["b.png", "", "ä/\udcff.png", "a.png", "b.png", "\U0001f600", "\uffff"]
    names = Names(texts)
    assert [*names] == texts
    assert names == texts
    assert names != texts[1:]
    assert (len(names), names[-1], names[1:3], "a.png" in names) == (7, texts[-1], texts[1:3], True)
    assert names.sorted() == sorted(texts)
    assert Names([*texts, "x" * 1000]).sorted() == sorted([*texts, "x" * 1000])
    assert not Names()
    assert Names().sorted() == []
    with pytest.raises(IndexError):
        names[7]


def test_what_is_repeated_is_found() -> None:
    assert repeated(["a", "b", "a", "c", "a"]) == {hash("a")}
    assert repeated([]) == set()


# What is not


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a.png,\n", "row 1: label '' is not a whole number of at most 18 digits, 0 or more"),
        ("a.png,-1\n", "row 1: label '-1' is not a whole number"),
        ("f,l\na.png,boot\n", "row 2: label 'boot' is not a whole number"),
        ("a.png,boot\nb.png,1\n", "row 1: label 'boot' is not a whole number"),
        ("a.png,1.5\n", r"row 1: label '1\.5' is not a whole number"),
        ("a.png,٣\n", "row 1: label '٣' is not a whole number"),
        ("a.png,1_0\n", "row 1: label '1_0' is not a whole number"),
        ("a.png,1\0\n", r"row 1: label '1\\x00' is not a whole number"),
        (f"a.png,{10**18}\n", "row 1: label '1000000000000000000' is not a whole number of at most 18 digits"),
        (f"a.png,{'9' * 10_000}\n", "row 1: label '9{57}...' is not a whole number"),
        ("a.png;1\n", "row 1: columns: 1 instead of two, the file name and the label"),
        ("a.png,1\nb.png\n", "row 2: columns: 1 instead of two"),
        ("f,l\na.png,1,extra\n", "row 2: columns: 3 instead of two"),
        ("a.png,1\n  \n", "row 2: columns: 1 instead of two"),
        ("a.png,1\n,2\n", "row 2: no file name"),
        ('a.png,1\n"b.png,1\nc.png,1\n', "row 2: not CSV: unexpected end of data"),
        ('a.png,1\n"b"c.png,1\n', "row 2: not CSV: ',' expected after '\"'"),
        (f"f,l\n{'x' * 200_000},1\n", r"row 2: not CSV: field larger than field limit \(131072\)"),
        (f"{'x' * 2000},1\n", r"row 1: file name 'x{57}\.\.\.' has more than 1000 characters"),
        ("f,l\n/etc/passwd,1\n", "row 2: file name '/etc/passwd' leads out of the image folder"),
        ("../a.png,1\n", r"row 1: file name '\.\./a\.png' leads out of the image folder"),
        ("a/../b.png,1\n", "row 1: .* leads out"),
        ("a/..,1\n", "row 1: .* leads out"),
        (".,1\n", r"row 1: file name '\.' is the image folder itself"),
        ("./,1\n", "row 1: .* is the image folder itself"),
        ("a\0.png,1\n", r"row 1: file name 'a\\x00\.png' has control characters"),
        ('"a\nb.png",1\n', r"row 1: file name 'a\\nb\.png' has control characters"),
        ("\x1b[31mred.png,1\n", r"row 1: file name '\\x1b\[31mred\.png' has control characters"),
        ("a.png,1\nb.png,1\na.png,1\n", r"row 3: a\.png is also in row 1"),
        ("f,l\na.png,1\na.png,0\n", r"row 3: a\.png has label 0, but label 1 in row 2"),
        ("a.png,1\n./a.png,1\n", r"row 2: a\.png is also in row 1"),
        (b"a.png,1\nb\xe4.png,1\n", "row 2: not UTF-8"),
        (b"a.png,1\xff\n", "row 1: not UTF-8"),
        (b"\xed\xa0\x80.png,1\n", "row 1: not UTF-8"),
    ],
    ids=str,
)
def test_fault_is_one_line_that_names_file_and_row(tmp_path: Path, text: str | bytes, fault: str) -> None:
    (complaint,) = complaints(tmp_path, text)
    assert re.match(fault, complaint), complaint
    assert len(complaint) < 200


@pytest.mark.parametrize("classes", [1, 10, 1000])
def test_label_beyond_the_classes(tmp_path: Path, classes: int) -> None:
    assert read(tmp_path, f"a,{classes - 1}\n", classes).labels.tolist() == [classes - 1]
    (complaint,) = complaints(tmp_path, f"f,l\na,{classes}\n", classes)
    assert complaint == f"row 2: label '{classes}' is not one of 0..{classes - 1}"


def test_faults_of_all_kinds_are_listed_together_in_the_order_of_their_rows(tmp_path: Path) -> None:
    text = b'file,label\n../a,1\nb,boot\n\nc,1,2\n"d"e,1\nf\xff,1\ng,1\ng,x\n,y\nh,1\n'
    assert [complaint.split(": ")[:2] for complaint in complaints(tmp_path, text, classes=2)] == [
        ["row 2", "file name '../a' leads out of the image folder"],
        ["row 3", "label 'boot' is not one of 0..1"],
        ["row 5", "columns"],
        ["row 6", "not CSV"],
        ["row 7", "not UTF-8"],
        ["row 9", "label 'x' is not one of 0..1"],
        ["row 9", "g is also in row 8"],
        ["row 10", "label 'y' is not one of 0..1"],
        ["row 10", "no file name"],
    ]


def test_at_most_twenty_faults_are_listed_and_all_counted(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"labels\.csv: 100 faults, the first 20:\n  row 2: ") as caught:
        read(tmp_path, "file,label\n" + "".join(f"{n}.png,x\n" for n in range(100)))
    assert str(caught.value).count("\n  row ") == 20


def test_another_encoding_is_named(tmp_path: Path) -> None:
    assert complaints(tmp_path, "a.png,1\n".encode("utf-16"))[0] == "row 1: not UTF-8"
    assert complaints(tmp_path, "f,l\ngrün.png,1\na,1\nä,2\n".encode("latin-1")) == [
        "row 2: not UTF-8",
        "row 4: not UTF-8",
    ]


@pytest.mark.parametrize("content", [b"", b"\n", b"\r\n\r\n", b"\xef\xbb\xbf"], ids=repr)
def test_a_file_without_a_row_is_an_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(PipelineError, match=r"labels\.csv: empty, without even a header"):
        read(tmp_path, content)


def test_missing_file_and_folder_and_pipe(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"none\.csv: missing"):
        read_annotations(tmp_path / "none.csv")
    with pytest.raises(PipelineError, match=": not a file"):
        read_annotations(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.csv")
        with pytest.raises(PipelineError, match=r"pipe\.csv: not a file"):
            read_annotations(tmp_path / "pipe.csv")


# The names of the classes


def names(folder: Path, content: str | bytes) -> list[str]:
    (folder / "classes.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    return class_names(folder)


def test_class_names_are_ordered_by_label(tmp_path: Path) -> None:
    assert names(tmp_path, "label,name\n1,NA\n0,007\n") == ["007", "NA"]
    assert names(tmp_path, '\ufefflabel,name\r\n0,"T-shirt, top"\r\n\r\n1, ä \r\n') == ["T-shirt, top", " ä "]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", ": empty, without even a header"),
        ("label,name\n", ": has no class"),
        ("name,label\na,0\n", ", row 1: not the header label,name"),
        ("0,a\n", ", row 1: not the header label,name"),
        ("label,name\n0,a\n2,b\n", r", row 3: label '2' is not one of 0\.\.1"),
        ("label,name\n0,a\nx,b\n", r", row 3: label 'x' is not one of 0\.\.1"),
        ("label,name\n0,a\n0,b\n", ", row 3: label 0 is also in row 2"),
        ("label,name\n0,a\n1,a\n", ", row 3: name 'a' is also in row 2"),
        ("label,name\n0,\n", ", row 2: '' is no name"),
        ('label,name\n0," "\n', ", row 2: ' ' is no name"),
        ('label,name\n0,"a\nb"\n', r", row 2: 'a\\nb' is no name"),
        ("label,name\n0,a,b\n", ", row 2: columns: 3 instead of two"),
        (b"label,name\n0,\xe4\n", ", row 2: not UTF-8"),
        ('label,name\n0,"a\n', ", row 2: not CSV"),
        (
            "label,name\n0,a\n0,a\n9,\n",
            r": 4 faults:\n  row 3: label 0 .*\n  row 3: name 'a' .*\n  row 4: .*\n  row 4: ",
        ),
    ],
    ids=str,
)
def test_faulty_class_names(tmp_path: Path, content: str | bytes, complaint: str) -> None:
    with pytest.raises(PipelineError, match=rf"classes\.csv{complaint}"):
        names(tmp_path, content)


def test_missing_class_names(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"classes\.csv: missing"):
        class_names(tmp_path)


# Writing


def test_csv_has_a_header_unix_line_ends_and_quotes(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", {"file": ["a.png", 'b, "c".png'], "label": np.array([3, 4])})
    assert (tmp_path / "train.csv").read_bytes() == b'file,label\na.png,3\n"b, ""c"".png",4\n'


@pytest.mark.parametrize("text", ["=1+1", "+x", "-x", "@x", "\tx", "\rx", "＝x", "'x"])
def test_what_a_spreadsheet_would_take_for_a_formula_is_quoted(text: str) -> None:
    assert csv_cell(text) == f"'{text}"


@pytest.mark.parametrize("text", ["", "x=1", "-1", "+1.5e3", "-inf", "T-shirt/top", "é"])
def test_other_cells_stay_as_they_are(text: str) -> None:
    assert csv_cell(text) == text


# Tables of annotate, which are read faster


PLAIN = "file,label,row\n" + "".join(f"train/{index:05d}.png,{index % 10},{index}\n" for index in range(300))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),
        ("train/00007.png", "a b/é-ü.png"),
        ("train/00007.png", "./train/7.png"),
        ("train/00007.png", "train//7.png"),
        ("train/00007.png", '"a,b.png"'),
        ("train/00007.png", "train/00008.png"),
        ("train/00007.png", "../7.png"),
        ("train/00007.png", "/7.png"),
        ("train/00007.png", "train/.."),
        ("train/00007.png", "a\x1b[2J"),
        ("train/00007.png", "x" * 1001),
        ("train/00007.png", ""),
        ("00007.png,7,7", "00007.png,10,7"),
        ("00007.png,7,7", "00007.png,-7,7"),
        ("00007.png,7,7", "00007.png, 7,7"),
        ("00007.png,7,7", "00007.png,7,300"),
        ("00007.png,7,7", "00007.png,7,x"),
        ("00007.png,7,7", "00007.png,7"),
        ("00007.png,7,7", "00007.png,7,7,7"),
        ("00007.png,7,7", "00007.png,7,99999999999999999999"),
        ("00007.png,7,7\n", "00007.png,7,7\r\n"),
        ("00007.png,7,7\n", "00007.png,7,7\n\n"),
        ("train/00299.png,9,299\n", "train/00299.png,9,299"),
        ("file,label,row\n", ""),
        (PLAIN, "file,label,row\n"),
    ],
)
def test_the_quick_way_to_read_a_table_finds_what_the_thorough_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    (tmp_path / "train.csv").write_text(PLAIN.replace(old, new, 1), newline="")

    def outcome() -> object:
        try:
            found = read_annotations(tmp_path / "train.csv", classes=10, images=300)
        except PipelineError as error:
            return str(error)
        assert found.array_rows is not None
        return [*found.files], found.labels.tolist(), [*found.table_rows], found.array_rows.tolist()

    quick = outcome()
    monkeypatch.setattr(annotations, "_read_plain", lambda *_: None)
    assert quick == outcome()


def test_a_table_of_annotate_is_read_the_quick_way(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(PLAIN)
    found = annotations._read_plain(tmp_path / "train.csv", 10, 300)
    assert found is not None
    assert len(found.files) == 300
