"""Labels of nodes by exact diffusion from the labels known; prints a Markdown table of accuracies.

Cora and Pubmed have the Planetoid split: parameters are chosen on its validation nodes, accuracy is that on
its test nodes. musae_facebook has none: 20 nodes a class are drawn for each recorded seed, µ = α = 0.9, and
accuracy is that on all the other nodes. Every method gets the same undirected edges of weight 1, no features,
and predicts the class with the largest score; nodes in a component without any label get class 0.

With S = D^-1/2 A D^-1/2 both peers approach (1 − α)(I − αS)⁻¹s, which solve_symmetric computes; the
last column counts the nodes whose label is not that of this limit, of several draws in the worst.

    python benchmarks/labels.py --data FOLDER

needs the extra [bench]. scikit-learn takes the adjacency as its kernel, sparse, so nothing is restated here.
"""

import argparse
import platform
import statistics
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

import graphdiff as gd

GRAPHS = ("cora", "pubmed", "musae_facebook")
FRACTIONS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)  # µ or α, where there are validation nodes
FIXED = 0.9  # where there are none
LAYERS = 50  # of PyG's propagations
PER_CLASS = 20


class Graph:
    """Edges once each way, classes, and what every method needs of them, made once."""

    def __init__(self, path):
        with np.load(path) as data:
            self.nodes = int(data["num_nodes"])
            edges = torch.from_numpy(np.stack([data["src"], data["dst"]]).astype(np.int64))
            self.labels = torch.from_numpy(data["y"].astype(np.int64))
            names = ("train_idx", "val_idx", "test_idx")
            given = [torch.from_numpy(data[n].astype(np.int64)) for n in names if n in data]
        self.split = tuple(given) if len(given) == 3 else None
        self.classes = int(self.labels.max()) + 1
        self.both_ways = torch.cat([edges, edges.flip(0)], 1)
        ones = np.ones(2 * edges.shape[1])
        self.adjacency = coo_array((ones, tuple(self.both_ways.numpy())), shape=(self.nodes, self.nodes))
        self.component = torch.from_numpy(connected_components(self.adjacency, directed=False)[1])
        weight = torch.ones(edges.shape[1], dtype=torch.float64)
        self.P = gd.SparseTransition.from_edge_index(edges, weight, self.nodes, undirected=True)
        self.degree = torch.bincount(self.both_ways[0], minlength=self.nodes).clamp(min=1).double()[:, None]

    def seeds(self, train):
        return torch.zeros(self.nodes, self.classes, dtype=torch.float64).index_put(
            (train, self.labels[train]), torch.ones((), dtype=torch.float64)
        )

    def drawn(self, seed):
        """20 nodes of every class to start from, and all the others to score."""
        order = torch.randperm(self.nodes, generator=torch.Generator().manual_seed(seed))
        shuffled = self.labels[order]
        train = torch.cat([order[shuffled == k][:PER_CLASS] for k in range(self.classes)])
        rest = torch.ones(self.nodes, dtype=torch.bool)
        rest[train] = False
        return train, rest.nonzero().squeeze(1)


# --- methods: (graph, training nodes, µ or α) → scores [N, classes]


def one_hot(graph, train, mu):
    return gd.diffuse(graph.P, graph.seeds(train), mu, on_failure="raise")


def class_normalised(graph, train, mu):
    """What a reversible walk conserves of a seed, the sum weighted by degrees, made equal for all classes."""
    seeds = graph.seeds(train)
    return gd.diffuse(graph.P, seeds / (graph.degree * seeds).sum(0), mu, on_failure="raise")


def ranked(graph, train, mu):
    return gd.pagerank(graph.P, graph.seeds(train), mu, on_failure="raise").value


def symmetric(graph, train, mu):
    # At µ = .999 rounding in float64 allows little more on Cora.
    return gd.solve_symmetric(graph.P, graph.seeds(train), mu, tol=1e-9, on_failure="raise").value


def label_spreading(graph, train, alpha, **options):
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.semi_supervised import LabelSpreading

    known = np.full(graph.nodes, -1)
    known[train.numpy()] = graph.labels[train].numpy()

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # max_iter=30 is its default, and is what is judged
        model = LabelSpreading(kernel=lambda x, y: graph.adjacency, alpha=alpha, **options).fit(
            np.arange(graph.nodes)[:, None], known
        )
    return torch.from_numpy(model.label_distributions_)


def label_spreading_run_on(graph, train, alpha):
    return label_spreading(graph, train, alpha, max_iter=100_000, tol=1e-9)


def label_propagation(graph, train, alpha):
    from torch_geometric.nn import LabelPropagation

    return LabelPropagation(LAYERS, alpha)(graph.seeds(train), graph.both_ways)


def correct_and_smooth(graph, train, alpha):
    """From the predictor that knows nothing: every class alike."""
    from torch_geometric.nn import CorrectAndSmooth

    model = CorrectAndSmooth(LAYERS, alpha, LAYERS, alpha)
    nothing = torch.full((graph.nodes, graph.classes), 1 / graph.classes, dtype=torch.float64)
    weight = (graph.degree[graph.both_ways].prod(0) ** -0.5).squeeze(
        -1
    )  # it asks for weights to keep float64
    known = graph.labels[train]
    corrected = model.correct(nothing, known, train, graph.both_ways, weight)
    return model.smooth(corrected, known, train, graph.both_ways, weight)


# Name, method, whether its limit is that of `symmetric`.
METHODS = (
    ("exact, P, one-hot", one_hot, False),
    ("exact, P, class-normalised", class_normalised, False),
    ("exact, PageRank from each class", ranked, False),
    ("exact, symmetric: the limit", symmetric, False),
    ("scikit-learn LabelSpreading, 30 steps (default)", label_spreading, True),
    ("scikit-learn LabelSpreading, tol=1e-9", label_spreading_run_on, True),
    (f"PyG LabelPropagation, {LAYERS} layers", label_propagation, True),
    (f"PyG CorrectAndSmooth, {LAYERS} + {LAYERS} layers", correct_and_smooth, False),
)


def predicted(graph, train, scores):
    """Where no label reaches, every score is 0 or its rounding: class 0, whatever the method."""
    reached = torch.isin(graph.component, graph.component[train])
    return torch.where(reached, scores.argmax(1), 0)


def accuracy(graph, labels, nodes):
    return 100 * float((labels[nodes] == graph.labels[nodes]).double().mean())


def measured(graph, method, has_limit, draws):
    """Accuracies, the parameter used, and the largest number of labels unlike the limit's."""
    results, unlike, value = [], [], FIXED
    for train, validation, test in draws:

        def labels(method, value, train=train):
            return predicted(graph, train, method(graph, train, value))

        if validation is not None:
            value = max(FRACTIONS, key=lambda v: accuracy(graph, labels(method, v), validation))
        found = labels(method, value)
        results.append(accuracy(graph, found, test))
        if has_limit:
            unlike.append(int((found != labels(symmetric, value)).sum()))
    return results, value, max(unlike, default=None)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the .npz graphs")
    parser.add_argument("--graphs", nargs="+", choices=GRAPHS, default=list(GRAPHS))
    parser.add_argument("--seeds", type=int, default=10, help="draws where a graph has no split: 0, 1, …")
    options = parser.parse_args()
    missing = [name for name in options.graphs if not (options.data / f"{name}.npz").is_file()]
    if missing:
        print(
            f"nothing measured: {options.data} has no {', '.join(m + '.npz' for m in missing)}",
            file=sys.stderr,
        )
        return
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "scipy", "scikit-learn", "torch_geometric")
    )
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"{versions}, float64; seeds 0 … {options.seeds - 1} where drawn, parameters from {FRACTIONS} where "
        "chosen\n"
    )
    print("| graph | method | µ or α | accuracy, % | labels unlike the limit |")
    print("| --- | --- | ---: | ---: | ---: |")
    for name in options.graphs:
        graph = Graph(options.data / f"{name}.npz")
        if graph.split:
            draws = [graph.split]
        else:
            drawn = [graph.drawn(seed) for seed in range(options.seeds)]
            draws = [(train, None, rest) for train, rest in drawn]
        for label, method, has_limit in METHODS:
            results, value, unlike = measured(graph, method, has_limit, draws)
            told = f"{statistics.mean(results):.1f}"
            if len(results) > 1:
                told += f" ± {statistics.stdev(results):.1f}"
            differ = "" if unlike is None else f"{unlike} of {graph.nodes}"
            print(f"| {name} | {label} | {value} | {told} | {differ} |", flush=True)


if __name__ == "__main__":
    main()
