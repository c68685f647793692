"""One batch of a sketch of gradients, as a pure jitted function."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .._errors import CaptureError
from ..adapters import Adapter, Fixed, bind
from ..planning import Slot
from ._gathered import differ, witnesses
from ._gradient_state import Factors, GradientState


def step(
    slots: tuple[Slot, ...],
    forward: Callable[..., Any],
    weight: Callable[..., Any] | None,
    loss_scale: float,
) -> Callable[..., GradientState]:
    """Compiles what takes in one batch.

    Both factors are differentiated, whichever is held: beside the factor that is zero
    the other's gradient is zero, so that one program serves all passes.

    Args:
        slots: the weights that are looked at.
        forward: the loss of bound parameters.
        weight: what a batch counts for, or `None` for 1.
        loss_scale: the multiplier of the loss.

    Returns:
        `update(state, params, batch) -> state`, jitted.
    """
    roles = {s.name: dataclasses.replace(s.role, kind="lora") for s in slots}
    ones = {
        s.name: jnp.array([float(site is not None) for site in s.sites]).reshape(
            s.layers
        )
        for s in slots
    }

    @jax.jit
    def update(state: GradientState, params: Any, batch: tuple[Any, ...]):
        fixed = {
            name: Fixed(
                role, {"scale": ones[name], "rank": ones[name].astype(jnp.int32)}
            )
            for name, role in roles.items()
        }

        def scaled(held: Factors):
            value = forward(bind(params, Adapter(held, fixed)), *batch)
            _check_is_number(value)
            return value * jnp.asarray(loss_scale, value.dtype)

        value, grads = jax.value_and_grad(scaled)(state.held)
        counts = jnp.ones(()) if weight is None else jnp.asarray(weight(*batch))
        counts = counts.astype(jnp.float32)
        sums = jax.tree.map(
            lambda s, g: s + g * (counts / loss_scale).astype(g.dtype),
            state.sums,
            grads,
        )
        fine = [jnp.isfinite(value), *map(_is_finite, jax.tree.leaves(grads))]
        fine = jnp.stack(fine).all()
        seen = witnesses(slots, params)
        first = (state.done == 0) & (state.count == 0)
        return dataclasses.replace(
            state,
            sums=sums,
            weight=state.weight + counts,
            count=state.count + 1,
            bad=jnp.where((state.bad < 0) & ~fine, state.count, state.bad),
            witness={n: jnp.where(first, seen[n], state.witness[n]) for n in seen},
            mixed=state.mixed | (~first & differ(state.witness, seen)),
        )

    return update


def _check_is_number(value: Any) -> None:
    shape: Any = getattr(value, "shape", None)
    dtype: Any = getattr(value, "dtype", None)
    if shape == () and jnp.issubdtype(dtype, jnp.floating):
        return
    found = type(value).__name__ if shape is None else f"{dtype}{list(shape)}"
    raise CaptureError(
        f"`loss` must give one floating number for a batch, and gave {found}. Give the "
        "mean over the batch; of a function with several results, the loss alone."
    )


def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()
