"""The learned cascade: y⁰ = s, yᵗ⁺¹ = β_t (µ_t P_t yᵗ + (1 − µ_t) s) + (1 − β_t) yᵗ (Eq. 5)."""

from collections.abc import Iterator, Sequence
from typing import Literal, overload

import torch
from torch import Tensor, nn

from graphdiff import checks
from graphdiff.nn.embedding import FeatureEmbedding
from graphdiff.operators.base import Transition


class WalkStep(nn.Module):
    """One ⊕ of the paper: y ← β(µPy + (1 − µ)s) + (1 − β)y with learned or fixed µ and β.

    With A = I − µP and b = (1 − µ)s it is the relaxed Richardson step y + β(b − Ay).

    Args:
        mu: First value of µ: in (0, 1) where learned, in [0, 1) where fixed.
        beta: First value of β: in (0, 1) where learned, in [0, 1] where fixed.
        learn_mu: Learn µ, as the sigmoid of a scalar; else it stays `mu`, in the module's dtype.
        learn_beta: Learn β, likewise.

    Example:
        >>> import torch, graphdiff as gd
        >>> step = gd.WalkStep(mu=0.5, beta=1.0, learn_beta=False)
        >>> P = gd.DenseTransition(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> s = torch.tensor([[1.0], [3.0]])
        >>> step(P, s, s).squeeze(-1)
        tensor([2., 2.], grad_fn=<SqueezeBackward1>)
    """

    def __init__(
        self, mu: float = 0.5, beta: float = 0.5, *, learn_mu: bool = True, learn_beta: bool = True
    ) -> None:
        super().__init__()
        self.learn_mu, self.learn_beta = learn_mu, learn_beta
        if learn_mu:
            self.mu_logit = nn.Parameter(torch.logit(torch.tensor(checks.fraction(mu, "mu"))))
        else:
            self.register_buffer("mu_fixed", torch.tensor(checks.closed_fraction(mu, "mu", below_one=True)))
        if learn_beta:
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
        return torch.sigmoid(self.beta_logit) if self.learn_beta else self.get_buffer("beta_fixed")

    def forward(self, P: Transition, y: Tensor, s: Tensor) -> Tensor:
        """The next y, [..., N, K], from the last one and the seed."""
        mu, beta = self.mu, self.beta
        return beta * (mu * P.matmul(y) + (1 - mu) * s) + (1 - beta) * y

    def extra_repr(self) -> str:
        """The values, and which of them are learned."""
        kinds = [("µ", self.mu, self.learn_mu), ("β", self.beta, self.learn_beta)]
        return ", ".join(
            f"{name}={float(value.detach()):.4g} ({'learned' if learned else 'fixed'})"
            for name, value, learned in kinds
        )


class CascadedWalk(nn.Module):
    """Carries a seed over the nodes by T walks, each with its own transition, µ and β (Eq. 5).

    The transitions come from T feature maps of any sizes, from T sets of node features, or are given
    ready. No N×N matrix is built.

    Args:
        feature_channels: Channels C_t of the T features; None with `steps`.
        embedding_channels: d of every ψ.
        steps: T, where the transitions are given ready; None with `feature_channels`.
        mu: First value of every µ_t (`WalkStep`).
        beta: First value of every β_t.
        learn_mu: Learn them, as sigmoids of scalars; else they stay `mu`.
        learn_beta: Likewise.
        init_gain: First gain of every embedding (`FeatureEmbedding`).
        scale: Factor on every embedding's inner products.

    Raises:
        ValueError: Both or neither of `feature_channels` and `steps` are given, or a number does not fit.

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
        mu: float = 0.5,
        beta: float = 0.5,
        learn_mu: bool = True,
        learn_beta: bool = True,
        init_gain: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if (feature_channels is None) == (steps is None):
            raise ValueError(
                "expected either feature_channels, for walks on features, or steps, for ready transitions; "
                f"got feature_channels={feature_channels} and steps={steps}"
            )
        channels = [] if feature_channels is None else list(feature_channels)
        count = checks.positive_integer(len(channels) if steps is None else steps, "number of walks")
        self.embeddings = nn.ModuleList(
            FeatureEmbedding(c, embedding_channels, init_gain=init_gain, scale=scale) for c in channels
        )
        self.steps = nn.ModuleList(
            WalkStep(mu, beta, learn_mu=learn_mu, learn_beta=learn_beta) for _ in range(count)
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
        self, features: Sequence[Tensor], grid: tuple[int, int] | None = None
    ) -> list[Transition]:
        """The operators P_t of some features; ask them for `rows`.

        Args:
            features: T maps [B, C_t, H_t, W_t], or T node features [B, N, C_t].
            grid: (h, w) of the seed, for maps; the size of the smallest map if None.
        """
        if not self.embeddings:
            raise ValueError("features: this cascade was made with steps=, so give it ready transitions")
        self._check_count(features)
        if grid is None and features[0].ndim == 4:
            smallest = min(features, key=lambda f: f.shape[-1] * f.shape[-2])
            grid = (smallest.shape[-2], smallest.shape[-1])
        return [embed(f, grid) for embed, f in zip(self.embeddings, features, strict=True)]

    @overload
    def forward(
        self,
        seed: Tensor,
        features: Sequence[Tensor] | Sequence[Transition],
        *,
        return_walks: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self, seed: Tensor, features: Sequence[Tensor] | Sequence[Transition], *, return_walks: Literal[True]
    ) -> tuple[Tensor, list[Tensor]]: ...

    def forward(
        self,
        seed: Tensor,
        features: Sequence[Tensor] | Sequence[Transition],
        *,
        return_walks: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Diffuses the seed.

        Args:
            seed: s, a map [B, K, h, w], or node values [B, N, K].
            features: T maps [B, C_t, H_t, W_t] with a seed that is a map; T node features [B, N, C_t] with
                a seed of node values; or T ready transitions with either.
            return_walks: Return the output of every walk too.

        Returns:
            y in shape and dtype of `seed`; with `return_walks` also the list of y¹ … yᵀ, whose last is y.
            Half precision is carried in float32 in between.

        Raises:
            TypeError: `seed` and the features differ in dtype, or are not floating.
            ValueError: Numbers, shapes or devices do not fit.
        """
        checks.floating(seed, "seed")
        if seed.ndim not in (3, 4) or seed.numel() == 0:
            raise ValueError(
                "seed: expected a map [B, K, h, w] or node values [B, N, K], not empty, got "
                f"{checks.shape_text(seed)}"
            )
        self._check_count(features)
        operators = self._operators(seed, features)
        working = torch.float32 if seed.dtype.itemsize < 4 else seed.dtype
        s = (seed.flatten(2).mT if seed.ndim == 4 else seed).to(working)

        y, walks = s, []
        for step, P in zip(self._walk_steps(), operators, strict=True):
            P = P.to(working) if P.dtype.itemsize < 4 else P
            checks.same_dtype(s, "seed", P.dtype, "the features")
            checks.same_device(s, "seed", P.device, "the features")
            if P.shape[-1] != s.shape[-2]:
                raise ValueError(
                    f"seed: expected one value per node of the walk, which has {P.shape[-1]}, got "
                    f"{s.shape[-2]} nodes"
                )
            checks.broadcast_batch([P.shape[:-2], s.shape[:-2]], "features and seed")
            y = step(P, y, s)
            walks.append(y)
        shaped = [self._like(walk, seed) for walk in (walks if return_walks else walks[-1:])]
        return (shaped[-1], shaped) if return_walks else shaped[-1]

    def _operators(
        self, seed: Tensor, features: Sequence[Tensor] | Sequence[Transition]
    ) -> Sequence[Transition]:
        if isinstance(features[0], Transition):
            return features  # type: ignore[return-value]  # all are what the first is
        if any(f.ndim != seed.ndim for f in features):  # type: ignore[union-attr]
            raise ValueError(
                f"features: expected {'maps [B, C, H, W]' if seed.ndim == 4 else 'node features [B, N, C]'} "
                f"with a seed of shape {checks.shape_text(seed)}, got "
                + ", ".join(checks.shape_text(f) for f in features)  # type: ignore[arg-type]
            )
        grid = (seed.shape[-2], seed.shape[-1]) if seed.ndim == 4 else None
        return self.transitions(features, grid)  # type: ignore[arg-type]

    def _check_count(self, features: Sequence[object]) -> None:
        if len(features) != len(self.steps):
            raise ValueError(f"features: expected {len(self.steps)}, one per walk, got {len(features)}")

    def _walk_steps(self) -> list[WalkStep]:
        return list(self.steps)  # type: ignore[arg-type]  # ModuleList forgets what it holds

    @staticmethod
    def _like(y: Tensor, seed: Tensor) -> Tensor:
        return (y.mT.reshape(seed.shape) if seed.ndim == 4 else y).to(seed.dtype)
