"""The run folder and the pipelines that fill and use it: what `vitalloy.fit` and the command call."""

from vitalloy.runs.apply import FORMATS, Prediction, evaluate, export, predict
from vitalloy.runs.fit import Run, fit, resume
from vitalloy.runs.folder import Reporter, RunFolder
from vitalloy.runs.stages import transform_of

__all__ = [
    "FORMATS",
    "Prediction",
    "Reporter",
    "Run",
    "RunFolder",
    "evaluate",
    "export",
    "fit",
    "predict",
    "resume",
    "transform_of",
]
