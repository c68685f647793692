"""`load_adapter`: an adapter from PEFT's files, all of it or an error."""

import collections
import dataclasses
import math
import os
from typing import Any

import jax
import numpy as np

from .._errors import CheckpointError
from .._names import NameMap
from ..adapters import Adapter
from ..planning import Plan
from . import _kernels
from ._factors import Matrices, shapes
from ._files import TENSORS, AdapterFiles, open_adapter
from ._fingerprint import differ, fingerprints
from ._keys import PREFIX, explain, keys
from ._peft_sites import mirrored, peft_sites
from ._plan_of import adapter_of, plan_of
from ._receipt import Receipt, lines
from ._record import FileSite
from ._resolve import Tree, by_slot, place_by_path, place_by_plan
from ._safetensors import FLOATS
from ._sites import Placed, part_of, placed_sites


def load_adapter(
    dir: str | os.PathLike,
    params: Any,
    *,
    plan: Plan | None = None,
    names: Any = None,
    strict: bool = True,
) -> tuple[Adapter, Receipt]:
    """Reads an adapter that `save_adapter` or PEFT wrote.

    Strict unless told otherwise: every tensor of the file must belong to a site, every
    site that the file or the plan promises must have its tensors, and shapes, ranks,
    dtypes and the base must be what they should. Otherwise the error names every key
    that is not. An adapter of which nothing fits always raises.

    Which axes the factors run along is said by the `plan`, else by the metadata of a
    file that this library wrote, else by `names`, whose kernels are `(in, out)`. Where
    a file speaks of one layer and the parameters hold all layers in one array, layers
    are its first axis.

    Values come in the dtype that they are stored in. Nothing in the folder is executed:
    the files are safetensors and JSON, checked against limits before anything is
    allocated.

    Args:
        dir: the folder, with `adapter_model.safetensors` in it.
        params: the parameters that the adapter is for, or their types.
        plan: what the adapter should be; it must agree in ranks and scales.
        names: the model's name table, a `NameMap` or its entries. PEFT's own files need
            it.
        strict: raise on any problem. Otherwise sites with a problem are left out, and
            the receipt lists them.

    Returns:
        `(adapter, receipt)`. `receipt.plan` is the plan of what was loaded.

    Raises:
        CheckpointError: see above; and always for a file that is damaged, hostile, or
            asks for more than plain LoRA.

    Example:
        >>> import tempfile, jax.numpy as jnp, lorax_jax as lj
        >>> from lorax_jax.checkpoint import save_adapter
        >>> params = {"q": {"kernel": jnp.ones((3, 2))}}
        >>> plan = lj.plan(lj.LoraConfig("q/kernel", rank=1), params,
        ...                fn=lambda p, x: x @ p["q"]["kernel"], args=(jnp.ones(3),))
        >>> adapter = lj.init(plan, params, key=jax.random.key(0))
        >>> folder = tempfile.mkdtemp()
        >>> save_adapter(folder, adapter, plan=plan)
        >>> loaded, receipt = load_adapter(folder, params)
        >>> print(receipt)
        1 of 1 sites loaded from 2 tensors into 1 adapted weights
        >>> bool(jnp.array_equal(loaded.train["q/kernel"]["a"],
        ...                      adapter.train["q/kernel"]["a"]))
        True
    """
    with open_adapter(dir) as files:
        return Loading(files, params, plan, names).run(strict)


class Loading:
    """One call of `load_adapter`: the sites, and the problems on the way."""

    def __init__(
        self,
        files: AdapterFiles,
        params: Any,
        plan: Plan | None,
        names: Any,
        *,
        conv1d: bool = False,
    ):
        self.files = files
        self.conv1d = conv1d
        self.entries = files.tensors.entries
        self.tree = Tree(params)
        self.plan = plan
        self.names = None if names is None else NameMap.of(names)
        self.left = dict.fromkeys(self.entries)  # keys that no site has claimed
        self.promised = 0
        self.prefix = PREFIX
        self.rslora = False
        self.missing: list[str] = []
        self.misshapen: list[str] = []
        self.nonfinite: list[str] = []
        self.changed: list[str] = []
        self.ignored: list[str] = []

    def run(self, strict: bool) -> tuple[Adapter, Receipt]:
        sites = self._sites()
        placed = self._place(sites)
        fit = [place for place in placed if self._fits(place)]
        fit = self._one_dtype(fit)
        self._check_bases(fit)
        self._drop_copies()
        if strict:
            self._raise()
        loaded = [(place, self._read(place)) for place in fit]
        kept = [(place, matrices) for place, matrices in loaded if matrices is not None]
        if strict:
            self._raise()
        if not kept:
            raise CheckpointError(
                f"Nothing of {self.files.folder} fits the parameters.\n"
                + "\n".join(self._lines()[:20])
            )
        return self._finish(kept, max(len(sites) + self.promised, len(self.plan or ())))

    def _finish(
        self, kept: list[tuple[Placed, Matrices]], expected: int
    ) -> tuple[Adapter, Receipt]:
        places = [place for place, _ in kept]
        plan = plan_of(
            places,
            self.tree,
            rslora=self.rslora,
            dtype=kept[0][1][0].dtype,
            plan=self.plan,
        )
        adapter = adapter_of(plan, kept)
        return adapter, Receipt(
            expected=expected,
            sites=len(kept),
            tensors=sum(4 if place.site.tied is not None else 2 for place in places),
            leaves=len({place.slot.role.path for place in places}),
            missing=tuple(self.missing),
            unexpected=tuple(map(explain, self.left)),
            misshapen=tuple(self.misshapen),
            nonfinite=tuple(self.nonfinite),
            changed=tuple(self.changed),
            ignored=tuple(self.ignored),
            plan=plan,
        )

    def _sites(self) -> list[FileSite]:
        """The sites that the file says it has."""
        record = self.files.record
        if record is not None:
            self.prefix = PREFIX if record.keys == "peft" else ""
            self.rslora = record.rslora
            return list(record.sites)
        if self.names is None:
            raise CheckpointError(
                f"{self.files.folder} was not written by this library, so which module "
                "is which parameter is not known. Give `names`, a table of (path, "
                "tensor name, layout); for the models of `lorax_jax.models` it is "
                "`model.names`."
            )
        found = peft_sites(
            self.files, self.names, self.tree, self.plan, conv1d=self.conv1d
        )
        self.prefix = found.prefix
        self.missing += found.missing
        self.promised = len(found.missing) // 2
        self.rslora = bool(self.files.config.get("use_rslora"))
        return found.sites

    def _place(self, sites: list[FileSite]) -> list[Placed]:
        """The sites' places; those without one keep their keys in `left`."""
        if self.plan is None:
            return list(place_by_path(self.tree, sites).values())
        for slot in self.plan.slots:
            leaf = self.tree.leaves.get(slot.role.path)
            if leaf is None or tuple(leaf.shape) != slot.shape:
                found = "no such leaf" if leaf is None else tuple(leaf.shape)
                raise CheckpointError(
                    f"The plan has {slot.role.path!r} with shape {slot.shape}, and "
                    f"`params` has {found}. Give the parameters that the plan was made "
                    "on."
                )
        placed = place_by_plan(self.plan, sites)
        here = {(site.path, site.use) for site in placed}
        for place in placed_sites(self.plan, self.names if self.prefix else None):
            if (place.site.path, place.site.use) not in here:
                self._miss(place.site)
        return list(placed.values())

    def _miss(self, site: FileSite) -> None:
        prefix = self.prefix if self.names is not None or not self.prefix else ""
        for key in keys(site.key, table=site.table, prefix=prefix):
            if key not in self.missing:
                self.missing.append(key)

    def _fits(self, place: Placed) -> bool:
        """Whether a site's tensors are there, with the shapes that it should have."""
        site, slot, i = place
        before = len(self.missing) + len(self.misshapen) + len(self.changed)
        wanted = shapes(slot, site.rank)
        if site.order is not None and len(site.order) == len(slot.inputs):
            d_out = slot.sides[1]
            wanted = _kernels.shapes(site.order, slot.inputs, d_out, site.rank)
        pairs = [(keys(site.key, table=site.table, prefix=self.prefix), wanted)]
        if site.tied is not None:
            head = keys(site.tied, table=False, prefix=self.prefix)
            pairs.append((head, (wanted[1][::-1], wanted[0][::-1])))
        for names, both in pairs:
            for name, shape in zip(names, both, strict=True):
                self._check_tensor(name, shape)
        self._check_rank(site, shapes(slot, 1))
        if self.plan is not None:
            self._check_planned(place)
        if len(self.missing) + len(self.misshapen) + len(self.changed) > before:
            return False
        if len(pairs) > 1 and not mirrored(
            self.files.tensors, pairs[0][0], pairs[1][0]
        ):
            self.misshapen.append(
                f"{pairs[1][0][0]} is not the transpose of {pairs[0][0][1]}, and they "
                "hold one adapter"
            )
            return False
        return True

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        self.left.pop(name, None)
        entry = self.entries.get(name)
        if entry is None:
            self.missing.append(name)
        elif entry.shape != shape:
            self.misshapen.append(f"{name} is {entry.shape}, not {shape}")
        elif entry.dtype is None:
            self.misshapen.append(
                f"{name} is stored as {entry.code}, not as one of {', '.join(FLOATS)}"
            )
        elif entry.code == "F64" and not jax.config.read("jax_enable_x64"):
            self.misshapen.append(f"{name} is F64, which needs `jax_enable_x64`")

    def _check_rank(self, site: FileSite, both: tuple[tuple[int, ...], ...]) -> None:
        """A stack is padded to its largest rank, which may not be out of all bounds."""
        most = both[0][-1] + both[1][-2]
        if site.rank > most:
            raise CheckpointError(
                f"{site.key} has rank {site.rank:,}, and no weight of its shape needs "
                f"more than {most:,}. {TENSORS} was damaged, or is not what it seems."
            )

    def _check_planned(self, place: Placed) -> None:
        site, wanted = place.site, place.slot.sites[place.index]
        assert wanted is not None
        if site.rank != wanted.rank or not math.isclose(
            site.scale, wanted.scale, rel_tol=1e-6
        ):
            self.changed.append(
                f"{site.key} has rank {site.rank} and scale {site.scale:g}, the plan "
                f"{wanted.rank} and {wanted.scale:g}"
            )
        axes = part_of(place.slot)
        if (
            site.part is not None
            and dataclasses.replace(site.part, stack=axes.stack) != axes
        ):
            self.changed.append(f"{site.key} has the axes {site.part}, the plan {axes}")

    def _one_dtype(self, placed: list[Placed]) -> list[Placed]:
        """Factors that share an array, and those of a pair, have one dtype."""
        kept = []
        for group in by_slot({place.site: place for place in placed}).values():
            codes = {
                key: self.entries[key].code
                for place in group
                for key in self._keys(place.site)
            }
            usual = collections.Counter(codes.values()).most_common(1)[0][0]
            like = next(key for key, code in codes.items() if code == usual)
            odd = {key for key, code in codes.items() if code != usual}
            self.misshapen += [f"{k} is {codes[k]}, and {like} {usual}" for k in odd]
            kept += [place for place in group if not odd & {*self._keys(place.site)}]
        return kept

    def _keys(self, site: FileSite) -> tuple[str, str]:
        return keys(site.key, table=site.table, prefix=self.prefix)

    def _check_bases(self, placed: list[Placed]) -> None:
        """Compares the weights with those that the adapter was trained on."""
        for group in by_slot({place.site: place for place in placed}).values():
            known = [place for place in group if place.site.base is not None]
            found = fingerprints(group[0].slot, self.tree.leaves) if known else None
            self.changed += [
                f"{place.site.path} is not the weight that the adapter was trained on"
                for place in known
                if found is not None
                and differ(place.site.base or "", found[place.index])
            ]

    def _drop_copies(self) -> None:
        """PEFT writes the base's embedding into a file that adapts it."""
        if self.names is None or self.files.record is not None:
            return
        for name in list(self.left):
            tensor = name.removeprefix(self.prefix).replace(".base_layer.", ".")
            path = self.names.path(tensor)
            if tensor == f"{self.names.head}.weight":
                path = path or self.names.tied
            leaf = self.tree.leaves.get(path or "")
            entry = self.entries[name]
            if entry.dtype is None or not isinstance(leaf, jax.Array | np.ndarray):
                continue
            theirs = self.files.tensors.read(name).astype(leaf.dtype)
            theirs = theirs.T if self.names.layout(path or "") == "linear" else theirs
            if np.array_equal(theirs, np.asarray(leaf)):
                del self.left[name]
                self.ignored.append(f"{name} (a copy of the base's)")

    def _read(self, place: Placed) -> Matrices | None:
        """A site's matrices, unless they hold NaN or infinity."""
        names = self._keys(place.site)
        found = [self.files.tensors.read(name) for name in names]
        bad = [
            name
            for name, matrix in zip(names, found, strict=True)
            if not np.isfinite(matrix).all()
        ]
        self.nonfinite += bad
        if bad:
            return None
        matrices = found[0], found[1]
        order = place.site.order
        return matrices if order is None else _kernels.to_ours(order, matrices)

    def _lines(self) -> tuple[str, ...]:
        return lines(
            missing=self.missing,
            unexpected=list(map(explain, self.left)),
            misshapen=self.misshapen,
            nonfinite=self.nonfinite,
            changed=self.changed,
        )

    def _raise(self) -> None:
        problems = self._lines()
        if not problems:
            return
        shown = "\n".join(problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(
            f"{self.files.folder / TENSORS} does not fit the parameters:\n"
            f"{shown}{more}\n"
            "Nothing was loaded. `strict=False` loads what fits and lists the rest."
        )
