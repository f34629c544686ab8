"""How a run shows where it is: a bar on a terminal, plain lines elsewhere; and how it is asked to stop."""

import math
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from tqdm import tqdm


class Progress:
    """Loss, rate, last mIoU, images per second and time left, step by step.

    Args:
        total: steps of the whole run.
        done: steps done before.
        log_every: steps between lines where stderr is no terminal.
        silent: whether another process tells.
    """

    def __init__(self, total: int, done: int, log_every: int, silent: bool = False) -> None:
        self._total = total
        self._log_every = log_every
        self._silent = silent
        self._on_terminal = sys.stderr.isatty() and not silent
        self._bar = tqdm(
            total=total, initial=done, unit="step", dynamic_ncols=True, disable=not self._on_terminal
        )
        self._miou = float("nan")

    def step(self, step: int, loss: float, lr: float, images_per_second: float, seconds: float) -> None:
        """Tell of one step done; `seconds` is what such a step takes."""
        shown = {
            "loss": f"{loss:.4f}",
            "lr": f"{lr:.2e}",
            "mIoU": "-" if math.isnan(self._miou) else f"{100 * self._miou:.2f}",
            "images/s": f"{images_per_second:.2f}",
        }
        if self._on_terminal:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
        elif step % self._log_every == 0:
            left = tqdm.format_interval((self._total - step) * seconds)
            self.say(
                f"step {step}/{self._total}  "
                + "  ".join(f"{k} {v}" for k, v in shown.items())
                + f"  left {left}"
            )

    def scored(self, step: int, loss: float, miou: float, majority_miou: float) -> None:
        """Tell of one scoring; `loss` is the mean since the last one."""
        self._miou = miou
        self.say(
            f"step {step}/{self._total}  loss {loss:.4f}  mIoU {100 * miou:.2f}  "
            f"(majority class {100 * majority_miou:.2f})"
        )

    def say(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if not self._silent:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


class StopSignal:
    """Context in which the first SIGINT or SIGTERM is only noted, as `received`; a second acts as usual.

    Args:
        patient: whether later ones are only noted too: torchrun hands on one that already reached all.
    """

    def __init__(self, patient: bool = False) -> None:
        self.received: signal.Signals | None = None
        self._patient = patient
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if not self._patient:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
