"""One call of `load_adapter`: which tensors are there, and whether they fit."""

import collections
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from .._errors import CheckpointError, ReplicationError
from .._names import NameMap
from ..adapters import Adapter
from ..planning import Plan
from ..replication import layers_of
from . import _kernels, _packed
from ._arrays import FACTORS, Tensors, shapes
from ._base_copies import base_copies
from ._edited import edited
from ._file_site import FileSite
from ._files import TENSORS, AdapterFiles
from ._fingerprint import differ, fingerprints
from ._fused import taken
from ._grown import check_grown, check_rows
from ._keys import PREFIX, explain
from ._peft_sites import mirrored, peft_sites
from ._placed import Placed, placed_sites
from ._plan_of import adapter_of, plan_of
from ._receipt import Receipt, lines
from ._resolve import Tree, by_slot, place_by_path, place_by_plan
from ._safetensors import FLOATS
from ._sites import part_of
from ._starts import parted
from ._unconverted import Begun


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
        norms: bool = True,
        repeated: bool = False,
        start: Adapter | None = None,
        is_start: bool = False,
    ):
        self.files = files
        self.params = params
        self.begun = Begun(files, start, is_start=is_start)
        self.conv1d = conv1d
        self.norms = norms  # whether DoRA's are taken of the base
        self.layer_replication = files.layer_replication
        if not repeated:  # or known to be
            self._check_layers(params)
        self.entries = files.tensors.entries
        self.tree = Tree(params)
        self.plan = plan
        self.names = None if names is None else NameMap.of(names)
        self.left = dict.fromkeys(self.entries)  # keys that no site has claimed
        self.promised = 0
        self.prefix = PREFIX
        self.rslora = False
        self.bias = "none"
        self.missing: list[str] = []
        self.misshapen: list[str] = []
        self.nonfinite: list[str] = []
        self.changed: list[str] = []
        self.ignored: list[str] = []

    def run(self, strict: bool) -> tuple[Adapter, Receipt]:
        check_grown(self.files, self.tree)
        sites = self._sites()
        self.changed += edited(self.files, self.names, self.tree)
        placed = self._place(sites)
        check_rows(self.files, placed)
        fit = [place for place in placed if self._fits(place)]
        fit = self._one_dtype(fit)
        self._check_bases(fit)
        self._drop_copies(fit)
        if strict:
            self._raise()
        loaded = [(place, self._read(place)) for place in fit]
        kept = [(place, tensors) for place, tensors in loaded if tensors is not None]
        if strict:
            self._raise()
        if not any(place.site.low_rank for place, _ in kept):
            raise CheckpointError(
                f"No factors of {self.files.folder} fit the parameters.\n"
                + "\n".join(self._lines()[:20])
            )
        return self._finish(kept, max(len(sites) + self.promised, len(self.plan or ())))

    def _check_layers(self, params: Any) -> None:
        """Raises unless the parameters' layers are repeated as the adapter's were."""
        try:
            found = layers_of(params, self.layer_replication)
        except ReplicationError as error:
            raise CheckpointError(
                f"The adapter in {self.files.folder} is for other layers: {error}"
            ) from None
        if found != self.layer_replication:
            raise CheckpointError(
                f"The layers of the parameters are repeated, {found}, and the adapter "
                f"in {self.files.folder} is for a model whose layers are not. Load it "
                "onto the parameters that `replicate` was given."
            )

    def _finish(
        self, kept: list[tuple[Placed, Tensors]], expected: int
    ) -> tuple[Adapter, Receipt]:
        places = [place for place, _ in kept]
        dtype = next(held["a"].dtype for place, held in kept if place.site.low_rank)
        plan = plan_of(
            places,
            self.tree,
            rslora=self.rslora,
            bias=self.bias,
            layer_replication=self.layer_replication,
            dtype=dtype,
            plan=self.plan,
        )
        adapter = adapter_of(plan, kept, self.tree if self.norms else None)
        adapter, plan = self.begun.on_the_base(adapter, plan, self.params)
        return adapter, Receipt(
            expected=expected,
            sites=len(kept),
            tensors=len({key for p in places for key in self._all_keys(p.site)}),
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
            self.rslora, self.bias = record.rslora, record.bias
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
        self.promised = found.promised
        self.rslora = bool(self.files.config.get("use_rslora"))
        self.bias = found.bias
        return [self.begun.told(site) for site in found.sites]

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
        here = {site.name for site in placed}
        for place in placed_sites(self.plan, self.names if self.prefix else None):
            if place.site.name not in here:
                self._miss(place.site)
        return list(placed.values())

    def _miss(self, site: FileSite) -> None:
        prefix = self.prefix if self.names is not None or not self.prefix else ""
        for key in site.keys(prefix).values():
            if key not in self.missing:
                self.missing.append(key)

    def _fits(self, place: Placed) -> bool:
        """Whether a site's tensors are there, with the shapes that it should have."""
        site, slot, _ = place
        if not self._is_planned_kind(place):
            return False
        before = len(self.missing) + len(self.misshapen) + len(self.changed)
        part = slot.role.part
        if part is not None and not part.fits(slot.shape):
            self.changed.append(
                f"{site.key} is a part of a weight whose axes are viewed as "
                f"{part.view(slot.shape)}, and {site.path} has the shape {slot.shape}"
            )
        wanted = shapes(slot, site.width)
        if site.ranks is not None:
            leaf = dataclasses.replace(slot, role=slot.role.leaf)
            wanted = shapes(leaf, site.module_rank)
        if site.order is not None:
            if len(site.order) == len(slot.inputs):
                wanted = _kernels.shapes(site.order, slot.inputs, wanted)
            else:
                self.changed.append(
                    f"{site.key} is a kernel with {len(site.order)} input axes, and "
                    f"{site.path} has {len(slot.inputs)}"
                )
        if site.parameter is not None:
            wanted = _packed.shapes(site.mirrored, wanted)
        if site.transposed:
            wanted = {"whole": _kernels.shape_turned(wanted["whole"])}
        for name, key in site.keys(self.prefix).items():
            self._check_tensor(key, wanted[name.removesuffix("0")])
        if site.low_rank and site.tied is not None:
            wanted = {"a": wanted["b"][::-1], "b": wanted["a"][::-1]}
        for name, key in site.tied_keys(self.prefix).items():
            self._check_tensor(key, wanted[name])
        if site.low_rank:
            self._check_rank(site, shapes(slot, 1))
        if self.plan is not None:
            self._check_planned(place)
        if len(self.missing) + len(self.misshapen) + len(self.changed) > before:
            return False
        if site.ranks is not None and self._taken(place) is None:
            self.changed.append(
                f"{site.key} holds values outside of its part {site.name[1]!r}"
            )
            return False
        one, other = site.keys(self.prefix), site.tied_keys(self.prefix)
        if other and not mirrored(self.files.tensors, one, other):
            first, second = list(one.values())[-1], next(iter(other.values()))
            what = "transpose" if site.low_rank else "copy"
            self.misshapen.append(
                f"{second} is not the {what} of {first}, and they hold one adapter"
            )
            return False
        return True

    def _taken(self, place: Placed) -> Tensors | None:
        """A part's tensors out of its module's, if those are zero outside of it."""
        keys = place.site.keys(self.prefix)
        held = {name: self.files.tensors.read(key) for name, key in keys.items()}
        return taken(place.site, place.slot, held)

    def _is_planned_kind(self, place: Placed) -> bool:
        """Whether a site is of the kind that the plan says."""
        site, slot, _ = place
        found = site.kind, site.bias, tuple(sorted(site.ids))
        planned = slot.role.kind, slot.bias, slot.ids
        if found == planned:
            return True
        for key in self._all_keys(site):
            self.left.pop(key, None)
        self.changed.append(
            f"{site.key} holds {_kind(*found)}, and the plan has {_kind(*planned)}"
        )
        return False

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

    def _check_rank(self, site: FileSite, one: dict[str, tuple[int, ...]]) -> None:
        """A stack is padded to its largest rank, which may not be out of all bounds."""
        most = one["a"][-1] + one["b"][-2]
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
        """Tensors that share an array, and the factors of a pair, have one dtype."""
        kept = []
        for group in by_slot({place.site: place for place in placed}).values():
            odd: set[str] = set()
            for names in (FACTORS, ("bias",), ("magnitude",), ("whole",), ("rows",)):
                found = [site.keys(self.prefix) for site, _, _ in group]
                alike = [keys[name] for keys in found for name in names if name in keys]
                odd |= self._odd_dtypes(alike)
            kept += [
                place
                for place in group
                if not odd & {*place.site.keys(self.prefix).values()}
            ]
        return kept

    def _odd_dtypes(self, keys: list[str]) -> set[str]:
        codes = {key: self.entries[key].code for key in keys}
        if len(set(codes.values())) < 2:
            return set()
        usual = collections.Counter(codes.values()).most_common(1)[0][0]
        like = next(key for key, code in codes.items() if code == usual)
        odd = {key: code for key, code in codes.items() if code != usual}
        self.misshapen += [f"{k} is {odd[k]}, and {like} {usual}" for k in odd]
        return set(odd)

    def _all_keys(self, site: FileSite) -> list[str]:
        both = site.keys(self.prefix), site.tied_keys(self.prefix)
        return [key for keys in both for key in keys.values()]

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

    def _drop_copies(self, placed: list[Placed]) -> None:
        if self.names is None or self.files.record is not None:
            return
        adapted = {place.site.key for place in placed if place.site.low_rank}
        found = base_copies(
            self.left,
            self.files.tensors,
            self.names,
            self.tree,
            prefix=self.prefix,
            residuals=adapted if self.begun.residual else set(),
        )
        for key, what in found.items():
            del self.left[key]
            self.ignored.append(f"{key} ({what})")

    def _read(self, place: Placed) -> Tensors | None:
        """A site's tensors, unless they hold NaN or infinity."""
        keys = place.site.keys(self.prefix)
        found = {name: self.files.tensors.read(key) for name, key in keys.items()}
        bad = [keys[name] for name, x in found.items() if not np.isfinite(x).all()]
        self.nonfinite += bad
        if bad:
            return None
        if place.site.transposed:
            found["whole"] = _kernels.turned_back(found["whole"])
        if place.site.ids:
            found["rows"] = found["rows"][np.argsort(place.site.ids)]
        found = self._unpacked(place, found)
        return parted(found) if found and place.site.start == "joined" else found

    def _unpacked(self, place: Placed, found: Tensors) -> Tensors | None:
        if place.site.parameter is not None:
            return _packed.to_ours(place.site.mirrored, place.slot.experts, found)
        if place.site.ranks is not None:
            return taken(place.site, place.slot, found)
        order = place.site.order
        return found if order is None else _kernels.to_ours(order, found)

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


def _kind(kind: str, bias: bool, ids: tuple[int, ...]) -> str:
    rows = f" {list(ids)}" if ids else ""
    return f"{kind!r}{rows}{' with a bias of B' if bias else ''}"
