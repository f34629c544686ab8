"""The dense CRF of Krähenbühl and Koltun (NeurIPS 2011): a score sharpened along the edges of its image.

    Q_i(l) ∝ p_i(l) exp(Σ_m w_m Σ_j k_m(i, j) Q_j(l)),      k_m = D_m^−½ G_m D_m^−½

G_1 sums with Gaussian weights over places, G_2 over places and colours, both by graphdiff's permutohedral
lattice; D holds their row sums. The sum is the reward of agreeing with the pixels alike (Potts).
"""

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import graphdiff as gd
from segmentation.errors import UsageError


@dataclass(frozen=True)
class DenseCRF:
    """Mean field of the fully connected CRF with Potts compatibility.

    G and its normalisation are those of the authors' program and of pydensecrf; the builtin backend equals it
    up to rounding. A pixel is among those that it agrees with. The defaults are the parameters with which
    kazuto1011/deeplab-pytorch reproduces DeepLabV2 on VOC. The paper of DeepLabV2 fixes 3 as weight and as
    deviation of G₁, and searches the others for each network.

    Args:
        iterations: steps of mean field, 10 in both papers.
        gaussian_weight: w₁ ≥ 0, of pixels that are near; in units of log p.
        gaussian_sigma: deviation of the places in G₁, pixels.
        bilateral_weight: w₂ ≥ 0, of pixels that are near and alike; in units of log p.
        bilateral_sigma: deviation of the places in G₂, pixels.
        colour_sigma: deviation of red, green and blue in G₂, in levels from 0 to 255.
        floor: smaller probabilities count as this one, so that no class is out of the question.
        backend: "builtin" runs where the logits lie; "pydensecrf2" is the peer, on the CPU, from the extra
            ``[crf]``.

    Raises:
        UsageError: pydensecrf2 is asked for and not installed.
        ValueError: a parameter is out of range; the message names it.

    Example:
        >>> import torch
        >>> from segmentation.crf import DenseCRF
        >>> image = torch.zeros(3, 8, 8, dtype=torch.uint8)
        >>> image[:, :, 4:] = 200  # an edge in the middle
        >>> logits = torch.zeros(2, 8, 8)
        >>> logits[0, :, :3] = logits[1, :, 3:] = 2.0  # a score that misses it by one column
        >>> DenseCRF()(logits, image).argmax(0)[0]
        tensor([0, 0, 0, 0, 1, 1, 1, 1])
    """

    iterations: int = 10
    gaussian_weight: float = 3.0
    gaussian_sigma: float = 1.0
    bilateral_weight: float = 4.0
    bilateral_sigma: float = 67.0
    colour_sigma: float = 3.0
    floor: float = 1e-5
    backend: Literal["builtin", "pydensecrf2"] = "builtin"

    def __post_init__(self) -> None:
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"iterations: expected an integer ≥ 1, got {self.iterations!r}")
        for name in ("gaussian_weight", "bilateral_weight"):
            if not (math.isfinite(weight := getattr(self, name)) and weight >= 0):
                raise ValueError(f"{name}: expected a finite number ≥ 0, got {weight!r}")
        for name in ("gaussian_sigma", "bilateral_sigma", "colour_sigma"):
            if not (math.isfinite(sigma := getattr(self, name)) and sigma > 0):
                raise ValueError(f"{name}: expected a finite number > 0, got {sigma!r}")
        if not 0 < self.floor < 1:
            raise ValueError(f"floor: expected a probability between 0 and 1, got {self.floor!r}")
        if self.backend not in ("builtin", "pydensecrf2"):
            raise ValueError(f'backend: expected "builtin" or "pydensecrf2", got {self.backend!r}')
        if self.backend == "pydensecrf2" and find_spec("pydensecrf") is None:
            raise UsageError(
                "pydensecrf2 is not installed: pip install pydensecrf2, which compiles C++, or use --crf "
                "builtin"
            )

    def __str__(self) -> str:
        return (
            f"{self.backend}, {self.iterations} iterations, {self.gaussian_weight:g} at "
            f"{self.gaussian_sigma:g} px, {self.bilateral_weight:g} at {self.bilateral_sigma:g} px and "
            f"{self.colour_sigma:g} levels"
        )

    @torch.no_grad()
    def __call__(self, logits: Tensor, image: Tensor) -> Tensor:
        """The classes' probabilities once the pixels have agreed.

        Args:
            logits: of the classes, floating [K, H, W]; log-probabilities are logits, too.
            image: as it was stored, not normalised: uint8 [3, H, W] in RGB.

        Returns:
            Q, float32 [K, H, W] on the device of `logits`; without gradients.

        Raises:
            TypeError: a dtype does not fit.
            ValueError: a shape does not fit, or a logit is not finite.
        """
        _check(logits, image)
        unary = logits.detach().float().log_softmax(0).clamp(min=math.log(self.floor))
        infer = self._builtin if self.backend == "builtin" else self._pydensecrf2
        return infer(unary, image.to(logits.device))

    def _builtin(self, unary: Tensor, image: Tensor) -> Tensor:
        classes, height, width = unary.shape
        places = torch.cartesian_prod(
            torch.arange(height, device=unary.device), torch.arange(width, device=unary.device)
        )
        places = places.flip(-1).float()
        colours = image.flatten(1).T.float() / self.colour_sigma
        terms = []
        for weight, positions in (
            (self.gaussian_weight, places / self.gaussian_sigma),
            (self.bilateral_weight, torch.cat([places / self.bilateral_sigma, colours], -1)),
        ):
            lattice = gd.PermutohedralLattice(positions)
            scale = lattice.filter(unary.new_ones(height * width, 1)).rsqrt()
            terms.append((weight, scale, lattice))

        start = unary.flatten(1).T.contiguous()
        q = start.softmax(-1)
        for _ in range(self.iterations):
            scores = start.clone()
            for weight, scale, lattice in terms:
                scores.addcmul_(scale, lattice.filter(scale * q), value=weight)
            q = scores.softmax(-1)
        return q.T.reshape(classes, height, width)

    def _pydensecrf2(self, unary: Tensor, image: Tensor) -> Tensor:
        from pydensecrf.densecrf import DenseCRF2D

        classes, height, width = unary.shape
        peer = DenseCRF2D(width, height, classes)
        # It wants writable arrays of its own.
        peer.setUnaryEnergy(np.array(-unary.flatten(1).cpu().numpy(), order="C"))
        peer.addPairwiseGaussian(sxy=self.gaussian_sigma, compat=self.gaussian_weight)
        peer.addPairwiseBilateral(
            sxy=self.bilateral_sigma,
            srgb=self.colour_sigma,
            rgbim=np.array(image.permute(1, 2, 0).cpu().numpy(), order="C"),
            compat=self.bilateral_weight,
        )
        found = np.array(peer.inference(self.iterations), dtype=np.float32)
        return torch.from_numpy(found).reshape(classes, height, width).to(unary.device)


def _check(logits: Tensor, image: Tensor) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits: expected a floating-point tensor, got {logits.dtype}")
    if logits.ndim != 3 or logits.numel() == 0:
        raise ValueError(
            f"logits: expected shape [K, H, W] of one image, not empty, got {list(logits.shape)}"
        )
    if image.dtype != torch.uint8:
        raise TypeError(
            f"image: expected uint8 as it was stored, got {image.dtype}; colour_sigma is in levels from 0 to "
            "255"
        )
    if image.shape != (3, *logits.shape[1:]):
        raise ValueError(
            f"image: expected shape [3, {logits.shape[1]}, {logits.shape[2]}] like logits, got "
            f"{list(image.shape)}"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(
            "logits: expected finite values; a class that is excluded takes a low one, such as -100"
        )
