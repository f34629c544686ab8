"""A walk known by its product alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from graphdiff import checks
from graphdiff.operators.base import Transition


@dataclass(frozen=True, eq=False, repr=False, init=False)
class FunctionTransition(Transition):
    """Any walk with a product: ``matmul(y, *tensors)`` is P y.

    The rows of P sum to 1, which is checked by a product with ones. Its entries must be ≥ 0 too, which
    products cannot show: where one is negative, no answer of `solve` is certain. Certificates take a product
    to be rounded as a sum of N terms is.

    Args:
        matmul: P y for y [..., N, K], in y's dtype: certificates multiply in float64, with `tensors`
            converted alike. Differentiable in y, and in `tensors` where gradients are wanted.
        shape: [..., N, N], or N.
        tensors: What the product is made of, handed to `matmul`: floating-point tensors of one dtype, to
            which gradients flow, and others, such as node numbers.
        rmatmul: Pᵀ v likewise; the vector-Jacobian product of `matmul` if None.
        log_degree: log d, shape [..., N], if the walk is reversible: d_i P[i, j] = d_j P[j, i].
        positive_semidefinite: Whether besides the matrix d_i P[i, j] has no negative eigenvalue.
        dtype: Of the operator where `tensors` has no floating-point tensor; torch's default if None.
        device: Likewise; the CPU if None.

    Raises:
        TypeError: `matmul` does not return a tensor of y's dtype, or `tensors` holds something else.
        ValueError: A shape does not fit, or a row does not sum to 1.

    Example:
        >>> import torch, graphdiff as gd
        >>> around = gd.FunctionTransition(lambda y: (y.roll(1, -2) + y.roll(-1, -2)) / 2, 4)
        >>> around @ torch.tensor([0.0, 0.0, 2.0, 0.0])
        tensor([0., 1., 0., 1.])
        >>> stay = torch.tensor(0.5, requires_grad=True)
        >>> lazy = gd.FunctionTransition(lambda y, p: p * y + (1 - p) * y.roll(1, -2), 4, tensors=[stay])
        >>> gd.diffuse(lazy, torch.tensor([0.0, 0.0, 2.0, 0.0]), mu=0.5)[2].backward()
        >>> stay.grad
        tensor(0.8100)
    """

    function: Callable[..., Tensor]
    transposed: Callable[..., Tensor] | None
    size: torch.Size
    arguments: tuple[Tensor, ...]
    # Empty: dtype and device where there is no other tensor.
    marker: Tensor
    log_degree: Tensor | None = None
    positive_semidefinite: bool = False

    def __init__(
        self,
        matmul: Callable[..., Tensor],
        shape: int | Sequence[int],
        *,
        tensors: Sequence[Tensor] = (),
        rmatmul: Callable[..., Tensor] | None = None,
        log_degree: Tensor | None = None,
        positive_semidefinite: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        size = torch.Size([shape, shape] if isinstance(shape, int) else shape)
        if len(size) < 2 or size[-1] != size[-2] or size[-1] < 1:
            raise ValueError(f"shape: expected N or [..., N, N] with N ≥ 1, got {shape!r}")
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"tensors[{i}]: expected a torch.Tensor, got {type(tensor).__name__}; what is no tensor "
                    "belongs into the function itself"
                )
        floats = [x for x in tensors if x.is_floating_point()]
        if floats and (dtype is not None or device is not None):
            raise ValueError("dtype, device: those of the tensors hold; convert these, or use .to(...)")
        own = floats[0].dtype if floats else checks.floating_dtype(dtype, torch.get_default_dtype())
        marker = torch.empty(0, dtype=own, device=floats[0].device if floats else device)
        checks.floating(marker, "tensors")
        for i, tensor in enumerate(tensors):
            checks.same_device(tensor, f"tensors[{i}]", marker.device, "the operator")
            if tensor.is_floating_point():
                checks.same_dtype(tensor, f"tensors[{i}]", marker.dtype, "the operator")
        if log_degree is not None:
            checks.same_dtype(
                checks.floating(log_degree, "log_degree"), "log_degree", marker.dtype, "the operator"
            )
            checks.same_device(log_degree, "log_degree", marker.device, "the operator")
            checks.shaped(log_degree, "log_degree", size[:-1], "one degree per node")
        elif positive_semidefinite:
            raise ValueError(
                "positive_semidefinite: expected log_degree beside it, got None; only reversible walks can be"
            )
        fields = {
            "function": matmul,
            "transposed": rmatmul,
            "size": size,
            "arguments": tuple(tensors),
            "log_degree": log_degree,
            "positive_semidefinite": positive_semidefinite,
            "marker": marker,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self._check_product()

    def _check_product(self) -> None:
        # Two columns, so that a product that mixes or drops them is seen.
        ones = torch.ones(*self.size[:-1], 2, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            sums = self.matmul(ones)
        if not isinstance(sums, Tensor) or sums.dtype != ones.dtype:
            got = sums.dtype if isinstance(sums, Tensor) else type(sums).__name__
            raise TypeError(
                f"matmul: expected a tensor of y's dtype, {ones.dtype}, got {got}; hand it its tensors "
                "through tensors=, which are converted with the operator"
            )
        checks.shaped(sums, "matmul", ones.shape, "that of y")
        off = (sums - 1).abs().nan_to_num(nan=torch.inf)
        if bool((off > checks.sum_tolerance(self.size[-1], self.dtype)).any()):
            worst = int(off.argmax())
            raise ValueError(
                f"matmul: expected rows that sum to 1, got {float(sums.flatten()[worst]):.6g} for node "
                f"{worst // 2 % self.size[-1]}; divide by the product with ones"
            )

    @property
    def shape(self) -> torch.Size:
        """[..., N, N]."""
        return self.size

    @property
    def reversible(self) -> bool:  # type: ignore[override]  # follows from the degrees
        """Whether degrees are known."""
        return self.log_degree is not None

    @cached_property
    def row_sums(self) -> Tensor:
        """Row sums in the best precision at hand, [..., N, 1]."""
        wide = checks.widest(self.device)
        ones = torch.ones(*self.size[:-1], 1, dtype=wide, device=self.device)
        with torch.no_grad():
            return self.to(wide).matmul(ones)

    def matmul(self, y: Tensor) -> Tensor:
        """P y."""
        return self.function(y, *self.arguments)

    def rmatmul(self, v: Tensor) -> Tensor:
        """Pᵀ v."""
        return super().rmatmul(v) if self.transposed is None else self.transposed(v, *self.arguments)

    def _each_tensor(self) -> Iterator[Tensor]:
        """The marker, the degrees, and the floating-point tensors given."""
        yield from super()._each_tensor()
        yield from (x for x in self.arguments if x.is_floating_point())

    def _replaced(self, tensors: Iterator[Tensor], device: torch.device | None) -> "FunctionTransition":
        other = super()._replaced(tensors, device)
        arguments = tuple(
            next(tensors) if x.is_floating_point() else x.to(device=device) for x in self.arguments
        )
        object.__setattr__(other, "arguments", arguments)
        return other
