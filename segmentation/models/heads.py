"""What stands on the seed branch: the score head, and the importance head H or what replaces it."""

import torch
from torch import Tensor, nn


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling as in DeepLabV2: a sum of 3x3 convolutions at several dilations.

    Args:
        in_channels: channels of the feature map.
        num_classes: K, channels of the score.
        dilations: of the convolutions; (1,) is the plain 3x3 convolution of the paper's noASPP row.
    """

    def __init__(
        self, in_channels: int, num_classes: int, dilations: tuple[int, ...] = (6, 12, 18, 24)
    ) -> None:
        super().__init__()
        convs = [nn.Conv2d(in_channels, num_classes, 3, padding=d, dilation=d) for d in dilations]
        for conv in convs:
            # DeepLab's start: scores near 0, so the first losses are those of an undecided network.
            nn.init.normal_(conv.weight, std=0.01)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        self.convs = nn.ModuleList(convs)

    def forward(self, features: Tensor) -> Tensor:
        """Map features [B, C, h, w] to a score [B, K, h, w]."""
        return torch.stack([conv(features) for conv in self.convs]).sum(0)


class Importance(nn.Sequential):
    """H: the importance map M = H(x) in (0, 1) of a score map x [B, K, h, w], as [B, 1, h, w].

    Three times BN-ReLU-conv5x5 without biases, to 8, 4 and 1 channels, then a sigmoid. M starts near 0.9.
    """

    def __init__(self, num_classes: int) -> None:
        layers: list[nn.Module] = []
        for in_channels, out_channels in ((num_classes, 8), (8, 4), (4, 1)):
            layers += [
                nn.BatchNorm2d(in_channels),
                nn.ReLU(),
                nn.Conv2d(in_channels, out_channels, 5, padding=2, bias=False),
            ]
        # The seed starts as nearly the whole score. With M near 1/2, what random weights give, a step of the
        # score moves the seed half as far and its gradient is halved once more, so that the start is slow.
        # What comes out of BN and ReLU has mean 0.4, 100 values of which are summed up.
        assert isinstance(layers[-1], nn.Conv2d)
        nn.init.constant_(layers[-1].weight, 0.075)
        super().__init__(*layers, nn.Sigmoid())


class Everywhere(nn.Module):
    """M = 1 in the place of H: the whole score x [B, K, h, w] is the seed."""

    def forward(self, score: Tensor) -> Tensor:
        """Ones, [B, 1, h, w]."""
        return torch.ones_like(score[:, :1])
