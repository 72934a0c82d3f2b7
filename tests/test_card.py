"""Text of the model card for handwritten manifests; tests/test_export.py covers the card of a real model."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from classifier.export.model_card import model_card

NAMES = ["bag", "boot", "hat"]
TRAIN = np.array([0] * 1200 + [1] * 30 + [2] * 30)


def manifest(**more: Any) -> dict[str, Any]:
    test = {"accuracy": 0.75, "loss": 0.5, "accuracy_ci95": [0.7, 0.8]}
    return {
        "input": {"shape": ["batch", 3, 20, 30]},
        "decoding": {"fit": "pad", "background": [255, 0, 9], "intensity": "full", "stored_size": [20, 30]},
        "classes": NAMES,
        "files": {"model.onnx": {"sha256": "12ab", "bytes": 1234567, "trusted_source_only": False}},
        "md5": {"data/raw": None, "data/images": "34cd"},
        "parameters": {"network": "mlp", "source": "folder", "data_path": "data/own", "lr": 0.1, "weights": None},
        "metrics": {
            "train": {"epoch": 3},
            "test": test | {"balanced_accuracy": 0.7, "macro_f1": 0.6, "ece": 0.125},
        },
        "versions": {"python": "3.11.7", "torch": "2.0"},
    } | more


def card(names: list[str] = NAMES, images: int = 40, val: int = 5, **more: Any) -> str:
    """images: number of test images of the last class; val: number of validation images."""
    scores = pd.DataFrame({"class": names, "precision": 0.5, "recall": [0.9, 0.2, 0.6], "f1": 0.6})
    scores["images"] = [40, 40, images]
    labels = {"train": TRAIN, "val": np.zeros(val, np.int64), "test": np.zeros(80 + images, np.int64)}
    return model_card(manifest(**({"classes": names} | more)), scores, labels)


def test_it_describes_the_model_and_its_metrics() -> None:
    text = card()
    assert text.startswith("# mlp, a classifier of 3 classes\n")
    assert "pixels `(N, 3, 20, 30)`, RGB, float32 in [0, 1]" in text
    assert "| `model.onnx` | 1,234,567 | `12ab` |\n" in text
    assert "| train | 1,260 | the weights |\n" in text
    assert "| `data/images` | `34cd` |\n" in text
    assert 'data_path: "data/own"\nlr: 0.1\nweights: null\n' in text
    assert "| Accuracy | 75.00% |\n| Loss | 0.50000 |\n| Balanced accuracy | 70.00% |\n" in text
    assert "The 95 % interval of the accuracy is 70.00% to 80.00%.\n" in text
    assert "Top-3" not in text
    assert "| boot | 50.00% | 20.00% | 60.00% | 40 | 30 |\n" in text
    assert "Loading these files cannot run code." in text
    assert 'convert("RGB")' in text
    # In Pillow's order: width, height
    assert "ImageOps.pad(image, (30, 20), Image.Resampling.BILINEAR, color=(255, 0, 9))\npixels" in text
    assert 'Image.new("RGBA", image.size, "#ff0009")' in text


def test_it_prepares_images_as_they_were_prepared() -> None:
    decoding = {"fit": "crop", "background": [0, 0, 0], "intensity": "full", "stored_size": [40, 60]}
    text = card(decoding=decoding)
    assert "image = ImageOps.fit(image, (60, 40), Image.Resampling.BILINEAR)\nimage = image.resize((30, 20)," in text
    text = card(decoding=decoding | {"fit": "stretch", "stored_size": [20, 30]})
    assert text.count("image = image.resize((30, 20), Image.Resampling.BILINEAR)\n") == 1


def test_it_lists_weak_rare_and_untested_classes() -> None:
    text = card(images=0)
    limits = text[text.index("## Limits") :]
    assert "Lowest recall: boot (20.00%), bag (90.00%).\n" in limits
    assert "The classes have from 30 (boot) to 1,200 (bag) training images.\n" in limits
    assert "Not tested, because there are no test images: hat.\n" in limits
    assert "not calibrated: the calibration error on the test images is 12.50%" in limits
    assert "Not tested" not in card()


def test_optional_sections_appear_only_where_they_apply() -> None:
    before, after = {"ece": 0.125, "nll": 0.5}, {"ece": 0.03125, "nll": 0.4}
    calibration = {"temperature": 1.5, "validation_images": 5, "test_before": before, "test_after": after}
    int8 = {"images": 120, "split": "validation", "accuracy": 0.7, "float_accuracy": 0.71, "bytes_saved": 4321}
    text = card(calibration=calibration, int8=int8)
    assert "divided by the temperature 1.5000, fitted on 5 validation images" in text
    assert "| expected calibration error | 12.50% | 3.12% |\n" in text
    assert (
        "On 120 validation images its accuracy is\n70.00%, that of the float network 71.00%. It saves 4,321 bytes."
        in text
    )
    assert "not calibrated" not in text
    assert "Temperature scaling, below, comes after these metrics." in text
    assert "no validation images" not in text
    plain = card(val=0)
    assert "Calibration" not in plain.replace("Calibration error", "")
    assert "## int8" not in plain
    assert "There were no validation images: the last epoch is kept." in plain


def test_files_that_can_run_code_have_a_warning() -> None:
    entry = manifest()["files"]["model.onnx"]
    text = card(files={"model.pt2": entry, "model.safetensors": entry})
    assert "load it only if you trust its origin" in text
    assert "Loading these files cannot run code" not in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("T-shirt/top", "T-shirt/top"),
        ("a|b", r"a\|b"),
        ("<script>alert(1)</script>", r"\<script\>alert(1)\</script\>"),
        ("[here](http://host)", r"\[here\](http://host)"),
        ("`*_$\\", r"\`\*\_\$" + "\\\\"),
        ("{{ 7 * 7 }}", r"{{ 7 \* 7 }}"),
    ],
)
def test_class_names_are_escaped(name: str, shown: str) -> None:
    assert f"\n| {shown} | 50.00% |" in card(names=[name, "boot", "hat"])


def test_credentials_in_an_address_are_masked() -> None:
    parameters = manifest()["parameters"] | {"data_path": "https://me:secret@host/data"}
    text = card(parameters=parameters)
    assert "secret" not in text
    assert 'data_path: "https://***@host/data"\n' in text
    assert r'with data_path "https://\*\*\*@host/data".' in text
