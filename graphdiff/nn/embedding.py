"""Ψ: features of a network to the walk softmax(ψψᵀ) on the nodes of the seed (the paper, section 4)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphdiff import checks
from graphdiff.operators.attention import AttentionTransition


class FeatureEmbedding(nn.Module):
    """Ψ = pooling ∘ batch norm ∘ 1×1 convolution; its forward returns an `AttentionTransition`.

    A map finer than the grid is pooled by its maximum, a coarser one interpolated bilinearly. Node
    features [B, N, C] go through the same layers without pooling.

    With many channels the walk can collapse at the start of training: onto itself where all norms |ψ_i|
    are alike and large, onto the node of largest norm where they differ, as after pooling. `init_gain` and
    `scale` are there against both.

    Args:
        in_channels: C of the features.
        embedding_channels: d of ψ.
        init_gain: First value of the batch norm's weight, > 0.
        scale: Factor on the inner products ψ_i·ψ_j, > 0.

    Example:
        >>> import torch, graphdiff as gd
        >>> embed = gd.FeatureEmbedding(3, 8)
        >>> embed(torch.randn(2, 3, 32, 32), grid=(4, 4))
        AttentionTransition([2, 16, 16], float32, cpu, reversible, positive semidefinite)
    """

    def __init__(
        self, in_channels: int, embedding_channels: int = 64, *, init_gain: float = 1.0, scale: float = 1.0
    ) -> None:
        super().__init__()
        checks.positive_integer(in_channels, "in_channels")
        checks.positive_integer(embedding_channels, "embedding_channels")
        self.scale = checks.positive_number(scale, "scale")
        # The norm that follows subtracts any bias.
        self.conv = nn.Conv2d(in_channels, embedding_channels, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(embedding_channels)
        nn.init.constant_(self.norm.weight, checks.positive_number(init_gain, "init_gain"))

    def forward(
        self, features: Tensor, grid: tuple[int, int] | None = None, *, mask: Tensor | None = None
    ) -> AttentionTransition:
        """The walk of the features.

        Args:
            features: Maps [B, C, H, W], or node features [B, N, C].
            grid: (h, w) of the seed, for maps; their own size if None.
            mask: Which nodes of node features are real, bool [B, N]; all if None. What stands at the others
                reaches neither the statistics of the batch norm nor the walk. For eager mode.

        Returns:
            A transition on h·w nodes in row-major order, or on N; ψ is in float32 at least.

        Raises:
            TypeError: `features` are not of the dtype of the weights, outside autocast, or `mask` is not of
                bool.
            ValueError: `features` has another number of dimensions or channels, or `mask` another shape.
        """
        channels = self.conv.in_channels
        checks.floating(features, "features")
        if not torch.is_autocast_enabled(features.device.type):
            checks.same_dtype(features, "features", self.conv.weight.dtype, "the weights of the embedding")
        if mask is not None:
            if features.ndim != 3 or features.shape[2] != channels:
                raise ValueError(
                    f"features: expected node features [B, N, {channels}] with a mask, got "
                    f"{checks.shape_text(features)}"
                )
            checks.node_mask(mask, features.shape[:-1], features.device)
            # One row a real node: a map of as many samples, one pixel each.
            rows = self.norm(self.conv(features[mask][..., None, None])).flatten(1)
            rows = rows.float() if rows.dtype.itemsize < 4 else rows
            psi = rows.new_zeros(*mask.shape, rows.shape[-1])
            return AttentionTransition(psi.index_put((mask,), rows), scale=self.scale, mask=mask)
        if features.ndim == 3 and features.shape[2] == channels:
            # Nodes as a map N high and 1 wide: a 1×1 convolution is the linear layer.
            psi = self.norm(self.conv(features.mT.unsqueeze(-1)))
        elif features.ndim == 4 and features.shape[1] == channels:
            psi = _resized(self.norm(self.conv(features)), grid or (features.shape[2], features.shape[3]))
        else:
            raise ValueError(
                f"features: expected maps [B, {channels}, H, W] or node features [B, N, {channels}], got "
                f"{checks.shape_text(features)}"
            )
        # Not flatten(2).mT: for one image its gradient has strides that torch's batch norm takes for another
        # memory format than it is in, and then computes a wrong gradient from.
        psi = psi.permute(0, 2, 3, 1).flatten(1, 2)
        # Under autocast ψ arrives in half precision, in which its inner products cannot be told apart.
        return AttentionTransition(psi.float() if psi.dtype.itemsize < 4 else psi, scale=self.scale)


def embed_all(
    embeddings: nn.ModuleList,
    features: Sequence[Tensor],
    grid: tuple[int, int] | None,
    mask: Tensor | None,
) -> list[AttentionTransition]:
    """The walk of each feature on one grid: for maps that of the smallest, if None."""
    if grid is None and features[0].ndim == 4:
        smallest = min(features, key=lambda f: f.shape[-1] * f.shape[-2])
        grid = (smallest.shape[-2], smallest.shape[-1])
    return [embed(f, grid, mask=mask) for embed, f in zip(embeddings, features, strict=True)]


def _resized(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    height, width = maps.shape[-2:]
    if (height, width) == grid:
        return maps
    if height >= grid[0] and width >= grid[1]:
        return F.adaptive_max_pool2d(maps, grid)
    return F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)
