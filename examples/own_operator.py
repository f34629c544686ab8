"""Write your own operator: a walk in space and time, P = A ⊗ B, without the matrix of either.

A walk on the n·m nodes (i, k): i steps by A, as k steps by B. Node (i, k) has number i·m + k. Its product is
one of A and one of B, so 100 × 10,000 nodes need two small walks, where P itself would have 10¹² entries.

One class with `shape` and `matmul`; transpose, rows, every solver, the certificate and the gradients follow.
Worth stating besides are facts: they open faster solvers; were they false, the certificate would show it.

    python examples/own_operator.py

checks the operator against its dense matrix, its answers and gradients against those of a dense solve in
float64; then solves on a million nodes. Needs graphdiff alone. Takes seconds.
"""

import argparse
from dataclasses import dataclass

import torch

import graphdiff as gd


@dataclass(frozen=True, eq=False, repr=False)
class Product(gd.Transition):
    """A ⊗ B: both walks step at once."""

    A: gd.Transition
    B: gd.Transition

    @property
    def shape(self):
        nodes = self.A.shape[-1] * self.B.shape[-1]
        return torch.Size((nodes, nodes))

    def matmul(self, y):  # y [..., n·m, K], always with columns
        n, m = self.A.shape[-1], self.B.shape[-1]
        grid = y.unflatten(-2, (n, m))  # [..., n, m, K]
        stepped = self.A.matmul(grid.flatten(-2)).unflatten(-1, (m, -1))  # i steps, in all columns (k, K)
        stepped = stepped.movedim(-2, -3)  # [..., m, n, K]
        stepped = self.B.matmul(stepped.flatten(-2)).unflatten(-1, (n, -1))  # k steps
        return stepped.movedim(-2, -3).flatten(-3, -2)

    # Facts. With both, CG is allowed: d_(i,k) = d_i·d_k, and a product of kernels ≥ 0 is one.
    @property
    def reversible(self):
        return self.A.reversible and self.B.reversible

    @property
    def positive_semidefinite(self):
        return self.A.positive_semidefinite and self.B.positive_semidefinite

    @property
    def log_degree(self):
        if not self.reversible:
            return None
        return (self.A.log_degree.unsqueeze(-1) + self.B.log_degree).flatten()

    # How far a product may be off, so that float32 can be certified in float32; without it float64 does that.
    def rounding(self, dtype):
        return (self.A.rounding(dtype) + self.B.rounding(dtype)) * 1.01


def small(n, m):
    """Attention over n moments, a chain of m places."""
    psi = torch.randn(n, 2, dtype=torch.float64, requires_grad=True)
    places = torch.arange(m)
    chain = gd.SparseTransition.from_edge_index(
        torch.stack([places[:-1], places[1:]]), undirected=True, dtype=torch.float64
    )
    return psi, Product(gd.AttentionTransition(psi), chain)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--moments", type=int, default=100, help="n of the large problem")
    parser.add_argument("--places", type=int, default=10_000, help="m of the large problem")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    psi, P = small(12, 15)
    dense = torch.kron(P.A.dense(), P.B.dense())
    s = torch.randn(180, 3, dtype=torch.float64)
    for name, error in (
        ("product", P @ s - dense @ s),
        ("transpose", P.T @ s - dense.T @ s),
        ("rows", P.rows([0, 77]) - dense[[0, 77]]),
    ):
        print(f"{name:<12} off by {float(error.detach().abs().max()):.1e}")

    mu, g = 0.9, torch.randn_like(s)
    exact = torch.linalg.solve(torch.eye(180, dtype=torch.float64) - mu * dense, (1 - mu) * s)
    (exact_gradient,) = torch.autograd.grad((g * exact).sum(), psi, retain_graph=True)
    for solver in (gd.solvers.Walk(), gd.solvers.CG(), gd.solvers.BiCGSTAB(), gd.solvers.Direct()):
        sol = gd.solve(P, s, mu, solver=solver)
        error = float((sol.value - exact).detach().abs().max())
        bound = float(sol.error_bound.max())
        (gradient,) = torch.autograd.grad((g * sol.value).sum(), psi)
        off = float((gradient - exact_gradient).abs().max() / exact_gradient.abs().max())
        print(f"{sol.solver:<12} error {error:.1e} ≤ bound {bound:.1e};  gradient off by {off:.1e}")
        assert error <= bound
        assert off < 1e-7

    _, P = small(options.moments, options.places)
    P = P.to(torch.float32)
    s = torch.randn(options.moments * options.places)
    with torch.no_grad():
        sol = gd.solve(P, s, mu, tol=1e-4)
    print(f"{len(s)} nodes in float32: {sol}")


if __name__ == "__main__":
    main()
