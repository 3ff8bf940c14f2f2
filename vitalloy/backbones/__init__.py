"""One published architecture a file, registered here and with timm: `timm.create_model` and
segmentation-models-pytorch's `tu-` encoders know them after `import vitalloy.backbones`.

Each file reads top to bottom: parts, the model, its variants. What they share lives in `vitalloy.layers`.
"""

import importlib
import pkgutil

for _found in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_found.name}")
