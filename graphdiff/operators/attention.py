"""P = softmax(scale · ψψᵀ): the walk of DifNet's features, never stored as a matrix.

The one product behind it, for queries q [B, N, d], keys k [B, M, d] and values y [B, M, K]:

    A = q kᵀ,   lse_i = log Σ_j exp(A_ij),   P = exp(A − lse),   value = P y.

Value and log-sum-exp are both differentiable outputs; the second is the log-degree of the walk, and with
it the transposed product is the same operation again: (Pᵀv)_j = Σ_i exp(A_ij − lse_i) v_i.

Two kernels compute it in O(N) memory: torch's fused attention where it runs on the CPU (the fastest of
those measured by benchmarks/attention.py), row blocks in plain torch elsewhere and for second derivatives.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from graphdiff import checks
from graphdiff.operators.base import Transition

# What one block of rows may hold. Larger blocks are not faster on a CPU and idle no GPU.
BLOCK_ELEMENTS = 2**22
# A logit whose exponential is 0 beside any other, and finite, for gradients multiply it by 0.
NEVER = -1e30


@dataclass(frozen=True, eq=False, repr=False)
class AttentionTransition(Transition):
    """The reversible walk P[i, j] ∝ exp(scale · ψ_i·ψ_j).

    Memory is O(N(d + K)) for a product with K signals, forward and backward. exp(scale · ψ_i·ψ_j) is a
    positive semi-definite kernel, so every eigenvalue of P lies in [0, 1].

    Args:
        psi: Features ψ, shape [..., N, d]. Half precision is multiplied in float32: near 64, where the
            squared norms of 64 normalised channels lie, the step of bfloat16 is 0.5.
        scale: Factor on the inner products, finite and > 0; 1 in the paper (section 4).
        mask: Which nodes are real, bool, shape [..., N], where graphs are padded to one size; all if None.
            The others are never stepped to and stay where they are; their features are set to 0 and do not
            count.

    Raises:
        TypeError: `psi` is not a floating-point tensor, or `mask` not of bool.
        ValueError: `psi` has fewer than two dimensions or is empty, `scale` is not positive, or `mask` has
            another shape.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.AttentionTransition(torch.zeros(3, 2))
        >>> P @ torch.tensor([0.0, 3.0, 6.0])
        tensor([3., 3., 3.])
        >>> P.rows([0])
        tensor([[0.3333, 0.3333, 0.3333]])
    """

    psi: Tensor
    scale: float = field(default=1.0, kw_only=True)
    mask: Tensor | None = field(default=None, kw_only=True)

    reversible = True
    positive_semidefinite = True
    entrywise = True

    def __post_init__(self) -> None:
        psi = checks.floating(self.psi, "psi")
        if psi.ndim < 2 or psi.numel() == 0:
            raise ValueError(f"psi: expected shape [..., N, d], not empty, got {checks.shape_text(psi)}")
        checks.positive_number(self.scale, "scale")
        if self.mask is not None:
            checks.node_mask(self.mask, psi.shape[:-1], psi.device)
            object.__setattr__(self, "psi", checks.real(psi, self.mask))

    @property
    def shape(self) -> torch.Size:
        """[..., N, N]."""
        return torch.Size([*self.psi.shape[:-1], self.psi.shape[-2]])

    @property
    def log_degree(self) -> Tensor:
        """The log-sum-exp of each row of scale · ψψᵀ, [..., N], differentiable.

        A padded node may have any; with its ψ = 0 it has the log of the number of real ones, which is not
        above the largest of theirs.
        """
        nothing = self.psi.new_zeros(*self.psi.shape[:-1], 1)
        return attention(*self._query_key(), nothing)[1]

    def _query_key(self) -> tuple[Tensor, Tensor]:
        """Queries and keys; with a mask each is one longer, which adds NEVER to what leads to padding."""
        psi = _at_least_float32(self.psi)
        if self.mask is None:
            return self.scale * psi, psi
        ones = torch.ones_like(psi[..., :1])
        never = ones.masked_fill(self.mask.unsqueeze(-1), 0.0) * NEVER
        return torch.cat([self.scale * psi, ones], -1), torch.cat([psi, never], -1)

    def matmul(self, y: Tensor) -> Tensor:
        """P y."""
        return self._staying(attention(*self._query_key(), checks.real(y, self.mask))[0], y)

    def rmatmul(self, v: Tensor) -> Tensor:
        """Pᵀ v, as attention over columns with −lse added to every logit of a row."""
        query, key = self._query_key()
        lse = _at_least_float32(self.log_degree).unsqueeze(-1)
        value, log_mass = attention(
            torch.cat([query, torch.ones_like(lse)], -1),
            torch.cat([key, -lse], -1),
            checks.real(v, self.mask),
        )
        return self._staying(value * log_mass.unsqueeze(-1).exp(), v)

    def vjp(self, y: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """P y and the gradient in ψ, by the kernels; so it serves below autograd too."""
        query, key = self._query_key()
        real_y, real_v = checks.real(y, self.mask), checks.real(v, self.mask)
        product, g_query, g_key = attention_vjp(query, key, real_y, real_v)
        g_psi = (self.scale * g_query + g_key)[..., : self.psi.shape[-1]].to(self.dtype)
        return self._staying(product, y), (checks.real(g_psi, self.mask),)

    def rows(self, index: Tensor | Sequence[int]) -> Tensor:
        """The rows P[index], [..., len(index), N]."""
        query, key = self._query_key()
        index = self._row_index(index)
        with torch.autocast(self.device.type, enabled=False):
            logits = query[..., index, :] @ key.mT
        rows = torch.softmax(logits, -1).to(self.dtype)
        if self.mask is None:
            return rows
        itself = torch.eye(self.shape[-1], dtype=self.dtype, device=self.device)[index]
        return torch.where(self.mask[..., index].unsqueeze(-1), rows, itself)

    def dense(self) -> Tensor:
        """The N×N matrix."""
        return self.rows(torch.arange(self.shape[-1], device=self.device))

    def rounding(self, dtype: torch.dtype) -> Tensor | float:
        """Of the sum, and of the logits, whose absolute error is a relative one of P's entries."""
        logits = (self.psi.shape[-1] + 2) * torch.finfo(dtype).eps * self._largest_logit(dtype)
        return self.sum_rounding(dtype) + logits

    def degree_rounding(self, dtype: torch.dtype) -> Tensor | float:
        """Of the sum, its logarithm and the logits."""
        largest = self._largest_logit(dtype) + math.log(self.shape[-1])
        return self.sum_rounding(dtype) + (self.psi.shape[-1] + 3) * torch.finfo(dtype).eps * largest

    def transposed_rounding(self, dtype: torch.dtype) -> Tensor | float:
        """Besides, of the log-sum-exp of each row, which is one more term of as large logits."""
        largest = 2 * self._largest_logit(dtype) + math.log(self.shape[-1])
        return self.sum_rounding(dtype) + (self.psi.shape[-1] + 3) * torch.finfo(dtype).eps * largest

    def _largest_logit(self, dtype: torch.dtype) -> Tensor:
        squares = self.psi.detach().to(dtype).square().sum(-1, keepdim=True)
        return self.scale * squares.amax(-2, keepdim=True)


def attention(query: Tensor, key: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ) y and the log-sum-exp of the rows of q kᵀ, both differentiable, twice.

    Args:
        query: [..., N, d].
        key: [..., M, d].
        y: [..., M, K]; leading dimensions broadcast.

    Returns:
        value [..., N, K] and lse [..., N], in the dtype of `y`; computed in float32 at least.
    """
    batch, flat = _flattened(query, key, y)
    value, lse = _attention(*flat)
    value = value.reshape(*batch, query.shape[-2], y.shape[-1])
    return value.to(y.dtype), lse.reshape(*batch, query.shape[-2]).to(y.dtype)


def attention_vjp(query: Tensor, key: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(q kᵀ) y, and the gradients of Σ g ⊙ softmax(q kᵀ) y in q and k; all differentiable."""
    batch, flat = _flattened(query, key, y, g)
    value, lse = _attention(*flat[:3])
    g_query, g_key, _ = _attention_backward(*flat[:3], value, lse, flat[3], torch.zeros_like(lse))
    shaped = [x.reshape(*batch, *x.shape[-2:]) for x in (value, g_query, g_key)]
    return shaped[0].to(y.dtype), shaped[1].sum_to_size(query.shape), shaped[2].sum_to_size(key.shape)


def _flattened(*arguments: Tensor) -> tuple[torch.Size, list[Tensor]]:
    """The common leading shape, and the arguments with one leading dimension, in float32 at least."""
    batch = checks.broadcast_batch([x.shape[:-2] for x in arguments], "query, key and y")
    return batch, [
        _at_least_float32(x).expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in arguments
    ]


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# --- The operation and its derivative, each one operator of torch's, so that torch.compile need not look in.


@torch.library.custom_op("graphdiff::attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        return (fused_forward if query.device.type == "cpu" else blocked_forward)(query, key, y)


@_attention.register_fake
def _(query: Tensor, key: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    nodes = query.shape[:-1]
    return y.new_empty(*nodes, y.shape[-1]), query.new_empty(nodes)


@torch.library.custom_op("graphdiff::attention_backward", mutates_args=())
def _attention_backward(
    query: Tensor, key: Tensor, y: Tensor, value: Tensor, lse: Tensor, g_value: Tensor, g_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        kernel = fused_backward if query.device.type == "cpu" else blocked_backward
        return kernel(query, key, y, value, lse, g_value, g_lse)


@_attention_backward.register_fake
def _(
    query: Tensor, key: Tensor, y: Tensor, value: Tensor, lse: Tensor, g_value: Tensor, g_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), y.new_empty(y.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    # The outputs are saved with their graph: without it second derivatives would miss d lse.
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, g_value: Tensor, g_lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grads: tuple[Tensor, Tensor, Tensor] = _attention_backward(*ctx.saved_tensors, g_value, g_lse)
    return grads


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _double_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that differentiating stops at this node's inputs and does not run on through their graph.
        inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in ctx.saved_tensors]
        grads = blocked_backward(*inputs)
        return torch.autograd.grad(grads, inputs, cotangents, create_graph=recorded, allow_unused=True)


_attention.register_autograd(_backward, setup_context=_save)
_attention_backward.register_autograd(_double_backward, setup_context=_save_inputs)


# --- Kernel 1: torch's fused attention on the CPU.


def _padded(x: Tensor, width: int) -> Tensor:
    """x [B, N, d] as [B, 1 head, N, width], filled up with zeros and contiguous.

    Below the door of torch's public function the kernel takes the last stride to be 1, unasked.
    """
    return torch.nn.functional.pad(x, (0, width - x.shape[-1])).contiguous().unsqueeze(1)


def _width(channels: int, dtype: torch.dtype) -> int:
    """Channels rounded up to whole 64-byte lines.

    Matrix products round differently where memory is aligned differently: with whole lines every graph of a
    batch starts as it would alone, and its answer has the same bits in any company.
    """
    line = 64 // dtype.itemsize
    return -(-channels // line) * line


def fused_forward(query: Tensor, key: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Value and log-sum-exp by torch's fused CPU attention, which wants values as wide as keys."""
    nodes, channels = query.shape[-2], y.shape[-1]
    width = _width(max(query.shape[-1], channels), y.dtype)
    # Below 32 queries the kernel's own scratch memory would not consist of whole lines either.
    query = torch.nn.functional.pad(query, (0, 0, 0, max(0, 32 - nodes)))
    value, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _padded(query, width), _padded(key, width), _padded(y, width), scale=1.0
    )
    return value[:, 0, :nodes, :channels].contiguous(), lse[:, 0, :nodes].to(query.dtype).contiguous()


def fused_backward(
    query: Tensor, key: Tensor, y: Tensor, value: Tensor, lse: Tensor, g_value: Tensor, g_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in query, key and y by torch's fused backward.

    That one knows no cotangent of the log-sum-exp. It takes δ_i = Σ_k g_ik value_ik for the softmax, and we
    need δ_i − g_lse_i: one more column, with 1 in g, −g_lse in the value and 0 in y, adds just that.
    """
    channels = y.shape[-1]
    width = _width(max(query.shape[-1], channels + 1), y.dtype)
    g = _padded(torch.cat([g_value, torch.ones_like(g_lse).unsqueeze(-1)], -1), width)
    out = _padded(torch.cat([value, -g_lse.unsqueeze(-1)], -1), width)
    g_query, g_key, g_y = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        g,
        _padded(query, width),
        _padded(key, width),
        _padded(y, width),
        out,
        lse.unsqueeze(1),
        0.0,
        False,
        scale=1.0,
    )
    depth = query.shape[-1]
    return (
        g_query[:, 0, :, :depth].contiguous(),
        g_key[:, 0, :, :depth].contiguous(),
        g_y[:, 0, :, :channels].contiguous(),
    )


# --- Kernel 2: row blocks in plain torch, on any device; also the differentiable form of the backward.


def _row_blocks(query: Tensor, key: Tensor) -> list[slice]:
    rows = max(1, BLOCK_ELEMENTS // (query.shape[0] * key.shape[-2]))
    return [slice(start, start + rows) for start in range(0, query.shape[-2], rows)]


def blocked_forward(query: Tensor, key: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Value and log-sum-exp, a block of rows at a time."""
    values, sums = [], []
    for block in _row_blocks(query, key):
        logits = query[:, block] @ key.mT
        lse = logits.logsumexp(-1)
        values.append((logits - lse.unsqueeze(-1)).exp_() @ y)
        sums.append(lse)
    return torch.cat(values, 1), torch.cat(sums, 1)


def _block_backward(
    query: Tensor, key: Tensor, y: Tensor, lse: Tensor, g_value: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    P = (query @ key.mT - lse.unsqueeze(-1)).exp()
    g_logits = P * (g_value @ y.mT + shift.unsqueeze(-1))
    return g_logits @ key, g_logits.mT @ query, P.mT @ g_value


def blocked_backward(
    query: Tensor, key: Tensor, y: Tensor, value: Tensor, lse: Tensor, g_value: Tensor, g_lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in query, key and y, a block of rows at a time.

    With ∂L/∂A_ij = P_ij (g_i·y_j + g_lse_i − g_i·value_i). Under autograd each block is computed again
    rather than kept, so second derivatives need no N×N matrix either.
    """
    shift = g_lse - (g_value * value).sum(-1)
    g_query, g_key, g_y = [], key.new_zeros(key.shape), y.new_zeros(y.shape)
    for block in _row_blocks(query, key):
        arguments = (query[:, block], key, y, lse[:, block], g_value[:, block], shift[:, block])
        if torch.is_grad_enabled():
            rows, columns, values = checkpoint(
                _block_backward, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        else:
            rows, columns, values = _block_backward(*arguments)
        g_query.append(rows)
        g_key = g_key + columns
        g_y = g_y + values
    return torch.cat(g_query, 1), g_key, g_y
