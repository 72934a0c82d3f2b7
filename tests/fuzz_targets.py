"""What must hold for any bytes in place of a file, for test_fuzz.py; and, as a program, a fuzzer that looks for bytes
for which it does not.

    python tests/fuzz_targets.py annotations|archive CORPUS [libFuzzer's options]

Atheris finds the inputs by the lines of Python that they reach. It writes to the current folder, and ends with an exit
code other than 0, and what was raised, at the first input for which a target raises anything.
"""

import contextlib
import io
import sys
from pathlib import Path

if __name__ == "__main__":
    import atheris

    sys.modules.pop("zipfile", None)  # imported by others before, without instruments
    with atheris.instrument_imports(include=["classifier", "zipfile"]):
        import zipfile

        from classifier.pipeline.annotations import LISTED_FAULTS, class_names, read_annotations
        from classifier.pipeline.errors import PipelineError
        from classifier.pipeline.image_files import ImageFiles
else:
    import zipfile

    from classifier.pipeline.annotations import LISTED_FAULTS, class_names, read_annotations
    from classifier.pipeline.errors import PipelineError
    from classifier.pipeline.image_files import ImageFiles

CLASSES, IMAGES = 10, 50


def annotations(folder: Path, content: bytes) -> None:
    """A table is read, as annotations and as class names, or refused in a short message."""
    path = folder / "classes.csv"
    path.write_bytes(content)
    for classes in (None, CLASSES):
        try:
            files, labels, rows, array_rows = read_annotations(path, classes=classes, images=IMAGES)
        except PipelineError as error:
            assert len(str(error).splitlines()) <= 1 + LISTED_FAULTS  # noqa: PT017, or it is taken
            assert str(error).startswith(str(path))  # noqa: PT017
        else:
            assert len(files) == len(set(files)) == len(labels) == len(rows)
            assert [*rows] == sorted(set(rows))
            assert array_rows is None or all(0 <= row < IMAGES for row in array_rows.tolist())
            assert all(0 <= label < (classes or 10**18) for label in labels.tolist())
            assert not any(name.startswith("/") or "\0" in name or ".." in name.split("/") for name in files)
    with contextlib.suppress(PipelineError):
        assert len(set(class_names(path.parent))) > 0


def archive(folder: Path, content: bytes) -> None:
    """A zip gives the bytes of its members, or refuses some, or all."""
    path = folder / "images.zip"
    path.write_bytes(content)
    try:
        images = ImageFiles(path)
    except PipelineError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017, or it is taken
        return
    for name in ["a.png", "", "../a.png", *sorted(images._all_names())[:20]]:
        with contextlib.suppress(PipelineError):
            assert isinstance(images.read(name), bytes)


def seeds(name: str) -> list[bytes]:
    """Small inputs to start from."""
    if name == "annotations":
        return [
            b'file,label\na.png,1\n"b,c",2\n',
            b"\xef\xbb\xbfa.png,1\r\n./b,02\r\n",
            b"label,name\n0,a\n1,b\n",
            b"../a,x\n",
            b"file,label,row\na.png,1,0\nb.png,0,49\n",
        ]
    zips = []
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", compression) as archive:
            archive.writestr("a.png", b"content" * 9)
            archive.writestr("ä/", b"")
        zips.append(file.getvalue())
    return zips


if __name__ == "__main__":
    name, corpus, *options = sys.argv[1:]
    for number, seed in enumerate(seeds(name)):
        (Path(corpus) / f"seed{number}").write_bytes(seed)
    target = {"annotations": annotations, "archive": archive}[name]
    atheris.Setup([sys.argv[0], corpus, *options], lambda content: target(Path.cwd(), content))
    atheris.Fuzz()
