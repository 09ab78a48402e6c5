"""Fast kernels for light-weight pyramid networks: the EESP unit of ESPNetv2, its operators, layers and networks."""

from __future__ import annotations

from espkernels import reference
from espkernels.backends import use_backend
from espkernels.ops import group_pointwise, pyramid_pointwise, spatial_pyramid

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "group_pointwise",
    "pyramid_pointwise",
    "reference",
    "spatial_pyramid",
    "use_backend",
]
