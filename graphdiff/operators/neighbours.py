"""The k nearest neighbours of points in space, exactly, without an N×N matrix."""

import torch
from torch import Tensor

# A tree beats comparing all pairs where space has few dimensions, and is there on the CPU alone.
MOST_DIMENSIONS_OF_A_TREE = 12
# What one block of differences may hold.
BLOCK_ELEMENTS = 2**22


def nearest_pairs(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All pairs i < j of which one is among the k nearest of the other, in ascending order; int64, [pairs].

    Points are apart from themselves, so copies of a point are its nearest. Which of several at exactly the
    same distance are taken depends on `x` alone.

    Args:
        x: Points [N, D], float64 where the device has it, finite, without a graph.
        k: How many, ≥ 1; all N − 1 others where there are no more.
    """
    nodes, k = len(x), min(k, len(x) - 1)
    if k == 0:
        nothing = torch.zeros(0, dtype=torch.int64, device=x.device)
        return nothing, nothing
    if x.device.type == "cpu" and x.shape[1] <= MOST_DIMENSIONS_OF_A_TREE:
        found = _by_tree(x, k)
    else:
        found = _by_blocks(x - x.mean(0), k)
    own = torch.arange(nodes, device=x.device).unsqueeze(-1).expand_as(found)
    key = torch.unique(torch.minimum(own, found) * nodes + torch.maximum(own, found))
    return key // nodes, key % nodes


def _by_tree(x: Tensor, k: int) -> Tensor:
    from scipy.spatial import cKDTree

    _, found = cKDTree(x.numpy()).query(x.numpy(), k + 1)
    found = torch.from_numpy(found)
    # Among many copies of a point it may not be found itself; then the last is one too many.
    itself = found == torch.arange(len(x)).unsqueeze(-1)
    surplus = torch.where(itself.any(-1), itself.to(torch.int8).argmax(-1), k)
    kept = torch.arange(k + 1) != surplus.unsqueeze(-1)
    return found[kept].reshape(len(x), k)


def _by_blocks(x: Tensor, k: int) -> Tensor:
    """Candidates by products, which are fast and lose digits; among these by differences, which do not."""
    squares = x.square().sum(-1)
    slip = 4 * (x.shape[1] + 4) * torch.finfo(x.dtype).eps * (squares.sqrt() + squares.amax().sqrt()).square()
    rows = max(1, BLOCK_ELEMENTS // len(x))
    starts = range(0, len(x), rows)
    return torch.cat([_nearest_of_block(x, squares, slip, slice(i, i + rows), k) for i in starts])


def _nearest_of_block(x: Tensor, squares: Tensor, slip: Tensor, rows: slice, k: int) -> Tensor:
    block = torch.arange(len(x), device=x.device)[rows]
    rough = squares[block].unsqueeze(-1) + squares - 2 * x[block] @ x.mT
    rough[torch.arange(len(block), device=x.device), block] = torch.inf
    limit = rough.kthvalue(k, -1).values + 2 * slip[block]
    candidates = rough <= limit.unsqueeze(-1)
    candidates[torch.arange(len(block), device=x.device), block] = False
    row, node = candidates.nonzero().unbind(-1)
    pairs = max(1, BLOCK_ELEMENTS // x.shape[1])
    pieces = [slice(i, i + pairs) for i in range(0, len(row), pairs)]
    apart = torch.cat([(x[block[row[p]]] - x[node[p]]).square().sum(-1) for p in pieces])
    # By row, in each by distance, and by number where that is equal: `nonzero` numbers in ascending order.
    order = apart.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]
    first = torch.searchsorted(row, torch.arange(len(block), device=x.device))
    return node[order][first.unsqueeze(-1) + torch.arange(k, device=x.device)]
