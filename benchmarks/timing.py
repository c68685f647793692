"""Measuring: trace, compile and run apart, both sides in turns, medians."""

import json
import platform
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What a figure was measured on: device and versions."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "peft")
    versions = {}
    for name in (*packages, "transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": versions,
    }


def stages(fn: Any, *args: Any) -> tuple[dict[str, float], Any]:
    """Seconds to trace, lower and compile `jax.jit(fn)`, and the compiled program.

    Every cache of traces is cleared first, so that nothing is found ready.
    """
    jax.clear_caches()
    start = time.perf_counter()
    traced = jax.jit(fn).trace(*args)
    then = time.perf_counter()
    lowered = traced.lower()
    later = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    seconds = {"trace": then - start, "lower": later - then, "compile": end - later}
    return seconds | {"total": end - start}, compiled


def facts(compiled: Any) -> dict[str, float]:
    """What the executable says of itself: operations and bytes."""
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    return {
        "flops": cost["flops"],
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
    }


def in_turns(sides: dict[str, Any], rounds: int, warmup: int = 2) -> dict[str, list]:
    """Seconds of each call, the sides taking turns so that drift hits all alike.

    Args:
        sides: name -> a function without arguments; its result is waited for.
        rounds: calls of each side that count.
        warmup: calls of each side before them.
    """
    seconds: dict[str, list] = {name: [] for name in sides}
    for i in range(rounds + warmup):
        for name, call in sides.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)


def save(name: str, results: dict[str, Any]) -> Path:
    """Writes raw results beside the machine that they were measured on."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(), **results}, indent=1, sort_keys=True)
    path.write_text(text + "\n")
    return path
