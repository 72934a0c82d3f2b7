"""Read params.yaml into a frozen, typed model that checks every key and value. There are no defaults in code.

`python -m classifier.pipeline.params` checks the file and prints nothing if it is valid.
"""

import difflib
import re
import reprlib
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, model_validator

from classifier.pipeline.errors import PipelineError, masked, run_main
from classifier.pipeline.paths import PARAMS
from classifier.pipeline.safe_yaml import read_yaml

PACKAGE = Path(__file__).parent.parent


def modules_in(folder: str) -> list[str]:
    """Return the names of the networks or data sources: the modules in classifier/<folder>."""
    return sorted(path.stem for path in (PACKAGE / folder).glob("*.py") if not path.stem.startswith("_"))


def _one_of_modules(folder: str) -> AfterValidator:
    def check(name: str) -> str:
        names = modules_in(folder)
        if name not in names:
            raise ValueError(f"one of {', '.join(names)} (the modules in classifier/{folder})")
        return name

    return AfterValidator(check)


def _count_or_fraction(value: int | float) -> int | float:
    if value < 0 or (isinstance(value, float) and value >= 1):
        raise ValueError("a count of images (0 or more), or a fraction below 1")
    return value


def _possible_with_shuffle(balance: str, info: ValidationInfo) -> str:
    if balance == "sampler" and info.data.get("shuffle") is False:
        raise ValueError("possible with shuffle: false; set shuffle: true, or balance: loss")
    return balance


def _without_password(text: str) -> str:
    if masked(text) != text:
        raise ValueError("free of passwords, which Git, MLflow and the manifest would keep")
    return text


Text = Annotated[str, Field(min_length=1), AfterValidator(_without_password)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Side = Annotated[int, Field(ge=1, le=4096)]
Sides = Side | Annotated[list[Side], Field(min_length=2, max_length=2)]
SIDES = "a whole number of pixels from 1 to 4096, or [height, width], or empty"


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"a regular expression: {error}") from None
    return text


def _folds(folds: int) -> int:
    if folds != 0 and not 2 <= folds <= 100:
        raise ValueError("0, or a number of folds from 2 to 100")
    return folds


def _below_folds(fold: int, info: ValidationInfo) -> int:
    folds = info.data.get("folds", 0)
    if not 0 <= fold < max(folds, 1):
        raise ValueError(f"a fold from 0 to {folds - 1}" if folds else "0, as folds is 0")
    return fold


def _of_the_shape_of_image_size(stored_size: Any, info: ValidationInfo) -> Any:
    if stored_size is None:
        return None
    if info.data.get("image_size") is None:
        raise ValueError("possible without image_size; set both")
    stored, used = _sides(stored_size), _sides(info.data["image_size"])
    if stored[0] * used[1] != stored[1] * used[0]:
        raise ValueError(f"of the shape of image_size, {used[0]} x {used[1]} (height x width)")
    if stored[0] < used[0]:
        raise ValueError(f"as large as image_size, {used[0]} x {used[1]} (height x width), or larger")
    return stored_size


def _sides(size: int | list[int]) -> tuple[int, int]:
    """Height and width."""
    height, width = [size] * 2 if isinstance(size, int) else size
    return height, width


class Params(BaseModel):
    """The parameters in params.yaml. A field's description names the allowed values; error messages quote it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    seed: int = Field(ge=0, lt=2**32, description="a whole number from 0 to 4294967295")
    device: str = Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, mps, cuda or cuda:<number>")
    threads: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = Field(
        description="auto or a whole number from 1 to 1024"
    )
    launcher: str = Field(
        pattern=r"^(python|torchrun( [\w./:=, -]*)?)$", description="python, or a torchrun command line"
    )

    source: Annotated[str, _one_of_modules("sources")] = Field(description="a module in classifier/sources")
    data_path: Text = Field(description="a path")
    val_size: Annotated[int | float, AfterValidator(_count_or_fraction)] = Field(
        description="a count of images (0 or more), or a fraction below 1"
    )
    test_size: Annotated[int | float, AfterValidator(_count_or_fraction)] = Field(
        description="a count of images (0 or more), or a fraction below 1"
    )
    split_seed: int = Field(ge=0, lt=2**32, description="a whole number from 0 to 4294967295")
    group: Annotated[Text, AfterValidator(_pattern)] | None = Field(description="a regular expression, or empty")
    folds: Annotated[int, AfterValidator(_folds)] = Field(description="0, or a number of folds from 2 to 100")
    fold: Annotated[int, AfterValidator(_below_folds)] = Field(description="a fold: 0 or more, and below folds")
    image_size: Sides | None = Field(description=SIDES)
    stored_size: Annotated[Sides | None, AfterValidator(_of_the_shape_of_image_size)] = Field(description=SIDES)
    channels: Literal[1, 3] | None = Field(description="1, 3, or empty")
    fit: Literal["pad", "crop", "stretch"] = Field(description="one of pad, crop, stretch")
    background: str = Field(pattern=r"^(white|black|#[0-9a-fA-F]{6})$", description="white, black, or #rrggbb")
    intensity: Literal["full", "image"] = Field(description="one of full, image")
    on_bad_image: Literal["stop", "skip"] = Field(description="one of stop, skip")

    network: Annotated[str, _one_of_modules("networks")] = Field(description="a module in classifier/networks")
    weights: Text | None = Field(description="a weights file, a name of torchvision's weights, or empty")
    freeze: list[Text] = Field(description="a list of parameter-name patterns")

    epochs: Count = Field(description="a whole number above 0")
    batch_size: Count = Field(description="a whole number above 0")
    accumulate_steps: Count = Field(description="a whole number above 0")
    shuffle: bool = Field(description="true or false")
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = Field(description="one of sgd, adam, adamw, rmsprop")
    lr: float = Field(gt=0, description="a number above 0")
    momentum: Fraction = Field(description="a number from 0 to below 1")
    weight_decay: float = Field(ge=0, description="a number, 0 or more")
    schedule: Literal["constant", "linear", "cosine", "onecycle"] = Field(
        description="one of constant, linear, cosine, onecycle"
    )
    label_smoothing: Fraction = Field(description="a number from 0 to below 1")
    target_transform: Literal["one_hot"] | None = Field(description="one_hot, or empty")
    augment: list[
        Literal[
            "crop",
            "flip",
            "vflip",
            "erase",
            "color",
            "mixup",
            "cutmix",
            "resized_crop",
            "rotate",
            "trivial",
            "randaugment",
        ]
    ] = Field(
        description="a list of any of crop, flip, vflip, erase, color, mixup, cutmix, resized_crop, rotate, trivial, "
        "randaugment"
    )
    crop_scale: float = Field(gt=0, le=1, description="a number above 0, at most 1")
    balance: Annotated[Literal["none", "sampler", "loss"], AfterValidator(_possible_with_shuffle)] = Field(
        description="one of none, sampler, loss"
    )
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = Field(
        description="one of float32, tf32, bfloat16, float16"
    )
    deterministic: bool = Field(description="true or false")
    compile: bool = Field(description="true or false")
    test_flip: bool = Field(description="true or false")

    export_formats: list[Literal["pth", "pt2", "onnx", "safetensors", "int8"]] = Field(
        min_length=1, description="a list of at least one of pth, pt2, onnx, safetensors, int8"
    )
    int8_max_drop: Fraction = Field(description="a number from 0 to below 1")
    temperature_scaling: bool = Field(description="true or false")

    checkpoint_steps: Count = Field(description="a whole number above 0")
    cuda_graphs: bool = Field(description="true or false")
    cluster: Text | None = Field(description="the address of a Dask scheduler, or empty")
    workers: int = Field(ge=0, description="a whole number, 0 or more")
    memory_limit_gib: float = Field(gt=0, description="a number above 0")
    experiment: Text = Field(description="a name, or empty")
    registered_model: str = Field(pattern=r"^[^/:'\"`]+$", description="a name without / and : and quotes, or empty")

    @property
    def image_sides(self) -> tuple[int, int] | None:
        """Height and width that the network takes, if given."""
        return None if self.image_size is None else _sides(self.image_size)

    @property
    def stored_sides(self) -> tuple[int, int] | None:
        """Height and width that images are stored in, if given."""
        return self.image_sides if self.stored_size is None else _sides(self.stored_size)

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        """Red, green and blue of the background, from 0 to 255."""
        digits = {"white": "#ffffff", "black": "#000000"}.get(self.background, self.background)
        red, green, blue = bytes.fromhex(digits[1:])
        return red, green, blue

    @model_validator(mode="before")
    @classmethod
    def _name_after_data(cls, content: dict[str, Any]) -> dict[str, Any]:
        name = data_name(str(content.get("source")), str(content.get("data_path")))
        empty = [key for key in ("experiment", "registered_model") if key in content and content[key] is None]
        return content | dict.fromkeys(empty, name)


def data_name(source: str, data_path: str) -> str:
    """Return the name of a data set: for your own images that of their folder or zip, otherwise that of the source.

    It holds only letters, digits, `.`, `_` and `-`, because MLflow uses it in URIs.
    """
    own = re.sub(r"\.zip$", "", PurePath(data_path).name, flags=re.IGNORECASE)
    name = own if source == "folder" else source.replace("_", "-")
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "data"


# They change no result: no stage tracks them, and the manifest leaves them out.
UNTRACKED = frozenset(
    {"checkpoint_steps", "cluster", "cuda_graphs", "workers", "memory_limit_gib", "experiment", "registered_model"}
)


def load_params(path: Path = PARAMS) -> Params:
    """Read and check the parameters.

    Raises PipelineError with one line for each wrong key: the key, its value and what is allowed.
    """
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PipelineError(f"{path}: missing; run from the folder that holds dvc.yaml") from None
    except IsADirectoryError:
        raise PipelineError(f"{path}: a folder, not a file") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date such as 2026-13-01
        raise PipelineError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise PipelineError(f"{path}: not a list of `key: value` lines")
    content = {str(key): value for key, value in content.items()}  # `yes: 1` has the key True
    try:
        return Params.model_validate(content)
    except ValidationError as error:
        # A list or a union can fail in several places, and a misspelt key is also a missing one: report each key once.
        keys = dict.fromkeys(str(fault["loc"][0]) for fault in error.errors())
        misspelt = {_closest_key(key) for key in keys if key not in Params.model_fields}
        complaints = [
            f"{path}: {_complaint(key, content, error)}" for key in keys if key not in misspelt - set(content)
        ]
        raise PipelineError("\n".join(complaints)) from None


def _closest_key(key: str) -> str | None:
    return next(iter(difflib.get_close_matches(key, Params.model_fields, n=1)), None)


def _complaint(key: str, content: dict[str, Any], error: ValidationError) -> str:
    """Return one line: what is wrong with `key`, and what is allowed."""
    fields = Params.model_fields
    if key not in fields:
        close = _closest_key(key)
        hint = f"did you mean {close}?" if close else f"the keys are {', '.join(fields)}"
        return f"{key}: {_shown(content[key])} is given, but there is no such key; {hint}"
    allowed = fields[key].description
    for fault in error.errors():
        if fault["loc"][0] == key and "error" in fault.get("ctx", {}):
            allowed = str(fault["ctx"]["error"])  # a validator above is more specific
    if key not in content:
        return f"{key}: missing; it must be {allowed}"
    return f"{key}: {_shown(content[key])} is not {allowed}"


_SHORT = reprlib.Repr()  # a few lines of YAML can expand to gigabytes, with anchors in nested lists
_SHORT.maxlevel = 2
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


def _shown(value: Any) -> str:
    return "an empty value" if value is None else masked(_SHORT.repr(value))


def main() -> None:
    load_params()


if __name__ == "__main__":
    run_main(main)
