"""PageRank: the distribution of a walk that restarts."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from graphdiff import checks
from graphdiff.diffusion import solve
from graphdiff.implicit import OnFailure
from graphdiff.operators.base import Transition, check_transition
from graphdiff.solution import Progress, Solution
from graphdiff.solvers.auto import Auto
from graphdiff.solvers.base import Solver


def pagerank(
    P: Transition,
    personalization: Tensor | None = None,
    mu: float | Tensor = 0.85,
    *,
    solver: Solver | Auto | None = None,
    tol: float | None = None,
    initial: Tensor | None = None,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    progress: Callable[[Progress], object] | None = None,
    on_failure: OnFailure = "warn",
) -> Solution:
    r"""Where a walk is found that goes on along P with probability µ and else restarts.

    .. math:: y = (1 - \mu)(I - \mu P^T)^{-1} s, \quad \sum_i y_i = \sum_i s_i = 1

    with s the personalization, normalised. The promise is in the 1-norm: ‖y − y*‖₁ ≤ tol, so no set of
    nodes has a mass wrong by more than that.

    Args:
        P: The walk, [..., N, N], not its transpose: ``P[i, j]`` is the probability of the step i → j. With
            ``dangling="restart"`` it goes from nodes without an edge out to where it restarts.
        personalization: Where it restarts: weights ≥ 0, [N] or [..., N, K] for K rankings at once, dtype and
            device of P. Every channel is divided by its sum. Uniform if None. Padded nodes, where P has a
            mask, count for nothing.
        mu: Probability to go on, in [0, 1): a number, a 0-d tensor, or [..., 1, K] per ranking.
        solver: How; `solvers.Auto()` if None.
        tol: Largest error in the 1-norm; 1e-10 in float64, else 1e-5, if None.
        initial: First guess of y, shaped like `personalization`; that itself if None.
        max_steps: Most steps of the solver; None for as many as theory says can help.
        max_seconds: As in `solve`, and so is `progress`.
        progress: Called after every step with a `Progress`.
        on_failure: What to do where the promise cannot be kept: "warn", "raise" or "ignore".

    Returns:
        A `Solution`; its `value`, [N] or [..., N, K], is differentiable in the personalization, in µ and in
        P's tensors.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: P is a transpose, a channel of the personalization is negative somewhere or zero
            everywhere, µ is given per node, or a shape, device or value does not fit.
        ConvergenceError: The promise is not kept under ``on_failure="raise"``.

    Example:
        >>> import torch, graphdiff as gd
        >>> W = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
        >>> P = gd.DenseTransition.from_affinity(W)
        >>> gd.pagerank(P).value
        tensor([0.4865, 0.2568, 0.2568], dtype=torch.float64)
        >>> gd.pagerank(P, torch.tensor([0.0, 0.0, 2.0], dtype=torch.float64), mu=0.5).value
        tensor([0.3333, 0.0833, 0.5833], dtype=torch.float64)
    """
    check_transition(P)
    if P.stochastic != "rows":
        raise ValueError(
            f"P: expected a walk, whose rows sum to 1, got {type(P).__name__}, whose columns do; give the "
            "walk itself (P.T of this one), pagerank transposes it"
        )
    nodes = P.shape[-1]
    if isinstance(mu, Tensor) and mu.ndim > 1 and mu.shape[-2] != 1:
        raise ValueError(
            "mu: expected a number, a 0-d tensor or [..., 1, K], one µ per ranking, got "
            f"{checks.shape_text(mu)}; with one µ per node the mass is not conserved, see solve(P.T, s, mu)"
        )
    if personalization is None:
        personalization = torch.ones(nodes, dtype=P.dtype, device=P.device)
    restart = _distribution(personalization, P)
    # One ranking for each graph of a padded batch: what it sums to, is the graph's own.
    apart = personalization.ndim == 1 and restart.ndim > 2
    solution = solve(
        P.T,
        restart.squeeze(-1) if personalization.ndim == 1 and not apart else restart,
        mu,
        solver=solver,
        tol=tol,
        initial=initial,
        max_steps=max_steps,
        max_seconds=max_seconds,
        progress=progress,
        on_failure=on_failure,
    )
    if not apart:
        return solution
    tensors = ("value", "error_bound", "converged", "steps", "matvecs")
    enclosure = solution.enclosure.then(lambda lower, upper: (lower.squeeze(-1), upper.squeeze(-1)))
    found = {name: getattr(solution, name).squeeze(-1) for name in tensors}
    return replace(solution, enclosure=enclosure, **found)


def _distribution(weights: Tensor, P: Transition) -> Tensor:
    """Weights divided by their sum over real nodes, channel by channel, [..., N, K]."""
    columns = checks.real(checks.signal(weights, P.shape[-1], "personalization"), P.mask)
    checks.same_dtype(columns, "personalization", P.dtype, "P")
    checks.same_device(columns, "personalization", P.device, "P")
    checks.finite(columns, "personalization")
    if bool((columns < 0).any()):
        raise ValueError(
            "personalization: expected weights ≥ 0, got a smallest weight of "
            f"{float(columns.detach().min()):.3g}; clip them, or see solve(P.T, s, mu) for signed seeds"
        )
    # Divided by the largest first, so that neither huge nor tiny weights leave the range of the dtype.
    largest = columns.detach().amax(-2, keepdim=True)
    if not bool((largest > 0).all()):
        raise ValueError(
            f"personalization: expected a positive sum in every channel, got {int((largest == 0).sum())} of "
            f"{largest.numel()} that are zero everywhere; give such a channel a node to restart at, or leave "
            "personalization out for uniform restarts"
        )
    scaled = columns / largest
    return scaled / scaled.sum(-2, keepdim=True)
