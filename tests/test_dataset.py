"""The dataset class as the tutorial uses it, annotations as users write them, and batches in their order."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_data import write_idx_dataset
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import v2

from classifier.archive import write_zip
from classifier.dataset import Batches, CustomImageDataset, class_names, epoch_order, read_annotations
from classifier.errors import PipelineError
from classifier.png import encode_png
from classifier.sources import fashion_mnist
from classifier.transforms import augment, one_hot, to_float

CPU = torch.device("cpu")
IN_MEMORY, STREAMED = 1.0, 1e-9  # memory limits in GiB
COUNT = 130


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images.zip, the same images in images/, and labels.csv (with a header)."""
    folder = tmp_path_factory.mktemp("small")
    write_idx_dataset(folder / "idx", train=COUNT)
    images, labels = fashion_mnist.read(folder / "idx")["train"]
    files = [(f"{index}.png", encode_png(image)) for index, image in enumerate(images)]
    write_zip(folder / "images.zip", files)
    (folder / "images").mkdir()
    for name, content in files:
        (folder / "images" / name).write_bytes(content)
    rows = [f"{name},{label}\n" for (name, _), label in zip(files, labels, strict=True)]
    (folder / "labels.csv").write_text("file,label\n" + "".join(rows))
    return folder


@pytest.fixture(params=["images.zip", "images"])
def dataset(request: pytest.FixtureRequest, small: Path) -> CustomImageDataset:
    return CustomImageDataset(small / "labels.csv", small / request.param)


def pixels_and_labels(small: Path) -> tuple[np.ndarray, np.ndarray]:
    images, labels = fashion_mnist.read(small / "idx")["train"]
    return np.asarray(images), labels


@pytest.fixture
def zipped(small: Path) -> CustomImageDataset:
    return CustomImageDataset(small / "labels.csv", small / "images.zip")


# As in the tutorial


def test_items_are_images_and_labels(dataset: CustomImageDataset, small: Path) -> None:
    images, labels = pixels_and_labels(small)
    assert len(dataset) == COUNT
    for index in (0, 1, COUNT - 1):
        image, label = dataset[index]
        assert image.dtype == torch.uint8
        assert np.array_equal(image, images[index][None])
        assert label == labels[index]
        assert type(label) is int


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("archive", ["images.zip", "images"])
def test_loader_gives_the_tutorials_shapes(small: Path, archive: str, workers: int) -> None:
    dataset = CustomImageDataset(small / "labels.csv", small / archive, transform=transforms.ToTensor())
    loader = DataLoader(dataset, batch_size=64, shuffle=True, num_workers=workers)
    images, labels = next(iter(loader))
    assert images.shape == (64, 1, 28, 28)
    assert images.dtype == torch.float32
    assert labels.shape == (64,)
    assert labels.dtype == torch.int64
    assert sum(len(part) for _, part in loader) == COUNT


@pytest.mark.parametrize(
    "transform",
    [
        transforms.ToTensor(),
        transforms.Compose([transforms.ToTensor()]),
        v2.ToDtype(torch.float32, scale=True),
        v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]),
        to_float,
    ],
    ids=["ToTensor", "Compose", "v2", "v2.Compose", "ours"],
)
def test_transforms(small: Path, transform: Any) -> None:
    images, _ = pixels_and_labels(small)
    image, _ = CustomImageDataset(small / "labels.csv", small / "images.zip", transform)[3]
    # torchvision's v2 is a rounding away from x / 255
    torch.testing.assert_close(torch.as_tensor(image), transforms.ToTensor()(images[3].copy()), rtol=2e-7, atol=0)


def test_target_transforms(small: Path) -> None:
    _, labels = pixels_and_labels(small)
    tutorial = transforms.Lambda(lambda y: torch.zeros(10).scatter_(0, torch.tensor(y), value=1))
    for target_transform in (tutorial, lambda label: one_hot(label, 10)):
        dataset = CustomImageDataset(small / "labels.csv", small / "images.zip", target_transform=target_transform)
        assert dataset[5][1].argmax() == labels[5]
    assert torch.equal(dataset.targets(), one_hot(torch.tensor(labels), 10))


def test_other_image_formats(tmp_path: Path) -> None:
    """JPEG, palette, transparent and one-bit pictures become grey or RGB; more than eight bits are refused."""
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    shapes = {}
    for name, mode in [
        ("a.jpg", "L"),
        ("b.jpg", "RGB"),
        ("c.png", "P"),
        ("d.png", "RGBA"),
        ("e.png", "1"),
        ("f.png", "L"),
    ]:
        picture.convert(mode).save(tmp_path / name)
        shapes[name] = (1, 16, 16) if mode == "L" else (3, 16, 16)
    Image.fromarray(np.full((16, 16), 1000, np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "labels.csv").write_text("".join(f"{name},0\n" for name in [*shapes, "deep.png"]))
    dataset = CustomImageDataset(tmp_path / "labels.csv", tmp_path)
    assert {name: tuple(dataset.decode(index).shape) for index, name in enumerate(shapes)} == shapes
    assert np.array_equal(dataset.decode(5)[0], np.asarray(picture))
    with pytest.raises(PipelineError, match=r"deep\.png is not a usable image: .*more than 8 bits"):
        dataset.decode(len(shapes))


def jpeg_cut_short() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(file, "JPEG")
    return file.getvalue()[:200]


@pytest.mark.parametrize(
    "content", [b"", b"text", encode_png(np.zeros((9, 9), np.uint8))[:60], jpeg_cut_short()], ids=len
)
def test_broken_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    (tmp_path / "labels.csv").write_text("a.png,0\n")
    with pytest.raises(PipelineError, match=r"a\.png is not a usable image"):
        CustomImageDataset(tmp_path / "labels.csv", tmp_path).decode(0)


# Annotations


@pytest.mark.parametrize(
    "text",
    [
        "a.png,3\nb.png,0\n",
        "file,label\na.png,3\nb.png,0\n",
        "a.png,3\r\nb.png,0",
        "\ufefffile,label\na.png,3\nb.png,0\n",
        "a.png, 3\nb.png, 0\n",
        '"a.png","3"\n"b.png","0"\n',
    ],
    ids=["no header", "header", "Windows", "byte-order mark", "spaces", "quotes"],
)
def test_first_row_is_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8", newline="")
    files, labels = read_annotations(tmp_path / "labels.csv")
    assert files == ["a.png", "b.png"]
    assert labels.tolist() == [3, 0]
    assert labels.dtype == torch.int64


def test_names_are_taken_literally(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text('NA,1\n007,2\n"a,b",3\nnull,4\n')
    assert read_annotations(tmp_path / "labels.csv")[0] == ["NA", "007", "a,b", "null"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("file,label\na.png,boot\nb.png,1\nc.png,-1\n", "2 labels .*: row 2: 'boot'; row 4: '-1'"),
        ("a.png,-1\n", "1 labels .*: row 1: '-1'"),
        ("a.png,\n", "row 1: ''"),
        ("a.png,1\nb.png\n", "row 2: ''"),
        ("a.png,1\nb.png,1.5\n", r"row 2: '1\.5'"),
        ("a.png,99999999999999999999\n", "row 1: '99999999999999999999'"),
        ("a.png,1,extra\n", "3 columns instead of two"),
        ("a.png;1\n", "1 columns instead of two"),
        ("a.png,1\nb.png,1,2,3\n", "not a CSV in UTF-8"),
        ('a.png,1\n"b.png,1\n', "not a CSV in UTF-8"),
    ],
)
def test_bad_annotations_are_named(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(PipelineError, match=rf"labels\.csv: .*{complaint}"):
        read_annotations(tmp_path / "labels.csv")


def test_at_most_twenty_rows_are_listed(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\n" + "a.png,x\n" * 100)
    with pytest.raises(PipelineError, match="100 labels") as caught:
        read_annotations(tmp_path / "labels.csv")
    assert str(caught.value).count("row ") == 20


def test_annotations_missing_or_in_another_encoding(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"none\.csv: missing"):
        read_annotations(tmp_path / "none.csv")
    (tmp_path / "utf16.csv").write_text("a.png,1\n", encoding="utf-16")
    with pytest.raises(PipelineError, match=r"utf16\.csv: not a CSV in UTF-8"):
        read_annotations(tmp_path / "utf16.csv")


@pytest.mark.parametrize("text", ["", "file,label\n"], ids=["empty", "header only"])
def test_no_images(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    dataset = CustomImageDataset(tmp_path / "labels.csv", tmp_path)
    assert len(dataset) == 0
    with pytest.raises(PipelineError, match="name none of its images"):
        dataset.decode_all()


def test_class_names_are_ordered_by_label(tmp_path: Path) -> None:
    (tmp_path / "classes.csv").write_text("label,name\n1,NA\n0,007\n")
    assert class_names(tmp_path) == ["007", "NA"]


# Decoding once


def test_md5_tells_data_sets_apart_by_images_labels_and_order_but_not_by_names(tmp_path: Path) -> None:
    def md5(rows: list[tuple[str, bytes, int]]) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, content, _ in rows:
            (folder / name).write_bytes(content)
        (folder / "labels.csv").write_text("file,label\n" + "".join(f"{name},{label}\n" for name, _, label in rows))
        return CustomImageDataset(folder / "labels.csv", folder).md5()

    rows = [("a", b"one", 0), ("b", b"two", 1)]
    assert md5([("x", b"one", 0), ("y", b"two", 1)]) == md5(rows)
    others = [
        [("a", b"one", 1), ("b", b"two", 1)],
        [("a", b"onf", 0), ("b", b"two", 1)],
        [("b", b"two", 1), ("a", b"one", 0)],
        [("a", b"on", 0), ("b", b"etwo", 1)],
        rows[:1],
    ]
    assert len({md5(other) for other in [rows, *others]}) == 6


def test_decode_all(dataset: CustomImageDataset, small: Path) -> None:
    pixels = dataset.decode_all()
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels, pixels_and_labels(small)[0][:, None])


def test_colour_images_keep_their_channels(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    write_zip(tmp_path / "images.zip", [("a.png", encode_png(image))])
    (tmp_path / "labels.csv").write_text("a.png,0\n")
    pixels = CustomImageDataset(tmp_path / "labels.csv", tmp_path / "images.zip").decode_all()
    assert np.array_equal(pixels[0], image.transpose(2, 0, 1))


@pytest.mark.parametrize(("limit", "workers"), [(IN_MEMORY, 0), (STREAMED, 0), (STREAMED, 2)])
@pytest.mark.parametrize("fault", ["shape", "colour", "missing", "broken"])
def test_fault_is_one_line_that_names_the_image(tmp_path: Path, limit: float, workers: int, fault: str) -> None:
    """Also when a worker process meets it."""
    grey, content = np.zeros((28, 28), np.uint8), {"broken": b"?"}
    content |= {"shape": encode_png(grey[:5]), "colour": encode_png(np.zeros((28, 28, 3), np.uint8))}
    files = {f"{index}.png": encode_png(grey) for index in range(8)}
    (tmp_path / "labels.csv").write_text("".join(f"{name},0\n" for name in files))
    if fault == "missing":
        del files["5.png"]
    else:
        files["5.png"] = content[fault]
    write_zip(tmp_path / "images.zip", files.items())
    dataset = CustomImageDataset(tmp_path / "labels.csv", tmp_path / "images.zip")
    with pytest.raises(PipelineError, match=r"images\.zip: .*5\.png") as caught:
        list(Batches(dataset, 4, CPU, memory_limit_gib=limit, workers=workers).epoch())
    assert "\n" not in str(caught.value)


# Batches


def epoch_of(dataset: CustomImageDataset, epoch: int = 0, **options: Any) -> list[tuple[Tensor, Tensor]]:
    options = {"memory_limit_gib": IN_MEMORY, "workers": 0} | options
    return list(Batches(dataset, 64, CPU, **options).epoch(epoch))


def same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_batches_hold_each_image_with_its_label(zipped: CustomImageDataset, small: Path) -> None:
    images, labels = pixels_and_labels(small)
    batches = epoch_of(zipped, epoch=3, seed=1, shuffle=True)
    assert [len(targets) for _, targets in batches] == [64, 64, 2]
    order = epoch_order(COUNT, seed=1, epoch=3, shuffle=True)
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), to_float(torch.tensor(images)[order][:, None]))
    assert torch.equal(torch.cat([targets for _, targets in batches]), torch.tensor(labels)[order])
    assert batches[0][0].dtype == torch.float32
    assert len(Batches(zipped, 64, CPU, memory_limit_gib=IN_MEMORY, workers=0)) == 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augmentations", [[], ["crop", "flip", "erase"]], ids=["plain", "augmented"])
def test_streamed_batches_are_the_same(zipped: CustomImageDataset, workers: int, augmentations: list[str]) -> None:
    options = {"seed": 7, "shuffle": True, "augmentations": augmentations}
    for epoch in (0, 1):
        streamed = epoch_of(zipped, epoch, memory_limit_gib=STREAMED, workers=workers, **options)
        assert same(epoch_of(zipped, epoch, **options), streamed)


def test_memory_limit_decides(zipped: CustomImageDataset) -> None:
    limit = COUNT * 28 * 28 / 2**30
    assert Batches(zipped, 64, CPU, memory_limit_gib=limit, workers=0).pixels is not None
    assert Batches(zipped, 64, CPU, memory_limit_gib=limit * 0.999, workers=0).pixels is None


@pytest.mark.parametrize("limit", [IN_MEMORY, STREAMED])
def test_global_random_numbers_are_left_alone(zipped: CustomImageDataset, limit: float) -> None:
    """Dropout draws from them: streaming must not change a training."""
    before = torch.get_rng_state()
    epoch_of(zipped, shuffle=True, augmentations=["crop"], memory_limit_gib=limit)
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_do_not_depend_on_each_other(zipped: CustomImageDataset) -> None:
    """A resumed training, which never saw epochs 0 and 1, gets the same epoch 2."""
    options: dict[str, Any] = {"seed": 1, "shuffle": True, "augmentations": ["crop", "erase"]}
    batches = Batches(zipped, 64, CPU, memory_limit_gib=IN_MEMORY, workers=0, **options)
    epochs = [list(batches.epoch(epoch)) for epoch in range(3)]
    assert same(epochs[2], epoch_of(zipped, epoch=2, **options))
    assert not same(epochs[0], epochs[1])


def test_augmentations_differ_by_epoch_and_seed(zipped: CustomImageDataset) -> None:
    first, *others = (
        epoch_of(zipped, epoch, seed=seed, augmentations=["crop"]) for epoch, seed in [(0, 0), (1, 0), (0, 1)]
    )
    assert not any(same(first, other) for other in others)


def test_batches_are_augmented_as_by_augment(zipped: CustomImageDataset) -> None:
    plain, cropped = epoch_of(zipped), epoch_of(zipped, augmentations=["crop"])
    assert not same(plain, cropped)
    assert all(pixels.shape == images.shape for (pixels, _), (images, _) in zip(plain, cropped, strict=True))
    nothing = augment(plain[0][0], [], torch.Generator())
    assert torch.equal(nothing, plain[0][0])


def test_one_hot_targets(small: Path) -> None:
    dataset = CustomImageDataset(
        small / "labels.csv", small / "images.zip", target_transform=lambda labels: one_hot(labels, 10)
    )
    for _, targets in epoch_of(dataset):
        assert targets.shape[1] == 10
        assert torch.equal(targets.sum(1), torch.ones(len(targets)))


# The order of an epoch


@pytest.mark.parametrize("count", [1, 2, 200, 60_000])
def test_order_is_a_permutation(count: int) -> None:
    assert torch.equal(epoch_order(count, 0, 0, shuffle=True).sort().values, torch.arange(count))
    assert torch.equal(epoch_order(count, 0, 0, shuffle=False), torch.arange(count))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    keys = [(seed, epoch) for seed in (0, 1, 42, 2**32 - 1) for epoch in (0, 1, 2)]
    orders = {tuple(epoch_order(50, seed, epoch, shuffle=True).tolist()) for seed, epoch in keys}
    assert len(orders) == len(keys)
    torch.manual_seed(123)
    again = {tuple(epoch_order(50, seed, epoch, shuffle=True).tolist()) for seed, epoch in keys}
    assert again == orders


def test_order_is_pinned() -> None:
    """Another order would change every published figure that was trained with shuffle: true."""
    assert epoch_order(10, seed=42, epoch=3, shuffle=True).tolist() == [3, 6, 5, 7, 8, 9, 0, 1, 2, 4]
