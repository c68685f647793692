"""Strict by default: what is loose elsewhere is an error here."""

import os
from importlib import metadata

# Before JAX is imported: eight devices on one processor, for shardings. Tiny programs
# take far longer to compile than to run; without fusions they compile five times as
# fast, in the releases that can be told so.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false"
        if metadata.version("jaxlib").startswith("0.10.")
        else "",
    ]
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_legacy_prng_key", "error")
# For the same reason, with less care.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def relaxed():
    """For models of other people, which promote types and ranks as JAX allows."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def optimized():
    """For real models, where running takes longer than compiling."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
