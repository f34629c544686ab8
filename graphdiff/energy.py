r"""The paper's Eq. 1, the energy whose minimum trades smoothness for faith, and the y at which it is least.

    E(y) = ½ (µ Σ_ij W_ij ‖y_i/√d_i − y_j/√d_j‖² + (1 − µ) Σ_i M_ii ‖y_i − x_i‖²)

The first sum runs over ordered pairs, so it is 2 yᵀ(I − S)y with S = D^-1/2 W D^-1/2, and E is least where

    (2µ(I − S) + (1 − µ)M) y = (1 − µ)M x,   that is   y = (I − M′S)⁻¹(I − M′)x,   M′ = 2µ(2µ + (1 − µ)M)⁻¹.

S is similar to the walk: S = D^1/2 P D^-1/2. So y = D^1/2 z, where z is the diffusion of D^-1/2 x along P.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from graphdiff import checks
from graphdiff.diffusion import Scaling, solve_scaled
from graphdiff.implicit import OnFailure
from graphdiff.operators.base import Transition, check_transition
from graphdiff.solution import Progress, Solution
from graphdiff.solvers.auto import Auto
from graphdiff.solvers.base import Solver


def solve_symmetric(
    P: Transition,
    s: Tensor,
    mu: float | Tensor,
    *,
    solver: Solver | Auto | None = None,
    tol: float | None = None,
    initial: Tensor | None = None,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    progress: Callable[[Progress], object] | None = None,
    on_failure: OnFailure = "warn",
) -> Solution:
    r"""Diffuses a signal with the symmetric normalisation of the affinity in place of the walk.

    .. math:: y = (1 - \mu)(I - \mu S)^{-1} s, \quad S = D^{-1/2} W D^{-1/2} = D^{1/2} P D^{-1/2}

    This is label spreading (Zhou et al. 2004, up to the factor 1 − µ) and the propagation of personalised
    PageRank networks (APPNP, Gasteiger et al. 2019). A constant does not stay one: √d does. With one column
    of labels for each class compare ``y / y.sum(0)``: near µ = 1 every column is nearly a multiple of √d.

    The promise is that of `solve`, ‖y − y*‖∞ ≤ tol·‖s‖∞, y* that of the degrees that P states. Where they
    differ so much that the bound of z, with y = √d·z, cannot keep it, a bound of y itself is computed, by a
    solve and a product more (only where P's rounding is known entry by entry: not for functions).

    Args:
        P: A reversible walk, [..., N, N], or its transpose, which has the same S.
        s: Signal [..., N, K] or [N], same dtype and device as P. Leading dimensions broadcast with P's.
        mu: µ in [0, 1): a number, a 0-d tensor, [..., 1, K] per channel or [..., N, 1] per node, then
            y = (I − diag(µ)S)⁻¹(I − diag(µ))s.
        solver: How; `solvers.Auto()` if None.
        tol: Relative tolerance; 1e-10 in float64, else 1e-5, if None.
        initial: First guess of y, shaped like s; s itself if None.
        max_steps: Most steps of the solver; None for as many as theory says can help.
        max_seconds: As in `solve`, and so is `progress`.
        progress: Called after every step with a `Progress`.
        on_failure: What to do where the promise cannot be kept: "warn", "raise" or "ignore".

    Returns:
        A `Solution`; its `value` is differentiable in s, µ and P's tensors. With g what arrives at y, the
        error e of the gradient of s is promised to keep Σ √d_i |e_i| ≤ tol·Σ √d_i |g_i|.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: P is not known to be reversible, or a shape, device or value does not fit.
        ConvergenceError: The promise is not kept under ``on_failure="raise"``.

    Warns:
        ConvergenceWarning: The promise is not kept, here or in the backward, under ``on_failure="warn"``.

    Example:
        >>> import torch, graphdiff as gd
        >>> W = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
        >>> P = gd.DenseTransition.from_affinity(W)
        >>> gd.solve_symmetric(P, torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), mu=0.5).value
        tensor([0.2357, 0.5833, 0.0833], dtype=torch.float64)
    """
    walk = _reversible(P)
    return solve_scaled(
        walk,
        s,
        mu,
        _scaling(walk, solver),
        solver=solver,
        tol=tol,
        initial=initial,
        max_steps=max_steps,
        max_seconds=max_seconds,
        progress=progress,
        on_failure=on_failure,
    )


def minimize_energy(
    P: Transition,
    x: Tensor,
    mu: float | Tensor,
    importance: Tensor | None = None,
    *,
    solver: Solver | Auto | None = None,
    tol: float | None = None,
    initial: Tensor | None = None,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    progress: Callable[[Progress], object] | None = None,
    on_failure: OnFailure = "warn",
) -> Solution:
    r"""The y at which the `energy` of Eq. 1 is least, exactly.

    .. math:: \left(2\mu(I - S) + (1 - \mu)M\right) y = (1 - \mu)M x, \quad S = D^{-1/2} W D^{-1/2}

    It is `solve_symmetric` with µ′_i = 2µ/(2µ + (1 − µ)M_ii) at each node, so with 2µ/(1 + µ) where all have
    importance 1. The paper's Eq. 2 has P for S, µ for µ′, and M in the seed; that is ``solve(P, M * x, mu)``.

    Args:
        P: A reversible walk, [..., N, N], the normalised W, or its transpose.
        x: The score that y is to be near, [..., N, K] or [N], same dtype and device as P.
        mu: µ in [0, 1), the weight of smoothness: a number, a 0-d tensor, [..., 1, 1], or without importance
            [..., 1, K] per channel.
        importance: M's diagonal, [N] or [..., N, 1], finite and > 0, dtype and device of P; 1 everywhere if
            None.
        solver: How; `solvers.Auto()` if None.
        tol: ‖y − y*‖∞ is promised to be at most tol·‖x‖∞; 1e-10 in float64, else 1e-5, if None.
        initial: First guess of y, shaped like x; x itself if None.
        max_steps: Most steps of the solver; None for as many as theory says can help.
        max_seconds: As in `solve`, and so is `progress`.
        progress: Called after every step with a `Progress`.
        on_failure: What to do where the promise cannot be kept: "warn", "raise" or "ignore".

    Returns:
        A `Solution`, whose `value` is differentiable in x, µ, the importance and P's tensors; see
        `solve_symmetric` for how far the promise reaches.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: P is not known to be reversible, an importance is not > 0, or a shape, device or value
            does not fit.
        ConvergenceError: The promise is not kept under ``on_failure="raise"``.

    Warns:
        ConvergenceWarning: The promise is not kept, here or in the backward, under ``on_failure="warn"``.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.DenseTransition.from_affinity(torch.ones(2, 2, dtype=torch.float64))
        >>> x = torch.tensor([0.0, 3.0], dtype=torch.float64)
        >>> gd.minimize_energy(P, x, mu=0.5).value
        tensor([1.0000, 2.0000], dtype=torch.float64)
        >>> gd.minimize_energy(P, x, mu=0.5, importance=torch.tensor([1.0, 0.25]).double()).value
        tensor([0.5000, 1.0000], dtype=torch.float64)
    """
    walk = _reversible(P)
    wide = checks.widest(walk.device)
    weight = _one_mu(mu, checks.signal(x, walk.shape[-1], "x"), walk, importance)
    M = torch.ones_like(weight) if importance is None else _importance(importance, walk).to(wide)
    if walk.mask is not None:
        M = torch.where(walk.mask.unsqueeze(-1), M, 1.0)
    if importance is not None and not bool((M > 0).all()):
        raise ValueError(
            f"importance: expected values > 0, got {int((M == 0).sum())} of {M.numel()} that are 0; nothing "
            "holds y there but its neighbours, so give such nodes a small one, such as 1e-3"
        )
    remaining = (1 - weight) * M / (2 * weight + (1 - weight) * M)
    smooth = 2 * weight / (2 * weight + (1 - weight) * M)
    if bool((smooth >= 1).any()):
        raise ValueError(
            f"importance: expected values that count beside 2µ/(1 − µ), got one of {float(M.min()):.3g}; "
            "give such nodes a larger one, or lower mu"
        )
    scaling = _scaling(walk, solver)
    # A slip of δ in µ′ moves the answer by at most 2δ/(1 − µ′).
    slip = 8 * torch.finfo(wide).eps / remaining.detach().amin((-2, -1), keepdim=True)
    return solve_scaled(
        walk,
        x,
        smooth,
        scaling._replace(rounding=scaling.rounding + slip),
        solver=solver,
        tol=tol,
        initial=initial,
        max_steps=max_steps,
        max_seconds=max_seconds,
        progress=progress,
        on_failure=on_failure,
    )


def energy(
    P: Transition, y: Tensor, x: Tensor, mu: float | Tensor, importance: Tensor | None = None
) -> Tensor:
    r"""The energy of Eq. 1: how far y is from smooth, and from x where that matters.

    .. math:: E(y) = \tfrac12 \Big(\mu \sum_{i,j} W_{ij}
              \Big\| \frac{y_i}{\sqrt{d_i}} - \frac{y_j}{\sqrt{d_j}} \Big\|^2
              + (1 - \mu) \sum_i M_{ii} \| y_i - x_i \|^2\Big)

    By one product with P, in float64 where the device has it. The scale of W does not matter.

    Args:
        P: A reversible walk, [..., N, N], the normalised W, or its transpose.
        y: [..., N, K] or [N], same dtype and device as P.
        x: The score, likewise; leading dimensions and channels broadcast.
        mu: µ in [0, 1): a number, a 0-d tensor, or [..., 1, K] per channel.
        importance: M's diagonal, [N] or [..., N, 1], finite and ≥ 0, dtype and device of P; 1 everywhere if
            None.

    Returns:
        E ≥ 0 of every channel, [..., K], a number for y and x [N], in the dtype of y; their sum is the
        paper's. Differentiable in everything.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: P is not known to be reversible, or a shape, device or value does not fit.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.DenseTransition.from_affinity(torch.ones(2, 2, dtype=torch.float64))
        >>> x = torch.tensor([0.0, 3.0], dtype=torch.float64)
        >>> y = gd.minimize_energy(P, x, mu=0.5).value
        >>> gd.energy(P, y, x, mu=0.5), gd.energy(P, x, x, mu=0.5)
        (tensor(0.7500, dtype=torch.float64), tensor(2.2500, dtype=torch.float64))
    """
    walk = _reversible(P)
    columns = {}
    for name, signal in (("y", y), ("x", x)):
        columns[name] = checks.real(checks.signal(signal, walk.shape[-1], name), walk.mask)
        checks.same_dtype(signal, name, walk.dtype, "P")
        checks.same_device(signal, name, walk.device, "P")
        checks.finite(columns[name], name)
    wide = checks.widest(walk.device)
    checks.broadcast_batch([columns["y"].shape, columns["x"].shape], "y and x")
    channels = max(columns["y"].shape[-1], columns["x"].shape[-1])
    weight = _one_mu(mu, columns["y"].expand(*columns["y"].shape[:-1], channels), walk, None)
    wide_y, wide_x = columns["y"].to(wide), columns["x"].to(wide)
    root = _scaling(walk).factor

    # Differences do not change when a constant is taken from all y_i/√d_i, and what rounding hides of them
    # is relative to what is left: the mean, where y is nearly smooth, is nearly all.
    mean = (root * wide_y).sum(-2, keepdim=True) / root.square().sum(-2, keepdim=True)
    v = wide_y / root - mean
    smooth = (root.square() * v * (v - walk.to(wide).matmul(v))).sum(-2)
    # Not below 0, where rounding is all there is; the gradient there is right as it is.
    smooth = smooth + (smooth.clamp(min=0) - smooth).detach()
    apart = (wide_y - wide_x).square()
    if importance is not None:
        apart = _importance(importance, walk).to(wide) * apart
    weight = weight.squeeze(-2)
    total = weight * smooth + (1 - weight) / 2 * apart.sum(-2)
    return (total.squeeze(-1) if y.ndim == x.ndim == 1 else total).to(y.dtype)


def _reversible(P: Transition) -> Transition:
    """The walk whose S is wanted: that of a transpose is that of the original."""
    check_transition(P)
    if not P.reversible:
        raise ValueError(
            f"P: expected a walk known to be reversible, got {P}; only a symmetric affinity has a symmetric "
            "normalisation, so build it from one, such as (W + W.mT) / 2, or state the walk's log_degree"
        )
    return P.T if P.stochastic == "columns" else P


def _scaling(walk: Transition, solver: Solver | Auto | None = None) -> Scaling:
    """√d, up to a factor; the solver is for the bound of y."""
    wide = checks.widest(walk.device)
    exact = walk.to(wide)
    log_degree = exact.log_degree
    assert log_degree is not None
    low, high = (end[..., None, None] for end in log_degree.detach().aminmax(dim=-1))
    # With √1 in the middle, roots keep within the range of the dtype at any spread that there is.
    root = ((log_degree.unsqueeze(-1) - (low + high) / 2) / 2).exp()
    if not bool((root.isfinite() & (root > 0)).all()):
        raise ValueError(
            f"P: expected degrees that differ by a factor whose root {wide} can hold, got log-degrees "
            f"{float((high - low).max()):.4g} apart; scale the features or the weights down"
        )
    eps = torch.finfo(wide).eps
    # In s/√d and again in √d·z.
    rounding = walk.degree_rounding(wide) + 2 * eps * (high - low + 4)

    def closer(s: Tensor, mu: Tensor, y: Tensor, max_steps: int | None) -> tuple[Tensor, Tensor]:
        return _closer(exact, root.detach(), rounding, solver, s, mu, y, max_steps)

    return Scaling(root, rounding, closer if walk.entrywise else None)


def _closer(
    P: Transition,
    root: Tensor,
    rounding: Tensor | float,
    solver: Solver | Auto | None,
    s: Tensor,
    mu: Tensor,
    y: Tensor,
    max_steps: int | None,
) -> tuple[Tensor, Tensor]:
    """A bound of |y − y*|, node by node, inf where there is none, and the products that it took, [..., 1].

    A = I − diag(µ)S has an inverse ≥ 0. So |y − y*| ≤ v·max |r|/g, r the residual of y, for any v ≥ 0 with
    A v ≥ g > 0. Here v is about A⁻¹(1 − µ), of which no entry exceeds √N; were it √d, this would be the bound
    of z. Of P it uses that no entry is negative and how products round, of v what is computed of A v.
    """
    eps, nodes = torch.finfo(y.dtype).eps, P.shape[-1]
    with torch.no_grad():
        ones = torch.ones(nodes, mu.shape[-1], dtype=y.dtype, device=y.device)
        found = solve_scaled(
            P,
            ones,
            mu,
            Scaling(root, rounding, None),
            solver=solver,
            tol=1e-2,
            initial=None,
            max_steps=max_steps,
            max_seconds=None,
            progress=None,
            on_failure="ignore",
        )
        v = found.value
        batch = checks.broadcast_batch([y.shape[:-2], v.shape[:-2]], "y and v")
        signals = [x.expand(*batch, *x.shape[-2:]) for x in (y, y.abs(), v)]
        scaled = torch.cat(signals, -1) / root
        walked = root * P.matmul(scaled)
        # What underflows in P may be something in S.
        lost = nodes * P.underflow(y.dtype) * root * scaled.abs().amax(-2, keepdim=True)
        own = walked[..., 2 * y.shape[-1] :]
        near, far = walked[..., : y.shape[-1]], walked[..., y.shape[-1] : 2 * y.shape[-1]]
        slip = mu * (P.rounding(y.dtype) + rounding + 8 * eps)
        residual = ((1 - mu) * s - y + mu * near).abs()
        residual = residual + slip * far + 8 * eps * (s.abs() + y.abs()) + lost[..., : y.shape[-1]]
        g = v - mu * own - slip * own - 8 * eps * v.abs() - lost[..., 2 * y.shape[-1] :]
        fits, quotient = (v >= 0) & (g > 0), residual / g
        if P.mask is not None:  # v and y are 0 at padded nodes, exactly
            fits, quotient = fits | ~P.mask.unsqueeze(-1), checks.real(quotient, P.mask)
        most = torch.where(fits.all(-2, keepdim=True), quotient.amax(-2, keepdim=True), torch.inf)
        bound = v * most * (1 + 8 * eps) + 2 * eps * y.abs()
        return bound.nan_to_num(nan=torch.inf), 1 + found.matvecs.amax(-1, keepdim=True)


def _one_mu(mu: float | Tensor, signal: Tensor, walk: Transition, importance: Tensor | None) -> Tensor:
    """µ in the best precision at hand, [..., 1, 1 or K]: Eq. 1 has one for all nodes."""
    weight = checks.mu(mu, signal.shape, walk.device)
    if weight.shape[-2] > 1:
        raise ValueError(
            f"mu: expected one µ for all nodes, got {checks.shape_text(weight)}; Eq. 1 weighs nodes by their "
            "importance"
        )
    if importance is not None and weight.shape[-1] > 1:
        raise ValueError(
            f"mu: expected one µ beside an importance, got {checks.shape_text(weight)}; minimise channel by "
            "channel"
        )
    return weight.to(checks.widest(walk.device))


def _importance(importance: Tensor, walk: Transition) -> Tensor:
    """M's diagonal as [..., N, 1], ≥ 0."""
    M = checks.floating(importance, "importance")
    nodes = walk.shape[-1]
    M = M.unsqueeze(-1) if M.ndim == 1 else M
    if M.ndim == 0 or tuple(M.shape[-2:]) != (nodes, 1):
        raise ValueError(
            f"importance: expected shape [N] or [..., N, 1] with N = {nodes}, got "
            f"{checks.shape_text(importance)}"
        )
    checks.same_dtype(M, "importance", walk.dtype, "P")
    checks.same_device(M, "importance", walk.device, "P")
    M = checks.real(M, walk.mask)
    checks.finite(M, "importance")
    if bool((M < 0).any()):
        raise ValueError(
            f"importance: expected values ≥ 0, got a smallest value of {float(M.detach().min()):.3g}"
        )
    return M
