"""Memory of exact diffusion over attention, forward and backward, beside that of its matrix.

Peak resident memory of this process above what it held before the solve, so run it alone:
`python benchmarks/memory.py`. Small tensors are warmed up first, so that libraries have what they need.
"""

import argparse
import platform
import resource
import time

import torch

import graphdiff as gd


def peak():
    """Bytes (kilobytes on Linux, bytes on macOS)."""
    scale = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def both_ways(psi, s, mu):
    leaves = [x.requires_grad_() for x in (psi, s, mu)]
    sol = gd.solve(gd.AttentionTransition(psi), s, mu)
    gradients = torch.autograd.grad(sol.value.square().sum(), leaves)
    assert sol.converged.all()
    assert all(bool(g.isfinite().all()) for g in gradients)
    return sol


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=20_000)
    parser.add_argument("--channels", type=int, default=4)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(3)

    def problem(nodes):
        psi = torch.randn(nodes, 16, generator=generator, dtype=torch.float64) / 2
        s = torch.randn(nodes, options.channels, generator=generator, dtype=torch.float64)
        return psi, s, torch.tensor(0.9, dtype=torch.float64)

    both_ways(*problem(500))
    arguments = problem(options.nodes)
    before, start = peak(), time.perf_counter()
    sol = both_ways(*arguments)
    grown, seconds = peak() - before, time.perf_counter() - start
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, Python {platform.python_version()}; d = 16, K = {options.channels}, float64, "
        f"µ = .9, {sol.solver}, {int(sol.matvecs.max())} products forward, {seconds:.0f} s both ways\n"
    )
    print("| nodes | peak memory grows by, MB | the matrix alone, MB |")
    print("| ---: | ---: | ---: |")
    print(f"| {options.nodes} | {grown / 1e6:.0f} | {options.nodes**2 * 8 / 1e6:.0f} |")


if __name__ == "__main__":
    main()
