r"""Several parts of one leaf as the one LoRA that PEFT has for its module.

PEFT sees a fused leaf whole. Parts $i$ with one scale $s$ are an ordinary LoRA of it,

$$s \sum_i A_i B_i = s\,[A_1 \; A_2 \; \ldots]\,[B_1; B_2; \ldots],$$

whose rank is the sum of theirs and whose B is zero outside of each part. The metadata
says which ranks are whose, so that reading gives the parts back, bit for bit.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from .._errors import CheckpointError
from ..planning import Slot
from ..structure import RANK, Factor
from ._arrays import Tensors
from ._file_site import FileSite

if TYPE_CHECKING:
    from ._placed import Placed


def with_ranks(placed: "Sequence[Placed]") -> "list[Placed]":
    """Tells the parts of each module which of its ranks are theirs."""
    starts: dict[str, int] = {}
    for place in placed:
        if place.slot.role.part is not None:
            key = place.site.key
            starts[key] = starts.get(key, 0) + place.site.width
    totals, found = dict(starts), []
    for place in reversed(placed):
        if place.slot.role.part is not None:
            key = place.site.key
            starts[key] -= place.site.width
            ranks = starts[key], totals[key]
            site = dataclasses.replace(place.site, ranks=ranks)
            place = place._replace(site=site)
        found.append(place)
    return found[::-1]


def fused(parts: Sequence[tuple[FileSite, Slot, Tensors]]) -> Tensors:
    """The tensors of a module whose parts have these.

    Raises:
        CheckpointError: if their scales differ.
    """
    scales = {np.float32(site.scale) for site, _, _ in parts}
    if len(scales) > 1:
        shown = ", ".join(f"{site.name[1]} {site.scale:g}" for site, _, _ in parts)
        raise CheckpointError(
            f"The parts of {parts[0][0].path!r} have different scales ({shown}), and "
            "PEFT has one for the module that holds them. Give each part an `alpha` "
            "in proportion to its rank, leave `names` out for a file with our paths, "
            "or merge the adapter."
        )
    ordered = sorted(parts, key=lambda part: part[0].ranks or (0, 0))
    laid = [_laid(slot, tensors) for _, slot, tensors in ordered]
    return {
        "a": np.concatenate([one["a"] for one in laid], axis=0),
        "b": np.concatenate([one["b"] for one in laid], axis=1),
    }


def taken(site: FileSite, slot: Slot, tensors: Tensors) -> Tensors | None:
    """The tensors of one part, from those of its module.

    Returns:
        Its tensors, or `None` where the module's are not zero outside of the part.
    """
    assert site.ranks is not None and slot.role.part is not None
    mine = slice(site.ranks[0], site.ranks[0] + site.width)
    whole = {"a": tensors["a"][mine], "b": tensors["b"][:, mine]}
    found = {}
    for name, factor in _factors(slot, whole, leaf=True).items():
        found[name] = slot.role.part.take(factor, slot.shape).array
    d_in, d_out = slot.sides
    part = {
        "a": np.ascontiguousarray(np.asarray(found["a"]).reshape(-1, d_in)),
        "b": np.ascontiguousarray(np.asarray(found["b"]).reshape(d_out, -1)),
    }
    back = _laid(slot, part)
    same = all(np.array_equal(back[name], whole[name]) for name in part)
    return part if same else None


def whole_modules(sites: Iterable[FileSite], *, rslora: bool) -> list[FileSite]:
    """The sites with one in place of the parts of each module: an ordinary LoRA."""
    found: dict[Any, FileSite] = {}
    for site in sites:
        if site.ranks is None:
            found[site.name] = site
        elif (site.key, None) not in found:
            found[site.key, None] = dataclasses.replace(
                site,
                rank=site.ranks[1],
                alpha=module_alpha(site, rslora=rslora),
                ranks=None,
                part=None,
                start=None,
                frozen=(),
            )
    return list(found.values())


def module_alpha(site: FileSite, *, rslora: bool) -> float:
    """The alpha from which PEFT finds a site's scale at the rank of its tensors."""
    if site.ranks is None:
        return site.alpha * _ratio(site, rslora)
    return site.scale * (math.sqrt(site.ranks[1]) if rslora else site.ranks[1])


def _ratio(site: FileSite, rslora: bool) -> float:
    if site.width == site.rank:
        return 1
    return math.sqrt(site.width / site.rank) if rslora else site.width / site.rank


def tiled(sites: Iterable[FileSite]) -> bool:
    """Whether the parts of each module have all of its ranks, each once."""
    modules: dict[str, list[FileSite]] = {}
    for site in sites:
        if site.ranks is not None:
            modules.setdefault(site.key, []).append(site)
    for parts in modules.values():
        ranks = [(*(site.ranks or ()), site.width) for site in parts]
        ranks.sort()
        ends = [0, *itertools.accumulate(rank for _, _, rank in ranks)]
        starts = [start for start, _, _ in ranks]
        fine = starts == ends[:-1] and {total for _, total, _ in ranks} == {ends[-1]}
        if not fine or len({site.path for site in parts}) > 1:
            return False
    return True


def _laid(slot: Slot, tensors: Tensors) -> Tensors:
    """The tensors of a part, with zeros around them, as the leaf's."""
    leaf = slot.role.leaf
    d_in, d_out = (
        math.prod(leaf.sizes(slot.shape, axes)) for axes in (leaf.inputs, leaf.outputs)
    )
    shapes = {"a": (-1, d_in), "b": (d_out, -1)}
    return {
        name: np.asarray(slot.role.lay(factor, slot.shape).array).reshape(shapes[name])
        for name, factor in _factors(slot, tensors, leaf=False).items()
    }


def _factors(
    slot: Slot, tensors: Mapping[str, Any], *, leaf: bool
) -> dict[str, Factor]:
    """A file's matrices with the axes of a part, or of its leaf."""
    role = slot.role.leaf if leaf else slot.role
    inputs, outputs = (role.sizes(slot.shape, a) for a in (role.inputs, role.outputs))
    a = jnp.asarray(tensors["a"]).reshape(-1, *inputs)
    b = jnp.asarray(tensors["b"]).reshape(*outputs, -1)
    return {
        "a": Factor(a, (RANK, *role.inputs)),
        "b": Factor(b, (*role.outputs, RANK)),
    }
