"""Sim-DeepLab, the paper's baseline: DeepLabV2 without CRF, multi-scale input and COCO.

logits = bilinear upsampling of ASPP(dilated ResNet(image))
"""

from torch import Tensor, nn
from torch.nn import functional as F

from segmentation.models.backbone import channels, network
from segmentation.models.heads import ASPP


class SimDeepLab(nn.Module):
    """DeepLabV2 reduced to atrous convolution and ASPP.

    Args:
        backbone: "resnet50", or another of timm's names.
        num_classes: K.
        aspp: False puts one plain 3x3 convolution in the place of ASPP.
    """

    def __init__(self, backbone: str, num_classes: int, aspp: bool = True) -> None:
        super().__init__()
        self.backbone = network(backbone, layers=(4,))
        self.score = score_head(channels(backbone)[3], num_classes, aspp)

    @property
    def backbones(self) -> list[nn.Module]:
        """The networks that may start from pretrained weights."""
        return [self.backbone]

    def forward(self, image: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to logits [B, K, H, W]."""
        (features,) = self.backbone(image)
        return upsample(self.score(features), image)


def score_head(in_channels: int, num_classes: int, aspp: bool) -> ASPP:
    """ASPP, or one plain 3x3 convolution."""
    return ASPP(in_channels, num_classes) if aspp else ASPP(in_channels, num_classes, dilations=(1,))


def upsample(score: Tensor, image: Tensor) -> Tensor:
    """Bilinear upsampling of a score [B, K, h, w] to the size of the image [B, 3, H, W]."""
    # Point (i, j) of a stride-8 ResNet is centred on pixel (8i, 8j): corners are aligned, exactly so at sizes
    # 8k+1.
    return F.interpolate(score, size=image.shape[-2:], mode="bilinear", align_corners=True)
