"""How much of a row of `gaussian_transition` stands elsewhere than in the exact walk; prints a table.

Half the 1-norm of the difference of the rows, both as N×N matrices in float64.

    python benchmarks/gaussian.py [--image FILE]
"""

import argparse

import numpy as np
import torch
from measure import environment, head, row

import graphdiff as gd


def exact(positions):
    squares = torch.cdist(positions, positions, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.softmax(-squares / 2, -1)


def misplaced(positions):
    """Mean and largest over the rows."""
    share = (gd.gaussian_transition(positions).dense() - exact(positions)).abs().sum(-1) / 2
    return float(share.mean()), float(share.max())


def grid(side):
    place = torch.arange(side, dtype=torch.float64)
    return torch.cartesian_prod(place, place)


def of_image(file):
    """Pixels of a photograph: neighbours in its middle, and every tenth of the whole."""
    from PIL import Image

    pixels = torch.from_numpy(np.asarray(Image.open(file).convert("RGB"), dtype=np.float64).copy())
    top, left = ((side - 45) // 2 for side in pixels.shape[:2])
    middle = pixels[top : top + 45, left : left + 45].reshape(-1, 3)
    sparse = pixels[::10, ::10]
    places = 10.0 * torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in sparse.shape[:2]))
    for sigma, levels in ((67, 3), (80, 13)):
        name = f"σ = {sigma} px and {levels} levels"
        yield f"45×45 pixels of a photograph, {name}", torch.cat([grid(45) / sigma, middle / levels], -1)
        yield f"every tenth pixel, {name}", torch.cat([places / sigma, sparse.reshape(-1, 3) / levels], -1)


def points(image):
    yield "pixels of a 40×40 grid, σ = 1 px", grid(40)
    yield "the same, σ = 3 px", grid(40) / 3
    generator = torch.Generator().manual_seed(0)
    for dimensions in (1, 2, 3, 5, 8):
        normal = torch.randn(1500, dimensions, generator=generator, dtype=torch.float64)
        yield f"1500 normal points, {dimensions} dimension{'s' * (dimensions > 1)}", normal
    if image:
        yield from of_image(image)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", help="a photograph of at least 45 by 45 pixels")
    options = parser.parse_args()
    print(f"{environment()}.\n")
    head("points", "mean over rows", "worst row")
    for name, positions in points(options.image):
        mean, worst = misplaced(positions)
        row(name, f"{mean:.1%}", f"{worst:.0%}")


if __name__ == "__main__":
    main()
