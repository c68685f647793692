"""`export_merged` with little in memory."""

import json
import os
import subprocess
import sys
import textwrap
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from folders import tensors_of
from safetensors.numpy import save_file

import lorax_jax as lj
from lorax_jax.adapters import Fixed, Role
from lorax_jax.checkpoint import _stream

# --- Memory ---------------------------------------------------------------------------


def big(tmp_path, dtype, shapes):
    """A checkpoint of some large tensors, and an adapter of all of them."""
    draw = np.random.default_rng(0)
    names, train, fixed, where = [], {}, {}, {}
    for i, (shape, layout) in enumerate(shapes):
        file = f"model-{i + 1:05d}-of-{len(shapes):05d}.safetensors"
        tensor = draw.standard_normal(shape, np.float32).astype(dtype)
        save_file({f"m{i}.weight": tensor}, tmp_path / file)
        where[f"m{i}.weight"] = file
        names.append((f"m{i}", f"m{i}.weight", layout))
        d_in, d_out = shape if layout == "same" else shape[::-1]
        train[f"m{i}"] = {
            "a": jnp.asarray(draw.standard_normal((d_in, 8), np.float32)),
            "b": jnp.asarray(draw.standard_normal((8, d_out), np.float32)),
        }
        fixed[f"m{i}"] = Fixed(
            Role(f"m{i}", (0,), (1,)),
            {"scale": jnp.float32(0.5), "rank": jnp.asarray(8, jnp.int32)},
        )
    (tmp_path / "config.json").write_text("{}")
    index = {"metadata": {}, "weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return names, lj.Adapter(train, fixed)


SHAPES = [((2048, 1100), "linear"), ((5000, 512), "same"), ((700, 2048), "linear")]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_large_tensors_one_at_a_time_and_still_the_same_bytes(tmp_path, dtype):
    base = tmp_path / "base"
    base.mkdir()
    names, adapter = big(base, dtype, SHAPES)
    largest = max(np.prod(shape) for shape, _ in SHAPES) * np.dtype(dtype).itemsize
    lj.export_merged(base, adapter, tmp_path / "warm", names=names)
    tracemalloc.start()
    lj.export_merged(base, adapter, tmp_path / "out", names=names)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(x.nbytes for x in jax.tree.leaves(adapter.train))
    assert peak < 2 * largest + size
    old, new = tensors_of(base), tensors_of(tmp_path / "out")
    for (name, tensor, layout), (shape, _) in zip(names, SHAPES, strict=True):
        blocks = list(_stream._blocks(shape if layout == "same" else shape[::-1]))
        assert len(blocks) > 2
        kernel = old[tensor] if layout == "same" else old[tensor].T
        part = lj.Adapter({name: adapter.train[name]}, {name: adapter.fixed[name]})
        merged = np.asarray(lj.merge({name: jnp.asarray(kernel)}, part)[name])
        merged = merged if layout == "same" else merged.T
        assert new[tensor].tobytes() == np.ascontiguousarray(merged).tobytes()


_RESIDENT = """
    import resource, sys, threading, time
    import jax, jax.numpy as jnp, numpy as np
    import lorax_jax as lj
    from lorax_jax.adapters import Fixed, Role

    base, warm, out = sys.argv[1:]
    names = [("m", "m.weight", "linear")]
    draw = np.random.default_rng(0)
    a = jnp.asarray(draw.standard_normal((4096, 8), np.float32))
    b = jnp.asarray(draw.standard_normal((8, 4096), np.float32))
    values = {"scale": jnp.float32(1), "rank": jnp.asarray(8, jnp.int32)}
    fixed = Fixed(Role("m", (0,), (1,)), values)
    adapter = lj.Adapter({"m": {"a": a, "b": b}}, {"m": fixed})

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    peak, done = [0], []
    def watch():
        while not done:
            peak[0] = max(peak[0], resident())
            time.sleep(0.001)

    lj.export_merged(base, adapter, warm, names=names)  # compiled by now
    before = resident()
    thread = threading.Thread(target=watch)
    thread.start()
    lj.export_merged(base, adapter, out, names=names)
    done.append(1)
    thread.join()
    print(peak[0] - before)
"""


@pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="needs Linux's /proc"
)
def test_what_the_process_takes_from_the_system(tmp_path):
    """Not what Python allocates alone: the resident set, mapped files included."""
    tensor = np.ones((4096, 4096), ml_dtypes.bfloat16)
    base = tmp_path / "base"
    base.mkdir()
    save_file({"m.weight": tensor}, base / "model.safetensors")
    (base / "config.json").write_text("{}")
    command = [sys.executable, "-c", textwrap.dedent(_RESIDENT)]
    folders = [base, tmp_path / "warm", tmp_path / "out"]
    found = subprocess.run(
        [*command, *folders], capture_output=True, text=True, check=True
    )
    assert int(found.stdout) < 2 * tensor.nbytes + 8 * 2 * 4096 * 4


def test_blocks_cover_every_row_and_are_alike():
    for shape in [(4096, 4096), (1100, 2048), (65, 1 << 20), (10, 10), (128, 1 << 16)]:
        blocks = list(_stream._blocks(shape))
        rows = {block.stop - block.start for block in blocks}
        assert len(rows) == 1 and min(rows) >= min(64, shape[0])
        covered = {i for block in blocks for i in range(block.start, block.stop)}
        assert covered == set(range(shape[0]))
