"""What a solve returns: the answer and the evidence for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Norm = Literal["inf", "one"]


class ConvergenceWarning(UserWarning):
    """An answer is returned whose error is not known to be within the tolerance."""


class ConvergenceError(RuntimeError):
    """Raised under ``on_failure="raise"``; `solution` holds what was reached (None in a backward pass)."""

    def __init__(self, message: str, solution: "Solution | None" = None) -> None:
        super().__init__(message)
        self.solution = solution


class Progress(NamedTuple):
    """How far a solve is, as ``progress=`` is told after every step."""

    steps: int
    """Steps of the slowest right-hand side, in the solver's present attempt."""
    unfinished: int
    """Right-hand sides that go on."""
    error_bound: float
    """The largest error that one of these may have, as the solver sees it; not certified yet."""
    seconds: float
    """Since the solve began."""


class Enclosure:
    """Bounds of each number of an answer, lower and upper, found when they are first asked for.

    Few ask, and to find them takes several passes over vectors as long as the answer, and twice its memory.
    """

    def __init__(self, find: Callable[[], tuple[Tensor, Tensor]]) -> None:
        """`find` may hold no memory that others write to before it is called."""
        self._find: Callable[[], tuple[Tensor, Tensor]] | None = find
        self._ends: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, lower: Tensor, upper: Tensor) -> "Enclosure":
        """One that is known."""
        known = cls(lambda: (lower, upper))
        known._ends, known._find = (lower, upper), None
        return known

    def ends(self) -> tuple[Tensor, Tensor]:
        """The lower and the upper bounds, the same tensors each time; they carry no gradients."""
        # Another thread may be here too, and finds the same.
        find = self._find
        if find is not None:
            with torch.no_grad():
                self._ends = find()
            self._find = None
        return self._ends

    def then(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> "Enclosure":
        """What a function makes of lower and upper bounds."""
        return Enclosure(lambda: change(*self.ends()))

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, or a file, holds the bounds themselves.
        return Enclosure.of, self.ends()


@dataclass(frozen=True, eq=False)
class Solution:
    """An answer y ≈ y* = (1 − µ)(I − µP)⁻¹ s with its certificate.

    Only `value` carries gradients. All bounds hold for the exact P and µ of the given input values, and
    count the rounding of the arithmetic that computed them. In half precision they hold for y before its
    last cast.

    Attributes:
        value: y, shape [..., N, K] (or [N], as s was), dtype of s.
        enclosure: `lower` and `upper`, which are computed when one of them is first asked for.
        error_bound: ‖y − y*‖ is at most this, in units of s, per right-hand side, shape [..., K].
        converged: Whether `error_bound` ≤ tol·‖s‖, shape [..., K].
        steps: Steps of the solver, shape [..., K].
        matvecs: Products with P, those of the certificate included, shape [..., K].
        norm: "inf" for a row-stochastic P, "one" for its transpose.
        solver: The solver that gave the answer.
        reason: Why this solver, and why it stopped: at the tolerance, at a limit, at rounding, or short of
            what rounding allows.
    """

    value: Tensor
    enclosure: Enclosure
    error_bound: Tensor
    converged: Tensor
    steps: Tensor
    matvecs: Tensor
    norm: Norm
    solver: str
    reason: str

    @property
    def lower(self) -> Tensor:
        """Elementwise lower bound of y*, shaped like `value`."""
        return self.enclosure.ends()[0]

    @property
    def upper(self) -> Tensor:
        """Elementwise upper bound of y*, shaped like `value`."""
        return self.enclosure.ends()[1]

    def __repr__(self) -> str:
        if self.error_bound.numel() == 0:
            return f"Solution({list(self.value.shape)} {str(self.value.dtype).removeprefix('torch.')}, empty)"
        told = "converged" if bool(self.converged.all()) else "NOT converged"
        return (
            f"Solution({list(self.value.shape)} {str(self.value.dtype).removeprefix('torch.')}, {told}, "
            f"error ≤ {float(self.error_bound.max()):.2e} in the {self.norm}-norm, "
            f"steps ≤ {int(self.steps.max())}, {self.solver})"
        )
