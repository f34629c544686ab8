"""Walks, Chebyshev, learned cascades and the exact answer: what is left of the error after T products with P.

All for one attention walk P = softmax(ψψᵀ), in the norm ‖e‖² = Σ_i d_i e_i² weighted by degrees, as parts of
the first error ‖s − y*‖. With κ = 1/(1 − µ) (P is positive semi-definite) and ρ = (√κ − 1)/(√κ + 1):

    walk        y ← µPy + (1 − µ)s, T times: at most µ^T is left
    Chebyshev   y ← β_t(µPy + (1 − µ)s) + (1 − β_t)y with the best β_t for all such P: at most
                2ρ^T/(1 + ρ^2T), the least that T steps can promise
    sigmoid     the same with 0 < β_t < 1, trained on random seeds and scored on others: no promise
    free        the same without that limit, trained from the best β_t for µ = 0.8
    exact       products for a certified 1e-6, by conjugate gradients

    python examples/convergence.py
    python examples/convergence.py --mu 0.9 --walks 5 --steps 1000
    python examples/convergence.py --out convergence.png

Needs graphdiff alone; matplotlib for --out. Takes less than a minute.
"""

import argparse

import torch

import graphdiff as gd


def chebyshev_bound(mu, count):
    root = (1 - mu) ** -0.5
    rho = (root - 1) / (root + 1)
    return 2 * rho**count / (1 + rho ** (2 * count))


class Problem:
    """Seeds, exact answers and the norm, for one walk and one µ."""

    def __init__(self, P, mu, seeds):
        self.weight = P.log_degree.softmax(-1).unsqueeze(-1)
        self.P = gd.DenseTransition(P.dense())  # small: the matrix is faster than softmax every time
        self.mu, self.seeds = mu, seeds
        self.exact = gd.diffuse(P, seeds, mu, solver=gd.solvers.Direct())

    def left(self, cascade, columns=slice(None)):
        """The part of the first error that a cascade leaves."""
        s, exact = self.seeds[:, columns], self.exact[:, columns]
        y = cascade(s.unsqueeze(0), [self.P] * len(cascade.steps))[0]
        return ((self.weight * (y - exact) ** 2).sum() / (self.weight * (s - exact) ** 2).sum()).sqrt()


def learned(problem, cascade, steps):
    """Train the β_t, each step on eight seeds of the problem."""
    optimizer = torch.optim.Adam(cascade.coefficients(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        loss = problem.left(cascade, slice(8 * step, 8 * step + 8)).log()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return cascade


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mu", type=float, nargs="+", default=[0.5, 0.9, 0.99], help="values of µ")
    parser.add_argument("--walks", type=int, nargs="+", default=[1, 2, 3, 5, 8], help="values of T")
    parser.add_argument("--nodes", type=int, default=200, help="nodes of the graph")
    parser.add_argument("--steps", type=int, default=200, help="training steps of each learned cascade")
    parser.add_argument("--out", metavar="PNG", help="plot errors and bounds into this file")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    psi = torch.randn(options.nodes, 3, dtype=torch.float64)
    P = gd.AttentionTransition(4 * psi / psi.norm(dim=1, keepdim=True))
    unseen = torch.randn(options.nodes, 100, dtype=torch.float64)
    seeds = torch.randn(options.nodes, 8 * options.steps, dtype=torch.float64)
    names = ("µ", "T", "walk", "(bound)", "Chebyshev", "(bound)", "sigmoid", "free", "exact")
    print("  ".join(f"{name:>9}" for name in names))
    rows = []
    for mu in options.mu:
        products = int(gd.solve(P, unseen, mu, solver=gd.solvers.CG(), tol=1e-6).matvecs.max())
        training, test = Problem(P, mu, seeds), Problem(P, mu, unseen)
        for T in options.walks:
            fixed = {"steps": T, "mu": mu, "learn_mu": False}
            walk = gd.CascadedWalk(beta=1.0, learn_beta=False, **fixed).double()
            best = gd.CascadedWalk.chebyshev(positive_semidefinite=True, **fixed).double()
            sigmoid = learned(training, gd.CascadedWalk(beta=0.9, **fixed).double(), options.steps)
            start = gd.CascadedWalk.chebyshev(steps=T, mu=0.8, positive_semidefinite=True).beta.tolist()
            free = gd.CascadedWalk(beta=start, relaxation="free", **fixed).double()
            cascades = (walk, best, sigmoid, learned(training, free, options.steps))
            walked, optimal, sigmoid, free = (test.left(c).item() for c in cascades)
            row = (mu, T, walked, mu**T, optimal, chebyshev_bound(mu, T), sigmoid, free, products)
            print(f"{mu:9g}  {T:9d}  " + "  ".join(f"{x:9.2e}" for x in row[2:-1]) + f"  {products:9d}")
            rows.append(row)
    if options.out:
        draw(rows, options.out)


def draw(rows, file):
    from matplotlib.figure import Figure

    mus = sorted({row[0] for row in rows})
    figure = Figure(figsize=(3.7 * len(mus), 3.2), dpi=110, layout="constrained")
    for axis, mu in zip(figure.subplots(1, len(mus), squeeze=False)[0], mus, strict=True):
        _, T, walk, walks, chebyshev, chebyshevs, sigmoid, free, _ = (
            [row[i] for row in rows if row[0] == mu] for i in range(9)
        )
        axis.semilogy(T, walks, "C0:", label="bound of walks, µ^T")
        axis.semilogy(T, walk, "C0.-", label="walk")
        axis.semilogy(T, chebyshevs, "C1:", label="bound of Chebyshev")
        axis.semilogy(T, chebyshev, "C1.-", label="Chebyshev")
        axis.semilogy(T, sigmoid, "C2s--", markersize=4, label="learned, sigmoid")
        axis.semilogy(T, free, "C3o--", markersize=4, label="learned, free")
        axis.set(title=f"µ = {mu:g}", xlabel="T, products with P")
    figure.axes[0].set_ylabel("part of the first error left")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(file)
    print(f"drawn: {file}")


if __name__ == "__main__":
    main()
