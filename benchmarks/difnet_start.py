"""What slows DifNet's start: training losses of DifNet, of its parts left out, and of Sim-DeepLab.

    python benchmarks/difnet_start.py --data-path VOC --weights-backbone resnet18.pth [--steps 80]

All variants begin with the same weights where they have the same parts, see the same batches, and take the
same steps of SGD at a constant rate. Printed are mean losses over the first and the second half, and how many
of the pixels of the second half that are not background were named rightly.
"""

import argparse
import dataclasses
import platform
from importlib.metadata import version

import torch
from lightning.fabric import Fabric

from segmentation import engine
from segmentation.config import resolve
from segmentation.data import VOID
from segmentation.data.loader import Augmented, StepSampler, training_loader
from segmentation.data.transforms import training_transform
from segmentation.models.backbone import load_pretrained
from segmentation.trainer import Trainer

FOREVER = 10**9  # steps of the schedule: over a short run the rate stays what it is


def importance_from_random_weights(model):
    """What its last convolution had for weights before M was made to start near 0.9."""
    model.importance[-2].reset_parameters()


VARIANTS = [
    ("sim-deeplab", {"model": "sim-deeplab"}, ()),
    ("difnet", {}, ()),
    ("difnet, M = 1", {"importance": False}, ()),
    ("difnet, M from random weights", {}, (importance_from_random_weights,)),
    ("the same, no walks", {"diffusion": "none"}, (importance_from_random_weights,)),
    ("the same, affinity scale 1/8", {"affinity_scale": 0.125}, (importance_from_random_weights,)),
]


def started(config, changes, classes):
    """A model whose seed branch and score head begin with the same weights as everyone's."""
    torch.manual_seed(config.seed)
    same = engine.build_model(dataclasses.replace(config, model="sim-deeplab"), classes)
    fresh = [load_pretrained(same.backbone, config.backbone, config.weights_backbone)]
    if config.model == "sim-deeplab":
        return same, fresh
    model = engine.build_model(config, classes)
    fresh = [load_pretrained(b, config.backbone, config.weights_backbone) for b in model.backbones]
    model.seed_branch.load_state_dict(same.backbone.state_dict())
    model.score.load_state_dict(same.score.state_dict())
    for change in changes:
        change(model)
    return model, fresh


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--weights-backbone", required=True)
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--lr", type=float, default=0.002)
    parser.add_argument("--head-lr-mult", type=float, default=5.0)
    parser.add_argument("--precision", choices=["32", "bf16"], default="bf16")
    parser.add_argument("--threads", type=int, default=0)
    given = vars(parser.parse_args())
    steps, threads = given.pop("steps"), given.pop("threads")
    torch.set_num_threads(threads or torch.get_num_threads())
    common = given | {
        "dataset": "voc", "backbone": "resnet18", "batch_size": 8, "crop_size": 129, "channels_last": True,
        "max_steps": steps,
    }  # fmt: skip
    print(
        f"{steps} steps of 8 crops of 129 pixels from {given['train_split']}, rate {given['lr']}, fresh "
        f"parts times {given['head_lr_mult']:g}, precision {given['precision']}\n"
    )
    print("| | loss, first half | loss, second half | foreground named rightly |")
    print("| --- | ---: | ---: | ---: |")
    for name, options, changes in VARIANTS:
        config = resolve(common | options, None)
        data = engine.build_dataset(config, config.train_split)
        model, fresh = started(config, changes, len(data.classes))
        fabric = Fabric(
            accelerator="cpu",
            devices=1,
            precision="bf16-mixed" if given["precision"] == "bf16" else "32-true",
        )
        trainer = Trainer(config, model, fresh, FOREVER, fabric)
        samples = Augmented(data, training_transform(config.crop_size, config.scale), config.seed)
        epoch = len(data) // config.batch_size
        sampler = StepSampler(len(data), config.batch_size, config.seed, 0, steps, epoch, 0, 1)
        seen = {}
        model.register_forward_hook(lambda module, inputs, output, seen=seen: seen.update(logits=output))
        losses, right, all_of_them = [], 0, 0
        for step, (image, label) in enumerate(training_loader(samples, sampler, 0)):
            losses.append(trainer.step(image, label))
            if step >= steps // 2:
                thing = (label != VOID) & (label != 0)
                right += int((seen["logits"].argmax(1) == label)[thing].sum())
                all_of_them += int(thing.sum())
        half = torch.tensor(losses).split(steps // 2)
        row = f"{half[0].mean():.3f} | {torch.cat(half[1:]).mean():.3f} | {100 * right / all_of_them:.1f} %"
        print(f"| {name} | {row} |", flush=True)
    print(
        f"\nPython {platform.python_version()}, torch {version('torch')}, timm {version('timm')}, "
        f"{torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
