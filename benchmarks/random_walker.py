"""Seeded segmentation by random walks against scikit-image; prints Markdown tables.

All images of a folder with images/N.jpg, seeds/N.png (0 unknown, 1 background, 2 object) and masks/N.png
(0 background, 1 object, 255 undecided) are segmented by `gd.random_walker` and by scikit-image's
`random_walker` with the same seeds and β = 130. The exact answer is that of scikit-image's mode "bf", a
sparse LU; its own rounding is part of what the column of differences shows. Every method is measured in turn
on each image; the last column is the median over the images of its time over that of scikit-image's default
in the same turn. mIoU is the mean of the two classes' intersection over union of all images' counts,
undecided pixels left out.

A generated image of 512 × 512 pixels, four grey squares with noise (seed 0) and a seed of 7 × 7 pixels in
each, needs no folder. There scikit-image's iterative modes get the loosest tolerance, a power of ten found
before the timing, whose largest difference to bf is at most 1e-6; ours is certified to 1e-6. Times are
medians, all methods in turn in a round.

    python benchmarks/random_walker.py [--data FOLDER] [--every N] [--slow] [--side 512] [--rounds 3]

needs the extra [bench].
"""

import argparse
import platform
import statistics
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage.segmentation import random_walker

import graphdiff as gd

ERROR = 1e-6  # allowed on the generated image
TIGHT = 1e-9  # tolerance of scikit-image's iterative modes at their best


def ours(image, seeds, **options):
    found = gd.random_walker(image, seeds, channel_axis=-1, on_failure="ignore", **options)
    return found.probability.numpy(), found.solution


def theirs(image, seeds, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it says of its answers the table tells more
        return random_walker(image, seeds, channel_axis=-1, return_full_prob=True, **options), None


# Name, method, options. The first two are compared with by all others.
METHODS = (
    ("scikit-image bf (exact)", theirs, {"mode": "bf"}),
    ("scikit-image, default (cg_j, tol 1e-3)", theirs, {}),
    (f"scikit-image cg_mg, tol {TIGHT:g}", theirs, {"mode": "cg_mg", "tol": TIGHT}),
    ("graphdiff, default (Direct, tol 1e-6)", ours, {}),
    ("graphdiff, Direct, tol 1e-8", ours, {"solver": gd.solvers.Direct(), "tol": 1e-8}),
)
# Those whose steps grow with the longest time to a seed: minutes on some images.
SLOW = (
    (f"scikit-image cg_j, tol {TIGHT:g}", theirs, {"mode": "cg_j", "tol": TIGHT}),
    ("graphdiff, Multigrid, tol 1e-6", ours, {"solver": gd.solvers.Multigrid()}),
    ("graphdiff, CG, tol 1e-6", ours, {"solver": gd.solvers.CG()}),
)


class Tally:
    """What one method did on all images."""

    def __init__(self):
        self.errors, self.seconds, self.bounds, self.missed, self.relabelled = [], [], [], 0, 0
        self.inside = np.zeros(2)
        self.either = np.zeros(2)

    def add(self, probability, solution, exact, mask, seconds):
        self.errors.append(float(np.abs(probability - exact).max()))
        self.seconds.append(seconds)
        labels = probability.argmax(0)
        self.relabelled += int((labels != exact.argmax(0)).sum())
        if solution is not None:
            self.bounds.append(float(solution.error_bound.max()))
            self.missed += not bool(solution.converged.all())
        for k in range(2):
            known = mask != 255
            found, true = known & (labels == k), known & (mask == k)
            self.inside[k] += (found & true).sum()
            self.either[k] += (found | true).sum()

    def row(self, name, reference):
        ratio = statistics.median(a / b for a, b in zip(self.seconds, reference.seconds, strict=True))
        bound = f"{max(self.bounds):.0e}" if self.bounds else "none"
        missed = str(self.missed) if self.bounds else ""
        return (
            f"| {name} | {max(self.errors):.0e} | {statistics.median(self.errors):.0e} | {bound} | {missed} "
            f"| {self.relabelled} | {100 * (self.inside / self.either).mean():.2f} | "
            f"{statistics.median(self.seconds):.2f} | {ratio:.2f} |"
        )


def squares(side, labels=4):
    """Four grey squares with noise, and seeds in their middles."""
    row, column = np.mgrid[:side, :side] // (side // 2)
    label = (2 * row + column).clip(max=labels - 1)
    image = label / (labels - 1) + np.random.default_rng(0).normal(0, 0.1, (side, side))
    seeds = np.zeros((side, side), int)
    for k in range(labels):
        middle = [side // 4 + side // 2 * half for half in divmod(k, 2)]
        seeds[tuple(slice(m - 3, m + 4) for m in middle)] = k + 1
    return image[..., None], seeds


def generated(side, rounds):
    """Each method on the generated image at the same true error."""
    image, seeds = squares(side)
    small = squares(32)
    exact, _ = theirs(image, seeds, mode="bf")

    def difference(probability):
        return float(np.abs(probability - exact).max())

    methods = [("scikit-image bf (exact)", theirs, {"mode": "bf"}), ("graphdiff, default", ours, {})]
    missed = []
    for mode in ("cg_j", "cg_mg"):
        for tol in 10.0 ** -np.arange(3, 12):
            if (off := difference(theirs(image, seeds, mode=mode, tol=tol)[0])) <= ERROR:
                methods.append((f"scikit-image {mode}, tol {tol:.0e}", theirs, {"mode": mode, "tol": tol}))
                break
        else:
            missed.append(
                f"{mode} reaches no {ERROR:g} by any tol down to {tol:.0e}, where it is off by {off:.0e}"
            )
    found, seconds = {}, {name: [] for name, _, _ in methods}
    for _, method, given in methods:
        method(*small, **given)
    for _ in range(rounds):
        for name, method, given in methods:
            start = time.perf_counter()
            found[name] = method(image, seeds, **given)
            seconds[name].append(time.perf_counter() - start)
    mine = statistics.median(seconds["graphdiff, default"])
    print(f"\n{side} × {side}, four labels:\n")
    print("| method | largest difference to bf | bound | seconds | times ours |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, (probability, solution) in found.items():
        bound = "none" if solution is None else f"{float(solution.error_bound.max()):.0e}"
        taken = statistics.median(seconds[name])
        print(f"| {name} | {difference(probability):.0e} | {bound} | {taken:.2f} | {taken / mine:.2f} |")
    if missed:
        print(f"\nscikit-image {'; '.join(missed)}.")


def photographs(files, methods, data):
    """Every method on every image of the folder."""
    tallies = {name: Tally() for name, _, _ in methods}
    for i, file in enumerate(files):
        image = np.asarray(Image.open(file))
        seeds = np.asarray(Image.open(data / "seeds" / f"{file.stem}.png")).astype(int)
        mask = np.asarray(Image.open(data / "masks" / f"{file.stem}.png"))
        exact = None
        for name, method, given in methods:
            start = time.perf_counter()
            probability, solution = method(image, seeds, **given)
            seconds = time.perf_counter() - start
            exact = probability if exact is None else exact
            tallies[name].add(probability, solution, exact, mask, seconds)
        print(f"\r{i + 1} of {len(files)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(
        f"\n{len(files)} images:\n\n"
        "| method | largest difference to bf | median | largest bound | bound above tol | labels unlike bf | "
        "mIoU, % | seconds an image, median | times its default |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, _, _ in methods:
        print(tallies[name].row(name, tallies[methods[1][0]]))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="images/, seeds/ and masks/")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth image")
    parser.add_argument("--slow", action="store_true", help="iterative methods at tight tolerances too")
    parser.add_argument("--side", type=int, default=512, help="of the generated image; 0 for none")
    parser.add_argument("--rounds", type=int, default=3, help="on the generated image")
    options = parser.parse_args()
    files = sorted((options.data / "images").glob("*.jpg"))[:: options.every] if options.data else []
    if options.data and not files:
        print(f"no folder measured: {options.data} has no images/*.jpg", file=sys.stderr)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "scipy", "scikit-image", "pyamg"))
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"{versions}; float64"
    )
    if files:
        photographs(files, METHODS + (SLOW if options.slow else ()), options.data)
    if options.side:
        generated(options.side, options.rounds)


if __name__ == "__main__":
    main()
