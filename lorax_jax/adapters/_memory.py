"""Weights that live in host memory."""

from typing import Any

import jax
from jax.core import Tracer


def on_device(leaf: Any) -> Any:
    """A weight that lives in host memory, on its device; one at a time.

    Of a weight that is being traced, the program does that where it runs.
    """

    def move(x):
        if isinstance(x, Tracer):
            on_host = (
                getattr(jax.typeof(x), "memory_space", None) == jax.memory.Space.Host
            )
            return jax.device_put(x, jax.memory.Space.Device) if on_host else x
        kind = getattr(getattr(x, "sharding", None), "memory_kind", None)
        if kind is None or "host" not in kind:
            return x
        device = x.sharding.with_memory_kind("device")
        usable = {
            m.kind for d in x.sharding.device_set for m in d.addressable_memories()
        }
        return jax.device_put(x, device) if "device" in usable else x

    return jax.tree.map(move, leaf)
