"""The dataset class as the tutorial uses it, faults of its images, and batches in their order."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_data import write_idx_dataset
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import v2

from classifier.archive import write_zip
from classifier.dataset import Batches, CustomImageDataset, epoch_order
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
    images, labels, _ = fashion_mnist.read(folder / "idx")["train"]
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
    images, labels, _ = fashion_mnist.read(small / "idx")["train"]
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


# Faults


GREY = np.zeros((28, 28), np.uint8)
FAULTY = {  # in place of an image: bytes, and what is wrong with them
    "shape": (encode_png(GREY[:5]), r"5\.png in .*images\.zip is \(1, 5, 28\) .*usable image is \(1, 28, 28\); .* one"),
    "colour": (encode_png(np.zeros((28, 28, 3), np.uint8)), r"5\.png in .*images\.zip is \(3, 28, 28\)"),
    "missing": (None, r"5\.png is missing in .*images\.zip"),
    "broken": (b"?", r"5\.png in .*images\.zip is not a usable image"),
}


def with_faults(folder: Path, faults: dict[str, bytes | None], count: int = 8) -> CustomImageDataset:
    """Images 0.png and so on in rows 2 and so on, some of them replaced, or left out."""
    images = {f"{index}.png": encode_png(GREY) for index in range(count)}
    (folder / "labels.csv").write_text("file,label\n" + "".join(f"{name},0\n" for name in images))
    files = {name: content for name, content in (images | faults).items() if content is not None}
    write_zip(folder / "images.zip", files.items())
    return CustomImageDataset(folder / "labels.csv", folder / "images.zip")


@pytest.mark.parametrize(("limit", "workers"), [(IN_MEMORY, 0), (STREAMED, 0), (STREAMED, 2)])
@pytest.mark.parametrize("fault", FAULTY)
def test_fault_is_one_line_that_names_row_and_image(tmp_path: Path, limit: float, workers: int, fault: str) -> None:
    """Also when a worker process meets it."""
    content, complaint = FAULTY[fault]
    dataset = with_faults(tmp_path, {"5.png": content})
    with pytest.raises(PipelineError, match=rf"labels\.csv, row 7: {complaint}") as caught:
        list(Batches(dataset, 4, CPU, memory_limit_gib=limit, workers=workers).epoch())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("first", ["0.png", "1.png"])
def test_all_faulty_images_are_listed_at_once(tmp_path: Path, first: str) -> None:
    """Also if the first image, which tells the shape, is one of them."""
    faults = {first: b"?", "3.png": FAULTY["shape"][0], "4.png": None, "6.png": FAULTY["colour"][0]}
    dataset = with_faults(tmp_path, faults)
    streamed = [Batches(dataset, 3, CPU, memory_limit_gib=STREAMED, workers=n, shuffle=True, seed=1) for n in (0, 2)]
    for decode in (
        dataset.decode_all,
        lambda: dataset.pixels(range(8)),
        lambda: list(streamed[0].epoch()),
        lambda: list(streamed[1].epoch()),
    ):
        with pytest.raises(PipelineError, match=r"labels\.csv: 4 faults:\n") as caught:
            decode()
        lines = str(caught.value).splitlines()[1:]
        assert [line.split(" in ")[0] for line in lines] == [
            f"  row {int(first[0]) + 2}: {first}",
            "  row 5: 3.png",
            "  row 6: 4.png is missing",
            "  row 8: 6.png",
        ]


@pytest.mark.parametrize("content", [b"", FAULTY["shape"][0]], ids=["all", "all but one"])
def test_twenty_faulty_images_are_listed_and_all_counted(tmp_path: Path, content: bytes) -> None:
    dataset = with_faults(tmp_path, {f"{index}.png": content for index in range(0 if content == b"" else 1, 101)}, 101)
    with pytest.raises(PipelineError, match=r"labels\.csv: 10[01] faults, the first 20:\n") as caught:
        dataset.decode_all()
    assert str(caught.value).count("\n  row ") == 20


def test_single_images_and_the_digest_name_the_row_too(tmp_path: Path) -> None:
    dataset = with_faults(tmp_path, {"5.png": None})
    for use in (lambda: dataset[5], lambda: dataset.decode(5), dataset.md5):
        with pytest.raises(PipelineError, match=r"labels\.csv, row 7: 5\.png is missing in"):
            use()


def test_label_beyond_the_classes_is_refused(small: Path) -> None:
    CustomImageDataset(small / "labels.csv", small / "images.zip", classes=10)
    with pytest.raises(PipelineError, match=r"labels\.csv: \d+ faults.*:\n  row \d+: label '9' is not one of 0\.\.8"):
        CustomImageDataset(small / "labels.csv", small / "images.zip", classes=9)


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\n")
    dataset = CustomImageDataset(tmp_path / "labels.csv", tmp_path)
    assert len(dataset) == 0
    with pytest.raises(PipelineError, match=r"labels\.csv: names no image"):
        dataset.decode_all()


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
