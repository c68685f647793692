"""The safetensors format: a header that is checked before anything is allocated, and
files written one tensor, or one piece of a tensor, at a time.

A file is eight bytes with the header's length, the header as JSON, and the tensors'
bytes back to back. The header gives each tensor's dtype, shape and byte range.
"""

import copy
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import ml_dtypes
import numpy as np

from .._errors import CheckpointError, shorten
from .._json import parse_json

# Bits of one element, by the format's dtype names.
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

# The dtypes that weights and factors may have.
FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in FLOATS.items()}

# The format's own limit on headers, and more tensors than a trillion-parameter
# mixture of experts has. An adapter's limits are tighter.
MOST_HEADER = 100_000_000
MOST_TENSORS = 1_000_000
_MOST_AXES = 16


class Entry(NamedTuple):
    """One tensor of a file.

    Attributes:
        code: the format's name of its dtype.
        shape: its shape.
        start: where its bytes start in the file.
        size: how many there are.
    """

    code: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def dtype(self) -> np.dtype | None:
        """Its dtype where that is floating, else `None`."""
        return FLOATS.get(self.code)


class Reader:
    """An open safetensors file: all shapes at once, data when asked for.

    The header is validated whole when the file is opened: its length against the
    file's, every byte range against its shape and its neighbors. No more is allocated
    than the header's own size.

    Args:
        path: the file.
        header: the most bytes that its header may have.
        tensors: the most tensors that it may hold.

    Raises:
        CheckpointError: if it is not a safetensors file, or exceeds the limits.
    """

    def __init__(
        self, path: Path, *, header: int = MOST_HEADER, tensors: int = MOST_TENSORS
    ):
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        try:
            self.entries, self.metadata = self._header(header, tensors)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def renamed(self, names: Callable[[str], Sequence[str]]) -> Self:
        """The same file with other names for its tensors; several, or none."""
        other = copy.copy(self)
        other.entries = {
            new: entry for name, entry in self.entries.items() for new in names(name)
        }
        return other

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, name: str) -> np.ndarray:
        """A floating tensor's data, in memory of its own."""
        entry = self.entries[name]
        if entry.dtype is None:
            raise CheckpointError(
                f"{self.path.name} stores {name!r} as {entry.code}; one of "
                f"{', '.join(FLOATS)} is needed."
            )
        out = np.empty(entry.shape, entry.dtype)
        self.read_into(entry.start, out)
        return out

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fills a contiguous array with the bytes at `start`."""
        view = memoryview(out.reshape(-1).view(np.uint8).data)
        self._file.seek(start)
        while view:
            count = self._file.readinto(view)
            if not count:
                raise CheckpointError(f"{self.path} ended while it was being read.")
            view = view[count:]

    def _header(
        self, most_bytes: int, most_tensors: int
    ) -> tuple[dict[str, Entry], dict[str, str]]:
        whole = os.fstat(self._file.fileno()).st_size
        length = np.zeros(1, "<u8")
        if whole < 8:
            raise self._bad(f"it has {whole} bytes")
        self.read_into(0, length)
        size = int(length[0])
        if size > min(whole - 8, most_bytes):
            raise self._bad(
                f"its header claims {size:,} bytes, of a file of {whole:,}; at most "
                f"{most_bytes:,} are read"
            )
        text = np.zeros(size, np.uint8)
        self.read_into(8, text)
        found = parse_json(text.tobytes(), f"The header of {self.path}")
        if not isinstance(found, dict):
            raise self._bad("its header is no object")
        metadata = found.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise self._bad("its metadata is no object of strings")
        if len(found) > most_tensors:
            raise self._bad(
                f"it holds {len(found):,} tensors; at most {most_tensors:,} are read"
            )
        start = 8 + size
        entries = {name: self._entry(name, e, start) for name, e in found.items()}
        at = start
        for name, entry in sorted(entries.items(), key=lambda e: (e[1][2], e[1][3])):
            if entry.start != at:
                raise self._bad(
                    f"{name!r} starts at byte {entry.start - start:,} of the data and "
                    f"the tensor before it ends at {at - start:,}: they overlap or "
                    "leave a hole"
                )
            at += entry.size
        if at != whole:
            raise self._bad(f"its tensors end at byte {at:,} of {whole:,}")
        return entries, metadata

    def _entry(self, name: str, found: Any, start: int) -> Entry:
        shown = f"{name!r:.120}"
        if not isinstance(found, dict) or set(found) != {
            "dtype",
            "shape",
            "data_offsets",
        }:
            raise self._bad(f"{shown} is not described by dtype, shape and offsets")
        code, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
        if code not in _BITS:
            raise self._bad(f"{shown} has the dtype {code!r:.40}, which is not known")
        if not _sizes(shape) or len(shape) > _MOST_AXES:
            raise self._bad(f"{shown} has the shape {shape!r:.80}")
        if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._bad(f"{shown} has the offsets {offsets!r:.80}")
        bits, size = math.prod(shape) * _BITS[code], offsets[1] - offsets[0]
        if bits != 8 * size:
            raise self._bad(
                f"{shown} of shape {tuple(shape)} and dtype {code} needs {bits // 8:,} "
                f"bytes and has {size:,}"
            )
        return Entry(code, tuple(shape), start + offsets[0], size)

    def _bad(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a readable safetensors file: {why}."
        )


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 48
        for n in values
    )


class Writer:
    """Writes a safetensors file front to back, holding none of it.

    Args:
        path: the file; it must not exist.
        tensors: `(name, code, shape)` of every tensor, in the order they will come.
        metadata: strings for the header.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "w.safetensors"
        >>> with Writer(path, [("w", "F32", (2,))], {"format": "pt"}) as file:
        ...     file.write(np.ones(2, np.float32))
        >>> with Reader(path) as file:
        ...     file.read("w"), file.metadata
        (array([1., 1.], dtype=float32), {'format': 'pt'})
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ):
        header, end = describe(tensors, metadata)
        self.path = path
        self._left = end
        self._file = open(path, "xb")  # noqa: SIM115
        self._file.write(header)

    def write(self, data: np.ndarray) -> None:
        """Appends the bytes of an array: a tensor, or the next rows of one."""
        flat = np.ascontiguousarray(data).reshape(-1)
        self._left -= flat.nbytes
        self._file.write(flat.view(np.uint8).data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                assert self._left == 0, f"{self._left} bytes of {self.path} missing"
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


def describe(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, int]:
    """The bytes before the data, and how many bytes of data follow."""
    import json

    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, code, shape in tensors:
        end = at + math.prod(shape) * _BITS[code] // 8
        entry = {"dtype": code, "shape": list(shape), "data_offsets": [at, end]}
        table[name] = entry
        at = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of eight
    return struct.pack("<Q", len(text)) + text, at


def code_of(dtype: Any) -> str:
    """The format's name of a floating dtype.

    Raises:
        CheckpointError: if it has none.
    """
    code = _CODES.get(np.dtype(dtype))
    if code is None:
        raise CheckpointError(
            f"{np.dtype(dtype)} arrays are not written to safetensors files here; use "
            f"one of {shorten([str(d) for d in _CODES])}."
        )
    return code
