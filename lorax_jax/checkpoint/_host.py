"""Computing on the host, where a checkpoint's tensors are."""

import contextlib

import jax


def on_host() -> contextlib.AbstractContextManager:
    """Inside, JAX computes on the CPU; an accelerator would only be a detour."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # a JAX that was told to use no CPU
        return contextlib.nullcontext()
