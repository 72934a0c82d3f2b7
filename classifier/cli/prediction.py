"""Prediction: find image files, classify them with an exported model, write a table, CSV or JSON.

torch is only imported for formats that need it.
"""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
from scipy.special import softmax

from classifier.data.decoding import decode_image
from classifier.pipeline.annotations import csv_cell
from classifier.pipeline.errors import PipelineError, printable
from classifier.pipeline.image_files import IMAGE_SUFFIXES, ImageFiles
from classifier.pipeline.outputs import read_json
from classifier.pipeline.paths import EXPORT
from classifier.progress import progress
from classifier.provenance.model_file import BATCH, Model, open_model_file

CHAMPION = "champion"


class ImageFile(NamedTuple):
    """An image. name: in messages and results; place, member: folder or zip, and the name in it."""

    name: str
    place: ImageFiles
    member: str


class Answer(NamedTuple):
    """The probabilities of one image, (C,) float64."""

    file: str
    probabilities: np.ndarray


def find_images(arguments: Iterable[str], folder: Path, complain: Callable[[str], None]) -> list[ImageFile]:
    """Return the images in `arguments`, which are image files, folders and zips, in their order.

    Folders and zips are searched recursively for files with an image suffix, sorted by name. Hidden files and files
    that archivers add are skipped. Paths are relative to `folder`. An image in the folder or zip `photos` has a name
    such as `photos/a/1.png`. `complain` is called with a message for each unusable argument.
    """
    found = []
    folders: dict[Path, ImageFiles] = {}
    for argument in arguments:
        path = folder / argument
        try:
            if not os.path.exists(path):  # noqa: PTH110, pathlib raises an error for folders that may not be entered
                raise PipelineError(f"{argument}: no such file or folder")
            if path.is_dir() or path.suffix.lower() == ".zip":
                images = ImageFiles(path)
                members = [name for name in images.names() if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
                if not members:
                    raise PipelineError(
                        f"{argument}: no image in it; images end in {', '.join(sorted(IMAGE_SUFFIXES))}"
                    )
                found += [ImageFile(printable(f"{argument.rstrip('/')}/{name}"), images, name) for name in members]
            else:
                file = path.resolve()  # links given by the user are followed
                if file.parent not in folders:
                    folders[file.parent] = ImageFiles(file.parent)
                found.append(ImageFile(printable(argument), folders[file.parent], file.name))
        except PipelineError as error:
            complain(printable(str(error)))
    return found


@contextmanager
def opened(model: str | None, folder: Path, registered_model: str, trust: bool = False) -> Iterator[Model]:
    """Open a model: an exported file relative to `folder`, `champion`, or by default the model of this checkout.

    trust: also open a file that can run code and was not exported here.
    Raises PipelineError if there is no such model, or if it is refused, see classifier/provenance/model_file.py.
    """
    if model == CHAMPION:
        from classifier.tracking.registry import exported_files, find_champion

        version = find_champion(registered_model)
        if version is None:
            raise PipelineError(f"{registered_model}: no version is the champion; run `classifier promote`")
        with exported_files(version) as files:
            yield open_model_file(files / "model.onnx", may_be_missing=True)
    else:
        yield open_model_file(folder / model if model else _own_model(), trust=trust)


def _own_model() -> Path:
    """Return the path of the exported ONNX file, or of the first exported file if there is none."""
    manifest = read_json(EXPORT / "manifest.json")
    names: list[str] = list(manifest.get("files", {})) if isinstance(manifest, dict) else []
    names.sort(key=lambda name: name != "model.onnx")  # preferred, because it needs no torch
    path = next((EXPORT / name for name in names if (EXPORT / name).exists()), None)
    if path is None:
        raise PipelineError(f"{EXPORT}: no exported model; `dvc repro` makes it, `dvc checkout` brings it back")
    return path


def predict(
    model: Model, images: Sequence[ImageFile], complain: Callable[[str], None], hide_progress: bool
) -> Iterator[Answer]:
    """Yield the answers for usable images in order. `complain` is called with a message for each unusable one."""
    channels, *size = model.image_shape
    with progress("images", "image", len(images), hidden=hide_progress) as bar:
        for start in range(0, len(images), BATCH):
            names, pixels = [], []
            for image in images[start : start + BATCH]:
                try:
                    content = image.place.read(image.member)
                    with _silent_libraries():
                        pixels.append(decode_image(content, size, channels, **model.decoding))
                    names.append(image.name)
                except PipelineError as error:
                    complain(printable(str(error)))
                except ValueError as error:
                    complain(f"{image.name} is not a usable image: {error}")
                bar.update()
            if names:
                logits = model.logits(np.stack(pixels).astype(np.float32) / np.float32(255))
                yield from map(Answer, names, softmax(logits.astype(np.float64), axis=1))


@contextmanager
def _silent_libraries() -> Iterator[None]:
    """Discard what C libraries print to standard error. libtiff prints a line for each broken strip."""
    before = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def write_table(answers: Iterable[Answer], classes: Sequence[str], width: int, file: IO[str]) -> None:
    """Write a table for terminals: file (`width` characters), class, probability, and the second class with its own."""
    classes = [*map(printable, classes)]
    class_width = max(map(len, ["class", *classes]))
    print(f"{'file':{width}}  {'class':{class_width}}  probability  runner-up", file=file)
    for answer in answers:
        first, *others = (-answer.probabilities).argsort(kind="stable")[:2]
        line = f"{answer.file:{width}}  {classes[first]:{class_width}}  {answer.probabilities[first]:11.4f}"
        print(line, *(f" {classes[other]} {answer.probabilities[other]:.4f}" for other in others), file=file)


def write_csv(answers: Iterable[Answer], classes: Sequence[str], file: IO[str]) -> None:
    """Write one row per image: file, class, probability, and the probability of each class as P(name).

    Text that a spreadsheet would read as a formula is quoted, see `csv_cell`.
    """
    classes = [*map(printable, classes)]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["file", "class", "probability", *(f"P({name})" for name in classes)])
    for answer in answers:
        best = int(answer.probabilities.argmax())
        numbers = map(float, (answer.probabilities[best], *answer.probabilities))
        writer.writerow([csv_cell(answer.file), csv_cell(classes[best]), *numbers])


def write_json(answers: Iterable[Answer], classes: Sequence[str], file: IO[str]) -> None:
    """Write a list of objects with file, class, probability, and probabilities by class name."""
    separator = "["
    for answer in answers:
        best = int(answer.probabilities.argmax())
        content = {
            "file": answer.file,
            "class": classes[best],
            "probability": float(answer.probabilities[best]),
            "probabilities": dict(zip(classes, answer.probabilities.tolist(), strict=True)),
        }
        file.write(f"{separator}\n{_json(content)}")
        separator = ","
    file.write("\n]\n" if separator == "," else "[]\n")


def _json(content: Any) -> str:
    """Return JSON. Text is only escaped if it has unprintable characters, which could control a terminal."""
    text = json.dumps(content, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(content)
