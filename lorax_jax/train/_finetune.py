"""`finetune`: the thin loop around the training step."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from tqdm import tqdm

from ..adapters import Adapter
from ._errors import TrainingError
from ._finite import diverged
from ._history import History
from ._interrupt import deferred_interrupt
from ._loss import bits_per_byte
from ._meter import Meter
from ._optimizer import optimizer
from ._state import restore_state, save_state
from ._step import make_score, make_step, start
from ._windows import Windows, batch_at


class Heldout(NamedTuple):
    """What a run is measured on.

    Attributes:
        windows: rows that are not trained on.
        bytes: size of the text behind them, for bits per byte.
    """

    windows: Windows
    bytes: int


class Run(NamedTuple):
    """What `finetune` returns.

    Attributes:
        adapter: as trained.
        history: a dict for each step and each measurement.
        finished: false if Ctrl-C ended it early.
        compile_seconds: the first step, which is compiled, from call to result.
        tokens_per_second: positions that went through a step, padding among them, by
            the time of the steps alone: no compilation, no measurements.
    """

    adapter: Adapter
    history: History
    finished: bool
    compile_seconds: float
    tokens_per_second: float


def finetune(
    apply: Callable[..., Any],
    params: Any,
    adapter: Adapter,
    data: Windows,
    *,
    steps: int,
    batch: int = 8,
    accumulate: int = 1,
    learning_rate: float = 1e-3,
    tx: optax.GradientTransformation | None = None,
    seed: int = 0,
    heldout: Heldout | None = None,
    eval_every: int | None = None,
    folder: Path | str | None = None,
    save_every: int | None = None,
    resume: bool = False,
    progress: bool = False,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> Run:
    """Trains an adapter. Neither the parameters nor the given adapter are changed.

    Args:
        apply: the model, `(params, ids) -> logits`.
        params: its parameters, of any floating dtype.
        adapter: where to start.
        data: rows to train on.
        steps: updates to make in all, those before a resumed state among them.
        batch: rows of a step at a time.
        accumulate: how many such batches make one update.
        learning_rate: for the default optimizer; see `optimizer`.
        tx: any Optax transformation instead.
        seed: of shuffling and dropout.
        heldout: measured before, after, and every `eval_every` steps.
        eval_every: `None` measures before and after only.
        folder: where to save the state of the run, every `save_every` steps, at the
            end and at Ctrl-C; `None` saves nothing.
        save_every: `None` saves at the end and at Ctrl-C only.
        resume: go on from the state in `folder`. The result is bit for bit that of a
            run that was never stopped; one that has made all its steps makes no more.
        progress: show a bar on the standard error.
        report: called with each measurement as it is made; see `evaluate`.

    Returns:
        A `Run`.

    Raises:
        TrainingError: if the loss or its gradient is not a number any more, there is no
            step to make, or the state in `folder` is another run's.

    Example:
        >>> import jax.numpy as jnp, lorax_jax as lj
        >>> params = {"w": jnp.zeros((8, 8))}
        >>> apply = lambda params, ids: jax.nn.one_hot(ids, 8) @ params["w"]
        >>> ids = np.tile(np.arange(8), (4, 1))
        >>> plan = lj.plan(lj.LoraConfig("w", rank=8), params, apply, (ids,))
        >>> adapter = lj.init(plan, params, key=jax.random.key(0))
        >>> data = Windows(ids, np.ones((4, 7), np.float32))
        >>> run = finetune(apply, params, adapter, data, steps=20, learning_rate=0.1)
        >>> run.history[0]["loss"] > 2 * run.history[-1]["loss"]
        True
    """
    if steps < 1 or batch < 1 or accumulate < 1:
        raise TrainingError(
            f"`steps` = {steps}, `batch` = {batch} and `accumulate` = {accumulate} "
            "must all be at least 1."
        )
    if resume and folder is None:
        raise TrainingError("`resume` needs a `folder` to find the state in.")
    if tx is None:
        tx = optimizer(learning_rate=learning_rate, steps=steps)
    state = start(adapter, tx, jax.random.key(seed))
    fixed, history = adapter.fixed, []
    if resume and folder is not None:
        state, fixed, history = restore_state(folder, state, fixed)
    done = int(state.step)
    if done > steps:
        raise TrainingError(
            f"The run in {folder} has made {done} steps, more than `steps` = {steps}. "
            "Start another from its adapter."
        )
    step, score = make_step(apply, tx), make_score(apply)

    def measure(weight: float) -> None:
        if heldout is not None:
            now = Adapter(state.train, fixed)
            found = evaluate(score, weight, now, params, heldout, batch=batch)
            loss, made = found["heldout_loss"], int(state.step)
            if not math.isfinite(loss):
                what = f"The held-out loss after {made} steps"
                raise diverged(what, loss, made, params)
            history.append({"step": made, **found})
            if report is not None:
                report(history[-1])

    def save() -> None:
        if folder is not None:
            save_state(folder, state, fixed, history)

    if not resume:
        measure(0.0)
    meter, number = Meter(history, params), done
    with deferred_interrupt() as interrupt, _bar(done, steps, progress) as bar:
        for number in range(done + 1, steps + 1):
            rows = batch_at(data, number - 1, size=batch * accumulate, seed=seed)
            parts = Windows(*(x.reshape(accumulate, batch, -1) for x in rows))
            meter.before()
            state, metrics = step(state, fixed, params, parts)
            meter.after(number, metrics, parts.weights.size)
            bar.set_postfix_str(_progress(history, meter), refresh=False)
            bar.update()
            stop = interrupt.asked or number == steps
            if stop or _due(number, eval_every) or _due(number, save_every):
                meter.pause()
                if number == steps or _due(number, eval_every):
                    measure(1.0)
                if stop or _due(number, save_every):
                    with interrupt.shielded():
                        save()
            if stop:
                break
    return Run(
        Adapter(state.train, fixed),
        history,
        finished=number == steps,
        compile_seconds=meter.compile_seconds,
        tokens_per_second=meter.tokens_per_second,
    )


def evaluate(
    score: Callable[..., Any],
    weight: float,
    adapter: Adapter,
    params: Any,
    heldout: Heldout,
    *,
    batch: int = 8,
) -> dict[str, float]:
    """Measures on all held-out rows.

    Args:
        score: from `make_score`.
        weight: multiplies the adapter's scales; see `scaled`.
        adapter: what to measure.
        params: the parameters.
        heldout: the rows.
        batch: rows at a time.

    Returns:
        `{"heldout_loss": nats per token, "bits_per_byte": ...}`.
    """
    rows = heldout.windows
    nats = tokens = 0.0
    for first in range(0, rows.rows, batch):
        part = Windows(*(_padded(x, first, batch) for x in rows))
        found = score(np.float32(weight), adapter, params, part)
        nats, tokens = nats + float(found[0]), tokens + float(found[1])
    return {
        "heldout_loss": nats / tokens,
        "bits_per_byte": bits_per_byte(nats, heldout.bytes),
    }


def _padded(rows: Any, first: int, count: int) -> np.ndarray:
    """`count` rows, of zeros behind the last: one shape for all, and no weight."""
    part = np.asarray(rows[first : first + count])
    return np.pad(part, ((0, count - len(part)), (0, 0)))


def _due(number: int, every: int | None) -> bool:
    return bool(every) and number % every == 0


def _bar(done: int, steps: int, progress: bool) -> tqdm:
    # A file or a pipe gets a line now and then, a terminal several a second.
    seconds = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        initial=done,
        total=steps,
        unit="step",
        mininterval=seconds,
        disable=not progress,
    )


def _progress(history: History, meter: Meter) -> str:
    losses = [line["loss"] for line in history[-20:] if "loss" in line]
    mean = sum(losses) / len(losses)
    return f"loss {mean:.3f}, {meter.tokens_per_second:,.0f} tokens/s"
