"""GenConViT on the 15 faces of a video: speed and memory beside a straightforward reading of the published code.

    python benchmarks/deepfake.py            # writes benchmarks/results/deepfake.json

The peer is written here from the published description: timm's ConvNeXt as its authors call it, each view of a face in
a pass of its own, the log variance and the KL value computed, the Swin held. Both sides have the same weights and
their logits are compared first. Rounds alternate; the numbers are medians of wall-clock seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import vitalloy  # first: it lets torchvision load beside a CPU torch

import timm  # isort: skip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitalloy.applications.deepfake import model as ours
from vitalloy.applications.deepfake.export import export_network, load_exported
from vitalloy.benchmark.machine import describe

RESULTS = Path(__file__).parent / "results" / "deepfake.json"
FACES = 15


class PeerEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        widths, layers = [3, 16, 32, 64, 128, 256], []
        for i in range(5):
            layers += [nn.Conv2d(widths[i], widths[i + 1], 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2, 2)]
        self.features = nn.Sequential(*layers)

    def forward(self, x):
        return self.features(x)


class PeerDecoder(nn.Module):
    def __init__(self, widths, act):
        super().__init__()
        layers = []
        for i in range(len(widths) - 1):
            layers += [nn.ConvTranspose2d(widths[i], widths[i + 1], 2, 2), act()]
        self.features = nn.Sequential(*layers)

    def forward(self, x):
        return self.features(x)


class PeerA(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = PeerEncoder()
        self.decoder = PeerDecoder([256, 128, 64, 32, 16, 3], nn.ReLU)
        self.backbone = timm.create_model("convnext_tiny", pretrained=False)
        self.embedder = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False)
        self.fc, self.fc2, self.act = nn.Linear(2000, 500), nn.Linear(500, 2), nn.GELU()

    def forward(self, image):
        redrawn = self.decoder(self.encoder(image))
        x = torch.cat((self.backbone(redrawn), self.backbone(image)), 1)
        return self.fc2(self.act(self.fc(self.act(x))))


class PeerVariationalEncoder(nn.Module):
    def __init__(self, latent=12544):
        super().__init__()
        widths, layers = [3, 16, 32, 64, 128], []
        for i in range(4):
            layers += [nn.Conv2d(widths[i], widths[i + 1], 3, 2, 1), nn.BatchNorm2d(widths[i + 1]), nn.LeakyReLU()]
        self.features = nn.Sequential(*layers)
        self.mu, self.var = nn.Linear(25088, latent), nn.Linear(25088, latent)

    def forward(self, x):
        x = self.features(x).flatten(1)
        mu, logvar = self.mu(x), self.var(x)
        z = mu + torch.exp(0.5 * mu) * torch.zeros_like(mu)  # no noise, so that both sides can be compared
        self.kl = 0.5 * torch.mean(-0.5 * torch.sum(1 + logvar - mu**2 - logvar.exp(), 1))
        return z


class PeerB(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = PeerVariationalEncoder()
        self.decoder = PeerDecoder([256, 64, 32, 16, 3], nn.LeakyReLU)
        self.convnext_backbone = timm.create_model("convnext_tiny", pretrained=False)
        self.embedder = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False)
        self.fc, self.fc2, self.act = nn.Linear(2000, 500), nn.Linear(500, 2), nn.ReLU()

    def forward(self, image):
        redrawn = self.decoder(self.encoder(image).view(-1, 256, 7, 7))
        x = torch.cat((self.convnext_backbone(image), self.convnext_backbone(redrawn)), 1)
        logits = self.fc2(self.act(self.fc(self.act(x))))
        return logits, F.interpolate(redrawn, (224, 224), mode="bilinear", antialias=True)


def livened(network: nn.Module) -> nn.Module:
    """Random layer scales and norm statistics: as they start, the branches of a ConvNeXt add almost nothing."""
    for name, tensor in network.state_dict().items():
        if name.endswith(("gamma", "running_var")):
            tensor.uniform_(0.5, 1.0)
        elif name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
    return network.eval()


def pair(net: str) -> tuple[nn.Module, ours.Network]:
    """The peer and our network with its weights."""
    torch.manual_seed(0)
    peer = livened({"a": PeerA, "b": PeerB}[net]())
    network = ours.NETWORKS[net]().eval()
    vitalloy.load_checkpoint(network, peer.state_dict())
    return peer, network


def timed(calls: dict[str, Callable[[Tensor], object]], faces: Tensor, repeats: int) -> dict[str, float]:
    """Median seconds of each call, in turns."""
    seen: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            with torch.inference_mode():
                call(faces)
            if turn:  # the first round warms up
                seen[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seen.items()}


def measure(net: str, faces: Tensor, repeats: int, folder: Path) -> dict:
    peer, network = pair(net)
    with torch.inference_mode():
        theirs = peer(faces)
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        difference = (network(faces) - theirs).abs().max().item()
        network.fuse()
        fused = (network(faces) - theirs).abs().max().item()
    bytes_of = {name: sum(t.nbytes for t in m.state_dict().values()) for name, m in (("peer", peer), ("ours", network))}
    calls: dict[str, Callable] = {"peer": peer, "ours": network}
    files = {}
    for kind in ("onnx", "int8"):
        path = folder / f"{net}.{kind}.onnx"
        report = export_network(network, path, faces, int8=kind == "int8")
        calls[kind], _ = load_exported(path)
        files[kind] = {k: v for k, v in asdict(report).items() if k != "path"}
    seconds = timed(calls, faces, repeats)
    return {"difference": difference, "difference_fused": fused, "bytes": bytes_of, "files": files, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faces = torch.randn(FACES, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    record: dict = {"machine": describe(), "threads": args.threads, "faces": FACES, "repeats": args.repeats}
    with tempfile.TemporaryDirectory() as folder:
        for net in ours.NETWORKS:
            record[net] = measure(net, faces, args.repeats, Path(folder))
            gc.collect()
            print(net, json.dumps(record[net], indent=1))
    total = {k: sum(record[n]["seconds"][k] for n in ours.NETWORKS) for k in record["a"]["seconds"]}
    record["ratios"] = {k: total["peer"] / v for k, v in total.items()}
    print(record["ratios"])
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
