"""Diffusion on sparse graphs beside what people use for it, at the same true error; prints Markdown tables.

Graphs are .npz files with src, dst, num_nodes and directed; nodes without an edge out get a loop, so that all
answer the same question. Every method starts from the graph's scipy matrix (float64; scikit-network from its
own class of it), and what it makes of that is counted; loading is not. The true error, in the 1-norm for
personalised PageRank and in the maximum norm for smoothing, is that against our certified solve at 1e-12.
Ours is asked for a certified 1e-6. A peer is run with the loosest tolerance, or the fewest steps, that makes
its true error at most 1e-6, found before the timing: something that no user knows. Where none does, the table
says what it reached. Many signals are given to those peers alone that for one take less than three times as
long as the best. Seconds are medians, all methods in turn in a round, each after a pause in which threads of
the one before stop waiting for more, on one thread, or on as many as --threads says: torch makes use of them,
scipy in its inner products alone. "Not compiled" is CG, or BiCGSTAB on a directed graph, and whatever
it rests on, without numba.

    python benchmarks/sparse.py [--data FOLDER] [--peers NAME ...] [--rounds 5] [--side 300]
        [--sides 500 1000 2000] [--slow] [--threads 1]

needs the extra [bench]; a peer that is not installed is named and left out. The bound: a product reads each
edge's value and number and the signal, and writes the signal, once, at the rate at which this machine copies
an array as large as the matrix; a solve takes at least its products times that. What is above it: gathering,
the solver's own sums over the nodes, the certificate, and building the walk.
"""

import argparse
import importlib
import platform
import statistics
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import numpy as np
import scipy.sparse as sp
import torch
from measure import seconds
from scipy.sparse.linalg import LinearOperator, bicgstab, cg, splu
from threadpoolctl import threadpool_limits

import graphdiff as gd
from graphdiff.operators import sparse
from graphdiff.solvers import base

GRAPHS = ("email-Enron", "musae_git", "wing", "soc-Slashdot0902")
MUS = (0.85, 0.99)
ERROR, SEEDS, FAR, PAUSE = 1e-6, 32, 3.0, 0.1
PEERS = {"networkx": "networkx", "igraph": "igraph", "sknetwork": "scikit-network", "torch_geometric": "PyG"}


def without_numba(call, *arguments):
    """What a call does where numba is not installed."""
    with ExitStack() as patched:
        for module, name in ((sparse, "_compiled"), (sparse, "_edges"), (base, "_compiled")):
            patched.enter_context(mock.patch.object(module, name, return_value=None))
        return call(*arguments)


def row(*cells):
    print("| " + " | ".join(str(c) for c in cells) + " |", flush=True)


def header(*names):
    print()
    row(*names)
    row(*["---"] + ["---:"] * (len(names) - 1))


def there(module):
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def stored(path):
    """The adjacency matrix, and whether edges go one way."""
    with np.load(path) as data:
        source, target = data["src"].astype(np.int64), data["dst"].astype(np.int64)
        nodes, directed = int(data["num_nodes"]), bool(data["directed"])
    A = sp.csr_array((np.ones(len(source)), (source, target)), shape=(nodes, nodes))
    A = A if directed else A + A.T
    return looped(A), directed


def looped(A):
    return sp.csr_array(A + sp.diags_array((A.sum(1) == 0).astype(float)))


def grid(side):
    line = sp.diags_array([np.ones(side - 1)] * 2, offsets=[-1, 1])
    return sp.csr_array(sp.kron(line, sp.eye_array(side)) + sp.kron(sp.eye_array(side), line))


# --- ours


def ours(A, S, mu, transposed, solver=None):
    P = gd.SparseTransition.from_scipy(A)
    return gd.solve(P.T if transposed else P, torch.from_numpy(S), mu, solver=solver, tol=ERROR)


def exact(A, S, mu, transposed):
    """To 1e-12, or as far as rounding allows, and what it is certified to."""
    P = gd.SparseTransition.from_scipy(A)
    sol = gd.solve(P.T if transposed else P, torch.from_numpy(S), mu, tol=1e-12, on_failure="ignore")
    assert float(sol.error_bound.max()) < ERROR / 100
    return sol.value.numpy()


# --- peers: from A, signals [N, K], µ, whether Pᵀ is meant, and steps or a tolerance, to [N, K]


def scipy_walks(A, S, mu, transposed, steps):
    """y ← µPy + (1 − µ)s, for all signals at once."""
    P = sp.diags_array(1 / A.sum(1)) @ A
    P = mu * (P.T.tocsr() if transposed else P.tocsr())
    x = S[:, 0] if S.shape[1] == 1 else S
    y, b = x, (1 - mu) * x
    for _ in range(steps):
        y = P @ y
        y += b
    return y.reshape(S.shape)


def symmetric(A, S, mu, transposed):
    """I − µD^(−1/2) A D^(−1/2), what to make of a signal, and what of an answer."""
    root = np.sqrt(A.sum(1))
    scaling = sp.diags_array(1 / root)
    system = (sp.eye_array(len(root)) - mu * (scaling @ A @ scaling)).tocsr()
    into = 1 / root if transposed else root
    return system, (1 - mu) * into[:, None] * S, 1 / into[:, None]


def scipy_cg(A, S, mu, transposed, tol):
    system, b, back = symmetric(A, S, mu, transposed)
    return back * np.stack([cg(system, column, rtol=tol, maxiter=10**5)[0] for column in b.T], 1)


def scipy_bicgstab(A, S, mu, transposed, tol):
    P = sp.diags_array(1 / A.sum(1)) @ A
    P = P.T.tocsr() if transposed else P.tocsr()
    system = LinearOperator(P.shape, matvec=lambda y: y - mu * (P @ y), dtype=np.float64)
    b = (1 - mu) * S
    return np.stack([bicgstab(system, column, x0=column, rtol=tol, maxiter=10**4)[0] for column in b.T], 1)


def scipy_splu(A, S, mu, transposed, _):
    system, b, back = symmetric(A, S, mu, transposed)
    return back * splu(system.tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0).solve(b)


def sknetwork_ranks(A, S, mu, transposed, amount, *, solver):
    from sknetwork.ranking import PageRank

    given = {"n_iter": amount} if solver == "RH" else {"tol": amount, "n_iter": 3000}
    ranking = PageRank(mu, solver=solver, **given)
    matrix = sp.csr_matrix(A)
    return np.stack([ranking.fit_predict(matrix, weights=column) for column in S.T], 1)


def igraph_ranks(A, S, mu, transposed, _, *, implementation):
    import igraph

    ends = A.tocoo()
    graph = igraph.Graph(n=A.shape[0], edges=np.stack([ends.row, ends.col], 1), directed=True)
    return np.stack(
        [
            graph.personalized_pagerank(damping=mu, reset=column, implementation=implementation)
            for column in S.T
        ],
        1,
    )


def networkx_ranks(A, S, mu, transposed, tol):
    import networkx

    graph = networkx.from_scipy_sparse_array(A, create_using=networkx.DiGraph)
    seeds = [{int(i): float(column[i]) for i in column.nonzero()[0]} for column in S.T]
    tol = tol / A.shape[0]
    found = [networkx.pagerank(graph, mu, personalization=s, max_iter=10**5, tol=tol) for s in seeds]
    return np.stack([np.fromiter(ranks.values(), float) for ranks in found], 1)


def pyg_walks(A, S, mu, transposed, steps):
    """APPNP's propagation with the walk's own weights: message passing over torch's CSR matrix."""
    from torch_geometric.nn import APPNP

    P = sp.diags_array(1 / A.sum(1)) @ A
    P = P.T.tocsr() if transposed else P.tocsr()
    parts = (torch.from_numpy(x) for x in (P.indptr, P.indices, P.data))
    adjacency = torch.sparse_csr_tensor(*parts, P.shape)
    with torch.no_grad():
        walk = APPNP(K=steps, alpha=1 - mu, add_self_loops=False, normalize=False)
        return walk(torch.from_numpy(S), adjacency).numpy()


def peers(directed, transposed, signals, slow, mesh, wanted):
    """Name, method, and what is searched: "steps", "tol" or nothing."""
    found = [("scipy, walks", scipy_walks, "steps"), ("scipy, bicgstab", scipy_bicgstab, "tol")]
    if not directed:
        found += [("scipy, cg on the symmetric form", scipy_cg, "tol")]
    if mesh:
        found += [("scipy, splu", scipy_splu, None)]
    if there("torch_geometric"):
        found += [("PyG, APPNP", pyg_walks, "steps")]
    if transposed and there("sknetwork"):
        for solver in ("piteration", "diteration", "bicgstab", "lanczos", "push"):
            found += [(f"scikit-network, {solver}", partial(sknetwork_ranks, solver=solver), "tol")]
        found += [("scikit-network, RH", partial(sknetwork_ranks, solver="RH"), "steps")]
    if transposed and there("igraph"):
        found += [("igraph, prpack", partial(igraph_ranks, implementation="prpack"), None)]
        found += [("igraph, arpack", partial(igraph_ranks, implementation="arpack"), None)]
    if transposed and slow and there("networkx") and signals == 1:
        found += [("networkx", networkx_ranks, "tol")]
    return [peer for peer in found if any(part in peer[0] for part in wanted)]


def searched(method, kind, error_of, hint):
    """The loosest amount, from a hint on, whose answer is right to ERROR, and its error; or None."""
    if kind is None:
        return None, error_of(method(None))
    if kind == "tol":
        reached = []
        for tol in (hint or 2.0**-10) * 2.0 ** -np.arange(30):
            reached.append(error_of(method(float(tol))))
            if reached[-1] <= ERROR:
                return float(tol), reached[-1]
            # A float32 solver ends far above, and then takes as many steps as it may.
            if len(reached) > 3 and min(reached[-3:]) > 0.9 * min(reached[:-3]):
                break
        return None, min(reached)
    low, high = (hint - 1, hint) if hint else (0, 8)
    while (error := error_of(method(high))) > ERROR:
        if high > 10**5:
            return None, error
        low, high = high, high + max(1, high // 50) if hint else 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error_of(method(middle)) <= ERROR else (middle, high)
    return high, error_of(method(high))


def timed(rounds, calls, patience=60.0):
    """Median seconds of each, all in turn; those that a round waits long for run once."""
    times = [[] for _ in calls]
    for turn in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            if turn and taken[0] > patience / rounds:
                continue
            time.sleep(PAUSE)
            taken.append(seconds(call)[0])
    return [statistics.median(taken) for taken in times]


def copying(size):
    """Bytes read and written a second when an array of that many bytes is copied."""
    source = torch.zeros(max(size // 8, 1), dtype=torch.float64)
    target = torch.empty_like(source)
    taken = min(seconds(partial(target.copy_, source))[0] for _ in range(20))
    return 2 * 8 * len(source) / taken


def product_bytes(A, channels):
    nodes = A.shape[0]
    return A.nnz * (8 + 4) + nodes * (4 + 2 * 8 * channels)


def compared(name, A, directed, options, *, transposed, mesh):
    """Rows of a table for one graph: each µ, one signal and many."""
    nodes = A.shape[0]
    random = np.random.default_rng(0)
    if transposed:
        seeds = random.choice(nodes, SEEDS, replace=False)
        signals = np.zeros((nodes, SEEDS))
        signals[seeds, np.arange(SEEDS)] = 1
    else:
        signals = random.uniform(-1, 1, (nodes, SEEDS))

    def norm(x):
        return np.abs(x).sum(0) if transposed else np.abs(x).max(0)

    for mu in options.mus:
        hints, far = {}, set()
        for count in (1, SEEDS):
            S = np.ascontiguousarray(signals[:, :count])
            truth = exact(A, S, mu, transposed)

            def error_of(y, truth=truth, S=S):
                with np.errstate(all="ignore"):
                    return float(np.nan_to_num(norm(y - truth) / norm(S), nan=np.inf).max())

            calls, names, errors, missed = [], [], [], []
            for label, method, kind in peers(directed, transposed, count, options.slow, mesh, options.peers):
                call = partial(method, A, S, mu, transposed)
                # Many signals need at least what the first of them needs.
                if label in far or hints.get(label) is False:
                    continue
                amount, error = searched(call, kind, error_of, hints.get(label))
                hints[label] = amount if error <= ERROR else False
                if error > ERROR:
                    missed.append(f"{label} {error:.0e}")
                    continue
                calls, names, errors = [*calls, partial(call, amount)], [*names, label], [*errors, error]
            mine = partial(ours, A, S, mu, transposed)
            plain = partial(without_numba, mine, gd.solvers.BiCGSTAB() if directed else gd.solvers.CG())
            solution, slower = mine(), plain()
            build, whole, uncompiled, *others = timed(
                options.rounds, [partial(gd.SparseTransition.from_scipy, A), mine, plain, *calls]
            )
            for found in (solution, slower):
                assert found.converged.all()
                assert error_of(found.value.numpy()) <= ERROR
            error = error_of(solution.value.numpy())
            far.update(name for name, taken in zip(names, others, strict=True) if taken > FAR * min(others))
            products = int(solution.matvecs.max())
            limit = products * product_bytes(A, count) / copying(A.nnz * 12)
            best, best_plain = "none that was asked for reaches it", "none"
            if others:
                first = min(range(len(others)), key=others.__getitem__)
                best = f"{others[first] / whole:.2f} ({names[first]})"
                best_plain = f"{others[first] / uncompiled:.2f}"
            told = sorted(zip(others, names, errors, strict=True))
            row(
                name,
                mu,
                count,
                f"{1e3 * whole:.0f}",
                f"{1e3 * build:.0f}",
                products,
                f"{error:.0e}",
                f"{float(solution.error_bound.max() / norm(S).min()):.0e}",
                f"{limit / whole:.0%}",
                best,
                f"{1e3 * uncompiled:.0f}",
                best_plain,
                "; ".join(f"{label} {taken / whole:.2f} ({off:.0e})" for taken, label, off in told),
                "; ".join(missed) or "none",
            )


def scaled(options):
    """Each size in a process of its own, whose peak memory is the solve's."""
    header(
        *("nodes", "edges", "operator, bytes an edge", "µ", "products", "seconds", "ns an edge and product"),
        *("peak above the operator, bytes an edge", "the same, bytes a node", "bound"),
    )
    for side in options.sides:
        for mu in options.mus:
            subprocess.run([sys.executable, __file__, "--one", str(side), str(mu)], check=True)


def resident(field):
    """VmRSS, bytes held now, or VmHWM, the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def one(side, mu):
    """One size: PageRank from the middle of a plain grid."""
    torch.set_num_threads(1)

    def problem(side):
        P = gd.grid_transition(torch.zeros(1, side, side, dtype=torch.float64))
        s = torch.zeros(side * side, dtype=torch.float64)
        s[side * (side // 2) + side // 2] = 1
        return P, s

    gd.pagerank(*problem(32), mu, tol=ERROR)
    P, s = problem(side)
    tensors = (P.indptr, P.indices, *P.tensors())
    edges, held = len(P.indices), sum(t.nbytes for t in tensors)
    forget_peak()
    before, start = resident("VmRSS"), time.perf_counter()
    sol = gd.pagerank(P, s, mu, tol=ERROR)
    seconds, grown = time.perf_counter() - start, resident("VmHWM") - before
    products = int(sol.matvecs)
    assert sol.converged
    row(
        *(f"{side * side:,}", f"{edges:,}", f"{held / edges:.1f}", mu, products, f"{seconds:.2f}"),
        *(f"{1e9 * seconds / edges / products:.2f}", f"{grown / edges:.0f}", f"{grown / side**2:.0f}"),
        f"{float(sol.error_bound):.0e}",
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the .npz graphs; grids alone without")
    parser.add_argument("--graphs", nargs="*", default=list(GRAPHS))
    parser.add_argument("--peers", nargs="*", default=[""], help="only those whose name holds one of these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mus", type=float, nargs="+", default=list(MUS))
    parser.add_argument("--side", type=int, default=300, help="of the grid that peers run on too")
    parser.add_argument(
        "--sides", type=int, nargs="*", default=[500, 1000, 2000], help="of those for ours alone"
    )
    parser.add_argument("--slow", action="store_true", help="networkx too: minutes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return one(int(options.one[0]), float(options.one[1]))
    torch.set_num_threads(options.threads)
    # That of torch is torch's own: here those of numpy's and scipy's libraries.
    threadpool_limits(options.threads)
    # What peers say of beta states, of tolerances out of their reach and of old classes.
    warnings.simplefilter("ignore")
    absent = [name for module, name in PEERS.items() if not there(module)]
    held = [
        f"{name} {version(name if name != 'PyG' else 'torch_geometric')}"
        for m, name in PEERS.items()
        if there(m)
    ]
    threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
    print(
        f"{platform.processor() or platform.machine()}, {threads}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, scipy {version('scipy')}, {', '.join(held)}; float64, true error ≤ {ERROR:g}"
        + (f"; not installed and left out: {', '.join(absent)}" if absent else "")
    )
    columns = (
        *("graph", "µ", "signals", "ours, ms", "of it building the walk", "products", "our true error"),
        *("our bound", "share of the bound", "best peer / ours", "not compiled, ms", "best peer / that"),
        *("peers / ours (true error)", "peers that do not reach it"),
    )
    kinds = ((True, "personalised PageRank"), (False, "smoothing"))
    for transposed, what in kinds if options.side or (options.data and options.graphs) else ():
        print(f"\n{what}:")
        header(*columns)
        for name in options.graphs if options.data else ():
            path = options.data / f"{name}.npz"
            if not path.exists():
                print(f"{path} is not there")
                continue
            A, directed = stored(path)
            compared(name, A, directed, options, transposed=transposed, mesh=name == "wing")
        if options.side:
            shown = f"grid {options.side} × {options.side}"
            compared(shown, grid(options.side), False, options, transposed=transposed, mesh=True)
    if options.sides and not Path("/proc/self/clear_refs").exists():
        print("\nthe memory of grids is measured on Linux alone")
    elif options.sides:
        print("\nplain grids, PageRank from the middle, ours alone:")
        scaled(options)
    return None


if __name__ == "__main__":
    main()
