"""P = softmax(scale · ψψᵀ): the walk of DifNet's features, never stored as a matrix.

Behind it are three operations, on ψ [B, N, d] (√scale·ψ), weights w [B, N] of the nodes (1, or 0 at padded
ones) and signals [B, N, K], each computed in O(N) memory: on a GPU by `fused`, in Triton, where that has what
it needs; on the CPU by `tiles`, compiled, where numba is installed; else by `strips`, in torch. But where
those would be used on a CPU, the matrix is small and several threads share the work, it is built, and kept
for the backward, for that is faster:

    attention             lse_i = log Σ_j w_j exp(ψ_i·ψ_j),   P_ij = w_j exp(ψ_i·ψ_j − lse_i),   value = P y
    attention_transposed  Pᵀ v
    attention_backward    the gradients of the first

Value and log-sum-exp are both differentiable outputs; the second is the log-degree of the walk.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from graphdiff import checks
from graphdiff.operators import strips
from graphdiff.operators.base import Transition
from graphdiff.operators.held import HeldTransition, whole_lines

# A matrix of so many bytes, two of them in a batch, is faster built, where there are threads for it.
WHOLE = 2**24


@dataclass(frozen=True, eq=False, repr=False)
class AttentionTransition(Transition):
    """The reversible walk P[i, j] ∝ exp(scale · ψ_i·ψ_j).

    Memory is O(N(d + K)) for a product with K signals, forward and backward; on the CPU it is compiled code
    where numba, the extra [compiled], is installed, and on an Nvidia GPU, for up to 128 features in float32
    or less, kernels in Triton, which torch brings along. On a CPU without numba that has several threads, the
    matrix is built and kept for the backward where it takes at most 16 MB (N = 2048 in float32), and those of
    a batch 32 MB, for that is faster there. exp(scale · ψ_i·ψ_j) is a positive semi-definite kernel, so every
    eigenvalue of P lies in [0, 1].

    Args:
        psi: Features ψ, shape [..., N, d]. Half precision is multiplied in float32: near 64, where the
            squared norms of 64 normalised channels lie, the step of bfloat16 is 0.5.
        scale: Factor on the inner products, finite and > 0; 1 in the paper (section 4).
        mask: Which nodes are real, bool, shape [..., N], where graphs are padded to one size; all if None.
            The others are never stepped to and stay where they are; their features are set to 0 and do not
            count.

    Raises:
        TypeError: `psi` is not a floating-point tensor, or `mask` not of bool.
        ValueError: `psi` has fewer than two dimensions, no node or no feature, `scale` is not positive, or
            `mask` has another shape.

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
        if psi.ndim < 2 or 0 in psi.shape[-2:]:
            raise ValueError(
                f"psi: expected shape [..., N, d] with N ≥ 1 and d ≥ 1, got {checks.shape_text(psi)}"
            )
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
        if self.psi.requires_grad and torch.is_grad_enabled():
            return self._found_log_degree()
        return self._log_degree_once

    @property
    def _log_degree_once(self) -> Tensor:
        """The same without its derivatives, found once."""
        if self.dtype not in self._log_degrees:
            with torch.no_grad():
                self._log_degrees[self.dtype] = self._found_log_degree()
        return self._log_degrees[self.dtype]

    @cached_property
    def _log_degrees(self) -> dict[torch.dtype, Tensor]:
        """What was found, in each precision; copies of the same values share it."""
        return {}

    def _found_log_degree(self) -> Tensor:
        return attention(self._features(), self._weight(), self.psi[..., :0])[1]

    def _features(self) -> Tensor:
        psi = _at_least_float32(self.psi)
        return psi if self.scale == 1 else math.sqrt(self.scale) * psi

    def _weight(self) -> Tensor:
        """1 at nodes that are stepped to, [..., N, 1]; where a graph has no real one, at all."""
        weight = torch.ones_like(_at_least_float32(self.psi[..., :1].detach()))
        if self.mask is None:
            return weight
        return (self.mask | ~self.mask.any(-1, keepdim=True)).unsqueeze(-1).to(weight.dtype)

    def matmul(self, y: Tensor) -> Tensor:
        """P y."""
        value, lse = attention(self._features(), self._weight(), checks.real(y, self.mask))
        if not (torch.compiler.is_compiling() or lse.requires_grad) and lse.dtype == self.dtype:
            self._log_degrees.setdefault(self.dtype, lse)
        return self._staying(value, y)

    def rmatmul(self, v: Tensor) -> Tensor:
        """Pᵀ v."""
        given = self._features(), self._weight(), _at_least_float32(self._log_degree_once)
        return self._staying(attention_transposed(*given, checks.real(v, self.mask)), v)

    def vjp(
        self, y: Tensor, v: Tensor, product: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """P y and the gradient in ψ, by the kernels; so it serves below autograd too."""
        given = self._features(), self._weight(), checks.real(y, self.mask), checks.real(v, self.mask)
        if product is not None and self.dtype in self._log_degrees:
            g_psi = attention_gradient(*given, product, self._log_degree_once)
        else:
            product, g_psi = attention_vjp(*given)
        g_psi = (math.sqrt(self.scale) * g_psi).to(self.dtype)
        return self._staying(product, y), (checks.real(g_psi, self.mask),)

    def held(self) -> Transition:
        """With its matrix beside it, where that fits."""
        psi, nodes = self._features().detach(), self.shape[-1]
        if 0 in self.shape or not HeldTransition.fits(self.shape, psi.dtype):
            return self
        batch, flat = _flattened(psi, self._weight())
        P, lse = _each(functools.partial(_kernels(psi).matrix, width=whole_lines(nodes, psi.dtype)), *flat)
        lse = lse.reshape(*batch, nodes)
        if lse.dtype == self.dtype:
            self._log_degrees.setdefault(self.dtype, lse)
        return HeldTransition(self, P.reshape(*batch, *P.shape[-2:]), lse)

    def _replaced(self, tensors: Iterator[Tensor], device: torch.device | None) -> Self:
        other = super()._replaced(tensors, device)
        # In as many digits, or more, ψ is what it was, and so are its log-degrees.
        if other.device == self.device and torch.promote_types(self.dtype, other.dtype) == other.dtype:
            other.__dict__["_log_degrees"] = self._log_degrees
        return other

    def rows(self, index: Tensor | Sequence[int]) -> Tensor:
        """The rows P[index], [..., len(index), N]."""
        psi, index = self._features(), self._row_index(index)
        with torch.autocast(self.device.type, enabled=False):
            logits = psi[..., index, :] @ psi.mT + self._weight().log().mT
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
        return self.sum_rounding(dtype) + self._terms(dtype) * self._largest_logit(dtype)

    def degree_rounding(self, dtype: torch.dtype) -> Tensor | float:
        """Of the sum, its logarithm and the logits."""
        largest = self._largest_logit(dtype) + math.log(self.shape[-1])
        return self.sum_rounding(dtype) + self._terms(dtype) * largest

    def transposed_rounding(self, dtype: torch.dtype) -> Tensor | float:
        """Besides, of the log-sum-exp of each row, which is one more term of as large logits."""
        largest = 2 * self._largest_logit(dtype) + math.log(self.shape[-1])
        return self.sum_rounding(dtype) + self._terms(dtype) * largest

    def underflow(self, dtype: torch.dtype) -> float:
        """What strips take as 0 beside the sum of a row."""
        return math.exp(strips.FLOOR[dtype] + strips.RISE)

    def sum_rounding(self, dtype: torch.dtype) -> float:
        """As of any sum, by kernels that may lose more with each term."""
        terms = self.shape[-1] + 4
        return super().sum_rounding(dtype) * self._counted(terms, dtype) / terms

    def _terms(self, dtype: torch.dtype) -> float:
        """Of d products, the subtracted shift and, where there is one, √scale in both factors."""
        terms = self.psi.shape[-1] + (3 if self.scale == 1 else 7)
        return self._counted(terms, dtype) * torch.finfo(dtype).eps

    def _counted(self, terms: int, dtype: torch.dtype) -> int:
        """The units in the last place that a sum of so many products costs by the kernels for them."""
        kernels = _fused(self.device, dtype, self.psi.shape[-1])
        each, besides = (1, 0) if kernels is None else kernels.ROUNDING
        return each * terms + besides

    def _largest_logit(self, dtype: torch.dtype) -> Tensor:
        squares = self.psi.detach().to(dtype).square().sum(-1, keepdim=True)
        return self.scale * squares.amax(-2, keepdim=True)


def attention(psi: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """P y and the log-sum-exp of the rows, both differentiable in ψ and y, twice.

    Args:
        psi: [..., N, d], 0 where `weight` is.
        weight: w, [..., N, 1], 0 or 1, not all 0.
        y: [..., N, K]; leading dimensions broadcast.

    Returns:
        value [..., N, K] and lse [..., N], in the dtype of `y`; computed in float32 at least.
    """
    batch, flat = _flattened(psi, weight, y)
    value, lse, _ = _attention(*flat, _whole(flat[0]))
    return value.reshape(*batch, *y.shape[-2:]).to(y.dtype), lse.reshape(*batch, y.shape[-2]).to(y.dtype)


def attention_transposed(psi: Tensor, weight: Tensor, lse: Tensor, v: Tensor) -> Tensor:
    """Pᵀ v [..., N, K], differentiable in v and ψ, given the log-sum-exp [..., N] that belongs to ψ."""
    batch, flat = _flattened(psi, weight, lse.unsqueeze(-1), v)
    product: Tensor = _attention_transposed(*flat)
    return product.reshape(*batch, *v.shape[-2:]).to(v.dtype)


def attention_vjp(psi: Tensor, weight: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """P y, and the gradient of Σ g ⊙ P y in ψ; both differentiable."""
    batch, (flat_psi, flat_weight, flat_y, flat_g) = _flattened(psi, weight, y, g)
    value, lse, P = _attention(flat_psi, flat_weight, flat_y, _whole(flat_psi))
    given = flat_psi, flat_weight, flat_y, value, lse, P, flat_g, torch.zeros_like(lse)
    g_psi = _attention_backward(*given)[0].reshape(*batch, *psi.shape[-2:])
    return value.reshape(*batch, *value.shape[-2:]).to(y.dtype), g_psi.sum_to_size(psi.shape)


def attention_gradient(
    psi: Tensor, weight: Tensor, y: Tensor, g: Tensor, value: Tensor, lse: Tensor
) -> Tensor:
    """The same gradient where P y and the log-sum-exp [..., N] are known."""
    batch, flat = _flattened(psi, weight, y, g, value, lse.unsqueeze(-1))
    flat_psi, flat_weight, flat_y, flat_g, flat_value, flat_lse = flat
    sums, none = flat_lse.squeeze(-1), flat_psi.new_empty(len(flat_psi), 0)
    given = flat_psi, flat_weight, flat_y, flat_value, sums, none, flat_g, torch.zeros_like(sums)
    g_psi: Tensor = _attention_backward(*given)[0]
    return g_psi.reshape(*batch, *psi.shape[-2:]).sum_to_size(psi.shape)


def _flattened(*arguments: Tensor) -> tuple[torch.Size, list[Tensor]]:
    """The common leading shape, and the arguments with one leading dimension, in float32 at least."""
    batch = checks.broadcast_batch([x.shape[:-2] for x in arguments], "psi and y")
    return batch, [
        _at_least_float32(x).expand(*batch, *x.shape[-2:]).reshape(batch.numel(), *x.shape[-2:])
        for x in arguments
    ]


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# --- The operations and their derivatives, each one operator of torch's, so that torch.compile need not look
# in. Graph by graph: so a graph of a batch has the bits that it has alone. Of no graph at all they are what
# torch.compile is told of their shapes.


def _each(kernel: Callable[..., tuple[Tensor, ...]], *arguments: Tensor) -> tuple[Tensor, ...]:
    """A kernel's results for every graph of a batch, stacked."""
    with torch.autocast(arguments[0].device.type, enabled=False):
        results = [kernel(*map(_as_alone, graph)) for graph in zip(*arguments, strict=True)]
    return tuple(
        parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)
        for parts in zip(*results, strict=True)
    )


def _as_alone(x: Tensor) -> Tensor:
    """x in memory aligned as new memory is: sums round differently where it is not."""
    return (
        x if x.is_contiguous() and x.data_ptr() % 64 == 0 else x.clone(memory_format=torch.contiguous_format)
    )


def _computed(name: str, psi: Tensor, *arguments: Tensor) -> tuple[Tensor, ...]:
    """What kernels of that name give for every graph of a batch."""
    fused = _fused(psi.device, psi.dtype, psi.shape[-1])
    if fused is None:
        return _each(getattr(_kernels(psi), name), psi, *arguments)
    found: tuple[Tensor, ...] = getattr(fused, name)(*(x.contiguous() for x in (psi, *arguments)))
    return found


def _fused(device: torch.device, dtype: torch.dtype, features: int) -> Any:
    """The kernels in Triton, or None where there are none for such features."""
    found = _triton() if device.type == "cuda" else None
    return found if found is not None and found.suits(device, dtype, features) else None


@functools.cache
def _triton() -> Any:
    """The kernels in Triton, or None where that is not installed."""
    try:
        from graphdiff.operators import fused
    except ImportError:
        return None
    return fused


def _kernels(psi: Tensor) -> Any:
    """Where the products of a graph are computed otherwise, or its matrix is made."""
    return _tiles() if psi.device.type == "cpu" and _tiles() is not None else strips


@functools.cache
def _tiles() -> Any:
    """The compiled kernels, or None where numba is not installed."""
    try:
        from graphdiff.operators import tiles
    except ImportError:
        return None
    return tiles


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _whole(psi: Tensor) -> bool:
    """Whether to build the matrix: strips have many short operations, which threads hardly make faster."""
    size = psi.shape[-2] ** 2 * psi.element_size()
    small = size <= WHOLE and len(psi) * size <= 2 * WHOLE
    threads = psi.device.type == "cpu" and torch.get_num_threads() > 1
    return threads and small and _kernels(psi) is strips


def _room(psi: Tensor) -> int:
    """Entries that a kept P takes: N², and so many more that the next one begins where new memory would."""
    aligned = 64 // psi.element_size()
    return -(-(psi.shape[-2] ** 2) // aligned) * aligned


def _matrices(psi: Tensor, kept: Tensor) -> Tensor:
    """The kept P of all graphs, [B, N, N], where they lie."""
    nodes = psi.shape[-2]
    return kept[:, : nodes * nodes].view(-1, nodes, nodes)


def _attention_shapes(psi: Tensor, weight: Tensor, y: Tensor, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    kept = _room(psi) if whole else 0
    return y.new_empty(y.shape), y.new_empty(y.shape[:-1]), y.new_empty(len(y), kept)


# torch finds code that it compiled before by this name, and not by the shapes above: they change together.
@torch.library.custom_op("graphdiff::attention_v2", mutates_args=())
def _attention(psi: Tensor, weight: Tensor, y: Tensor, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Value, log-sum-exp, and P where it is to be kept, [B, `_room`]; else [B, 0]."""
    if len(psi) == 0:
        return _attention_shapes(psi, weight, y, whole)
    if whole:
        kept = psi.new_empty(len(psi), _room(psi))
        kept[:, psi.shape[-2] ** 2 :] = 0
        value, lse = _each(strips.whole_forward, psi, weight, y, _matrices(psi, kept))
        return value, lse, kept
    value, lse = _computed("forward", psi, weight, y)
    return value, lse, value.new_empty(len(psi), 0)


_attention.register_fake(_attention_shapes)


def _attention_transposed_shape(psi: Tensor, weight: Tensor, lse: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.custom_op("graphdiff::attention_transposed", mutates_args=())
def _attention_transposed(psi: Tensor, weight: Tensor, lse: Tensor, v: Tensor) -> Tensor:
    if len(psi) == 0:
        return _attention_transposed_shape(psi, weight, lse, v)
    return _computed("transposed", psi, weight, lse, v)[0]


_attention_transposed.register_fake(_attention_transposed_shape)


def _attention_backward_shapes(
    psi: Tensor,
    weight: Tensor,
    y: Tensor,
    value: Tensor,
    lse: Tensor,
    P: Tensor,
    g_value: Tensor,
    g_lse: Tensor,
) -> tuple[Tensor, Tensor]:
    return psi.new_empty(psi.shape), y.new_empty(y.shape)


@torch.library.custom_op("graphdiff::attention_backward", mutates_args=())
def _attention_backward(
    psi: Tensor,
    weight: Tensor,
    y: Tensor,
    value: Tensor,
    lse: Tensor,
    P: Tensor,
    g_value: Tensor,
    g_lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """∂ψ and ∂y, from P where that was kept."""
    if len(psi) == 0:
        return _attention_backward_shapes(psi, weight, y, value, lse, P, g_value, g_lse)
    if P.numel():
        g_psi, g_y = _each(strips.whole_backward, psi, y, value, _matrices(psi, P), g_value, g_lse)
    else:
        g_psi, g_y = _computed("backward", psi, weight, y, value, lse, g_value, g_lse)
    return g_psi, g_y


_attention_backward.register_fake(_attention_backward_shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _ = inputs
    # The outputs are saved with their graph: without it second derivatives would miss d lse.
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[2])
    # Else a cotangent of P would be made of zeros, as large as P.
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, g_value: Tensor | None, g_lse: Tensor | None, _: None
) -> tuple[Tensor, None, Tensor, None]:
    *_, value, lse, _ = ctx.saved_tensors
    g_value, g_lse = (torch.zeros_like(x) if g is None else g for x, g in ((value, g_value), (lse, g_lse)))
    g_psi, g_y = _attention_backward(*ctx.saved_tensors, g_value, g_lse)
    return g_psi, None, g_y, None


def _save_transposed(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    psi, weight, _, v = inputs
    ctx.save_for_backward(psi, weight, v)


def _backward_transposed(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, Tensor]:
    psi, weight, v = ctx.saved_tensors
    # g·(Pᵀ v) is v·(P g): its gradients are those of the product P g with v for the cotangent.
    value, lse, P = _attention(psi, weight, g, _whole(psi))
    g_psi, _ = _attention_backward(psi, weight, g, value, lse, P, v, torch.zeros_like(lse))
    return g_psi, None, None, value


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _double_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that differentiating stops at this node's inputs and does not run on through their graph.
        inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in ctx.saved_tensors]
        grads = _differentiable_backward(*inputs)
        return torch.autograd.grad(grads, inputs, cotangents, create_graph=recorded, allow_unused=True)


_attention.register_autograd(_backward, setup_context=_save)
_attention_transposed.register_autograd(_backward_transposed, setup_context=_save_transposed)
_attention_backward.register_autograd(_double_backward, setup_context=_save_inputs)


# --- The backward once more, in operations that autograd knows, for second derivatives.


def _differentiable_backward(
    psi: Tensor,
    weight: Tensor,
    y: Tensor,
    value: Tensor,
    lse: Tensor,
    P: Tensor,
    g_value: Tensor,
    g_lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """∂ψ and ∂y, a block of rows at a time, each computed again rather than kept: no N×N matrix either."""
    h = g_lse - (g_value * value).sum(-1)
    block = max(1, strips.DEVICE_ELEMENTS // max(psi.shape[0] * psi.shape[1], 1))
    g_rows, g_psi, g_y = [], torch.zeros_like(psi), torch.zeros_like(y)
    for start in range(0, psi.shape[1], block):
        these = slice(start, start + block)
        rows, columns, values = checkpoint(
            _block_backward,
            *(psi[:, these], psi, weight, y, lse[:, these], g_value[:, these], h[:, these]),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        g_rows.append(rows)
        g_psi, g_y = g_psi + columns, g_y + values
    return torch.cat(g_rows, 1) + g_psi, g_y


def _block_backward(
    rows: Tensor, psi: Tensor, weight: Tensor, y: Tensor, lse: Tensor, g_value: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    P = weight.mT * (rows @ psi.mT - lse.unsqueeze(-1)).exp()
    G = P * (g_value @ y.mT + h.unsqueeze(-1))
    return G @ psi, G.mT @ rows, P.mT @ g_value
