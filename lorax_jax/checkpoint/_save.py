"""`save_adapter`: an adapter as PEFT's files."""

import collections
import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .. import _paths, _peft
from .._errors import AdapterError, CheckpointError
from .._growth import Growth
from .._names import NameMap
from ..adapters import Adapter, Fixed, is_weight
from ..planning import Plan, Slot
from . import _packed
from ._arrays import Tensors, host, split
from ._atomic import check_space, replacing
from ._beside import write_card, write_tokenizer
from ._copies import modules_to_save
from ._file_site import FileSite
from ._files import CONFIG, OURS, TENSORS
from ._fingerprint import fingerprints
from ._fused import fused, module_alpha
from ._grown import file_growth
from ._kernels import to_theirs, turned
from ._keys import PREFIX
from ._layouts import tensor_layout
from ._placed import Placed, placed_sites
from ._record import Record
from ._resolve import is_index
from ._safetensors import Writer, code_of
from ._starts import joined


def save_adapter(
    dir: str | os.PathLike,
    adapter: Adapter,
    *,
    plan: Plan,
    names: Any = None,
    params: Any = None,
    base_model_name_or_path: str | os.PathLike | None = None,
    task_type: str | None = None,
    tokenizer: Any = None,
    grown: Growth | None = None,
) -> None:
    """Writes an adapter to a folder, as PEFT does.

    With `names` the folder is one that PEFT, vLLM and others open:

    - `adapter_model.safetensors`: for a module `m` of rank r the tensors
      `base_model.model.m.lora_A.weight`, `(r, d_in)`, our `a` transposed, and
      `base_model.model.m.lora_B.weight`, `(d_out, r)`, our `b` transposed. Embeddings
      have `.lora_embedding_A`, `(r, rows)`, and `.lora_embedding_B`. Several input or
      output axes are flattened into one, but for kernels of convolutions, whose A is
      `(r, d_in, *window)` and whose B is `(d_out, r, 1, ...)`. A bare parameter of
      experts has A `(experts * r, d_in)` and B `(d_out, r * experts)`. Stacks are
      written layer by layer at true ranks, in the dtype that they are stored in.
    - `adapter_config.json`: `r`, `lora_alpha` and patterns from which PEFT finds
      exactly these ranks and scales, and whole module names as targets.
    - `README.md`, a model card, unless there is one.

    Without `names` the folder holds the same files, with `<path>.lora_A.weight` and
    `<path>.lora_B.weight` for keys, and PEFT refuses it.

    Beside them, under PEFT's names: a magnitude, a bias of B, leaves that were trained
    whole (modules of PEFT's `modules_to_save`, and biases), rows of a table.

    Either way the tensors' header records the axes, ranks and scales of every site, so
    `load_adapter` needs nothing beside the parameters. A stacked model and an unrolled
    one write the same file.

    A shared adapter of a tied embedding is written as PEFT's `ensure_weight_tying`
    does: on the embedding, and transposed on the head.

    The folder appears whole or not at all, and an older one is never damaged; see
    `lorax_jax/checkpoint/README.md`.

    Args:
        dir: the folder. Other files in it are kept.
        adapter: what to save.
        plan: the plan that it was made with; for a loaded adapter, `receipt.plan`.
        names: the model's name table, a `NameMap` or its entries.
        params: the parameters that it was trained on. Their fingerprint goes into the
            header, and `load_adapter` then refuses another base of the same shape.
        base_model_name_or_path: where the base is, a hub id or a folder.
        task_type: PEFT's, e.g. `"CAUSAL_LM"`.
        tokenizer: what has `save_pretrained`, or a folder to copy a tokenizer's files
            from. It appears with the rest.
        grown: how the vocabulary grew, from `lorax_jax.grow` or `models.grow`. It goes
            into the header, so that a copy of the base can grow alike; the tables
            themselves are not saved.

    Raises:
        AdapterError: if the adapter is not one of the plan.
        CheckpointError: if PEFT's format cannot hold it, or the disk is full.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, lorax_jax as lj
        >>> params = {"q": {"kernel": jnp.ones((3, 2))}}
        >>> plan = lj.plan(lj.LoraConfig("q/kernel", rank=1), params,
        ...                fn=lambda p, x: x @ p["q"]["kernel"], args=(jnp.ones(3),))
        >>> adapter = lj.init(plan, params, key=jax.random.key(0))
        >>> names = [("q/kernel", "q.weight", "linear")]
        >>> folder = tempfile.mkdtemp()
        >>> save_adapter(folder, adapter, plan=plan, names=names)
        >>> sorted(os.listdir(folder))
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    table = None if names is None else NameMap.of(names)
    _check(adapter, plan)
    placed = placed_sites(plan, table, adapter.fixed)
    sites, tensors = _contents(adapter, plan, placed, params, table is not None)
    base = None if base_model_name_or_path is None else str(base_model_name_or_path)
    rslora = plan.config.rslora
    if table is None:
        config = {
            "peft_type": OURS,
            "base_model_name_or_path": base,
            "task_type": task_type,
        }
    else:
        _check_layers(plan)
        config = _config(sites, table, plan)
        config |= {"base_model_name_or_path": base, "task_type": task_type}
    form = "paths" if table is None else "peft"
    growth = file_growth(grown, plan, params, table)
    record = Record(
        form,
        rslora,
        tuple(sites),
        plan.config.bias,
        layer_replication=plan.config.layer_replication,
        grown=growth,
    )
    metadata = record.encode()
    size = sum(tensor.nbytes for tensor in tensors.values())
    check_space(dir, size + len(str(metadata)) + (1 << 20))
    # Widest dtype first, as safetensors itself orders them, so that all are aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    entries = [(n, code_of(tensors[n].dtype), tensors[n].shape) for n in order]
    with replacing(dir, keep=True) as folder:
        with Writer(folder / TENSORS, entries, metadata) as file:
            for name in order:
                file.write(tensors[name])
        (folder / CONFIG).write_text(
            json.dumps(config, indent=2, sort_keys=True) + "\n"
        )
        if not os.path.exists(os.path.join(dir, "README.md")):
            write_card(folder, base, sites)
        if tokenizer is not None:
            write_tokenizer(folder, tokenizer)


def _check(adapter: Adapter, plan: Plan) -> None:
    slots = {slot.name: slot for slot in plan.slots}
    if not isinstance(adapter, Adapter) or set(adapter.fixed) != set(slots):
        found = sorted(adapter.fixed) if isinstance(adapter, Adapter) else []
        odd = sorted(set(found) ^ set(slots))
        raise AdapterError(
            f"The adapter is not one of the plan: they differ about {odd[:4]}. Give "
            "the plan that it was made with; for a loaded adapter, `receipt.plan`."
        )
    for name, fixed in adapter.fixed.items():
        if fixed.role != slots[name].role:
            raise AdapterError(
                f"The adapter's axes of {name!r}, {fixed.role}, are not the plan's, "
                f"{slots[name].role}. Give the plan that it was made with."
            )


def _check_layers(plan: Plan) -> None:
    """PEFT makes the model itself, and must be told of which layers."""
    if plan.repeated is not None:
        raise CheckpointError(
            "Layers of the parameters are the same arrays, and PEFT must be told which "
            "layers of the checkpoint they are. Plan with what `replicate` was given, "
            f"say  LoraConfig(..., layer_replication={plan.repeated})."
        )


def _contents(
    adapter: Adapter,
    plan: Plan,
    placed: Sequence[Placed],
    params: Any,
    peft: bool,
) -> tuple[list[FileSite], dict[str, np.ndarray]]:
    """What the file holds: its sites, and its tensors by key."""
    leaves = dict(_paths.flatten(params, is_leaf=is_weight)[0])
    by_slot: dict[str, dict[int, FileSite]] = {}
    for site, slot, i in placed:
        by_slot.setdefault(slot.name, {})[i] = site
    sites, tensors = [], {}
    modules: dict[str, list[tuple[FileSite, Slot, Tensors]]] = {}
    for slot in plan.slots:
        fixed = adapter.fixed[slot.name]
        bases = fingerprints(slot, leaves)
        for i, _, held in split(slot, adapter.train[slot.name], fixed):
            site = by_slot[slot.name][i]
            if site.low_rank:
                site = dataclasses.replace(site, **_numbers(site, fixed, i, plan))
            if bases is not None:
                site = dataclasses.replace(site, base=bases[i])
            sites.append(site)
            held = _laid(site, held)
            if site.ranks is not None:
                modules.setdefault(site.key, []).append((site, slot, held))
                continue
            if site.order is not None:
                held = to_theirs(site.order, slot.inputs, held)
            if site.parameter is not None:
                held = _packed.to_theirs(site.mirrored, held)
            tensors |= _tensors(site, held, PREFIX if peft else "")
    for parts in modules.values():
        tensors |= _tensors(parts[0][0], fused(parts), PREFIX)
    # In the order of paths, so that stacked and unrolled models write the same file.
    return sorted(
        sites, key=lambda site: (_natural(site.path), site.name[1] or "")
    ), tensors


def _laid(site: FileSite, held: Tensors) -> Tensors:
    """The tensors with starting factors where the file has them, if anywhere."""
    if site.start == "joined":
        return joined(held)
    return {n: x for n, x in held.items() if site.start or n not in ("a0", "b0")}


def _tensors(site: FileSite, held: Tensors, prefix: str) -> Tensors:
    if site.transposed:
        held = {"whole": turned(held["whole"])}
    found = {key: held[name] for name, key in site.keys(prefix).items()}
    if site.low_rank:
        # The head multiplies by the transposed table: its A is B's transpose.
        held = {"a": held["b"].T, "b": held["a"].T}
    return found | {key: held[name] for name, key in site.tied_keys(prefix).items()}


def _numbers(site: FileSite, fixed: Fixed, i: int, plan: Plan) -> dict[str, float]:
    """Scale and alpha as they act, which is what the adapter's arrays say."""
    scale = host(fixed["scale"]).reshape(-1)[i]
    dropout = fixed.get("dropout")
    rate = 0.0 if dropout is None else float(str(host(dropout).reshape(-1)[i]))
    if np.float32(site.scale) == scale:
        return {"dropout": rate}
    # Rescaled since it was planned. In float64 the product is exact, so PEFT's quotient
    # is the scale again (with a square root, to the last place of a float32).
    root = math.sqrt(site.rank) if plan.config.rslora else site.rank
    return {"scale": float(scale), "alpha": float(scale) * root, "dropout": rate}


def _config(sites: Sequence[FileSite], names: NameMap, plan: Plan) -> dict[str, Any]:
    """The fields from which PEFT finds exactly these modules, ranks and scales."""
    values: dict[str, FileSite] = {}
    for site in sites:
        if site.low_rank:
            values[site.target] = site
            if site.tied is not None:
                values[site.tied] = site
    ranks = {module: site.module_rank for module, site in values.items()}
    alphas = {
        module: _peft.plain(module_alpha(site, rslora=plan.config.rslora))
        for module, site in values.items()
    }
    rates = {module: site.dropout for module, site in values.items()}
    rank, alpha, rate = (_most_common(v) for v in (ranks, alphas, rates))
    bare = [name for name, site in values.items() if site.parameter is not None]
    modules = [name for name in values if name not in set(bare)]
    known = {module.name for module in names.expand(_peft.LAYERS)} | set(values)
    fields = _peft.DEFAULTS | {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _peft.condense(ranks, rank),
        "alpha_pattern": _peft.condense(alphas, alpha),
        "use_rslora": plan.config.rslora,
        "use_dora": _alike({site.key: site.kind == "dora" for site in values.values()}),
        "lora_bias": _alike({site.key: site.bias for site in values.values()}),
        "lora_dropout": rate,
        "layer_replication": _peft.as_lists(plan.config.layer_replication),
        "init_lora_weights": _init(values.values()),
        "bias": plan.config.bias,
        "modules_to_save": modules_to_save(sites, names, plan.config.bias),
        "trainable_token_indices": {
            site.key: list(site.ids) for site in sites if site.kind == "rows"
        }
        or None,
        # An empty list, not null: PEFT would add what it usually adapts.
        "target_modules": _peft.exact_targets(modules, known - set(modules)),
        "target_parameters": bare or None,
        "ensure_weight_tying": any(site.tied is not None for site in sites),
        "fan_in_fan_out": any(_is_conv1d(site, names) for site in values.values()),
    }
    if bare:
        tensors = {tensor.name for tensor in names.tensors(_peft.LAYERS)}
        _peft.exact_parameters(bare, tensors - set(bare))
        _peft.check_alone(fields, "The adapter")
        _peft.check_owners(modules, bare, "The adapter")
    return fields


def _init(sites: Iterable[FileSite]) -> str | bool:
    """What PEFT is told of the start: nothing that it would do again, or freeze not."""
    minor = all(s.init == "mica" and s.frozen == ("b",) and not s.start for s in sites)
    return "mica" if minor else True


def _alike(asked: Mapping[str, bool]) -> bool:
    """What PEFT says once for all modules."""
    if len(set(asked.values())) > 1:
        one, other = (min(m for m in asked if asked[m] is v) for v in (True, False))
        raise CheckpointError(
            f"{one!r} and {other!r} have adapters of different kinds, and PEFT's "
            "configuration has one kind for all. Save two adapters, or leave `names` "
            "out for a file with our paths."
        )
    return True in asked.values()


def _is_conv1d(site: FileSite, names: NameMap) -> bool:
    """Whether PEFT's module keeps its weight as `(d_in, d_out)`."""
    layout = names.layout(site.path)
    inside = site.use is not None or site.parameter is not None
    if site.table or inside or site.part is None or layout is None:
        return False
    return tensor_layout(layout, site.part) == "same"


def _most_common(values: Mapping[str, Any]) -> Any:
    return collections.Counter(values.values()).most_common(1)[0][0]


def _natural(path: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts `layers/10` after `layers/9`."""
    return tuple(
        (1, int(part), "") if is_index(part) else (0, 0, part)
        for part in path.split("/")
    )
