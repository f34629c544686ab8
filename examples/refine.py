"""A learned cascade, and an exact diffusion, on top of somebody else's network.

    y = CascadedWalk(score, features)    or    y = Diffusion(score, features)

The network's score is the seed; similarities come from the image and the network's own features. Networks:
torchvision's LR-ASPP, or timm's ResNet-18 up to stage 3 with a 1×1 convolution for a head, both untrained.
The data are generated, `segmentation.data.shapes`: images of 65 × 65 pixels with six classes.

First the network is trained alone. Then the new layers are, on scores and features kept from the network as
it is; at last everything together, beside a copy without new layers. mIoU is that of validation images.

    python examples/refine.py --network timm --steps 300 --more-steps 150

Needs the extra [segmentation]. About a minute on one core, far too short to judge what is best in the end.
"""

import argparse
import copy

import torch
from torch import nn

import graphdiff as gd
from segmentation.data.shapes import ShapesDataset
from segmentation.data.transforms import normalise
from segmentation.metrics import ConfusionMatrix


class TorchvisionNet(nn.Module):
    """LR-ASPP; `forward` gives its score at stride 8, and what to take similarities from."""

    channels = (3, 40, 960)

    def __init__(self, classes):
        from torchvision.models.segmentation import lraspp_mobilenet_v3_large

        super().__init__()
        self.net = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=classes)
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # its 0.01 is for long training

    def forward(self, image):
        features = self.net.backbone(image)
        return self.net.classifier(features), [image, features["low"], features["high"]]


class TimmNet(nn.Module):
    """Any of timm's backbones that can be given output stride 8, with the smallest of heads."""

    def __init__(self, classes, name="resnet18"):
        import timm

        super().__init__()
        self.backbone = timm.create_model(name, features_only=True, output_stride=8, out_indices=(1, 2, 3))
        counts = self.backbone.feature_info.channels()
        self.channels = (3, *counts)
        self.head = nn.Conv2d(counts[-1], classes, 1)

    def forward(self, image):
        maps = self.backbone(image)
        return self.head(maps[-1]), [image, *maps]


class Refined(nn.Module):
    """A network, and a `CascadedWalk` or `Diffusion` that refines its score; None leaves it as it is."""

    def __init__(self, network, refine=None):
        super().__init__()
        self.network, self.refine = network, refine

    def forward(self, image):
        return self.answer(*self.network(image), image.shape[-2:])

    def answer(self, score, features, size):
        y = score if self.refine is None else self.refine(score, features)
        return nn.functional.interpolate(y, size, mode="bilinear", align_corners=True)


def batches(dataset, first, count):
    """Batches of eight images with their labels, from image number `first` on."""
    for start in range(first, first + 8 * count, 8):
        pairs = [normalise()(*dataset[i]) for i in range(start, start + 8)]
        images, labels = (torch.stack(x).as_subclass(torch.Tensor) for x in zip(*pairs, strict=True))
        yield (images,), labels


def train(rates, answer, data, steps):
    """A step of AdamW a batch, with the first learning rate of each module; the mean loss of the last ten."""
    optimizer = torch.optim.AdamW([{"params": part.parameters(), "lr": lr} for part, lr in rates])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for inputs, labels in data:
        loss = nn.functional.cross_entropy(answer(*inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:])


@torch.no_grad()
def miou(model, data):
    """Over the pixels of all batches, in percent."""
    model.eval()
    matrix = ConfusionMatrix(len(ShapesDataset.classes), torch.device("cpu"))
    for inputs, labels in data:
        matrix.update(model(*inputs).argmax(1), labels)
    return 100 * matrix.compute().miou


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=("torchvision", "timm"), default="torchvision")
    parser.add_argument("--steps", type=int, default=150, help="training steps of the network alone")
    parser.add_argument("--more-steps", type=int, default=60, help="steps of each copy, twice if refined")
    parser.add_argument("--images", type=int, default=48, help="validation images, eights of 96")
    parser.add_argument("--lr", type=float, default=2e-3, help="first learning rate of the network")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    steps, more, lr = options.steps, options.more_steps, options.lr
    training, validation = (ShapesDataset(split, size=65) for split in ("train", "val"))
    network = (TorchvisionNet if options.network == "torchvision" else TimmNet)(len(training.classes))
    print(f"{options.network}: {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters")
    print("                new layers alone      everything\n" + " " * 14 + "    loss  mIoU, %" * 2)
    scored, model = list(batches(validation, 0, max(options.images // 8, 1))), Refined(network)
    loss = train([(network, lr)], model, batches(training, 0, steps), steps)
    print(f"before{'':25}{loss:8.3f} {miou(model, scored):8.2f}", flush=True)
    data = list(batches(training, 8 * steps, more))
    with torch.no_grad():  # `miou` has put the network into its eval mode
        kept = [((*network(*images), labels.shape[-2:]), labels) for images, labels in data]
    features = {"feature_channels": network.channels, "embedding_channels": 32, "scale": 1 / 32**0.5}
    for name, kind in (("alone", None), ("CascadedWalk", gd.CascadedWalk), ("Diffusion", gd.Diffusion)):
        model = Refined(copy.deepcopy(network), kind and kind(**features))
        rates, first = [(model.network, lr / 2)], " " * 17
        if kind is not None:
            loss = train([(model.refine, 5 * lr)], model.answer, kept, more)
            first = f"{loss:8.3f} {miou(model, scored):8.2f}"
            rates.append((model.refine, 1.5 * lr))
        loss = train(rates, model.train(), data, more)
        print(f"{name:<14}{first}{loss:8.3f} {miou(model, scored):8.2f}", flush=True)


if __name__ == "__main__":
    main()
