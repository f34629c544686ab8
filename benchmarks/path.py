"""Twenty µ at once: products and true errors of `solve_path`; prints a Markdown table.

Products of the path against those of its largest µ alone by the same method, without a preconditioner (`CG`,
for directed graphs `BiCGSTAB`), and against what `Auto` takes for that and for twenty solves, all certified
to the same tolerance, of one Gaussian signal (seed 1). The true error is that of the worst µ, against a dense
solve up to 3000 nodes, and beyond against `solve` to a hundredth of the tolerance or as far as rounding
allows, whose own bound is allowed for. The bar: 1.1 times the products of the largest µ by the same method,
and one for each.

    python benchmarks/path.py [--data FOLDER of .npz graphs]
"""

import argparse
import platform
from pathlib import Path

import numpy as np
import torch

import graphdiff as gd

MUS = [1 - 10 ** (-3 * (i + 1) / 20) for i in range(20)]  # 0.29 … 0.999
TOL = 1e-8
DENSE = 3000
GRAPHS = ("cora", "minnesota", "pubmed", "4elt", "wiki-Vote")


def row(*cells):
    print("| " + " | ".join(str(c) for c in cells) + " |")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def preferential(nodes, seed=0):
    import networkx

    graph = networkx.barabasi_albert_graph(nodes, 4, seed=seed)
    return gd.SparseTransition.from_networkx(graph, dtype=torch.float64)


def sphere(radius, nodes=1000, channels=16):
    """Attention on random features of one length."""
    psi = torch.randn(nodes, channels, generator=generator(0), dtype=torch.float64)
    return gd.AttentionTransition(radius * psi / psi.norm(dim=1, keepdim=True))


def one_way(nodes=1000, out=4):
    """Every node points at four others at random."""
    source = torch.arange(nodes).repeat_interleave(out)
    target = torch.randint(nodes, (nodes * out,), generator=generator(3))
    return gd.SparseTransition.from_edge_index(torch.stack([source, target]), dtype=torch.float64)


def stored(path):
    with np.load(path) as data:
        edges = torch.from_numpy(np.stack([data["src"], data["dst"]]).astype(np.int64))
        nodes, directed = int(data["num_nodes"]), bool(data["directed"])
    return gd.SparseTransition.from_edge_index(
        edges, num_nodes=nodes, undirected=not directed, dtype=torch.float64
    )


def exact(P, s, mu):
    """The answer, and by how much it may be off."""
    if P.shape[-1] <= DENSE:
        eye = torch.eye(P.shape[-1], dtype=torch.float64)
        return torch.linalg.solve(eye - mu * P.dense(), (1 - mu) * s), 1e-13 * float(s.abs().max())
    sol = gd.solve(P, s, mu, tol=TOL / 100, on_failure="ignore")
    return sol.value, float(sol.error_bound)


def measured(name, P):
    s = torch.randn(P.shape[-1], generator=generator(1), dtype=torch.float64)
    same = gd.solvers.CG() if P.reversible else gd.solvers.BiCGSTAB()
    path = gd.solve_path(P, s, MUS, tol=TOL, on_failure="raise")
    alone = gd.solve(P, s, MUS[-1], tol=TOL, solver=same, on_failure="raise")
    auto = [gd.solve(P, s, mu, tol=TOL, on_failure="raise") for mu in MUS]
    scale = float(s.abs().max())
    answers = [exact(P, s, mu) for mu in MUS]
    errors = [
        float((y - answer).abs().max()) / scale for y, (answer, _) in zip(path.value, answers, strict=True)
    ]
    bounds = (path.error_bound / scale).tolist()
    held = all(
        error <= bound + off / scale for error, bound, (_, off) in zip(errors, bounds, answers, strict=True)
    )
    taken, hardest = int(path.matvecs.sum()), int(alone.matvecs)
    allowed = 1.1 * hardest + len(MUS)
    row(
        name,
        P.shape[-1],
        hardest,
        int(auto[-1].matvecs),
        sum(int(sol.matvecs) for sol in auto),
        taken,
        f"{allowed:.0f}",
        f"{max(errors):.0e}",
        f"{max(bounds):.0e}",
    )
    if not held or max(bounds) > TOL or taken > allowed:
        missed.append(name)


missed = []


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with .npz graphs")
    options = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, Python {platform.python_version()}; float64, tol {TOL:g}, µ from "
        f"{MUS[0]:.2f} to {MUS[-1]:.3f}\n"
    )
    row(
        "operator",
        "nodes",
        "largest µ alone",
        "the same by Auto",
        "20 solves by Auto",
        "path",
        "allowed",
        "worst true error",
        "worst bound",
    )
    row("---", *["---:"] * 8)
    measured("grid 40 × 40", gd.grid_transition(torch.zeros(1, 40, 40, dtype=torch.float64)))
    measured("preferential attachment, m = 4", preferential(2000))
    measured("attention, |ψ| = 1".replace("|", "∣"), sphere(1.0))
    measured("attention, |ψ| = 4".replace("|", "∣"), sphere(4.0))
    measured("one-way, 4 at random", one_way())
    for name in GRAPHS if options.data else ():
        P = stored(options.data / f"{name}.npz")
        measured(name if P.reversible else f"{name} (directed)", P)
    print(f"\nmissed: {', '.join(missed) or 'none'}")


if __name__ == "__main__":
    main()
