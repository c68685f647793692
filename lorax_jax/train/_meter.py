"""`Meter`: reads what steps report, one step late, and measures their speed."""

import math
import time
from typing import Any

from ._finite import diverged
from ._history import History
from ._step import Metrics


class Meter:
    """Reads the metrics of a step after the next one was sent off.

    Reading waits for the device. Read at once, the device would wait for the host to
    send the next step; read a step late, it never does.

    Args:
        history: gets a line for each step.
        params: the base, to look for the cause where a loss is no number.
    """

    def __init__(self, history: History, params: Any = None):
        self.history = history
        self._params = params
        self.compile_seconds = 0.0
        self._compiled = False
        self._waiting: tuple[int, Metrics, int] | None = None
        self._mark: float | None = None  # up to when time is accounted for
        self._seconds, self._positions = 0.0, 0

    @property
    def tokens_per_second(self) -> float:
        """Positions by the time of their steps, the first step left out."""
        return self._positions / self._seconds if self._seconds else 0.0

    def before(self) -> None:
        """Call before a step."""
        if self._mark is None:
            self._mark = time.perf_counter()

    def after(self, number: int, metrics: Metrics, positions: int) -> None:
        """Call after a step was sent off; it need not have finished."""
        self._read()
        self._waiting = number, metrics, positions
        if not self._compiled:
            self._read()

    def pause(self) -> None:
        """Reads what is left and stops the clock, for all that is no step."""
        self._read()
        self._mark = None

    def _read(self) -> None:
        if self._waiting is None:
            return
        number, metrics, positions = self._waiting
        self._waiting = None
        loss, norm = float(metrics.loss), float(metrics.grad_norm)  # waits
        now = time.perf_counter()
        took = now - (self._mark or now)
        self._mark = now
        if self._compiled:
            self._seconds += took
            self._positions += positions
        else:
            self._compiled, self.compile_seconds = True, took
        if not math.isfinite(loss):
            raise diverged(f"The loss of step {number}", loss, number - 1, self._params)
        if not math.isfinite(norm):
            what = f"The gradient's norm in step {number}"
            raise diverged(what, norm, number - 1, self._params)
        self.history.append({"step": number, "loss": loss, "grad_norm": norm})
