"""The dataset class as the tutorial uses it, faults of its images, and batches in their order."""

import gc
import multiprocessing
import re
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import encode_png, write_annotations, write_arrays, write_zip
from project import small_project
from sklearn.utils.class_weight import compute_class_weight
from small_data import write_idx_dataset
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import v2

from classifier.data.dataset import CustomImageDataset
from classifier.data.decoding import resize_pixels
from classifier.data.loader import Batches, _generator, epoch_order
from classifier.data.transforms import augment, one_hot, to_float
from classifier.pipeline.errors import PipelineError
from classifier.sources import fashion_mnist

CPU = torch.device("cpu")
ALL_AUGMENTATIONS = ["crop", "flip", "erase", "color", "mixup", "cutmix"]
IN_MEMORY, STREAMED = 1.0, 1e-9  # memory limits in GiB
COUNT = 130
PINNED_BALANCED_ORDER = [0, 8, 0, 9, 5, 9, 9, 7, 5, 8]
DIGITS = [str(label) for label in range(10)]  # as names of classes


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images as arrays, in arrays/, and as files, in images/ and images.zip; and labels.csv."""
    folder = tmp_path_factory.mktemp("small")
    write_idx_dataset(folder / "idx", train=COUNT)
    images, labels, *_ = fashion_mnist.read(folder / "idx")["train"]
    files = [(f"{index}.png", encode_png(image)) for index, image in enumerate(images)]
    write_zip(folder / "images.zip", files)
    (folder / "images").mkdir()
    for name, content in files:
        (folder / "images" / name).write_bytes(content)
    write_arrays(folder / "arrays", np.asarray(images)[:, None], file_bytes=50 * 28 * 28)
    write_annotations(folder / "labels.csv", labels)
    return folder


@pytest.fixture(params=["arrays", "images.zip", "images"])
def dataset(request: pytest.FixtureRequest, small: Path) -> CustomImageDataset:
    return CustomImageDataset(small / "labels.csv", small / request.param)


def pixels_and_labels(small: Path) -> tuple[np.ndarray, np.ndarray]:
    images, labels, *_ = fashion_mnist.read(small / "idx")["train"]
    return np.asarray(images), labels


@pytest.fixture
def arrays(small: Path) -> CustomImageDataset:
    return CustomImageDataset(small / "labels.csv", small / "arrays", classes=10)


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
@pytest.mark.parametrize("archive", ["arrays", "images.zip", "images"])
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


# All images


def test_md5_tells_data_sets_apart_by_images_labels_and_order_but_not_by_names(tmp_path: Path) -> None:
    def md5(rows: list[tuple[str, int, int]], size: tuple[int, int] = (2, 3)) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, grey, _ in rows:
            (folder / name).write_bytes(encode_png(np.full(size, grey, np.uint8)))
        (folder / "labels.csv").write_text("file,label\n" + "".join(f"{name},{label}\n" for name, _, label in rows))
        return CustomImageDataset(folder / "labels.csv", folder).md5()

    rows = [("a", 10, 0), ("b", 20, 1)]
    assert md5([("x", 10, 0), ("y", 20, 1)]) == md5(rows)
    others = [
        [("a", 10, 1), ("b", 20, 1)],
        [("a", 11, 0), ("b", 20, 1)],
        [("b", 20, 1), ("a", 10, 0)],
        rows[:1],
    ]
    assert len({md5(rows), md5(rows, (3, 2)), *map(md5, others)}) == 6


def test_md5_does_not_depend_on_how_images_are_stored(small: Path) -> None:
    places = ("arrays", "images", "images.zip")
    assert len({CustomImageDataset(small / "labels.csv", small / place).md5() for place in places}) == 1


def test_read(dataset: CustomImageDataset, small: Path) -> None:
    expected = torch.from_numpy(np.array(pixels_and_labels(small)[0]))[:, None]
    for indices in (range(COUNT), [], [3], [COUNT - 1, 0, 60, 60, 49, 50, 51]):
        pixels = dataset.read(indices)
        assert pixels.dtype == torch.uint8
        assert torch.equal(pixels, expected[list(indices)])
    assert torch.equal(dataset.pixels([7, 100]), to_float(expected[[7, 100]]))
    with pytest.raises(IndexError):
        dataset.decode(COUNT)


def test_colour_images_keep_their_channels(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    write_zip(tmp_path / "images.zip", [("a.png", encode_png(image))])
    (tmp_path / "labels.csv").write_text("a.png,0\n")
    pixels = CustomImageDataset(tmp_path / "labels.csv", tmp_path / "images.zip").read([0])
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


@pytest.mark.parametrize("limit", [IN_MEMORY, STREAMED])
@pytest.mark.parametrize("fault", FAULTY)
def test_fault_is_one_line_that_names_row_and_image(tmp_path: Path, limit: float, fault: str) -> None:
    """Also when a thread meets it."""
    content, complaint = FAULTY[fault]
    dataset = with_faults(tmp_path, {"5.png": content})
    with pytest.raises(PipelineError, match=rf"labels\.csv, row 7: {complaint}") as caught:
        list(Batches(dataset, 4, CPU, memory_limit_gib=limit, workers=0).epoch())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("first", ["0.png", "1.png"])
def test_all_faulty_images_are_listed_at_once(tmp_path: Path, first: str) -> None:
    """Also if the first image, which tells the shape, is one of them."""
    faults = {first: b"?", "3.png": FAULTY["shape"][0], "4.png": None, "6.png": FAULTY["colour"][0]}
    dataset = with_faults(tmp_path, faults)
    with pytest.raises(PipelineError, match=r"labels\.csv: 4 faults:\n") as caught:
        dataset.pixels(range(8))
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
        dataset.read(range(101))
    assert str(caught.value).count("\n  row ") == 20
    assert re.search(r"row 20: 18\.png in \S+images\.zip is (not a usable image: |\(1, 5, 28\))", str(caught.value))


def test_single_images_and_the_digest_name_the_row_too(tmp_path: Path) -> None:
    dataset = with_faults(tmp_path, {"5.png": None})
    for use in (lambda: dataset[5], lambda: dataset.decode(5), dataset.md5):
        with pytest.raises(PipelineError, match=r"labels\.csv, row 7: 5\.png is missing in"):
            use()


def test_label_beyond_the_classes_is_refused(small: Path) -> None:
    CustomImageDataset(small / "labels.csv", small / "arrays", classes=10)
    with pytest.raises(PipelineError, match=r"labels\.csv: \d+ faults.*:\n  row \d+: label '9' is not one of 0\.\.8"):
        CustomImageDataset(small / "labels.csv", small / "arrays", classes=9)


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("file,label\n")
    dataset = CustomImageDataset(tmp_path / "labels.csv", tmp_path)
    assert len(dataset) == 0
    with pytest.raises(PipelineError, match=r"labels\.csv: names no image"):
        dataset.image_shape()


# Batches


def epoch_of(dataset: CustomImageDataset, epoch: int = 0, **options: Any) -> list[tuple[Tensor, Tensor]]:
    options = {"memory_limit_gib": IN_MEMORY, "workers": 0} | options
    return list(Batches(dataset, 64, CPU, **options).epoch(epoch))


def same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)
    )


def test_batches_hold_each_image_with_its_label(arrays: CustomImageDataset, small: Path) -> None:
    images, labels = pixels_and_labels(small)
    batches = epoch_of(arrays, epoch=3, seed=1, shuffle=True)
    assert [len(targets) for _, targets in batches] == [64, 64, 2]
    order = epoch_order(COUNT, seed=1, epoch=3, shuffle=True)
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), to_float(torch.tensor(images)[order][:, None]))
    assert torch.equal(torch.cat([targets for _, targets in batches]), torch.tensor(labels)[order])
    assert batches[0][0].dtype == torch.float32
    assert len(Batches(arrays, 64, CPU, memory_limit_gib=IN_MEMORY, workers=0)) == 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augmentations", [[], ALL_AUGMENTATIONS], ids=["plain", "augmented"])
@pytest.mark.parametrize("balanced", [False, True], ids=["shuffled", "balanced"])
def test_streamed_batches_are_the_same(
    arrays: CustomImageDataset, workers: int, augmentations: list[str], balanced: bool
) -> None:
    weights = arrays.class_weights(DIGITS)[arrays.labels] if balanced else None
    options = {"seed": 7, "shuffle": True, "augmentations": augmentations, "weights": weights}
    for epoch in (0, 1):
        streamed = epoch_of(arrays, epoch, memory_limit_gib=STREAMED, workers=workers, **options)
        assert same(epoch_of(arrays, epoch, **options), streamed)


def test_memory_limit_decides(arrays: CustomImageDataset) -> None:
    limit = COUNT * 28 * 28 / 2**30
    assert Batches(arrays, 64, CPU, memory_limit_gib=limit, workers=0).fits_memory
    assert not Batches(arrays, 64, CPU, memory_limit_gib=limit * 0.999, workers=0).fits_memory


def test_an_epoch_that_is_left_early_leaves_no_thread_behind(arrays: CustomImageDataset) -> None:
    epoch = Batches(arrays, 4, CPU, memory_limit_gib=STREAMED, workers=0).epoch()
    before = threading.active_count()
    next(epoch)
    assert threading.active_count() == before + 1
    epoch.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


@pytest.mark.parametrize("limit", [IN_MEMORY, STREAMED])
def test_global_random_numbers_are_left_alone(arrays: CustomImageDataset, limit: float) -> None:
    """Dropout draws from them: streaming must not change a training."""
    before = torch.get_rng_state()
    weights = arrays.class_weights(DIGITS)[arrays.labels]
    epoch_of(arrays, shuffle=True, weights=weights, augmentations=ALL_AUGMENTATIONS, memory_limit_gib=limit)
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_do_not_depend_on_each_other(arrays: CustomImageDataset) -> None:
    """A resumed training, which never saw epochs 0 and 1, gets the same epoch 2."""
    options: dict[str, Any] = {"seed": 1, "shuffle": True, "augmentations": ALL_AUGMENTATIONS}
    batches = Batches(arrays, 64, CPU, memory_limit_gib=IN_MEMORY, workers=0, **options)
    epochs = [list(batches.epoch(epoch)) for epoch in range(3)]
    assert same(epochs[2], epoch_of(arrays, epoch=2, **options))
    assert not same(epochs[0], epochs[1])
    for first in range(4):  # nor batches on those before them
        assert same(list(batches.epoch(2, first)), epochs[2][first:])


@pytest.mark.parametrize("names", [["mixup"], ["cutmix"], ["mixup", "cutmix"]], ids="+".join)
@pytest.mark.parametrize("target_transform", [None, partial(one_hot, classes=10)], ids=["numbers", "one_hot"])
def test_mixed_batches_have_probabilities(small: Path, names: list[str], target_transform: Any) -> None:
    """Those of `mix`, for batches of 43 and one image too."""
    dataset = CustomImageDataset(small / "labels.csv", small / "images.zip", None, target_transform, classes=10)
    for size in (43, 1):
        batches = Batches(dataset, size, CPU, augmentations=names, memory_limit_gib=IN_MEMORY, workers=0)
        for index, (pixels, targets) in enumerate(batches.epoch()):
            labels = dataset.labels[index * size : (index + 1) * size]
            assert targets.shape == (len(pixels), 10)
            assert targets.dtype == torch.float32
            others = targets.scatter(1, torch.stack([labels, labels.roll(1)], 1), 0)
            assert not others.any()
            torch.testing.assert_close(targets.sum(1), torch.ones(len(targets)), rtol=0, atol=1e-6)


def test_augmentations_differ_by_epoch_and_seed(arrays: CustomImageDataset) -> None:
    first, *others = (
        epoch_of(arrays, epoch, seed=seed, augmentations=["crop"]) for epoch, seed in [(0, 0), (1, 0), (0, 1)]
    )
    assert not any(same(first, other) for other in others)


def test_batches_are_augmented_as_by_augment(arrays: CustomImageDataset) -> None:
    plain, cropped = epoch_of(arrays, 2, seed=5), epoch_of(arrays, 2, seed=5, augmentations=["crop"])
    for number, ((pixels, _), (images, _)) in enumerate(zip(plain, cropped, strict=True)):
        assert torch.equal(images, augment(pixels, ["crop"], _generator(5, 2, 1, number)))
        assert not torch.equal(images, pixels)


def test_one_hot_targets(small: Path) -> None:
    dataset = CustomImageDataset(
        small / "labels.csv", small / "images.zip", target_transform=lambda labels: one_hot(labels, 10)
    )
    for _, targets in epoch_of(dataset):
        assert targets.shape[1] == 10
        assert torch.equal(targets.sum(1), torch.ones(len(targets)))


# Single images


PER_IMAGE_NAMES = ["resized_crop", "rotate", "trivial", "randaugment"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 30 colour images of 24 x 32 as arrays, and labels.csv."""
    folder = tmp_path_factory.mktemp("photos")
    pixels = np.random.default_rng(1).integers(0, 256, (30, 3, 24, 32), np.uint8)
    write_arrays(folder / "arrays", pixels)
    write_annotations(folder / "labels.csv", np.arange(30) % 3)
    return folder


def of_photos(photos: Path, size: tuple[int, int] | None = (18, 24)) -> CustomImageDataset:
    return CustomImageDataset(photos / "labels.csv", photos / "arrays", classes=3, size=size)


def augmented(
    photos: Path, names: list[str], epoch: int = 0, first: int = 0, **options: Any
) -> list[tuple[Tensor, Tensor]]:
    options = {"seed": 4, "shuffle": True, "workers": 0, "crop_scale": 0.3, "memory_limit_gib": IN_MEMORY} | options
    return list(Batches(of_photos(photos), 8, CPU, augmentations=names, **options).epoch(epoch, first))


@pytest.mark.parametrize(
    "names", [[name] for name in PER_IMAGE_NAMES] + [[*PER_IMAGE_NAMES, "flip", "mixup"]], ids="+".join
)
def test_single_images_are_augmented_alike_by_any_number_of_workers(photos: Path, names: list[str]) -> None:
    before = torch.get_rng_state()
    alone = augmented(photos, names, epoch=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert [tuple(pixels.shape[1:]) for pixels, _ in alone] == [(3, 18, 24)] * 4
    assert same(alone, augmented(photos, names, epoch=2, workers=2))
    assert same(alone[1:], augmented(photos, names, epoch=2, first=1))  # a resumed training
    for other in (augmented(photos, names, epoch=3), augmented(photos, names, epoch=2, seed=5)):
        assert not any(torch.equal(pixels, others) for (pixels, _), (others, _) in zip(alone, other, strict=True))


def test_workers_stay_for_the_next_epochs_and_end_with_the_batches(photos: Path) -> None:
    batches = Batches(of_photos(photos), 8, CPU, augmentations=["rotate"], workers=2, memory_limit_gib=IN_MEMORY)
    first, *_ = batches.epoch(0)
    workers = {child.pid for child in multiprocessing.active_children()}
    assert len(workers) >= 2
    again, *_ = batches.epoch(0)
    assert workers == {child.pid for child in multiprocessing.active_children()}
    assert torch.equal(first[0], again[0])
    del batches
    gc.collect()
    assert not workers & {child.pid for child in multiprocessing.active_children()}


def test_a_random_crop_is_a_part_of_the_image_as_it_is_stored(photos: Path) -> None:
    """Of all of it, where the scale is 1 and the shape of the crop that of the image."""
    ((pixels, _), *_) = augmented(photos, ["resized_crop"], crop_scale=1.0, shuffle=False)
    stored = of_photos(photos).read_stored(range(8))
    nearly_whole = v2.functional.resize(stored, [18, 24], antialias=True)
    assert ((pixels * 255 - nearly_whole).abs().mean(dim=(1, 2, 3)) < 45).sum() >= 2  # random noise differs by 85
    small = augmented(photos, ["resized_crop"], crop_scale=0.05, shuffle=False)[0][0]
    assert not torch.equal(small, pixels)


def test_rotated_images_have_the_background_in_their_corners(tmp_path: Path) -> None:
    write_arrays(tmp_path / "arrays", np.full((20, 3, 32, 32), 200, np.uint8))
    dataset = CustomImageDataset(write_annotations(tmp_path / "labels.csv", [0] * 20), tmp_path / "arrays")
    options: dict[str, Any] = {"augmentations": ["rotate"], "workers": 0, "memory_limit_gib": IN_MEMORY}
    ((pixels, _),) = Batches(dataset, 20, CPU, background=(10, 20, 30), **options).epoch()
    corners = (pixels[:, :, 0, 0] * 255).round().int().tolist()
    assert [10, 20, 30] in corners
    assert (pixels[:, :, 16, 16] * 255 == 200).all()


def test_images_that_are_stored_larger_are_scaled_for_everyone(photos: Path) -> None:
    dataset, stored = of_photos(photos), of_photos(photos, None)
    assert (dataset.image_shape(), stored.image_shape()) == ((3, 18, 24), (3, 24, 32))
    expected = torch.stack(
        [torch.from_numpy(resize_pixels(image.numpy(), (18, 24))) for image in stored.read(range(30))]
    )
    assert torch.equal(dataset.read(range(30)), expected)
    assert torch.equal(dataset.decode(7), expected[7])
    batches = list(Batches(dataset, 8, CPU, workers=2, memory_limit_gib=IN_MEMORY).epoch())
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), to_float(expected))
    assert dataset.md5() != stored.md5()


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


# Balanced classes


def skewed_labels(*counts: int) -> Tensor:
    return torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])


def with_labels(folder: Path, labels: Tensor) -> CustomImageDataset:
    """A data set that has these labels, and no images."""
    rows = [f"{index}.png,{label}\n" for index, label in enumerate(labels.tolist())]
    (folder / "train.csv").write_text("file,label\n" + "".join(rows))
    return CustomImageDataset(folder / "train.csv", folder)


def test_class_weights_are_those_of_scikit_learn(tmp_path: Path) -> None:
    labels = skewed_labels(70, 1, 29)
    weights = with_labels(tmp_path, labels).class_weights(["a", "b", "c"])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-15)
    assert float(weights[labels].mean()) == pytest.approx(1, abs=1e-12)


def test_classes_without_an_image_are_named(tmp_path: Path) -> None:
    dataset = with_labels(tmp_path, skewed_labels(3, 0, 2, 0))
    with pytest.raises(
        PipelineError, match=r"train\.csv: balance: no image of class dog, owl; add some, or set balance"
    ):
        dataset.class_weights(["cat", "dog", "eel", "owl"])


def test_balanced_order_draws_each_class_alike_and_each_of_its_images_alike(tmp_path: Path) -> None:
    labels = skewed_labels(9000, 900, 90, 10)
    weights = with_labels(tmp_path, labels).class_weights(["a", "b", "c", "d"])[labels]
    orders = torch.stack([epoch_order(10_000, 3, epoch, True, weights) for epoch in range(8)])
    assert orders.dtype == torch.int64
    assert (labels[orders].flatten().bincount() / orders.numel() - 0.25).abs().max() < 0.01
    for epoch in orders:
        assert (labels[epoch].bincount() / 10_000 - 0.25).abs().max() < 0.03
    drawn = orders.flatten().bincount(minlength=10_000)
    for label, (count, least, most) in enumerate([(9000, 0, 15), (900, 5, 50), (90, 150, 300), (10, 1800, 2200)]):
        of_class = drawn[labels == label]
        assert len(of_class) == count
        assert least <= of_class.min() <= of_class.max() <= most


def test_balanced_order_is_a_function_of_seed_and_epoch() -> None:
    weights = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keys = [(seed, epoch) for seed in (0, 1, 42) for epoch in (0, 1, 2)]
    before = torch.get_rng_state()
    orders = [epoch_order(50, seed, epoch, True, weights).tolist() for seed, epoch in keys]
    assert len({tuple(order) for order in orders}) == len(keys)
    assert orders == [epoch_order(50, seed, epoch, True, weights).tolist() for seed, epoch in keys]
    assert torch.equal(torch.get_rng_state(), before)
    assert epoch_order(10, 42, 3, True, torch.tensor([1.0] * 8 + [4.0] * 2).double()).tolist() == PINNED_BALANCED_ORDER


@pytest.mark.slow
def test_order_of_more_images_than_multinomial_takes() -> None:
    """As many as 2^24 + 1, of which only the last weighs something."""
    weights = torch.zeros(2**24 + 1, dtype=torch.float64)
    weights[-1] = 1
    assert (epoch_order(len(weights), 0, 0, True, weights) == 2**24).all()


def test_balanced_batches_hold_the_images_drawn(arrays: CustomImageDataset, small: Path) -> None:
    images, _ = pixels_and_labels(small)
    weights = torch.zeros(COUNT, dtype=torch.float64)
    weights[[3, 77]] = torch.tensor([1.0, 3.0], dtype=torch.float64)
    batches = epoch_of(arrays, epoch=2, seed=1, shuffle=True, weights=weights)
    order = epoch_order(COUNT, 1, 2, True, weights)
    assert [len(targets) for _, targets in batches] == [64, 64, 2]
    assert set(order.tolist()) == {3, 77}
    assert 80 < int((order == 77).sum()) < 115
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), to_float(torch.tensor(images)[order][:, None]))
    assert torch.equal(torch.cat([targets for _, targets in batches]), arrays.labels[order])


def test_balanced_order_needs_shuffle(arrays: CustomImageDataset) -> None:
    with pytest.raises(
        PipelineError, match=r"balance: sampler draws .* at random; set shuffle: true, or balance: loss"
    ):
        epoch_of(arrays, weights=torch.ones(COUNT, dtype=torch.float64))


# In the stage


@pytest.mark.slow
def test_streaming_and_workers_leave_the_weights_as_they_are(tmp_path: Path) -> None:
    """Byte for byte, with everything that is drawn at random."""
    project = small_project(tmp_path, epochs="2", augment=f"[{', '.join(ALL_AUGMENTATIONS)}]", balance="sampler")
    project.dvc("repro", "annotate")
    written = set()
    for limit, workers in [("8", "0"), ("0.00001", "0"), ("0.00001", "2")]:
        project.set_params(memory_limit_gib=limit, workers=workers)
        project.run(sys.executable, "-m", "stages", "train")
        written.add((project.root / "models/model_weights.pth").read_bytes())
    assert len(written) == 1
