"""Graphs of different sizes as one tensor: padded with a mask, or one after another with a batch vector."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from graphdiff import checks
from graphdiff.operators.base import Transition


class Padding(NamedTuple):
    """Where each node of graphs one after another stands in a padded batch [B, N, ...]."""

    graph: Tensor
    place: Tensor
    mask: Tensor

    def pad(self, x: Tensor) -> Tensor:
        """Node values [total, C] as [B, N, C], with 0 where there is no node."""
        return x.new_zeros(*self.mask.shape, x.shape[-1]).index_put((self.graph, self.place), x)

    def unpad(self, y: Tensor) -> Tensor:
        """Node values [B, N, C] of the nodes that there are, as [total, C]."""
        return y[self.graph, self.place]


def padding_of(batch: Tensor, nodes: int) -> Padding:
    """From a PyG batch vector, the number of the graph of each node, ascending."""
    batch = checks.integers(batch, "batch").long()
    checks.shaped(batch, "batch", [nodes], "the graph of every node")
    if bool((batch < 0).any()) or bool((batch.diff() < 0).any()):
        raise ValueError(
            "batch: expected graph numbers ≥ 0 in ascending order, as PyG makes them, got a smallest one of "
            f"{int(batch.min())} and a smallest step of {int(batch.diff().min())}; sort the nodes by graph"
        )
    sizes = torch.bincount(batch)
    starts = sizes.cumsum(0) - sizes
    place = torch.arange(nodes, device=batch.device) - starts[batch]
    mask = torch.arange(int(sizes.max()), device=batch.device) < sizes.unsqueeze(-1)
    return Padding(batch, place, mask)


def unbatched(
    seed: Tensor, features: Sequence[Tensor] | Sequence[Transition], batch: Tensor, mask: Tensor | None
) -> tuple[Tensor, list[Tensor], Padding]:
    """Seed and features of graphs one after another, padded."""
    if mask is not None:
        raise ValueError("mask, batch: expected one of them, got both")
    checks.floating(seed, "seed")
    if seed.ndim != 2 or seed.numel() == 0:
        raise ValueError(
            f"seed: expected node values [total, K] beside batch=, not empty, got {checks.shape_text(seed)}"
        )
    checks.same_device(batch, "batch", seed.device, "seed")
    padding = padding_of(batch, len(seed))
    padded = []
    for feature in features:
        if isinstance(feature, Transition) or feature.ndim != 2 or len(feature) != len(seed):
            given = repr(feature) if isinstance(feature, Transition) else checks.shape_text(feature)
            raise ValueError(
                f"features: expected node features [total, C] beside batch=, total = {len(seed)}, got {given}"
            )
        padded.append(padding.pad(feature))
    return padding.pad(seed), padded, padding


def check_no_mask(mask: Tensor | None) -> None:
    """Ready walks know which of their nodes are real."""
    if mask is not None:
        raise ValueError(
            "mask: expected none beside ready transitions; give it to them, as in "
            "AttentionTransition(psi, mask=mask)"
        )


def real_seed(s: Tensor, operators: Sequence[Transition]) -> Tensor:
    """The signal with 0 at the nodes that the walks say are padded."""
    for P in operators:
        s = checks.real(s, P.mask)
    return s
