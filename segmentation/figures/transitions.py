"""The paper's Figure 3: rows of each P_t on the image, and what they go by, colour or object, in numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from numpy.typing import NDArray
from scipy.special import entr

import graphdiff as gd
from segmentation.data import VOID
from segmentation.errors import UsageError
from segmentation.figures.drawing import PAGE, Picture, save, tiles
from segmentation.figures.inputs import Nodes, Sample, Study, check_new, nodes_of, seen_colours
from segmentation.figures.panel import largest_class
from segmentation.models import DifNetMaps
from segmentation.rundir import write_rows

DECADES = 3
"""Entries below the largest of their row by more powers of ten than this are drawn as nothing."""

HEAT = "inferno"

PIXELS = 3
"""Pixels chosen in an image, at most."""

SMALLEST = 0.005
"""Share of the image below which a region gets no pixel."""

MEASURES = (
    "itself", "effective_nodes", "largest", "padding", "same_class", "same_class_near", "same_class_even",
    "colour_distance", "colour_distance_near", "colour_distance_even", "distance",
)  # fmt: skip


def draw_transitions(
    study: Study, out: Path, pixels: Sequence[tuple[int, int]] = (), overwrite: bool = False
) -> tuple[list[Path], list[dict[str, Any]]]:
    """Draw transitions.png and .pdf; write transitions.csv and transitions_mean.csv.

    A picture shows row i of P_t: where a walk goes from the pixel that is marked. Its colours are
    logarithmic, from the largest entry down to a thousandth of it.

    transitions.csv has a row for each pixel and walk, transitions_mean.csv one for each walk: the mean over
    all nodes of an image that are of one class, then over classes and images, so that large regions do not
    drown small ones. Columns, with p = row i of P_t, which sums to 1:

    - `itself`: p_i. `largest`: the largest p_j. `effective_nodes`: exp(entropy of p).
    - `padding`: Σ p_j over nodes beyond the image.
    - the rest leave out i itself and the padding, and weigh what is left to 1:
      `same_class`: Σ p_j over nodes of i's class. `colour_distance`: Σ p_j |colour_i − colour_j|, colours
      being means around the nodes, RGB in [0, 1]. `distance`: Σ p_j |i − j| in nodes.
      `..._even`: what a walk to anywhere on the image would have. `..._near`: what one would have that goes
      as far as p does, but in any direction, for what is near is alike; distances are rounded to nodes.

    Classes are the truth's, where it is not known the prediction's; nodes on void count in no class.

    Args:
        study: model and images.
        out: folder to write into.
        pixels: (x, y) to look at in each image; chosen by `telling_pixels` if none are given.
        overwrite: replace what an earlier call wrote.

    Returns:
        The files written, and the rows of transitions_mean.csv.

    Raises:
        UsageError: a pixel lies outside an image.
    """
    stem, table, means = out / "transitions", out / "transitions.csv", out / "transitions_mean.csv"
    check_new([stem.with_suffix(".png"), stem.with_suffix(".pdf"), table, means], overwrite)
    titles = [f"$P_{{{step}}}$" if step.isdigit() else f"$P$ ({step})" for step in study.model.steps]
    rows: list[Mapping[str, Picture]] = []
    names: list[str] = []
    marks: list[tuple[int, int]] = []
    numbers: list[dict[str, Any]] = []
    over_classes: list[list[dict[str, float]]] = [[] for _ in titles]
    for sample in study if pixels else ():
        # Before the first image is worked on.
        _check(pixels, sample)
    for sample in study:
        scene = _Scene.of(sample, study.maps(sample))
        chosen = list(pixels) or telling_pixels(scene.labels)
        at = [scene.nodes.of_pixel(x, y) for x, y in chosen]
        with torch.no_grad():
            operators = study.model.transitions(sample.padded)
        looked_at = [_rows(P, at) for P in operators]
        for number, (x, y) in enumerate(chosen):
            heats = (scene.heat(walk[number]) for walk in looked_at)
            rows.append({"image": sample.pixels} | dict(zip(titles, heats, strict=True)))
            names.append(sample.name)
            marks.append((x, y))
        pairs = scene.pairs(np.array(at))
        for step, walk in zip(study.model.steps, looked_at, strict=True):
            told = pairs.measure(walk, scene.inside)
            numbers += [
                {
                    "image": sample.name, "walk": step, "x": x, "y": y, "node": node,
                    "class": scene.class_name(node, study.classes), "truth": sample.label is not None,
                }
                | {name: float(values[number]) for name, values in told.items()}
                for number, ((x, y), node) in enumerate(zip(chosen, at, strict=True))
            ]  # fmt: skip
        for found, of_image in zip(over_classes, _by_class(operators, scene), strict=True):
            found += of_image
    figure, axes = tiles(rows, study.classes, PAGE / (1 + len(titles)), names, below=0.42)
    for (x, y), line in zip(marks, axes, strict=True):
        for axis in line:
            _mark(axis, x, y)
    norm = LogNorm(10.0**-DECADES, 1)
    height = figure.get_figheight()
    bar = figure.add_axes((0.3, 0.22 / height, 0.4, 0.07 / height))
    figure.colorbar(ScalarMappable(norm, HEAT), cax=bar, orientation="horizontal")
    bar.tick_params(labelsize=6, width=0.4, length=2, pad=1)
    bar.set_title("$P_{ij}$, as a share of the largest entry of its row", fontsize=6.5, pad=2)
    written = save(figure, stem)
    write_rows(table, numbers)
    summary = [
        {"walk": step, "images": len(study)}
        | {name: _mean([part[name] for part in found]) for name in MEASURES}
        for step, found in zip(study.model.steps, over_classes, strict=True)
    ]
    write_rows(means, summary)
    return [*written, table, means], summary


def table_of_transitions(rows: Sequence[Mapping[str, Any]]) -> str:
    """transitions_mean.csv as aligned text, without `largest` and `padding`."""
    width = max(len("walk"), *(len(row["walk"]) for row in rows))
    shown = [name for name in MEASURES if name not in ("largest", "padding")]
    lines = [f"{'walk':<{width}}" + "".join(f"  {name.replace('_', ' '):>8}" for name in shown)]
    for row in rows:
        cells = (f"  {row[name]:>{max(8, len(name))}.3g}" for name in shown)
        lines.append(f"{row['walk']:<{width}}" + "".join(cells))
    return "\n".join(lines)


def telling_pixels(labels: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Up to `PIXELS` pixels (x, y) of an image, the same each time: deep inside its large regions.

    A region is an 8-connected component of one class, at least `SMALLEST` of the image. First come the
    largest regions of objects, a class having its second only after every class has its first, and last the
    largest region of class 0, the background. In each it is the pixel farthest from the region's border, the
    image's edge included; of several the first in reading order.

    Args:
        labels: class indices [H, W], with `VOID` where there is none.
    """
    from scipy.ndimage import distance_transform_edt
    from scipy.ndimage import label as components

    objects: list[tuple[int, int, NDArray[np.bool_]]] = []
    ground: list[NDArray[np.bool_]] = []
    for c in np.unique(labels[labels != VOID]):
        numbered, _ = components(labels == c, structure=np.ones((3, 3)))
        sizes = np.bincount(numbered.ravel())[1:]
        falling = [int(n) for n in np.argsort(-sizes, kind="stable") if sizes[n] >= SMALLEST * labels.size]
        if c == 0:
            ground = [numbered == n + 1 for n in falling[:1]]
        else:
            objects += [(rank, -int(sizes[n]), numbered == n + 1) for rank, n in enumerate(falling[:PIXELS])]
    objects.sort(key=lambda region: region[:2])
    found = []
    for mask in [mask for *_, mask in objects[: PIXELS - len(ground)]] + ground:
        depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
        y, x = np.unravel_index(int(depth.argmax()), depth.shape)
        found.append((int(x), int(y)))
    height, width = labels.shape
    return found or [(width // 2, height // 2)]


@dataclass(frozen=True)
class _Scene:
    """An image with what its nodes are.

    Args:
        sample: the image.
        nodes: where the nodes lie.
        labels: class of every pixel, the truth's or the prediction's.
        inside: whether a node lies on the image, [N].
        node_labels: class of each node, [N]; `VOID` on void and on padding.
        colours: mean colour around each node, [N, 3].
        places: row and column of each node, [N, 2].
    """

    sample: Sample
    nodes: Nodes
    labels: NDArray[np.int64]
    inside: NDArray[np.bool_]
    node_labels: NDArray[np.int64]
    colours: NDArray[np.float64]
    places: NDArray[np.float64]

    @classmethod
    def of(cls, sample: Sample, maps: DifNetMaps) -> "_Scene":
        nodes = nodes_of(sample, maps)
        height, width = sample.size
        labels: NDArray[Any] = largest_class(maps.logits[..., :height, :width])
        if sample.label is not None:
            labels = sample.label
        inside = nodes.at_nodes(np.ones(sample.size, bool), False).ravel()
        places = np.stack(np.divmod(np.arange(inside.size), nodes.grid[1]), -1).astype(float)
        return cls(
            sample, nodes, labels, inside, nodes.at_nodes(labels, VOID).ravel(),
            seen_colours(sample, nodes).reshape(-1, 3), places,
        )  # fmt: skip

    def class_name(self, node: int, classes: tuple[str, ...]) -> str:
        label = int(self.node_labels[node])
        return "void" if label == VOID else classes[label]

    def heat(self, row: NDArray[np.float64]) -> Picture:
        """A row of P over the image in grey, uint8 [H, W, 3]."""
        return heat_on_image(self.sample.pixels, self.nodes.on_pixels(row.reshape(self.nodes.grid)))

    def pairs(self, index: NDArray[np.int64]) -> "_Pairs":
        """What some nodes have to do with all others."""
        others = np.broadcast_to(self.inside, (len(index), len(self.inside))).copy()
        others[np.arange(len(index)), index] = False
        labels = self.node_labels
        known = others & (labels != VOID) & (labels[index] != VOID)[:, None]
        same = known & (labels == labels[index][:, None])
        colour = _distances(self.colours[index], self.colours)
        place = _distances(self.places[index], self.places)
        near = _mean_at_distance(same, known, place), _mean_at_distance(colour, others, place)
        return _Pairs(index, others, known, same, colour, place, *near)


@dataclass(frozen=True)
class _Pairs:
    """Of n nodes and all N, [n, N] each.

    Args:
        index: the n nodes.
        others: j lies on the image and is not i.
        known: besides, both have a class.
        same: besides, the same one.
        colour: how far their colours are apart.
        place: how far they themselves are, in nodes.
        same_near: share of the same class among all nodes of known class as far from i as j.
        colour_near: mean distance in colour to all nodes as far from i as j.
    """

    index: NDArray[np.int64]
    others: NDArray[np.bool_]
    known: NDArray[np.bool_]
    same: NDArray[np.bool_]
    colour: NDArray[np.float64]
    place: NDArray[np.float64]
    same_near: NDArray[np.float64]
    colour_near: NDArray[np.float64]

    def measure(self, rows: NDArray[np.float64], inside: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
        """`MEASURES` of the nodes' rows of P [n, N]; nan where there is nothing to go by."""
        elsewhere, of_known = rows * self.others, rows * self.known
        own = rows[np.arange(len(rows)), self.index]
        with np.errstate(divide="ignore", invalid="ignore"):
            return {
                "itself": own,
                "effective_nodes": np.exp(entr(rows).sum(1)),
                "largest": rows.max(1),
                "padding": rows[:, ~inside].sum(1),
                "same_class": _weighed(self.same, of_known),
                "same_class_near": _weighed(self.same_near, of_known),
                "same_class_even": _weighed(self.same, self.known),
                "colour_distance": _weighed(self.colour, elsewhere),
                "colour_distance_near": _weighed(self.colour_near, elsewhere),
                "colour_distance_even": _weighed(self.colour, self.others),
                "distance": _weighed(self.place, elsewhere),
            }


def _weighed(values: NDArray[Any], weights: NDArray[Any]) -> NDArray[np.float64]:
    """Means of rows, [n]."""
    means: NDArray[np.float64] = (values * weights).sum(1) / weights.sum(1)
    return means


def _mean_at_distance(
    values: NDArray[Any], among: NDArray[np.bool_], distance: NDArray[np.float64]
) -> NDArray[np.float64]:
    """For every pair, the mean of i's values over all j of `among` at the same distance, [n, N]."""
    ring = distance.round().astype(np.int64)
    ring += (ring.max() + 1) * np.arange(len(ring))[:, None]
    count = np.bincount(ring.ravel(), among.ravel())
    total = np.bincount(ring.ravel(), (values * among).ravel())
    means: NDArray[np.float64] = (total / np.maximum(count, 1))[ring]
    return means


def _distances(some: NDArray[np.float64], all_: NDArray[np.float64]) -> NDArray[np.float64]:
    """Euclidean, [n, N]."""
    squares = np.zeros((len(some), len(all_)))
    for axis in range(some.shape[1]):
        squares += (some[:, None, axis] - all_[None, :, axis]) ** 2
    return np.sqrt(squares)


def heat_on_image(pixels: NDArray[np.uint8], values: NDArray[np.float64]) -> Picture:
    """Values [H, W] of a row of P in colours over an image [H, W, 3] in grey, uint8 [H, W, 3]."""
    with np.errstate(divide="ignore"):
        strength = np.clip(1 + np.log10(values / values.max()) / DECADES, 0, 1)[..., None]
    grey = 0.55 * (pixels @ np.array([0.299, 0.587, 0.114]))[..., None] / 255
    coloured = matplotlib.colormaps[HEAT](strength[..., 0])[..., :3]
    opacity = np.minimum(1.0, 0.15 + 1.2 * strength) * (strength > 0)
    mixed: NDArray[np.uint8] = (255 * ((1 - opacity) * grey + opacity * coloured)).round().astype(np.uint8)
    return mixed


def _check(pixels: Sequence[tuple[int, int]], sample: Sample) -> None:
    height, width = sample.size
    for x, y in pixels:
        if not (0 <= x < width and 0 <= y < height):
            raise UsageError(
                f"--pixels {x},{y} lies outside {sample.name}, which is {width}x{height} pixels: give x,y "
                f"from 0,0 (top left) to {width - 1},{height - 1}"
            )


def _rows(P: gd.Transition, index: Sequence[int]) -> NDArray[np.float64]:
    """Rows [n, N] of P [1, N, N]."""
    with torch.no_grad():
        return P.rows(list(index))[0].double().cpu().numpy()


def _by_class(
    operators: Sequence[gd.Transition], scene: _Scene, block: int = 256
) -> list[list[dict[str, float]]]:
    """For every P, of every class in the image, the mean measures of its nodes."""
    index = np.flatnonzero(scene.node_labels != VOID)
    found: list[dict[str, list[NDArray[np.float64]]]] = [{name: [] for name in MEASURES} for _ in operators]
    for start in range(0, len(index), block):
        pairs = scene.pairs(index[start : start + block])
        for P, parts in zip(operators, found, strict=True):
            for name, values in pairs.measure(_rows(P, pairs.index.tolist()), scene.inside).items():
                parts[name].append(values)
    of = scene.node_labels[index]
    return [
        [
            {name: _mean(np.concatenate(values)[of == c]) for name, values in parts.items()}
            for c in np.unique(of)
        ]
        for parts in found
    ]


def _mean(values: Sequence[float] | NDArray[np.float64]) -> float:
    """Mean of what is not nan; nan where all is."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _mark(axis: Axes, x: int, y: int) -> None:
    for colour, size, width in (("black", 6.5, 1.4), ("white", 6.5, 0.7)):
        axis.plot(x, y, "o", markersize=size, markerfacecolor="none", color=colour, markeredgewidth=width)
