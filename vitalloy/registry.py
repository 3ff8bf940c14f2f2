"""Names to models: ours first, then everything that timm knows."""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import sys
from dataclasses import dataclass, field
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model
from torch import nn

from vitalloy.errors import ModelError, suggest
from vitalloy.layers.timm_border import adapt


@dataclass(frozen=True)
class Variant:
    """One published (or own) configuration of a backbone.

    Attributes:
        arch: constructor arguments.
        top1: published ImageNet-1k top-1 in percent, or None.
        checkpoints: file names of published weights that load.
        cfg: what differs from the usual default configuration (input_size, mean, crop_pct, ...).
        note: what a reader of `top1` must know, such as other training data.
    """

    arch: dict[str, Any]
    top1: float | None = None
    checkpoints: tuple[str, ...] = ()
    cfg: dict[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """A registered model: its class, its variant, and the full default configuration."""

    name: str
    cls: type[nn.Module]
    variant: Variant
    cfg: dict[str, Any]


_ENTRIES: dict[str, Entry] = {}
# what constructors raise on values that they cannot use, and timm when pre-trained weights cannot be fetched
_REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


def register(cls: type[nn.Module], variants: dict[str, Variant], **cfg: Any) -> None:
    """Make a backbone's variants known here and to timm; called at the bottom of each backbone file.

    In timm a variant keeps its name where timm has none of that name, and is `alloy_<name>` where it has.
    `cfg` is what the variants' default configurations have in common (first_conv, classifier, ...).
    """
    module = sys.modules[cls.__module__]
    if not hasattr(module, "default_cfgs"):
        module.default_cfgs = {}
    for name, variant in variants.items():
        full = {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": None,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "fixed_input_size": False,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **cfg,
            **variant.cfg,
        }
        entry = Entry(name, cls, variant, full)
        _ENTRIES[name] = entry
        _register_with_timm(entry, module.__name__)


def create_model(
    name: str,
    num_classes: int = 1000,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int = 3,
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build a model by name.

    Args:
        name: one of `list_models()`, or any name that timm knows.
        num_classes: size of the classifier; 0 gives features.
        img_size: the side, or (height, width), that position tables and windows are made for.
        in_chans: channels of the input.
        pretrained: fetch timm's weights (timm models only; ours load with `load_checkpoint`).
        **kwargs: further arguments of the backbone, or timm's `features_only=True`, `out_indices`, ...

    Returns:
        The model, in training mode, with timm's contract. `model.build_args` repeats the call.

    Raises:
        ModelError: an unknown name, or arguments that the backbone refuses.
    """
    _load_backbones()
    args: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans, **kwargs}
    try:
        size = None if img_size is None else _height_width(img_size)
        if in_chans < 1:
            raise ValueError("in_chans must be 1 or more")
        if name in _ENTRIES:
            model = _build(_ENTRIES[name], pretrained, img_size=size, **args)
        else:
            default_cfg(name)  # an unknown name is an error
            model = _build_timm(name, pretrained, size, args)
    except _REFUSALS as error:
        reason = str(error) if not isinstance(error, LookupError) else f"{type(error).__name__}: {error}"
        raise ModelError(f"{name} cannot be built with {dict(args, img_size=img_size)}: {reason}") from error
    model.build_args = {"name": name, "img_size": size, **args}
    return model


def list_models(filter: str | None = None, *, timm_models: bool = False) -> list[str]:
    """Names of our models that match a shell pattern (all without one), and timm's behind them on request."""
    _load_backbones()
    names = sorted(_ENTRIES)
    if timm_models:
        names += [n for n in timm.list_models() if n not in _ENTRIES and not n.startswith("alloy_")]
    return [n for n in names if fnmatch.fnmatch(n, filter)] if filter else names


def entry(name: str) -> Entry:
    """The registered entry of one of our models. Raises ModelError for a name that is not ours."""
    _load_backbones()
    if name not in _ENTRIES:
        raise ModelError(f"{name!r} is not one of Vitalloy's own models.{suggest(name, _ENTRIES)}")
    return _ENTRIES[name]


def default_cfg(name: str) -> dict[str, Any]:
    """The default configuration (input_size, mean, std, crop_pct, ...) of one of our models or of timm's."""
    _load_backbones()
    if name in _ENTRIES:
        return dict(_ENTRIES[name].cfg)
    found = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
    if found is None:
        hint = suggest(name, list_models(timm_models=True))
        raise ModelError(f"no model is called {name!r}.{hint} `vitalloy models` lists them.")
    return found.to_dict()


def _load_backbones() -> None:
    importlib.import_module("vitalloy.backbones")


def _height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError("img_size must be a positive number or (height, width)")
    return pair


def _build(entry: Entry, pretrained: bool, **kwargs: Any) -> nn.Module:
    arch = {**entry.variant.arch, **{k: v for k, v in kwargs.items() if v is not None}}
    if kwargs.get("features_only"):  # some backbones have a published form of their own for dense prediction
        arch = {**getattr(entry.cls, "features_arch", {}), **arch}
    size = kwargs.get("img_size")
    if "img_size" not in inspect.signature(entry.cls).parameters:
        arch.pop("img_size", None)  # takes any size without being told
    elif "img_size" not in arch:
        arch["img_size"] = entry.cfg["input_size"][-2:]
    cfg = dict(entry.cfg)
    side = cfg["input_size"][-2:] if size is None else _height_width(size)
    frames = cfg["input_size"][1:-2]  # of clips; nothing for images
    cfg["input_size"] = (kwargs.get("in_chans", 3), *side)
    if pretrained:
        raise ModelError(
            f"{entry.name} has no weights on the hub; get the authors' file and load it with load_checkpoint."
        )
    model = build_model_with_cfg(
        entry.cls,
        entry.name,
        pretrained=False,
        pretrained_cfg=cfg,
        feature_cfg={"feature_cls": "getter", "out_indices": entry.cls.default_out_indices},
        **arch,
    )
    if frames:  # timm's builder knows images alone
        model.pretrained_cfg["input_size"] = (cfg["input_size"][0], *frames, *side)
    return model


def _build_timm(name: str, pretrained: bool, size: tuple[int, int] | None, args: dict[str, Any]) -> nn.Module:
    sized = {} if size is None else {"img_size": size}
    try:
        model = timm.create_model(name, pretrained=pretrained, **sized, **args)
    except TypeError:
        if size is None:
            raise
        model = timm.create_model(name, pretrained=pretrained, **args)  # convolutional: any size, without being told
    if size is not None and hasattr(model, "pretrained_cfg"):
        model.pretrained_cfg["input_size"] = (args["in_chans"], *size)
    return adapt(model)


def _register_with_timm(entry: Entry, module: str) -> None:
    name = f"alloy_{entry.name}" if timm.is_model(entry.name) else entry.name

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        kwargs = {k: v for k, v in kwargs.items() if k not in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}
        return _build(entry, pretrained, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__module__ = module
    build.__doc__ = f"{entry.cls.__name__}, variant {entry.name}."
    sys.modules[module].default_cfgs[name] = {**entry.cfg, "architecture": name}
    register_model(build)
