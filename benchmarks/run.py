"""Times every backbone, as it is and fused, beside a peer: `make bench`.

The peer is what one can install (timm, transformers); where nothing is, a plain reading of the published description
in benchmarks/reference/. All run in turns in one process; figures are medians, and what counts is their ratio. Before
timing, ours gets the peer's weights and the largest difference of the logits is kept. Beside each ratio stands the
share of the machine's own matrix-product rate, measured in the same run: the limit for a model of matrix products.
Results go to benchmarks/results/<machine>.json, the table to docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import re
import runpy
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

import vitalloy
from vitalloy.benchmark import compare, count, describe, matmul_rate, peak_memory

ROOT = Path(__file__).parent.parent
BATCHES, TRAIN_BATCH = (1, 16), 8


def timm_model(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name)

    return build


def cvt_port() -> nn.Module:
    from transformers import CvtConfig, CvtForImageClassification

    return CvtForImageClassification(CvtConfig(num_labels=1000))


def pvt_port() -> nn.Module:
    from transformers import PvtConfig, PvtForImageClassification

    return PvtForImageClassification(PvtConfig(num_labels=1000, depths=[2, 2, 2, 2]))


# ours -> (whose, how the peer is built); those of benchmarks/reference/ are added below
PEERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "cvt_13": ("transformers", cvt_port),
    "convit_tiny": ("timm", timm_model("convit_tiny")),
    "pvt_tiny": ("transformers", pvt_port),
    "pvt_v2_b0": ("timm", timm_model("pvt_v2_b0")),
    "swin_tiny_patch4_window7_224": ("timm", timm_model("swin_tiny_patch4_window7_224")),
    "deit_tiny_patch16_224": ("timm", timm_model("deit_tiny_patch16_224")),
    "convnext_tiny": ("timm", timm_model("convnext_tiny")),
    "deit_small_patch16_224": ("timm", timm_model("deit_small_patch16_224")),
    "pvt_v2_b2_li": ("timm", timm_model("pvt_v2_b2_li")),
    "pvt_v2_b2": ("timm", timm_model("pvt_v2_b2")),
    "twins_pcpvt_small": ("timm", timm_model("twins_pcpvt_small")),
    "twins_svt_small": ("timm", timm_model("twins_svt_small")),
    "crossvit_9_dagger_224": ("timm", timm_model("crossvit_9_dagger_240")),
    "crossvit_small_224": ("timm", timm_model("crossvit_small_240")),
    "nextvit_small": ("timm", timm_model("nextvit_small")),
    "efficientformer_l1": ("timm", timm_model("efficientformer_l1")),
    "efficientformerv2_s0": ("timm", timm_model("efficientformerv2_s0")),
}
SIZES: dict[str, tuple[int, int, int]] = {}  # inputs that are not 3 x 224 x 224
for _file in sorted((ROOT / "benchmarks" / "reference").glob("*.py")):
    _module = runpy.run_path(str(_file))
    PEERS |= {name: ("reference", build) for name, build in _module["MODELS"].items()}
    SIZES |= _module.get("INPUT", {})


def logits(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result.logits


def forward(model: nn.Module, images: torch.Tensor) -> Callable[[], Any]:
    def call() -> Any:
        with torch.inference_mode():
            return model(images)

    return call


def training_step(model: nn.Module, images: torch.Tensor) -> Callable[[], Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    labels = torch.arange(len(images))

    def call() -> None:
        loss = nn.functional.cross_entropy(logits(model(images)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def timed(calls: dict[str, Callable[[], Any]], repeats: int, budget_s: float) -> dict[str, Any]:
    """Medians of all, and the ratios of the peer to each of ours."""
    times = compare(calls, warmup=1, repeats=repeats, budget_s=budget_s)
    result: dict[str, Any] = {f"{who}_ms": t.median_ms for who, t in times.items()} | {"runs": times["ours"].runs}
    for who in calls.keys() - {"peer"}:
        result["ratio" if who == "ours" else f"{who}_ratio"] = times["peer"].median_ms / times[who].median_ms
    return result


def difference(ours: nn.Module, peer: nn.Module, images: torch.Tensor) -> float | None:
    """Give ours the peer's weights: the gap of the logits in standard deviations. None where they do not fit."""
    try:
        vitalloy.load_checkpoint(ours, peer.state_dict())
    except vitalloy.VitalloyError:
        return None
    with torch.inference_mode():
        a, b = logits(ours(images)), logits(peer(images))
    return float((a - b).abs().max() / b.std())


def measure(name: str, repeats: int, budget_s: float, rate: float) -> dict[str, Any]:
    whose, build = PEERS[name]
    size = SIZES.get(name) or vitalloy.registry.entry(name).cfg["input_size"]
    ours, peer = vitalloy.create_model(name).eval(), build().eval()
    macs = count(ours, size).macs
    row: dict[str, Any] = {"model": name, "peer": whose, "input": list(size), "macs": macs}
    row["difference"] = difference(ours, peer, torch.randn(2, *size))
    fused = copy.deepcopy(ours).fuse()
    for batch in BATCHES:
        images = torch.randn(batch, *size)
        calls = {"ours": forward(ours, images), "fused": forward(fused, images), "peer": forward(peer, images)}
        result = timed(calls, repeats, budget_s)
        for who in calls:
            result[f"{who}_of_limit"] = 2 * macs * batch / (result[f"{who}_ms"] / 1e3) / rate
            result[f"{who}_peak_mb"] = peak_memory(calls[who])
        row[f"batch_{batch}"] = result
    images = torch.randn(TRAIN_BATCH, *size)
    calls = {"ours": training_step(ours.train(), images), "peer": training_step(peer.train(), images)}
    row["train"] = timed(calls, max(repeats // 2, 5), budget_s)
    for who in calls:
        row["train"][f"{who}_peak_mb"] = peak_memory(calls[who])
    return row


def latencies(names: list[str], budget_s: float) -> dict[str, float]:
    """Milliseconds that each fused model takes for one image of its own size."""
    found = {}
    for name in track(names, "latencies", console=Console()):
        fused = vitalloy.create_model(name).fuse()
        images = torch.randn(1, *vitalloy.registry.entry(name).cfg["input_size"])
        found[name] = compare({name: forward(fused, images)}, warmup=2, repeats=10, budget_s=budget_s)[name].median_ms
    return found


def geometric_mean(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).log().mean().exp())


def page(result: dict[str, Any]) -> str:
    machine, rows = result["machine"], result["rows"]
    lines = [
        "# Benchmarks",
        "",
        "Every backbone, as it is and after `fuse()`, beside a peer with the same weights: same process, in turns, "
        "medians, fp32. The peer is what one can install; *reference* is a plain reading of the published description "
        "in [benchmarks/reference](../benchmarks/reference), where nothing is. A ratio above 1 means that ours is "
        "faster; the time in brackets is ours, fused. *Limit* is the share of the machine's own matrix-product rate "
        "that the forward pass reaches (ours fused / peer), measured in the same run. *Memory* is the peak above the "
        f"start at batch 16, in MB (ours / peer). The training step has batch {TRAIN_BATCH} and AdamW. "
        "DeiT as it is and fused is the same computation, so the gap between its two ratios shows how much this "
        "machine wavers. `make bench` writes this page.",
        "",
        f"Machine: {machine['cpu']}, {result['threads']} thread(s); PyTorch {machine['torch']}; {result['date']}. "
        f"Matrix products run at {result['matmul_flops'] / 1e9:.0f} GFLOP/s.",
        "",
        "| model | peer | batch 1 | fused | limit | batch 16 | fused | limit | memory | training step | memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        one, many, step = row["batch_1"], row["batch_16"], row["train"]
        lines.append(
            f"| {row['model']} | {row['peer']} "
            f"| {one['ratio']:.2f}x | {one['fused_ratio']:.2f}x ({one['fused_ms']:.0f} ms) | {limits(one)} "
            f"| {many['ratio']:.2f}x | {many['fused_ratio']:.2f}x ({many['fused_ms']:.0f} ms) | {limits(many)} "
            f"| {memory(many)} | {step['ratio']:.2f}x ({step['ours_ms']:.0f} ms) | {memory(step)} |"
        )
    parts = (("batch_1", "ratio"), ("batch_1", "fused_ratio"), ("batch_16", "ratio"), ("batch_16", "fused_ratio"))
    one, one_fused, many, many_fused, step = (
        geometric_mean([row[part][key] for row in rows]) for part, key in (*parts, ("train", "ratio"))
    )
    lines.append(
        f"| geometric mean | | {one:.2f}x | {one_fused:.2f}x | | {many:.2f}x | {many_fused:.2f}x | | | {step:.2f}x | |"
    )
    unlike = [row["model"] for row in rows if row["difference"] is None or row["difference"] > 1e-3]
    if unlike:
        lines += ["", f"With the peer's weights ours gives the peer's logits, but for: {', '.join(unlike)}."]
    return "\n".join(lines) + "\n"


def limits(part: dict[str, Any]) -> str:
    return f"{part['fused_of_limit']:.2f} / {part['peer_of_limit']:.2f}"


def memory(part: dict[str, Any]) -> str:
    values = (part["ours_peak_mb"], part["peer_peak_mb"])
    return " / ".join("-" if v is None else f"{v:.0f}" for v in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names of ours to measure (again); all when none is given")
    parser.add_argument(
        "--latency", action="store_true", help="only the latencies of all models with a published accuracy"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each (at least 5)")
    parser.add_argument("--budget", type=float, default=12.0, help="seconds for each figure and side")
    args = parser.parse_args()
    unknown = sorted(set(args.models) - set(PEERS))
    if unknown:
        parser.error(f"no peer is known for {', '.join(unknown)}; choose from {', '.join(PEERS)}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.latency:
        names = [n for n in vitalloy.list_models() if vitalloy.registry.entry(n).variant.top1 is not None]
        write([], [matmul_rate()], args.threads, latencies(names, args.budget / 10))
        return
    console = Console()
    rows, rates = [], []
    for name in track(args.models or list(PEERS), "benchmarks", console=console):
        rates.append(matmul_rate())
        rows.append(measure(name, args.repeats, args.budget, rates[-1]))
        one, many, step = (rows[-1][k] for k in ("batch_1", "batch_16", "train"))
        ratios = f"batch 1 {one['ratio']:.2f}x, fused {one['fused_ratio']:.2f}x   "
        ratios += f"batch 16 {many['ratio']:.2f}x, fused {many['fused_ratio']:.2f}x   training {step['ratio']:.2f}x"
        console.print(f"{name:32} {ratios}", soft_wrap=True)
        gc.collect()
        write(rows, rates, args.threads)  # after each, so that nothing is lost when it is killed


def write(
    rows: list[dict[str, Any]], rates: list[float], threads: int, latency: dict[str, float] | None = None
) -> None:
    """Put new rows and latencies over those of earlier runs on this machine, and write the page."""
    machine = describe()
    slug = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower()).strip("-")
    target = ROOT / "benchmarks" / "results" / f"{slug}-{threads}-thread.json"
    before = json.loads(target.read_text()) if target.is_file() else {}
    known = {row["model"]: row for row in [*before.get("rows", []), *rows]}
    result = {
        "machine": machine,
        "threads": threads,
        "date": date.today().isoformat(),
        "matmul_flops": sorted(rates)[len(rates) // 2],
        "rows": [known[name] for name in PEERS if name in known],
        "latency_ms": before.get("latency_ms", {}) | (latency or {}),
    }
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    (ROOT / "docs" / "benchmarks.md").write_text(page(result))


if __name__ == "__main__":
    main()
