"""Diffusion in ten lines: a coarse, noisy score is carried over an image and stops at its edges.

    y = (1 − µ)(I − µP)⁻¹ s,     P_ij ∝ exp(−β‖I_i − I_j‖²) between neighbouring pixels

    python examples/diffuse.py
    python examples/diffuse.py --mu 0.9 0.99 --out diffused.png

prints for every µ how many pixels have the right sign, the bound of the error in y, and the products with P.
Needs graphdiff alone; matplotlib for --out. Takes seconds.
"""

import argparse

import torch

import graphdiff as gd


def scene(height=64, width=96):
    """A bright disc and a bar on a darker ground with noise, [1, H, W], and where they are, bool [H, W]."""
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    disc = (row - 30) ** 2 + (column - 28) ** 2 < 18**2
    bar = ((column - 66).abs() < 16) & ((row - 36 + (column - 66) // 2).abs() < 6)
    image = 0.3 + 0.4 * (disc | bar) + 0.04 * torch.randn(height, width, dtype=torch.float64)
    return image.unsqueeze(0), disc | bar


def coarse_score(truth, cell=8, noise=2.0):
    """What a network might say of it: one number in −1 … 1 for each cell, and noise; [H·W]."""
    inside = torch.nn.functional.avg_pool2d(2 * truth.double()[None, None] - 1, cell)
    blocks = inside[0, 0].repeat_interleave(cell, 0).repeat_interleave(cell, 1)
    return (blocks + noise * torch.randn_like(blocks)).flatten()


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mu", type=float, nargs="+", default=[0.0, 0.9, 0.99, 0.999], help="values of µ")
    parser.add_argument(
        "--beta", type=float, default=90.0, help="β: the larger, the harder an edge is to cross"
    )
    parser.add_argument("--out", metavar="PNG", help="draw image, seed and every y into this file")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    image, truth = scene()
    s = coarse_score(truth)
    P = gd.grid_transition(image, beta=options.beta)
    answers = []
    print("     µ   right sign   error bound   products")
    for mu in options.mu:
        sol = gd.solve(P, s, mu, tol=1e-6)
        right = ((sol.value > 0) == truth.flatten()).double().mean()
        print(f"{mu:6g}   {100 * right:8.1f} %   {sol.error_bound:11.1e}   {int(sol.matvecs):8d}")
        answers.append(sol.value.reshape(truth.shape).numpy())

    if options.out:
        draw(image[0].numpy(), options.mu, answers, options.out)


def draw(image, mus, answers, file):
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 * (1 + len(answers)), 1.75), dpi=90, layout="constrained")
    first, *rest = figure.subplots(1, 1 + len(answers))
    first.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    first.set_title("image I", fontsize=10)
    for axis, mu, y in zip(rest, mus, answers, strict=True):
        size = np.quantile(abs(y), 0.98)
        axis.imshow(y, cmap="RdBu_r", vmin=-size, vmax=size, interpolation="nearest")
        axis.set_title("seed s" if mu == 0 else f"y at µ = {mu:g}", fontsize=10)
    for axis in (first, *rest):
        axis.set_axis_off()
    figure.savefig(file)
    print(f"drawn: {file}")


if __name__ == "__main__":
    main()
