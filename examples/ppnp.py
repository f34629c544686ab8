"""Graph learning with an exact diffusion: PPNP with learned µ on Cora, beside APPNP and label spreading.

    Z = (1 − µ)(I − µS)⁻¹ MLP(X),    S = D^-1/2 (A + I) D^-1/2           (Gasteiger et al. 2019)

    PPNP               the exact limit, by gd.solve_symmetric, µ fixed
    PPNP, µ learned    the same with µ a parameter, trained with the network
    APPNP              the usual approximation: K power steps towards it, µ fixed
    label spreading    (1 − µ)(I − µS)⁻¹ Y of the known labels, no network and no features (Zhou et al. 2004)

    python examples/ppnp.py cora.npz
    python examples/ppnp.py cora.npz --seeds 3 --epochs 50

The .npz file has edges `src`, `dst` (each once), classes `y`, the split `train_idx`, `val_idx`,
`test_idx`, and features as CSR: `x_indptr`, `x_indices`, `x_data`, `x_shape`. Prints test accuracy where that
on the validation nodes is best, mean and deviation over the seeds. Learned from the few training labels,
µ gets smaller than is good for the others: let validation choose it (which_mu.py). Takes about two minutes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import nn

import graphdiff as gd


class Graph:
    """Walk, features, classes and split of a file."""

    def __init__(self, file):
        with np.load(file) as data:
            needed = ("src", "dst", "y", "train_idx", "val_idx", "test_idx", "x_indptr")
            missing = [name for name in needed if name not in data]
            if missing:
                raise SystemExit(f"{file} has no {', '.join(missing)}: labels and features are needed here")
            arrays = {name: torch.from_numpy(data[name]).long() for name in (*needed, "x_indices")}
            x, self.shape = torch.from_numpy(data["x_data"]).float(), tuple(data["x_shape"].tolist())
        self.y, self.rows, self.columns = arrays["y"], arrays["x_indptr"], arrays["x_indices"]
        self.train, self.validation, self.test = (arrays[f"{name}_idx"] for name in ("train", "val", "test"))
        loops = torch.arange(len(self.y)).expand(2, -1)
        edges = torch.cat([torch.stack([arrays["src"], arrays["dst"]]), loops], 1)
        self.P = gd.SparseTransition.from_edge_index(edges, num_nodes=len(self.y), undirected=True)
        counts = self.rows.diff()
        self.x = x / torch.segment_reduce(x, "sum", lengths=counts).repeat_interleave(counts)  # rows sum to 1
        self.classes = int(self.y.max()) + 1

    def features(self, dropout):
        """X, sparse, with a part of its entries dropped."""
        kept = nn.functional.dropout(self.x, dropout)
        return torch.sparse_csr_tensor(self.rows, self.columns, kept, self.shape, check_invariants=False)

    def accuracy(self, scores, nodes):
        return 100 * float((scores[nodes].argmax(1) == self.y[nodes]).double().mean())


class Exact(nn.Module):
    """The diffusion to a certified tolerance, forward and backward; µ is the sigmoid of a scalar."""

    def __init__(self, P, mu, learn_mu):
        super().__init__()
        self.P = P
        self.logit = nn.Parameter(torch.logit(torch.tensor(mu)), requires_grad=learn_mu)

    @property
    def mu(self):
        return torch.sigmoid(self.logit)

    def forward(self, h):
        return gd.solve_symmetric(self.P, h, self.mu, tol=1e-3).value


class PowerSteps(nn.Module):
    """K steps z ← µSz + (1 − µ)h, with S z = √d ⊙ P(z/√d)."""

    def __init__(self, P, mu, steps):
        super().__init__()
        self.P, self.mu, self.steps = P, torch.tensor(mu), steps
        self.root = (P.log_degree / 2).exp().unsqueeze(1)

    def forward(self, h):
        z = h
        for _ in range(self.steps):
            z = self.mu * self.root * (self.P @ (z / self.root)) + (1 - self.mu) * h
        return z


def trained(graph, diffusion, seed, epochs):
    """Test accuracy where that on the validation nodes is best, and µ there."""
    torch.manual_seed(seed)
    first, second = nn.Linear(graph.shape[1], 64, bias=False), nn.Linear(64, graph.classes)
    decayed = {"params": [first.weight], "weight_decay": 5e-3}
    others = [*second.parameters(), *(p for p in diffusion.parameters() if p.requires_grad)]
    optimizer = torch.optim.Adam([decayed, {"params": others}], lr=0.02)

    def scores(p):
        h = nn.functional.dropout((graph.features(p) @ first.weight.T).relu(), p)
        return diffusion(second(h))

    best = (-1.0, 0.0, 0.0)
    for epoch in range(epochs):
        loss = nn.functional.cross_entropy(scores(0.5)[graph.train], graph.y[graph.train])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch % 5 == 4:
            with torch.no_grad():
                z, mu = scores(0.0), float(diffusion.mu)
            best = max(best, (graph.accuracy(z, graph.validation), graph.accuracy(z, graph.test), mu))
    return best[1:]


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="NPZ", help="the graph")
    parser.add_argument("--seeds", type=int, default=10, help="how many networks: seeds 0, 1, …")
    parser.add_argument("--epochs", type=int, default=80, help="training steps of each")
    parser.add_argument("--mu", type=float, default=0.9, help="µ, where learned its first value")
    parser.add_argument("--power-steps", type=int, default=10, help="K of APPNP")
    options = parser.parse_args(arguments)

    graph = Graph(options.data)
    methods = {
        f"APPNP, K = {options.power_steps}": lambda: PowerSteps(graph.P, options.mu, options.power_steps),
        "PPNP, exact": lambda: Exact(graph.P, options.mu, learn_mu=False),
        "PPNP, exact, µ learned": lambda: Exact(graph.P, options.mu, learn_mu=True),
    }
    print(f"{'method':<24} {'test accuracy, %':>17}        µ")
    for name, diffusion in methods.items():
        runs = [trained(graph, diffusion(), seed, options.epochs) for seed in range(options.seeds)]
        accuracy, mu = (torch.tensor(column) for column in zip(*runs, strict=True))
        spread = float(accuracy.std(correction=0))
        print(
            f"{name:<24} {float(accuracy.mean()):10.1f} ± {spread:4.1f}   {float(mu.mean()):6.3f}", flush=True
        )
    known = torch.zeros(len(graph.y), graph.classes)
    known[graph.train, graph.y[graph.train]] = 1
    spreading = gd.solve_symmetric(graph.P, known, options.mu).value
    print(f"{'label spreading':<24} {graph.accuracy(spreading, graph.test):10.1f}          {options.mu:6.3f}")


if __name__ == "__main__":
    main()
