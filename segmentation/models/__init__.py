"""DifNet, Sim-DeepLab and their parts."""

from segmentation.models.deeplab import SimDeepLab
from segmentation.models.difnet import DifNet, DifNetMaps

__all__ = ["DifNet", "DifNetMaps", "SimDeepLab"]
