"""Where the time of DifNet goes, and what a step of training takes; prints Markdown tables.

Networks with random weights on random images: times do not depend on either. Parts are those of
`python -m segmentation.figures timing`. The plain way is the same network whose cascade builds its matrices.
Peak memory is that of a process of its own above what the network and its images take.

    python benchmarks/network.py [--size 505] [--crop 321] [--batch 2] [--backbone resnet50]
"""

import argparse
from functools import partial
from unittest import mock

import torch
from attention import plain_cascade
from measure import environment, forget_peak, head, in_process, in_turn, peak, row
from torch import nn
from torch.nn import functional as F

from segmentation.models import DifNet, SimDeepLab, difnet
from segmentation.timing import seconds_by_part

CLASSES = 21


class PlainCascade(nn.Module):
    """A cascade as one writes it with matrices, on the modules of ours."""

    def __init__(self, cascade):
        super().__init__()
        self.embeddings, self.steps = cascade.embeddings, cascade.steps

    def transitions(self, features, grid):
        return [embed(x, grid) for embed, x in zip(self.embeddings, features, strict=True)]

    def forward(self, seed, walks, return_walks=True):
        y = plain_cascade(self.steps, [P.psi for P in walks], seed)
        return y, [y]


def network(name, backbone):
    torch.manual_seed(0)
    if name == "sim-deeplab":
        return SimDeepLab(backbone, CLASSES)
    model = DifNet(backbone, CLASSES)
    if name == "plain":
        model.cascade = PlainCascade(model.cascade)
    return model


class Step:
    """One step of training: forward, loss, backward, the weights moved."""

    def __init__(
        self, model, batch, crop, bf16=False, channels_last=False, compiled=False, beside=None, device="cpu"
    ):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=layout).train()
        if beside is not None:
            self.model.beside(beside)
        self.run = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6)
        self.image = torch.randn(batch, 3, crop, crop, device=device).to(memory_format=layout)
        self.label = torch.randint(CLASSES, (batch, crop, crop), device=device)
        self.bf16, self.device = bf16, device

    def __call__(self):
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            logits = self.run(self.image)
        F.cross_entropy(logits.float(), self.label).backward()
        self.optimizer.step()


def own_peak(name, backbone, batch, crop, device):
    step = Step(network(name, backbone), batch, crop, device=device)
    small = Step(network(name, backbone), 2, 33, device=device)
    small()
    del small
    before = forget_peak()
    step()
    return peak() - before


def graph_breaks(model, size):
    explained = torch._dynamo.explain(model)(torch.randn(1, 3, size, size))
    torch._dynamo.reset()
    return explained.graph_break_count


def side_by_side(backbone, shape, rounds):
    """The branches one after the other, in two streams of a GPU, and on two GPUs where there are two."""
    step = Step(network("difnet", backbone), *shape, device="cuda")

    def one_after_the_other():
        with mock.patch.object(difnet, "_stream_beside", return_value=None):
            step()

    ways = {"one after the other": one_after_the_other, "in two streams": step}
    if torch.cuda.device_count() > 1:
        ways["on two GPUs"] = Step(network("difnet", backbone), *shape, beside="cuda:1", device="cuda")
    head("branches", "s", "times faster")
    for name, (taken, ratio) in in_turn(ways, rounds).items():
        row(name, f"{taken:.3f}", f"{ratio:.2f}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=505)
    parser.add_argument("--crop", type=int, default=321)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--baseline", default="resnet101")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-of", choices=["difnet", "plain", "sim-deeplab"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.memory_of:
        print(own_peak(options.memory_of, options.backbone, options.batch, options.crop, device))
        return
    print(f"{environment()}.\n")
    models = {
        f"DifNet, {options.backbone}": network("difnet", options.backbone).to(device).eval(),
        f"Sim-DeepLab, {options.baseline}": network("sim-deeplab", options.baseline).to(device).eval(),
    }
    image = torch.randn(1, 3, options.size, options.size, device=device)
    print(
        f"A forward pass at {options.size} × {options.size}, batch 1, float32; medians of {options.rounds}:\n"
    )
    head("network", "part", "s", "share", numbers=(2, 3))
    for name, parts in seconds_by_part(models, image, options.rounds).items():
        whole = sum(parts.values())
        for part, taken in parts.items():
            row(
                name,
                part,
                f"{sorted(taken)[len(taken) // 2]:.3f}",
                f"{sorted(taken / whole)[len(taken) // 2]:.1%}",
            )
        row(name, "all", f"{sorted(whole)[len(whole) // 2]:.3f}", "")
    del models

    shape = (options.batch, options.crop)
    if device == "cuda":
        print("\nThe branches of DifNet, a step of training at batch and crop as below:\n")
        side_by_side(options.backbone, shape, options.rounds)
    print(f"\nA step of training, batch {options.batch}, crop {options.crop}, float32:\n")
    head("network", "s", "over Sim-DeepLab", "peak memory, MB")
    steps = {
        "sim-deeplab": Step(network("sim-deeplab", options.baseline), *shape, device=device),
        "difnet": Step(network("difnet", options.backbone), *shape, device=device),
        "plain": Step(network("plain", options.backbone), *shape, device=device),
    }
    titles = {
        "sim-deeplab": f"Sim-DeepLab, {options.baseline}",
        "difnet": f"DifNet, {options.backbone}",
        "plain": f"DifNet, {options.backbone}, the plain way",
    }
    found = in_turn(steps, options.rounds)
    del steps
    for name, (taken, ratio) in found.items():
        backbone = options.baseline if name == "sim-deeplab" else options.backbone
        given = ("--backbone", backbone, "--batch", options.batch, "--crop", options.crop)
        used = in_process("network.py", "--memory-of", name, *given) / 1e6
        row(titles[name], f"{taken:.2f}", f"{1 / ratio:.2f}", f"{used:.0f}")

    print(f"\nWhat options bring to a step of DifNet, {options.backbone}, at the same batch and crop:\n")
    ways = {
        "float32": {},
        "channels-last": {"channels_last": True},
        "bf16": {"bf16": True},
        "channels-last, bf16": {"channels_last": True, "bf16": True},
        "compiled": {"compiled": True},
        "compiled, channels-last, bf16": {"compiled": True, "channels_last": True, "bf16": True},
    }
    make = partial(network, "difnet", options.backbone)
    found = in_turn(
        {name: Step(make(), *shape, device=device, **way) for name, way in ways.items()}, options.rounds
    )
    head("options", "s", "times faster")
    for name, (taken, ratio) in found.items():
        row(name, f"{taken:.2f}", f"{ratio:.2f}")
    print(f"\nGraph breaks in DifNet's forward under torch.compile: {graph_breaks(make().eval(), 129)}.")


if __name__ == "__main__":
    main()
