"""Checkpoints in, checkpoints out: both follow the family's name table."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._errors import CheckpointError
from ._base import Params
from ._bert_config import BertConfig
from ._encoder import Encoder
from ._files import Tensors, find_folder, open_tensors, read_json
from ._from_config import from_config
from ._model import Model
from ._spellings import copies, found_name, leftovers
from ._stack import Remat


def load(
    where: str | os.PathLike,
    *,
    dtype: Any = None,
    scan_layers: bool = False,
    remat: Remat = None,
    attention: str = "auto",
) -> tuple[Model | Encoder, Params]:
    """A model and its parameters from a Hugging Face checkpoint.

    Reads `config.json` and `model.safetensors` (or its shards), memory-mapped, one
    tensor at a time. Nothing is loaded if any tensor is missing, unexpected or of
    another shape than the config says.

    Args:
        where: a folder, or a hub id `"owner/name"`, which is downloaded and cached by
            `huggingface_hub`.
        dtype: of parameters and activations; by default what the checkpoint stores.
        scan_layers: as for `from_config`.
        remat: as for `from_config`.
        attention: as for `from_config`.

    Returns:
        `(model, params)`; `params` is a nested dictionary of JAX arrays. The model is
        a `Model`, or for BERT an `Encoder`, which has a pooler if the files hold one.

    Raises:
        CheckpointError: if `where` is not a checkpoint or does not fit its config.
        ConfigError: if the config asks for something these models do not
            compute.
    """
    folder = find_folder(where)
    if not (folder / "config.json").is_file():
        found = sorted(path.name for path in folder.iterdir())[:8]
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no config.json. It holds {found}."
        )
    config = read_json(folder / "config.json")
    with open_tensors(folder) as tensors:
        model = from_config(
            config,
            dtype=jnp.float32 if dtype is None else dtype,
            scan_layers=scan_layers,
            remat=remat,
            attention=attention,
        )
        theirs = _their_names(model, tensors)
        if _lacks_pooler(model, tensors, theirs):
            config = dataclasses.replace(model.config, pooler=False)
            model = dataclasses.replace(model, config=config)
            theirs = _their_names(model, tensors)
        _check(model, tensors, theirs)
        if dtype is None:
            table = next(iter(theirs.values()))[0]
            model = dataclasses.replace(model, dtype=tensors.dtype(table))
        return model, _read(model, tensors, theirs)


def to_hf(model: Model | Encoder, params: Params) -> dict[str, np.ndarray]:
    """The parameters under their Hugging Face names, in their layout.

    Args:
        model: whose table to follow.
        params: its parameter tree, stacked or not.

    Returns:
        Arrays on the host, what `safetensors.numpy.save_file` takes. A tied head is
        left out, as Transformers leaves it out.

    Example:
        >>> model = from_config({"model_type": "gpt2", "n_layer": 1, "n_embd": 8,
        ...                      "n_head": 2, "n_positions": 4, "vocab_size": 16})
        >>> tensors = to_hf(model, model.init(jax.random.key(0)))
        >>> tensors["transformer.h.0.attn.c_attn.weight"].shape
        (8, 24)
    """
    tensors = {}
    for ours, theirs, layout in model.names:
        leaf, layered = _get(params, ours, model), "{i}" in ours
        for i in range(model.num_layers if layered else 1):
            value = np.asarray(leaf[str(i)] if isinstance(leaf, dict) else leaf)
            if layered and model.scan_layers:
                value = value[i]
            if layout == "linear":
                value = value.T
            tensors[theirs.format(i=i)] = np.ascontiguousarray(value)
    return tensors


def _get(params: Params, path: str, model: Model | Encoder) -> Any:
    """The leaf at a path; for a `{i}` of an unrolled tree, all layers' leaves."""
    before, layered, after = path.partition("/{i}/")
    node = _walk(params, before)
    if not layered:
        return node
    if model.scan_layers:
        return _walk(node, after)
    return {i: _walk(layer, after) for i, layer in node.items()}


def _walk(node: Any, path: str) -> Any:
    for key in path.split("/"):
        node = node[key]
    return node


def _their_names(
    model: Model | Encoder, tensors: Tensors
) -> dict[str, tuple[str, ...]]:
    """Our path template -> the tensors that fill it, one per layer (or just one)."""
    held = tensors.names
    return {
        ours: tuple(
            found_name(model.config, theirs.format(i=i), held)
            for i in range(model.num_layers if "{i}" in ours else 1)
        )
        for ours, theirs, _ in model.names
    }


def _lacks_pooler(
    model: Model | Encoder, tensors: Tensors, theirs: dict[str, tuple[str, ...]]
) -> bool:
    """Whether the model is a bare BERT with a pooler, and the files hold none."""
    config = model.config
    if not (isinstance(config, BertConfig) and config.pooler and config.head is None):
        return False
    return not any(
        name in tensors.names
        for ours, names in theirs.items()
        if ours.startswith("pooler/")
        for name in names
    )


def _check(
    model: Model | Encoder, tensors: Tensors, theirs: dict[str, tuple[str, ...]]
) -> None:
    """Raises unless the files hold exactly the model's parameters."""
    expected = {name for names in theirs.values() for name in names}
    tied = list(copies(model.config))
    ignored = leftovers(model.config) | {copy for copy, _ in tied}
    problems = [f"  missing     {name}" for name in sorted(expected - tensors.names)]
    problems += [
        f"  unexpected  {name}" for name in sorted(tensors.names - expected - ignored)
    ]
    shapes = model.abstract()
    for ours, _, layout in model.names:
        leaf = _get(shapes, ours, model)
        shape = (leaf["0"] if isinstance(leaf, dict) else leaf).shape
        if "{i}" in ours and model.scan_layers:
            shape = shape[1:]
        if layout == "linear":
            shape = shape[::-1]
        for name in theirs[ours]:
            if name in tensors.names and tensors.shape(name) != shape:
                problems.append(
                    f"  shape       {name} is {tensors.shape(name)}, not {shape}"
                )
    if problems:
        shown = "\n".join(problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(
            f"The checkpoint's tensors do not fit its config ({model.config.family}, "
            f"{model.num_layers} layers):\n{shown}{more}"
        )
    for name in expected:
        tensors.dtype(name)
    for copy, original in tied:
        original = found_name(model.config, original, tensors.names)
        if copy not in tensors.names:
            continue
        if not np.array_equal(tensors.read(copy), tensors.read(original)):
            raise CheckpointError(
                f"The config ties the head to the embedding, but {copy} differs "
                f"from {original}. Set `tie_word_embeddings` to false in config.json "
                "to keep both."
            )


def _read(
    model: Model | Encoder, tensors: Tensors, theirs: dict[str, tuple[str, ...]]
) -> Params:
    params: Params = {}
    # `device_put` and not `jnp.asarray`, which compiles a copy for every shape.
    for ours, _, layout in model.names:

        def read(name: str, layout: str = layout) -> np.ndarray:
            value = tensors.read(name)
            value = value.T if layout == "linear" else value
            return np.ascontiguousarray(value.astype(model.dtype, copy=False))

        names = theirs[ours]
        if "{i}" not in ours:
            _put(params, ours, jax.device_put(read(names[0])))
        elif model.scan_layers:
            stacked = np.stack([read(name) for name in names])
            _put(params, ours.replace("/{i}", ""), jax.device_put(stacked))
        else:
            for i, name in enumerate(names):
                _put(params, ours.format(i=i), jax.device_put(read(name)))
    # Keys in the order that `init` and every JAX transformation give them.
    return jax.tree.map(lambda leaf: leaf, params)


def _put(params: Params, path: str, leaf: jax.Array) -> None:
    *above, last = path.split("/")
    for key in above:
        params = params.setdefault(key, {})
    params[last] = leaf
