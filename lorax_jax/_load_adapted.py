"""`lorax_jax.models.load_adapted`: a base model and its adapter in one call.

It stands above both rooms that it joins: `models` knows nothing of adapters, and
`checkpoint` nothing of models. Importing this file, as the front door does, hangs it
into `lorax_jax.models`, where people look for it.
"""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from . import models
from ._errors import CheckpointError
from ._json import read_json
from .adapters import Adapter
from .checkpoint import Receipt, layer_replication, load_adapter, read_growth
from .embedded import MODEL_DIR
from .replication import replicate


class LoadedAdapter(NamedTuple):
    """What `load_adapted` returns.

    Attributes:
        model: the base model, with as many layers as the adapter is for, and as many
            tokens where its vocabulary grew.
        params: its parameters, untouched but for the new tokens' rows.
        adapter: the adapter, for `bind(params, adapter)`.
        receipt: what was loaded, and its plan.
    """

    model: models.Model | models.Encoder
    params: Any
    adapter: Adapter
    receipt: Receipt


def load_adapted(
    adapter_dir: str | os.PathLike,
    *,
    base: str | os.PathLike | None = None,
    dtype: Any = None,
    scan_layers: bool = False,
) -> LoadedAdapter:
    """Loads an adapter and the model that it is for.

    The model is found through `base_model_name_or_path` in `adapter_config.json`: a
    folder, looked for from the adapter's folder and then from the working directory,
    a hub id, or the embedded model. No other path in the adapter's files is followed.
    Where the adapter is for a model whose layers are repeated, so are those of this one
    (see `replicate`).

    Where the adapter was trained on a vocabulary that had grown, the model grows alike
    before it is loaded; see `checkpoint.read_growth`.

    Args:
        adapter_dir: the adapter's folder.
        base: the model's folder or hub id, instead of what the configuration says.
        dtype: of the model's parameters and activations, as for `models.load`.
        scan_layers: as for `models.load`.

    Returns:
        `(model, params, adapter, receipt)`.

    Raises:
        CheckpointError: if the base is not named or not found, or if the adapter does
            not fit it.

    Example:
        >>> import lorax_jax as lj
        >>> model, params, adapter, _ = lj.models.load_adapted("my-adapter")
        ... # doctest: +SKIP
        >>> logits = lj.adapt(model.apply)(lj.bind(params, adapter), ids)
        ... # doctest: +SKIP
    """
    where = _base(Path(adapter_dir)) if base is None else base
    model, params = models.load(where, dtype=dtype, scan_layers=scan_layers)
    ranges = layer_replication(adapter_dir)
    if ranges is not None:
        params = replicate(params, ranges, layers=model.layers_path)
        model = model.with_layers(sum(end - first for first, end in ranges))
    model, params = grown_for(adapter_dir, model, params)
    adapter, receipt = load_adapter(adapter_dir, params, names=model.names)
    return LoadedAdapter(model, params, adapter, receipt)


def grown_for(
    adapter_dir: str | os.PathLike, model: models.Model | models.Encoder, params: Any
) -> tuple[models.Model | models.Encoder, Any]:
    """A model with as many tokens as an adapter was trained on.

    Args:
        adapter_dir: the adapter's folder.
        model: the base, as it was loaded.
        params: its parameters, or their types.

    Returns:
        `(model, params)`; the same where nothing grew, or the base has grown already.
    """
    growth = read_growth(adapter_dir, params, names=model.names)
    if growth is None or growth.before != model.config.vocab_size:
        return model, params
    how = {name: getattr(growth, name) for name in ("to", "multiple", "init", "seed")}
    return models.grow(model, params, **how)[:2]


def _base(folder: Path) -> str | Path:
    config = folder / "adapter_config.json"
    named = read_json(config).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise CheckpointError(
            f"{config} does not say which model the adapter is for. Give it: "
            "`load_adapted(adapter_dir, base=...)`, a folder or a hub id."
        )
    for place in (folder / named, Path(named)):
        if place.is_dir():
            return place
    if re.fullmatch(r"[\w.-]+/[\w.-]+", named):
        return named
    if Path(named).parts[-3:] == MODEL_DIR.parts[-3:]:  # wherever the library was
        return MODEL_DIR
    raise CheckpointError(
        f"{config} names the model {named!r:.120}, which is no folder here and no hub "
        "id. Give it: `load_adapted(adapter_dir, base=...)`."
    )


setattr(models, "load_adapted", load_adapted)  # noqa: B010
