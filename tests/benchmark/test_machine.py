from __future__ import annotations

import json

import torch

from vitalloy.benchmark import describe


def test_the_machine_is_described_in_plain_json():
    machine = describe()
    assert json.loads(json.dumps(machine)) == machine
    assert set(machine) == {"cpu", "cores", "threads", "memory_gb", "accelerator", "os", "python", "torch"}
    assert machine["cpu"] and machine["cores"] >= 1
    assert machine["threads"] == torch.get_num_threads() and machine["torch"] == torch.__version__
    assert (machine["accelerator"] is not None) >= torch.cuda.is_available()
