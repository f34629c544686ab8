"""Random-walker segmentation with strokes: every pixel gets the label that a walk from it meets first.

    u_i = Σ_j P_ij u_j off the strokes,  u = 0 or 1 on them,  w_ij ∝ exp(−β‖I_i − I_j‖²)  (Grady 2006)

    python examples/strokes.py
    python examples/strokes.py --image photo.jpg --strokes strokes.png --out labels.png

Strokes are an image or .npy array as large as the photo: 0 where nothing is said, 1, 2, … on the strokes of
each label. Without --image a scene is generated, with its strokes. Prints for each label its pixels and how
many of them the certificate makes sure of: those where the lower bound of its probability is above the upper
bounds of all others. Needs graphdiff; pillow to read images, matplotlib for --out. Takes seconds.
"""

import argparse

import numpy as np

import graphdiff as gd


def scene(side=120):
    """Two blobs on a ground whose light changes, their strokes and the truth (labels 1, 2, 3)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    truth = np.ones((side, side), dtype=np.int64)
    truth[np.hypot(x - 0.3, y - 0.35) < 0.2 + 0.03 * np.sin(6 * np.arctan2(y - 0.35, x - 0.3))] = 2
    truth[np.hypot((x - 0.7) / 1.4, y - 0.68) < 0.17] = 3
    colours = np.array([[0.25, 0.35, 0.3], [0.7, 0.45, 0.3], [0.35, 0.45, 0.75]])
    image = colours[truth - 1] * (0.75 + 0.5 * x[..., None]) + 0.03 * rng.standard_normal((side, side, 3))
    strokes = np.zeros_like(truth)
    for label, (top, left, bottom, right) in enumerate(
        [(0.05, 0.05, 0.09, 0.9), (0.25, 0.28, 0.45, 0.32), (0.66, 0.55, 0.7, 0.85)], start=1
    ):
        rows, columns = slice(int(top * side), int(bottom * side)), slice(int(left * side), int(right * side))
        strokes[rows, columns] = label
    return np.clip(image, 0, 1), strokes, truth


def read(file):
    """An array as it is, or an image: colours as RGB, numbers (grey, palette) as they are."""
    if file.endswith(".npy"):
        return np.load(file)
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image if image.mode in ("L", "P", "I", "I;16") else image.convert("RGB"))


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image", metavar="FILE", help="image or .npy [H, W] or [H, W, 3]; needs --strokes")
    parser.add_argument("--strokes", metavar="FILE", help="image or .npy of labels [H, W]")
    parser.add_argument(
        "--beta", type=float, default=130.0, help="β: the larger, the harder an edge is to cross"
    )
    parser.add_argument("--tol", type=float, default=1e-6, help="largest error of a probability")
    parser.add_argument("--out", metavar="PNG", help="draw strokes, borders and probability into this file")
    options = parser.parse_args(arguments)
    if (options.image is None) != (options.strokes is None):
        parser.error("--image and --strokes go together: give both, or neither for the generated scene")

    if options.image:
        image, strokes, truth = read(options.image), read(options.strokes), None
    else:
        image, strokes, truth = scene()
    found = gd.random_walker(
        image,
        strokes.astype(np.int64),
        options.beta,
        channel_axis=-1 if image.ndim == 3 else None,
        tol=options.tol,
    )
    labels = found.labels.numpy()
    lower, upper = (bound.numpy() for bound in (found.solution.lower, found.solution.upper))
    print("label   strokes    pixels      sure")
    for column, name in enumerate(found.names.tolist()):
        others = np.delete(upper, column, axis=1).max(1)
        sure = (lower[:, column] > others).sum()
        print(f"{name:5d} {(strokes == name).sum():9d} {(labels == name).sum():9d} {sure:9d}")
    print(f"no probability is off by more than {float(found.solution.error_bound.max()):.1e}")
    if truth is not None:
        print(f"right: {100 * (labels == truth).mean():.2f} % of the pixels")
    if options.out:
        draw(image, strokes, labels, found.probability.amax(0).numpy(), options.out)


def draw(image, strokes, labels, probability, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 2.9), dpi=100, layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, title in zip(axes[:2], ("strokes", "borders of the labels"), strict=True):
        axis.imshow(image, cmap="gray" if image.ndim == 2 else None, interpolation="nearest")
        axis.set_title(title, fontsize=10)
    marks = np.ma.masked_equal(strokes, 0)
    axes[0].imshow(marks, cmap="tab10", vmin=0, vmax=9, interpolation="nearest")
    axes[1].contour(labels, levels=np.unique(labels)[:-1] + 0.5, colors="k", linewidths=1.2)
    figure.colorbar(axes[2].imshow(probability, interpolation="nearest"), ax=axes[2], shrink=0.8)
    axes[2].set_title("largest probability", fontsize=10)
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(file)
    print(f"drawn: {file}")


if __name__ == "__main__":
    main()
