"""What a solve returns: the answer and the evidence for it."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

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


@dataclass(frozen=True, eq=False)
class Solution:
    """An answer y ≈ y* = (1 − µ)(I − µP)⁻¹ s with its certificate.

    Only `value` carries gradients. All bounds hold for the exact P and µ of the given input values, and
    count the rounding of the arithmetic that computed them. In half precision they hold for y before its
    last cast.

    Attributes:
        value: y, shape [..., N, K] (or [N], as s was), dtype of s.
        lower: Elementwise lower bound of y*, shaped like `value`.
        upper: Elementwise upper bound of y*, shaped like `value`.
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
    lower: Tensor
    upper: Tensor
    error_bound: Tensor
    converged: Tensor
    steps: Tensor
    matvecs: Tensor
    norm: Norm
    solver: str
    reason: str

    def __repr__(self) -> str:
        if self.error_bound.numel() == 0:
            return f"Solution({list(self.value.shape)} {str(self.value.dtype).removeprefix('torch.')}, empty)"
        told = "converged" if bool(self.converged.all()) else "NOT converged"
        return (
            f"Solution({list(self.value.shape)} {str(self.value.dtype).removeprefix('torch.')}, {told}, "
            f"error ≤ {float(self.error_bound.max()):.2e} in the {self.norm}-norm, "
            f"steps ≤ {int(self.steps.max())}, {self.solver})"
        )
