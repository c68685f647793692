"""Every place where JAX's jaxprs differ between releases, or have no public name.

Written against JAX 0.10 to 0.12. Nothing else in the package imports from `jax._src`.
"""

import functools
import inspect
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxtyping
from jax._src import source_info_util
from jax._src.named_sharding import UNSPECIFIED
from jax.core import Tracer
from jax.extend import core
from jax.interpreters import partial_eval

_DCE_ASKS_WHAT_LIVES = (
    "live_inputs" in inspect.signature(partial_eval.dce_jaxpr).parameters
)

# A jaxpr with its constants. From JAX 0.11 `ClosedJaxpr` and `Jaxpr` are one class.
Closed = Any

__all__ = [
    "Closed",
    "UNSPECIFIED",
    "as_argument",
    "bind",
    "closed",
    "eqn_scope",
    "evaluate",
    "equations",
    "inner_jaxprs",
    "is_literal",
    "is_machinery",
    "is_tracer",
    "keyed_by_jaxpr",
    "open_jaxpr",
    "scan_counts",
    "scan_params",
    "scopes",
    "source",
    "trace",
    "unstacked",
    "without_results",
]


def trace(fn: Callable[..., Any]) -> Callable[..., tuple[Closed, Any]]:
    """A function from arguments to `fn`'s jaxpr and the tree of its output types.

    JAX caches the trace by the types of the arguments, as it does for `jax.jit`, with
    every piece of context that it knows to matter (mesh, precision, axis sizes).
    """
    return jax.make_jaxpr(fn, return_shape=True)


def keyed_by_jaxpr(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Caches `fn(jaxpr, *key)` for as long as the jaxpr lives.

    `fn` gets a weak reference in place of the jaxpr, for whatever it returns must not
    keep the jaxpr alive.
    """
    store: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()

    @functools.wraps(fn)
    def cached(jaxpr: Any, *key: Any) -> Any:
        found = store.setdefault(jaxpr, {})
        if key not in found:
            found[key] = fn(weakref.ref(jaxpr), *key)
        return found[key]

    return cached


def is_tracer(x: Any) -> bool:
    """Whether `x` is a value of a running trace, which no cache may hold."""
    return isinstance(x, Tracer)


def is_literal(atom: Any) -> bool:
    """Whether an operand of an equation is written into it."""
    return isinstance(atom, core.Literal)


def eqn_scope(eqn: Any):
    """A context manager that gives new equations the place in profiles that `eqn` has.

    Name stack, traceback (for error messages) and compute type follow the equation.
    """
    info = eqn.source_info
    names = source_info_util.current_name_stack() + info.name_stack
    return _Both(
        source_info_util.user_context(info.traceback, name_stack=names),
        eqn.ctx.manager,
    )


class _Both:
    """Two context managers as one. `contextlib.ExitStack` costs 3 times as much."""

    __slots__ = ("first", "second")

    def __init__(self, first, second):
        self.first = first
        self.second = second

    def __enter__(self):
        self.first.__enter__()
        self.second.__enter__()

    def __exit__(self, *exc):
        self.second.__exit__(*exc)
        self.first.__exit__(*exc)


def bind(eqn: Any, operands: Sequence[Any], **changes: Any) -> list[Any]:
    """Evaluates one equation on other operands.

    Args:
        eqn: the equation.
        operands: one value for each of its operands, or for those of a new inner
            jaxpr given in `changes`.
        changes: parameters that differ from the equation's.

    Returns:
        The results, always as a list.
    """
    params = eqn.params | changes if changes else eqn.params
    bound = eqn.primitive.get_bind_params(params)
    if isinstance(bound, tuple):  # a pair (functions, parameters) before JAX 0.10
        functions, bound = bound
        operands = (*functions, *operands)
    out = eqn.primitive.bind(*operands, **bound)
    return list(out) if eqn.primitive.multiple_results else [out]


def evaluate(jaxpr: Closed, operands: Sequence[Any]) -> list[Any]:
    """The results of a closed jaxpr."""
    return core.jaxpr_as_fun(jaxpr)(*operands)


def closed(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """An inner jaxpr, closed or open, as `(jaxpr, consts)`."""
    consts = getattr(jaxpr, "consts", ())
    return getattr(jaxpr, "jaxpr", jaxpr), consts


def open_jaxpr(jaxpr: Closed) -> Any:
    """A closed jaxpr without constants, in the form that `remat` keeps."""
    inner, consts = closed(jaxpr)
    assert not consts, "a traced body has no constants: all it reads is an operand"
    return inner


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are the carry."""
    params = eqn.params
    if "ft_in" in params:  # from JAX 0.11: one flat tree for constants, carry and xs
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


def scan_params(
    eqn: Any, consts: int, carry: int, xs: int, more: int = 0
) -> dict[str, Any]:
    """The parameters by which a scan with other operands differs from `eqn`.

    `more` counts the results that it stacks beside those of `eqn`.
    """
    if "ft_in" not in eqn.params:
        return {"num_consts": consts, "num_carry": carry}
    from jax._src import flattree  # pyright: ignore  (not before JAX 0.11)

    ys = len(eqn.outvars) - scan_counts(eqn)[1] + more
    ft_in = flattree.pack(tuple(map(flattree.nones, (consts, carry, xs))))
    ft_out = flattree.pack((flattree.nones(carry), flattree.nones(ys)))
    return {"ft_in": ft_in, "ft_out": ft_out}


def unstacked(x: Any) -> jax.ShapeDtypeStruct:
    """The type of one slice of `x` along its leading axis, as a scan's body sees it."""
    kind = jax.typeof(x)
    return as_argument(core.mapped_aval(kind.shape[0], 0, kind))


def as_argument(kind: Any) -> jax.ShapeDtypeStruct:
    """An array type as something that a traced function can be called on."""
    return jax.ShapeDtypeStruct(
        kind.shape,
        kind.dtype,
        weak_type=kind.weak_type,
        sharding=kind.sharding if _is_explicit(kind.sharding) else None,
        manual_axis_type=kind.manual_axis_type,
    )


def _is_explicit(sharding: Any) -> bool:
    mesh = getattr(sharding, "mesh", None)
    return mesh is not None and not mesh.empty and bool(mesh.explicit_axes)


def inner_jaxprs(eqn: Any) -> list[Any]:
    """The jaxprs among an equation's parameters: bodies, branches, conditions."""
    return list(core.jaxprs_in_params(eqn.params))


def equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr and of the jaxprs inside it."""
    for eqn in closed(jaxpr)[0].eqns:
        yield eqn
        for inner in inner_jaxprs(eqn):
            yield from equations(inner)


# Rooms whose code runs on behalf of a model's line: no line of a model is in them.
# Where signatures are checked, their functions are called by jaxtyping.
_ROOMS = ("adapters", "auditing", "merging", "quant", "structure", "transform")
_MACHINERY = tuple(
    str(folder) + os.sep
    for folder in (
        *(Path(__file__).parents[1] / room for room in _ROOMS),
        Path(jaxtyping.__file__).parent,
    )
)


def without_results(eqn: Any, unread: Sequence[bool]) -> tuple[Any, Sequence[bool]]:
    """An equation that no longer computes some of its results, if JAX knows how.

    Args:
        eqn: the equation, a scan for instance.
        unread: which of its results nothing reads; not all.

    Returns:
        The equation, with fewer operands and results, and which operands it still has.
    """
    everything = [True] * len(eqn.invars)
    known: Any = partial_eval.dce_rules.get(eqn.primitive)
    if known is not None:
        # Newer releases also ask which references are read later: any may be.
        live = (everything,) if _DCE_ASKS_WHAT_LIVES else ()
        operands, smaller = known([not skip for skip in unread], *live, eqn)
        if smaller is not None:
            return smaller, operands
    return eqn, everything


def source(eqn: Any) -> str:
    """Where in the user's program the equation comes from: `file.py:12 (call)`.

    The innermost frame that is neither JAX's nor this package's machinery; `""` where
    there is none, as inside a jitted function of theirs.
    """
    for frame in source_info_util.user_frames(eqn.source_info.traceback):
        if not is_machinery(frame.file_name):
            return f"{frame.file_name}:{frame.start_line} ({frame.function_name})"
    return ""


def is_machinery(file: str) -> bool:
    """Whether a file holds code of this package that runs on a model's behalf."""
    return file.startswith(_MACHINERY)


def scopes(eqn: Any) -> str:
    """The named scopes that the equation stands in, inside its own jaxpr."""
    return str(eqn.source_info.name_stack)
