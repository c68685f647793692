"""Our reader and writer against the format's own library, and against bad files."""

import json
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lorax_jax._errors import CheckpointError
from lorax_jax.checkpoint._safetensors import Reader, Writer, code_of

_DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)


def raw(tmp_path, header, data=b"", length=None):
    """A file with this header, whatever it says."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    size = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + header + data)
    return path


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_what_they_write_we_read(tmp_path_factory, data):
    tensors = {}
    for i in range(data.draw(st.integers(0, 5))):
        shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
        dtype = data.draw(st.sampled_from(_DTYPES))
        tensors[f"t{i}.é"] = (
            np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
        )
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "a": "b"})
    with Reader(path) as file:
        assert file.metadata == {"format": "pt", "a": "b"}
        assert set(file.entries) == set(tensors)
        for name, tensor in tensors.items():
            found = file.read(name)
            assert found.dtype == tensor.dtype and np.array_equal(found, tensor)


@pytest.mark.parametrize("dtype", _DTYPES)
def test_what_we_write_they_read(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    tensors = {
        "b": np.arange(6).reshape(2, 3).astype(dtype),
        "a.ü": np.arange(3).astype(dtype),
        "none": np.zeros((0, 4), dtype),
    }
    entries = [(n, code_of(t.dtype), t.shape) for n, t in tensors.items()]
    with Writer(path, entries, {"format": "pt", "x": '{"y": 1}'}) as file:
        file.write(tensors["b"][:1])  # in pieces
        file.write(tensors["b"][1:])
        file.write(tensors["a.ü"])
        file.write(tensors["none"])
    assert {n: t.tolist() for n, t in load_file(path).items()} == {
        n: t.tolist() for n, t in tensors.items()
    }
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt", "x": '{"y": 1}'}


def test_a_writer_that_was_given_too_little_says_so(tmp_path):
    writer = Writer(tmp_path / "x.safetensors", [("a", "F32", (2,))], {})
    with pytest.raises(AssertionError, match="4 bytes of .* missing"), writer:
        writer.write(np.zeros(1, np.float32))


def test_dtypes_that_no_factor_has(tmp_path):
    with pytest.raises(CheckpointError, match="int8 arrays are not written"):
        code_of(np.int8)
    path = tmp_path / "x.safetensors"
    save_file({"i": np.zeros(2, np.int32)}, path)
    with Reader(path) as file:
        assert file.entries["i"].code == "I32" and file.entries["i"].dtype is None
        with pytest.raises(CheckpointError, match="stores 'i' as I32; one of F64, F32"):
            file.read("i")


HOSTILE = {
    "empty file": (lambda p: (p / "x.safetensors").write_bytes(b""), "it has 0 bytes"),
    "short": (
        lambda p: (p / "x.safetensors").write_bytes(b"1234567"),
        "it has 7 bytes",
    ),
    "header beyond the file": (
        lambda p: raw(p, {}, length=1 << 62),
        "its header claims 4,611,686,018,427,387,904 bytes",
    ),
    "huge header": (
        lambda p: raw(p, b" " * 5000),
        "its header claims 5,000 bytes, of a file of 5,008; at most 4,096 are read",
    ),
    "no JSON": (lambda p: raw(p, b"\x80\x02]q\x00."), "is not JSON"),
    "no object": (lambda p: raw(p, b"[1]"), "its header is no object"),
    "deep": (lambda p: raw(p, b"[" * 4000), "(nests too deeply|is not JSON)"),
    "twice": (
        lambda p: raw(p, b'{"a": {}, "a": {}}'),
        "repeats the key 'a'",
    ),
    "metadata": (
        lambda p: raw(p, {"__metadata__": {"a": 1}}),
        "its metadata is no object of strings",
    ),
    "many": (
        lambda p: raw(p, {str(i): 0 for i in range(20)}),
        "it holds 20 tensors; at most 16 are read",
    ),
    "fields": (
        lambda p: raw(p, {"a": {"dtype": "F32"}}),
        "'a' is not described by dtype, shape and offsets",
    ),
    "dtype": (
        lambda p: raw(p, {"a": entry(dtype="OBJECT")}, b"0" * 8),
        "'a' has the dtype 'OBJECT', which is not known",
    ),
    "shape": (
        lambda p: raw(p, {"a": entry(shape=(-2,))}, b"0" * 8),
        r"'a' has the shape \[-2\]",
    ),
    "shape of floats": (
        lambda p: raw(p, {"a": entry(shape=(2.0,))}, b"0" * 8),
        r"'a' has the shape \[2.0\]",
    ),
    "axes": (
        lambda p: raw(p, {"a": entry(shape=(1,) * 40, offsets=(0, 4))}, b"0" * 4),
        "'a' has the shape",
    ),
    "rank 1e9": (
        lambda p: raw(p, {"a": entry(shape=(10**9, 10**9))}, b"0" * 8),
        "needs 4,000,000,000,000,000,000 bytes and has 8",
    ),
    "backwards": (
        lambda p: raw(p, {"a": entry(offsets=(8, 0))}, b"0" * 8),
        r"'a' has the offsets \[8, 0\]",
    ),
    "three offsets": (
        lambda p: raw(p, {"a": entry(offsets=(0, 8, 9))}, b"0" * 8),
        "'a' has the offsets",
    ),
    "size": (
        lambda p: raw(p, {"a": entry(offsets=(0, 12))}, b"0" * 12),
        r"'a' of shape \(2,\) and dtype F32 needs 8 bytes and has 12",
    ),
    "overlap": (
        lambda p: raw(p, {"a": entry(), "b": entry(offsets=(4, 12))}, b"0" * 12),
        "'b' starts at byte 4 of the data and the tensor before it ends at 8",
    ),
    "same bytes": (
        lambda p: raw(p, {"a": entry(), "b": entry()}, b"0" * 8),
        "they overlap or leave a hole",
    ),
    "hole": (
        lambda p: raw(p, {"a": entry(offsets=(8, 16))}, b"0" * 16),
        "they overlap or leave a hole",
    ),
    "trailing": (lambda p: raw(p, {"a": entry()}, b"0" * 9), "its tensors end at byte"),
    "cut off": (lambda p: raw(p, {"a": entry()}, b"0" * 7), "its tensors end at byte"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path, case):
    write, message = HOSTILE[case]
    write(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message):
            Reader(tmp_path / "x.safetensors", header=4096, tensors=16)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read: .*No such file"):
        Reader(tmp_path / "x.safetensors")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.zeros(100, np.float32)}, path)
    with Reader(path) as file:
        with open(path, "r+b") as other:
            other.truncate(200)
        with pytest.raises(CheckpointError, match="ended while it was being read"):
            file.read("a")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_any_changed_byte_is_an_error_or_another_value(tmp_path_factory, at, byte):
    """Never a crash of another kind, whatever a file says."""
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(1, np.float16)}, path)
    text = bytearray(path.read_bytes())
    text[at % len(text)] = byte
    path.write_bytes(text)
    try:
        with Reader(path) as file:
            for name in file.entries:
                file.read(name)
    except CheckpointError:
        pass
