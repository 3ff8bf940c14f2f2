"""system/case -> how the public API computes what the golden record holds; one file a system, or its SYSTEM.

A row is a callable from the record to named outputs. `common.Model` covers the usual case: build by name, load the
authors' state dict, run, and read inner tensors with hooks on modules of the recorded names.
"""

import importlib
import pkgutil
from collections.abc import Callable

from torch import Tensor

CASES: dict[str, Callable[[dict], dict[str, Tensor]]] = {
    f"{getattr(module, 'SYSTEM', found.name)}/{case}": row
    for found in pkgutil.iter_modules(__path__)
    if found.name != "common"
    for module in [importlib.import_module(f"{__name__}.{found.name}")]
    for case, row in module.CASES.items()
}
