"""A seed of a network, map or node values, as a signal on the nodes of a walk, and the answer back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from graphdiff import checks
from graphdiff.operators.base import Transition


def signal_of(seed: Tensor) -> Tensor:
    """A map [B, K, h, w] or node values [B, N, K] as [B, N, K], in float32 at least."""
    checks.floating(seed, "seed")
    if seed.ndim not in (3, 4) or 0 in seed.shape[1:]:
        raise ValueError(
            "seed: expected a map [B, K, h, w] or node values [B, N, K], of which only B may be 0, got "
            f"{checks.shape_text(seed)}"
        )
    # Strides that batch norm before or behind can do with, for one image too (`FeatureEmbedding`).
    s = seed.permute(0, 2, 3, 1).flatten(1, 2) if seed.ndim == 4 else seed
    return s.float() if s.dtype.itemsize < 4 else s


def like(seed: Tensor, y: Tensor) -> Tensor:
    """A signal [B, N, K] as a map or node values, as the seed is, in its dtype."""
    if seed.ndim == 4:
        y = y.reshape(*y.shape[:-2], *seed.shape[2:], y.shape[-1]).movedim(-1, -3)
    return y.to(seed.dtype)


def grid_of(seed: Tensor, features: Sequence[Tensor]) -> tuple[int, int] | None:
    """(h, w) of a seed that is a map, None for node values; the features must be of the same kind."""
    if any(f.ndim != seed.ndim for f in features):
        raise ValueError(
            f"features: expected {'maps [B, C, H, W]' if seed.ndim == 4 else 'node features [B, N, C]'} "
            f"with a seed of shape {checks.shape_text(seed)}, got "
            + ", ".join(checks.shape_text(f) for f in features)
        )
    return (seed.shape[-2], seed.shape[-1]) if seed.ndim == 4 else None


def fitting(P: Transition, s: Tensor) -> Transition:
    """P in float32 at least, checked to be a walk on the nodes of the signal [B, N, K]."""
    P = P.to(torch.float32) if P.dtype.itemsize < 4 else P
    checks.same_dtype(s, "seed", P.dtype, "the features")
    checks.same_device(s, "seed", P.device, "the features")
    if P.shape[-1] != s.shape[-2]:
        raise ValueError(
            f"seed: expected one value per node of the walk, which has {P.shape[-1]}, got {s.shape[-2]} nodes"
        )
    checks.broadcast_batch([P.shape[:-2], s.shape[:-2]], "features and seed")
    return P
