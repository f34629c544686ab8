"""Multi-scale input (MSC) in training, as DeepLabV2 has it: one network sees an image at several scales.

y_s = logits of the image at scale s, at the size of the image,  y_max = max_s y_s  (class by class)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MSC_SCALES = (1.0, 0.75, 0.5)
"""DeepLabV2's."""


class MultiScale(nn.Module):
    """Has a network learn at several scales and at their maximum, each of which gets a loss of its own.

    All scales pass through in one forward, as training by many processes wants it. Only training needs this:
    to score and predict, `segmentation.inference.Views` looks at images at any scales.

    Args:
        model: maps images [B, 3, H, W] to logits [B, K, H, W].
        scales: factors on the image's sides. The sides of what is seen are of the form 8k+1.
    """

    def __init__(self, model: nn.Module, scales: Sequence[float] = MSC_SCALES) -> None:
        super().__init__()
        self.model = model
        self.scales = tuple(scales)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Map images [B, 3, H, W] to logits [B, K, H, W] of each scale, and last to the largest of them."""
        logits = [self._seen(image, scale) for scale in self.scales]
        return [*logits, torch.stack(logits).amax(0)]

    def _seen(self, image: Tensor, scale: float) -> Tensor:
        if scale == 1:
            return self.model(image)  # type: ignore[no-any-return]
        height, width = (8 * max(1, round((side - 1) * scale / 8)) + 1 for side in image.shape[-2:])
        # In bfloat16, to which autocast would turn, a CPU cannot, and pixels lose digits anywhere.
        with torch.autocast(image.device.type, enabled=False):
            smaller = F.interpolate(
                image.float(), (height, width), mode="bilinear", align_corners=False, antialias=True
            )
        logits = self.model(smaller)
        return F.interpolate(logits, image.shape[-2:], mode="bilinear", align_corners=False)
