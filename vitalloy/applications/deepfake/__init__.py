"""Deepfake detection by GenConViT: from a video file to a verdict that a person can check.

`open_networks` reads weights, `Scanner` turns a video into a `Verdict`; training, evaluation and export have a module
each. On the command line: `vitalloy deepfake`.
"""

from vitalloy.applications.deepfake.model import NetworkA, NetworkB
from vitalloy.applications.deepfake.pipeline import FaceScore, Person, Scanner, Setup, Verdict, vote
from vitalloy.applications.deepfake.weights import Source, load_network, open_networks, save_network

__all__ = [
    "FaceScore",
    "NetworkA",
    "NetworkB",
    "Person",
    "Scanner",
    "Setup",
    "Source",
    "Verdict",
    "load_network",
    "open_networks",
    "save_network",
    "vote",
]
