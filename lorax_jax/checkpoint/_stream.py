"""Writing one tensor of a merged checkpoint, with little of it in memory.

The sum `W + s A B` is taken in float32, which for a bfloat16 tensor is twice its size,
so it is taken in blocks. Their bytes must not depend on that. A matrix product's last
bits depend on which kernel the compiler picks for a shape, and on the CPU that choice
was found to hang on the columns of the result, and on its rows only where they are few:
in blocks of 64 rows or more, all of one size, every element comes out as in the whole
(14 shapes, ranks 4 to 128, 2 to 16 threads, JAX 0.10 and 0.12; blocks of 48 rows, or
of columns, do not). So blocks are of rows, and the last one overlaps the one before.
The gains of DoRA are those of whole columns, and taken first, of the whole tensor.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import AdapterError
from ..adapters import Adapted, Dora, LowRank, Origin, Rows, Term, bind
from ..merging import merged_weight
from ..structure import Factor
from ._base_folder import BaseFolder
from ._host import on_host
from ._piece import Piece, matrix_of
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
                tensor = base.read(output.source)
                file.write(merged(tensor, output.pieces, FLOATS[output.code], safe))
            elif output.source in base.grown:
                tensor = base.read(output.source)
                file.write(tensor.astype(FLOATS[output.code], copy=False))
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
    if any(piece.is_copy for piece, _ in pieces):
        return _vector(tensor, pieces, dtype, safe)
    if pieces[0][0].expert is not None:
        return _of_experts(tensor, pieces, dtype, safe)
    result = tensor if tensor.dtype == dtype else np.empty(tensor.shape, dtype)
    turned = pieces[0][0].layout == "linear"
    ours, out = tensor, result
    if pieces[0][0].kernel:
        ours, out = (x.reshape(matrix_of(x.shape)) for x in (tensor, result))
    ours, out = (ours.T, out.T) if turned else (ours, out)  # (d_in, d_out)
    with on_host():
        terms = _terms(ours, pieces)
        origin = Origin(pieces[0][0].path)

        def block(rows: slice) -> np.ndarray:
            base = np.ascontiguousarray(ours[rows])
            if base.dtype != dtype:
                base = base.astype(np.float32)  # rounded once, to the new dtype
            inside = tuple(_within(term, rows) for term in terms)
            weight = Adapted(jnp.asarray(base), inside, origin)
            found = merged_weight(weight, safe=safe)
            return np.asarray(found).astype(dtype, copy=False)

        blocks = list(_blocks(ours.shape))
        # The last block overlaps the one before, and must see the base there.
        last = block(blocks[-1])
        for rows in blocks[:-1]:
            out[rows] = block(rows)
        out[blocks[-1]] = last
    return result


def _of_experts(
    tensor: np.ndarray,
    pieces: Sequence[tuple[Piece, float]],
    dtype: np.dtype,
    safe: bool,
) -> np.ndarray:
    """A tensor of experts, one after the other."""
    result = tensor if tensor.dtype == dtype else np.empty(tensor.shape, dtype)
    for expert in range(len(tensor)):
        own = [
            (dataclasses.replace(piece, expert=None), weight)
            for piece, weight in pieces
            if piece.expert == expert
        ]
        result[expert] = merged(tensor[expert], own, dtype, safe)
    return result


def _terms(ours: np.ndarray, pieces: Sequence[tuple[Piece, float]]) -> tuple[Term, ...]:
    """What acts on a weight, as `bind` makes it."""
    path = pieces[0][0].path
    weight: Any = jax.ShapeDtypeStruct(ours.shape, ours.dtype)
    if any(piece.kind == "dora" for piece, _ in pieces):
        weight = jnp.asarray(np.ascontiguousarray(ours))
    adapters = [piece.adapter(weight) for piece, _ in pieces]
    bound = bind({path: weight}, *adapters, weights=[weight for _, weight in pieces])
    return bound[path].terms


def _within(term: Term, rows: slice) -> Term:
    """A term for some rows of the weight."""
    if isinstance(term, Dora):
        low = _within(term.low, rows)
        assert isinstance(low, LowRank)
        return dataclasses.replace(term, low=low)
    if isinstance(term, LowRank):
        a = Factor(term.a.array[rows], term.a.axes)
        return dataclasses.replace(term, a=a)
    assert isinstance(term, Rows)
    if term.axis == 1:
        return Rows(Factor(term.rows.array[:, rows], term.rows.axes), term.ids)
    ids = np.asarray(term.ids.array)
    inside = (ids >= rows.start) & (ids < rows.stop)
    return Rows(
        Factor(term.rows.array[inside], term.rows.axes),
        Factor(jnp.asarray(ids[inside] - rows.start), term.ids.axes),
    )


def _vector(
    tensor: np.ndarray,
    pieces: Sequence[tuple[Piece, float]],
    dtype: np.dtype,
    safe: bool,
) -> np.ndarray:
    """A trained copy of the tensor, or the tensor, with biases of B added."""
    copies = [piece for piece, _ in pieces if piece.kind == "whole"]
    shifts = [(piece, weight) for piece, weight in pieces if piece.kind == "shift"]
    name = pieces[0][0].tensor
    if len(copies) > 1 or len(copies) + len(shifts) < len(pieces):
        raise AdapterError(
            f"{name} is trained whole, and adapted by another adapter too. Leave it "
            "out of one of the two."
        )
    if copies and pieces[[p for p, _ in pieces].index(copies[0])][1] != 1:
        raise AdapterError(
            f"`weights` multiplies {name}, where the adapter is a leaf trained whole: "
            "that has no multiple. Merge it with the weight 1."
        )
    total = tensor
    if copies:
        # In the base's dtype, as the model saw it.
        total = copies[0].arrays["whole"].astype(tensor.dtype)
    for piece, weight in shifts:
        scale = piece.scale * np.float32(weight)
        bias = piece.arrays["bias"].astype(np.float32) * scale
        total = (total.astype(np.float32) + bias).astype(tensor.dtype)
    total = total.astype(dtype)
    if safe and not np.isfinite(total).all():
        raise AdapterError(
            f"Merging into {name!r} gives NaN or infinity. Nothing was changed; check "
            "the adapter's factors and scale."
        )
    return total


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
