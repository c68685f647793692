"""One call of `load_adapter`: from a folder to an adapter and a receipt."""

from typing import Any

import numpy as np

from .._errors import CheckpointError, ReplicationError
from .._names import NameMap
from ..adapters import Adapter
from ..planning import Plan
from ..replication import layers_of
from . import _kernels, _packed
from ._arrays import Tensors
from ._base_copies import base_copies
from ._edited import edited
from ._file_site import FileSite
from ._files import AdapterFiles
from ._fingerprint import differ, fingerprints
from ._fit import Fit
from ._fused import taken
from ._grown import check_grown, check_rows
from ._keys import PREFIX, explain
from ._peft_sites import peft_sites
from ._placed import Placed, placed_sites
from ._plan_of import adapter_of, plan_of
from ._problems import Problems
from ._receipt import Receipt
from ._resolve import Tree, by_slot, place_by_path, place_by_plan
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
        self.tree = Tree(params)
        self.plan = plan
        self.names = None if names is None else NameMap.of(names)
        self.problems = Problems(left=dict.fromkeys(files.tensors.entries))
        self.promised = 0
        self.prefix = PREFIX
        self.rslora = False
        self.bias = "none"

    def run(self, strict: bool) -> tuple[Adapter, Receipt]:
        check_grown(self.files, self.tree)
        sites = self._sites()
        self.problems.changed += edited(self.files, self.names, self.tree)
        placed = self._place(sites)
        check_rows(self.files, placed)
        fit = Fit(self.files.tensors, self.prefix, self.plan, self.problems)
        fit = fit.one_dtype([place for place in placed if fit.fits(place)])
        self._check_bases(fit)
        self._drop_copies(fit)
        if strict:
            self.problems.check(self.files.folder)
        loaded = [(place, self._read(place)) for place in fit]
        kept = [(place, tensors) for place, tensors in loaded if tensors is not None]
        if strict:
            self.problems.check(self.files.folder)
        if not any(place.site.low_rank for place, _ in kept):
            raise CheckpointError(
                f"No factors of {self.files.folder} fit the parameters.\n"
                + "\n".join(self.problems.lines()[:20])
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
            tensors=len({key for p in places for key in p.site.all_keys(self.prefix)}),
            leaves=len({place.slot.role.path for place in places}),
            missing=tuple(self.problems.missing),
            unexpected=tuple(map(explain, self.problems.left)),
            misshapen=tuple(self.problems.misshapen),
            nonfinite=tuple(self.problems.nonfinite),
            changed=tuple(self.problems.changed),
            ignored=tuple(self.problems.ignored),
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
        self.problems.missing += found.missing
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
            if key not in self.problems.missing:
                self.problems.missing.append(key)

    def _check_bases(self, placed: list[Placed]) -> None:
        """Compares the weights with those that the adapter was trained on."""
        for group in by_slot({place.site: place for place in placed}).values():
            known = [place for place in group if place.site.base is not None]
            found = fingerprints(group[0].slot, self.tree.leaves) if known else None
            self.problems.changed += [
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
            self.problems.left,
            self.files.tensors,
            self.names,
            self.tree,
            prefix=self.prefix,
            residuals=adapted if self.begun.residual else set(),
        )
        for key, what in found.items():
            del self.problems.left[key]
            self.problems.ignored.append(f"{key} ({what})")

    def _read(self, place: Placed) -> Tensors | None:
        """A site's tensors, unless they hold NaN or infinity."""
        keys = place.site.keys(self.prefix)
        found = {name: self.files.tensors.read(key) for name, key in keys.items()}
        bad = [keys[name] for name, x in found.items() if not np.isfinite(x).all()]
        self.problems.nonfinite += bad
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
