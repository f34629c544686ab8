"""DifNet, Sim-DeepLab and their parts."""

from segmentation.models.deeplab import SimDeepLab
from segmentation.models.difnet import DifNet, DifNetMaps
from segmentation.models.multiscale import MSC_SCALES, MultiScale

__all__ = ["MSC_SCALES", "DifNet", "DifNetMaps", "MultiScale", "SimDeepLab"]
