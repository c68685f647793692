"""`export_merged`: an adapter merged into a checkpoint, one tensor at a time."""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._errors import CheckpointError
from .._growth import Growth
from .._json import read_json
from .._names import NameMap
from .._ranges import Ranges, checked_ranges
from ..adapters import Adapter
from ._atomic import check_space, replacing
from ._base_folder import CONFIG, INDEX, SINGLE, BaseFolder, copy_rest, open_base, rest
from ._beside import replace_tokenizer, tokenizer_of
from ._files import layer_replication as read_replication
from ._grow_base import grow_base
from ._onto_base import TOKEN_TABLES
from ._piece import HEAD, Piece
from ._pieces import pieces_of
from ._repeated import repeated
from ._safetensors import FLOATS, code_of
from ._stream import Output, write_file

# Written into every export, so that a later one may replace it.
MARK = "lorax_jax_export.json"


class Export(NamedTuple):
    """What `export_merged` wrote.

    Attributes:
        merged: tensors that an adapter changed.
        copied: how many it did not.
        untied: whether the head got a tensor of its own.
    """

    merged: tuple[str, ...]
    copied: int
    untied: bool


def export_merged(
    base_dir: str | os.PathLike,
    adapter: Any,
    out_dir: str | os.PathLike,
    *,
    names: Any = None,
    weights: Sequence[float] | float | None = None,
    layer_replication: Any = None,
    dtype: Any = None,
    max_shard_size: int | str | None = None,
    safe: bool = True,
    overwrite: bool = False,
    grown: Growth | None = None,
    tokenizer: Any = None,
) -> Export:
    r"""Writes the model that an adapter makes of a checkpoint, as a checkpoint.

    $$W' = \operatorname{round}\Big(W + \sum_i w_i\,s_i\,A_i B_i\Big)$$

    Reads and writes safetensors, one tensor in memory at a time and its sum in float32
    in blocks, so the peak stays below twice the largest tensor and the adapter. The
    bytes are those that `merge` gives on the CPU. Tensors that no adapter changes are
    copied bit for bit, and so is every other file that holds no weights.

    A tied table adapted for both its uses stays tied. Adapted for one of them, the head
    gets a tensor of its own, and `tie_word_embeddings` in `config.json` becomes false.

    Where an adapter was trained on a vocabulary that had grown, the tables grow alike
    and `vocab_size` says so. The tokenizer of an adapter's folder takes the place of
    the base's if the adapter trains rows of tables.

    Args:
        base_dir: the model's folder: `config.json` and safetensors.
        adapter: an `Adapter`, the folder of one, or a list of those.
        out_dir: the folder to write. It appears whole or not at all.
        names: the model's name table, a `NameMap` or its entries. Folders with PEFT's
            keys do without.
        weights: one multiplier for each adapter; `None` is 1 for all.
        layer_replication: the ranges that `replicate` was given, for an `Adapter` of a
            model whose layers are repeated; folders say it themselves. The checkpoint
            then has as many layers as the adapter, each with tensors of its own.
        dtype: of all floating tensors; `None` keeps each one's.
        max_shard_size: bytes per file, or a text such as `"5GB"`; `None` keeps the
            base's files.
        safe: refuse if a merged tensor holds NaN or infinity.
        overwrite: replace `out_dir` even if it holds something else than an earlier
            export.
        grown: how the parameters grew that an `Adapter` was trained on; its folder says
            so itself.
        tokenizer: instead of the base's, or a folder's: what has `save_pretrained`, or
            a folder to copy a tokenizer's files from.

    Returns:
        An `Export`.

    Raises:
        CheckpointError: if something does not fit, or `out_dir` is in use. Nothing is
            written then.
        AdapterError: if an adapter cannot be merged; with `safe`, see there.

    Example:
        >>> import lorax_jax as lj
        >>> lj.export_merged("SmolLM2-135M", "my-adapter", "out")  # doctest: +SKIP
    """
    several = isinstance(adapter, list | tuple) and not isinstance(adapter, Adapter)
    adapters: list[Any] = list(adapter) if several else [adapter]
    if isinstance(weights, int | float):
        weights = [weights]
    if not adapters or (weights is not None and len(weights) != len(adapters)):
        count = "no" if weights is None else len(weights)
        raise CheckpointError(
            f"`weights` has {count} entries for {len(adapters)} adapters. Give one "
            "adapter or more, and a multiplier for each in the same order."
        )
    table = None if names is None else NameMap.of(names)
    wanted = None if dtype is None else code_of(jnp.dtype(dtype))
    limit = None if max_shard_size is None else _bytes(max_shard_size)
    folders = [one for one in adapters if isinstance(one, str | os.PathLike)]
    _check_out([base_dir, *folders], out_dir, overwrite)
    ranges = _replication(folders, layer_replication)
    with open_base(base_dir) as base:
        base = base if ranges is None else repeated(base, ranges)
        growth = grow_base(base, folders, table, grown)
        if tokenizer is None:
            tokenizer = tokenizer_of(folders)
        changes = _Changes(base, table)
        for one, weight in zip(adapters, weights or [1.0] * len(adapters), strict=True):
            changes.pieces += [(p, float(weight)) for p in pieces_of(one, base, table)]
        outputs = changes.outputs(wanted)
        sizes = {output.name: _size(output, base) for output in outputs}
        files = _files(outputs, sizes, base, limit)
        check_space(out_dir, _needed(base, outputs))
        with replacing(out_dir, keep=False) as folder:
            for file, group in files.items():
                write_file(folder / file, base, group, safe=safe)
            copy_rest(base.path, folder)
            if tokenizer is not None:
                replace_tokenizer(folder, tokenizer)
            _write_config(folder, base, changes.untied, wanted, growth)
            if len(files) > 1 or (base.metadata is not None and limit is None):
                _write_index(folder, base, files, sum(sizes.values()))
            merged = tuple(output.name for output in outputs if output.pieces)
            mark = {"base": str(base_dir), "merged": sorted(merged)}
            mark["files"] = _files_in(folder)
            (folder / MARK).write_text(json.dumps(mark, indent=2) + "\n")
        return Export(merged, len(outputs) - len(merged), changes.untied)


def _replication(folders: Sequence[Any], given: Any) -> Ranges | None:
    """How the layers are repeated of the model that all adapters are for."""
    said = {str(folder): read_replication(folder) for folder in folders}
    if given is not None:
        said["`layer_replication`"] = checked_ranges(given, "`layer_replication`")
    if len(set(said.values())) > 1:
        shown = "; ".join(f"{ranges} by {who}" for who, ranges in said.items())
        raise CheckpointError(
            f"The adapters are for models whose layers are repeated in different ways: "
            f"{shown}. Merge adapters of one model."
        )
    return next(iter(said.values()), None)


def check_export(base_dir: str | os.PathLike, out_dir: str | os.PathLike) -> int:
    """Raises what `export_merged` would, as far as that is known without an adapter.

    Args:
        base_dir: the model's folder.
        out_dir: the folder to write.

    Returns:
        How many bytes an export of an adapter that changes no dtype and unties no head
        takes.

    Raises:
        CheckpointError: if the base cannot be read, or `out_dir` is in use.
    """
    _check_out([base_dir], out_dir, overwrite=False)
    with open_base(base_dir) as base:
        return _needed(base, _Changes(base, None).outputs(None))


def _needed(base: BaseFolder, outputs: Sequence[Output]) -> int:
    """Bytes of an export: tensors, what is copied, and some for the JSON beside."""
    tensors = sum(_size(output, base) for output in outputs)
    return tensors + sum(path.stat().st_size for path in rest(base.path)) + (1 << 20)


Added = tuple[tuple[Piece, float], ...]


class _Changes:
    """What is added to which tensor, and what becomes of a tie."""

    def __init__(self, base: BaseFolder, names: NameMap | None):
        self.base = base
        self.head = HEAD if names is None else f"{names.head}.weight"
        self.pieces: list[tuple[Piece, float]] = []

    @property
    def untied(self) -> bool:
        """Whether a tie must be given up: one use of the table is adapted alone."""
        return _has_head(self.base.config) and any(p.use for p, _ in self.pieces)

    def outputs(self, code: str | None) -> list[Output]:
        """Every tensor of the new checkpoint, in the order of the old one."""
        base, table, found = self.base, self._table(), []
        on: dict[str, Added] = {}
        for piece, weight in self.pieces:
            on[piece.tensor] = (*on.get(piece.tensor, ()), (piece, weight))
        for name in base:
            entry = base.entry(name)
            new = entry.code if code is None or entry.code not in FLOATS else code
            source, pieces = name, on.get(name, ())
            if name == self.head and table is not None:
                source = table
                pieces = self._on_head(table) if self.untied else on.get(table, ())
            found.append(Output(name, source, new, entry.shape, pieces))
            if name == table and self.untied and self.head not in base:
                self._check_prefix(name)
                head = self._on_head(name)
                found.append(Output(self.head, name, new, entry.shape, head))
        return found

    def _table(self) -> str | None:
        """The table that the head is tied to, as far as any change concerns it."""
        for piece, _ in self.pieces:
            if piece.use == "lookup":
                return piece.tensor
            if piece.use == "head" and piece.source != self.head:
                return piece.source
        if self.head in self.base and not self.base.tied:
            return None
        names = (p.tensor for p, _ in self.pieces if p.layout == "same")
        return next((n for n in names if n.split(".")[-2] in TOKEN_TABLES), None)

    def _on_head(self, table: str) -> Added:
        """What is added to the head of a tied model that is untied."""
        found = []
        for piece, weight in self.pieces:
            if piece.tensor == self.head:
                found.append((piece, weight))
            elif piece.tensor == table and piece.use is None:
                found.append((piece.on_head(self.head), weight))
        return tuple(found)

    def _check_prefix(self, table: str) -> None:
        """A checkpoint of the model without its head has no place for one."""
        bare = ("h.", "layers.", "wte.", "embed_tokens.")
        if table.startswith(bare):
            raise CheckpointError(
                f"The adapter acts in one use of {table} only, so the head needs a "
                f"tensor of its own, and {self.base.path} is a checkpoint without a "
                "head. Load it with Transformers' class that has one and save it."
            )


def _has_head(config: dict[str, Any]) -> bool:
    """Whether the architecture ends in a language model's head."""
    found = config.get("architectures") or []
    return not found or any("LM" in a or "Generation" in a for a in map(str, found))


def _check_out(
    inputs: Sequence[str | os.PathLike], out: str | os.PathLike, overwrite: bool
) -> None:
    final = Path(os.path.realpath(out))
    for folder in (Path(os.path.realpath(path)) for path in inputs):
        if final == folder or final in folder.parents or folder in final.parents:
            raise CheckpointError(
                f"`out_dir` = {out} and {folder} are one folder, or one lies in the "
                "other. The export is written to a folder of its own."
            )
    if final.is_dir() and not overwrite:
        others = sorted(set(_files_in(final)) - _earlier(final))
        if others:
            raise CheckpointError(
                f"`out_dir` = {out} holds {others[:4]}, not written by an earlier "
                "export. Choose another folder, or say `overwrite=True` to replace it."
            )


def _earlier(folder: Path) -> set[str]:
    """The files that an earlier export wrote into a folder."""
    try:
        return {MARK, *read_json(folder / MARK)["files"]}
    except (CheckpointError, KeyError, TypeError):
        return set()


def _files_in(folder: Path) -> list[str]:
    """Every file below a folder, as seen from there, and every empty folder."""
    found = (p for p in folder.rglob("*") if not p.is_dir() or not any(p.iterdir()))
    return sorted(path.relative_to(folder).as_posix() for path in found)


def _bytes(size: int | str) -> int:
    """A number of bytes from a number or a text.

    >>> _bytes("5GB"), _bytes("1.5 MB"), _bytes(10)
    (5000000000, 1500000, 10)
    """
    if isinstance(size, int) and size > 0:
        return size
    found = re.fullmatch(r"([0-9.]+)\s*([KMGT]?)(i?)B", str(size), re.IGNORECASE)
    try:
        assert found is not None
        step = 1024 if found[3] else 1000
        result = int(float(found[1]) * step ** " KMGT".index(found[2].upper() or " "))
        assert result > 0
    except (AssertionError, ValueError):
        raise CheckpointError(
            f"`max_shard_size` = {size!r} is no number of bytes. Write e.g. '5GB'."
        ) from None
    return result


def _size(output: Output, base: BaseFolder) -> int:
    if output.code not in FLOATS:
        return base.entry(output.source).size
    return math.prod(output.shape) * FLOATS[output.code].itemsize


def _files(
    outputs: Sequence[Output],
    sizes: dict[str, int],
    base: BaseFolder,
    limit: int | None,
) -> dict[str, list[Output]]:
    """Which tensors go into which file."""
    if limit is None:
        found: dict[str, list[Output]] = {}
        for output in outputs:
            found.setdefault(base.file(output.source), []).append(output)
        return found
    groups: list[list[Output]] = []
    room = 0
    for output in outputs:
        if not groups or sizes[output.name] > room:
            groups.append([])
            room = limit
        groups[-1].append(output)
        room -= sizes[output.name]
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups, 1)
    }


def _write_config(
    folder: Path,
    base: BaseFolder,
    untied: bool,
    code: str | None,
    growth: Growth | None,
) -> None:
    config = dict(base.config)
    changed: dict[str, Any] = {"tie_word_embeddings": False} if untied else {}
    if growth is not None:
        changed["vocab_size"] = growth.after
    config |= changed
    if changed and isinstance(config.get("text_config"), dict):
        config["text_config"] = config["text_config"] | changed
    if code is not None:
        field = "torch_dtype" if "torch_dtype" in config else "dtype"
        names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        config[field] = names.get(code, str(np.dtype(FLOATS[code])))
    if config == base.config and not base.changed:
        (folder / CONFIG).write_bytes((base.path / CONFIG).read_bytes())
    else:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _write_index(
    folder: Path, base: BaseFolder, files: dict[str, list[Output]], size: int
) -> None:
    index = {
        "metadata": {**(base.metadata or {}), "total_size": size},
        "weight_map": dict(
            sorted((o.name, file) for file, group in files.items() for o in group)
        ),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
