"""`to_lora`: any low-rank adapter as plain LoRA."""

import dataclasses
import functools
import math
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._errors import AdapterError
from ..adapters import Adapter, Fixed, Role
from ..structure import wide


@dataclasses.dataclass(frozen=True)
class Truncation:
    r"""What cutting the rank did to one site.

    Attributes:
        name: the adapted weight.
        layer: which layer of its stack; `()` if it is none.
        rank: the rank that is left.
        error: the distance $\|\Delta - \Delta'\|_F$ between the two changes of the
            weight, the scale included; over all experts, if there are any.
        relative_error: the same over $\|\Delta\|_F$; 0 where nothing is cut.
    """

    name: str
    layer: tuple[int, ...]
    rank: int
    error: float
    relative_error: float


@overload
def to_lora(
    adapter: Adapter, *, rank: int | None = None, report: Literal[False] = False
) -> Adapter: ...
@overload
def to_lora(
    adapter: Adapter, *, rank: int | None = None, report: Literal[True]
) -> tuple[Adapter, list[Truncation]]: ...
def to_lora(adapter: Adapter, *, rank: int | None = None, report: bool = False) -> Any:
    r"""The adapter without starting factors and with nothing frozen: plain LoRA.

    A site of rank $r$ that started from factors of its weight adds

    $$s\,(A B - A_0 B_0)
      = s\,[A_0,\; A - A_0] \begin{bmatrix} B - B_0 \\ B \end{bmatrix},$$

    which is a LoRA of rank $2r$ at the same scale. The differences are taken in the
    dtype that the factors are stored in, as the adapter itself takes them, so both
    compute the same. Ranks may differ between sites and between layers of a stack, and
    how the scale came about does not matter. (PEFT's conversion writes
    $[A, A_0] [B; -B_0]$ and refuses patterns together with rsLoRA.)

    With `rank`, what is converted is cut to its best approximation of that rank. Of
    the thin factors $P$ and $Q$, orthogonalized as $P = U R$ and $Q^\top = V T$,

    $$P Q = U\,(R\,T^\top)\,V^\top ,$$

    whose middle is no larger than $2r \times 2r$: its SVD is that of the product, which
    is never built. The singular values are split evenly over the new A and B.

    Sites that have neither starting nor frozen factors come back as they are, and so
    does everything beside factors: magnitudes, biases, rows, whole leaves.

    `planning.fitted(plan, adapter)` is the plan of the result, for `save_adapter`.

    Args:
        adapter: the adapter; unchanged. Inside `jit` its ranks may be traced.
        rank: the largest rank of a converted site; `None` is exact.
        report: also return a list of `Truncation`s, one for each converted site.

    Returns:
        An `Adapter`, or `(adapter, report)`.

    Raises:
        AdapterError: if `rank` is no integer from 1 up, or `report` is asked for inside
            `jit`, where there are no values.

    Example:
        >>> import lorax_jax as lj
        >>> params = {"w": jnp.ones((6, 4))}
        >>> fn = lambda params, x: x @ params["w"]
        >>> plan = lj.plan(lj.LoraConfig("w", rank=2), params, fn, (jnp.ones(6),))
        >>> train, fixed = lj.init(plan, params, key=jax.random.key(0))
        >>> a, b = train["w"]["a"], train["w"]["b"]
        >>> started = {**fixed["w"], "a0": 0.9 * a, "b0": b + 1}
        >>> started = lj.Adapter(train, {"w": Fixed(fixed["w"].role, started)})
        >>> plain = lj.to_lora(started)
        >>> plain.train["w"]["a"].shape, int(plain.fixed["w"]["rank"])
        ((6, 4), 4)
    """
    fine = isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
    if rank is not None and not fine:
        raise AdapterError(
            f"`rank` = {rank!r}; a rank is an integer from 1 up, or `None` for the "
            "exact conversion."
        )
    train, fixed, reports = dict(adapter.train), dict(adapter.fixed), []
    for name, site in adapter.fixed.items():
        if is_plain(site):
            continue
        held = {**site, **adapter.train[name]}
        _check_whole(held, site.role)
        new = _joined(held, site.role)
        if rank is not None:
            new, errors = _cut(new, site.role, rank)
            if report:
                reports += _reports(site.role, new["rank"], errors, held["scale"])
        elif report:
            nothing = jnp.zeros((2, *jnp.shape(held["rank"])))
            reports += _reports(site.role, new["rank"], nothing, held["scale"])
        beside = {n: x for n, x in adapter.train[name].items() if n not in ("a", "b")}
        train[name] = {"a": new["a"], "b": new["b"], **beside}
        kept = {n: x for n, x in site.items() if n not in ("a", "b", "a0", "b0")}
        fixed[name] = Fixed(site.role, kept | {"rank": new["rank"]})
    plain = Adapter(train, fixed)
    return (plain, reports) if report else plain


def is_plain(fixed: Fixed) -> bool:
    """Whether a site has neither starting factors nor frozen ones."""
    return not {"a", "b", "a0", "b0"} & set(fixed)


def _check_whole(held: dict[str, Any], role: Role) -> None:
    wanted = ("a", "b", "a0", "b0") if {"a0", "b0"} & set(held) else ("a", "b")
    missing = [name for name in (*wanted, "scale", "rank") if name not in held]
    if missing:
        raise AdapterError(
            f"The adapter of {role.name!r} lacks {missing}. `train` and `fixed` must "
            "come from one `init` or `load_adapter`, whole."
        )


def _joined(held: dict[str, Any], role: Role) -> dict[str, jax.Array]:
    """The factors of what a site adds, at their true ranks."""
    a, b, rank = held["a"], held["b"], held["rank"]
    if "a0" not in held:  # frozen alone: copies, for optimizers donate what they train
        return {"a": jnp.array(a), "b": jnp.array(b), "rank": rank}
    a0, b0 = held["a0"], held["b0"]
    axis = len(role.batch)
    a = jnp.concatenate([a0, a - a0], axis=-1)
    b = jnp.concatenate([b - b0, b], axis=axis)
    padded = a.shape[-1] // 2
    if isinstance(rank, Tracer) or bool((rank < padded).any()):
        # Layer by layer the true ranks first, the pads behind them.
        a = _packed(a, rank, padded, -1)
        b = _packed(b, rank, padded, axis)
    return {"a": a, "b": b, "rank": 2 * rank}


def _packed(array: jax.Array, rank: Any, padded: int, axis: int) -> jax.Array:
    """Two padded halves along an axis, with the two pads behind both.

    Args:
        array: axes `(*stack, ...)`.
        rank: the true rank of each half, `(*stack,)`.
        padded: the size of each half.
        axis: the axis that holds both.
    """
    rank = jnp.asarray(rank)[..., None]  # (*stack, 1)
    at = jnp.arange(2 * padded).reshape(*[1] * (rank.ndim - 1), -1)
    second = at - rank + padded
    where = jnp.where(at < rank, at, jnp.minimum(second, 2 * padded - 1))
    held = at < 2 * rank  # (*stack, 2 * padded)
    shape = [1] * array.ndim
    shape[: rank.ndim - 1] = array.shape[: rank.ndim - 1]
    shape[axis] = 2 * padded
    found = jnp.take_along_axis(array, where.reshape(shape), axis=axis)
    return jnp.where(held.reshape(shape), found, jnp.zeros((), array.dtype))


def _cut(
    whole: dict[str, jax.Array], role: Role, most: int
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The best factors of a smaller rank, and what is lost.

    Returns:
        The arrays, and for each layer the norm of what is lost and of the whole, both
        without the scale: `(2, *stack)`.
    """
    a, b = _matrices(whole["a"], whole["b"], role)
    ranks = whole["rank"].reshape(-1)
    kept = min(most, a.shape[-1], a.shape[-2], b.shape[-1])
    ranks = jnp.minimum(ranks, kept)
    cut_a, cut_b, errors = _truncated(a, b, ranks, kept)
    new_a, new_b = _arrays(cut_a, cut_b, whole["a"], whole["b"], role)
    stack = jnp.shape(whole["rank"])
    found = {
        "a": new_a.astype(whole["a"].dtype),
        "b": new_b.astype(whole["b"].dtype),
        "rank": ranks.reshape(stack).astype(whole["rank"].dtype),
    }
    return found, errors.reshape(2, *stack)


@functools.partial(jax.jit, static_argnames="kept")
def _truncated(a, b, ranks, kept: int):
    """Of matrices `(layers, apart, d_in, r)` and `(layers, apart, r, d_out)`."""
    work = wide(jnp.result_type(a, b))
    with jax.default_matmul_precision("highest"):
        left, r = jnp.linalg.qr(a.astype(work))
        right, t = jnp.linalg.qr(b.astype(work).swapaxes(-1, -2))
        u, s, vt = jnp.linalg.svd(r @ t.swapaxes(-1, -2), full_matrices=False)
        held = jnp.arange(s.shape[-1])[None, None] < ranks[:, None, None]
        root = jnp.sqrt(jnp.where(held, s, 0))[..., :kept]
        new_a = left @ (u[..., :kept] * root[..., None, :])
        new_b = (root[..., None] * vt[..., :kept, :]) @ right.swapaxes(-1, -2)
    lost, total = jnp.where(held, 0, s), s
    norms = [jnp.sqrt((x * x).sum((-1, -2))) for x in (lost, total)]
    return new_a, new_b, jnp.stack(norms)


def _matrices(a: jax.Array, b: jax.Array, role: Role) -> tuple[jax.Array, jax.Array]:
    """`a` and `b` as `(layers, apart, d_in, r)` and `(layers, apart, r, d_out)`."""
    batch, stack, groups = len(role.batch), role.stack, role.groups
    layers = math.prod(a.shape[:stack])
    experts = math.prod(a.shape[stack:batch])
    rank = a.shape[-1]
    a = a.reshape(layers, experts, -1, groups, rank).swapaxes(-2, -3)
    b = b.reshape(layers, experts, rank, groups, -1).swapaxes(-2, -3)
    return (
        a.reshape(layers, experts * groups, -1, rank),
        b.reshape(layers, experts * groups, rank, b.shape[-1]),
    )


def _arrays(
    a: jax.Array, b: jax.Array, like_a: jax.Array, like_b: jax.Array, role: Role
) -> tuple[jax.Array, jax.Array]:
    """Undoes `_matrices`; the rank may be another."""
    groups, batch = role.groups, len(role.batch)
    layers, rank = a.shape[0], a.shape[-1]
    a = a.reshape(layers, -1, groups, a.shape[-2], rank).swapaxes(-2, -3)
    b = b.reshape(layers, -1, groups, rank, b.shape[-1]).swapaxes(-2, -3)
    behind = like_b.shape[batch + 1 :]
    return (
        a.reshape(*like_a.shape[:-1], rank),
        b.reshape(*like_b.shape[:batch], rank, *behind),
    )


def _reports(role: Role, rank: Any, errors: Any, scale: Any) -> list[Truncation]:
    if any(isinstance(x, Tracer) for x in (rank, errors, scale)):
        raise AdapterError(
            "`report` looks at values, and inside `jit` there are none yet. Convert "
            "outside, or leave `report` out."
        )
    rank, scale = np.asarray(rank), np.abs(np.asarray(scale, np.float64))
    lost, total = np.asarray(errors, np.float64) * scale
    return [
        Truncation(
            role.name,
            index,
            int(rank[index]),
            float(lost[index]),
            float(lost[index] / total[index]) if total[index] else 0.0,
        )
        for index in np.ndindex(rank.shape)
        if rank[index]
    ]
