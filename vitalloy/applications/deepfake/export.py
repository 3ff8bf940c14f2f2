"""GenConViT as ONNX files, in float and int8: the network folded, without noise, and held against the original.

An exported file answers like the network it was made from, but shows neither redrawing nor saliency.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitalloy.applications.deepfake.model import NETWORKS, Network
from vitalloy.applications.deepfake.pipeline import BATCH, vote
from vitalloy.applications.deepfake.weights import MARK, Source, sha256
from vitalloy.deployment import OnnxModel, export_onnx, quantize_onnx, verify_onnx
from vitalloy.errors import CheckpointError, ExportError


@dataclass(frozen=True)
class Exported:
    """A file, its size, and how it agrees with the network: on `faces` faces, by score and by answer.

    Attributes:
        max_change, mean_change: of a face's score, 0 to 1, against the network itself.
        agreement: share of faces with the same answer.
        auc: how well the file's logits separate the faces that the network calls fake from those that it calls real;
            None where it calls all the same.
    """

    path: Path
    bytes: int
    method: str
    faces: int
    max_change: float
    mean_change: float
    agreement: float
    auc: float | None


class ExportedNetwork:
    """An exported network as the scanner takes it."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.net, self.img_size = record["net"], record["build_args"]["img_size"]
        self.session = OnnxModel(path)

    def __call__(self, image: Tensor, *eps: Tensor) -> Tensor:
        """Normalized faces (B, 3, S, S) -> logits (B, 2)."""
        if eps:
            raise ExportError("an exported network B takes no noise: give its weight file for --as-published.")
        return self.session(image)

    def to(self, device: str) -> ExportedNetwork:
        """Itself: an exported file runs on the CPU."""
        return self


def export_network(
    network: Network,
    path: str | Path,
    faces: Tensor,
    *,
    int8: bool = False,
    source: Source | None = None,
) -> Exported:
    """Write a network in evaluation mode to an ONNX file and measure how it agrees.

    Args:
        faces: normalized faces (N, 3, S, S); what agreement is measured on, and int8 ranges are read off.
        int8: weights and activations in 8 bits.
        source: where the weights come from; the file carries it on.

    Raises:
        ExportError: the network cannot be written, or the float file does not compute what the network computes.
    """
    path = Path(path)
    if not isinstance(network, Network):
        raise ExportError("this network is an ONNX file already: give the weight file that it was made from.")
    batches = faces.split(BATCH)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as scratch:
        whole = export_onnx(network, faces[:2], Path(scratch) / "float.onnx").path
        verify_onnx(network, whole, batches)
        method = "float32"
        if int8:
            method = quantize_onnx(whole, Path(scratch) / "int8.onnx", batches).method
            whole = Path(scratch) / "int8.onnx"
        _mark(whole, network, source)
        whole.replace(path)
    exported = OnnxModel(path)
    with torch.inference_mode():
        ours = torch.cat([network(batch) for batch in batches])
    theirs = torch.cat([exported(batch) for batch in batches])
    change = (_scores(ours) - _scores(theirs)).abs()
    fake = ours[:, 0] > ours[:, 1]
    return Exported(
        path,
        path.stat().st_size,
        method,
        len(faces),
        change.max().item(),
        change.mean().item(),
        (fake == (theirs[:, 0] > theirs[:, 1])).float().mean().item(),
        _auc(fake, theirs[:, 0] - theirs[:, 1]),
    )


def load_exported(path: Path) -> tuple[ExportedNetwork, Source]:
    """An exported network and where its weights come from. Raises CheckpointError for other ONNX files."""
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own error types
        raise CheckpointError(f"{path}: not a readable ONNX file ({type(error).__name__}).") from error
    marks = {entry.key: entry.value for entry in graph.metadata_props}
    del graph
    if MARK not in marks:
        raise CheckpointError(f"{path}: no network of GenConViT; write one with `vitalloy deepfake export`.")
    record = json.loads(marks[MARK])
    if record["net"] not in NETWORKS:
        raise CheckpointError(f"{path}: names a network {record['net']!r}, which this version does not know.")
    return ExportedNetwork(path, record), Source(record["net"], path.name, sha256(path), record["about"])


def _mark(path: Path, network: Network, source: Source | None) -> None:
    """Write into an ONNX file which network it is and where its weights come from."""
    import onnx

    graph = onnx.load(path)
    about = source.about if source else "not said"
    record = {"net": network.net, "build_args": network.build_args, "about": f"exported; {about}"}
    onnx.helper.set_model_props(graph, {MARK: json.dumps(record)})
    onnx.save(graph, path)


def _scores(logits: Tensor) -> Tensor:
    """The vote on each face alone: (N, 2) -> (N,)."""
    return torch.tensor([vote(row[None]).score for row in logits])


def _auc(fake: Tensor, margins: Tensor) -> float | None:
    """Of logit differences: near 0.5 the vote is no rising function of them."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(fake.numpy(), margins.numpy())) if 0 < int(fake.sum()) < len(fake) else None
