"""A learned cascade, and an exact diffusion, on top of somebody else's network.

    y = CascadedWalk(score, features)    or    y = Diffusion(score, features)

The network's score is the seed; similarities come from the image and the network's own features. Networks:
torchvision's LR-ASPP, or timm's ResNet-18 with a 1×1 convolution as its head; weights start at random. The
data are generated, `segmentation.data.shapes`: images of 97 × 97 pixels with six classes.

The network is trained alone; mIoU on validation images is "before". From there three copies go on for equally
many steps: alone, with a cascade, with an exact diffusion: "after".

    python examples/refine.py
    python examples/refine.py --network timm --steps 300 --more-steps 150

Needs graphdiff[segmentation]. Takes about two minutes: far too short to judge which is best in the end.
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
        self.backbone = timm.create_model(name, features_only=True, output_stride=8, out_indices=(1, 2, 3, 4))
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
        score, features = self.network(image)
        y = score if self.refine is None else self.refine(score, features)
        return nn.functional.interpolate(y, image.shape[-2:], mode="bilinear", align_corners=True)


def batch(dataset, indices):
    pairs = [normalise()(*dataset[i]) for i in indices]
    images, labels = zip(*pairs, strict=True)
    return torch.stack(images).as_subclass(torch.Tensor), torch.stack(labels).as_subclass(torch.Tensor)


def train(model, dataset, steps, first, lr):
    """`steps` batches of eight images from number `first` on; the mean loss of the last ten."""
    new = [] if model.refine is None else list(model.refine.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": model.network.parameters()}, {"params": new, "lr": 3 * lr}], lr=lr
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    losses = []
    for step in range(steps):
        images, labels = batch(dataset, range(first + 8 * step, first + 8 * step + 8))
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:])


@torch.no_grad()
def miou(model, dataset, count):
    """Over the pixels of `count` images, in percent."""
    model.eval()
    matrix = ConfusionMatrix(len(dataset.classes), torch.device("cpu"))
    for start in range(0, count, 8):
        images, labels = batch(dataset, range(start, min(start + 8, count)))
        matrix.update(model(images).argmax(1), labels)
    return 100 * matrix.compute().miou


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=("torchvision", "timm"), default="torchvision")
    parser.add_argument("--steps", type=int, default=150, help="training steps of the network alone")
    parser.add_argument("--more-steps", type=int, default=75, help="training steps of each copy")
    parser.add_argument("--images", type=int, default=48, help="validation images, of 96")
    parser.add_argument("--lr", type=float, default=2e-3, help="first learning rate, of AdamW")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    training, validation = ShapesDataset("train"), ShapesDataset("val")
    classes = len(training.classes)
    network = TorchvisionNet(classes) if options.network == "torchvision" else TimmNet(classes)
    print(f"{options.network}: {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters")
    print("                       loss     mIoU, %   parameters more")
    loss = train(Refined(network), training, options.steps, 0, options.lr)
    before = miou(Refined(network), validation, options.images)
    print(f"before             {loss:8.3f}  {before:10.2f}", flush=True)
    features = {"feature_channels": network.channels, "embedding_channels": 32, "scale": 1 / 32**0.5}
    cascade, exact = gd.CascadedWalk(**features), gd.Diffusion(**features)
    for name, refine in (("alone", None), ("CascadedWalk", cascade), ("Diffusion", exact)):
        model = Refined(copy.deepcopy(network), refine)
        loss = train(model, training, options.more_steps, 8 * options.steps, options.lr / 2)
        after = miou(model, validation, options.images)
        more = 0 if refine is None else sum(p.numel() for p in refine.parameters())
        print(f"after, {name:<12}{loss:8.3f}  {after:10.2f}   {more:15d}", flush=True)


if __name__ == "__main__":
    main()
