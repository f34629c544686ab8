"""Walks on the pixels of an image."""

import torch
from torch import Tensor

from graphdiff import checks
from graphdiff.operators.sparse import SparseTransition

# Steps (down, right) to the neighbours, in the order of their node numbers.
_STEPS = {
    4: ((-1, 0), (0, -1), (0, 1), (1, 0)),
    8: ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)),
}


def grid_transition(image: Tensor, beta: float = 90.0, connectivity: int = 4) -> SparseTransition:
    r"""The reversible walk between neighbouring pixels that are alike.

    .. math:: P_{ij} \propto w_{ij} = \exp(-\beta \lVert I_i - I_j \rVert^2)

    Node `r * W + c` is the pixel in row r and column c. Rows are normalised in the log domain, so that a walk
    leaves even a pixel that is like none of its neighbours; an image of one pixel stays where it is.

    Args:
        image: I, shape [C, H, W], taken as given: for colours between 0 and 1 the default of `beta` is usual.
        beta: β ≥ 0, in units of 1/I²; 0 makes all neighbours alike.
        connectivity: 4 neighbours, or 8 with the diagonal ones.

    Returns:
        A `SparseTransition` on H·W nodes in the image's dtype, differentiable in `image`.

    Raises:
        TypeError: `image` is not a floating-point tensor.
        ValueError: `image` is not [C, H, W], empty or not finite, β is negative, or `connectivity` another
            number.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.grid_transition(torch.tensor([[[0.0, 0.0, 1.0]]]), beta=1.0)
        >>> P.dense()
        tensor([[0.0000, 1.0000, 0.0000],
                [0.7311, 0.0000, 0.2689],
                [0.0000, 1.0000, 0.0000]])
    """
    image = checks.floating(image, "image")
    if image.ndim != 3 or image.numel() == 0:
        raise ValueError(f"image: expected shape [C, H, W], not empty, got {checks.shape_text(image)}")
    checks.finite(image, "image")
    beta = checks.nonnegative_number(beta, "beta")
    if connectivity not in _STEPS:
        raise ValueError(f"connectivity: expected 4 or 8, got {connectivity!r}")

    _, height, width = image.shape
    nodes, device = height * width, image.device
    node = torch.arange(nodes, device=device)
    # A lone pixel has itself for a neighbour.
    down, right = torch.tensor(_STEPS[connectivity] if nodes > 1 else ((0, 0),), device=device).unbind(-1)
    row, column = (node // width).unsqueeze(-1) + down, (node % width).unsqueeze(-1) + right
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    target = torch.where(inside, row * width + column, 0)

    pixels = image.to(checks.widest(device)).flatten(1)
    distance = (pixels.unsqueeze(-1) - pixels[:, target]).square().sum(0)
    # As far as the image's dtype can tell: infinitely unlike every neighbour is equally unlike all.
    logits = (-beta * distance).clamp(min=torch.finfo(image.dtype).min).masked_fill(~inside, -torch.inf)
    numbers = torch.int32 if target.numel() < 2**31 else torch.int64
    indptr = torch.zeros(nodes + 1, dtype=numbers, device=device)
    indptr[1:] = inside.sum(-1).cumsum(0)
    return SparseTransition(
        indptr,
        target[inside].to(numbers),
        logits.softmax(-1)[inside].to(image.dtype),
        log_degree=logits.logsumexp(-1).to(image.dtype),
    )
