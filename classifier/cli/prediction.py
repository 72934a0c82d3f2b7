"""What an exported model says of image files: the files, the model, and the answers as a table, CSV or JSON.

torch is imported only for the formats that need it.
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
    """An image by the name that it is told by, and by its name in the folder or zip that it is read from."""

    name: str
    place: ImageFiles
    member: str


class Answer(NamedTuple):
    """The probabilities (classes,) float64 of one image."""

    file: str
    probabilities: np.ndarray


def find_images(arguments: Iterable[str], folder: Path, complain: Callable[[str], None]) -> list[ImageFile]:
    """The images that arguments name: image files, folders and zips of them, in this order.

    Folders and zips are searched in all depths for files with an image suffix, which are sorted by name; hidden files
    and what archivers add are passed over. A path is relative to `folder`, and images are called after the argument:
    `photos/a/1.png` in the folder or zip `photos`. `complain` is called with what is wrong with an argument.
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
                file = path.resolve()  # a link that a user names may lead anywhere
                if file.parent not in folders:
                    folders[file.parent] = ImageFiles(file.parent)
                found.append(ImageFile(printable(argument), folders[file.parent], file.name))
        except PipelineError as error:
            complain(printable(str(error)))
    return found


@contextmanager
def opened(model: str | None, folder: Path, registered_model: str, trust: bool = False) -> Iterator[Model]:
    """The model that a user names: an exported file, relative to `folder`, or `champion`, or by default our own.

    trust: also open a file that may hold code and that this repository does not know.
    Raises PipelineError if there is none, or it is not to be opened, see classifier/provenance/model_file.py.
    """
    if model == CHAMPION:
        from classifier.tracking.registry import exported_files, find_champion

        version = find_champion(registered_model)
        if version is None:
            raise PipelineError(f"{registered_model}: no version is the champion; `classifier promote` makes one")
        with exported_files(version) as files:
            yield open_model_file(files / "model.onnx", may_be_missing=True)
    else:
        yield open_model_file(folder / model if model else _own_model(), trust=trust)


def _own_model() -> Path:
    """The exported ONNX file, or else the first file that there is of those exported."""
    manifest = read_json(EXPORT / "manifest.json")
    names: list[str] = list(manifest.get("files", {})) if isinstance(manifest, dict) else []
    names.sort(key=lambda name: name != "model.onnx")  # which needs no torch
    path = next((EXPORT / name for name in names if (EXPORT / name).exists()), None)
    if path is None:
        raise PipelineError(f"{EXPORT}: no exported model; `dvc repro` makes it, `dvc checkout` brings it back")
    return path


def predict(
    model: Model, images: Sequence[ImageFile], complain: Callable[[str], None], hide_progress: bool
) -> Iterator[Answer]:
    """Answers for the images that can be used, in order; `complain` is called with what is wrong with each other one.

    hide_progress: show none.
    """
    channels, *size = model.image_shape
    with progress("images", "image", len(images), hidden=hide_progress) as bar:
        for start in range(0, len(images), BATCH):
            names, pixels = [], []
            for image in images[start : start + BATCH]:
                try:
                    content = image.place.read(image.member)
                    with _silent_libraries():
                        pixels.append(decode_image(content, (size[0], size[1]), channels))
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
    """Keep what libraries in C print, as libtiff does about each broken strip, out of standard error."""
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
    """Write a line an image, for people: file (`width` characters), class, probability, and the runner-up's."""
    classes = [*map(printable, classes)]
    class_width = max(map(len, ["class", *classes]))
    print(f"{'file':{width}}  {'class':{class_width}}  probability  runner-up", file=file)
    for answer in answers:
        first, *others = (-answer.probabilities).argsort(kind="stable")[:2]
        line = f"{answer.file:{width}}  {classes[first]:{class_width}}  {answer.probabilities[first]:11.4f}"
        print(line, *(f" {classes[other]} {answer.probabilities[other]:.4f}" for other in others), file=file)


def write_csv(answers: Iterable[Answer], classes: Sequence[str], file: IO[str]) -> None:
    """Write a row an image: file, class, probability, then the probability of each class as P(name).

    What a spreadsheet would take for a formula is quoted, see `csv_cell`.
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
    """JSON with other alphabets as they are, and escapes in place of what would move a terminal's cursor."""
    text = json.dumps(content, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(content)
