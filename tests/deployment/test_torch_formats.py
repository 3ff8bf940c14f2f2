from __future__ import annotations

import pytest
import torch
from export_samples import build, pictures
from torch import nn

from vitalloy.deployment import export_pt2, export_torchscript
from vitalloy.errors import ExportError


@pytest.mark.parametrize("kind", ["deit_tiny_patch16_224", "resnet10t"])
def test_both_files_load_again_and_take_other_batch_sizes(kind, tmp_path, capfd):
    model = build(kind).train()
    script = export_torchscript(model, pictures(2), tmp_path / "model.ts")
    program = export_pt2(model, pictures(1), tmp_path / "model.pt2")
    assert capfd.readouterr() == ("", "") and model.training
    model.eval()
    images = pictures(5, 1)
    with torch.no_grad():
        expected = model(images)
        assert torch.allclose(torch.jit.load(script.path)(images), expected, atol=1e-4)
        assert torch.allclose(torch.export.load(program.path).module()(images), expected, atol=1e-4)
    for export in (script, program):
        assert export.max_abs_diff < 1e-3 and export.size_bytes == export.path.stat().st_size > 1e5
    assert sorted(tmp_path.iterdir()) == [program.path, script.path]


class BatchDependent(nn.Module):
    """A Python number made of the batch size: a trace keeps the first one."""

    def forward(self, x):
        return x.flatten(1) * float(int(x.shape[0]))


def test_a_program_that_computes_something_else_is_not_written(tmp_path):
    path = tmp_path / "model.ts"
    path.write_bytes(b"old")
    with pytest.raises(ExportError, match="BatchDependent does not compute what the model computes"):
        export_torchscript(BatchDependent(), torch.randn(2, 3, 4, 4), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_fixed_batch_and_the_errors_of_pt2(tmp_path):
    class Pairs(nn.Module):
        def forward(self, x):
            return x.flatten(1).reshape(2, -1)[:, :4] * 2

    export = export_pt2(Pairs(), torch.randn(2, 3, 4, 4), tmp_path / "pairs.pt2", dynamic_batch=False)
    assert export.max_abs_diff == 0

    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ExportError, match="Branching could not be exported to PT2") as caught:
        export_pt2(Branching(), torch.randn(2, 3, 4, 4), tmp_path / "branch.pt2")
    assert "\n" not in str(caught.value) and not (tmp_path / "branch.pt2").exists()
    with pytest.raises(ExportError, match=r"must end in \.pt2"):
        export_pt2(Pairs(), torch.randn(2, 3, 4, 4), tmp_path / "pairs.pt")
