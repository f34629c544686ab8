"""DifNet (the paper's Figure 1): a seed branch says what, a similarity branch says where it spreads.

x = seed branch(image),  M = H(x),  s = M x
P_t = softmax(Ψ_t(f_t) Ψ_t(f_t)ᵀ)              f_t: the image and the similarity branch's layers
y⁰ = s,  y^{t+1} = β_t (µ_t P_t y^t + (1 − µ_t) s) + (1 − β_t) y^t        (Eq. 5)
"""

import math
from dataclasses import dataclass
from typing import Literal, overload

from torch import Tensor, nn
from torch.nn import functional as F

import graphdiff as gd
from segmentation.models.backbone import channels, network
from segmentation.models.deeplab import score_head, upsample
from segmentation.models.heads import Importance

WALKS = (0, 1, 2, 3, 4)
"""Walk 0 reads the image, walk t > 0 the output of the similarity branch's layer t."""


@dataclass(frozen=True)
class DifNetMaps:
    """What happens inside DifNet on the way to its logits; h x w is the grid of the walks.

    Args:
        score: x [B, K, h, w].
        importance: M [B, 1, h, w].
        seed: s = M x [B, K, h, w].
        walks: output of each walk, [B, K, h, w] each; the last is what is upsampled.
        logits: [B, K, H, W].
    """

    score: Tensor
    importance: Tensor
    seed: Tensor
    walks: list[Tensor]
    logits: Tensor


class DifNet(nn.Module):
    """Diffuses a score over the image by a cascade of learned random walks.

    Args:
        backbone: "resnet50", or another of timm's names, for both branches.
        num_classes: K.
        aspp: False puts one plain 3x3 convolution in the place of ASPP (the paper's noASPP).
        walks: which of the five walks to take, in rising order; (0, 2, 4) is the paper's "without 2-th
            and 4-th".
        grid_stride: pixels between neighbouring nodes of the walks' grid.
        similarity_backbone: another one for the similarity branch.
        affinity_scale: factor on the inner products ψ_i·ψ_j; the paper's is 1.
    """

    def __init__(
        self,
        backbone: str,
        num_classes: int,
        aspp: bool = True,
        walks: tuple[int, ...] = WALKS,
        grid_stride: int = 8,
        similarity_backbone: str | None = None,
        affinity_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not walks or any(walk not in WALKS for walk in walks) or list(walks) != sorted(set(walks)):
            raise ValueError(
                f"expected walks to be distinct numbers from {WALKS} in rising order, got {walks}"
            )
        self.walks = walks
        self.grid_stride = grid_stride
        self.seed_branch = network(backbone, layers=(4,))
        self.score = score_head(channels(backbone)[3], num_classes, aspp)
        self.importance = Importance(num_classes)
        layers = tuple(walk for walk in walks if walk > 0)
        similarity = similarity_backbone or backbone
        self.similarity_branch = network(similarity, layers) if layers else None
        self.cascade = gd.CascadedWalk(
            [3 if walk == 0 else channels(similarity)[walk - 1] for walk in walks], scale=affinity_scale
        )

    @property
    def backbones(self) -> list[nn.Module]:
        """The networks that may start from pretrained weights."""
        return (
            [self.seed_branch]
            if self.similarity_branch is None
            else [self.seed_branch, self.similarity_branch]
        )

    @overload
    def forward(self, image: Tensor, return_maps: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(self, image: Tensor, return_maps: Literal[True]) -> DifNetMaps: ...

    def forward(self, image: Tensor, return_maps: bool = False) -> Tensor | DifNetMaps:
        """Map images [B, 3, H, W] to logits [B, K, H, W], or to all maps on the way."""
        (features,) = self.seed_branch(image)
        score = self._on_grid(self.score(features), image)
        importance = self.importance(score)
        seed = importance * score
        _, walks = self.cascade(seed, self.similarity_features(image), return_walks=True)
        logits = upsample(walks[-1], image)
        return DifNetMaps(score, importance, seed, walks, logits) if return_maps else logits

    def similarity_features(self, image: Tensor) -> list[Tensor]:
        """The maps the walks' transitions are made from, one per walk, at sizes of their own."""
        layers = [] if self.similarity_branch is None else self.similarity_branch(image)
        return [image, *layers] if 0 in self.walks else layers

    def transitions(self, image: Tensor) -> list[gd.Transition]:
        """The operators P_t of the walks over this image's grid."""
        return self.cascade.transitions(self.similarity_features(image), grid=self._grid(image))

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the steps of the diffusion: the numbers of the walks."""
        return tuple(str(t) for t in self.walks)

    @property
    def coefficients(self) -> dict[str, Tensor]:
        """µ and β of each of `steps`, under "mu" and "beta"."""
        return {"mu": self.cascade.mu, "beta": self.cascade.beta}

    def _grid(self, image: Tensor) -> tuple[int, int]:
        height, width = image.shape[-2:]
        return math.ceil(height / self.grid_stride), math.ceil(width / self.grid_stride)

    def _on_grid(self, score: Tensor, image: Tensor) -> Tensor:
        grid = self._grid(image)
        if score.shape[-2:] == grid:
            return score
        return F.interpolate(score, size=grid, mode="bilinear", align_corners=True)
