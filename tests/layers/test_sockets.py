"""Finding and swapping modules by kind, with the originals back whatever happens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitalloy.layers.sockets import find, replace, swapped


def network() -> nn.Module:
    """Linear layers outside, nested, and one under two names."""
    shared = nn.Linear(4, 4)
    inner = nn.Sequential(nn.GELU(), shared)
    return nn.ModuleDict({"a": nn.Linear(4, 4), "deep": nn.ModuleList([inner]), "again": shared})


def test_find_names_every_place():
    model = network()
    assert list(find(model, nn.Linear)) == ["a", "deep.0.1", "again"]
    assert find(model, (nn.GELU, nn.Sequential)).keys() == {"deep.0", "deep.0.0"}
    assert find(model, nn.Conv2d) == {}


def test_replace_counts_and_keeps_the_mode():
    model = network().eval()
    assert replace(model, nn.GELU, lambda name, old: nn.Sequential(nn.ReLU())) == 1
    assert isinstance(model["deep"][0][0][0], nn.ReLU) and not model["deep"][0][0].training
    assert replace(model, nn.Linear, lambda name, old: nn.Identity() if name == "a" else old) == 1
    assert isinstance(model["a"], nn.Identity) and isinstance(model["again"], nn.Linear)


def test_a_shared_module_stays_shared():
    model = network()
    replace(model, nn.Linear, lambda name, old: nn.Linear(4, 4))
    assert model["again"] is model["deep"][0][1], "one module under two names became two"
    assert model["a"] is not model["again"]


def test_the_model_itself_is_never_replaced():
    model = nn.Linear(2, 2)
    assert replace(model, nn.Linear, lambda name, old: nn.Identity()) == 0
    with swapped(model, nn.Linear, lambda name, old: nn.Identity()) as new:
        assert new == {}


def test_a_kind_inside_its_own_kind():
    model = nn.Sequential(nn.Sequential(nn.ReLU()), nn.ReLU())
    with swapped(model, nn.Sequential, lambda name, old: nn.Identity()):
        assert isinstance(model[0], nn.Identity)
    assert isinstance(model[0][0], nn.ReLU)
    nested = nn.Sequential(nn.Sequential(nn.Sequential(nn.ReLU())))
    outer, inner = nested[0], nested[0][0]
    with swapped(nested, nn.Sequential, lambda name, old: nn.Identity()) as new:
        assert new and isinstance(nested[0], nn.Identity)
    assert nested[0] is outer and nested[0][0] is inner


def test_swapped_gives_the_replacements_and_puts_the_originals_back():
    model = network()
    before = find(model, nn.Linear)
    with swapped(model, nn.Linear, lambda name, old: nn.Identity()) as new:
        assert list(new) == list(before) and not find(model, nn.Linear)
        assert new["a"] is model["a"]
    assert find(model, nn.Linear) == before


@pytest.mark.parametrize("where", ["inside", "making"])
def test_an_exception_puts_the_originals_back(where):
    model = network()
    before, state = find(model, nn.Linear), {k: v.clone() for k, v in model.state_dict().items()}

    def make(name, old):
        if where == "making" and name == "again":
            raise KeyError(name)
        return nn.Identity()

    with pytest.raises(KeyError), swapped(model, nn.Linear, make):
        raise KeyError("inside")
    assert find(model, nn.Linear) == before
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
