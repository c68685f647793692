"""`plot_history`: the loss curve as a PNG."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

# The smoothed curve averages over about this share of the steps.
_SMOOTHING = 0.05


def plot_history(
    history: Iterable[dict[str, Any]],
    path: str | os.PathLike,
    *,
    title: str = "",
) -> None:
    """Draws training loss (each step, and smoothed) and held-out loss.

    Args:
        history: as `finetune` returns it.
        path: the PNG to write.
        title: what to print above.
    """
    from matplotlib.figure import Figure  # no pyplot: no windows, no global state

    history = list(history)
    trained = [(line["step"], line["loss"]) for line in history if "loss" in line]
    held = [(x["step"], x["heldout_loss"]) for x in history if "heldout_loss" in x]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if trained:
        steps, losses = np.array(trained).T
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1)
        label = "training, smoothed"
        axes.plot(steps, smoothed(losses), color="tab:blue", label=label)
    if held:
        axes.plot(*np.array(held).T, "o-", color="tab:orange", label="held out")
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.grid(alpha=0.3)
    if trained or held:
        axes.legend(frameon=False)
    figure.savefig(path, format="png")


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of each value and its neighbors on both sides, so that it does not lag.

    >>> smoothed(np.array([2.0, 2.0, 5.0])).tolist()
    [2.0, 2.0, 5.0]
    """
    window = np.ones(2 * round(_SMOOTHING * len(values) / 2) + 1)
    total = np.convolve(values, window, "same")
    return total / np.convolve(np.ones(len(values)), window, "same")
