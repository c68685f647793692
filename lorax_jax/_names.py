"""`NameMap`: the paths of a parameter tree beside the names that a checkpoint uses."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

from ._errors import ConfigError, closest, shorten

Layout = Literal["linear", "conv", "same"]
Entry = tuple[str, str, Layout]

_PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")
_INDEX = r"0|[1-9][0-9]*"
_WEIGHT = ".weight"

# Modules that hold a table of tokens, by the last part of their names in the
# checkpoints of Transformers. Only asked for where a table names several lookups.
_TOKEN_TABLES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")


class Module(NamedTuple):
    """A module of a checkpoint, and where its weight is.

    Attributes:
        path: the path of its weight.
        name: its name.
        layout: how the two weights relate.
        layer: the index of its layer, or `None`.
        around: what stands before and after that index in the path.
    """

    path: str
    name: str
    layout: Layout
    layer: int | None
    around: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class NameMap:
    """Translates paths to the tensor and module names of a checkpoint, and back.

    It is a table of `(ours, theirs, layout)`: a path, a tensor's name, and how the two
    arrays relate:

    - `"linear"`: theirs is `(d_out, d_in)`, the transpose of ours, `(d_in, d_out)`.
      Where ours has several axes on a side, `(d_in, heads, head_dim)` say, theirs has
      them flattened into one. An axis of experts stays in front on both sides.
    - `"conv"`: the kernel of a convolution of any rank; theirs is
      `(d_out, d_in, *window)`, ours `(*window, d_in, d_out)`.
    - `"same"`: the arrays are equal. Embeddings, vectors, GPT-2's `Conv1D` kernels,
      kernels of convolutions that lie as torch has them.

    `{i}` stands for the index of a layer and appears on both sides. Paths are those of
    single layers, `layers/3/attn/q_proj/kernel`, as a plan's sites carry them, so one
    table serves a stacked tree and an unrolled one.

    A module is what holds a tensor named `weight`: `model.norm` for
    `model.norm.weight`. Nothing is ever cut out of the middle of a name. A tensor of
    another name is a bare parameter of its module, `experts.down_proj` say, which PEFT
    finds by `target_parameters` and not by `target_modules`. Those of one module are
    listed in the order in which the module's class makes them: that order is in the
    keys of PEFT's files.

    Args:
        entries: the table; an iterable of triples.
        head: module name of the output head. A table that does not list it describes a
            model whose head is tied to an embedding.
        tied: the path of that embedding. `"auto"` takes the table of tokens among the
            entries where it can be told, `None` says that there is no such tie.
        parameters: tensor names, as `entries` has them, that end in `weight` and are
            bare parameters all the same: those of modules that PEFT has no layer for,
            such as the router of a mixture of experts.
        is_transposed: modules whose attribute of this name is true. PEFT takes the
            axes of a bare parameter to be `(experts, d_out, d_in)`, and of theirs to be
            `(experts, d_in, d_out)`.

    Raises:
        ConfigError: if an entry is malformed, or a name appears twice.

    Example:
        >>> names = NameMap([("layers/{i}/q_proj/kernel",
        ...                   "model.layers.{i}.self_attn.q_proj.weight", "linear")])
        >>> names.module("layers/3/q_proj/kernel")
        'model.layers.3.self_attn.q_proj'
        >>> names.path("model.layers.3.self_attn.q_proj.weight")
        'layers/3/q_proj/kernel'
        >>> experts = NameMap([("layers/{i}/up", "layers.{i}.experts.up", "linear")])
        >>> experts.parameter("layers/0/up"), names.parameter("layers/3/q_proj/kernel")
        ('layers.0.experts.up', None)
    """

    entries: tuple[Entry, ...]
    head: str = "lm_head"
    tied: str | None = "auto"
    parameters: tuple[str, ...] = ()
    is_transposed: tuple[str, ...] = ()

    def __post_init__(self):
        entries = tuple(_entry(entry) for entry in self.entries)
        if not entries:
            raise ConfigError(
                "`names` is empty. Give a table of (path, tensor name, layout), e.g. "
                "`model.names`."
            )
        for side, label in ((0, "path"), (1, "tensor name")):
            seen: set[str] = set()
            for entry in entries:
                if entry[side] in seen:
                    raise ConfigError(
                        f"`names` lists the {label} {entry[side]!r} twice. Each path "
                        "belongs to one tensor."
                    )
                seen.add(entry[side])
        object.__setattr__(self, "entries", entries)
        tensors = [entry[1] for entry in entries]
        modules = [tensor.rpartition(".")[0] for tensor in tensors]
        for field, known in (("parameters", tensors), ("is_transposed", modules)):
            object.__setattr__(self, field, _among(field, getattr(self, field), known))
        if self.tied == "auto":
            has_head = self.head + _WEIGHT in {entry[1] for entry in entries}
            object.__setattr__(self, "tied", None if has_head else self.tokens)

    @classmethod
    def of(cls, names: Any) -> "NameMap":
        """`names` as a `NameMap`: one already, or the entries of one.

        >>> NameMap.of([("w", "w.weight", "same")]).tensor("w")
        'w.weight'
        """
        if isinstance(names, NameMap):
            return names
        if isinstance(names, str | Mapping) or not isinstance(names, Iterable):
            raise ConfigError(
                f"`names` is a {type(names).__name__}, not a table. Give an iterable "
                "of (path, tensor name, layout) or a `NameMap`; for the models of "
                "`lorax_jax.models` it is `model.names`."
            )
        return cls(tuple(names))

    def __iter__(self) -> Iterator[Entry]:
        """The entries of the table."""
        return iter(self.entries)

    def tensor(self, path: str) -> str | None:
        """The name of the tensor at `path`, or `None` if the table has no such path."""
        return self._translate(path, 0)

    def path(self, tensor: str) -> str | None:
        """The path of the tensor of this name, or `None`."""
        return self._translate(tensor, 1)

    def module(self, path: str) -> str | None:
        """The module whose `weight` is at `path`, or `None`."""
        tensor = self.tensor(path)
        if tensor is None or not tensor.endswith(_WEIGHT):
            return None
        return tensor.removesuffix(_WEIGHT)

    def module_path(self, module: str) -> str | None:
        """The path of a module's `weight`, or `None`."""
        return self.path(module + _WEIGHT)

    def parameter(self, path: str) -> str | None:
        """The name of the tensor at `path` if it is a bare parameter, or `None`."""
        found = self._find(path, 0)
        if found is None or not self._is_bare(found[0].entry[1]):
            return None
        return self.tensor(path)

    def tensors_of(self, module: str) -> list[str]:
        """The names of a module's own tensors, in the order of the table.

        >>> names = NameMap([("u/{i}", "h.{i}.up", "same"), ("d/{i}", "h.{i}.down",
        ...                   "same"), ("q", "h.q.weight", "same")])
        >>> names.tensors_of("h.3")
        ['h.3.up', 'h.3.down']
        """
        return [
            f"{module}.{entry[1].rpartition('.')[2]}"
            for entry, owner in zip(self.entries, self._owners, strict=True)
            if owner.fullmatch(module)
        ]

    def reads_transposed(self, module: str) -> bool:
        """Whether the module's attribute `is_transposed` is true."""
        return any(_compile(name).fullmatch(module) for name in self.is_transposed)

    def layout(self, path: str) -> Layout | None:
        """How the arrays at `path` and in the checkpoint relate, or `None`."""
        found = self._find(path, 0)
        return None if found is None else found[0].entry[2]

    def expand(self, layers: int) -> "Iterator[Module]":
        """Every module of a model with so many layers.

        Bare parameters, and entries that count more than layers, are left out.

        >>> names = NameMap([("h/{i}/w", "h.{i}.w.weight", "same"),
        ...                  ("h/{i}/b", "h.{i}.w.bias", "same")])
        >>> [(module.path, module.name) for module in names.expand(2)]
        [('h/0/w', 'h.0.w'), ('h/1/w', 'h.1.w')]
        """
        for tensor in self._expand(layers, self._is_module):
            yield tensor._replace(name=tensor.name.removesuffix(_WEIGHT))

    def expand_parameters(self, layers: int) -> "Iterator[Module]":
        """Every bare parameter of such a model, as `expand` gives modules."""
        return self._expand(layers, self._is_bare)

    def tensors(self, layers: int) -> "Iterator[Module]":
        """Every tensor of such a model, as `expand` gives modules."""
        return self._expand(layers, lambda tensor: True)

    def _expand(self, layers: int, wanted: Callable[[str], bool]) -> "Iterator[Module]":
        for template in self._templates:
            ours, theirs, layout = template.entry
            names = _PLACEHOLDER.findall(ours)
            if len(names) > 1 or not wanted(theirs):
                continue
            pieces = tuple(_PLACEHOLDER.split(ours)[::2])
            for i in range(layers) if names else [None]:
                index = {} if i is None else {names[0]: str(i)}
                path, name = _fill(ours, index), _fill(theirs, index)
                yield Module(path, name, layout, i, pieces)

    def closest(self, name: str, most: int = 3) -> list[str]:
        """The tensor names of the table that read most like `name`."""
        return closest(name, [theirs for _, theirs, _ in self.entries], most)

    @property
    def tokens(self) -> str | None:
        """The path of the table of tokens, where it can be told.

        A head that is missing from the table is tied to it, unless `tied` says more.
        """
        if self.tied not in (None, "auto"):
            return self.tied
        tables = [
            (ours, name.removesuffix(_WEIGHT).split(".")[-1])
            for ours, name, layout in self.entries
            if layout == "same"
            and name.endswith(_WEIGHT)
            and not _PLACEHOLDER.search(ours)
        ]
        known = [ours for ours, last in tables if last in _TOKEN_TABLES]
        usual = [ours for ours, _ in tables if ours.split("/")[-1] == "embedding"]
        for found in (known, usual):
            if len(found) == 1:
                return found[0]
        return None

    @functools.cached_property
    def _templates(self) -> tuple["_Template", ...]:
        return tuple(
            _Template(entry, _compile(entry[0]), _compile(entry[1]))
            for entry in self.entries
        )

    def _is_module(self, tensor: str) -> bool:
        """Whether an entry's tensor is the weight of a module."""
        return tensor.endswith(_WEIGHT) and tensor not in self.parameters

    def _is_bare(self, tensor: str) -> bool:
        """Whether an entry's tensor is no module's weight, and no bias."""
        return not self._is_module(tensor) and tensor.rpartition(".")[2] != "bias"

    @functools.cached_property
    def _owners(self) -> tuple[re.Pattern[str], ...]:
        """For each entry a pattern of the modules that hold its tensor."""
        return tuple(_compile(entry[1].rpartition(".")[0]) for entry in self.entries)

    @functools.cached_property
    def _indexed(self) -> tuple["_Template", ...]:
        """The entries with an index."""
        return tuple(t for t in self._templates if _PLACEHOLDER.search(t.entry[0]))

    @functools.cached_property
    def _plain(self) -> tuple[dict[str, "_Template"], dict[str, "_Template"]]:
        """The entries without an index, by path and by tensor name."""
        found = [t for t in self._templates if not _PLACEHOLDER.search(t.entry[0])]
        return {t.entry[0]: t for t in found}, {t.entry[1]: t for t in found}

    def _find(
        self, name: str, side: Literal[0, 1]
    ) -> tuple["_Template", dict[str, str]] | None:
        plain = self._plain[side].get(name)
        if plain is not None:  # a name written out wins over a pattern
            return plain, {}
        hits = []
        for template in self._indexed:
            found = (template.ours, template.theirs)[side].fullmatch(name)
            if found is not None:
                hits.append((template, found.groupdict()))
        if len(hits) > 1:
            both = " and ".join(repr(hit[0].entry[side]) for hit in hits[:2])
            raise ConfigError(
                f"`names` is ambiguous: {name!r} fits {both}. Make the entries differ "
                "in more than an index."
            )
        return hits[0] if hits else None

    @functools.cached_property
    def _cache(self) -> dict[tuple[str, int], str | None]:
        return {}

    def _translate(self, name: str, side: Literal[0, 1]) -> str | None:
        known = self._cache
        if (name, side) not in known:
            found = self._find(name, side)
            if found is None:
                known[name, side] = None
            else:
                other: Literal[0, 1] = 1 if side == 0 else 0
                result = _fill(found[0].entry[other], found[1])
                back = self._find(result, other)
                if back is None or _fill(back[0].entry[side], back[1]) != name:
                    raise ConfigError(
                        f"`names` takes {name!r} to {result!r}, which belongs to "
                        "another entry. Each path must have a tensor of its own."
                    )
                known[name, side] = result
        return known[name, side]


@dataclasses.dataclass(frozen=True)
class _Template:
    """An entry, with a pattern for each side."""

    entry: Entry
    ours: re.Pattern[str]
    theirs: re.Pattern[str]


def _entry(entry: Any) -> Entry:
    fine = (
        isinstance(entry, tuple | list)
        and len(entry) == 3
        and all(isinstance(part, str) and part for part in entry)
    )
    if not fine or entry[2] not in get_args(Layout):
        raise ConfigError(
            f"`names` holds {entry!r}. An entry is (path, tensor name, layout) with "
            "layout 'linear', 'conv' or 'same', e.g. ('layers/{i}/q_proj/kernel', "
            "'model.layers.{i}.self_attn.q_proj.weight', 'linear')."
        )
    ours, theirs, layout = entry
    placeholders = [sorted(_PLACEHOLDER.findall(side)) for side in (ours, theirs)]
    if placeholders[0] != placeholders[1]:
        raise ConfigError(
            f"`names` pairs {ours!r} with {theirs!r}, whose placeholders differ. Each "
            "of them, such as {i}, must appear on both sides."
        )
    if len(set(placeholders[0])) != len(placeholders[0]):
        raise ConfigError(f"`names` holds {ours!r}, which repeats a placeholder.")
    for side in (ours, theirs):
        if re.search(r"\}[0-9]*\{", side):
            raise ConfigError(
                f"`names` holds {side!r}: two indices with nothing between them cannot "
                "be told apart."
            )
    return ours, theirs, layout


def _among(field: str, given: Any, known: list[str]) -> tuple[str, ...]:
    given = (given,) if isinstance(given, str) else tuple(given)
    for name in given:
        if name not in known:
            raise ConfigError(
                f"`{field}` of `names` has {name!r}, which no entry does. Closest: "
                f"{shorten(closest(str(name), known, 3))}. Write it as the entries "
                "have it, placeholders and all."
            )
    return given


def _compile(template: str) -> re.Pattern[str]:
    pieces = _PLACEHOLDER.split(template)  # literal, name, literal, ..., literal
    for i, piece in enumerate(pieces):
        pieces[i] = rf"(?P<{piece}>{_INDEX})" if i % 2 else re.escape(piece)
    return re.compile("".join(pieces))


def _fill(template: str, index: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda found: index[found[1]], template)
