"""The recipe: every choice that a training run makes, in one flat table, each with its meaning.

A user writes the few choices that matter to them; the rest is "auto". `Recipe.resolve` settles what is left open
from the data, the model and the machine, and the settled recipe, written to the run folder, repeats the run
exactly. How the choices are made stands in `defaults.py`.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tomlkit
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from vitalloy.errors import RecipeError, suggest
from vitalloy.training import defaults

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Size = Count | tuple[Count, Count]


def _none_is_zero(value: Any) -> Any:
    return 0 if value is None or value == "none" else value


def _split(value: Any) -> Any:
    return [v.strip() for v in value.split(",") if v.strip()] if isinstance(value, str) else value


def _f(group: str, default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"group": group}, **limits)


class Recipe(BaseModel):
    """A complete description of a run: data, model, schedule, augmentation, machine, and what is made of the result."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), hide_input_in_errors=True
    )

    data: str = _f("Data", "digits", "digits, a folder of class folders, a torchvision or a Hugging Face data set")
    val_fraction: Fraction = _f(
        "Data", 0.15, "share kept for choosing the best epoch, where the data has no such split"
    )
    test_fraction: Fraction = _f("Data", 0.15, "share kept for the final score, where the data has no such split")
    label_column: str | None = _f(
        "Data", None, "the column that holds the label, for tables and Hugging Face data sets"
    )
    download: bool = _f("Data", False, "fetch the data set if it is not on this machine")
    num_workers: Annotated[int, Field(ge=0)] | Auto = _f(
        "Data", "auto", "processes that read and augment; 0 is this one"
    )

    model: str = _f("Model", "auto", "a name from `vitalloy models`; auto fits the image size")
    img_size: Size | Auto = _f("Model", "auto", "pixels a side, or [height, width]")
    in_chans: Count = _f("Model", 3, "channels of the image: 3 colour, 1 grey")
    weights: str | None = _f("Model", None, "a checkpoint to start from (fine-tuning)")
    pretrained: bool = _f("Model", False, "start from the published weights of a timm model (needs the network once)")
    probe: bool = _f("Model", False, "linear probe: train the classifier only, the backbone stays as it is")
    drop_path: Probability | Auto = _f("Model", "auto", "rate of stochastic depth")
    mean: list[float] | Auto = _f("Model", "auto", "channel means that the images are normalized with, 0..1")
    std: Annotated[list[Positive], Field(min_length=1)] | Auto = _f("Model", "auto", "channel deviations, likewise")
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos", "auto"] = _f(
        "Model", "auto", "how images are resized"
    )
    crop_pct: Annotated[float, Field(gt=0, le=1)] | Auto = _f(
        "Model", "auto", "share of the side kept by the centre crop"
    )

    epochs: Count | Auto = _f("Schedule", "auto", "passes over the training images")
    batch_size: Count | Auto = _f("Schedule", "auto", "images a step on each device")
    accumulate: Count = _f("Schedule", 1, "batches gathered into one step, when memory is short")
    optimizer: str = _f("Schedule", "adamw", "any optimizer name that timm knows")
    lr: Positive | Auto = _f("Schedule", "auto", "peak learning rate")
    min_lr: NotNegative | Auto = _f("Schedule", "auto", "learning rate at the end")
    scheduler: Literal["cosine", "linear", "constant"] = _f(
        "Schedule", "cosine", "how the learning rate falls after warm-up"
    )
    warmup_epochs: NotNegative | Auto = _f("Schedule", "auto", "epochs in which the learning rate rises")
    weight_decay: NotNegative = _f("Schedule", 0.05, "not for biases, norms and position tables")
    betas: tuple[Fraction, Fraction] = _f("Schedule", (0.9, 0.999), "decay of Adam's two averages")
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = _f(
        "Schedule", None, "learning rate factor a layer towards the input, such as 0.75"
    )
    grad_clip: NotNegative = _f("Schedule", 1.0, "largest norm of the gradient; 0 is no limit")
    patience: Annotated[Annotated[int, Field(ge=0)] | Auto, BeforeValidator(_none_is_zero)] = _f(
        "Schedule", "auto", "epochs without a better accuracy before stopping; 0 never stops early"
    )
    ema: bool | Auto = _f("Schedule", "auto", "keep, validate and save a moving average of the weights")
    ema_decay: Fraction | Auto = _f("Schedule", "auto", "share of the average that stays at each step")

    label_smoothing: Fraction = _f("Augmentation", 0.1, "probability given to the other classes")
    mixup: NotNegative | Auto = _f("Augmentation", "auto", "strength of blending two images; 0 is off")
    cutmix: NotNegative | Auto = _f("Augmentation", "auto", "strength of pasting a piece of another image; 0 is off")
    mixup_prob: Probability = _f("Augmentation", 1.0, "share of the batches that are mixed")
    mixup_switch_prob: Probability = _f("Augmentation", 0.5, "share of cutmix where both are on")
    randaugment: Annotated[float, Field(ge=0, le=10)] | Auto = _f(
        "Augmentation", "auto", "magnitude of RandAugment, 0 (off) to 10"
    )
    color_jitter: NotNegative | Auto = _f(
        "Augmentation", "auto", "strength of brightness, contrast and saturation changes"
    )
    random_erasing: Probability | Auto = _f("Augmentation", "auto", "share of the images with a box erased")
    hflip: bool | Auto = _f(
        "Augmentation", "auto", "mirror every other image; false where a mirrored image means another class"
    )
    crop_scale: tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]] | Auto = _f(
        "Augmentation",
        "auto",
        "smallest and largest share that a training crop keeps; images up to 64 px are shifted instead",
    )

    teacher: str | None = _f("Distillation", None, "the run folder of a model to learn from")
    distillation: Literal["none", "hard", "soft"] = _f(
        "Distillation", "none", "learn the teacher's choice or its probabilities"
    )
    distillation_alpha: Probability | Auto = _f("Distillation", "auto", "weight of the teacher")
    distillation_tau: Positive = _f("Distillation", 3.0, "temperature of the soft kind")

    seed: Annotated[int, Field(ge=0, lt=2**32)] = _f("Machine", 0, "everything random follows from it")
    deterministic: bool = _f("Machine", True, "choose operations that give the same numbers every time")
    accelerator: Literal["auto", "cpu", "gpu", "mps"] = _f("Machine", "auto", "where to train")
    devices: Count | Auto = _f("Machine", "auto", "devices on this machine")
    num_nodes: Count | Auto = _f("Machine", "auto", "machines; start more than one with torchrun")
    strategy: Literal["auto", "single", "ddp", "fsdp"] = _f("Machine", "auto", "how several devices share the work")
    precision: Literal["auto", "32-true", "16-mixed", "bf16-mixed", "64-true"] = _f(
        "Machine", "auto", "numbers that are computed with"
    )
    channels_last: bool | Auto = _f("Machine", "auto", "memory layout that suits convolutions on GPUs")
    compile: bool = _f("Machine", False, "compile the model with torch.compile")
    grad_checkpointing: bool = _f("Machine", False, "recompute instead of remembering: less memory, more time")
    threads: Count | Auto = _f("Machine", "auto", "CPU threads of this process")

    calibrate: bool = _f(
        "After training", True, "fit a temperature on the validation images, so that confidence means accuracy"
    )
    export: bool = _f("After training", True, "write ONNX and check it against PyTorch")
    int8: bool = _f("After training", True, "quantize the export to 8 bits and measure it")
    explain_images: Annotated[int, Field(ge=0)] = _f("After training", 8, "test images to explain in the report")
    corruptions: Annotated[list[str], BeforeValidator(_split)] = _f(
        "After training", ["gaussian_noise", "defocus_blur", "contrast", "jpeg_compression"], "damage to test against"
    )
    corruption_severity: Annotated[int, Field(ge=1, le=5)] = _f("After training", 3, "1 (mild) to 5")
    budget: str | None = _f("After training", None, 'limits that the model must keep, such as "10ms, 5MB"')

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise RecipeError(_explain(error, values)) from None

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction leave nothing to train on")
        if self.pretrained and self.weights:
            raise ValueError("pretrained and weights are two starts: give one of them")
        if self.distillation != "none" and self.teacher is None:
            raise ValueError(f"distillation = {self.distillation!r} needs a teacher")
        if self.teacher is not None and self.distillation == "none":
            raise ValueError("a teacher is named, but distillation is 'none': choose 'hard' or 'soft'")
        if self.ema is True and self.strategy == "fsdp":
            raise ValueError(
                "ema keeps a whole copy of the model, which fsdp splits: set ema = false or strategy = 'ddp'"
            )
        if self.crop_scale != "auto" and self.crop_scale[0] > self.crop_scale[1]:
            raise ValueError("crop_scale is [smallest, largest]")
        return self

    # ---- reading and writing

    @classmethod
    def from_toml(cls, path: str | Path) -> Recipe:
        """The recipe in a TOML file; RecipeError if the file is missing, is no TOML, or has an unknown key."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"The recipe {path} cannot be read: {error}.") from None
        try:
            values = tomlkit.parse(text).unwrap()
        except tomlkit.exceptions.ParseError as error:
            raise RecipeError(f"The recipe {path} is not TOML: {error}.") from None
        for key, value in values.items():
            if isinstance(value, Mapping):
                raise RecipeError(
                    f"The recipe {path} has a table [{key}]: recipes are flat, write `key = value` lines only."
                )
        try:
            return cls(**values)
        except RecipeError as error:
            raise RecipeError(f"In {path}:\n{error}") from None

    def to_toml(self) -> str:
        """The recipe as TOML, each line with its meaning; a choice of "none" is a line commented out."""
        document, last = tomlkit.document(), None
        for name, field in type(self).model_fields.items():
            group = field.json_schema_extra["group"]
            if group != last:
                if last is not None:
                    document.add(tomlkit.nl())
                document.add(tomlkit.comment(f"---- {group}"))
                last = group
            value = getattr(self, name)
            if value is None:
                document.add(tomlkit.comment(f"{name} =  # {field.description}"))
                continue
            item = tomlkit.item(list(value) if isinstance(value, tuple) else value)
            item.comment(field.description)
            document.add(name, item)
        return tomlkit.dumps(document)

    def with_overrides(self, overrides: Iterable[str] | Mapping[str, Any]) -> Recipe:
        """A copy with `key=value` texts (as `--set` takes them) or a mapping put over it; texts need no quotes."""
        if not isinstance(overrides, Mapping):
            overrides = dict(_pair(o) for o in overrides)
        return type(self)(**{**self.model_dump(), **overrides})

    # ---- settling what is left open

    def choose_model(self, native_size: tuple[int, int]) -> str:
        """The model's name, chosen by the size of the images where the recipe says "auto"."""
        return defaults.model(native_size) if self.model == "auto" else self.model

    @property
    def automatic(self) -> list[str]:
        """The names of the choices that are still open."""
        return [name for name in type(self).model_fields if getattr(self, name) == "auto"]

    def resolve(
        self,
        train_images: int,
        num_classes: int,
        native_size: tuple[int, int],
        flip: bool,
        model_default_cfg: Mapping[str, Any] | None = None,
        machine: defaults.Machine | None = None,
    ) -> Recipe:
        """A copy with nothing left automatic.

        train_images, num_classes, native_size (height, width of a typical image) and flip (a mirrored image keeps its
        class) describe the data; `model_default_cfg` is the model's `default_cfg`; `machine` defaults to this one.
        """
        facts = defaults.Facts(train_images, num_classes, tuple(native_size), flip, dict(model_default_cfg or {}))
        return defaults.settle(self, facts, machine or defaults.this_machine(self.accelerator))


def _pair(text: str) -> tuple[str, Any]:
    """`key=value` -> (key, value), the value read as TOML where it is TOML and the field is not a text."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise RecipeError(f"--set takes key=value, not {text!r}.")
    field = Recipe.model_fields.get(key)
    if field is None:
        raise RecipeError(_unknown(key))
    nullable = type(None) in typing.get_args(field.annotation)
    if value.lower() in ("none", "null", "") and (nullable or key == "patience"):
        return key, None
    kinds = typing.get_args(field.annotation) or (field.annotation,)
    texts_only = typing.get_origin(field.annotation) is not list and set(kinds) <= {str, type(None)}
    if texts_only and value[:1] not in ("'", '"'):
        return key, value
    try:
        return key, tomlkit.parse(f"value = {value}").unwrap()["value"]
    except tomlkit.exceptions.ParseError:
        return key, {"True": True, "False": False}.get(value, value)


def _unknown(key: str) -> str:
    return f"A recipe has no key {key!r}.{suggest(key, Recipe.model_fields)}"


def _explain(error: ValidationError, values: Mapping[str, Any]) -> str:
    """One line a field: the key, what it was given, and what it takes."""
    lines: dict[str, list[str]] = {}
    for problem in error.errors(include_url=False, include_context=False):
        key = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "extra_forbidden":
            lines.setdefault(_unknown(key), [])
        elif not key:
            lines.setdefault(problem["msg"].removeprefix("Value error, ") + ".", [])
        else:
            wish = problem["msg"].partition(" should ")[2].split(", unable to")[0]
            wishes = lines.setdefault(f"{key} = {values.get(key)!r}: should ", [])
            if wish not in wishes:
                wishes.append(wish)
    return "\n".join(
        start + (" or ".join(w).replace(" or be ", " or ") + "." if w else "") for start, w in lines.items()
    )
