"""The networks' weights: the authors' files and our own, read without copying, and where they come from.

Network B's file of 2.6 GB is mapped into memory, not read: only the matrices that an answer needs are ever touched,
and the system may drop them again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vitalloy.applications.deepfake.model import NETWORKS, WIDTH, Network
from vitalloy.checkpoints import load_checkpoint, read_state
from vitalloy.errors import CheckpointError
from vitalloy.registry import create_model

HUB = "Deressa/GenConViT"  # on the Hugging Face hub; CC-BY-NC-4.0
PUBLISHED = {"a": "genconvit_ed_inference.pth", "b": "genconvit_vae_inference.pth"}
MARK = "vitalloy.deepfake"  # where our own files say what they hold
_CONVNEXTS = {(96, 9): "tiny", (96, 27): "small", (128, 27): "base", (192, 27): "large"}  # by width and depth
_CLUES = {"a": "encoder.features.12.weight", "b": "encoder.features.10.weight"}


@dataclass(frozen=True)
class Source:
    """Where a network comes from.

    Attributes:
        net: "a" or "b".
        file: name of the weight file; None for an untrained network.
        sha256: of that file.
        about: what the weights were trained on, as far as the file tells.
    """

    net: str
    file: str | None
    sha256: str | None
    about: str


def open_networks(
    weights: Sequence[str | Path] = (), nets: str = "", *, demo: bool = False, download: bool = False, seed: int = 0
) -> list[tuple[Network, Source]]:
    """The networks to run, ready to answer, with their sources; A before B.

    Args:
        weights: files of network A or B, ours or the authors', in any order.
        nets: "a", "b" or "ab"; empty for those whose weights are given, or both.
        demo: take untrained networks where no weights are given; their answers mean nothing.
        download: fetch the authors' files from the hub where no weights are given (they are CC-BY-NC-4.0).

    Raises:
        CheckpointError: no weights, two files for one network, or a file that is no network of GenConViT.
    """
    wanted = "".join(sorted(set(nets.lower())))
    if not set(wanted) <= set(NETWORKS):
        raise CheckpointError(f"--net {nets!r} names no networks: give a, b or ab.")
    found: dict[str, tuple[Network, Source]] = {}
    for path in weights:
        network, source = load_network(path)
        if source.net in found:
            raise CheckpointError(f"{path}: a second file for network {source.net.upper()}; give one file a network.")
        found[source.net] = (network, source)
    for net in wanted or ("" if found else "ab"):
        if net in found:
            continue
        if demo:
            found[net] = untrained(net, seed)
        else:
            found[net] = load_network(_published_file(net, download))
    return [found[net] for net in sorted(found) if net in (wanted or found)]


def _published_file(net: str, download: bool) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:  # without `download` only what an earlier download left on this machine
        return Path(hf_hub_download(HUB, PUBLISHED[net], local_files_only=not download))
    except (HfHubHTTPError, OSError) as error:  # a missing local copy is an OSError
        if download:
            raise CheckpointError(f"{HUB}/{PUBLISHED[net]}: could not be fetched from the hub ({error}).") from error
    raise CheckpointError(
        f"no weights for network {net.upper()}, and untrained networks give no verdict. The authors publish "
        f"{PUBLISHED[net]} as {HUB} on the Hugging Face hub, for non-commercial use (CC-BY-NC-4.0): --download fetches "
        "it, --weights names a file. --demo runs without, and marks every output as meaningless."
    )


def load_network(path: str | Path) -> tuple[Network, Source]:
    """A network from the authors' file or ours, recognised by what it holds; in evaluation mode, norms folded.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, or neither network A nor B.
    """
    path = Path(path)
    if path.suffix.lower() == ".onnx":
        from vitalloy.applications.deepfake.export import load_exported

        return load_exported(path)
    state = read_state(path, mapped=True)
    record = _own_record(path)
    net = record.get("net") or next((net for net, clue in _CLUES.items() if clue in state), None)
    if net is None:
        raise CheckpointError(f"{path}: holds neither network A nor network B of GenConViT.")
    args = record.get("build_args") or {"backbone": _convnext(path, state)}
    network = empty_network(net, **args)
    load_checkpoint(network, state, assign=True)
    about = record.get("about") or {}
    words = about.get("summary") or "not said in the file"
    if path.name == PUBLISHED[net]:
        words = "has the name of the authors' published file; trained by them on DFDC, FaceForensics++ and TrustedMedia"
    return network.float().eval().fuse(), Source(net, path.name, sha256(path), words)


def empty_network(net: str, backbone: str, img_size: int = 224, **args: Any) -> Network:
    """A network that owns no memory but its backbone's: weights are to be assigned to it."""
    whole = create_model(backbone, num_classes=WIDTH, img_size=img_size)  # its tables are computed, so it is no shell
    with torch.device("meta"):
        return NETWORKS[net](whole, img_size, **args)


def untrained(net: str, seed: int = 0) -> tuple[Network, Source]:
    """A network as it starts, the same for the same seed; in evaluation mode, norms folded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[net]()
    return network.eval().fuse(), Source(net, None, None, "untrained")


def save_network(network: Network, path: str | Path, about: Mapping[str, Any]) -> Path:
    """Write a network (not fused) as one safetensors file that `load_network` reads, whole or not at all.

    Args:
        about: what it was trained on, as plain values; "summary" is the sentence that reports print.
    """
    path = Path(path)
    record = {"net": network.net, "build_args": network.build_args, "about": dict(about)}
    state = {k: v.detach().cpu().contiguous() for k, v in network.state_dict().items()}
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        safetensors.torch.save_file(state, part, metadata={"format": "pt", MARK: json.dumps(record)})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _own_record(path: Path) -> dict[str, Any]:
    """What `save_network` wrote beside the tensors; empty for other files."""
    if path.suffix != ".safetensors":
        return {}
    with safetensors.safe_open(path, "pt") as file:
        record = json.loads((file.metadata() or {}).get(MARK, "{}"))
    if record and record.get("net") not in NETWORKS:
        raise CheckpointError(f"{path}: names a network {record.get('net')!r}, which this version does not know.")
    return record


def _convnext(path: Path, state: Mapping[str, Tensor]) -> str:
    """Which ConvNeXt the backbone of a published file is, by its width and depth."""
    name = next(name for name in ("backbone", "convnext_backbone", "") if f"{name}.stem.0.weight" in state or not name)
    if not name:
        raise CheckpointError(f"{path}: no ConvNeXt in this file, so it is no published network of GenConViT.")
    depth = len({key.split(".")[4] for key in state if key.startswith(f"{name}.stages.2.blocks.")})
    kind = (state[f"{name}.stem.0.weight"].shape[0], depth)
    if kind not in _CONVNEXTS:
        raise CheckpointError(f"{path}: a ConvNeXt of width {kind[0]} and depth {kind[1]} is none that we know.")
    return f"convnext_{_CONVNEXTS[kind]}"
