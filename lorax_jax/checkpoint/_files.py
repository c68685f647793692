"""Opening an adapter's folder: the two files, checked before anything is read."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .. import _peft
from .._errors import CheckpointError, shorten
from .._json import parse_json, read_json
from .._ranges import Ranges
from ._copies import adapted_modules, tensor_name
from ._fused import tiled
from ._record import FIELD, Record, decode
from ._safetensors import Reader

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
# `peft_type` of files whose keys are our paths: PEFT refuses a type that it does not
# know, where it would silently skip keys that it does not know.
OURS = "LORAX_JAX"

# An adapter on every expert of a large mixture has some 100,000 tensors.
_MOST_HEADER = 32 << 20
_MOST_TENSORS = 200_000


class AdapterFiles(NamedTuple):
    """An adapter's folder, open.

    Attributes:
        folder: where it is.
        config: the fields of `adapter_config.json`; empty if there is none.
        tensors: the open file of tensors.
        record: our metadata, or `None` in a file that others wrote.
    """

    folder: Path
    config: dict[str, Any]
    tensors: Reader
    record: Record | None

    @property
    def what(self) -> str:
        """What to call the configuration in messages."""
        return str(self.folder / CONFIG)

    @property
    def layer_replication(self) -> Ranges | None:
        """The ranges of layers that the adapter's model is made of."""
        if self.record is not None:
            return self.record.layer_replication
        return _peft.layer_replication(self.config, self.what)


@contextlib.contextmanager
def open_adapter(folder: str | os.PathLike) -> Iterator[AdapterFiles]:
    """Opens an adapter's folder.

    Nothing in it is executed and no path in it is followed. The configuration must ask
    for nothing that is not known, and if the file of tensors has metadata of ours, the
    two must agree about every rank, scale and kind.

    Args:
        folder: holds `adapter_model.safetensors`, and `adapter_config.json` unless the
            tensors carry our metadata.

    Raises:
        CheckpointError: if anything about it is not as it should be.
    """
    folder = Path(folder)
    if not (folder / TENSORS).is_file():
        raise CheckpointError(_absent(folder))
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    limits = {"header": _MOST_HEADER, "tensors": _MOST_TENSORS}
    with Reader(folder / TENSORS, **limits) as tensors:
        text = tensors.metadata.get(FIELD)
        what = str(folder / TENSORS)
        record = None
        if text is not None:
            parsed = parse_json(text.encode(), f"The metadata of {what}")
            record = decode(parsed, what)
            if not tiled(record.sites):
                raise CheckpointError(
                    f"The metadata of {what} gives ranks of a module to none of its "
                    "parts, or to two: the file was changed or damaged."
                )
        files = AdapterFiles(folder, config, tensors, record)
        if record is None and not config:
            raise CheckpointError(
                f"{folder} has no {CONFIG}, so the ranks and scales of its factors are "
                "not known. Put the file that was saved with them beside them."
            )
        if config and (record is None or record.keys == "peft"):
            _peft.check_fields(config, files.what)
            if record is not None:
                _check_agreement(files, record)
        yield files


def layer_replication(folder: str | os.PathLike) -> Ranges | None:
    """How the layers are repeated of the model that an adapter is for.

    Args:
        folder: the adapter's.

    Returns:
        The ranges that `replicate` takes, or `None`.

    Raises:
        CheckpointError: if the folder holds no adapter that can be read.
    """
    with open_adapter(folder) as files:
        return files.layer_replication


def _absent(folder: Path) -> str:
    if (folder / PICKLE).is_file():
        return (
            f"{folder} holds {PICKLE}, a pickle, which runs code when it is read, and "
            f"no {TENSORS}. Open it where you trust it and save it with "
            "`safe_serialization=True`."
        )
    if not folder.is_dir():
        return f"{folder} is no folder. An adapter is a folder that holds {TENSORS}."
    found = sorted(path.name for path in folder.iterdir())[:8]
    inside = [name for name in found if (folder / name / TENSORS).is_file()]
    hint = f" Did you mean {folder / inside[0]}?" if inside else ""
    return f"{folder} holds no {TENSORS}; it holds {found}.{hint}"


def _check_agreement(files: AdapterFiles, record: Record) -> None:
    """The configuration can be edited by hand, and then says something else."""
    ranks = _peft.Ranks(files.config, files.what)
    _check_kinds(files, record)
    for site in record.sites:
        if not site.low_rank:
            continue
        rank, _, scale = ranks(site.target)
        close = abs(scale - site.scale) <= 1e-6 * max(abs(scale), abs(site.scale))
        if rank != site.module_rank or not close:
            raise CheckpointError(
                f"{CONFIG} and {TENSORS} in {files.folder} disagree about "
                f"{site.target}: rank {rank} and scale {scale:g} in the one, "
                f"{site.module_rank} and "
                f"{site.scale:g} in the other. One of them was changed. To follow the "
                "configuration, remove the tensors' metadata and give `names`."
            )


def _check_kinds(files: AdapterFiles, record: Record) -> None:
    """The same for what there is beside ranks and scales."""
    config, what = files.config, files.what
    factors = [site for site in record.sites if site.low_rank]
    whole = [site for site in record.sites if site.kind == "whole"]
    copies = {tensor_name(k) for s in whole for k in (s.key, s.tied) if k is not None}
    adapted = adapted_modules(record.sites)
    rows = {site.key: site.ids for site in record.sites if site.kind == "rows"}
    chosen = _peft.Whole(config, what)
    dora = _peft.flag(config, "use_dora", what)
    minor = config.get("init_lora_weights") == "mica"
    bias = _peft.flag(config, "lora_bias", what)
    here = all(any(_peft.saved_by(n, name) for name in copies) for n in chosen.required)
    agreed = {
        "layer_replication": _peft.layer_replication(config, what)
        == record.layer_replication,
        "use_dora": all((site.kind == "dora") == dora for site in factors),
        "init_lora_weights": not _peft.on_residual(config)
        and all("b" in site.frozen for site in factors if minor),
        "lora_bias": all(site.bias == bias for site in factors),
        "bias": chosen.bias == record.bias,
        "modules_to_save": here and all(chosen(name, adapted) for name in copies),
        "trainable_token_indices": _peft.token_rows(config, what) == rows,
    }
    odd = [field for field, agrees in agreed.items() if not agrees]
    if odd:
        raise CheckpointError(
            f"{CONFIG} and {TENSORS} in {files.folder} disagree about {shorten(odd)}: "
            f"{config.get(odd[0])!r:.80} is not what the tensors are. One of them was "
            "changed. To follow the configuration, remove the tensors' metadata and "
            "give `names`."
        )
