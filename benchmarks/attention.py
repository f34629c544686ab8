"""Times one attention walk, softmax(ψψᵀ) y, by both kernels against the plain way; prints a Markdown table.

The plain way builds the matrix and lets autograd keep it. All contenders run in turn within each round, so
that a drifting machine drifts for all; the table gives medians of the ratios of a round. Run it on an idle
machine: `make bench`.
"""

import argparse
import platform
import statistics
import time

import torch

from graphdiff.operators import attention as kernels


def plain(psi, y):
    return torch.softmax(psi @ psi.mT, -1) @ y


def plain_both(psi, y, g):
    psi, y = psi.clone().requires_grad_(), y.clone().requires_grad_()
    return torch.autograd.grad(plain(psi, y), (psi, y), g)


def walked_both(forward, backward, psi, y, g):
    value, lse = forward(psi, psi, y)
    g_query, g_key, g_y = backward(psi, psi, y, value, lse, g, torch.zeros_like(lse))
    return g_query + g_key, g_y


def seconds(function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def compare(contenders, arguments, rounds):
    """Median seconds of the first contender and, of all, median ratios to it and largest difference."""
    reference, ratios, base = None, {name: [] for name in contenders}, []
    for round_number in range(rounds + 1):  # the first warms up
        for position, (name, function) in enumerate(contenders.items()):
            taken, result = seconds(function, *arguments)
            if position == 0:
                first, reference = taken, result
            if round_number == 0:
                for a, b in zip(result, reference, strict=True):
                    assert float((a - b).abs().max() / b.abs().max()) < 1e-4, name
            else:
                ratios[name].append(first / taken)
        if round_number:
            base.append(first)
    return statistics.median(base), {name: statistics.median(r) for name, r in ratios.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1681, 4096, 10201])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = (
        torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    )
    print(
        f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
        f"{platform.python_version()}; d = 64, K = 21, float32, batch {options.batch}\n"
    )
    print("| nodes | pass | plain, ms | fused kernel, times faster | row blocks, times faster |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for nodes in options.nodes:
        torch.manual_seed(3)
        psi, y, g = (torch.randn(options.batch, nodes, c, device=device) for c in (64, 21, 21))
        psi = psi / 2  # |ψ|² ≈ 16: neither the identity nor a hub
        forward = {
            "plain": lambda psi, y: (plain(psi, y),),
            "fused": lambda psi, y: kernels.fused_forward(psi, psi, y)[:1],
            "blocks": lambda psi, y: kernels.blocked_forward(psi, psi, y)[:1],
        }
        both = {
            "plain": plain_both,
            "fused": lambda *a: walked_both(kernels.fused_forward, kernels.fused_backward, *a),
            "blocks": lambda *a: walked_both(kernels.blocked_forward, kernels.blocked_backward, *a),
        }
        if device.type != "cpu":
            del forward["fused"], both["fused"]
        for label, contenders, arguments in (
            ("forward", forward, (psi, y)),
            ("forward + backward", both, (psi, y, g)),
        ):
            with torch.set_grad_enabled(label != "forward"):
                base, ratio = compare(contenders, arguments, options.rounds)
            fused = f"{ratio['fused']:.2f}" if "fused" in ratio else "CPU only"
            print(f"| {nodes} | {label} | {1000 * base:.1f} | {fused} | {ratio['blocks']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
