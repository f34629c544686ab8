"""The heat kernel against `scipy.sparse.linalg.expm_multiply`; prints a Markdown table.

exp(−t(I − P)) s for one Gaussian signal (seed 1), float64. Ours to tolerance 1e-9, certified: at t = 1000
rounding in the sums of email-Enron's hubs allows little more. scipy's has no tolerance to give and aims at
the last digit. The true error is against e^(−t(I − P)) s by the eigenvectors of D^(1/2) P D^(−1/2) up to
3000 nodes, beyond against ours to 1e-12. Times are medians of the ratio of both in a round, each round
running both in turn; building P and its scipy matrix is not counted, all else is. scipy's products, with the
matrix and its transpose, are counted on a wrapped matrix, apart from the timing.

    python benchmarks/heat.py [--data FOLDER of .npz graphs] [--rounds 5]
"""

import argparse
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import LinearOperator, expm_multiply

import graphdiff as gd

TIMES = (1.0, 10.0, 100.0, 1000.0)
TOL = 1e-9
DENSE = 3000
GRAPHS = ("minnesota", "pubmed", "4elt", "email-Enron")


def row(*cells):
    print("| " + " | ".join(str(c) for c in cells) + " |")


def stored(path):
    with np.load(path) as data:
        edges = torch.from_numpy(np.stack([data["src"], data["dst"]]).astype(np.int64))
        nodes = int(data["num_nodes"])
    return gd.SparseTransition.from_edge_index(edges, num_nodes=nodes, undirected=True, dtype=torch.float64)


def by_eigenvectors(P):
    """A function of t: the dense reference."""
    root = ((P.log_degree - P.log_degree.max()) / 2).exp().unsqueeze(-1)
    values, vectors = torch.linalg.eigh(root * P.dense() / root.mT)
    return lambda s, t: vectors @ ((t * (values - 1)).exp().unsqueeze(-1) * (vectors.mT @ (root * s))) / root


def seconds(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def scaled_heat(L, s, t, trace):
    """scipy's exp(−tL) s; making −tL is part of its time."""
    return expm_multiply(-t * L, s, traceA=-t * trace)


def measured(name, P, rounds):
    nodes = P.shape[-1]
    s = torch.randn(nodes, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    L = (sp.eye_array(nodes, format="csr") - P.to_scipy()).tocsr()
    trace = float(L.diagonal().sum())
    reference = by_eigenvectors(P) if nodes <= DENSE else None
    scale = float(s.abs().max())
    for t in TIMES:
        exact = (
            reference(s, t) if reference else gd.heat_kernel(P, s, t, tol=1e-12, on_failure="ignore").value
        )
        ratios = []
        for _ in range(rounds):
            ours, sol = seconds(partial(gd.heat_kernel, P, s, t, tol=TOL))
            theirs, y = seconds(partial(scaled_heat, L, s.numpy(), t, trace))
            ratios.append(theirs / ours)
        count = 0

        def product(v, t=t):
            nonlocal count
            count += 1 if v.ndim == 1 else v.shape[1]
            return -t * (L @ v)

        counted = LinearOperator(L.shape, matvec=product, matmat=product, rmatvec=product, rmatmat=product)
        counted.dtype = np.dtype("float64")
        expm_multiply(counted, s.numpy(), traceA=-t * trace)
        error, peer = (float((torch.as_tensor(x) - exact).abs().max()) / scale for x in (sol.value, y))
        assert sol.converged
        row(
            name,
            nodes,
            f"{t:g}",
            int(sol.matvecs),
            count,
            f"{error:.0e}",
            f"{float(sol.error_bound) / scale:.0e}",
            f"{peer:.0e}",
            f"{statistics.median(ratios):.2f}",
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with .npz graphs")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    import scipy

    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, scipy {scipy.__version__}, Python {platform.python_version()}; float64\n"
    )
    row(
        *("graph", "nodes", "t", "products", "scipy's products", "true error", "bound", "scipy's true error"),
        "times faster than scipy",
    )
    row("---", *["---:"] * 8)
    plain = gd.grid_transition(torch.zeros(1, 50, 50, dtype=torch.float64))
    measured("grid 50 × 50", plain, options.rounds)
    measured(
        "grid 300 × 300", gd.grid_transition(torch.zeros(1, 300, 300, dtype=torch.float64)), options.rounds
    )
    for name in GRAPHS if options.data else ():
        measured(name, stored(options.data / f"{name}.npz"), options.rounds)


if __name__ == "__main__":
    main()
