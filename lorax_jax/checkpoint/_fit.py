"""Whether the tensors of a file are those that its sites should have."""

import collections
import dataclasses
import math

import jax

from .._errors import CheckpointError
from ..planning import Plan
from . import _kernels, _packed
from ._arrays import FACTORS, Tensors, shapes
from ._file_site import FileSite
from ._files import TENSORS
from ._fused import taken
from ._peft_sites import mirrored
from ._placed import Placed
from ._problems import Problems
from ._resolve import by_slot
from ._safetensors import FLOATS, Reader
from ._sites import part_of


class Fit:
    """Compares sites with the tensors that a file has for them.

    Args:
        tensors: the file's.
        prefix: of its keys.
        plan: what the sites should be, if anybody has said it.
        problems: what does not fit is added to them, and claimed keys leave them.
    """

    def __init__(
        self, tensors: Reader, prefix: str, plan: Plan | None, problems: Problems
    ):
        self.tensors, self.prefix = tensors, prefix
        self.plan, self.problems = plan, problems

    def fits(self, place: Placed) -> bool:
        """Whether a site's tensors are there, with the shapes that it should have."""
        site, slot, _ = place
        if not self._is_planned_kind(place):
            return False
        before = self.problems.count
        part = slot.role.part
        if part is not None and not part.fits(slot.shape):
            self.problems.changed.append(
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
                self.problems.changed.append(
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
        if self.problems.count > before:
            return False
        if site.ranks is not None and self._taken(place) is None:
            self.problems.changed.append(
                f"{site.key} holds values outside of its part {site.name[1]!r}"
            )
            return False
        one, other = site.keys(self.prefix), site.tied_keys(self.prefix)
        if other and not mirrored(self.tensors, one, other):
            first, second = list(one.values())[-1], next(iter(other.values()))
            what = "transpose" if site.low_rank else "copy"
            self.problems.misshapen.append(
                f"{second} is not the {what} of {first}, and they hold one adapter"
            )
            return False
        return True

    def _taken(self, place: Placed) -> Tensors | None:
        """A part's tensors out of its module's, if those are zero outside of it."""
        keys = place.site.keys(self.prefix)
        held = {name: self.tensors.read(key) for name, key in keys.items()}
        return taken(place.site, place.slot, held)

    def _is_planned_kind(self, place: Placed) -> bool:
        """Whether a site is of the kind that the plan says."""
        site, slot, _ = place
        found = site.kind, site.bias, tuple(sorted(site.ids))
        planned = slot.role.kind, slot.bias, slot.ids
        if found == planned:
            return True
        for key in site.all_keys(self.prefix):
            self.problems.left.pop(key, None)
        self.problems.changed.append(
            f"{site.key} holds {_kind(*found)}, and the plan has {_kind(*planned)}"
        )
        return False

    def _check_tensor(self, name: str, shape: tuple[int, ...]) -> None:
        self.problems.left.pop(name, None)
        entry = self.tensors.entries.get(name)
        if entry is None:
            self.problems.missing.append(name)
        elif entry.shape != shape:
            self.problems.misshapen.append(f"{name} is {entry.shape}, not {shape}")
        elif entry.dtype is None:
            self.problems.misshapen.append(
                f"{name} is stored as {entry.code}, not as one of {', '.join(FLOATS)}"
            )
        elif entry.code == "F64" and not jax.config.read("jax_enable_x64"):
            self.problems.misshapen.append(
                f"{name} is F64, which needs `jax_enable_x64`"
            )

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
            self.problems.changed.append(
                f"{site.key} has rank {site.rank} and scale {site.scale:g}, the plan "
                f"{wanted.rank} and {wanted.scale:g}"
            )
        axes = part_of(place.slot)
        if (
            site.part is not None
            and dataclasses.replace(site.part, stack=axes.stack) != axes
        ):
            self.problems.changed.append(
                f"{site.key} has the axes {site.part}, the plan {axes}"
            )

    def one_dtype(self, placed: list[Placed]) -> list[Placed]:
        """The sites whose tensors have one dtype with those that share an array.

        The factors of a pair have one, too.
        """
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
        codes = {key: self.tensors.entries[key].code for key in keys}
        if len(set(codes.values())) < 2:
            return set()
        usual = collections.Counter(codes.values()).most_common(1)[0][0]
        like = next(key for key, code in codes.items() if code == usual)
        odd = {key: code for key, code in codes.items() if code != usual}
        self.problems.misshapen += [f"{k} is {odd[k]}, and {like} {usual}" for k in odd]
        return set(odd)


def _kind(kind: str, bias: bool, ids: tuple[int, ...]) -> str:
    rows = f" {list(ids)}" if ids else ""
    return f"{kind!r}{rows}{' with a bias of B' if bias else ''}"
