"""What `compress` is asked to do, read and refused."""

from __future__ import annotations

import pytest

from vitalloy.errors import CompressionError
from vitalloy.runs.plan import Plan


def test_methods_are_joined_and_options_go_to_the_steps_that_have_them():
    plan = Plan.of("sit+lpvit+int8", options={"macs": 0.5, "sit.macs": 0.7, "epochs": 3, "pattern": "aligned"})
    (sit, of_sit), (lpvit, of_lpvit) = plan.reducers
    assert (sit, lpvit, plan.last, plan.name) == ("sit", "lpvit", "int8", "sit+lpvit+int8")
    assert of_sit == {"macs": 0.7, "epochs": 3} and of_lpvit == {"macs": 0.5, "epochs": 3, "pattern": "aligned"}
    assert Plan.of(["lgvit"]).last is None and Plan.of("auto") == Plan((), "auto")
    assert Plan.of("sit+aphq", weights=4).options == {"weights": 4}
    trained = plan.with_training([1])
    assert all(options["train"] == [1] for _, options in trained.reducers) and plan.learns() == ["sit", "lpvit"]


@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("sat", {}, "Did you mean 'sit'"),
        ("int8+sit", {}, "comes last"),
        ("lgvit+sit", {}, "lgvit comes behind"),
        ("sit+sit", {}, "named twice"),
        ("sit", {"weights": 4}, "name a quantizer behind it"),
        ("sit+int8", {"weights": 4}, "works in 8 bits"),
        ("sit", {"kept": 0.5}, "has no option 'kept'"),
        ("sit+int8", {"lpvit.macs": 0.5}, "none of sit, int8"),
        ("int8", {"rounds": 3}, "no options"),
    ],
)
def test_what_cannot_work_is_named(method, options, says):
    bits = {name: options.pop(name) for name in ("weights", "activations") if name in options}
    with pytest.raises(CompressionError) as caught:
        Plan.of(method, **bits, options=options)
    assert says in str(caught.value) and "\n" not in str(caught.value)
