"""A model's folder as Transformers writes it: shards, their index, and the rest."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .._errors import CheckpointError
from .._json import read_json
from ._grown_tensor import GrownTensor
from ._safetensors import FLOATS, Entry, Reader

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

# Weights in any format: never copied, since they would be those before the merge.
_WEIGHTS = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".onnx_data",
)


class BaseFolder:
    """An open model folder.

    Attributes:
        path: where it is.
        config: its `config.json`.
        shards: the tensors of each file, in the order in which they lie there.
        metadata: what the index says beside the map; `None` if there is no index.
        changed: whether the configuration is another than the file's.
        grown: the tensors that have got rows for new tokens. They are seen with them
            everywhere; the files are as they were.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        readers: Mapping[str, Reader],
        metadata: dict[str, Any] | None,
        changed: bool = False,
    ):
        self.path = path
        self.config = config
        self.changed = changed
        self.metadata = metadata
        self.shards = {
            file: tuple(sorted(reader.entries, key=lambda n: reader.entries[n].start))
            for file, reader in readers.items()
        }
        self.grown: dict[str, GrownTensor] = {}
        self._readers = readers
        self._where = {n: file for file, names in self.shards.items() for n in names}

    def renamed(
        self, names: Callable[[str], Sequence[str]], config: dict[str, Any]
    ) -> "BaseFolder":
        """The folder with other names for its tensors, and another configuration.

        Args:
            names: gives the new names of a tensor: several, or none.
            config: what `config.json` will be.
        """
        readers = {
            file: reader.renamed(names) for file, reader in self._readers.items()
        }
        readers = {file: reader for file, reader in readers.items() if reader.entries}
        return BaseFolder(self.path, config, readers, self.metadata, changed=True)

    @property
    def tied(self) -> bool:
        """Whether the configuration says that the head shares the table of tokens."""
        return self.config.get("tie_word_embeddings") is True

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def entry(self, name: str) -> Entry:
        """Dtype, shape and place of a tensor; of one that has grown, as it will be."""
        entry = self.reader(name).entries[name]
        return self.grown[name].entry(entry) if name in self.grown else entry

    def reader(self, name: str) -> Reader:
        """The open file that holds a tensor."""
        return self._readers[self._where[name]]

    def file(self, name: str) -> str:
        """The name of the file that holds a tensor."""
        return self._where[name]

    def file_metadata(self, name: str) -> dict[str, str]:
        """The metadata in the header of the file that holds a tensor."""
        return self.reader(name).metadata

    def mapped(self, name: str) -> np.ndarray:
        """A floating tensor, read where it is touched and no earlier.

        One that has grown is read, and in memory.
        """
        return self.read(name) if name in self.grown else self._mapped(name)

    def read(self, name: str) -> np.ndarray:
        """A floating tensor, in memory of its own."""
        if name not in self.grown:
            return self.reader(name).read(name)
        return self.grown[name].values(self._mapped(name))

    def _mapped(self, name: str) -> np.ndarray:
        entry = self.reader(name).entries[name]
        dtype = FLOATS[entry.code]
        if not entry.size:
            return np.empty(entry.shape, dtype)
        return np.memmap(self.reader(name).path, dtype, "r", entry.start, entry.shape)


@contextlib.contextmanager
def open_base(path: str | os.PathLike) -> Iterator[BaseFolder]:
    """Opens a model's folder.

    Args:
        path: holds `config.json`, and `model.safetensors` or its shards and index.

    Raises:
        CheckpointError: if something of that is missing, damaged, or points elsewhere.
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        found = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else []
        raise CheckpointError(
            f"{path} is not a model's folder: it has no {CONFIG}. It holds {found}."
        )
    # Configurations of some models hold infinities, as Python writes them.
    config = read_json(path / CONFIG, finite=False)
    with contextlib.ExitStack() as stack:

        def opened(file: str) -> Reader:
            return stack.enter_context(Reader(path / file))

        if (path / INDEX).is_file():
            index = read_json(path / INDEX, finite=False)
            where = _weight_map(index, path / INDEX)
            readers = {file: opened(file) for file in sorted(set(where.values()))}
            metadata = index.get("metadata") or {}
            _check_map(where, readers, path / INDEX)
        elif (path / SINGLE).is_file():
            readers, metadata = {SINGLE: opened(SINGLE)}, None
        else:
            found = sorted(p.name for p in path.iterdir())[:8]
            raise CheckpointError(
                f"{path} holds neither {SINGLE} nor {INDEX}; it holds {found}. Weights "
                "in another format can be converted by loading and saving them with "
                "`transformers`."
            )
        yield BaseFolder(path, config, readers, metadata)


def _weight_map(index: dict[str, Any], where: Path) -> dict[str, str]:
    found = index.get("weight_map")
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{where} has no `weight_map`.")
    for name, file in found.items():
        plain = (
            isinstance(file, str)
            and PurePosixPath(file).name == file
            and file.endswith(".safetensors")
            and not set(file) & set("\\:\0")
        )
        if not plain:
            raise CheckpointError(
                f"{where} puts {name!r:.80} in {file!r:.80}. Shards are files beside "
                "the index; a path is refused, since it could lead anywhere."
            )
    return found


def _check_map(
    where: Mapping[str, str], readers: Mapping[str, Reader], index: Path
) -> None:
    held = {(name, file) for file, reader in readers.items() for name in reader.entries}
    odd = sorted(held ^ set(where.items()))
    if odd:
        name, file = odd[0]
        raise CheckpointError(
            f"{index} and the shards disagree about {len(odd)} tensors, such as "
            f"{name!r} in {file}."
        )


def rest(base: Path) -> Iterator[Path]:
    """Files that are no weights: tokenizer, templates, licenses; in folders too.

    Hidden files are left out, and so is `config.json`, which an export writes itself.
    """
    return (path for path in _no_weights(base) if path != base / CONFIG)


def _no_weights(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.endswith(_WEIGHTS):
            continue
        if path.is_dir():
            yield from _no_weights(path)
        elif path.is_file():
            yield path


def copy_rest(base: Path, out: Path) -> None:
    """Copies what `rest` finds."""
    for source in rest(base):
        target = out / source.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
