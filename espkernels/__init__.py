"""Fast kernels for light-weight pyramid networks: the EESP unit of ESPNetv2, its operators, layers and networks."""

from __future__ import annotations

from espkernels import nn, reference
from espkernels.backends import use_backend
from espkernels.explain import explain
from espkernels.freeze import freeze
from espkernels.ops import group_pointwise, pyramid_pointwise, spatial_pyramid
from espkernels.replace import replace, restore

from espkernels import models  # isort: skip  built on all of the above

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "explain",
    "freeze",
    "group_pointwise",
    "models",
    "nn",
    "pyramid_pointwise",
    "reference",
    "replace",
    "restore",
    "spatial_pyramid",
    "use_backend",
]
