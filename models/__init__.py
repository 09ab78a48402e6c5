"""The networks of the paper, their official weights, and what they cost."""

from __future__ import annotations

from espkernels.models import multilabel
from espkernels.models.count import Count, count
from espkernels.models.detection import ESPNetv2Detection, espnetv2_detection
from espkernels.models.detections import Detections
from espkernels.models.espnet import ESPNet, espnet
from espkernels.models.espnetv2 import ESPNetv2, espnetv2
from espkernels.models.language_model import ERULanguageModel, eru_language_model
from espkernels.models.load import LoadReport, from_official, load_official
from espkernels.models.segmentation import ESPNetv2Segmentation, espnetv2_segmentation

__all__ = [
    "Count",
    "Detections",
    "ERULanguageModel",
    "ESPNet",
    "ESPNetv2",
    "ESPNetv2Detection",
    "ESPNetv2Segmentation",
    "LoadReport",
    "count",
    "eru_language_model",
    "espnet",
    "espnetv2",
    "espnetv2_detection",
    "espnetv2_segmentation",
    "from_official",
    "load_official",
    "multilabel",
]
