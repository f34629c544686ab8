"""Which images a step sees and how they reach the model: pure functions of the seed and the step.

A run that is stopped and resumed, or that uses another number of workers, sees the same batches.
"""

import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision.transforms import v2

from segmentation.data import SegmentationDataset
from segmentation.data.transforms import evaluation_transform


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The batches of steps first_step, ..., last_step - 1, as lists of (epoch, index).

    Each epoch is a permutation of the images drawn from (seed, epoch); images left over at its end, too few
    for a batch or beyond `steps_per_epoch`, are dropped. Where several processes share a batch, each takes
    every so manyth image of it.

    Args:
        images: number of images in the split, at least batch_size.
        batch_size: images in a batch, of all processes together.
        seed: of the permutations.
        first_step: steps done before.
        last_step: steps done after.
        steps_per_epoch: batches of an epoch; as many as there are if None.
        rank: this process's number.
        ranks: how many processes there are.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        first_step: int,
        last_step: int,
        steps_per_epoch: int | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.steps = range(first_step, last_step)
        self.steps_per_epoch = steps_per_epoch or images // batch_size
        self.part = slice(rank, None, ranks)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        drawn = -1
        for step in self.steps:
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != drawn:
                drawn, order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.images)
            chosen = order[position * self.batch_size : (position + 1) * self.batch_size]
            yield [(epoch, int(index)) for index in chosen[self.part]]


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Training samples by (epoch, index): image float [3, crop, crop], label int64 [crop, crop].

    Each sample is transformed with random numbers drawn from (seed, epoch, index) alone, and leaves torch's
    own stream of random numbers as it found it.
    """

    def __init__(self, dataset: SegmentationDataset, transform: v2.Transform, seed: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):
            # The CPU generator only: torch.manual_seed would reseed the accelerators too, which nothing
            # restores.
            torch.default_generator.manual_seed(_derived_seed(self.seed, epoch, index))
            image, label = self.transform(*self.dataset[index])
        return image.as_subclass(Tensor), label.as_subclass(Tensor)


class Evaluated(Dataset[tuple[Tensor, Tensor]]):
    """Samples for scoring: image normalised and padded, [3, H', W']; label int64 at its own size, [H, W]."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.dataset[index]
        return evaluation_transform(image, self.dataset.eval_size), label.as_subclass(Tensor)


def training_loader(
    samples: Augmented, sampler: StepSampler, workers: int
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Load batches: image float [B, 3, crop, crop], label int64 [B, crop, crop]."""
    return DataLoader(
        samples,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_parent,
        generator=_own_generator(),
    )


def evaluation_loader(
    samples: Evaluated, workers: int, limit: int | None = None, rank: int = 0, ranks: int = 1
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Load one image at a time, for images differ in size and must not differ by their batch mates.

    With a limit, that many images spread evenly over the split. Where several processes share them, each
    takes every so manyth, none twice.
    """
    images = spread(len(samples), len(samples) if limit is None else limit)
    return DataLoader(
        Subset(samples, images[rank::ranks]),
        batch_size=1,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_parent,
        generator=_own_generator(),
    )


def spread(images: int, limit: int) -> list[int]:
    """Up to `limit` indices of a split, evenly spread over it: neighbours are often alike."""
    indices: list[int] = np.linspace(0, images - 1, min(images, limit)).round().astype(int).tolist()
    return indices


def _derived_seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def _own_generator() -> torch.Generator:
    # A loader draws a seed when it starts; from torch's own stream that would make what follows depend on how
    # often a run was resumed.
    return torch.Generator().manual_seed(0)


def _leave_signals_to_the_parent(_worker: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the training process ends its step first
    # and then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
