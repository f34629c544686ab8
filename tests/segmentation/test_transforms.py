"""Joint transforms and loaders: geometry, padding, and independence of order, workers and resuming."""

import pytest
import torch
from torchvision import tv_tensors

from segmentation.data import VOID
from segmentation.data.loader import (
    Augmented,
    Evaluated,
    StepSampler,
    evaluation_loader,
    spread,
    training_loader,
)
from segmentation.data.shapes import ShapesDataset
from segmentation.data.transforms import (
    RandomScale,
    denormalise,
    evaluation_transform,
    normalise,
    training_transform,
)


def coloured(height, width):
    """An image whose red tells its label: four quadrants."""
    label = torch.zeros(height, width, dtype=torch.int64)
    label[height // 2 :] += 1
    label[:, width // 2 :] += 2
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[0] = 80 * label
    return tv_tensors.Image(image), tv_tensors.Mask(label)


@pytest.mark.parametrize(("height", "width"), [(60, 90), (150, 40), (97, 97), (20, 20)])
def test_image_and_label_stay_together(height, width):
    transform = training_transform(65, (0.5, 1.5))
    for seed in range(8):
        torch.manual_seed(seed)
        image, label = transform(*coloured(height, width))
        assert (image.shape, label.shape) == ((3, 65, 65), (65, 65))
        assert (image.dtype, label.dtype) == (torch.float32, torch.int64)
        padding = label == VOID
        assert (image[:, padding] == 0).all()  # the channel mean
        red = denormalise(image)[0]
        agree = (red / 80).round()[~padding] == label[~padding]
        assert agree.float().mean() > 0.9  # all but blended borders


def test_scales_cover_their_range():
    torch.manual_seed(1)
    widths = [RandomScale(0.5, 1.5)(*coloured(40, 100))[0].shape[-1] for _ in range(300)]
    assert 50 <= min(widths) < 55
    assert 145 < max(widths) <= 150
    assert len(set(widths)) > 80  # not a handful of steps


def test_flips_happen_one_time_in_two():
    transform = training_transform(40, (1.0, 1.0))
    torch.manual_seed(1)
    flipped = [int(transform(*coloured(40, 40))[1][0, 0] == 2) for _ in range(200)]
    assert 70 < sum(flipped) < 130


def test_every_crop_can_be_drawn():
    image = tv_tensors.Image(torch.zeros(3, 8, 8, dtype=torch.uint8))
    label = tv_tensors.Mask(torch.arange(64).view(8, 8))
    transform = training_transform(5, (1.0, 1.0))
    torch.manual_seed(1)
    corners = {int(transform(image, label)[1].min()) for _ in range(400)}
    assert corners == {8 * row + column for row in range(4) for column in range(4)}


@pytest.mark.parametrize(
    ("size", "padded"),
    [
        ((97, 41), (505, 505)),
        ((505, 505), (505, 505)),
        ((506, 300), (513, 505)),
        ((600, 1001), (601, 1001)),
    ],
)
def test_scored_images_are_padded_right_and_below(size, padded):
    image = tv_tensors.Image(torch.randint(0, 256, (3, *size), dtype=torch.uint8))
    result = evaluation_transform(image, 505)
    assert result.shape == (3, *padded)
    torch.testing.assert_close(result[:, : size[0], : size[1]], normalise()(image).as_subclass(torch.Tensor))
    assert not result[:, size[0] :].any()
    assert not result[:, :, size[1] :].any()


def test_denormalise_undoes_normalise():
    image = tv_tensors.Image(torch.arange(256, dtype=torch.uint8).expand(3, 4, 256))
    assert torch.equal(denormalise(normalise()(image)), image)


def samples(seed=0):
    return Augmented(ShapesDataset("train"), training_transform(33, (0.5, 1.5)), seed)


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    one = samples()[2, 7]
    torch.manual_seed(99)
    stream = torch.get_rng_state()
    augmented = samples()
    augmented[2, 8]
    for a, b in zip(one, augmented[2, 7], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), stream)
    assert not torch.equal(one[0], samples()[3, 7][0])
    assert not torch.equal(one[0], samples(seed=1)[2, 7][0])


def test_an_epoch_is_a_permutation_and_leftovers_are_dropped():
    batches = list(StepSampler(11, 4, seed=3, first_step=0, last_step=6))
    assert [len(batch) for batch in batches] == 6 * [4]
    assert [{epoch for epoch, _ in batch} for batch in batches] == [{0}, {0}, {1}, {1}, {2}, {2}]
    for epoch in range(3):
        indices = [index for batch in batches for e, index in batch if e == epoch]
        assert len(set(indices)) == 8
        assert set(indices) <= set(range(11))
    assert batches[0] != [(0, index) for _, index in batches[2]]


def test_a_resumed_sampler_goes_on_where_the_first_stopped():
    whole = list(StepSampler(11, 4, seed=3, first_step=0, last_step=9))
    for step in range(9):
        assert list(StepSampler(11, 4, seed=3, first_step=step, last_step=9)) == whole[step:]
    assert whole != list(StepSampler(11, 4, seed=4, first_step=0, last_step=9))


def test_workers_do_not_change_the_batches():
    sampler = StepSampler(40, 2, seed=3, first_step=19, last_step=22)
    alone, helped = (list(training_loader(samples(), sampler, workers)) for workers in (0, 1))
    assert len(alone) == 3
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_a_limited_evaluation_is_spread_over_the_split():
    assert spread(100, 5) == [0, 25, 50, 74, 99]
    assert spread(3, 5) == [0, 1, 2]
    loaded = list(evaluation_loader(Evaluated(ShapesDataset("val")), 0, limit=2))
    assert len(loaded) == 2
    assert torch.equal(loaded[1][1][0], ShapesDataset("val")[95][1])
