"""scikit-learn's 1,797 handwritten digits, grey and 8 x 8, as image files in the layouts that users have."""

import csv
import zipfile
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

LAYOUTS = ("folder", "table", "zip")


def write_digits(target: Path, layout: str) -> None:
    """folder: a folder for each class; table: one folder of images, and labels.csv; zip: a zip of the first."""
    digits = load_digits()
    # Values go from 0 to 16
    pictures = [Image.fromarray((image * 255 / 16).round().astype("uint8")) for image in digits.images]
    names = [f"{index:04d}.png" for index in range(len(pictures))]
    labels = [str(label) for label in digits.target]
    if layout == "table":
        (target / "images").mkdir(parents=True)
        for name, picture in zip(names, pictures, strict=True):
            picture.save(target / "images" / name)
        with (target / "labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("file", "label"), *zip(names, labels, strict=True)])
        return
    folder = target.with_suffix("") if layout == "zip" else target
    for name, label, picture in zip(names, labels, pictures, strict=True):
        (folder / label).mkdir(parents=True, exist_ok=True)
        picture.save(folder / label / name)
    if layout == "zip":
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(folder.rglob("*.png")):
                archive.write(path, path.relative_to(folder.parent))
