"""Train DifNet or Sim-DeepLab: `python -m segmentation.train`.

Without arguments: DifNet-18 on the built-in shapes, for some minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from segmentation.config import Config, with_config_options
from segmentation.errors import UsageError, told_in_one_line

if TYPE_CHECKING:
    from torch import Tensor

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

FEW_FOR_BATCH_NORM = 8
"""Below so many images the statistics of batch norm are noisy enough to cost mIoU."""


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

    from segmentation import checkpoint, engine, processes
    from segmentation.data import loader
    from segmentation.data.transforms import training_transform
    from segmentation.figures.panel import panel
    from segmentation.files import WriteFault
    from segmentation.inference import views_for
    from segmentation.models import DifNet
    from segmentation.progress import Progress, StopSignal
    from segmentation.rundir import RunDir, environment, weights_sha256
    from segmentation.trainer import Trainer

    device = engine.pick_device(config.device)
    here, machines = processes.asked_for()
    engine.check_device(config, device, here * machines)
    engine.use_deterministic(config.deterministic)
    if config.threads:
        torch.set_num_threads(config.threads)
    fabric = Fabric(
        accelerator=device.type,
        devices=here,
        num_nodes=machines,
        strategy="ddp" if here * machines > 1 else "auto",
        precision={"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[config.precision],
    )
    fabric.launch()
    rank, ranks = processes.rank(), processes.count()

    # All that can be refused is refused before the first file is written.
    run = RunDir(config.run_dir)
    state_file = run.state_to_resume(resume, overwrite)
    state = None if state_file is None else checkpoint.load_state(state_file)
    all_parts = [frozenset(parts) for parts in engine.branch_parts(config)]
    training_set = engine.build_dataset(config, config.train_split)
    validation_set = engine.build_dataset(config, config.val_split)
    classes = training_set.classes
    if state is not None and state_file is not None:
        checkpoint.check_same_run(state, config, classes, state_file)
    steps_per_epoch = engine.steps_per_epoch(config, len(training_set))
    total = config.max_steps or (config.epochs or 0) * steps_per_epoch

    torch.manual_seed(config.seed)
    model = engine.build_model(config, len(classes))
    told = []
    if state is not None:
        # The files may be gone by now, and are not needed.
        fresh_parts, hashes = [frozenset(fresh) for fresh in state["fresh_parts"]], state["weights_sha256"]
    else:
        if config.init_from is not None:
            told = checkpoint.start_from(model, Path(config.init_from), classes)
            fresh_parts = [frozenset() for _ in model.backbones]
        else:
            fresh_parts = engine.start_branches(model, config)
        hashes = weights_sha256(config.weight_files)
    if config.bn == "frozen" and all(map(frozenset.__eq__, fresh_parts, all_parts)):
        raise UsageError(
            "--bn frozen keeps the statistics of pretrained weights, and the backbone has none: give "
            "--weights-backbone or --init-from, or pass --bn train"
        )
    trainer = Trainer(config, model, fresh_parts, total, fabric)
    at = engine.Position()
    if state is not None:
        trainer.restore(state)
        at = engine.Position(**state["at"])
        at.evaluation_due |= at.step == total

    samples = loader.Augmented(training_set, training_transform(config.crop_size, config.scale), config.seed)
    sampler = loader.StepSampler(
        len(training_set), config.batch_size, config.seed, at.step, total, steps_per_epoch, rank, ranks
    )
    batches = iter(loader.training_loader(samples, sampler, config.workers))
    scored = loader.Evaluated(validation_set)
    validation = loader.evaluation_loader(scored, config.workers, config.limit_val_batches, rank, ranks)
    few = loader.evaluation_loader(scored, 0, HEALTH_IMAGES)

    progress = Progress(total, at.step, config.log_every, silent=rank > 0)
    # None may still look for a run in the folder when the first one writes to it.
    fabric.barrier()
    if rank == 0:
        facts = environment(config, str(fabric.device), torch.get_num_threads(), ranks, hashes)
        facts["labels"] = {
            config.train_split: training_set.label_source,
            config.val_split: validation_set.label_source,
        }
        run.start(config, facts, at.step, at.evaluation_due)
    where = f"{fabric.device.type}{f', by {ranks} processes' if ranks > 1 else ''}"
    for line in _introduction(config, model, fresh_parts, training_set, validation_set, total, where):
        progress.say(line)
    for line in (*told, *_warnings(config, training_set, validation_set, ranks)):
        progress.say(line)
    saved = None if state is None else f"{state_file} holds step {at.step}"
    # The step of last.ckpt, where that is one of this run.
    last_saved = at.step if state_file is not None and state_file.resolve() == run.state.resolve() else None
    if state is not None:
        progress.say(f"going on after step {at.step} of {total}, from {state_file}")

    def left() -> str:
        return f"{saved}, to go on from by --resume auto" if saved else "no step was saved yet"

    views = views_for(config)

    def seen(model: Model, image: Tensor) -> Tensor:
        return views.logits(model, image, validation_set.eval_size)

    def save_state() -> None:
        nonlocal saved, last_saved
        if rank == 0:
            if last_saved is not None and last_saved < at.step:
                run.keep_state(last_saved, config.keep)
            checkpoint.save_state(
                run.state,
                {
                    "config": config.as_dict(),
                    "classes": list(classes),
                    "fresh_parts": [sorted(fresh) for fresh in fresh_parts],
                    "weights_sha256": hashes,
                    **trainer.state(),
                    "at": dataclasses.asdict(at),
                },
            )
        saved, last_saved = f"{run.state} holds step {at.step}", at.step

    def record(scores: Scores, speed: float) -> None:
        is_best = scores.miou > at.best_miou
        at.best_miou = max(scores.miou, at.best_miou)
        row = engine.metrics_row(at, at.step / steps_per_epoch, trainer.lr, speed, scores)
        if rank == 0:
            if isinstance(trainer.scored, DifNet):
                row.update(engine.walk_columns(trainer.scored, few))
            run.log(row, scores, classes)
            about = checkpoint.Description(config, classes, at.step, scores.miou, hashes)
            if is_best or not run.best.is_file():
                checkpoint.save_weights(run.best, trainer.scored, about)
            checkpoint.save_weights(run.last, trainer.scored, about)
        progress.scored(at.step, row["loss"], scores.miou, scores.majority_miou)
        at.evaluation_due, at.loss_sum, at.loss_steps = False, 0.0, 0
        # Last of all: only now does a resumed run start from here.
        save_state()

    scores: Scores | None = None
    steps, seconds = 0, 0.0
    try:
        with StopSignal(patient=ranks > 1) as stop, processes.loss_told():
            trainer.settle()
            few_more = loader.evaluation_loader(scored, 0, SANITY_IMAGES)
            engine.evaluate(trainer.scored, few_more, len(classes), lambda: False, seen)
            while True:
                if at.evaluation_due:
                    trainer.settle()
                    scores = engine.evaluate(
                        trainer.scored, validation, len(classes), lambda: stop.received is not None, seen
                    )
                    if scores is None:
                        break
                    record(scores, config.batch_size * steps / seconds if steps else math.nan)
                    steps, seconds = 0, 0.0
                if at.step == total or processes.any_of(stop.received is not None, fabric.device):
                    break
                started_at = time.perf_counter()
                loss = trainer.step(*next(batches))
                if not math.isfinite(loss):
                    raise UsageError(f"the loss is {loss} at step {at.step + 1}: lower --lr; {left()}")
                at.step += 1
                at.loss_sum += loss
                at.loss_steps += 1
                at.evaluation_due = at.step % config.eval_every == 0 or at.step == total
                steps += 1
                seconds += time.perf_counter() - started_at
                if at.step % config.checkpoint_every == 0 and not at.evaluation_due:
                    save_state()
                speed = config.batch_size * steps / seconds
                progress.step(at.step, loss, trainer.lr, speed, seconds / steps)
            progress.close()
            if at.step < total or at.evaluation_due:
                save_state()
                number = stop.received or signal.SIGTERM
                progress.say(
                    f"stopped by {number.name} after step {at.step} of {total}; to go on: "
                    f"python -m segmentation.train --config {run.config} --resume auto"
                )
                return number
            if rank == 0:
                # Here still, so that a signal does not end a run that is done but for its picture.
                assert scores is not None  # the last step is always scored
                chosen = loader.spread(len(validation_set), PANEL_IMAGES)
                panel(trainer.scored, validation_set, chosen, run.panel)
                _report(config, trainer.scored, scores, at.best_miou, classes, run)
    except WriteFault as fault:
        raise UsageError(f"{fault}; {left()}") from None
    except processes.Lost as fault:
        raise UsageError(f"{fault}; {left()}") from fault
    return 0


def _introduction(
    config: Config,
    model: Model,
    fresh_parts: Sequence[frozenset[str]],
    training_set: SegmentationDataset,
    validation_set: SegmentationDataset,
    total: int,
    where: str,
) -> list[str]:
    """What is about to be done, in a few lines."""
    from segmentation import engine

    starts = []
    branches = zip(config.branches, engine.branch_parts(config), fresh_parts, strict=True)
    for (backbone, source), parts, fresh in branches:
        some = [part for part in parts if part in fresh]
        if config.init_from is not None:
            start = f"the backbone starts from {config.init_from}"
        elif some == list(parts):
            start = "all parts of the backbone start fresh (random weights)"
        elif some:
            start = f"{source} covers the backbone only in part: {', '.join(some)} starts fresh"
        else:
            start = f"the backbone starts from {source}"
        starts.append(f"{backbone}: {start}" if " and " in config.networks else start)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return [
        f"{config.model} on {config.networks}, {millions:.2f} M parameters, {len(training_set.classes)} "
        f"classes; {'; '.join(dict.fromkeys(starts))}",
        f"{config.dataset}: {len(training_set)} images to train on ({config.train_split}), "
        f"{len(validation_set)} to score ({config.val_split}); {total} steps of {config.batch_size} on "
        f"{where}",
        f"labels to train on: {training_set.label_source}; to score: {validation_set.label_source}",
    ]


def _warnings(
    config: Config, training_set: SegmentationDataset, validation_set: SegmentationDataset, ranks: int
) -> list[str]:
    """What may be meant so, but often is not."""
    lines = []
    training_names = {training_set.name(index) for index in range(len(training_set))}
    shared = sum(validation_set.name(index) in training_names for index in range(len(validation_set)))
    if shared:
        lines.append(
            f"warning: {shared} images are in both {config.train_split!r} and {config.val_split!r}: "
            "the score says little about new images"
        )
    together = config.batch_size // (config.grad_accum_steps * (1 if config.bn == "sync" else ranks))
    if config.bn != "frozen" and together < FEW_FOR_BATCH_NORM:
        lines.append(
            f"warning: batch norm sees {together} images at a time, and is noisy below "
            f"{FEW_FOR_BATCH_NORM}: raise --batch-size, or with pretrained weights pass --bn frozen"
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
    if isinstance(model, DifNet) and model.steps:
        learned = {"mu": config.fixed_mu is None, "beta": config.fixed_beta is None}
        moved = 0.0
        print()
        print("walk" + "".join(f"{step:>8}" for step in model.steps))
        for name, symbol in (("mu", "µ"), ("beta", "β")):
            if name in model.coefficients:
                values = model.coefficients[name].detach()
                fixed = "" if learned[name] else "   (fixed)"
                print(f"{symbol}   " + "".join(f"{float(value):8.4f}" for value in values) + fixed)
                moved = max(moved, float((values - 0.5).abs().max()) if learned[name] else 0.0)
        if any(learned[name] for name in model.coefficients) and moved < 0.05:
            print(
                f"(learned, they start at 0.5; a run as short as this hardly moves them, here by up to "
                f"{moved:.4f})"
            )
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
