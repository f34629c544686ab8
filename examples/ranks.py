"""Personalised PageRank and the first ranks from one node of a big graph, both with their certificates.

    y = (1 − µ)(I − µPᵀ)⁻¹ s,    s = 1 at the source

    python examples/ranks.py
    python examples/ranks.py --graph web.npz --source 17 --k 20

`pagerank` ranks every node, to a bound in the 1-norm; `top_k` finds the first k alone, and says of each rank
whether any other node could have it. Without --graph a network with hubs is drawn: 200,000 nodes, a million
edges. A .npz file has `src`, `dst`, `num_nodes`, and `directed`: if that is false each edge is both ways.
Needs graphdiff alone. Takes seconds.
"""

import argparse

import numpy as np
import torch

import graphdiff as gd


def drawn(nodes, edges):
    """Random edges whose ends are node i with a chance like i^-1/2 (Chung and Lu): hubs come first."""
    rng = np.random.default_rng(0)
    ends = (nodes * rng.random((2, edges)) ** 2).astype(np.int64)
    return ends[:, ends[0] != ends[1]], nodes, False


def read(file):
    with np.load(file) as data:
        ends = np.stack([data["src"], data["dst"]]).astype(np.int64)
        return ends, int(data["num_nodes"]), bool(data["directed"])


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--graph", metavar="NPZ", help="a graph of yours")
    parser.add_argument("--nodes", type=int, default=200_000, help="of the graph that is drawn without it")
    parser.add_argument("--edges", type=int, default=1_000_000, help="likewise")
    parser.add_argument("--source", type=int, help="node to restart at; one of median degree if not given")
    parser.add_argument("--k", type=int, default=10, help="how many ranks")
    parser.add_argument("--mu", type=float, default=0.85, help="µ: the chance to walk on")
    parser.add_argument("--tol", type=float, default=1e-7, help="of the sum of all errors, and of ties")
    options = parser.parse_args(arguments)

    edges, nodes, directed = read(options.graph) if options.graph else drawn(options.nodes, options.edges)
    P = gd.SparseTransition.from_edge_index(
        torch.from_numpy(edges), num_nodes=nodes, undirected=not directed, dtype=torch.float64
    )
    print(f"{nodes} nodes, {len(P.indices)} steps a walk can take, {P}")
    degree = P.indptr.diff()
    source = options.source
    if source is None:
        source = int((degree - degree[degree > 0].median()).abs().argmin())
    restart = torch.zeros(nodes, dtype=torch.float64)
    restart[source] = 1

    whole = gd.pagerank(P, restart, options.mu, tol=options.tol)
    print(
        f"pagerank from node {source} (degree {int(degree[source])}): sum of all errors at most "
        f"{float(whole.error_bound):.1e}, {int(whole.matvecs)} products, {whole.solver}"
    )
    first = gd.top_k(P, source, options.k, options.mu, tol=options.tol)
    print(
        f"top_k: {int(first.certified.sum())} of {options.k} ranks certain, the others tied to "
        f"{float(first.gap.max()):.1e}; {int(first.work) / len(P.indices):.2g} times all edges visited"
    )
    print("\n rank     node            y           from to             certain     pagerank")
    for rank, (node, y, low, high, certain) in enumerate(
        zip(first.indices, first.values, first.lower, first.upper, first.certified, strict=True), start=1
    ):
        if node < 0:
            print(f"{rank:5d}  no more nodes can be reached")
            break
        told = "yes" if certain else "no"
        print(f"{rank:5d} {int(node):8d} {y:12.6e}  {low:.8e} {high:.8e}  {told:>7}  {whole.value[node]:.6e}")
        slack = float(whole.error_bound)
        assert low - slack <= whole.value[node] <= high + slack, "two certificates contradict one another"


if __name__ == "__main__":
    main()
