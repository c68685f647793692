"""Finding a checkpoint's files and reading tensors out of them, memory-mapped."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from .._errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# What `load` and `tokenizer` need of a hub repository: nothing below its root, and not
# Mistral's second copy of the weights under other names.
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_UNWANTED = ["*/*", "consolidated*"]

# safetensors' dtype names that a parameter may have.
FLOATS: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def find_folder(where: str | os.PathLike) -> Path:
    """The folder of a checkpoint, downloaded first if `where` is a hub id.

    Args:
        where: a folder, or a hub id `"owner/name"`.

    Returns:
        A folder that exists.

    Raises:
        CheckpointError: if it is neither.
    """
    folder = Path(where)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(
            f"{folder} is a file; a checkpoint is a folder that holds config.json and "
            f"{SINGLE}. Its folder is {folder.parent}."
        )
    if not isinstance(where, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", where):
        raise CheckpointError(
            f"{str(where)!r} is neither a folder nor a hub id of the form 'owner/name'."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(where, allow_patterns=_WANTED, ignore_patterns=_UNWANTED)
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{where!r} is not a folder, and downloading it from the hub failed: "
            f"{type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        CheckpointError: if it cannot be read or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path} holds a {type(found).__name__}, not a JSON object."
        )
    return found


class Tensors:
    """The tensors of one checkpoint by name: shapes at once, data when asked for."""

    def __init__(self, handles: dict[str, Any]):
        self._handles = handles

    @property
    def names(self) -> set[str]:
        """Every tensor's name."""
        return set(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header."""
        return tuple(self._handles[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """A tensor's dtype, from the header; quantized and integer ones are refused."""
        found = self._handles[name].get_slice(name).get_dtype()
        if found not in FLOATS:
            raise CheckpointError(
                f"{name} is stored as {found}; parameters must be one of "
                f"{', '.join(FLOATS)}."
            )
        return FLOATS[found]

    def read(self, name: str) -> np.ndarray:
        """A tensor's data."""
        return self._handles[name].get_tensor(name)


@contextmanager
def open_tensors(folder: Path) -> Iterator[Tensors]:
    """Opens a checkpoint's one file or all of its shards.

    Args:
        folder: holds `model.safetensors`, or `model.safetensors.index.json` and the
            files that it names.

    Yields:
        `Tensors`, valid inside the `with` block.

    Raises:
        CheckpointError: if there are no such files, one of them is damaged, or the
            index names a file outside the folder or a tensor that its file lacks.
    """
    with ExitStack() as stack:

        def opened(path: Path) -> Any:
            try:
                return stack.enter_context(safe_open(path, framework="np"))
            except FileNotFoundError:
                raise CheckpointError(f"{path} does not exist.") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} is not a readable safetensors file: {error}"
                ) from error

        if (folder / SINGLE).is_file():
            handle = opened(folder / SINGLE)
            yield Tensors(dict.fromkeys(handle.keys(), handle))
            return
        if not (folder / INDEX).is_file():
            found = sorted(path.name for path in folder.iterdir())[:8]
            raise CheckpointError(
                f"{folder} holds neither {SINGLE} nor {INDEX}; it holds {found}. "
                "Weights in PyTorch's .bin format can be converted by loading and "
                "saving them with `transformers`."
            )
        where = _weight_map(folder / INDEX)
        shards = {file: opened(folder / file) for file in sorted(set(where.values()))}
        held = {file: set(handle.keys()) for file, handle in shards.items()}
        for name, file in where.items():
            if name not in held[file]:
                raise CheckpointError(
                    f"{INDEX} says that {name} lies in {file}, which does not hold it."
                )
        yield Tensors({name: shards[file] for name, file in where.items()})


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, with every file name checked to be only that."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{index} has no `weight_map`.")
    for name, file in where.items():
        plain = (
            isinstance(file, str)
            and file not in ("", ".", "..")
            and PurePosixPath(file).name == file
            and not set(file) & set("\\:\0")
        )
        if not plain:
            raise CheckpointError(
                f"{index} puts {name} in {file!r}. Shards must be plain file names "
                "beside the index; a path is refused, since it could lead anywhere."
            )
    return where
