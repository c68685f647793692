"""`lorax-jax inspect`: what an adapter folder holds, or what a model would adapt."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from ._program import Command, Failure
from ._types import Number


@click.command(cls=Command)
@click.argument("path", type=Path)
@click.option("--base", help="An adapter's base. [default: as the adapter says]")
@click.option(
    "--targets",
    multiple=True,
    default=["all-linear"],
    help="For a model: regex of whole paths; may be repeated. [default: all-linear]",
)
@click.option("--exclude", multiple=True, help="Regex of paths to leave out.")
@click.option("--rank", type=click.IntRange(1), default=8, show_default=True)
@click.option("--alpha", type=Number(0, min_open=True), default=16.0, show_default=True)
def inspect(
    path: Path,
    base: str | None,
    targets: tuple[str, ...],
    exclude: tuple[str, ...],
    rank: int,
    alpha: float,
) -> None:
    """Show what an adapter holds, or what targets would adapt in a model.

    \b
    Examples:
      lorax-jax inspect lorax-out/adapter
          sites, ranks, scales and norms; which B are still zero
      lorax-jax inspect ./llama --targets '.*/(q|v)_proj/kernel' --rank 16
          the plan, before anything is loaded

    No weights of a model are read, only its config.json.
    """
    from .._config import LoraConfig

    if (path / "adapter_config.json").exists():
        _adapter(path, base)
    elif (path / "config.json").exists():
        config = LoraConfig(targets=targets, exclude=exclude, rank=rank, alpha=alpha)
        _model(path, config)
    elif path.is_dir():
        found = sorted(entry.name for entry in path.iterdir())[:8]
        raise Failure(
            f"{path} is neither an adapter nor a model: it has no adapter_config.json "
            f"and no config.json. It holds {found}."
        )
    else:
        raise Failure(f"{path} is no folder.")


def _model(path: Path, config: Any) -> None:
    import jax
    import jax.numpy as jnp

    from ..planning import plan

    model = _abstract(str(path))
    ids = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    click.echo(plan(config, model.abstract(), fn=model.apply, args=(ids,)))


def _adapter(path: Path, base: str | None) -> None:
    from .._count import count
    from .._load_adapted import grown_for
    from ..checkpoint import load_adapter
    from ._base import base_of

    where = base_of(path) if base is None else base
    model, params = _for_adapter(_abstract(where), path)
    model, params = grown_for(path, model, params)
    adapter, receipt = load_adapter(path, params, names=model.names)
    click.echo(f"base      {where}\n{receipt}\n\n{receipt.plan}\n")
    zero = _norms(receipt.plan, adapter)
    if zero:
        click.echo(
            f"\nB is still zero in {len(zero)} sites, which therefore do nothing:"
        )
        for name in zero:
            click.echo(f"  {name}")
    else:
        click.echo("\nEvery B has moved away from zero.")
    click.echo(count(params, adapter))


def _for_adapter(model: Any, path: Path) -> tuple[Any, Any]:
    """The model that an adapter is for, and the types of its parameters."""
    from ..checkpoint import layer_replication
    from ..replication import replicate

    ranges = layer_replication(path)
    if ranges is None:
        return model, model.abstract()
    # Stacked, for types of unrolled layers do not show which of them are one.
    model = dataclasses.replace(model, scan_layers=True)
    params = replicate(model.abstract(), ranges, layers=model.layers_path)
    return model.with_layers(sum(end - first for first, end in ranges)), params


def _norms(plan: Any, adapter: Any) -> list[str]:
    """Prints how large each site's factors are; returns those that do nothing."""
    import numpy as np

    from ..conversion import to_lora

    slots = [slot for slot in plan.slots if "rank" in adapter.fixed[slot.name]]
    plain = to_lora(adapter)  # what is added, where more than A B says it
    width = max(len(slot.name) for slot in slots)
    click.echo(f"{'norms':{width}}  {'A':>10}  {'B':>10}  {'scale A B':>10}")
    zero = []
    for slot in slots:
        fixed = adapter.fixed[slot.name]
        held, scale = {**fixed, **adapter.train[slot.name]}, fixed["scale"]
        a, b = (np.asarray(plain.train[slot.name][n], np.float64) for n in ("a", "b"))
        a, b = slot.matrices(a, b)  # (sites, *apart, d_in, rank) and so on
        # |A B|^2 is the trace of (A^T A)(B B^T), r by r: A B itself is never built.
        gram = (a.swapaxes(-1, -2) @ a) * (b @ b.swapaxes(-1, -2))
        whole = np.sqrt(np.maximum(gram.sum((-1, -2)), 0))
        whole = whole.reshape(len(slot.sites), -1) * np.asarray(scale).reshape(-1, 1)
        own = [np.asarray(held[name], np.float64) for name in ("a", "b")]
        sizes = [float(np.linalg.norm(x)) for x in (*own, whole)]
        line = "  ".join(f"{size:10.4g}" for size in sizes)
        click.echo(f"{slot.name:{width}}  {line}")
        if not (whole if "a0" in held else b).any():
            zero.append(slot.name)
    return zero


def _abstract(where: str) -> Any:
    """A model from its config.json alone."""
    from .. import models
    from ._base import config_of

    return models.from_config(config_of(where))
