"""Does every factor get a gradient?"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..adapters import Adapter, Fixed, stable_hash
from ._report import Check, answer
from ._step import DATA, SEED, Part, Step

NAME = "no zero gradient"
_SIZE = 0.02


def check(step: Step, adapter: Adapter) -> Check:
    """Runs the step once and lists the weights whose A or B has a gradient of zeros.

    Where B is zero, as it is at the start, A's gradient is zero by construction, and
    the other way round. So a factor of zeros is replaced by small random numbers first.
    """
    if not step.is_concrete:
        return Check(NAME, None, "needs arrays; the step was audited on types")
    seed, _, arrays = step.args
    started = {
        name: _started(parts, adapter.fixed[name])
        for name, parts in adapter.train.items()
    }
    _, grads = step.compiled(seed, started, arrays)
    largest = {
        (name, part): np.where(
            _adapted(adapter.fixed[name]),
            _largest(grad, len(adapter.fixed[name].role.stacked)),
            np.inf,
        )
        for name, parts in grads.items()
        for part, grad in parts.items()
    }
    lines = _lines(step)
    findings = [
        (f"the gradient of {part} of {name!r}{_layers(sizes)} is zero", lines.get(name))
        for (name, part), sizes in largest.items()
        if (sizes == 0).any()
    ]
    return answer(
        NAME,
        [(what, at or "(never used)") for what, at in findings],
        f"all {len(largest)} factors get a gradient",
    )


def _adapted(fixed: Fixed) -> np.ndarray:
    """Which layers of a stack have an adapter at all."""
    return np.asarray(fixed["rank"]) > 0 if "rank" in fixed else np.asarray(True)


def _started(parts: dict[str, Any], fixed: Fixed) -> dict[str, Any]:
    """The factors of one weight, random where a whole layer of one is zero."""
    role, out = fixed.role, dict(parts)
    for name, rank_axis in (("a", -1), ("b", len(role.batch))):
        if name not in parts:
            continue
        value = parts[name]
        layers = len(role.stacked)
        rest = tuple(range(layers, value.ndim))
        empty = jnp.all(value == 0, axis=rest, keepdims=True)
        # Beyond a layer's true rank both factors are zeros, and stay so.
        index = jax.lax.broadcasted_iota(jnp.int32, value.shape, rank_axis % value.ndim)
        true = jnp.reshape(fixed["rank"], empty.shape)
        key = jax.random.fold_in(jax.random.key(0), stable_hash(role.name + name))
        noise = _SIZE * jax.random.normal(key, value.shape, jnp.float32)
        new = jnp.where(empty & (index < true), noise.astype(value.dtype), value)
        if isinstance(value, jax.Array):
            new = jax.device_put(new, value.sharding)
        out[name] = new
    return out


def _largest(grad: jax.Array, layers: int) -> jax.Array:
    """The largest entry of each layer's gradient."""
    return jnp.abs(grad).max(axis=tuple(range(layers, grad.ndim)))


def _layers(sizes: np.ndarray) -> str:
    zero = np.argwhere(sizes == 0)
    if sizes.ndim == 0 or len(zero) == sizes.size:
        return ""
    listed = ", ".join("/".join(map(str, index)) for index in zero)
    return f", layer {listed} of {sizes.size},"


def _lines(step: Step) -> dict[str, str]:
    """For each adapted weight, the line where its A or B first meets an activation."""
    lines: dict[str, str] = {}
    for visit in step.visits:
        for marks in visit.operands:
            if marks and not {DATA, SEED} & marks and DATA in visit.results[0]:
                for mark in marks:
                    if isinstance(mark, Part):
                        lines.setdefault(mark.site, visit.source)
    return lines
