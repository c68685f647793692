"""Writing one tensor of a merged checkpoint, with little of it in memory.

The sum `W + s A B` is taken in float32, which for a bfloat16 tensor is twice its size,
so it is taken in blocks. Their bytes must not depend on that. A matrix product's last
bits depend on which kernel the compiler picks for a shape, and on the CPU that choice
was found to hang on the columns of the result, and on its rows only where they are few:
in blocks of 64 rows or more, all of one size, every element comes out as in the whole
(14 shapes, ranks 4 to 128, 2 to 16 threads, JAX 0.10 and 0.12; blocks of 48 rows, or
of columns, do not). So blocks are of rows, and the last one overlaps the one before.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _paths
from ..adapters import Adapter, Fixed, Role
from ..merging import merge
from ._base_folder import BaseFolder
from ._pieces import Piece, matrix_of
from ._safetensors import FLOATS, Reader, Writer

_CHUNK = 8 << 20  # bytes copied at a time
_FEWEST_ROWS = 64
_WHOLE = 1 << 20  # elements of a tensor that is not worth dividing
_BLOCKS = 24


@dataclasses.dataclass(frozen=True)
class Output:
    """A tensor to write.

    Attributes:
        name: its name.
        source: the tensor of the base that it starts from.
        code: its dtype, by the format's name.
        shape: its shape.
        pieces: what is added to it, with a multiplier for each.
    """

    name: str
    source: str
    code: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[Piece, float], ...] = ()


def write_file(
    path: Path, base: BaseFolder, outputs: Sequence[Output], *, safe: bool
) -> None:
    """Writes a file of tensors.

    Args:
        path: the file.
        base: where they come from.
        outputs: the tensors, in order.
        safe: refuse NaN and infinity.
    """
    metadata = base.file_metadata(outputs[0].source) or {"format": "pt"}
    entries = [(output.name, output.code, output.shape) for output in outputs]
    with Writer(path, entries, metadata) as file:
        for output in outputs:
            reader, entry = base.reader(output.source), base.entry(output.source)
            if output.pieces:
                tensor = reader.read(output.source)
                file.write(merged(tensor, output.pieces, FLOATS[output.code], safe))
            else:
                for chunk in _chunks(reader, entry.start, entry.size):
                    if output.code != entry.code:
                        wide = chunk.view(FLOATS[entry.code])
                        chunk = wide.astype(FLOATS[output.code])
                    file.write(chunk)


def _chunks(reader: Reader, start: int, size: int) -> Iterable[np.ndarray]:
    """The bytes of a tensor, some at a time."""
    for at in range(start, start + size, _CHUNK):
        chunk = np.empty(min(_CHUNK, start + size - at), np.uint8)
        reader.read_into(at, chunk)
        yield chunk


def merged(
    tensor: np.ndarray,
    pieces: Sequence[tuple[Piece, float]],
    dtype: np.dtype,
    safe: bool,
) -> np.ndarray:
    """A tensor with its changes, as `merge` makes it on the CPU.

    Args:
        tensor: the base's; overwritten where the dtype stays.
        pieces: the changes and their multipliers.
        dtype: of the result.
        safe: refuse NaN and infinity.
    """
    result = tensor if tensor.dtype == dtype else np.empty(tensor.shape, dtype)
    turned = pieces[0][0].layout == "linear"
    ours, out = tensor, result
    if pieces[0][0].kernel:
        ours, out = (x.reshape(matrix_of(x.shape)) for x in (tensor, result))
    ours, out = (ours.T, out.T) if turned else (ours, out)  # (d_in, d_out)
    blocks = list(_blocks(ours.shape))
    # The last block overlaps the one before, and must see the base there.
    last = _block(ours[blocks[-1]], blocks[-1], pieces, dtype, safe)
    for rows in blocks[:-1]:
        out[rows] = _block(ours[rows], rows, pieces, dtype, safe)
    out[blocks[-1]] = last
    return result


def _blocks(shape: tuple[int, ...]) -> Iterable[slice]:
    """Blocks of rows, all of one size."""
    count = shape[0]
    rows = max(_FEWEST_ROWS, math.ceil(count / _BLOCKS / _FEWEST_ROWS) * _FEWEST_ROWS)
    if math.prod(shape) <= _WHOLE or rows >= count:
        rows = count
    for start in range(0, count - rows + 1, rows):
        yield slice(start, start + rows)
    if count % rows:
        yield slice(count - rows, count)


def _block(
    base: np.ndarray,
    rows: slice,
    pieces: Sequence[tuple[Piece, float]],
    dtype: np.dtype,
    safe: bool,
) -> np.ndarray:
    base = np.ascontiguousarray(base)
    if base.dtype != dtype:
        base = base.astype(np.float32)  # rounded once, to the new dtype
    name = pieces[0][0].tensor
    role = Role(_paths.escape(name), inputs=(0,), outputs=(1,))
    with jax.default_device(_cpu()):
        adapters = []
        for piece, _ in pieces:
            train = {"a": jnp.asarray(piece.a[rows]), "b": jnp.asarray(piece.b)}
            rank = jnp.asarray(piece.a.shape[-1], jnp.int32)
            fixed = Fixed(role, {"scale": jnp.asarray(piece.scale), "rank": rank})
            adapters.append(Adapter({name: train}, {name: fixed}))
        weights = [weight for _, weight in pieces]
        leaf = merge({name: jnp.asarray(base)}, *adapters, weights=weights, safe=safe)
        return np.asarray(leaf[name]).astype(dtype, copy=False)


def _cpu() -> Any:
    """The host, where the tensors are; an accelerator would only be a detour."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # a JAX that was told to use no CPU
        return None
