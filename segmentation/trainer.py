"""A model in training: its weights and their average, its optimiser, its schedule; one step of them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from segmentation import engine, processes
from segmentation.config import Config
from segmentation.data import VOID
from segmentation.engine import Model
from segmentation.models import MultiScale


class Trainer:
    """What a step changes, all of which `state` holds.

    Args:
        config: of the run.
        model: holds the weights to start from.
        fresh_parts: of each of its backbones, the parts that do not start from pretrained weights.
        total: steps of the whole run.
        fabric: brings device, precision and the other processes.
    """

    def __init__(
        self, config: Config, model: Model, fresh_parts: Sequence[frozenset[str]], total: int, fabric: Fabric
    ) -> None:
        self.config = config
        self.model = model
        self._fabric = fabric
        self._layout = torch.channels_last if config.channels_last else torch.contiguous_format
        if config.bn == "sync":
            nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        self._frozen = _pretrained_norms(model, fresh_parts) if config.bn == "frozen" else []
        for norm in self._frozen:
            norm.requires_grad_(False)
        model.to(fabric.device, memory_format=self._layout)  # type: ignore[call-overload] # no tensor is given
        self.average = None
        if config.ema_decay:
            rule = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(model, multi_avg_fn=rule, use_buffers=True)
        groups = engine.parameter_groups(model, fresh_parts, config)
        self._sgd = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
        self.schedule = torch.optim.lr_scheduler.PolynomialLR(self._sgd, total, config.power)
        seen: nn.Module = MultiScale(model) if config.msc else model
        network = torch.compile(seen) if config.compile else seen
        self._network, self._optimizer = fabric.setup(network, self._sgd)

    @property
    def scored(self) -> Model:
        """What is scored, saved and drawn: the average where there is one."""
        return self.model if self.average is None else self.average.module  # type: ignore[return-value]

    @property
    def lr(self) -> float:
        """The base rate of the step to come."""
        return float(self.schedule.get_last_lr()[0])

    def step(self, image: Tensor, label: Tensor) -> float:
        """Learn from this process's part of a batch; return the loss over the whole batch.

        The loss is the mean over the pixels of all pieces in all processes, so that how a batch is cut
        changes it by no more than rounding; with msc it is the sum of those of the scales and of their
        maximum. A loss that is not finite changes no weight.

        Args:
            image: [B, 3, H, W], B a multiple of the config's grad_accum_steps.
            label: [B, H, W].
        """
        self._network.train()
        for norm in self._frozen:
            norm.eval()
        device, pieces = self._fabric.device, self.config.grad_accum_steps
        image = image.to(device, non_blocking=True).contiguous(memory_format=self._layout)
        label = label.to(device, non_blocking=True)
        pixels = processes.total((label != VOID).sum()).clamp(min=1)
        loss = torch.zeros((), device=device)
        for number, (x, y) in enumerate(zip(image.chunk(pieces), label.chunk(pieces), strict=True), start=1):
            with self._fabric.no_backward_sync(self._network, enabled=number < pieces):
                outputs = self._network(x) if self.config.msc else [self._network(x)]
                part = torch.stack([engine.summed_loss(logits, y) for logits in outputs]).sum() / pixels
                # The processes' gradients are averaged, and shall be summed.
                self._fabric.backward(part * processes.count())
            loss += part.detach()
        value = float(processes.total(loss))
        if math.isfinite(value):
            self._optimizer.step()
            self.schedule.step()
            if self.average is not None:
                self.average.update_parameters(self.model)
        self._optimizer.zero_grad()
        return value

    def settle(self) -> None:
        """Give every process the first one's statistics of batch norm, before they score together."""
        processes.take_from_first(self.scored.buffers())

    def state(self) -> dict[str, Any]:
        """All that a step changes, random numbers included."""
        on_gpu = self._fabric.device.type == "cuda"
        return {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self._sgd.state_dict(),
            "schedule": self.schedule.state_dict(),
            "precision": self._fabric.strategy.precision.state_dict(),
            "random": torch.get_rng_state(),
            "random_gpu": torch.cuda.get_rng_state() if on_gpu else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self._sgd.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self._fabric.strategy.precision.load_state_dict(state["precision"])
        torch.set_rng_state(state["random"])
        if state["random_gpu"] is not None and self._fabric.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_gpu"])


def _pretrained_norms(model: Model, fresh_parts: Sequence[frozenset[str]]) -> list[nn.Module]:
    return [
        module
        for backbone, fresh in zip(model.backbones, fresh_parts, strict=True)
        for name, module in backbone.named_modules()
        if isinstance(module, _BatchNorm) and name.split(".")[0] not in fresh
    ]
