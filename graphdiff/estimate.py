"""How hard a solve will be: λ₂ and λ_N of a walk from a few dozen products, and what a tolerance then takes.

For reversible walks by Lanczos in the product ⟨x, y⟩ = Σ d_i x_i y_i, on the complement of the constants;
else by Arnoldi on (I − 1uᵀ)P, uᵀ the mean, on vectors of mean 0: the spectrum of P without that 1.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graphdiff import checks
from graphdiff.operators.base import Transition, check_transition
from graphdiff.solvers.base import inner

# Enough for the ends of most spectra to two digits; a wider gap shows earlier and ends the work.
MOST_PRODUCTS = 64
# Beyond this spread of log-degrees the smallest nodes drown in the rounding of the largest.
WIDEST = 60.0


@dataclass(frozen=True)
class Estimate:
    """What to expect of a solve. Estimates, not bounds: Ritz values lie within the spectrum.

    Attributes:
        lambda_2: Largest eigenvalue of P but the 1 of the constants, [...]; for walks that are not reversible
            the largest absolute value.
        lambda_n: Smallest eigenvalue, [...]; minus `lambda_2` for walks that are not reversible.
        uncertainty: An eigenvalue lies within this of `lambda_2`, [...]; nan where the walk is not
            reversible, or its log-degrees spread by more than 60.
        products: About how many products with P the tolerance takes at most, by solver; of the slowest graph.
        measured_with: Products that this estimate took.
    """

    lambda_2: Tensor
    lambda_n: Tensor
    uncertainty: Tensor
    products: dict[str, int]
    measured_with: int


def estimate(P: Transition, mu: float | Tensor, tol: float | None = None) -> Estimate:
    r"""Measures λ₂ and says how many products a solve will need, before solving.

    The error of a walk from s falls by µ·max(|λ₂|, |λ_N|) a step, that of `CG` at least by
    (√κ − 1)/(√κ + 1), κ = (1 − µλ_N)/(1 − µλ₂), and `Chebyshev` uses κ = (1 + µ)/(1 − µ), or 1/(1 − µ), of µ
    alone. The certificate asks for a residual of (1 − µ)·tol.

    Args:
        P: Any transition, [..., N, N]; a transpose has the eigenvalues of the original.
        mu: µ in [0, 1), a number or tensor; the largest counts. With one for each node λ₂ is of no help, and
            the counts are those that µ alone allows.
        tol: As in `solve`: 1e-10 in float64, else 1e-5, if None.

    Returns:
        An `Estimate`. Without randomness: the same operator gives the same numbers.

    Raises:
        TypeError: `P` is no transition.
        ValueError: µ or tol does not fit, or P still waits for a signal to restart at.

    Example:
        >>> import torch, graphdiff as gd
        >>> cycle = gd.SparseTransition.from_edge_index(
        ...     torch.tensor([[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]]), undirected=True, dtype=torch.float64)
        >>> found = gd.estimate(cycle, mu=0.99, tol=1e-6)
        >>> round(float(found.lambda_2), 4), round(float(found.lambda_n), 4)
        (0.309, -0.809)
        >>> found.products["Walk"] > found.products["CG"]
        True
    """
    check_transition(P)
    if P.restarts:
        raise ValueError(f"P: {P} restarts at a signal; bind one with P.restarting_at(distribution)")
    checks.some_graph(P.shape[:-2], "P")
    P = P.T if P.stochastic == "columns" else P
    P = P.to(torch.float32) if P.dtype.itemsize < 4 else P
    tol = (1e-10 if P.dtype == torch.float64 else 1e-5) if tol is None else checks.positive_number(tol, "tol")
    largest = float(checks.mu(mu, torch.Size([*P.shape[:-1], _channels(mu)]), P.device).detach().max())
    with torch.no_grad():
        log_degree = P.log_degree if P.reversible else None
        if log_degree is not None and bool((log_degree.amax(-1) - log_degree.amin(-1) < WIDEST).all()):
            high, low, uncertainty, used = _lanczos(P, log_degree, largest)
        else:
            high, low, uncertainty, used = _arnoldi(P)

    target = min(tol * (1 - largest), 0.5)

    def products(rate: Tensor) -> int:
        """The first and the last one are for the residual."""
        slowest = float(rate.max().clamp(1e-300, 1 - 1e-16))
        return 2 + math.ceil(math.log(target) / math.log(slowest))

    if isinstance(mu, Tensor) and mu.ndim > 1 and mu.shape[-2] > 1:
        # With a µ for each node the constants are no eigenvector of MP, and λ₂ of P alone says nothing.
        walk, low_end, high_end = torch.tensor(largest), -torch.ones_like(low), torch.ones_like(high)
        low_end = torch.zeros_like(low) if P.positive_semidefinite else low_end
    else:
        walk, low_end, high_end = largest * torch.maximum(high.abs(), low.abs()), low, high
    counts = {"Walk": products(walk)}
    if P.reversible:
        counts["CG"] = products(_krylov_rate((1 - largest * low_end) / (1 - largest * high_end)))
        top = 1.0 if P.positive_semidefinite else 1 + largest
        counts["Chebyshev"] = products(_krylov_rate(torch.tensor(top / (1 - largest))))
    return Estimate(high, low, uncertainty, counts, used)


def _channels(mu: float | Tensor) -> int:
    return mu.shape[-1] if isinstance(mu, Tensor) and mu.ndim > 1 else 1


def _krylov_rate(condition: Tensor) -> Tensor:
    root = condition.sqrt()
    return (root - 1) / (root + 1)


def _start(P: Transition) -> Tensor:
    """The same noise for every graph and run, [..., N, 1]."""
    noise = torch.randn(P.shape[-1], 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return checks.real(noise.to(P.device, P.dtype).expand(*P.shape[:-2], *noise.shape), P.mask)


def _without_mean(P: Transition, w: Tensor) -> Tensor:
    """Less the mean over real nodes; 0 at padded ones, which as components of their own would have λ = 1."""
    if P.mask is None:
        return w - w.mean(-2, keepdim=True)
    count = P.mask.sum(-1)[..., None, None].clamp(min=1)
    return checks.real(w - w.sum(-2, keepdim=True) / count, P.mask)


def _lanczos(P: Transition, log_degree: Tensor, mu: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """Largest and smallest Ritz value of P on the complement of the constants, the residual of the first."""
    log_weight = (log_degree - log_degree.amax(-1, keepdim=True)).unsqueeze(-1)
    weight = log_weight.to(torch.float32 if P.device.type == "mps" else torch.float64).exp()
    weight = checks.real(weight, P.mask)
    ones = torch.ones_like(weight)

    def normalised(v: Tensor) -> tuple[Tensor, Tensor]:
        # Rounding brings the constants back at every step.
        v = checks.real(v - (inner(weight, v, ones) / inner(weight, ones, ones)).to(v.dtype), P.mask)
        length = inner(weight, v, v).sqrt()
        return torch.where(length > 0, v / length, 0.0).to(v.dtype), length

    v, length = normalised(_start(P))
    previous, beta = torch.zeros_like(v), torch.zeros_like(length)
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    while True:
        w = P.matmul(v)
        alive = inner(weight, v, v) > 0.5
        alpha = inner(weight, w, v)
        # Where the space is exhausted, a value from within the spectrum fills up the matrix.
        diagonal.append(torch.where(alive, alpha, diagonal[0] if diagonal else 0.0)[..., 0, 0])
        w = w - alpha.to(w.dtype) * v - beta.to(w.dtype) * previous
        previous = v
        v, beta = normalised(w)
        beta = torch.where(alive & (beta > 1e-10), beta, 0.0)
        v = torch.where(beta > 0, v, 0.0)
        used = len(diagonal)
        last = used >= min(MOST_PRODUCTS, max(1, P.shape[-1] - 1)) or not bool((beta > 0).any())
        if used % 8 == 0 or last:
            T = torch.diag_embed(torch.stack(diagonal, -1))
            if beside:
                off = torch.stack(beside, -1)
                T = T + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
            values, vectors = torch.linalg.eigh(T)
            high, low = values[..., -1].clamp(-1, 1), values[..., 0].clamp(-1, 1)
            low_uncertainty, uncertainty = (beta[..., 0, 0] * vectors[..., -1, end].abs() for end in (0, -1))
            known = (mu * uncertainty < 0.01 * (1 - mu * high)) & (low_uncertainty < 0.01)
            if last or bool(known.all()):
                return high, low, uncertainty, used
        beside.append(beta[..., 0, 0])


def _arnoldi(P: Transition) -> tuple[Tensor, Tensor, Tensor, int]:
    """The ends of the Ritz values of P − 1uᵀP, uᵀ the mean: ± the largest absolute one where complex."""
    one = torch.ones((), dtype=P.dtype, device=P.device)
    steps = max(1, min(MOST_PRODUCTS // 2, P.shape[-1] - 1))
    w = _start(P)
    basis: list[Tensor] = []
    H = torch.zeros(*P.shape[:-2], steps + 1, steps, dtype=P.dtype, device=P.device)
    for k in range(steps + 1):
        w = _without_mean(P, w)
        length = inner(one, w, w).sqrt()
        alive = length > (1e-10 if k else 0)
        if k:
            H[..., k, k - 1] = torch.where(alive, length, 0.0)[..., 0, 0]
        if k == steps:
            break
        basis.append(torch.where(alive, w / length, 0.0).to(P.dtype))
        w = P.matmul(basis[-1])
        w = _without_mean(P, w)
        for _ in range(2):  # once more, for orthogonality to working precision
            for i, q in enumerate(basis):
                share = inner(one, w, q)
                H[..., i, k] += share[..., 0, 0]
                w = w - share * q
        # Where the space is exhausted, a value from within the spectrum fills up the matrix.
        H[..., k, k] = torch.where(alive[..., 0, 0], H[..., k, k], H[..., 0, 0])
    values = torch.linalg.eigvals(H[..., :steps, :])
    high = (values.real if P.reversible else values.abs()).amax(-1).clamp(-1, 1)
    low = values.real.amin(-1).clamp(-1, 1) if P.reversible else -high
    return high, low, torch.full_like(high, torch.nan), steps
