"""`shapes`: textured objects on textured ground, drawn on the fly; nothing is stored.

Five kinds of object, each with a form and a texture of its own: spotted discs, ringed rings, striped bars,
checked crosses and speckled snakes. Colours are drawn at random for object and ground alike, so a colour
tells nothing about the class. Bars, ring walls, cross arms and snakes are 8 to 12 pixels wide: about one cell
of a stride-8 grid. Objects hide one another, the light is uneven and every pixel is noisy.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom
from torchvision import tv_tensors

from segmentation.errors import UsageError

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

SPLITS = {"train": 8192, "val": 96, "test": 384}
"""Images in each split."""

SUPERSAMPLING = 2
"""Objects are drawn on a grid finer by this factor, so that their borders blend as a camera's would."""


class ShapesDataset:
    """One split of the generated data set: image `index` is a pure function of (seed, split, index).

    Args:
        split: "train", "val" or "test".
        seed: another seed is another data set; runs to be compared share one.
        size: side of the square images, in pixels.

    Raises:
        UsageError: for a split that does not exist.
    """

    classes: tuple[str, ...] = ("ground", "disc", "ring", "bar", "cross", "snake")
    label_source = "drawn with the images"

    def __init__(self, split: str, seed: int = 7, size: int = 97) -> None:
        if split not in SPLITS:
            raise UsageError(f"the shapes data set has no split {split!r}: pass one of {', '.join(SPLITS)}")
        self.split = split
        self.seed = seed
        self.eval_size = size

    def __len__(self) -> int:
        return SPLITS[self.split]

    def name(self, index: int) -> str:
        """For example "val-12"."""
        return f"{self.split}-{index}"

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Image uint8 [3, size, size] in RGB and label int64 [size, size]."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the split {self.split!r} of {len(self)} images")
        rng = np.random.default_rng([self.seed, list(SPLITS).index(self.split), index])
        image, label = draw(rng, self.eval_size)
        return (
            tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1).contiguous()),
            tv_tensors.Mask(torch.from_numpy(label)),
        )


def draw(rng: np.random.Generator, size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """One scene: image uint8 [size, size, 3], label int64 [size, size]."""
    fine = size * SUPERSAMPLING
    y, x = np.mgrid[0:fine, 0:fine].astype(np.float32) / SUPERSAMPLING
    ground_dark, ground_light = _two_colours(rng)
    ground = _mix(ground_dark, ground_light, _ground(rng, size))
    image = ground.repeat(SUPERSAMPLING, axis=0).repeat(SUPERSAMPLING, axis=1)
    label = np.zeros((fine, fine), dtype=np.int64)
    for _ in range(rng.integers(3, 6)):
        kind = int(rng.integers(1, len(ShapesDataset.classes)))
        form, texture = _KINDS[kind - 1]
        centre_y, centre_x = rng.uniform(0.12 * size, 0.88 * size, 2)
        angle = rng.uniform(0, 2 * np.pi)
        along = np.cos(angle) * (x - centre_x) + np.sin(angle) * (y - centre_y)
        across = -np.sin(angle) * (x - centre_x) + np.cos(angle) * (y - centre_y)
        inside = form(rng, along, across, size)
        dark, light = _two_colours(rng)
        image[inside] = _mix(dark, light, texture(rng, along, across)[inside])
        label[inside] = kind
    image = image.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3).mean((1, 3))
    image *= 1 + 0.2 * _field(rng, size, 4)[..., None]
    image += rng.uniform(4, 14) * rng.standard_normal(image.shape, dtype=np.float32)
    # The label of a pixel is that of one of its samples: a border pixel belongs to one class, as a person
    # would draw.
    label = label[SUPERSAMPLING // 2 :: SUPERSAMPLING, SUPERSAMPLING // 2 :: SUPERSAMPLING]
    return np.clip(image, 0, 255).astype(np.uint8), np.ascontiguousarray(label)


# Forms: (rng, coordinates along and across the object's axis in pixels, image side) -> inside or not.


def _disc(rng: np.random.Generator, along: Array, across: Array, size: int) -> Mask:
    radius = rng.uniform(0.11, 0.19) * size
    inside: Mask = np.hypot(along, across * rng.uniform(1.0, 1.4)) < radius
    return inside


def _ring(rng: np.random.Generator, along: Array, across: Array, size: int) -> Mask:
    radius, wall = rng.uniform(0.17, 0.24) * size, rng.uniform(8, 12)
    inside: Mask = np.abs(np.hypot(along, across) - radius) < wall / 2
    return inside


def _bar(rng: np.random.Generator, along: Array, across: Array, size: int) -> Mask:
    length, width = rng.uniform(0.45, 0.75) * size, rng.uniform(8, 12)
    inside: Mask = (np.abs(along) < length / 2) & (np.abs(across) < width / 2)
    return inside


def _cross(rng: np.random.Generator, along: Array, across: Array, size: int) -> Mask:
    reach, width = rng.uniform(0.15, 0.22) * size, rng.uniform(9, 12)
    near, far = np.minimum(np.abs(along), np.abs(across)), np.maximum(np.abs(along), np.abs(across))
    inside: Mask = (near < width / 2) & (far < reach)
    return inside


def _snake(rng: np.random.Generator, along: Array, across: Array, size: int) -> Mask:
    length, width = rng.uniform(0.5, 0.8) * size, rng.uniform(8, 11)
    wave = 2 * np.pi / (rng.uniform(0.3, 0.4) * size)
    swing, phase = rng.uniform(0.05, 0.07) * size, rng.uniform(0, 2 * np.pi)
    # Dividing by the length of the curve's tangent keeps the width even where it climbs.
    slope = swing * wave * np.cos(wave * along + phase)
    distance = np.abs(across - swing * np.sin(wave * along + phase)) / np.sqrt(1 + slope**2)
    inside: Mask = (distance < width / 2) & (np.abs(along) < length / 2)
    return inside


# Textures: (rng, coordinates) -> brightness in [0, 1], between the object's two colours.


def _spots(rng: np.random.Generator, along: Array, across: Array) -> Array:
    wave = 2 * np.pi / rng.uniform(5, 7)
    brightness: Array = (np.cos(wave * along) + np.cos(wave * across) > 0.6).astype(np.float32)
    return brightness


def _circles(rng: np.random.Generator, along: Array, across: Array) -> Array:
    wave = 2 * np.pi / rng.uniform(3.2, 4.5)
    brightness: Array = (0.5 + 0.5 * np.cos(wave * np.hypot(along, across))).astype(np.float32)
    return brightness


def _stripes(rng: np.random.Generator, along: Array, across: Array) -> Array:
    brightness: Array = (np.cos(2 * np.pi / rng.uniform(5, 8) * along) > 0).astype(np.float32)
    return brightness


def _checks(rng: np.random.Generator, along: Array, across: Array) -> Array:
    wave = np.pi / rng.uniform(2.5, 3.5)
    brightness: Array = (np.cos(wave * along) * np.cos(wave * across) > 0).astype(np.float32)
    return brightness


def _speckle(rng: np.random.Generator, along: Array, across: Array) -> Array:
    noise = rng.standard_normal(along.shape, dtype=np.float32)
    brightness: Array = (gaussian_filter(noise, 0.9 * SUPERSAMPLING, truncate=2) > 0).astype(np.float32)
    return brightness


_Form = Callable[[np.random.Generator, Array, Array, int], Mask]
_Texture = Callable[[np.random.Generator, Array, Array], Array]
_KINDS: tuple[tuple[_Form, _Texture], ...] = (
    (_disc, _spots),
    (_ring, _circles),
    (_bar, _stripes),
    (_cross, _checks),
    (_snake, _speckle),
)


def _ground(rng: np.random.Generator, size: int) -> Array:
    """Brightness in [0, 1]: soft clouds and a faint grain, both without direction."""
    clouds = _field(rng, size, int(rng.integers(4, 8))) + 0.5 * _field(rng, size, 16)
    grain = gaussian_filter(rng.standard_normal((size, size), dtype=np.float32), rng.uniform(0.5, 1.0))
    brightness: Array = np.clip(0.5 + 0.2 * clouds + 0.1 * grain / grain.std(), 0, 1)
    return brightness


def _field(rng: np.random.Generator, size: int, knots: int) -> Array:
    """A smooth random field [size, size] of unit scale, drawn on knots x knots and interpolated."""
    coarse = rng.standard_normal((knots, knots), dtype=np.float32)
    field: Array = zoom(coarse, size / knots, order=1, mode="nearest", grid_mode=True)
    return field


def _two_colours(rng: np.random.Generator) -> tuple[Array, Array]:
    """A darker and a lighter colour, each of any hue, far enough apart for a texture to show."""
    dark = rng.uniform(20, 130, 3)
    light = dark + rng.uniform(40, 120, 3)
    return dark.astype(np.float32), light.astype(np.float32)


def _mix(dark: Array, light: Array, brightness: Array) -> Array:
    return dark + (light - dark) * brightness[..., None]
