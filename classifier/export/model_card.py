"""Model card: README.md of an exported model, with its formats, data, parameters, metrics and limits.

Its bytes depend only on the model: no time, no host, no run id.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from classifier.data.decoding import padding_colour
from classifier.evaluation.metrics import METRICS
from classifier.pipeline.errors import masked
from classifier.pipeline.paths import repository_root

WEAKEST_SHOWN = 3  # classes


def model_card(manifest: dict[str, Any], scores: pd.DataFrame, labels: dict[str, np.ndarray]) -> str:
    """Return the card as Markdown.

    manifest: content of manifest.json. scores: table of metrics/classes.csv. labels: (N,) int64 of `train`, `val` and
    `test`.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # noqa: S701, not HTML; the filter `text` escapes names, values are in code blocks
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": "{:.2%}".format, "count": "{:,}".format, "text": _text}
    names, test = manifest["classes"], manifest["metrics"]["test"]
    in_training = np.bincount(labels["train"], minlength=len(names))
    tested = scores[scores["images"] > 0]
    parameters = {key: masked(json.dumps(value)) for key, value in manifest["parameters"].items()}
    return environment.get_template("card.md.j2").render(
        manifest,
        parameter=parameters,
        test=test,
        metrics_of_test=[(metric, test[key]) for key, metric in METRICS.items() if key in test],
        channels=manifest["input"]["shape"][1],
        size=manifest["input"]["shape"][2:],
        background="#{:02x}{:02x}{:02x}".format(*manifest["decoding"]["background"]),
        padding=padding_colour(manifest["decoding"]["background"], manifest["input"]["shape"][1]),
        counts={split: len(of_split) for split, of_split in labels.items()},
        scores=scores.assign(train=in_training).to_dict("records"),
        weakest=tested.sort_values("recall", kind="stable").head(WEAKEST_SHOWN).to_dict("records"),
        untested=scores[scores["images"] == 0]["class"].tolist(),
        fewest=(names[in_training.argmin()], in_training.min()),
        most=(names[in_training.argmax()], in_training.max()),
    )


def next_steps(export: Path, names: Sequence[str]) -> str:
    """Return where the exported model is and which commands to run next.

    In the copy of an experiment, also return how to apply the experiment to the checkout. export: the folder of the
    model. names: of its files there.
    """
    if repository_root() == Path.cwd():
        return (
            f"The model is in {export}: {', '.join(names)}; README.md there shows how to load each.\n"
            "Next: `classifier predict image.jpg`, `make report` for a page about the model, `make ui` for all runs."
        )
    experiment = os.environ.get("DVC_EXP_NAME", "EXPERIMENT")
    return (
        f"The model belongs to the experiment {experiment}: `dvc exp apply {experiment}` brings it to {export}.\n"
        "Next: `dvc exp show` to compare the experiments, `make ui` for all runs."
    )


def _text(value: str) -> str:
    """Escape the characters that Markdown, its tables or HTML interpret."""
    return re.sub(r"([\\`*_\[\]<>|~&$])", r"\\\1", value)
