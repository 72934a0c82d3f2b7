"""Draw docs/images/fit.png: one photo as `fit` prepares it.

python docs/images/fit.py

The photo is scikit-learn's flower.jpg, by dany13 (CC BY 2.0).
"""

import io
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image

from classifier.data.decoding import decode_image


def main() -> None:
    photo = Image.fromarray(load_sample_image("flower.jpg"))
    content = io.BytesIO()
    photo.save(content, "PNG")
    figure = Figure(figsize=(7.2, 2.1), dpi=100, layout="constrained")
    original, *others = figure.subplots(1, 4, width_ratios=[1.5, 1, 1, 1])
    original.imshow(photo)
    original.set_title(f"original, {photo.width} x {photo.height}", fontsize=9)
    for axis, fit in zip(others, ("pad", "crop", "stretch"), strict=True):
        axis.imshow(decode_image(content.getvalue(), (224, 224), fit=fit).transpose(1, 2, 0))
        axis.set_title(f"fit: {fit}", fontsize=9)
        axis.patch.set_edgecolor("grey")
    for axis in (original, *others):
        axis.set(xticks=[], yticks=[])
    figure.savefig(Path(__file__).with_name("fit.png"), metadata={"Software": None})


if __name__ == "__main__":
    main()
