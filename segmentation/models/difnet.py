"""DifNet (the paper's Figure 1): a seed branch says what, a similarity branch says where it spreads.

x = seed branch(image),  M = H(x),  s = M x
P_t = softmax(Ψ_t(f_t) Ψ_t(f_t)ᵀ)              f_t: the image and the similarity branch's layers
y⁰ = s,  y^{t+1} = β_t (µ_t P_t y^t + (1 − µ_t) s) + (1 − β_t) y^t        (Eq. 5)

In the place of the cascade one exact diffusion may stand, y = (1 − µ)(I − µP)⁻¹ s (Eq. 2), as in the networks
that invert a matrix or solve a linear system, or nothing, y = s.
"""

import math
from dataclasses import dataclass
from typing import Literal, overload

from torch import Tensor, nn
from torch.nn import functional as F

import graphdiff as gd
from segmentation.models.backbone import channels, network
from segmentation.models.deeplab import score_head, upsample
from segmentation.models.heads import Everywhere, Importance

WALKS = (0, 1, 2, 3, 4)
"""Walk 0 reads the image, walk t > 0 the output of the similarity branch's layer t."""


@dataclass(frozen=True)
class DifNetMaps:
    """What happens inside DifNet on the way to its logits; h x w is the grid of the walks.

    Args:
        score: x [B, K, h, w].
        importance: M [B, 1, h, w].
        seed: s = M x [B, K, h, w].
        walks: output of each step of the diffusion, [B, K, h, w] each: of every walk of a cascade, of one
            exact diffusion, or none. The last, or the seed where there is none, is what is upsampled.
        logits: [B, K, H, W].
    """

    score: Tensor
    importance: Tensor
    seed: Tensor
    walks: list[Tensor]
    logits: Tensor


class DifNet(nn.Module):
    """Diffuses a score over the image by a cascade of learned random walks, or by what it is compared with.

    Args:
        backbone: "resnet50", or another of timm's names, for both branches.
        num_classes: K.
        aspp: False puts one plain 3x3 convolution in the place of ASPP (the paper's noASPP).
        walks: which of the five walks to take, in rising order; (0, 2, 4) is the paper's "without 2-th
            and 4-th".
        grid_stride: pixels between neighbouring nodes of the walks' grid.
        similarity_backbone: another one for the similarity branch.
        affinity_scale: factor on the inner products ψ_i·ψ_j; the paper's is 1.
        diffusion: "cascade", the paper's; "exact", one exact diffusion whose ψ holds the embeddings of all
            walks side by side; "none", the seed is upsampled as it is, and there is no similarity branch.
        transitions: "hierarchical", each walk of a cascade has a P_t of its own; "last", all share the P of
            the last of `walks`.
        fixed_mu: value in [0, 1) to fix every µ_t at; None learns them.
        fixed_beta: value in [0, 1] to fix every β_t of a cascade at; None learns them.
        importance: False puts M = 1 in the place of H.
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
        diffusion: Literal["cascade", "exact", "none"] = "cascade",
        transitions: Literal["hierarchical", "last"] = "hierarchical",
        fixed_mu: float | None = None,
        fixed_beta: float | None = None,
        importance: bool = True,
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
        self.importance = Importance(num_classes) if importance else Everywhere()
        sources = {"hierarchical": walks, "last": walks[-1:]}[transitions] if diffusion != "none" else ()
        layers = tuple(walk for walk in sources if walk > 0)
        similarity = similarity_backbone or backbone
        self.similarity_branch = network(similarity, layers) if layers else None
        self._walks_on_image = 0 in sources
        maps = [3 if walk == 0 else channels(similarity)[walk - 1] for walk in sources]
        mu, learn_mu = (0.5, True) if fixed_mu is None else (fixed_mu, False)
        beta, learn_beta = (0.5, True) if fixed_beta is None else (fixed_beta, False)
        self.cascade: gd.CascadedWalk | gd.Diffusion | None = None
        self.shared: gd.FeatureEmbedding | None = None
        if diffusion == "exact":
            self.cascade = gd.Diffusion(maps, mu=mu, learn_mu=learn_mu, scale=affinity_scale)
        elif diffusion == "cascade" and transitions == "last":
            self.shared = gd.FeatureEmbedding(maps[0], scale=affinity_scale)
            self.cascade = gd.CascadedWalk(
                steps=len(walks), mu=mu, beta=beta, learn_mu=learn_mu, learn_beta=learn_beta
            )
        elif diffusion == "cascade":
            self.cascade = gd.CascadedWalk(
                maps, mu=mu, beta=beta, learn_mu=learn_mu, learn_beta=learn_beta, scale=affinity_scale
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
        walks: list[Tensor] = []
        if self.cascade is not None:
            _, walks = self.cascade(seed, self.transitions(image), return_walks=True)
        logits = upsample([seed, *walks][-1], image)
        return DifNetMaps(score, importance, seed, walks, logits) if return_maps else logits

    def similarity_features(self, image: Tensor) -> list[Tensor]:
        """The maps the transitions are made from, in the order of the walks, at sizes of their own."""
        layers = [] if self.similarity_branch is None else self.similarity_branch(image)
        return [image, *layers] if self._walks_on_image else layers

    def transitions(self, image: Tensor) -> list[gd.Transition]:
        """The operators P_t over this image's grid, one for each of `steps`."""
        if self.cascade is None:
            return []
        features, grid = self.similarity_features(image), self._grid(image)
        if self.shared is not None:
            return [self.shared(features[0], grid)] * len(self.walks)
        return self.cascade.transitions(features, grid)

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the steps of the diffusion: the numbers of a cascade's walks, "exact", or none."""
        if self.cascade is None:
            return ()
        return ("exact",) if isinstance(self.cascade, gd.Diffusion) else tuple(str(t) for t in self.walks)

    @property
    def coefficients(self) -> dict[str, Tensor]:
        """µ and β of each of `steps`, under "mu" and "beta", as far as the diffusion has them."""
        if isinstance(self.cascade, gd.CascadedWalk):
            return {"mu": self.cascade.mu, "beta": self.cascade.beta}
        return {} if self.cascade is None else {"mu": self.cascade.mu}

    def _grid(self, image: Tensor) -> tuple[int, int]:
        height, width = image.shape[-2:]
        return math.ceil(height / self.grid_stride), math.ceil(width / self.grid_stride)

    def _on_grid(self, score: Tensor, image: Tensor) -> Tensor:
        grid = self._grid(image)
        if score.shape[-2:] == grid:
            return score
        return F.interpolate(score, size=grid, mode="bilinear", align_corners=True)
