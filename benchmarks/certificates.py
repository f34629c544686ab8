"""What the promise is worth: true errors, products, looseness of bounds and gradients, against dense float64.

Prints Markdown tables; all seeds are fixed. `python benchmarks/certificates.py` runs all, or name some:
`--tables errors products looseness gradients warm`. networkx (extra `test`) draws two of the graphs.
"""

import argparse
import math
import platform
import statistics

import torch

import graphdiff as gd

SOLVERS = {
    "Direct": gd.solvers.Direct(),
    "CG": gd.solvers.CG(),
    "Chebyshev": gd.solvers.Chebyshev(),
    "BiCGSTAB": gd.solvers.BiCGSTAB(),
    "Walk": gd.solvers.Walk(),
    "Auto": gd.solvers.Auto(),
}
MUS = (0.85, 0.99, 0.999)


def row(*cells):
    print("| " + " | ".join(str(c) for c in cells) + " |")


def header(*names):
    print()
    row(*names)
    row(*["---"] + ["---:"] * (len(names) - 1))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def exact(P, s, mu):
    """(I − µP)⁻¹(1 − µ)s in dense float64."""
    return torch.linalg.solve(torch.eye(len(P), dtype=torch.float64) - mu * P, (1 - mu) * s)


def preferential(nodes, seed=0):
    import networkx

    graph = networkx.barabasi_albert_graph(nodes, 4, seed=seed)
    return gd.SparseTransition.from_networkx(graph, dtype=torch.float64)


def plain_grid(side):
    return gd.grid_transition(torch.zeros(1, side, side, dtype=torch.float64))


def sphere(radius, nodes=1000, channels=16, seed=0):
    """Attention on random features of one length."""
    psi = torch.randn(nodes, channels, generator=generator(seed), dtype=torch.float64)
    return gd.AttentionTransition(radius * psi / psi.norm(dim=1, keepdim=True))


def errors():
    """Personalised PageRank from node 0 at tol 1e-6: true error in the 1-norm, worse of both precisions."""
    import networkx

    graphs = {
        "karate": gd.SparseTransition.from_networkx(
            networkx.karate_club_graph(), weight=None, dtype=torch.float64
        ),
        "preferential attachment, N = 2000, m = 4": preferential(2000),
        "grid 40 × 40": plain_grid(40),
    }
    header("graph", "µ", *(f"{name}" for name in SOLVERS), "all ≤ 1e-6")
    for name, P in graphs.items():
        s = torch.zeros(P.shape[-1], dtype=torch.float64)
        s[0] = 1
        for mu in (0.85, 0.99):
            y = exact(P.T.dense(), s, mu)
            found = []
            for solver in SOLVERS.values():
                worst = 0.0
                for dtype in (torch.float64, torch.float32):
                    # In float32 the promise is for the P that float32 holds.
                    Q = P.to(dtype)
                    reference = y if dtype == torch.float64 else exact(Q.to(torch.float64).T.dense(), s, mu)
                    sol = gd.solve(Q.T, s.to(dtype), mu, tol=1e-6, solver=solver)
                    assert sol.converged
                    worst = max(worst, float((sol.value.double() - reference).abs().sum()))
                found.append(worst)
            row(name, mu, *(f"{e:.0e}" for e in found), "yes" if max(found) <= 1e-6 else "NO")


def reference_cg(P, weight, s, mu, y, tol):
    """Products of textbook CG from s, in the D-product, until the true error is below tol."""
    x, b = s.clone(), (1 - mu) * s
    r = b - (x - mu * (P @ x))
    p, products, square = r, 1, (weight * r * r).sum()
    while (x - y).abs().max() > tol * s.abs().max():
        image = p - mu * (P @ p)
        products += 1
        step = square / (weight * p * image).sum()
        x, r = x + step * p, r - step * image
        following = (weight * r * r).sum()
        p, square = r + following / square * p, following
    return products


def products_to(P, s, mu, y, tol, solver, start):
    """Products until the true error is below tol, `start` at least, without the one of the certificate."""
    for budget in range(start, 10_000):
        sol = gd.solve(P, s, mu, tol=1e-13, solver=solver, max_steps=budget, on_failure="ignore")
        if (sol.value - y).abs().max() <= tol * s.abs().max():
            return int(sol.matvecs) - 1
    raise AssertionError("not reached")


def products():
    """Products to 1e-8 on the four operators, from a Gaussian signal (seed 1)."""
    operators = {
        "grid 32 × 32": plain_grid(32),
        "preferential attachment, N = 1000, m = 4": preferential(1000),
        "attention, ∣ψ∣ = 1": sphere(1.0),
        "attention, ∣ψ∣ = 4": sphere(4.0),
    }
    names = ("CG", "Chebyshev", "BiCGSTAB", "Walk", "Auto")
    header(
        "operator (λ₂; λ_N)",
        "µ",
        "reference CG, true error",
        "CG, true error",
        "allowed",
        *(f"{name}, certified" for name in names),
        "Auto chose",
        "allowed for CG, certified",
    )
    missed = []
    for name, P in operators.items():
        dense = P.dense()
        weight = (P.log_degree - P.log_degree.max()).exp()
        root = weight.sqrt()
        ends = torch.linalg.eigvalsh(root[:, None] * dense / root)
        s = torch.randn(P.shape[-1], generator=generator(1), dtype=torch.float64)
        for mu in MUS:
            y = exact(dense, s, mu)
            textbook = reference_cg(dense, weight, s, mu, y, 1e-8)
            ours = products_to(P, s, mu, y, 1e-8, gd.solvers.CG(), max(1, textbook // 2))
            taken, chosen = {}, ""
            for solver in names:
                sol = gd.solve(P, s, mu, tol=1e-8, solver=SOLVERS[solver])
                assert sol.converged
                assert (sol.value - y).abs().max() <= sol.error_bound <= 1e-8 * s.abs().max()
                taken[solver], chosen = int(sol.matvecs), sol.solver
            first, second = max(1.1 * textbook, textbook + 1), 1.35 * textbook + 2
            if ours > first or taken["CG"] > second or taken["Auto"] > 1.2 * min(taken.values()):
                missed.append((name, mu))
            row(
                f"{name} ({float(ends[-2]):.4f}; {float(ends[0]):.2f})",
                mu,
                textbook,
                ours,
                f"{first:.1f}",
                *taken.values(),
                chosen,
                f"{second:.1f}",
            )
    print(f"\nmissed: {missed or 'none'}")


def random_problem(kind, seed):
    """One of four families of operators with N = 400 and a random signal."""
    g = generator(seed)
    if kind == "grid":
        P = gd.grid_transition(torch.rand(3, 20, 20, generator=g, dtype=torch.float64), beta=5.0)
    elif kind == "preferential attachment":
        P = preferential(400, seed)
    else:
        P = sphere(1.0 if kind == "flat attention" else 4.0, 400, 8, seed)
    if seed % 2:
        return P, torch.randn(400, generator=g, dtype=torch.float64)
    s = torch.zeros(400, dtype=torch.float64)
    s[seed % 400] = 1
    return P, s


def looseness():
    """error_bound over the true error, tol 1e-6, half of the signals Gaussian, half one node."""
    kinds = ("grid", "preferential attachment", "flat attention", "sharp attention")
    names = ("CG", "Chebyshev", "BiCGSTAB", "Walk")

    def ratios(mus, seeds, names=names):
        found = {name: [] for name in names}
        for kind in kinds:
            for seed, mu in zip(seeds, mus, strict=True):
                P, s = random_problem(kind, seed)
                y = exact(P.dense(), s, mu)
                for name in names:
                    sol = gd.solve(P, s, mu, tol=1e-6, solver=SOLVERS[name])
                    error = float((sol.value - y).abs().max())
                    assert error <= float(sol.error_bound) * (1 + 1e-12)
                    found[name].append(float(sol.error_bound) / error)
        return found

    seeds = list(range(30))
    drawn = torch.rand(len(seeds), generator=generator(2), dtype=torch.float64)
    mus = [1 - math.exp(math.log(0.01) + float(u) * math.log(50)) for u in drawn]
    header("1 − µ", *(f"{name}: median (largest)" for name in names))

    def show(label, found):
        row(label, *(f"{statistics.median(r):.1f} ({max(r):.0f})" if r else "-" for r in found.values()))

    show("log-uniform in [.01, .5]", ratios(mus, seeds))
    for mu in (0.5, 0.85, 0.99, 0.999):
        show(f"{1 - mu:.4g}", ratios([mu] * 6, seeds[:6]))
    # Walking takes a hundred thousand products there.
    show(f"{1e-4:.4g}", ratios([0.9999] * 6, seeds[:6], names[:3]) | {"Walk": []})


def gradients():
    """Relative errors of gradients of Σ g ⊙ y, Gaussian g, default tolerances, against a dense solve."""
    header("dtype", "µ", "dL/dµ", "dL/ds", "dL/dψ")
    base = [
        torch.randn(n, c, generator=generator(3 + c), dtype=torch.float64) for n, c in ((400, 6), (400, 4))
    ]
    cotangent = torch.randn(400, 4, generator=generator(11), dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        for mu in MUS:
            leaves = [x.to(dtype).requires_grad_() for x in (*base, torch.tensor(mu, dtype=torch.float64))]
            precise = [x.detach().double().requires_grad_() for x in leaves]
            psi, s, m = leaves
            y = gd.diffuse(gd.AttentionTransition(psi), s, m)
            got = torch.autograd.grad(y, leaves, cotangent.to(dtype))
            psi, s, m = precise
            P = torch.softmax(psi @ psi.T, -1)
            y = torch.linalg.solve(torch.eye(400, dtype=torch.float64) - m * P, (1 - m) * s)
            expected = torch.autograd.grad(y, precise, cotangent.to(dtype).double())
            off = [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)]
            row(str(dtype).removeprefix("torch."), mu, *(f"{off[i]:.0e}" for i in (2, 1, 0)))


def warm():
    """Products of CG at tol 1e-8, µ = .99, from s and from the answer of a slightly different walk."""
    header("change of ψ", "from s", "from the last answer", "saved")
    g = generator(5)
    psi = torch.randn(1000, 6, generator=g, dtype=torch.float64)
    s, change = (torch.randn(1000, c, generator=g, dtype=torch.float64) for c in (4, 6))
    before = gd.solve(gd.AttentionTransition(psi), s, 0.99, tol=1e-8, solver=gd.solvers.CG()).value
    for size in (1e-1, 1e-2, 1e-3, 1e-4, 1e-6):
        P = gd.AttentionTransition(psi + size * change)
        cold, warm = (
            gd.solve(P, s, 0.99, tol=1e-8, solver=gd.solvers.CG(), initial=start) for start in (None, before)
        )
        a, b = int(cold.matvecs.sum()), int(warm.matvecs.sum())
        row(f"{size:g}", a, b, f"{100 * (1 - b / a):.0f} %")


TABLES = {f.__name__: f for f in (errors, products, looseness, gradients, warm)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    options = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, Python {platform.python_version()}"
    )
    for name in options.tables:
        print(f"\n{name}: {TABLES[name].__doc__}")
        TABLES[name]()


if __name__ == "__main__":
    main()
