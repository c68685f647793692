r"""PEFT's adapters that belong to a residual of the base, on the base itself.

PiSSA, OLoRA, CorDA and LoRA-GA take their starting factors out of the base there, and a
folder that was not converted holds what was trained on the residual
$W - s\,A_0 B_0$. On the original base it is $W + s\,(A B - A_0 B_0)$: what lacks are
the starting factors. Of PiSSA and OLoRA they are functions of the weight. Their signs
are free, and the product does not depend on them; those that are nearest to the trained
factors are taken, for the differences then are small. The others drew numbers or read
data, and only the folder of the untrained adapter has them.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _paths, _peft
from .._errors import CheckpointError
from ..adapters import Adapter, Fixed, is_weight
from ..planning import Plan, Slot
from ._arrays import join
from ._file_site import FileSite
from ._files import CONFIG, AdapterFiles
from ._peft_starts import METHODS


class Begun:
    """How the factors of a folder started, and what that makes of them.

    Args:
        files: the open folder.
        start: the untrained adapter, if it was given.
        is_start: this is the untrained adapter, whose factors are wanted as they are.

    Raises:
        CheckpointError: if `start` is given and of no use, or the start is not known.
    """

    def __init__(
        self, files: AdapterFiles, start: Adapter | None, *, is_start: bool = False
    ):
        self.files, self.start = files, start
        self.method: Any = True
        if files.record is None and not is_start:
            self.method = _peft.read_init(files.config, files.what, trained=True)
        self.residual = self.method is not True and _peft.on_residual(files.config)
        if start is not None and not self.residual:
            raise CheckpointError(
                f"`start` is given, and the factors in {files.folder} belong to the "
                "base itself, not to a residual of it. Leave `start` out."
            )

    def told(self, site: FileSite) -> FileSite:
        """A site of PEFT's with what is known of its start.

        Raises:
            CheckpointError: for the head of a tied table, whose start is missing in the
                table too.
        """
        if not site.low_rank or isinstance(self.method, bool):
            return site
        if self.residual and (site.use == "head" or site.tied is not None):
            raise CheckpointError(
                f"{self.files.what} has `init_lora_weights` = {self.method!r} and "
                f"adapts the head that shares {site.path!r}: PEFT took the start out "
                "of the table that the lookup reads, too, which no adapter undoes. "
                "Merge it there with `merge_and_unload`, and load the merged model."
            )
        # PEFT runs MiCA's start for any case of its name, and freezes B for this one.
        frozen = self.files.config["init_lora_weights"] == "mica"
        return dataclasses.replace(
            site, init=self.method, frozen=("b",) if frozen else ()
        )

    def on_the_base(
        self, adapter: Adapter, plan: Plan, params: Any
    ) -> tuple[Adapter, Plan]:
        """The folder's adapter as one of the base itself.

        Args:
            adapter: what the folder holds.
            plan: its plan.
            params: the base's parameters.

        Returns:
            The same if its factors belong to the base; else with starting factors, in
            float32 or wider: PEFT's residual is that of factors that were not rounded.

        Raises:
            CheckpointError: if the starting factors cannot be known.
        """
        if not self.residual:
            return adapter, plan
        # PEFT has none of these starts for tables: their adapters start at zero.
        names = [name for name, fixed in adapter.fixed.items() if _starts(fixed)]
        if self.start is not None:
            _check_start(self.files, adapter, self.start, names)
            held = {name: self.start.train[name] for name in names}
            found = {name: (held[name]["a"], held[name]["b"]) for name in names}
        else:
            found = _recomputed(self.files, adapter, plan, params, self.method, names)
        train, fixed = dict(adapter.train), dict(adapter.fixed)
        for name in names:
            a, b = (_wide(adapter.train[name][n]) for n in ("a", "b"))
            a0, b0 = (x.astype(a.dtype) for x in found[name])
            if self.start is None:
                a0, b0 = _near(a0, b0, a, len(fixed[name].role.batch))
            train[name] = adapter.train[name] | {"a": a, "b": b}
            fixed[name] = Fixed(fixed[name].role, {**fixed[name], "a0": a0, "b0": b0})
        dtype = next(x["a"].dtype for x in train.values() if "a" in x)
        config = dataclasses.replace(plan.config, dtype=dtype)
        return Adapter(train, fixed), dataclasses.replace(plan, config=config)


def _starts(fixed: Fixed) -> bool:
    return "rank" in fixed and not fixed.role.lookup


def _wide(array: Any) -> jax.Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _recomputed(
    files: AdapterFiles,
    adapter: Adapter,
    plan: Plan,
    params: Any,
    method: Any,
    names: list[str],
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Starting factors from the weights."""
    if method not in METHODS:
        raise CheckpointError(
            f"{files.what} has `init_lora_weights` = {method!r}: the factors belong to "
            "a residual of the base, and how they started cannot be told from the "
            "weights. Give the folder of the untrained adapter, "
            "`load_adapter(..., start=folder)`, the one that PEFT calls "
            "`path_initial_model_for_weight_conversion`; or convert the adapter there "
            "with `save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
        )
    leaves = dict(_paths.flatten(params, is_leaf=is_weight)[0])
    found = {}
    for slot in plan.slots:
        if slot.name in names:
            layers = _layers(leaves[slot.role.path], slot, files, method)
            starts = {
                i: METHODS[method](layers[i], site.rank, site.scale)
                for i, site in enumerate(slot.sites)
                if site is not None
            }
            tensors = {
                i: {"a": a.T.astype(np.float32), "b": b.T.astype(np.float32)}
                for i, (a, b) in starts.items()
            }
            joined = join(_low_rank(slot), tensors)
            found[slot.name] = joined["a"], joined["b"]
    return found


def _low_rank(slot: Slot) -> Slot:
    """The slot of the factors alone."""
    role = dataclasses.replace(slot.role, kind="lora")
    return dataclasses.replace(slot, role=role, bias=False)


def _layers(leaf: Any, slot: Slot, files: AdapterFiles, method: Any) -> np.ndarray:
    """The weight of each layer on the host, `(layers, d_in, d_out)`."""
    here = getattr(leaf, "is_fully_addressable", True)
    if isinstance(leaf, jax.ShapeDtypeStruct) or not here:
        raise CheckpointError(
            f"{files.what} has `init_lora_weights` = {method!r}, whose start is taken "
            f"from the weights, and `params` has "
            + ("a part" if not here else "only the type")
            + f" of {slot.role.path!r} here. Give parameters that hold all values."
        )
    weight = np.asarray(leaf.dense() if is_weight(leaf) else leaf)
    role = slot.role
    weight = weight.transpose(*role.batch, *role.inputs, *role.outputs)
    return weight.reshape(len(slot.sites), *slot.sides)


def _near(
    a0: jax.Array, b0: jax.Array, a: jax.Array, batch: int
) -> tuple[jax.Array, jax.Array]:
    """The starting factors with the signs that their columns and rows have in `a`."""
    along = (a0 * a).sum(tuple(range(batch, a.ndim - 1)))  # (*batch, rank)
    sign = jnp.where(along < 0, -1, 1).astype(a0.dtype)
    lead = sign.shape[:batch]
    inside, behind = [1] * (a.ndim - 1 - batch), [1] * (b0.ndim - 1 - batch)
    return (
        a0 * sign.reshape(*lead, *inside, -1),
        b0 * sign.reshape(*lead, -1, *behind),
    )


def _check_start(
    files: AdapterFiles, adapter: Adapter, start: Adapter, names: list[str]
) -> None:
    for name in names:
        one, other = adapter.fixed[name], start.fixed.get(name)
        same = other is not None and all(
            jnp.shape(one[n]) == jnp.shape(other[n])
            and bool(jnp.array_equal(one[n], other[n]))
            for n in ("rank", "scale")
        )
        if not same:
            raise CheckpointError(
                f"The adapter in `start` does not have the rank and scale of {name!r} "
                f"that {files.folder / CONFIG} has. Give the folder of the adapter "
                "that training started from."
            )
