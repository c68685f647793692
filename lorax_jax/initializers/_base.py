"""The protocol that every initializer follows, and the registry of all of them."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax
from jaxtyping import Array, Float, PRNGKeyArray

Reads = Literal["shape", "weight", "stats"]


class Start(NamedTuple):
    """Where an adapter starts.

    Attributes:
        a: shape `(d_in, rank)`.
        b: shape `(rank, d_out)`.
        a0: the frozen starting factor of a method that starts from factors of the
            weight, whose adapter contributes `scale (A B - A0 B0)`; else `None`.
        b0: likewise.
    """

    a: Float[Array, "d_in rank"]
    b: Float[Array, "rank d_out"]
    a0: Float[Array, "d_in rank"] | None = None
    b0: Float[Array, "rank d_out"] | None = None


class Initializer(Protocol):
    """`(weight, *, rank, scale, key, stats=None) -> Start`, for a kernel `x @ weight`.

    The function is pure and traced, and mapped over the layers of a stack.
    What it gets depends on what it was registered to read: of `"shape"`, `weight` is
    the weight's type in place of the array, so that a large or sharded base is not
    touched; of `"weight"`, it is the array, in the base's dtype; of `"stats"`, the
    array too, and `stats` is the state of a statistic of this site's layer. To those
    that read more than the shape, `scale` is a traced number: `jnp.sqrt(scale)`, not
    `math.sqrt(scale)`, and `jnp.where`, not `if`.
    """

    def __call__(
        self,
        weight: Float[Array, "d_in d_out"] | jax.ShapeDtypeStruct,
        *,
        rank: int,
        scale: float | Float[Array, ""],
        key: PRNGKeyArray,
        stats: Any = None,
    ) -> Start: ...


@dataclasses.dataclass(frozen=True)
class Method:
    """An initializer, and what is known of it without calling it.

    Attributes:
        start: the initializer itself.
        reads: what it looks at: the weight's `"shape"`, the `"weight"`, or the weight
            and `"stats"`. A rank above `min(d_in, d_out)` has no meaning to those that
            read more than the shape.
        freezes: which of the factors (`"a"`, `"b"`) are never trained.
        stat: the statistic that is gathered for it where the user names none; the type
            `GradientFactors` of one that reads gradients.
        multiple: what the rank must be a multiple of.
        directions: how many directions of the weight each rank takes.
        lookup: what starts an embedding table instead; `None` takes `start`.
        nested: whether the factors of a rank are the first columns of A, and rows of
            B, of those of every larger one. Layers and weights of one shape are then
            started at the largest of their ranks, by one program, and cut.
        options: the type of its options. `init` may be an instance instead of a name,
            and the initializer takes it as its keyword `options`.
    """

    start: Callable[..., Start]
    reads: Reads = "shape"
    freezes: tuple[str, ...] = ()
    stat: Any = None
    multiple: int = 1
    directions: int = 1
    lookup: Callable[..., Start] | None = None
    nested: bool = False
    options: type | None = None

    def given(self, options: Any) -> "Method":
        """The same with these options; equal options give the same function."""
        return _given(self, options)


@functools.cache  # programs are kept by the function that they were traced from
def _given(method: Method, options: Any) -> Method:
    start = functools.partial(method.start, options=options)
    return dataclasses.replace(method, start=start)


_REGISTRY: dict[Any, Method] = {}
_FAMILIES: dict[str, tuple[re.Pattern[str], Callable[[int], Method]]] = {}


def register(*names: Any, **about: Any) -> Callable[..., Callable[..., Start]]:
    """Registers an initializer under the names that `LoraConfig(init=...)` takes.

    Args:
        names: the names.
        about: the other fields of `Method`.

    Example:
        >>> @register("halves", reads="weight")
        ... def halves(weight, *, rank, scale, key, stats=None): ...
        >>> method("halves").reads
        'weight'
        >>> del _REGISTRY["halves"]
    """

    def add(fn: Callable[..., Start]) -> Callable[..., Start]:
        for name in names:
            _REGISTRY[name] = Method(fn, **about)
        return fn

    return add


def family(name: str, **about: Any) -> Callable[..., Callable[..., Start]]:
    """Registers an initializer with a number in its name.

    Args:
        name: the name with an `N` at its end, for which users write a number; the
            function takes it as its first keyword, `n`.
        about: the other fields of `Method`.
    """
    pattern = re.compile(re.escape(name.removesuffix("N")) + r"(\d+)", re.ASCII)

    def add(fn: Callable[..., Start]) -> Callable[..., Start]:
        def of(n: int) -> Method:
            return Method(functools.partial(fn, n=n), **about)

        _FAMILIES[name] = pattern, functools.cache(of)
        return fn

    return add


def names() -> list[Any]:
    """All registered names."""
    return list(_REGISTRY)


def families() -> list[str]:
    """Names that end in a number, which `N` stands for."""
    return list(_FAMILIES)


def method(name: Any) -> Method:
    """What is registered under `name`, or takes it as its options.

    Raises:
        KeyError: if there is nothing.

    Example:
        >>> method("kaiming").reads
        'shape'
    """
    if isinstance(name, str):
        for pattern, of in _FAMILIES.values():
            found = pattern.fullmatch(name)
            if found is not None:
                return of(int(found[1]))
    for known in _REGISTRY.values():
        if known.options is not None and isinstance(name, known.options):
            return known.given(name)
    try:
        return _REGISTRY[name]
    except TypeError:  # it cannot be hashed
        raise KeyError(name) from None


def get(name: Any) -> Callable[..., Start]:
    """The initializer registered under `name`.

    Raises:
        KeyError: if there is none.
    """
    return method(name).start
