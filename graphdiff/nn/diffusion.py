"""The exact layer: y = (1 − µ)(I − µP)⁻¹ s with one walk P on all features, in place of a cascade."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from graphdiff import checks, solvers
from graphdiff.diffusion import diffuse
from graphdiff.implicit import Call, gradients
from graphdiff.nn.embedding import FeatureEmbedding, embed_all
from graphdiff.nn.padding import check_no_mask, real_seed, unbatched
from graphdiff.nn.seed import fitting, grid_of, like, signal_of
from graphdiff.operators.attention import AttentionTransition
from graphdiff.operators.base import Transition
from graphdiff.solvers import Auto, Solver
from graphdiff.solvers.auto import chosen
from graphdiff.solvers.base import Budget


class Diffusion(nn.Module):
    """Carries a seed over the nodes by one exact diffusion (Eq. 2), with µ learned.

    Its walk is softmax(ψψᵀ) with the embeddings of all features side by side in ψ: a product of kernels, so
    reversible and positive semi-definite as each of them. It takes and returns what `CascadedWalk` does;
    exact against cascaded is one module for another. Memory does not depend on how many products a solve
    takes. On features it compiles with ``torch.compile(layer, fullgraph=True)``, then with the library's own
    solvers and first derivatives alone.

    Args:
        feature_channels: Channels C_t of the T features; None where the walk is given ready.
        embedding_channels: d of every embedding; ψ has T·d channels.
        mu: First value of µ: in (0, 1) where learned, in [0, 1) where fixed.
        learn_mu: Learn µ, as the sigmoid of a scalar.
        tol: Tolerance of the solves, forward and backward. A layer in training needs no more than the
            default.
        solver: How; `solvers.Auto()` if None.
        init_gain: First gain of every embedding (`FeatureEmbedding`).
        scale: Factor on the embeddings' inner products.

    Raises:
        TypeError: `solver` is no solver.
        ValueError: A number does not fit.

    Example:
        >>> import torch, graphdiff as gd
        >>> layer = gd.Diffusion(feature_channels=[3, 16], embedding_channels=8)
        >>> seed = torch.randn(1, 21, 6, 6)
        >>> features = [torch.randn(1, 3, 48, 48), torch.randn(1, 16, 12, 12)]
        >>> layer(seed, features).shape, layer.mu
        (torch.Size([1, 21, 6, 6]), tensor([0.5000], grad_fn=<UnsqueezeBackward0>))
    """

    def __init__(
        self,
        feature_channels: Sequence[int] | None = None,
        embedding_channels: int = 64,
        mu: float = 0.5,
        learn_mu: bool = True,
        tol: float = 1e-3,
        solver: Solver | Auto | None = None,
        *,
        init_gain: float = 1.0,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        channels = [] if feature_channels is None else checks.channel_counts(feature_channels)
        if feature_channels is not None:
            checks.positive_integer(len(channels), "number of features")
        self.embeddings = nn.ModuleList(
            FeatureEmbedding(c, embedding_channels, init_gain=init_gain, scale=scale) for c in channels
        )
        self.tol, self.learn_mu = checks.positive_number(tol, "tol"), learn_mu
        self.solver = Auto() if solver is None else solver
        if not isinstance(self.solver, Solver | Auto):
            raise TypeError(f"solver: expected a solver such as solvers.CG(), got {solver!r}")
        # Now, because the text of a dataclass is one of the things that torch.compile cannot look into.
        self._solver_name = str(self.solver)
        if learn_mu:
            self.mu_logit = nn.Parameter(torch.logit(torch.tensor(checks.fraction(mu, "mu"))))
        else:
            self.register_buffer("mu_fixed", torch.tensor(checks.closed_fraction(mu, "mu", below_one=True)))

    @property
    def mu(self) -> Tensor:
        """µ, [1]: one diffusion."""
        return (torch.sigmoid(self.mu_logit) if self.learn_mu else self.get_buffer("mu_fixed")).unsqueeze(0)

    def coefficients(self) -> Iterator[nn.Parameter]:
        """The learned µ alone, if it is, for an optimiser group of its own (without weight decay)."""
        return iter([self.mu_logit] if self.learn_mu else [])

    def transitions(
        self,
        features: Sequence[Tensor],
        grid: tuple[int, int] | None = None,
        *,
        mask: Tensor | None = None,
    ) -> list[Transition]:
        """The one operator of some features, in a list; ask it for `rows`.

        Args:
            features: T maps [B, C_t, H_t, W_t], or T node features [B, N, C_t].
            grid: (h, w) of the seed, for maps; the size of the smallest map if None.
            mask: Which nodes of node features are real, bool [B, N]; all if None.
        """
        if not self.embeddings:
            raise ValueError(
                "features: this layer was made without feature_channels, so give it a transition"
            )
        checks.listed(features)
        if len(features) != len(self.embeddings):
            raise ValueError(f"features: expected {len(self.embeddings)}, got {len(features)}")
        walks = embed_all(self.embeddings, features, grid, mask)
        nodes = walks[0].shape[-1]
        if any(P.shape[-1] != nodes for P in walks):
            given = ", ".join(str(P.shape[-1]) for P in walks)
            raise ValueError(f"features: expected one value per node in each, got {given} nodes")
        lead = checks.broadcast_batch([P.psi.shape[:-2] for P in walks], "features")
        psi = torch.cat([P.psi.expand(*lead, nodes, -1) for P in walks], -1)
        return [AttentionTransition(psi, scale=walks[0].scale, mask=mask)]

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
                a seed of node values; or one ready transition, in a list, with either.
            return_walks: Return the list of the one output too, as a cascade returns those of its walks.
            mask: Which nodes are real where graphs of different sizes are padded, bool [B, N], with node
                features and values; all if None. What stands at the others does not count, not in batch
                norm either; y is 0 there. Ready walks bring their own mask.
            batch: A PyG batch vector [total], for node features [total, C_t] and values [total, K] of graphs
                one after another; as a mask it is for eager mode.

        Returns:
            y as `seed` is, a map or node values of its dtype, and with `return_walks` [y]. Half precision is
            solved in float32.

        Raises:
            TypeError: `seed` and the features differ in dtype, or are not floating.
            ValueError: Numbers, shapes or devices do not fit.

        Warns:
            ConvergenceWarning: The tolerance was not reached, here or in the backward.
        """
        if batch is not None:
            padded, nodes, padding = unbatched(seed, features, batch, mask)
            y = padding.unpad(self(padded, nodes, mask=padding.mask))
            return (y, [y]) if return_walks else y
        s = signal_of(seed)
        checks.listed(features)
        if isinstance(features[0], Transition):
            check_no_mask(mask)
            if len(features) != 1:
                raise ValueError(f"features: expected one ready transition, got {len(features)}")
            operator = features[0]
        else:
            grid = grid_of(seed, features)  # type: ignore[arg-type]
            (operator,) = self.transitions(features, grid, mask=mask)  # type: ignore[arg-type]
        s = real_seed(s, [operator])
        P, mu = fitting(operator, s), self.mu[0].to(s.dtype)
        if torch.compiler.is_compiling() and isinstance(P, AttentionTransition):
            y = _diffuse_attention(P.psi, P.scale, P.mask, s, mu, self.tol, _known(self._solver_name))
        else:
            y = diffuse(P, s, mu, tol=self.tol, solver=self.solver)
        shaped = like(seed, y)
        return (shaped, [shaped]) if return_walks else shaped

    def extra_repr(self) -> str:
        """µ, and whether it is learned."""
        kind = "learned" if self.learn_mu else "fixed"
        return f"µ={float(self.mu.detach()):.4g} ({kind}), tol={self.tol:g}, solver={self.solver}"


# --- The solve as one operator of torch's, for torch.compile, which cannot look into a loop that stops when
# it is done. The gradient is that of `diffuse`, first order only.

_KNOWN = {
    str(s): s
    for s in (
        *(Auto(), solvers.Direct(), solvers.Walk(), solvers.Chebyshev(), solvers.CG(), solvers.BlockCG()),
        solvers.BiCGSTAB(),
    )
}


def _known(solver: str) -> str:
    if solver not in _KNOWN:
        raise ValueError(
            f"solver: torch.compile knows {', '.join(_KNOWN)}, got {solver}; run it in eager mode"
        )
    return solver


@torch.library.custom_op("graphdiff::diffuse_attention", mutates_args=())
def _diffuse_attention(
    psi: Tensor, scale: float, mask: Tensor | None, s: Tensor, mu: Tensor, tol: float, solver: str
) -> Tensor:
    P = AttentionTransition(psi, scale=scale, mask=mask)
    # A compiler counts on the strides that the fake below promises.
    return diffuse(P, s, mu, tol=tol, solver=_KNOWN[solver]).contiguous()


@_diffuse_attention.register_fake
def _(
    psi: Tensor, scale: float, mask: Tensor | None, s: Tensor, mu: Tensor, tol: float, solver: str
) -> Tensor:
    batch = torch.broadcast_shapes(psi.shape[:-2], s.shape[:-2])  # type: ignore[no-untyped-call]
    return s.new_empty(*batch, *s.shape[-2:])


@torch.library.custom_op("graphdiff::diffuse_attention_backward", mutates_args=())
def _diffuse_attention_backward(
    psi: Tensor,
    scale: float,
    mask: Tensor | None,
    s: Tensor,
    mu: Tensor,
    tol: float,
    solver: str,
    y: Tensor,
    g: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float32 if g.device.type == "mps" else torch.float64
    P, m = AttentionTransition(psi, scale=scale, mask=mask), mu.to(wide).reshape(1, 1)
    g = checks.real(g.to(wide), mask)
    method, _ = chosen(_KNOWN[solver], P, m, g.shape[-1], tol)
    call = Call(P, method, tol, Budget(), "warn")
    # y* solves for b = (1 − µ)s, which hands its gradient on to s and to µ.
    g_rhs, g_mu, (g_psi,) = gradients(call, m, y.to(wide), g, (True, True))
    assert g_mu is not None
    assert g_psi is not None
    g_s = ((1 - m) * g_rhs).sum_to_size(s.shape).to(s.dtype)
    return (
        g_psi.contiguous(),
        g_s.contiguous(),
        (g_mu.sum() - (g_rhs * s).sum()).to(mu.dtype).reshape(mu.shape),
    )


@_diffuse_attention_backward.register_fake
def _(
    psi: Tensor,
    scale: float,
    mask: Tensor | None,
    s: Tensor,
    mu: Tensor,
    tol: float,
    solver: str,
    y: Tensor,
    g: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return psi.new_empty(psi.shape), s.new_empty(s.shape), mu.new_empty(mu.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    psi, ctx.scale, mask, s, mu, ctx.tol, ctx.solver = inputs
    ctx.save_for_backward(psi, mask, s, mu, output)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    psi, mask, s, mu, y = ctx.saved_tensors
    g_psi, g_s, g_mu = _diffuse_attention_backward(psi, ctx.scale, mask, s, mu, ctx.tol, ctx.solver, y, g)
    return g_psi, None, None, g_s, g_mu, None, None


_diffuse_attention.register_autograd(_backward, setup_context=_save)
