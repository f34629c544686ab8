"""DifNet (the paper's Figure 1): a seed branch says what, a similarity branch says where it spreads.

x = seed branch(image),  M = H(x),  s = M x
P_t = softmax(Ψ_t(f_t) Ψ_t(f_t)ᵀ)              f_t: the image and the similarity branch's layers
y⁰ = s,  y^{t+1} = β_t (µ_t P_t y^t + (1 − µ_t) s) + (1 − β_t) y^t        (Eq. 5)

In the place of the cascade one exact diffusion may stand, y = (1 − µ)(I − µP)⁻¹ s (Eq. 2), as in the networks
that invert a matrix or solve a linear system, or nothing, y = s.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphdiff as gd
from segmentation.models.backbone import channels, network
from segmentation.models.deeplab import score_head, upsample
from segmentation.models.heads import Everywhere, Importance

DRY_RUN = 224
"""Side in pixels of the image that an extractor of one's own is tried on."""


@dataclass(frozen=True)
class DifNetMaps:
    """What happens inside DifNet on the way to its logits; h x w is the grid of the walks.

    Args:
        score: x [B, K, h, w].
        importance: M [B, 1, h, w].
        seed: s = M x [B, K, h, w].
        walks: output of each step of the diffusion, [B, K, h, w] each: of every walk of a cascade, of one
            exact diffusion, or none. The last, or the seed where there is none, is what is upsampled.
        logits: [B, K, H, W].
    """

    score: Tensor
    importance: Tensor
    seed: Tensor
    walks: list[Tensor]
    logits: Tensor


class DifNet(nn.Module):
    """Diffuses a score over the image by a cascade of learned random walks, or by what it is compared with.

    Either branch may be a module of one's own: any FCN-like model gives the score, any network that gives
    maps the features. Such a model is trained and saved (`state_dict`) by whoever made it:
    `segmentation.train` and its checkpoints know branches by name.

    Args:
        seed: the seed branch: "resnet50" or another of timm's names, on which a score head is put; or a
            module that maps images [B, 3, H, W] to a score [B, K, h, w] of any size, or to a dictionary with
            it under "out", as torchvision's networks do. A score is resized to the grid of the walks.
        num_classes: K.
        similarity: the similarity branch: a name as for `seed`, whose layer1 to layer4 are read; or a module
            that maps images to a list or dictionary of maps [B, C_t, H_t, W_t] of any sizes. None takes the
            name given as `seed`.
        similarity_channels: C_t of the maps of a module; None finds them by a dry run on 224x224 pixels.
        aspp: False puts one plain 3x3 convolution in the place of ASPP (the paper's noASPP).
        walks: which walks to take, in rising order: 0 on the image, t > 0 on the t-th of the similarity
            branch's maps; None takes all. (0, 2, 4) is the paper's "without 2-th and 4-th".
        grid_stride: pixels between neighbouring nodes of the walks' grid.
        affinity_scale: factor on the inner products ψ_i·ψ_j; the paper's is 1.
        diffusion: "cascade", the paper's; "exact", one exact diffusion whose ψ holds the embeddings of all
            walks side by side; "none", the seed is upsampled as it is, and there is no similarity branch.
        transitions: "hierarchical", each walk of a cascade has a P_t of its own; "last", all share the P of
            the last of `walks`.
        fixed_mu: value in [0, 1) to fix every µ_t at; None learns them.
        fixed_beta: value in [0, 1] to fix every β_t of a cascade at; None learns them.
        importance: False puts M = 1 in the place of H.

    Raises:
        ValueError: the branches, walks or options do not fit each other.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Maps(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fine, self.coarse = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 16, 3, 4, 1)
        ...     def forward(self, image):
        ...         fine = self.fine(image).relu()
        ...         return [fine, self.coarse(fine)]
        >>> model = DifNet(nn.Conv2d(3, 21, 9, 8, 4), num_classes=21, similarity=Maps())
        >>> model(torch.randn(2, 3, 65, 97)).shape, model.steps
        (torch.Size([2, 21, 65, 97]), ('0', '1', '2'))
    """

    def __init__(
        self,
        seed: str | nn.Module,
        num_classes: int,
        similarity: str | nn.Module | None = None,
        *,
        similarity_channels: Sequence[int] | None = None,
        aspp: bool = True,
        walks: Sequence[int] | None = None,
        grid_stride: int = 8,
        affinity_scale: float = 1.0,
        diffusion: Literal["cascade", "exact", "none"] = "cascade",
        transitions: Literal["hierarchical", "last"] = "hierarchical",
        fixed_mu: float | None = None,
        fixed_beta: float | None = None,
        importance: bool = True,
    ) -> None:
        super().__init__()
        _check_options(diffusion, transitions, fixed_mu, fixed_beta)
        self.num_classes = num_classes
        self.grid_stride = grid_stride
        self.score: nn.Module | None = None
        if isinstance(seed, str):
            self.seed_branch = network(seed, layers=(4,))
            self.score = score_head(channels(seed)[3], num_classes, aspp)
        else:
            self.seed_branch = seed
        self.importance = Importance(num_classes) if importance else Everywhere()

        self.similarity_branch: nn.Module | None = None
        self.cascade: gd.CascadedWalk | gd.Diffusion | None = None
        self.shared: gd.FeatureEmbedding | None = None
        self.walks: tuple[int, ...] = ()
        self._sources: tuple[int, ...] = ()
        self._gives: tuple[int, ...] = ()
        if diffusion == "none":
            if similarity is not None:
                raise ValueError('similarity: expected None with diffusion="none", which reads no features')
            return
        similarity = seed if similarity is None and isinstance(seed, str) else similarity
        if similarity is None and tuple(walks or ()) != (0,):
            raise ValueError(
                "similarity: expected a backbone's name or a module that gives feature maps, since the seed "
                'is a module; walks=(0,), on the image alone, and diffusion="none" need none'
            )
        own = _channels(similarity, similarity_channels)
        self.walks = _checked_walks(walks, len(own))
        self._sources = self.walks if transitions == "hierarchical" else self.walks[-1:]
        layers = tuple(walk for walk in self._sources if walk > 0)
        if layers and isinstance(similarity, str):
            # It gives the maps that are read and no others.
            self.similarity_branch, self._gives = network(similarity, layers), layers
        elif layers and isinstance(similarity, nn.Module):
            self.similarity_branch, self._gives = similarity, tuple(range(1, len(own) + 1))
        read = [3 if walk == 0 else own[walk - 1] for walk in self._sources]
        mu, learn_mu = (0.5, True) if fixed_mu is None else (fixed_mu, False)
        beta, learn_beta = (0.5, True) if fixed_beta is None else (fixed_beta, False)
        if diffusion == "exact":
            self.cascade = gd.Diffusion(read, mu=mu, learn_mu=learn_mu, scale=affinity_scale)
        elif transitions == "last":
            self.shared = gd.FeatureEmbedding(read[0], scale=affinity_scale)
            self.cascade = gd.CascadedWalk(
                steps=len(self.walks), mu=mu, beta=beta, learn_mu=learn_mu, learn_beta=learn_beta
            )
        else:
            self.cascade = gd.CascadedWalk(
                read, mu=mu, beta=beta, learn_mu=learn_mu, learn_beta=learn_beta, scale=affinity_scale
            )

    @property
    def backbones(self) -> list[nn.Module]:
        """The networks that may start from pretrained weights."""
        return (
            [self.seed_branch]
            if self.similarity_branch is None
            else [self.seed_branch, self.similarity_branch]
        )

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the steps of the diffusion: the numbers of a cascade's walks, "exact", or none."""
        return ("exact",) if isinstance(self.cascade, gd.Diffusion) else tuple(str(t) for t in self.walks)

    @property
    def coefficients(self) -> dict[str, Tensor]:
        """µ and β of each of `steps`, under "mu" and "beta", as far as the diffusion has them."""
        if self.cascade is None:
            return {}
        own = {"mu": self.cascade.mu}
        return own | {"beta": self.cascade.beta} if isinstance(self.cascade, gd.CascadedWalk) else own

    @overload
    def forward(self, image: Tensor, return_maps: Literal[False] = False) -> Tensor: ...

    @overload
    def forward(self, image: Tensor, return_maps: Literal[True]) -> DifNetMaps: ...

    def forward(self, image: Tensor, return_maps: bool = False) -> Tensor | DifNetMaps:
        """Map images [B, 3, H, W] to logits [B, K, H, W], or to all maps on the way."""
        aside = _stream_beside(image)
        score = self._on_grid(self.seed_score(image), image)
        importance = self.importance(score)
        seed = importance * score
        walks: list[Tensor] = []
        if self.cascade is not None:
            operators = self.transitions(image) if aside is None else _within(aside, self.transitions, image)
            _, walks = self.cascade(seed, operators, return_walks=True)
        logits = upsample([seed, *walks][-1], image)
        return DifNetMaps(score, importance, seed, walks, logits) if return_maps else logits

    def beside(self, device: torch.device | str | int) -> Self:
        """Put the similarity branch and what embeds its maps on another device: the paper's model parallel.

        Both branches then run at the same time, and the other device sends ψ of every walk to where images
        and all else are. On one GPU, too, they run at the same time as far as there is room, in two streams.

        Args:
            device: such as "cuda:1". `to` brings all back to one device.

        Returns:
            This model.

        Example:
            >>> DifNet("resnet18", num_classes=21).beside("cpu").num_classes
            21
        """
        for module in (self.similarity_branch, *self._embeddings):
            if module is not None:
                module.to(device)
        return self

    def seed_score(self, image: Tensor) -> Tensor:
        """What the seed branch says of images, [B, K, h, w], at a stride of its own."""
        if self.score is not None:
            (features,) = self.seed_branch(image)
            return self.score(features)  # type: ignore[no-any-return]
        given = self.seed_branch(image)
        score = given.get("out") if isinstance(given, Mapping) else given
        if not isinstance(score, Tensor) or score.ndim != 4 or score.shape[1] != self.num_classes:
            told = list(score.shape) if isinstance(score, Tensor) else type(given).__name__
            raise ValueError(
                f"seed: expected the module to give a score [B, {self.num_classes}, h, w], or a dictionary "
                f'with one under "out", got {told}'
            )
        return score

    def similarity_features(self, image: Tensor) -> list[Tensor]:
        """The maps the transitions are made from, in the order of the walks, at sizes of their own."""
        maps = [] if self.similarity_branch is None else _maps(self.similarity_branch(image))
        if len(maps) != len(self._gives):
            raise ValueError(f"similarity: expected {len(self._gives)} maps, got {len(maps)}")
        of_walk = {0: image} | dict(zip(self._gives, maps, strict=True))
        return [of_walk[walk] for walk in self._sources]

    def transitions(self, image: Tensor) -> list[gd.Transition]:
        """The operators P_t over this image's grid, one for each of `steps`."""
        if self.cascade is None:
            return []
        grid, device = self._grid(image), next(self._embeddings[0].parameters()).device
        features = self.similarity_features(image.to(device, non_blocking=True))
        if self.shared is not None:
            return [self.shared(features[0], grid).to(image.device)] * len(self.walks)
        return [P.to(image.device) for P in self.cascade.transitions(features, grid)]

    @property
    def _embeddings(self) -> list[nn.Module]:
        """What makes transitions of the similarity branch's maps."""
        if self.shared is not None:
            return [self.shared]
        return [] if self.cascade is None else list(self.cascade.embeddings)

    def _grid(self, image: Tensor) -> tuple[int, int]:
        height, width = image.shape[-2:]
        return math.ceil(height / self.grid_stride), math.ceil(width / self.grid_stride)

    def _on_grid(self, score: Tensor, image: Tensor) -> Tensor:
        grid = self._grid(image)
        if score.shape[-2:] == grid:
            return score
        return F.interpolate(score, size=grid, mode="bilinear", align_corners=True)


def _stream_beside(image: Tensor) -> torch.cuda.Stream | None:
    """On a GPU, a stream for work that needs no more than what was begun by now; else none."""
    # Fake tensors lie on devices that need not be there.
    if image.device.type != "cuda" or not torch.cuda.is_available() or torch.compiler.is_compiling():
        return None
    stream = _stream(image.device)
    stream.wait_stream(torch.cuda.current_stream(image.device))
    return stream


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all models: memory that a stream has used is kept for that stream."""
    return torch.cuda.Stream(device=device)  # type: ignore[no-untyped-call]


def _within(
    stream: torch.cuda.Stream, transitions: Callable[[Tensor], list[gd.Transition]], image: Tensor
) -> list[gd.Transition]:
    """What is made in a stream, for which the current one then waits."""
    current = torch.cuda.current_stream(image.device)
    with torch.cuda.stream(stream):
        operators = transitions(image)
    current.wait_stream(stream)
    for operator in operators:
        for tensor in operator.tensors():
            # Its memory is not given to others of that stream before this one is done with it.
            tensor.record_stream(current)
    return operators


def _check_options(
    diffusion: str, transitions: str, fixed_mu: float | None, fixed_beta: float | None
) -> None:
    if diffusion not in ("cascade", "exact", "none"):
        raise ValueError(f'diffusion: expected "cascade", "exact" or "none", got {diffusion!r}')
    if transitions not in ("hierarchical", "last"):
        raise ValueError(f'transitions: expected "hierarchical" or "last", got {transitions!r}')
    for name, given in (("transitions", transitions == "last"), ("fixed_beta", fixed_beta is not None)):
        if given and diffusion != "cascade":
            raise ValueError(f'{name}: belongs to diffusion="cascade", got diffusion={diffusion!r}')
    if fixed_mu is not None and diffusion == "none":
        raise ValueError('fixed_mu: belongs to diffusion="cascade" or "exact", got diffusion="none"')


def _checked_walks(walks: Sequence[int] | None, maps: int) -> tuple[int, ...]:
    known = tuple(range(maps + 1))
    chosen = known if walks is None else tuple(walks)
    if not chosen or any(walk not in known for walk in chosen) or list(chosen) != sorted(set(chosen)):
        raise ValueError(f"expected walks to be distinct numbers from {known} in rising order, got {chosen}")
    return chosen


def _channels(similarity: str | nn.Module | None, given: Sequence[int] | None) -> tuple[int, ...]:
    """Channels of the maps that a similarity branch can give."""
    if isinstance(similarity, nn.Module):
        return _tried(similarity) if given is None else tuple(given)
    if given is not None:
        raise ValueError("similarity_channels: expected None unless similarity is a module")
    return () if similarity is None else channels(similarity)


def _tried(extractor: nn.Module) -> tuple[int, ...]:
    """Channels of an extractor's maps, from a dry run that leaves it as it was."""
    weight = next(extractor.parameters(), torch.empty(0))
    modes = {module: module.training for module in extractor.modules()}
    try:
        with torch.no_grad():
            maps = _maps(extractor.eval()(weight.new_zeros(1, 3, DRY_RUN, DRY_RUN)))
    except (RuntimeError, AssertionError, IndexError, AttributeError) as fault:
        raise ValueError(
            f"similarity: a dry run on {DRY_RUN}x{DRY_RUN} pixels failed "
            f"({(str(fault).splitlines() or [type(fault).__name__])[0]}); give similarity_channels"
        ) from fault
    finally:
        for module, mode in modes.items():
            module.training = mode
    return tuple(each.shape[1] for each in maps)


def _maps(given: Any) -> list[Tensor]:
    """The maps that an extractor gives as a list, a tuple or a dictionary."""
    maps = list(given.values()) if isinstance(given, Mapping) else given
    if not isinstance(maps, list | tuple) or not all(
        isinstance(each, Tensor) and each.ndim == 4 for each in maps
    ):
        raise ValueError(
            "similarity: expected the module to give a list, tuple or dictionary of maps [B, C, H, W], got "
            + (str(list(maps.shape)) if isinstance(maps, Tensor) else type(given).__name__)
        )
    return list(maps)
