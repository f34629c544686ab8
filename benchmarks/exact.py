"""Exact diffusion over attention, against `torch.linalg.solve` on the built matrix; prints Markdown tables.

ψ holds Fourier features of points in the unit square, as positions in an image would have them: cos and sin
of 32 random frequencies (seed 3, standard deviation 1.5), times 1.2, which makes |ψ|² = 46. λ₂ is found by
300 power steps on the smallest size timed. µ = .9 and tol 1e-5 in float32; the true error is that against the
built matrix in float64, on the first signal. Ours is what `Auto` chooses, `CG`; for many signals `BlockCG`
stands beside it, which must be asked for. "Limit" is the time of the products and exponentials that our solve
does, at the machine's own rates of the same run:

    2N²d + N² exponentials for the matrix, 2N²K a product of the solver, and for the certificate in float64
    N²/2 · (2d + 4(K + 1)) and N²/2 exponentials

A layer is timed with its embeddings, forward + backward: `Diffusion` (tol 1e-3) beside `CascadedWalk`.

    python benchmarks/exact.py [--nodes N ...] [--largest N]
"""

import argparse
from functools import partial
from unittest.mock import patch

import torch
from attention import K, features
from measure import Rates, environment, forget_peak, head, in_turn, peak, row, seconds

import graphdiff as gd
from graphdiff.operators import held

D, MU, TOL = 64, 0.9, 1e-5


def problem(nodes, channels):
    generator = torch.Generator().manual_seed(3)
    phase = torch.rand(nodes, 2, generator=generator) @ (1.5 * torch.randn(2, D // 2, generator=generator))
    psi = 1.2 * torch.cat([phase.cos(), phase.sin()], -1)
    return psi, torch.randn(nodes, channels, generator=generator)


def by_matrix(psi, s):
    P = torch.softmax(psi @ psi.mT, -1)
    A = torch.eye(len(P), dtype=P.dtype, device=P.device) - MU * P
    return torch.linalg.solve(A, (1 - MU) * s)


def ours(psi, s):
    return gd.solve(gd.AttentionTransition(psi), s, MU, tol=TOL)


def by_block(psi, s):
    """The same, all signals searching one space."""
    return gd.solve(gd.AttentionTransition(psi), s, MU, tol=TOL, solver=gd.solvers.BlockCG())


def matrix_free(psi, s):
    """The same where no matrix may be held."""
    with patch.object(held, "LARGEST", 0):
        return ours(psi, s)


def second_eigenvalue(psi, steps=300):
    """λ₂ of P, by power steps on a vector kept orthogonal, in the D-product, to the constant one."""
    P = gd.AttentionTransition(psi.double()).held()
    weight = (P.log_degree - P.log_degree.max()).softmax(-1)
    x = torch.randn(len(psi), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for _ in range(steps):
        x = P.matmul(x.unsqueeze(-1)).squeeze(-1)
        x = x - (weight * x).sum()
        x = x / (weight * x * x).sum().sqrt()
    return float((weight * x * P.matmul(x.unsqueeze(-1)).squeeze(-1)).sum())


def limit(nodes, channels, products, rates, wide):
    certificate = nodes**2 / 2 * ((2 * D + 4 * (channels + 1)) / wide.products + 1 / wide.exponentials)
    once = nodes**2 * (2 * D / rates.products + 1 / rates.exponentials)
    # A product with one signal is bound by reading the matrix: half of what a copy moves.
    product = max(2 * nodes**2 * channels / rates.products, 4 * nodes**2 / rates.copies)
    return once + products * product + certificate


def layer(kind, side, **options):
    torch.manual_seed(5)
    module = kind([3, 64, 128, 256, 512], **options)
    maps = features(side, "cpu")
    seed = torch.randn(1, K, side, side).requires_grad_()
    g = torch.randn(1, K, side, side)

    def step():
        return torch.autograd.grad(module(seed, maps), [seed, *module.parameters()], g)

    return step


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[4096, 10201])
    parser.add_argument("--channels", type=int, nargs="+", default=[1, K])
    parser.add_argument("--largest", type=int, default=40_000, help="solved alone, without a matrix; 0: not")
    parser.add_argument("--layers", type=int, nargs="+", default=[41, 64], help="sides of the layers' grids")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rates, wide = Rates(), Rates(torch.float64)
    eigenvalue = second_eigenvalue(problem(min(options.nodes), 1)[0])
    print(f"{environment()}; d = {D}, float32, µ = {MU}, tol {TOL:g}; λ₂ = {eigenvalue:.3f}.")
    print(f"In float32 {rates}; in float64 {wide}.\n")
    head(
        *("nodes", "signals", "torch.linalg.solve, ms", "ours, ms", "times faster", "without a matrix, ms"),
        *("times faster", "products", "BlockCG, ms", "times faster", "products", "share of the limit"),
        *("true error: torch", "ours", "ours, certified"),
    )
    for nodes in options.nodes:
        for channels in options.channels:
            psi, s = problem(nodes, channels)
            ways = (by_matrix, ours, by_block, matrix_free)
            contenders = {way.__name__: partial(way, psi, s) for way in ways}
            found = in_turn(contenders, options.rounds if nodes < 8000 else max(1, options.rounds // 2))
            exact = by_matrix(psi.double(), s[:, :1].double())
            sol = ours(psi, s)
            size = float(s[:, 0].abs().max())
            errors = [float((y[:, :1] - exact).abs().max()) / size for y in (by_matrix(psi, s), sol.value)]
            bound = float((sol.error_bound / s.abs().amax(0)).max())
            assert sol.converged.all()
            assert errors[1] <= TOL
            # Of the products one is the certificate's.
            share = limit(nodes, channels, int(sol.matvecs.max()) - 1, rates, wide) / found["ours"][0]
            row(
                *(nodes, channels, f"{1e3 * found['by_matrix'][0]:.0f}", f"{1e3 * found['ours'][0]:.0f}"),
                *(f"{found['ours'][1]:.2f}", f"{1e3 * found['matrix_free'][0]:.0f}"),
                *(
                    f"{found['matrix_free'][1]:.2f}",
                    int(sol.matvecs.max()),
                    f"{1e3 * found['by_block'][0]:.0f}",
                ),
                *(f"{found['by_block'][1]:.2f}", int(by_block(psi, s).matvecs.max()), f"{share:.0%}"),
                *(f"{errors[0]:.0e}", f"{errors[1]:.0e}", f"{bound:.0e}"),
            )
    if options.largest:
        psi, s = problem(options.largest, 1)
        before = forget_peak()
        taken, sol = seconds(partial(ours, psi, s))
        print(
            f"\nN = {options.largest}, one signal: {taken:.1f} s, {int(sol.matvecs)} products, "
            f"error certified below {float(sol.error_bound / s.abs().max()):.0e}, "
            f"{(peak() - before) / 1e6:.0f} MB (the matrix alone: {4e-6 * options.largest**2:.0f} MB)."
        )
        assert sol.converged.all()
    print("\nLayers on maps as DifNet-18's, forward + backward, embeddings included:\n")
    head("nodes", "five walks, ms", "one exact diffusion, ms", "over walks", "by BlockCG, ms", "over walks")
    for side in options.layers:
        layers = {
            "walks": layer(gd.CascadedWalk, side),
            "exact": layer(gd.Diffusion, side),
            "block": layer(gd.Diffusion, side, solver=gd.solvers.BlockCG()),
        }
        found = in_turn(layers, options.rounds)
        taken = {name: f"{1e3 * found[name][0]:.0f}" for name in found}
        more = {name: f"{1 / found[name][1]:.2f}" for name in ("exact", "block")}
        row(side**2, taken["walks"], taken["exact"], more["exact"], taken["block"], more["block"])


if __name__ == "__main__":
    main()
