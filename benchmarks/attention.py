"""Attention walks, softmax(ψψᵀ) y and five of them in a cascade, against the plain way; prints tables.

The plain way builds the matrix and lets autograd keep it. The limit is the time that the operations of the
symmetric scheme (graphdiff/operators/strips.py) would take at the machine's own rates of the same run:

    forward    N²/2 · (2d + 4(K + 1)) operations of products, N²/2 exponentials
    backward   N²/2 · (2d + 4(K + 1) + 4d + 4K) and N²/2 besides

In bfloat16 the plain way, too, makes its matrix in float32, from which it then casts it.
Memory is the peak of a process of its own above inputs, outputs and gradients.

    python benchmarks/attention.py [--nodes N ...] [--batch B ...] [--dtype bfloat16]
"""

import argparse
from functools import partial

import torch
from measure import Rates, environment, forget_peak, head, in_process, in_turn, peak, row

import graphdiff as gd
from graphdiff.operators import attention

D, K = 64, 21


def problem(nodes, batch, device, dtype):
    generator = torch.Generator().manual_seed(3)
    psi, y, g = (torch.randn(batch, nodes, c, generator=generator).to(device, dtype) for c in (D, K, K))
    return psi / 2, y, g  # |ψ|² ≈ 16: neither the identity nor a hub


def plain(psi, y):
    wide = psi.float() if psi.dtype == torch.bfloat16 else psi
    return torch.softmax(wide @ wide.mT, -1).to(y.dtype) @ y


def ours(psi, y):
    return gd.AttentionTransition(psi) @ y


def forward(walk, psi, y, g):
    with torch.no_grad():
        return (walk(psi, y),)


def both(walk, psi, y, g):
    leaves = psi.detach().requires_grad_(), y.detach().requires_grad_()
    value = walk(*leaves)
    return (value.detach(), *torch.autograd.grad(value, leaves, g))


PASSES = {"forward": forward, "forward + backward": both}


def limit(nodes, batch, label, rates):
    """Seconds at the machine's rates."""
    pairs = batch * nodes**2 / 2
    operations, exponentials = 2 * D + 4 * (K + 1), 1
    if label != "forward":
        operations += 2 * D + 4 * (K + 1) + 4 * D + 4 * K
        exponentials += 1
    return pairs * (operations / rates.products + exponentials / rates.exponentials)


def true_errors(label, arguments):
    """The largest relative error of both ways, against the plain way in float64, of the first graph."""
    one = [x[:1] for x in arguments]
    exact = PASSES[label](plain, *(x.double() for x in one))
    errors = []
    for walk in (plain, ours):
        found = PASSES[label](walk, *one)
        errors.append(
            max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))
        )
    return errors


# --- The cascade

CASCADES = {"on the grid": True, "as DifNet-18's": False}


def features(side, device, on_grid=False):
    """Five maps as DifNet-18's similarity branch has them, smooth as such maps are; or all on the grid."""
    generator = torch.Generator().manual_seed(4)
    maps = []
    for channels, finer in ((3, 8), (64, 2), (128, 1), (256, 1), (512, 1)):
        size = side if on_grid else finer * side
        noise = torch.randn(1, channels, size, size, generator=generator)
        maps.append(5 * torch.nn.functional.avg_pool2d(noise, 5, 1, 2).to(device))
    return maps


def plain_cascade(steps, embedded, seed):
    """`CascadedWalk` as one writes it with matrices."""
    s = y = seed.flatten(2).mT
    for step, psi in zip(steps, embedded, strict=True):
        P = torch.softmax(psi @ psi.mT, -1)
        y = step.beta * (step.mu * (P @ y) + (1 - step.mu) * s) + (1 - step.beta) * y
    return y.mT.reshape(seed.shape)


def cascade_step(way, side, device, on_grid):
    torch.manual_seed(5)
    cascade = gd.CascadedWalk([3, 64, 128, 256, 512]).to(device)
    maps = features(side, device, on_grid)
    seed = torch.randn(1, K, side, side, device=device).requires_grad_()
    g = torch.randn(1, K, side, side, device=device)

    def step():
        if way == "plain":
            embedded = [e(x, seed.shape[-2:]).psi for e, x in zip(cascade.embeddings, maps, strict=True)]
            y = plain_cascade(cascade.steps, embedded, seed)
        else:
            y = cascade(seed, maps)
        return torch.autograd.grad(y, [seed, *cascade.parameters()], g)

    return step


def grown(function):
    """Bytes by which the peak grows above what is there before and what comes out."""
    before = forget_peak()
    results = function()
    return peak() - before - sum(x.numel() * x.element_size() for x in results)


def own_peak(what, way, nodes, device, dtype):
    """In a process of its own, after a small problem, in strips too: libraries then have what they need."""
    whole, attention.WHOLE = attention.WHOLE, 0
    walk = {"plain": plain, "ours": ours}[way]
    if what in CASCADES:
        cascade_step(way, 8, device, CASCADES[what])()
        attention.WHOLE = whole
        return grown(cascade_step(way, round(nodes**0.5), device, CASCADES[what]))
    PASSES[what](walk, *problem(300, 1, device, dtype))
    attention.WHOLE = whole
    arguments = problem(nodes, 1, device, dtype)
    return grown(lambda: PASSES[what](walk, *arguments))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[1681, 4096, 10201], help="squares")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", nargs=3, metavar=("PASS", "WAY", "NODES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    device, dtype = (
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        getattr(torch, options.dtype),
    )
    if options.memory_of:
        what, way, nodes = options.memory_of
        print(own_peak(what, way, int(nodes), device, dtype))
        return
    rates = Rates(device=device)
    print(f"{environment()}; d = {D}, K = {K}, {options.dtype}. {str(rates)[0].upper()}{str(rates)[1:]}.\n")
    head(
        "nodes",
        "batch",
        "pass",
        "plain, ms",
        "ours, ms",
        "times faster",
        "share of the limit",
        "error: plain",
        "ours",
        numbers=(0, 1, 3, 4, 5, 6, 7, 8),
    )
    for batch in options.batch:
        for nodes in options.nodes:
            if batch > 1 and batch * nodes**2 * 4 * 4 > 8e9:
                row(nodes, batch, "both", "-", "-", "-", "-", "the plain way needs more than 8 GB", "-")
                continue
            arguments = problem(nodes, batch, device, dtype)
            for label, run in PASSES.items():
                errors = true_errors(label, arguments)
                assert errors[1] < max(2e-5, 4 * errors[0]), errors
                found = in_turn(
                    {
                        name: partial(run, walk, *arguments)
                        for name, walk in (("plain", plain), ("ours", ours))
                    },
                    options.rounds if batch == 1 else max(1, options.rounds // 2),
                )
                share = limit(nodes, batch, label, rates) / found["ours"][0]
                row(
                    nodes,
                    batch,
                    label,
                    f"{1e3 * found['plain'][0]:.1f}",
                    f"{1e3 * found['ours'][0]:.1f}",
                    f"{found['ours'][1]:.2f}",
                    f"{share:.0%}",
                    f"{errors[0]:.0e}",
                    f"{errors[1]:.0e}",
                )
    if dtype == torch.bfloat16:
        return
    print("\nA cascade of five walks, embeddings included, forward + backward:\n")
    head("nodes", "features", "plain, ms", "ours, ms", "times faster", numbers=(0, 2, 3, 4))
    for nodes in options.nodes:
        for title, on_grid in CASCADES.items():
            steps = {way: cascade_step(way, round(nodes**0.5), device, on_grid) for way in ("plain", "ours")}
            found = in_turn(steps, options.rounds)
            plain_ms, ours_ms = (1e3 * found[way][0] for way in ("plain", "ours"))
            row(nodes, title, f"{plain_ms:.0f}", f"{ours_ms:.0f}", f"{found['ours'][1]:.2f}")
    print("\nMemory beyond inputs, outputs and gradients, batch 1, MB:\n")
    head("nodes", "pass", "plain", "ours", "part", numbers=(0, 2, 3, 4))
    for nodes in (n for n in options.nodes if n >= 4096):
        for what in (*PASSES, *CASCADES):
            used = [in_process("attention.py", "--memory-of", what, way, nodes) for way in ("plain", "ours")]
            label = f"cascade, {what}, forward + backward" if what in CASCADES else what
            row(nodes, label, *(f"{x / 1e6:.1f}" for x in used), f"{used[1] / used[0]:.1%}")


if __name__ == "__main__":
    main()
