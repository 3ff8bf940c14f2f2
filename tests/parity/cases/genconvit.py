"""How the goldens of genconvit are computed."""

from __future__ import annotations

from collections.abc import Callable

import golden
import torch
from torch import nn

import vitalloy
from cases.common import Outputs, listen
from vitalloy.applications.deepfake import model as genconvit
from vitalloy.applications.deepfake.pipeline import vote
from vitalloy.data.video import frame_positions

BOTH = {"out.latent": "encoder", "out.x_hat": "decoder", "out.reconstruction": "decoder"}


def loaded(module: nn.Module, record: dict) -> nn.Module:
    module = module.to(getattr(torch, record["dtype"])).train(record["train"])
    vitalloy.load_checkpoint(module, golden.state_of(record))
    return module


def network_a(record: dict) -> Outputs:
    network, seen = loaded(genconvit.NetworkA(), record), {}
    listen(network, "out.latent", "encoder", seen)
    listen(network, "views", "backbone", seen)
    outputs = network(*golden.inputs_of(record).values(), reconstruction=True)
    redrawn, image = seen.pop("views").chunk(2)
    return seen | {
        "out.reconstruction": outputs.reconstruction,
        "out.backbone_reconstruction": redrawn,
        "out.backbone_image": image,
        "out.logits": outputs.logits,
    }


def network_b(record: dict) -> Outputs:
    network, seen = loaded(genconvit.NetworkB(logvar=True), record), {}
    inputs = golden.inputs_of(record)
    network.encoder.register_forward_hook(lambda _m, _i, out: seen.update({"out.z": out.z}))
    listen(network, "out.x_hat", "decoder", seen)
    outputs = network(inputs["image"], inputs["eps"], reconstruction=True)
    return seen | {"out.logits": outputs.logits, "out.reconstruction": outputs.reconstruction, "out.kl": outputs.kl}


class Given(nn.Module):
    """Stands in for network B's encoder where a record gives the latent."""

    def __init__(self, z: torch.Tensor) -> None:
        super().__init__()
        self.z = z

    def forward(self, _image: torch.Tensor, _eps: None) -> genconvit.Latent:
        return genconvit.Latent(self.z, self.z, None, None)


def network_b_given_z(record: dict) -> Outputs:
    inputs, seen, views = golden.inputs_of(record), {}, []
    with torch.device("meta"):  # the encoder is larger than all the rest, and is replaced
        network = genconvit.NetworkB(vitalloy.create_model("convnext_tiny"))
    network.encoder = Given(inputs["z"])
    network.backbone = vitalloy.create_model("convnext_tiny")
    network = loaded(network.to_empty(device="cpu"), record)
    network.encoder.z = inputs["z"]
    listen(network, "out.x_hat", "decoder", seen)
    network.backbone.register_forward_hook(lambda _m, _i, out: views.append(out))
    outputs = network(inputs["image"], reconstruction=True)
    return seen | {
        "out.backbone_image": views[0],
        "out.backbone_reconstruction": views[1],
        "out.logits": outputs.logits,
        "out.reconstruction": outputs.reconstruction,
    }


def part(build: Callable[[], nn.Module]) -> Callable[[dict], Outputs]:
    def run(record: dict) -> Outputs:
        inputs = golden.inputs_of(record)
        z = next(iter(inputs.values()))
        return {"out": loaded(build(), record)(z.unflatten(1, (256, 7, 7)) if z.ndim == 2 else z)}

    return run


def variational_encoder(record: dict) -> Outputs:
    seen: Outputs = {}
    encoder = loaded(genconvit.VariationalEncoder(latent_dims=64, logvar=True), record)
    listen(encoder, "out.features", "features", seen)
    latent = encoder(*golden.inputs_of(record).values())
    return seen | {"out.z": latent.z, "out.mu": latent.mean, "out.logvar": latent.logvar, "out.kl": latent.kl}


def losses(record: dict) -> Outputs:
    logits, reconstruction, image = golden.inputs_of(record).values()
    target, outputs = torch.tensor([0, 1, 1, 0]), genconvit.Outputs(logits, reconstruction)
    return {
        "out.ed": genconvit.loss_a(logits, target).view(1),
        "out.vae": genconvit.loss_b(outputs, target, image).view(1),
    }


def positions(record: dict) -> Outputs:
    found = {}
    for name in record["outputs"]:  # out.n<frames of the video>_f<frames wanted>
        total, wanted = name.removeprefix("out.n").split("_f")
        found[name] = torch.tensor(frame_positions(int(total), int(wanted)), dtype=torch.float64)
    return found


def voted(record: dict) -> Outputs:
    means, index, score = vote(golden.inputs_of(record)["logits"])
    return {
        "out.mean": means,
        "out.index": torch.tensor([index]),
        "out.value": torch.tensor([score], dtype=torch.float64),
    }


CASES = {
    "ed_encoder": part(genconvit.Encoder),
    "ed_decoder": part(lambda: genconvit.Decoder((256, 128, 64, 32, 16, 3), nn.ReLU)),
    "ed_tiny_224": network_a,
    "vae_encoder_latent64": variational_encoder,
    "vae_decoder": part(lambda: genconvit.Decoder((256, 64, 32, 16, 3), nn.LeakyReLU)),
    "vae_tiny_given_z": network_b_given_z,
    "vae_tiny_full_f32": network_b,
    "losses": losses,
    "frame_indices": positions,
    "preprocess": lambda record: {"out": genconvit.normalize(golden.inputs_of(record)["frames"])},
    "vote_a": voted,
    "vote_b": voted,
}
