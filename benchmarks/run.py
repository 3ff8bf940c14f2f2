"""Times every backbone beside its installable peer: `make bench`.

Ours and the peer run in turns in one process; figures are medians, and what counts is their ratio. Beside each stands
the share of the machine's own matrix-product rate, measured in the same run: the limit for a model of matrix products.
Results go to benchmarks/results/<machine>.json, the table to docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
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


# ours -> (whose, how the peer is built)
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
}


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


def pair(calls: dict[str, Callable[[], Any]], repeats: int, budget_s: float) -> dict[str, Any]:
    times = compare(calls, warmup=1, repeats=repeats, budget_s=budget_s)
    ours, peer = times["ours"].median_ms, times["peer"].median_ms
    return {"ours_ms": ours, "peer_ms": peer, "ratio": peer / ours, "runs": times["ours"].runs}


def measure(name: str, repeats: int, budget_s: float, rate: float) -> dict[str, Any]:
    whose, build = PEERS[name]
    ours, peer = vitalloy.create_model(name).eval(), build().eval()
    macs = count(ours).macs
    row: dict[str, Any] = {"model": name, "peer": whose, "macs": macs}
    for batch in BATCHES:
        images = torch.randn(batch, 3, 224, 224)
        calls = {"ours": forward(ours, images), "peer": forward(peer, images)}
        result = pair(calls, repeats, budget_s)
        for who in calls:
            result[f"{who}_of_limit"] = 2 * macs * batch / (result[f"{who}_ms"] / 1e3) / rate
            result[f"{who}_peak_mb"] = peak_memory(calls[who])
        row[f"batch_{batch}"] = result
    images = torch.randn(TRAIN_BATCH, 3, 224, 224)
    calls = {"ours": training_step(ours.train(), images), "peer": training_step(peer.train(), images)}
    row["train"] = pair(calls, max(repeats // 2, 5), budget_s)
    for who in calls:
        row["train"][f"{who}_peak_mb"] = peak_memory(calls[who])
    return row


def geometric_mean(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).log().mean().exp())


def page(result: dict[str, Any]) -> str:
    machine, rows = result["machine"], result["rows"]
    lines = [
        "# Benchmarks",
        "",
        "Every backbone beside its installable peer: same process, in turns, medians, fp32 at 224x224 pixels. A ratio "
        "above 1 means that ours is faster. *Limit* is the share of the machine's own matrix-product rate that the "
        "forward pass reaches (ours / peer), measured in the same run. *Memory* is the peak above the start, in MB "
        "(ours / peer). "
        f"The training step has batch {TRAIN_BATCH} and AdamW. `make bench` writes this page.",
        "",
        f"Machine: {machine['cpu']}, {result['threads']} thread(s); PyTorch {machine['torch']}; {result['date']}. "
        f"Matrix products run at {result['matmul_flops'] / 1e9:.0f} GFLOP/s.",
        "",
        "| model | peer | batch 1 | limit | batch 16 | limit | memory | training step | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        one, many, step = row["batch_1"], row["batch_16"], row["train"]
        lines.append(
            f"| {row['model']} | {row['peer']} | {one['ratio']:.2f}x ({one['ours_ms']:.0f} ms) | {limits(one)} "
            f"| {many['ratio']:.2f}x ({many['ours_ms']:.0f} ms) | {limits(many)} | {memory(many)} "
            f"| {step['ratio']:.2f}x ({step['ours_ms']:.0f} ms) | {memory(step)} |"
        )
    means = [geometric_mean([row[part]["ratio"] for row in rows]) for part in ("batch_1", "batch_16", "train")]
    lines.append(f"| geometric mean | | {means[0]:.2f}x | | {means[1]:.2f}x | | | {means[2]:.2f}x | |")
    return "\n".join(lines) + "\n"


def limits(part: dict[str, Any]) -> str:
    return f"{part['ours_of_limit']:.2f} / {part['peer_of_limit']:.2f}"


def memory(part: dict[str, Any]) -> str:
    values = (part["ours_peak_mb"], part["peer_peak_mb"])
    return " / ".join("-" if v is None else f"{v:.0f}" for v in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names of ours to measure (again); all when none is given")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each (at least 5)")
    parser.add_argument("--budget", type=float, default=12.0, help="seconds for each figure and side")
    args = parser.parse_args()
    unknown = sorted(set(args.models) - set(PEERS))
    if unknown:
        parser.error(f"no peer is known for {', '.join(unknown)}; choose from {', '.join(PEERS)}")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    console = Console()
    rows, rates = [], []
    for name in track(args.models or list(PEERS), "benchmarks", console=console):
        rates.append(matmul_rate())
        rows.append(measure(name, args.repeats, args.budget, rates[-1]))
        one, many, step = (rows[-1][k]["ratio"] for k in ("batch_1", "batch_16", "train"))
        ratios = f"batch 1 {one:.2f}x   batch 16 {many:.2f}x   training step {step:.2f}x"
        console.print(f"{name:32} {ratios}", soft_wrap=True)
        gc.collect()
        write(rows, rates, args.threads)  # after each, so that nothing is lost when it is killed


def write(rows: list[dict[str, Any]], rates: list[float], threads: int) -> None:
    """Put new rows over those of earlier runs on this machine, in the order of `PEERS`, and write the page."""
    machine = describe()
    slug = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower()).strip("-")
    target = ROOT / "benchmarks" / "results" / f"{slug}-{threads}-thread.json"
    before = json.loads(target.read_text())["rows"] if target.is_file() else []
    known = {row["model"]: row for row in [*before, *rows]}
    result = {
        "machine": machine,
        "threads": threads,
        "date": date.today().isoformat(),
        "matmul_flops": sorted(rates)[len(rates) // 2],
        "rows": [known[name] for name in PEERS if name in known],
    }
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    (ROOT / "docs" / "benchmarks.md").write_text(page(result))


if __name__ == "__main__":
    main()
