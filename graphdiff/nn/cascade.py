"""The learned cascade: y⁰ = s, yᵗ⁺¹ = β_t (µ_t P_t yᵗ + (1 − µ_t) s) + (1 − β_t) yᵗ (Eq. 5)."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, Self, overload

import torch
from torch import Tensor, nn

from graphdiff import checks
from graphdiff.nn.embedding import FeatureEmbedding, embed_all
from graphdiff.nn.padding import check_no_mask, real_seed, unbatched
from graphdiff.nn.seed import fitting, grid_of, like, signal_of
from graphdiff.operators.base import Transition

Relaxation = Literal["sigmoid", "free"]


class WalkStep(nn.Module):
    """One ⊕ of the paper: y ← β(µPy + (1 − µ)s) + (1 − β)y with learned or fixed µ and β.

    With A = I − µP and b = (1 − µ)s it is the relaxed Richardson step y + β(b − Ay).

    Args:
        mu: First value of µ: in (0, 1) where learned, in [0, 1) where fixed.
        beta: First value of β: in (0, 1) where learned, in [0, 1] where fixed; finite and > 0 where free.
        learn_mu: Learn µ, as the sigmoid of a scalar; else it stays `mu`, in the module's dtype.
        learn_beta: Learn β, likewise, or as it is where free.
        relaxation: "sigmoid" keeps β within [0, 1], so that a step is an average. "free" does not: β > 1
            reaches further than a walk does (`CascadedWalk.chebyshev`), but a step may then leave the range
            of the seed.

    Raises:
        ValueError: A first value does not fit, or `relaxation` is neither.

    Example:
        >>> import torch, graphdiff as gd
        >>> step = gd.WalkStep(mu=0.5, beta=1.0, learn_beta=False)
        >>> P = gd.DenseTransition(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> s = torch.tensor([[1.0], [3.0]])
        >>> step(P, s, s).squeeze(-1)
        tensor([2., 2.], grad_fn=<SqueezeBackward1>)
    """

    def __init__(
        self,
        mu: float = 0.5,
        beta: float = 0.5,
        *,
        learn_mu: bool = True,
        learn_beta: bool = True,
        relaxation: Relaxation = "sigmoid",
    ) -> None:
        super().__init__()
        if relaxation not in ("sigmoid", "free"):
            raise ValueError(f'relaxation: expected "sigmoid" or "free", got {relaxation!r}')
        self.learn_mu, self.learn_beta, self.relaxation = learn_mu, learn_beta, relaxation
        if learn_mu:
            self.mu_logit = nn.Parameter(torch.logit(torch.tensor(checks.fraction(mu, "mu"))))
        else:
            self.register_buffer("mu_fixed", torch.tensor(checks.closed_fraction(mu, "mu", below_one=True)))
        if relaxation == "free":
            first = torch.tensor(checks.positive_number(beta, "beta"))
            if learn_beta:
                self.beta_free = nn.Parameter(first)
            else:
                self.register_buffer("beta_fixed", first)
        elif learn_beta:
            self.beta_logit = nn.Parameter(torch.logit(torch.tensor(checks.fraction(beta, "beta"))))
        else:
            self.register_buffer("beta_fixed", torch.tensor(checks.closed_fraction(beta, "beta")))

    @property
    def mu(self) -> Tensor:
        """µ, a 0-d tensor."""
        return torch.sigmoid(self.mu_logit) if self.learn_mu else self.get_buffer("mu_fixed")

    @property
    def beta(self) -> Tensor:
        """β, a 0-d tensor."""
        if not self.learn_beta:
            return self.get_buffer("beta_fixed")
        return self.beta_free if self.relaxation == "free" else torch.sigmoid(self.beta_logit)

    def forward(self, P: Transition, y: Tensor, s: Tensor) -> Tensor:
        """The next y, [..., N, K], from the last one and the seed."""
        mu, beta = self.mu, self.beta
        return beta * (mu * P.matmul(y) + (1 - mu) * s) + (1 - beta) * y

    def extra_repr(self) -> str:
        """The values, and which of them are learned."""
        kinds = [("µ", self.mu, self.learn_mu), ("β", self.beta, self.learn_beta)]
        values = ", ".join(
            f"{name}={float(value.detach()):.4g} ({'learned' if learned else 'fixed'})"
            for name, value, learned in kinds
        )
        return values if self.relaxation == "sigmoid" else f"{values}, relaxation={self.relaxation!r}"


class CascadedWalk(nn.Module):
    """Carries a seed over the nodes by T walks, each with its own transition, µ and β (Eq. 5).

    The transitions come from T feature maps of any sizes, from T sets of node features, or are given
    ready. No N×N matrix is built, but for a small one (`AttentionTransition` says when).

    Args:
        feature_channels: Channels C_t of the T features; None with `steps`.
        embedding_channels: d of every ψ.
        steps: T, where the transitions are given ready; None with `feature_channels`.
        mu: First value of every µ_t (`WalkStep`), or T of them.
        beta: First value of every β_t, or T of them.
        learn_mu: Learn them, as sigmoids of scalars; else they stay `mu`.
        learn_beta: Likewise.
        relaxation: "sigmoid" keeps every β_t within [0, 1], "free" does not.
        init_gain: First gain of every embedding (`FeatureEmbedding`).
        scale: Factor on every embedding's inner products.

    Raises:
        ValueError: Both or neither of `feature_channels` and `steps` are given, or a number or how many of
            them does not fit.

    Example:
        >>> import torch, graphdiff as gd
        >>> refine = gd.CascadedWalk(feature_channels=[3, 16], embedding_channels=8)
        >>> seed = torch.randn(1, 21, 6, 6)
        >>> features = [torch.randn(1, 3, 48, 48), torch.randn(1, 16, 12, 12)]
        >>> y, walks = refine(seed, features, return_walks=True)
        >>> y.shape, len(walks)
        (torch.Size([1, 21, 6, 6]), 2)
        >>> refine.transitions(features, grid=(6, 6))[0].rows([0]).shape
        torch.Size([1, 1, 36])
    """

    def __init__(
        self,
        feature_channels: Sequence[int] | None = None,
        embedding_channels: int = 64,
        *,
        steps: int | None = None,
        mu: float | Sequence[float] = 0.5,
        beta: float | Sequence[float] = 0.5,
        learn_mu: bool = True,
        learn_beta: bool = True,
        relaxation: Relaxation = "sigmoid",
        init_gain: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        count = _count(feature_channels, steps)
        channels = [] if feature_channels is None else checks.channel_counts(feature_channels)
        self.embeddings = nn.ModuleList(
            FeatureEmbedding(c, embedding_channels, init_gain=init_gain, scale=scale) for c in channels
        )
        self.steps = nn.ModuleList(
            WalkStep(m, b, learn_mu=learn_mu, learn_beta=learn_beta, relaxation=relaxation)
            for m, b in zip(_each(mu, count, "mu"), _each(beta, count, "beta"), strict=True)
        )

    @classmethod
    def chebyshev(
        cls,
        feature_channels: Sequence[int] | None = None,
        embedding_channels: int = 64,
        *,
        steps: int | None = None,
        mu: float = 0.5,
        positive_semidefinite: bool | None = None,
        learn_mu: bool = True,
        learn_beta: bool = True,
        init_gain: float = 1.0,
        scale: float = 1.0,
    ) -> Self:
        r"""A free cascade that starts from the best β_t there are for one P and one µ.

        Then its error is a polynomial in A = I − µP times the first error,

        .. math:: y_T - y^* = \prod_t (I - \beta_t A) (s - y^*),
                  \quad \|y_T - y^*\|_D \le \frac{2\rho^T}{1 + \rho^{2T}} \|s - y^*\|_D,
                  \quad \rho = \frac{\sqrt\kappa - 1}{\sqrt\kappa + 1},

        with 1/β_t the Chebyshev nodes of an interval that holds the spectrum of A for any reversible P:
        [1 − µ, 1] where P is positive semi-definite, so κ = 1/(1 − µ), else [1 − µ, 1 + µ], so
        κ = (1 + µ)/(1 − µ). With a P of its own in every step this is a starting point, not a promise. The
        β_t stand in Leja order, which keeps the products bounded in between for any number of steps.

        Args:
            feature_channels: As in the constructor, and so are the arguments not named here.
            embedding_channels: d of every ψ.
            steps: T, where the transitions are given ready.
            mu: First value of all µ_t.
            positive_semidefinite: Whether the walks are. If None, yes for walks on features, which are
                attention, and no for ready transitions: [1 − µ, 1 + µ] is right for every reversible walk,
                whereas a spectrum that leaves the assumed interval makes the error grow.
            learn_mu: Learn µ_t.
            learn_beta: Learn β_t, free of the sigmoid.
            init_gain: First gain of every embedding.
            scale: Factor on every embedding's inner products.

        Raises:
            ValueError: As in the constructor.

        Example:
            >>> import torch, graphdiff as gd
            >>> P, s = gd.AttentionTransition(torch.randn(50, 4)), torch.randn(1, 50, 2)
            >>> walk = gd.CascadedWalk.chebyshev(steps=5, mu=0.9, positive_semidefinite=True, learn_mu=False)
            >>> [round(b, 2) for b in walk.beta.tolist()]
            [1.02, 8.2, 1.82, 3.5, 1.23]
            >>> bool((walk(s, [P] * 5) - gd.diffuse(P, s, mu=0.9)).abs().max() < 0.3)
            True
        """
        count = _count(feature_channels, steps)
        mu = checks.closed_fraction(mu, "mu", below_one=True)
        if positive_semidefinite is None:
            positive_semidefinite = steps is None
        return cls(
            feature_channels,
            embedding_channels,
            steps=steps,
            mu=mu,
            beta=_chebyshev_relaxations(count, 1 - mu, 1 if positive_semidefinite else 1 + mu),
            learn_mu=learn_mu,
            learn_beta=learn_beta,
            relaxation="free",
            init_gain=init_gain,
            scale=scale,
        )

    @property
    def mu(self) -> Tensor:
        """µ_t of the T walks, [T]."""
        return torch.stack([step.mu for step in self._walk_steps()])

    @property
    def beta(self) -> Tensor:
        """β_t of the T walks, [T]."""
        return torch.stack([step.beta for step in self._walk_steps()])

    def coefficients(self) -> Iterator[nn.Parameter]:
        """The learned µ and β alone, for an optimiser group of their own (without weight decay)."""
        return self.steps.parameters()

    def transitions(
        self,
        features: Sequence[Tensor],
        grid: tuple[int, int] | None = None,
        *,
        mask: Tensor | None = None,
    ) -> list[Transition]:
        """The operators P_t of some features; ask them for `rows`.

        Args:
            features: T maps [B, C_t, H_t, W_t], or T node features [B, N, C_t].
            grid: (h, w) of the seed, for maps; the size of the smallest map if None.
            mask: Which nodes of node features are real, bool [B, N]; all if None.
        """
        if not self.embeddings:
            raise ValueError("features: this cascade was made with steps=, so give it ready transitions")
        self._check_count(features)
        return list(embed_all(self.embeddings, features, grid, mask))

    @overload
    def forward(
        self,
        seed: Tensor,
        features: Sequence[Tensor] | Sequence[Transition],
        *,
        return_walks: Literal[False] = False,
        mask: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        seed: Tensor,
        features: Sequence[Tensor] | Sequence[Transition],
        *,
        return_walks: Literal[True],
        mask: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]: ...

    def forward(
        self,
        seed: Tensor,
        features: Sequence[Tensor] | Sequence[Transition],
        *,
        return_walks: bool = False,
        mask: Tensor | None = None,
        batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Diffuses the seed.

        Args:
            seed: s, a map [B, K, h, w], or node values [B, N, K]. Of seed and features either may have
                B = 1, which then serves all.
            features: T maps [B, C_t, H_t, W_t] with a seed that is a map; T node features [B, N, C_t] with
                a seed of node values; or T ready transitions with either.
            return_walks: Return the output of every walk too.
            mask: Which nodes are real where graphs of different sizes are padded, bool [B, N], with node
                features and values; all if None. What stands at the others does not count, not in batch
                norm either; y is 0 there. Ready walks bring their own mask.
            batch: A PyG batch vector [total], for node features [total, C_t] and values [total, K] of graphs
                one after another; as a mask it is for eager mode.

        Returns:
            y as `seed` is, a map or node values of its dtype; with `return_walks` also the list of y¹ … yᵀ,
            whose last is y. Half precision is carried in float32 in between.

        Raises:
            TypeError: `seed` and the features differ in dtype, or are not floating.
            ValueError: Numbers, shapes or devices do not fit.
        """
        if batch is not None:
            padded, nodes, padding = unbatched(seed, features, batch, mask)
            _, walks = self(padded, nodes, return_walks=True, mask=padding.mask)
            walks = [padding.unpad(y) for y in walks]
            return (walks[-1], walks) if return_walks else walks[-1]
        s = signal_of(seed)
        self._check_count(features)
        operators = self._operators(seed, features, mask)
        s = real_seed(s, operators)
        y, walks = s, []
        for step, P in zip(self._walk_steps(), operators, strict=True):
            y = step(fitting(P, s), y, s)
            walks.append(y)
        shaped = [like(seed, walk) for walk in (walks if return_walks else walks[-1:])]
        return (shaped[-1], shaped) if return_walks else shaped[-1]

    def _operators(
        self, seed: Tensor, features: Sequence[Tensor] | Sequence[Transition], mask: Tensor | None
    ) -> Sequence[Transition]:
        if isinstance(features[0], Transition):
            check_no_mask(mask)
            return features  # type: ignore[return-value]  # all are what the first is
        return self.transitions(features, grid_of(seed, features), mask=mask)  # type: ignore[arg-type]

    def _check_count(self, features: Sequence[object]) -> None:
        checks.listed(features)
        if len(features) != len(self.steps):
            raise ValueError(f"features: expected {len(self.steps)}, one per walk, got {len(features)}")

    def _walk_steps(self) -> list[WalkStep]:
        return list(self.steps)  # type: ignore[arg-type]  # ModuleList forgets what it holds


def _count(feature_channels: Sequence[int] | None, steps: int | None) -> int:
    """T."""
    if feature_channels is not None and steps is None:
        return checks.positive_integer(len(checks.channel_counts(feature_channels)), "number of walks")
    if feature_channels is None and steps is not None:
        return checks.positive_integer(steps, "number of walks")
    raise ValueError(
        "expected either feature_channels, for walks on features, or steps, for ready transitions; "
        f"got feature_channels={feature_channels} and steps={steps}"
    )


def _each(value: float | Sequence[float], count: int, name: str) -> Sequence[float]:
    """One value for each walk."""
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(
            f"{name}: expected one number for all walks or {count}, one for each, got {len(value)}"
        )
    return value


def _chebyshev_relaxations(count: int, low: float, high: float) -> list[float]:
    """β_t = 1/node over the Chebyshev nodes of [low, high], in Leja order.

    Each next node is as far as can be from those before it (their distances multiplied): in sorted order
    the products on the way grow exponentially with the number of steps, and take the digits with them.
    """
    middle, radius = (high + low) / 2, (high - low) / 2
    left = [math.cos((2 * k + 1) / (2 * count) * math.pi) for k in range(count)]
    ordered, log_distance = [], [0.0] * count
    while left:
        # The first is the largest node, so the smallest β.
        at = max(range(len(left)), key=log_distance.__getitem__)
        node = left.pop(at)
        log_distance.pop(at)
        log_distance = [total + math.log(abs(x - node)) for total, x in zip(log_distance, left, strict=True)]
        ordered.append(1 / (middle + radius * node))
    return ordered
