"""One site of a file, as our metadata tells it."""

import dataclasses
import math
import operator
from typing import Any, Literal

from ..adapters import KINDS
from ..structure import Part as Box
from ..structure import Run, Use
from ._fields import Fields
from ._inits import decode_init, encode_init
from ._keys import PREFIX, keys

Layout = Literal["joined", "apart"]

# What PEFT's wrappers of bare parameters add to the names of what they wrap.
BASE_LAYER = ".base_layer"

# A table has some 10^5 rows.
MOST_ROWS = 1 << 20


@dataclasses.dataclass(frozen=True)
class Part:
    """The axes of one site's weight, a single layer's.

    Attributes:
        shape: its shape.
        inputs: axes that A runs along; of a table with trained rows, the axis that
            counts them; of a leaf trained whole, none.
        outputs: axes that B runs along.
        batch: axes that are neither: experts.
        lookup: whether the weight is an embedding, looked up along `inputs`.
        stack: where the layers' axes are in a stacked leaf if not in front.
        groups: the groups of a grouped convolution, if it is one.
        name: what the part of a fused leaf is called; then all of the above is of the
            part, whose axes are those of a view.
        view: for each of the layer's own axes, `(size, start, stop, step)` for each of
            the axes that it is viewed as, or `None` where it is left as it is.
    """

    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    batch: tuple[int, ...] = ()
    lookup: bool = False
    stack: tuple[int, ...] | None = None
    groups: int | None = None
    name: str | None = None
    view: tuple[tuple[tuple[int, int, int, int], ...] | None, ...] | None = None

    @property
    def box(self) -> Box | None:
        """The part of a fused leaf, a single layer's."""
        if self.view is None or self.name is None:
            return None
        runs = (
            None if axis is None else tuple(Run(*run) for run in axis)
            for axis in self.view
        )
        return Box(self.name, tuple(runs))

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """The shape of the layer's weight, of which it may be a part."""
        return self.shape if self.box is None else self.box.leaf_shape(self.shape)


@dataclasses.dataclass(frozen=True)
class FileSite:
    """One site of a file.

    Attributes:
        path: its path, a single layer's.
        use: the only use of a tied weight that it adapts, or `None`.
        key: what stands before the ending in its keys: a module's name, or the path.
        tied: the module that holds the same factors the other way round, where an
            adapter of a tied weight is seen by both its uses; of a table trained whole,
            the tensor that holds the same copy.
        table: whether its keys are those of an embedding.
        rank: columns of A.
        alpha: numerator of the scale.
        scale: the multiplier.
        dropout: probability of dropping an input of A.
        part: roles of the axes; `None` where the file does not say.
        base: what `fingerprints` gives for the weight that it was trained on.
        kind: the kind of adapter. What is trained whole and rows have no rank: it is 0.
        bias: whether B has a bias.
        ids: which rows of a table are trained, in the order of the tensor: ours are
            ascending.
        transposed: whether the tensor of a leaf trained whole is `(d_out, d_in)`, where
            ours is `(d_in, d_out)`; of a convolution `(d_out, d_in, *window)`, where
            ours is `(*window, d_in, d_out)`.
        order: of a convolution's kernel with PEFT's keys: for each axis of its A behind
            the rank, which of our input axes it is.
        parameter: of a bare parameter with PEFT's keys: the tensor's name. Its factors
            are packed; see `_packed.py`.
        mirrored: whether PEFT's A runs along our outputs there.
        ranks: of a part of a leaf with PEFT's keys, which hold all parts of the leaf:
            its first rank there, and how many there are.
        start: where starting factors are, if it has any: `"joined"` with the others in
            tensors of twice the rank, or `"apart"`; see `_starts.py`.
        frozen: which of its factors are not trained.
        init: the initializer's name, or its options; `None` for the usual one.
        turned: where `part` is not said: our array is `(d_out, d_in)`. Not recorded.
    """

    path: str
    use: Use | None
    key: str
    tied: str | None
    table: bool
    rank: int
    alpha: float
    scale: float
    dropout: float
    part: Part | None = None
    base: str | None = None
    kind: str = "lora"
    bias: bool = False
    ids: tuple[int, ...] = ()
    transposed: bool = False
    order: tuple[int, ...] | None = None
    parameter: str | None = None
    mirrored: bool = False
    ranks: tuple[int, int] | None = None
    start: Layout | None = None
    frozen: tuple[str, ...] = ()
    init: Any = None
    turned: bool = False

    @property
    def name(self) -> tuple[str, str | None]:
        """What tells it from other sites, those of the same path included."""
        part = None if self.part is None else self.part.name
        return self.path, part or ("rows" if self.kind == "rows" else self.use)

    @property
    def width(self) -> int:
        """How many ranks of the tensors under its keys are its own."""
        return 2 * self.rank if self.start == "joined" else self.rank

    @property
    def module_rank(self) -> int:
        """The rank of the tensors under its keys."""
        return self.width if self.ranks is None else self.ranks[1]

    @property
    def is_plain(self) -> bool:
        """Whether it is a LoRA of a module, and of all of it, and is all trained."""
        more = self.bias or self.parameter is not None
        more = more or self.start is not None or bool(self.frozen)
        return self.kind == "lora" and not more and not (self.part and self.part.view)

    @property
    def low_rank(self) -> bool:
        """Whether it has factors."""
        return self.rank > 0

    @property
    def target(self) -> str:
        """What PEFT's configuration calls it: the module, or the bare parameter."""
        return self.parameter or self.key

    def keys(self, prefix: str = PREFIX) -> dict[str, str]:
        """The keys of its tensors, by the names of its arrays."""
        return keys(
            self.key,
            kind=self.kind,
            table=self.table,
            bias=self.bias,
            apart=self.start == "apart",
            prefix=prefix,
        )

    def tied_keys(self, prefix: str = PREFIX) -> dict[str, str]:
        """The keys of the tensors of `tied`; empty if there is none."""
        if self.tied is None:
            return {}
        return keys(self.tied, kind=self.kind, prefix=prefix)

    def all_keys(self, prefix: str = PREFIX) -> list[str]:
        """The keys of both."""
        return [*self.keys(prefix).values(), *self.tied_keys(prefix).values()]

    def encode(self) -> dict[str, Any]:
        """As JSON, without what says nothing."""
        site = dataclasses.asdict(self)
        del site["turned"]
        site["init"] = encode_init(self.init)
        for name, usual in _USUAL.items():
            if site[name] == usual:
                del site[name]
        for fields in (site, site.get("part") or {}):
            for name in [n for n, v in fields.items() if v is None]:
                del fields[name]
        return site


_USUAL: dict[str, Any] = {
    "kind": "lora",
    "bias": False,
    "ids": (),
    "transposed": False,
    "mirrored": False,
    "frozen": (),
}


def read_site(site: Any, what: str) -> FileSite:
    """A site as `encode` wrote it.

    Raises:
        CheckpointError: if it is not what `encode` writes.
    """
    read = Fields(site, f"The metadata of {what}")
    part = read("part", dict, optional=True)
    rank, scale, dropout = (
        read("rank", int),
        read("scale", float),
        read("dropout", float),
    )
    kind = read("kind", str, tuple(KINDS), optional=True) or "lora"
    ids = read.sizes("ids", MOST_ROWS) if kind == "rows" else ()
    least = 1 if "a" in KINDS[kind].train else 0
    fine = least <= rank < (1 << 24 if least else 1)
    if not fine or not math.isfinite(scale) or not 0 <= dropout < 1:
        raise read.bad("rank, scale and dropout", (rank, scale, dropout))
    if kind == "rows" and not (ids and all(map(operator.lt, ids, ids[1:]))):
        raise read.bad("`ids`", ids)
    bias = bool(read("bias", bool, optional=True))
    if bias and "bias" not in KINDS[kind].optional:
        raise read.bad("a bias of B in a site of the kind", kind)
    axes = None if part is None else _part(part, what, kind)
    order = read.sizes("order") if read.fields.get("order") is not None else None
    if order is not None:
        count = len(order) if axes is None else len(axes.inputs)
        if not least or len(order) < 2 or sorted(order) != [*range(count)]:
            raise read.bad("`order`", order)
    key, parameter = read("key", str), read("parameter", str, optional=True)
    if parameter is not None:
        module = parameter.rpartition(".")[0]
        wrapped = key.removeprefix(module).replace(BASE_LAYER, "")
        many = axes is None or len(axes.batch) > 1 or axes.groups is not None
        if wrapped or not key.startswith(module) or many or kind != "lora" or bias:
            raise read.bad("`parameter`", (parameter, key, kind))
    ranks = read.sizes("ranks") if read.fields.get("ranks") is not None else None
    if ranks is not None:
        plain = kind == "lora" and not bias and axes is not None and axes.box
        if len(ranks) != 2 or ranks[0] + rank > ranks[1] or not plain:
            raise read.bad("`ranks`", ranks)
        ranks = ranks[0], ranks[1]
    start = read("start", str, ("joined", "apart"), optional=True)
    if start is not None and "a0" not in KINDS[kind].optional:
        raise read.bad("starting factors in a site of the kind", kind)
    frozen = read("frozen", list, optional=True) or []
    if frozen not in [[], *([name] for name in KINDS[kind].freezable)]:
        raise read.bad("`frozen`", frozen)
    if (
        ranks is not None
        and ranks[0] + (2 if start == "joined" else 1) * rank > ranks[1]
    ):
        raise read.bad("`ranks`", ranks)
    return FileSite(
        path=read("path", str),
        use=read("use", str, ("lookup", "head"), optional=True),
        key=key,
        tied=read("tied", str, optional=True),
        table=read("table", bool),
        rank=rank,
        alpha=read("alpha", float),
        scale=scale,
        dropout=dropout,
        part=axes,
        base=read("base", str, optional=True),
        kind=kind,
        bias=bias,
        ids=ids,
        transposed=bool(read("transposed", bool, optional=True)),
        order=order,
        parameter=parameter,
        mirrored=bool(read("mirrored", bool, optional=True)),
        ranks=ranks,
        start=start,
        frozen=tuple(frozen),
        init=decode_init(read),
    )


def _part(part: Any, what: str, kind: str) -> Part:
    read = Fields(part, f"The metadata of {what}")
    found = Part(
        shape=read.sizes("shape"),
        inputs=read.sizes("inputs"),
        outputs=read.sizes("outputs"),
        batch=read.sizes("batch"),
        lookup=read("lookup", bool),
        stack=read.sizes("stack") if part.get("stack") is not None else None,
        groups=read("groups", int, optional=True),
        name=read("name", str, optional=True),
        view=_view(read) if part.get("view") is not None else None,
    )
    axes = (*found.inputs, *found.outputs, *found.batch)
    stack = found.stack or ()
    fine = sorted(axes) == list(range(len(found.shape)))
    fine &= len({*stack}) == len(stack)
    fine &= (found.view is None) == (found.name is None)
    count = len(found.shape) if found.view is None else len(found.view)
    fine &= max(stack, default=-1) < count + len(stack)
    if fine and found.box is not None:
        runs = found.box.runs
        fine &= "a" in KINDS[kind].train and not found.groups
        fine &= len(runs) == len(found.shape) and all(
            run is None or (run.count == n and run.stop <= run.size)
            for run, n in zip(runs, found.shape, strict=False)
        )
    if kind == "whole":
        fine &= not found.inputs and not found.batch
    else:
        fine &= bool(found.inputs and found.outputs)
    if kind == "rows":
        fine &= len(found.inputs) == 1 and not found.batch and not stack
    if found.groups is not None:
        outputs = math.prod(found.shape[axis] for axis in found.outputs) if fine else 0
        fine &= "a" in KINDS[kind].train and found.groups > 1
        fine &= outputs % max(found.groups, 1) == 0
    if not fine:
        raise read.bad("shape and axes", (found.shape, *axes, *stack))
    return found


def _view(read: Fields) -> tuple[tuple[tuple[int, int, int, int], ...] | None, ...]:
    """The axes of a view, as far as they can be read by themselves."""
    value = read("view", list)
    axes = []
    for axis in value:
        runs = [] if axis is None else axis
        if len(value) > 16 or not isinstance(runs, list) or len(runs) > 16:
            raise read.bad("`view`", value)
        for run in runs:
            whole = isinstance(run, list) and [*map(type, run)] == [int] * 4
            if not whole or not 0 <= run[1] < run[2] <= run[0] < 1 << 48:
                raise read.bad("`view`", value)
            if not 1 <= run[3] <= run[0]:
                raise read.bad("`view`", value)
        if axis is not None and not runs:
            raise read.bad("`view`", value)
        axes.append(None if axis is None else tuple(map(tuple, runs)))
    return tuple(axes)
