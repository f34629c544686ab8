"""The first hundred ranks from one node, certified, against an exact solve; how work grows with the graph.

Graphs are .npz files with src, dst, num_nodes and directed. Sources are drawn (seed 0) from the nodes of
median degree and from all nodes; hubs are the nodes of largest degree. µ = .85, float64, one query after
another.

    python benchmarks/top_k.py --data FOLDER

needs nothing but graphdiff; where numba is installed both sides are compiled, and with igraph (extra `bench`)
its PRPACK is timed too. Ratios are those of medians, all sides in turn; the graph is built, and what bounds
its errors is found, beforehand. "Our solve" is `pagerank` at the same tol. On walks with nodes that have no
edge out igraph answers another question: its walks restart there.
"""

import argparse
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import graphdiff as gd

GRAPHS = ("email-Enron", "soc-Slashdot0902", "musae_git", "wing")
SIDES = (100, 320, 1000, 2000)
K, MU, TOL = 100, 0.85, 1e-6


def row(*cells):
    print("| " + " | ".join(str(c) for c in cells) + " |", flush=True)


def header(*names):
    print()
    row(*names)
    row(*["---"] + ["---:"] * (len(names) - 1))


def medians(rounds, *calls):
    """Median seconds of each call, all of them in turn."""
    times = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


class Graph:
    """The walk, and the same graph in igraph if there is one."""

    def __init__(self, path):
        with np.load(path) as data:
            edges = np.stack([data["src"], data["dst"]]).astype(np.int64)
            nodes, self.directed = int(data["num_nodes"]), bool(data["directed"])
        self.P = gd.SparseTransition.from_edge_index(
            torch.from_numpy(edges), None, nodes, undirected=not self.directed, dtype=torch.float64
        )
        self.peer = None
        try:
            import igraph
        except ImportError:
            return
        self.peer = igraph.Graph(n=nodes, edges=edges.T, directed=self.directed)

    def sources(self, count):
        degree = self.P.indptr.diff()
        g = torch.Generator().manual_seed(0)

        def drawn(nodes):
            return nodes[torch.randperm(len(nodes), generator=g)[:count]].tolist()

        return {
            "median degree": drawn((degree == degree.median()).nonzero().squeeze(1)),
            "any": drawn(torch.arange(len(degree))),
            "hubs": degree.argsort(descending=True, stable=True)[:count].tolist(),
        }

    def unit(self, source):
        return torch.zeros(self.P.shape[-1], dtype=torch.float64).index_fill(0, torch.tensor([source]), 1.0)

    def full(self, source, tol=TOL):
        return gd.pagerank(self.P, self.unit(source), MU, tol=tol, on_failure="ignore")

    def prpack(self, source):
        return self.peer.personalized_pagerank(
            damping=MU, reset_vertices=[source], implementation="prpack", directed=self.directed
        )


def right(found, exact):
    """Ranks with another node than in the exact answer, how much y is off there, and how many are certified.

    Where fewer than k nodes can be reached the ranks left over have none.
    """
    best = exact.value.sort(descending=True, stable=True)
    reached = int((found.indices >= 0).sum())
    index, first = found.indices[:reached], best.indices[:reached]
    off = (best.values[:reached] - exact.value[index]).abs().max()
    assert (best.values[reached:K] <= exact.error_bound).all()
    return int((first != index).sum()), float(off), int((found.certified[:reached] & (first != index)).sum())


def graphs(folder, count, rounds):
    """k = 100, tol 1e-6: what is certain, whether it is right, and what it costs."""
    header(
        "graph",
        "sources",
        "certified of 100, median (least)",
        "largest gap",
        "at another rank, all",
        "y off there, at most",
        "certified and wrong",
        "edges visited / edges, median (most)",
        "our solve / ours",
        "igraph / ours",
        "query, ms",
    )
    for name in GRAPHS:
        path = Path(folder) / f"{name}.npz"
        if not path.exists():
            print(f"{path} is not there")
            continue
        graph = Graph(path)
        edges = len(graph.P.indices)
        gd.top_k(graph.P, 0, 1, MU)
        for kind, sources in graph.sources(count).items():
            found = [gd.top_k(graph.P, source, K, MU, tol=TOL) for source in sources]
            judged = [right(f, graph.full(s, 1e-13)) for f, s in zip(found, sources, strict=True)]
            assert all(f.converged for f in found)
            assert all(wrong == 0 and apart <= TOL + 1e-10 for _, apart, wrong in judged)
            ratios = []
            for source in sources:
                calls = [partial(gd.top_k, graph.P, source, K, MU, tol=TOL), partial(graph.full, source)]
                calls += [partial(graph.prpack, source)] if graph.peer else []
                ratios.append(medians(rounds, *calls))
            certified = [int(f.certified.sum()) for f in found]
            work = [int(f.work) / edges for f in found]
            row(
                name,
                kind,
                f"{statistics.median(certified):.0f} ({min(certified)})",
                f"{max(float(f.gap.max()) for f in found):.1e}",
                sum(moved for moved, _, _ in judged),
                f"{max(apart for _, apart, _ in judged):.1e}",
                sum(wrong for _, _, wrong in judged),
                f"{statistics.median(work):.2f} ({max(work):.2f})",
                f"{statistics.median(t[1] / t[0] for t in ratios):.1f}",
                f"{statistics.median(t[2] / t[0] for t in ratios):.1f}" if graph.peer else "-",
                f"{1e3 * statistics.median(t[0] for t in ratios):.1f}",
            )


def grids(sides, rounds):
    """From the middle of plain grids, k = 100, tol 1e-6."""
    header("N", "edges", "edges visited", "certified of 100", "query, ms", "first query, ms")
    for side in sides:
        P = gd.grid_transition(torch.zeros(1, side, side, dtype=torch.float64))
        source = side * (side // 2) + side // 2
        start = time.perf_counter()
        found = gd.top_k(P, source, K, MU, tol=TOL)
        first = time.perf_counter() - start
        (taken,) = medians(rounds, partial(gd.top_k, P, source, K, MU, tol=TOL))
        row(
            f"{side * side:,}",
            f"{len(P.indices):,}",
            f"{int(found.work):,}",
            int(found.certified.sum()),
            f"{1e3 * taken:.1f}",
            f"{1e3 * first:.1f}",
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder of the .npz graphs; grids alone without")
    parser.add_argument("--sources", type=int, default=10, help="of each kind")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES), help="of the grids")
    options = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, Python {platform.python_version()}"
    )
    if options.data:
        print(f"\ngraphs: {graphs.__doc__}")
        graphs(options.data, options.sources, options.rounds)
    print(f"\ngrids: {grids.__doc__}")
    grids(options.sides, options.rounds)


if __name__ == "__main__":
    main()
