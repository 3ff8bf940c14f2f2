"""`vitalloy deepfake`: forged or genuine? Scanning videos is the default; train, evaluate and export are beside it."""

from pathlib import Path
from typing import Annotated, Optional

import click
import typer
from typer.core import TyperGroup

WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".onnx")

Videos = Annotated[list[Path], typer.Argument(help="Videos, images, or folders of them.", show_default=False)]
Weights = Annotated[
    Optional[list[Path]],
    typer.Option(help="Files of network A, B or both, the authors' or your own.", show_default=False),
]
Net = Annotated[str, typer.Option(help="a, b or ab: the networks to run; those whose weights are given if left out.")]
Demo = Annotated[
    bool, typer.Option("--demo", help="Run untrained networks where no weights are given; the output means nothing.")
]
Download = Annotated[
    bool, typer.Option("--download", help="Fetch the authors' weights (CC-BY-NC-4.0) where none are given.")
]
Frames = Annotated[int, typer.Option(help="Evenly spaced frames to look at in each video; -1 for all.")]
Detector = Annotated[str, typer.Option(help="Face detector: auto, cascade, dlib, or the path of an .onnx file.")]
Margin = Annotated[float, typer.Option(min=0.0, help="Crop this share of the face's side more on each side.")]
Published = Annotated[
    bool,
    typer.Option(
        "--as-published", help="Behave as the authors' code does, where that would mislead too; see the docs."
    ),
]
Seed = Annotated[int, typer.Option(help="Of random draws.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class ScanByDefault(TyperGroup):
    """A group whose first word may be left out, and whose --weights takes one file or two."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["scan", *args]
        return super().parse_args(ctx, _second_weights(args))


def _second_weights(args: list[str]) -> list[str]:
    """`--weights A B` as `--weights A --weights B`, where B looks like a weight file."""
    found: list[str] = []
    for word in args:
        if found[-2:-1] == ["--weights"] and word.lower().endswith(WEIGHT_SUFFIXES):
            found.append("--weights")
        found.append(word)
    return found


app = typer.Typer(cls=ScanByDefault, no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def deepfake() -> None:
    """Tell forged videos of faces from genuine ones (GenConViT).

    vitalloy deepfake VIDEO_OR_FOLDER... is short for vitalloy deepfake scan VIDEO_OR_FOLDER...
    """


@app.command("scan", no_args_is_help=True)
def scan(
    videos: Videos,
    weights: Weights = None,
    net: Net = "",
    frames: Frames = 15,
    report: Annotated[Optional[Path], typer.Option(help="Write an HTML page with the faces and scores.")] = None,
    detector: Detector = "auto",
    margin: Margin = 0.0,
    as_published: Published = False,
    demo: Demo = False,
    download: Download = False,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Verdicts on videos: fake, real, or no face found, with the score of every frame and its spread.

    Example: vitalloy deepfake clips/ --weights genconvit_ed_inference.pth genconvit_vae_inference.pth --report out.html
    """
    from vitalloy.cli.console import Drawn, err, log_to_terminal, out, print_json
    from vitalloy.cli.deepfake_text import lines, warning
    from vitalloy.runs import deepfake as pipelines

    log_to_terminal()
    videos = pipelines.find_videos(videos)  # a wrong name is said before large files are read
    scanner = pipelines.open_scanner(
        weights or [],
        net,
        demo=demo,
        download=download,
        frames=frames,
        detector=detector,
        margin=margin,
        as_published=as_published,
        inspect=report is not None,
        seed=seed,
        device=device,
    )
    if scanner.setup.demo:
        err.print(warning())
    reporter = Drawn()

    def tell(verdict: pipelines.Verdict) -> None:
        if not json:
            reporter.close()
            for line in lines(verdict, scanner.setup.demo):
                out.print(line, soft_wrap=True)

    try:
        verdicts = pipelines.scan(videos, scanner, report=report, reporter=reporter, tell=tell)
    finally:
        reporter.close()
    if json:
        demo = scanner.setup.demo
        print_json({"setup": scanner.setup.as_dict(), "verdicts": [v.as_dict() | {"demo": demo} for v in verdicts]})
    if report:
        err.print(f"report  {report}", soft_wrap=True)


@app.command("evaluate", no_args_is_help=True)
def evaluate(
    data: Annotated[
        Path,
        typer.Argument(
            help="Labelled videos (DFDC, FaceForensics++, Celeb-DF, DeepfakeTIMIT, or fake/ and real/ "
            "folders), or a result file of the authors.",
            show_default=False,
        ),
    ],
    weights: Weights = None,
    net: Net = "",
    layout: Annotated[str, typer.Option(help="auto, dfdc, faceforensics, celeb, timit or folders.")] = "auto",
    split: Annotated[Optional[str], typer.Option(help="train, val or test, as the data set's authors have it.")] = None,
    limit: Annotated[Optional[int], typer.Option(min=1, help="Take this many videos of each class.")] = None,
    degrade: Annotated[
        Optional[list[str]], typer.Option(help="Scan again with frames degraded, such as 'jpeg 50'; or 'all'.")
    ] = None,
    results: Annotated[
        Optional[Path], typer.Option(help="Keep every verdict in this file as it comes, and go on from it.")
    ] = None,
    published_results: Annotated[
        Optional[Path], typer.Option(help="Write a result file in the authors' format.")
    ] = None,
    report: Annotated[Optional[Path], typer.Option(help="Write an HTML page.")] = None,
    frames: Frames = 15,
    detector: Detector = "auto",
    margin: Margin = 0.0,
    as_published: Published = False,
    demo: Demo = False,
    download: Download = False,
    seed: Seed = 0,
    device: Device = "cpu",
    json: Json = False,
) -> None:
    """Accuracy, AUC, equal error rate and log loss on labelled videos, with 95 % intervals.

    Example: vitalloy deepfake evaluate Celeb-DF-v2/ --split test --weights network_a.safetensors --results celeb.jsonl
    """
    from vitalloy.applications.deepfake.evaluation import DEGRADATIONS
    from vitalloy.cli.console import Drawn, err, log_to_terminal, out, print_json
    from vitalloy.cli.deepfake_text import scores, summary, warning
    from vitalloy.runs import deepfake as pipelines

    log_to_terminal()
    if data.suffix == ".json" and data.is_file():
        found = pipelines.evaluate(data)
        print_json(found) if json else out.print(summary(found))
        return
    options = {"frames": frames, "detector": detector, "margin": margin, "as_published": as_published}
    scanner = pipelines.open_scanner(
        weights or [],
        net,
        demo=demo,
        download=download,
        inspect=report is not None,
        seed=seed,
        device=device,
        **options,
    )
    if scanner.setup.demo:
        err.print(warning())
    reporter = Drawn()
    try:
        found = pipelines.evaluate(
            data,
            scanner,
            layout=layout,
            split=split,
            limit=limit,
            degradations=list(DEGRADATIONS) if degrade == ["all"] else degrade or [],
            results=results,
            published_results=published_results,
            report=report,
            reporter=reporter,
            seed=seed,
        )
    finally:
        reporter.close()
    if json:
        print_json(found)
        return
    for part in scores(found):
        out.print(part)
    if report:
        err.print(f"report  {report}", soft_wrap=True)


@app.command("train", no_args_is_help=True)
def train(
    data: Annotated[
        Path,
        typer.Argument(
            help="fake/ and real/ folders of face crops or videos (below train/, valid/, test/ or not), or "
            "real faces alone: fakes are then made from them.",
            show_default=False,
        ),
    ],
    out_: Annotated[Path, typer.Option("--out", help="The folder to write.")] = Path("runs/deepfake"),
    net: Annotated[str, typer.Option(help="a or b: the network to train.")] = "a",
    backbone: Annotated[str, typer.Option(help="A name from `vitalloy models`.")] = "convnext_tiny",
    img_size: Annotated[int, typer.Option(help="Side of the face crops, a multiple of 32.")] = 224,
    epochs: Annotated[int, typer.Option(min=1)] = 5,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-4,
    weights: Annotated[Optional[Path], typer.Option(help="Weights of this network to start from.")] = None,
    backbone_weights: Annotated[
        Optional[Path], typer.Option(help="Weights of the backbone alone; the authors started from ImageNet's.")
    ] = None,
    ungrouped: Annotated[
        bool, typer.Option("--ungrouped", help="Take every picture for another person's, whatever its name.")
    ] = False,
    frames: Annotated[int, typer.Option(help="Frames of a video to take faces from.")] = 15,
    detector: Detector = "auto",
    seed: Seed = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the training in --out after a kill.")] = False,
    json: Json = False,
) -> None:
    """Train network A or B with the published losses and schedule.

    Example: vitalloy deepfake train faces/ --out runs/mine --epochs 20
    """
    from vitalloy.applications.deepfake.training import train as fit
    from vitalloy.cli.console import Drawn, err, log_to_terminal, print_json
    from vitalloy.cli.deepfake_text import measured

    log_to_terminal()
    reporter, stages = Drawn(), set()

    def advance(stage: str, done: int, total: int) -> None:
        if stage not in stages:
            stages.add(stage)
            reporter.stage({"faces": "finding faces"}.get(stage, stage))
        reporter.advance(done, total)

    try:
        result = fit(
            data,
            out=out_,
            net=net,
            backbone=backbone,
            img_size=img_size,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            weights=weights,
            backbone_weights=backbone_weights,
            grouped=not ungrouped,
            frames=frames,
            detector=detector,
            seed=seed,
            resume=resume,
            advance=advance,
        )
    finally:
        reporter.close()
    if json:
        print_json({**result.__dict__, "file": str(result.file)})
        return
    first, last = result.history[0], result.history[-1]
    err.print(f"training loss {first['train_loss']:.3f} to {last['train_loss']:.3f} in {len(result.history)} epochs")
    if result.test:
        err.print(f"held-out faces: {measured(result.test)}" + ("; self-made forgeries" if result.self_made else ""))
    err.print(f"weights  {result.file}\nuse them  vitalloy deepfake VIDEO --weights {result.file}", soft_wrap=True)


@app.command("export", no_args_is_help=True)
def export(
    videos: Videos,
    weights: Weights = None,
    net: Net = "",
    output: Annotated[Path, typer.Option(help="The folder to write into.")] = Path("."),
    int8: Annotated[bool, typer.Option("--int8", help="Weights and activations in 8 bits.")] = False,
    demo: Demo = False,
    download: Download = False,
    json: Json = False,
) -> None:
    """Write the networks as ONNX files, and measure on the faces of these videos how they agree with the originals.

    Example: vitalloy deepfake export clips/ --weights genconvit_ed_inference.pth --int8
    """
    from dataclasses import asdict

    from vitalloy.cli.console import Drawn, log_to_terminal, out, print_json
    from vitalloy.cli.deepfake_text import exported
    from vitalloy.runs import deepfake as pipelines

    log_to_terminal()
    scanner = pipelines.open_scanner(weights or [], net, demo=demo, download=download)
    reporter = Drawn()
    try:
        made = pipelines.export(scanner, videos, output, int8=int8, reporter=reporter)
    finally:
        reporter.close()
    if json:
        print_json([{**asdict(m), "path": str(m.path)} for m in made])
        return
    for m in made:
        out.print(exported(m), soft_wrap=True)
