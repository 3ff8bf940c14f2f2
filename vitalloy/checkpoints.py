"""Weights: read safely, converted to our names, loaded with one readable report; and the bundle a run leaves behind."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from vitalloy.errors import CheckpointError, ModelError

log = logging.getLogger("vitalloy")

_WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict", "net", "module")
_AVERAGED = ("model_ema", "state_dict_ema", "ema", "ema_state_dict")
_PREFIXES = ("module.", "model.", "_orig_mod.", "net.", "backbone.")
_SHOWN = 8
BUNDLED = Path(__file__).parent / "pretrained"
BUNDLE_WEIGHTS, BUNDLE_ABOUT = "model.safetensors", "model.json"


@dataclass(frozen=True)
class Loaded:
    """What `load_checkpoint` did: names that were left as they were, ignored, or newly initialised."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    reset: tuple[str, ...] = ()


def read_state(path: str | Path, *, averaged: bool = False, mapped: bool = False) -> dict[str, Tensor]:
    """The tensors of a weight file by name, wrappers and prefixes removed. Never runs code from the file.

    Args:
        path: a .safetensors file, or a PyTorch file that `torch.load(weights_only=True)` accepts.
        averaged: prefer the moving average of the weights where the file holds both.
        mapped: leave the tensors on the disk until they are used, where the format allows it.

    Raises:
        CheckpointError: the file is missing, damaged, no checkpoint, or a pickle that would run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file.")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty; download or copy it again.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pytorch(path, mapped)
    state = unwrap(content, averaged=averaged)
    if not state:
        raise CheckpointError(f"{path}: the file holds no tensors by name, so it is no checkpoint of a model.")
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error}).") from error


def _read_pytorch(path: Path, mapped: bool) -> Any:
    mapped = mapped and zipfile.is_zipfile(path)  # the format before PyTorch 1.6 cannot be
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts store their arguments; harmless
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and "Unsupported operand" not in str(error):
            raise CheckpointError(
                f"{path}: refused, because reading it would run code from the file ({_culprit(error)}). "
                "Ask for a safetensors file, or save its state_dict alone."
            ) from error
        raise CheckpointError(f"{path}: not a checkpoint, or a damaged one ({_culprit(error)}).") from error
    except Exception as error:  # on damaged bytes the reader fails in every way there is
        raise CheckpointError(f"{path}: truncated, damaged or no checkpoint ({_culprit(error)}).") from error


def _culprit(error: Exception) -> str:
    """The one line of PyTorch's long message that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "GLOBAL" in line or "Unsupported" in line or "PytorchStreamReader" in line]
    return (telling or lines or [type(error).__name__])[0][:200].rstrip(".")


def unwrap(content: Any, *, averaged: bool = False) -> dict[str, Tensor]:
    """The state dict inside the usual wrappers (`model`, `state_dict`, `ema`, `module.` ...), or an empty dict."""
    order = (*_AVERAGED, *_WRAPPERS) if averaged else (*_WRAPPERS, *_AVERAGED)
    while isinstance(content, Mapping):
        inside = next((content[k] for k in order if isinstance(content.get(k), Mapping)), None)
        if inside is None:
            break
        content = inside
    if not isinstance(content, Mapping) or not all(isinstance(k, str) for k in content):
        return {}
    state = {k: v for k, v in content.items() if isinstance(v, Tensor)}
    while state:
        prefix = next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), None)
        if prefix is None:
            break
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def load_checkpoint(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    *,
    strict: bool = True,
    reset_head: bool = False,
    averaged: bool = False,
    assign: bool = False,
) -> Loaded:
    """Load published or own weights into a model; the file is recognised by its parameter names.

    Args:
        source: a weight file, or a state dict.
        strict: missing or unexpected entries are an error; otherwise they are logged and returned.
        reset_head: a classifier made for other classes is left at its start instead of being an error.
        averaged: prefer moving-average weights where the file holds both.
        assign: let the model hold the given tensors themselves instead of copying their values into its own.

    Raises:
        CheckpointError: the file cannot be read safely, or does not fit the model; every name is listed.
    """
    if isinstance(model, FeatureGetterNet):
        model = model.model  # what features_only=True wraps
    state = unwrap(source, averaged=averaged) if isinstance(source, Mapping) else read_state(source, averaged=averaged)
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    if hasattr(model, "convert_state"):
        try:
            state = model.convert_state(state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{where}: cannot be converted to {type(model).__name__}: {error}") from error
    own = model.state_dict()
    reset = []
    if reset_head:
        head = _head_names(model)
        reset = [k for k in own if k in head and (k not in state or state[k].shape != own[k].shape)]
        state = {k: v for k, v in state.items() if k not in reset and (k not in head or k in own)}
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    missing = [k for k in own if k not in state and k not in reset and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    if len(missing) == len(own) - len(reset) or shapes or (strict and (missing or unexpected)):
        raise CheckpointError(
            f"{where} does not fit {type(model).__name__}:" + _differences(missing, unexpected, shapes)
        )
    model.load_state_dict({k: v for k, v in state.items() if k in own}, strict=False, assign=assign)
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("new", reset)):
        if names:
            log.warning("%s: %d %s: %s", where, len(names), kind, _shown(names))
    return Loaded(tuple(missing), tuple(unexpected), tuple(reset))


def _head_names(model: nn.Module) -> set[str]:
    found = getattr(model, "default_cfg", {}).get("classifier", "head")
    names = {found} if isinstance(found, str) else set(found)
    names |= {"head", "head_dist", "aux_head", "head_cls"}
    return {f"{n}.{leaf}" for n in names for leaf in ("weight", "bias")}


def _differences(missing: list[str], unexpected: list[str], shapes: list[str]) -> str:
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    parts = [f"\n  {len(names)} {kind}: {_shown(names)}" for kind, names in kinds if names]
    return "".join(parts)


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def save(model: nn.Module, folder: str | Path, about: Mapping[str, Any] | None = None) -> Path:
    """Write a model as a bundle: `model.safetensors` and `model.json`, which `load` reads back.

    Args:
        model: made by `vitalloy.create_model` (its call is stored, not its code), or what compression left of one.
        about: anything JSON can hold that belongs to the model, such as class names.
    """
    if not hasattr(model, "build_args"):
        raise ModelError("only models from vitalloy.create_model can be saved as a bundle: this one has no build_args.")
    if getattr(model, "fused", False):
        raise ModelError("a fused model cannot be saved as a bundle: save the model it was made from.")
    folder = Path(folder)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    weights, text = folder / BUNDLE_WEIGHTS, folder / BUNDLE_ABOUT
    config = {k: model.default_cfg.get(k) for k in ("input_size", "mean", "std", "interpolation", "crop_pct")}
    config |= {"size": list(model.default_cfg["input_size"][-2:]), "small": False}
    record = {"format": "vitalloy bundle 1", "model": model.build_args, "preprocessing": config, **(about or {})}
    if hasattr(model, "steps"):
        from vitalloy.compression.reduction import steps_of

        record["steps"] = steps_of(model)
    try:
        described = json.dumps(record, indent=1, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{text}: the model's arguments and `about` must be plain values ({error}).") from error
    _replace({weights: safetensors.torch.save(state, metadata={"format": "pt"}), text: described})
    return folder


def save_runtime(folder: str | Path, file: str, about: Mapping[str, Any]) -> None:
    """Make a folder that holds an exported model a bundle too: `load` opens the file in its runtime.

    Args:
        file: the file in it: .onnx, OpenVINO's .xml, or a packed binary model's .safetensors.
        about: as in `save`.
    """
    record = {"format": "vitalloy bundle 1", **about, "runtime": file}
    _replace({Path(folder) / BUNDLE_ABOUT: json.dumps(record, indent=1, ensure_ascii=False).encode()})


def _replace(files: Mapping[Path, bytes]) -> None:
    """Write files that belong together: all are complete on the disk before the first takes its name."""
    parts = {path: path.with_name(path.name + ".part") for path in files}
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with parts[path].open("wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
        for path, part in parts.items():
            os.replace(part, path)
    except OSError as error:
        for part in parts.values():
            with contextlib.suppress(OSError):
                part.unlink()
        raise CheckpointError(
            f"{path}: could not be written ({error.strerror}); what was there before is unharmed."
        ) from error


def load(source: str | Path, *, device: str = "cpu") -> nn.Module:
    """A model from a bundle: a run folder, a folder made by `save`, `hf-hub:owner/name`, or `bundled:NAME`.

    Three small models come with the library, for trials: `bundled:fashion_hybrid`, `bundled:fashion_cvt` and
    `bundled:fashion_vit`, trained here on Fashion-MNIST by the recipes beside them.

    Returns:
        The model in evaluation mode; `model.about` holds everything that `model.json` says, `model.classes` its
        class names (or None). A compressed model is a session of its runtime: called the same way, but no module.

    Raises:
        CheckpointError: there is no bundle, or its two files do not belong together.
    """
    from vitalloy.registry import create_model

    kind, _, name = str(source).partition(":")
    folder = _fetch(name) if kind == "hf-hub" else BUNDLED / name if kind == "bundled" else Path(source)
    text = folder / BUNDLE_ABOUT
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such run folder or bundle.")
    if not text.is_file():
        raise CheckpointError(f"{folder}: no {BUNDLE_ABOUT} here, so this is no bundle or finished run.")
    try:
        about = json.loads(text.read_text(encoding="utf-8"))
        if "runtime" in about:
            return _open_runtime(folder / Path(about["runtime"]).name, about)
        args = dict(about["model"])
        name = args.pop("name")
        args["img_size"] = tuple(args["img_size"]) if args.get("img_size") else None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{text}: not a Vitalloy bundle ({error!r}).") from error
    model = create_model(name, **args)
    if about.get("steps"):
        from vitalloy.compression.reduction import rebuild

        model = rebuild(model, about["steps"])
    load_checkpoint(model, folder / BUNDLE_WEIGHTS)
    model.default_cfg.update({k: v for k, v in about.get("preprocessing", {}).items() if v is not None})
    model.about, model.classes = about, about.get("classes")
    return model.to(device).eval()


def _open_runtime(file: Path, about: dict[str, Any]) -> Any:
    """A compressed model in what runs it: ONNX Runtime (a folder where images leave early), OpenVINO, packed bits."""
    if file.is_dir():
        from vitalloy.deployment.cascade import CascadeModel

        model = CascadeModel(file)
    elif file.suffix == ".safetensors":
        from vitalloy.compression.calibration import prepared
        from vitalloy.compression.quantization.bivit import load_packed
        from vitalloy.registry import create_model

        model = load_packed(prepared(create_model(**about["model"])), file).eval()
    elif file.suffix == ".xml":
        from vitalloy.deployment.openvino import OpenVinoModel

        model = OpenVinoModel(file)
    else:
        from vitalloy.deployment.onnx import OnnxModel

        model = OnnxModel(file)
    model.about, model.classes = about, about.get("classes")
    return model


def publish(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload a bundle to the Hugging Face Hub as `owner/name`; returns its address. Needs a login (`hf auth login`)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not (Path(folder) / BUNDLE_ABOUT).is_file():
        raise CheckpointError(f"{folder}: no {BUNDLE_ABOUT} here, so there is no bundle to publish.")
    if not (Path(folder) / BUNDLE_WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: this holds a compressed model alone; publish the run it was made from.")
    files = [BUNDLE_WEIGHTS, BUNDLE_ABOUT, "recipe.toml", "metrics.json", "report.html", "model.onnx"]
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"{repo}: could not be published ({error}).") from error


def _fetch(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(repo, allow_patterns=[BUNDLE_WEIGHTS, BUNDLE_ABOUT]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:  # a missing local copy is an OSError
        raise CheckpointError(f"{repo}: could not be fetched from the hub ({error}).") from error
