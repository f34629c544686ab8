"""Train DifNet or Sim-DeepLab: `python -m segmentation.train`.

Without arguments: DifNet-18 on the built-in shapes, for some minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Annotated

import typer

from segmentation.config import Config, with_config_options
from segmentation.errors import UsageError, told_in_one_line

if TYPE_CHECKING:
    from segmentation.data import SegmentationDataset
    from segmentation.engine import Model
    from segmentation.metrics import Scores
    from segmentation.rundir import RunDir

SANITY_IMAGES = 2
"""Scored before the first step: faults of labels or of memory show in seconds, not after the first epoch."""

HEALTH_IMAGES = 4
"""Validation images over which the walks' diagonals and columns are averaged."""

PANEL_IMAGES = 6
"""Validation images drawn at the end."""


def train(config: Config, resume: str | None = None, overwrite: bool = False) -> int:
    """Run a training as the config says, from its beginning or from a saved state.

    Args:
        config: of the run.
        resume: a state file, or "auto" for the one in the run's folder if there is one.
        overwrite: replace a run in the folder.

    Returns:
        0, or the number of the signal that ended the run early.

    Raises:
        UsageError: what was asked for cannot be done, or the loss is no longer finite.
    """
    # These take seconds to import; --help and a mistyped flag do not wait for them.
    import torch
    from lightning.fabric import Fabric

    from segmentation import checkpoint, engine, figures
    from segmentation.data import loader
    from segmentation.data.transforms import training_transform
    from segmentation.models import DifNet
    from segmentation.models.backbone import load_pretrained
    from segmentation.progress import Progress, StopSignal
    from segmentation.rundir import RunDir, environment, weights_sha256

    # All that can be refused is refused before the first file is written.
    run = RunDir(config.run_dir)
    state_file = run.state_to_resume(resume, overwrite)
    state = None if state_file is None else checkpoint.load_state(state_file)
    device = engine.pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    training_set = engine.build_dataset(config, config.train_split)
    validation_set = engine.build_dataset(config, config.val_split)
    classes = training_set.classes
    if state is not None and state_file is not None:
        checkpoint.check_same_run(state, config, classes, state_file)
    total = engine.total_steps(config, len(training_set))

    torch.manual_seed(config.seed)
    model = engine.build_model(config, len(classes))
    if state is None:
        fresh_parts = load_pretrained(model.backbones, config.backbone, config.weights_backbone)
        weights_hash = weights_sha256(config)
    else:
        # The file may be gone by now, and is not needed.
        fresh_parts, weights_hash = frozenset(state["fresh_parts"]), state["weights_sha256"]
    model.to(device)
    groups = engine.parameter_groups(model, fresh_parts, config)
    optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total, config.power)
    at = engine.Position()
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        at = engine.Position(**state["at"])
        at.evaluation_due |= at.step == total

    fabric = Fabric(accelerator=device.type, devices=1)
    network, optimizer = fabric.setup(model, optimizer)
    samples = loader.Augmented(training_set, training_transform(config.crop_size, config.scale), config.seed)
    sampler = loader.StepSampler(len(training_set), config.batch_size, config.seed, at.step, total)
    batches = iter(fabric.setup_dataloaders(loader.training_loader(samples, sampler, config.workers)))
    scored = loader.Evaluated(validation_set)
    validation = loader.evaluation_loader(scored, config.workers, config.limit_val_batches)
    few = loader.evaluation_loader(scored, 0, HEALTH_IMAGES)

    facts = environment(config, str(device), torch.get_num_threads(), weights_hash)
    run.start(config, facts, at.step, at.evaluation_due)
    progress = Progress(total, at.step, config.log_every)
    for line in _introduction(config, model, fresh_parts, training_set, validation_set, total, str(device)):
        progress.say(line)
    if state is not None:
        progress.say(f"going on after step {at.step} of {total}, from {state_file}")

    def save_state() -> None:
        checkpoint.save_state(
            run.state,
            {
                "config": config.as_dict(),
                "classes": list(classes),
                "fresh_parts": sorted(fresh_parts),
                "weights_sha256": weights_hash,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "random": torch.get_rng_state(),
                "at": dataclasses.asdict(at),
            },
        )

    def record(scores: Scores, speed: float) -> None:
        epoch = at.step / (len(training_set) // config.batch_size)
        row = engine.metrics_row(at, epoch, float(schedule.get_last_lr()[0]), speed, scores)
        if isinstance(model, DifNet):
            row.update(engine.walk_columns(model, few))
        run.log(row, scores, classes)
        about = checkpoint.Description(config, classes, at.step, scores.miou)
        if scores.miou > at.best_miou or not run.best.is_file():
            at.best_miou = scores.miou
            checkpoint.save_weights(run.best, model, about)
        checkpoint.save_weights(run.last, model, about)
        progress.scored(at.step, row["loss"], scores.miou, scores.majority_miou)
        at.evaluation_due, at.loss_sum, at.loss_steps = False, 0.0, 0
        # Last of all: only now does a resumed run start from here.
        save_state()

    scores: Scores | None = None
    steps, seconds = 0, 0.0
    with StopSignal() as stop:
        engine.evaluate(model, loader.evaluation_loader(scored, 0, SANITY_IMAGES), len(classes))
        while True:
            if at.evaluation_due:
                scores = engine.evaluate(model, validation, len(classes), lambda: stop.received is not None)
                if scores is None:
                    break
                record(scores, config.batch_size * steps / seconds if steps else math.nan)
                steps, seconds = 0, 0.0
            if at.step == total or stop.received is not None:
                break
            started = time.perf_counter()
            image, label = next(batches)
            loss = engine.segmentation_loss(network(image), label)
            if not math.isfinite(loss.item()):
                left = (
                    f"{run.state} holds an earlier step" if run.state.is_file() else "no step was saved yet"
                )
                raise UsageError(f"the loss is {loss.item()} at step {at.step + 1}: lower --lr; {left}")
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            schedule.step()
            at.step += 1
            at.loss_sum += loss.item()
            at.loss_steps += 1
            at.evaluation_due = at.step % config.eval_every == 0 or at.step == total
            steps += 1
            seconds += time.perf_counter() - started
            lr = float(schedule.get_last_lr()[0])
            progress.step(at.step, loss.item(), lr, config.batch_size * steps / seconds, seconds / steps)
    progress.close()

    if stop.received is not None:
        save_state()
        print(
            f"stopped by {stop.received.name} after step {at.step} of {total}; to go on: "
            f"python -m segmentation.train --config {run.config} --resume auto"
        )
        return stop.received
    assert scores is not None  # the last step is always scored
    chosen = loader.spread(len(validation_set), PANEL_IMAGES)
    figures.panel(model, validation_set, chosen, run.panel)
    _report(config, model, scores, at.best_miou, classes, run)
    return 0


def _introduction(
    config: Config,
    model: Model,
    fresh_parts: frozenset[str],
    training_set: SegmentationDataset,
    validation_set: SegmentationDataset,
    total: int,
    device: str,
) -> list[str]:
    """What is about to be done, in a few lines."""
    from segmentation.models.backbone import PARTS

    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    fresh = [part for part in PARTS if part in fresh_parts]
    if fresh == list(PARTS):
        start = "all parts of the backbone start fresh (random weights)"
    elif fresh:
        start = f"{config.weights_backbone} covers the backbone only in part: {', '.join(fresh)} starts fresh"
    else:
        start = f"the backbone starts from {config.weights_backbone}"
    lines = [
        f"{config.model} on {config.backbone}, {millions:.2f} M parameters, {len(training_set.classes)} "
        f"classes; {start}",
        f"{config.dataset}: {len(training_set)} images to train on ({config.train_split}), "
        f"{len(validation_set)} to score ({config.val_split}); {total} steps of {config.batch_size} on "
        f"{device}",
    ]
    training_names = {training_set.name(index) for index in range(len(training_set))}
    shared = sum(validation_set.name(index) in training_names for index in range(len(validation_set)))
    if shared:
        lines.append(
            f"warning: {shared} images are in both {config.train_split!r} and {config.val_split!r}: "
            "the score says little about new images"
        )
    return lines


def _report(
    config: Config, model: Model, scores: Scores, best_miou: float, classes: tuple[str, ...], run: RunDir
) -> None:
    """The end of a run: its scores, µ_t and β_t, and where everything lies."""
    from segmentation.models import DifNet

    print()
    if config.limit_val_batches is not None:
        print(f"on {config.limit_val_batches} images of {config.val_split!r}, spread evenly:")
    print(scores.table(classes))
    print(
        f"mIoU {100 * scores.miou:.2f} after the last step (best {100 * best_miou:.2f}), "
        f"{scores.miou / scores.majority_miou:.1f} times the {100 * scores.majority_miou:.2f} of the "
        "majority class"
    )
    if isinstance(model, DifNet):
        mu, beta = model.cascade.mu.detach(), model.cascade.beta.detach()
        moved = max(float((mu - 0.5).abs().max()), float((beta - 0.5).abs().max()))
        print()
        print("walk" + "".join(f"{walk:8d}" for walk in model.walks))
        print("µ   " + "".join(f"{float(value):8.4f}" for value in mu))
        print("β   " + "".join(f"{float(value):8.4f}" for value in beta))
        if moved < 0.05:
            print(f"(all start at 0.5; a run as short as this hardly moves them, here by up to {moved:.4f})")
    print()
    for file in run.files():
        print(f"wrote {file}")


@with_config_options
def main(
    config: Config,
    *,
    resume: Annotated[
        str | None,
        typer.Option(
            help="State file (last.ckpt) to go on from, or 'auto' for the one in the run's folder, if any."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the folder; other files stay.")
    ] = False,
) -> None:
    """Train DifNet or Sim-DeepLab, score it and draw it.

    Without options: DifNet-18 on generated shapes, for some minutes on two cores.
    """
    signal_number = train(config, resume, overwrite)
    if signal_number:
        raise typer.Exit(128 + signal_number)


def run_command_line() -> None:
    """Parse the arguments and run; faults of the user end in one line and exit code 2."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(main)
    with told_in_one_line():
        app()


if __name__ == "__main__":
    run_command_line()
