"""Running a stack of layers: unrolled or scanned, rematerialized or not, cached or not.

The only place that knows the difference; the families below write one block.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ._cache import Cache, Page

Hidden = Float[Array, "batch seq width"]
Remat = str | Callable[..., Any] | None
Layers = Any  # one nnx.Module with stacked parameters, or an nnx.Dict of modules


def make_layers(
    build: Callable[[nnx.Rngs], nnx.Module], n: int, rngs: nnx.Rngs, *, scan: bool
) -> Layers:
    """`n` blocks: one module with stacked parameters, or a dictionary "0", "1", ...

    Both draw layer `i` from the same key, so their parameters agree.

    Args:
        build: makes one block.
        n: how many.
        rngs: where the blocks' keys come from.
        scan: stacked or not.

    Returns:
        What `run_layers` takes.
    """
    keys = jax.random.split(rngs.params(), n)
    if not scan:
        return nnx.Dict({str(i): build(nnx.Rngs(keys[i])) for i in range(n)})
    graphdef = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))[0]
    stacked = jax.vmap(lambda key: nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)))))(
        keys
    )
    return nnx.merge(graphdef, stacked)


def run_layers(
    layers: Layers,
    x: Hidden,
    call: Callable[[nnx.Module, Hidden, Page | None], tuple[Hidden, Page | None]],
    *,
    n: int,
    scan: bool,
    remat: Remat,
    cache: Cache | None,
) -> tuple[Hidden, Cache | None]:
    """Sends `x` through all layers.

    Args:
        layers: from `make_layers`.
        x: the embedded tokens.
        call: `call(block, x, page)`, one block's forward pass.
        n: how many layers.
        scan: whether they are stacked.
        remat: None, `"full"`, or a `jax.checkpoint` policy: what the backward pass
            recomputes, layer by layer. Plays no part where there is a cache.
        cache: to write this call's keys and values to, or None.

    Returns:
        The last hidden states, and the cache with new keys and values (its other
        fields are the caller's to update).
    """
    if cache is not None:
        walk = _scan_cached if scan else _unroll_cached
        return walk(layers, x, call, n, cache)
    graphdef, state = nnx.split(layers if scan else layers["0"])

    def step(state: Any, x: Hidden) -> Hidden:
        return call(nnx.merge(graphdef, state), x, None)[0]

    step = _checkpointed(step, remat, scan)
    if scan:
        return jax.lax.scan(lambda x, state: (step(state, x), None), x, state)[0], None
    for i in range(n):
        x = step(nnx.state(layers[str(i)]), x)
    return x, None


def _checkpointed(step: Callable, remat: Remat, scan: bool) -> Callable:
    if remat is None:
        return step
    # Inside a scan nothing can undo the rematerialization by sharing subexpressions,
    # and the barriers that prevent it elsewhere would only cost time.
    policy = remat if callable(remat) else None
    return jax.checkpoint(step, policy=policy, prevent_cse=not scan)


def _unroll_cached(
    layers: Layers, x: Hidden, call: Callable, n: int, cache: Cache
) -> tuple[Hidden, Cache]:
    keys, values = [], []
    for i in range(n):
        page = Page(cache.keys[i], cache.values[i], cache.length, layer=None)
        x, page = call(layers[str(i)], x, page)
        keys.append(page.keys)
        values.append(page.values)
    return x, cache._replace(keys=tuple(keys), values=tuple(values))


def _scan_cached(
    layers: Layers, x: Hidden, call: Callable, n: int, cache: Cache
) -> tuple[Hidden, Cache]:
    graphdef, stacked = nnx.split(layers)

    # The stacked cache is carried and written in place, one layer a step; as a scanned
    # input and output it would be copied whole for every token.
    def step(carry: Any, layer: Any) -> tuple[Any, None]:
        x, keys, values = carry
        state, index = layer
        page = Page(keys, values, cache.length, index)
        x, page = call(nnx.merge(graphdef, state), x, page)
        return (x, page.keys, page.values), None

    (x, keys, values), _ = jax.lax.scan(
        step, (x, cache.keys, cache.values), (stacked, jnp.arange(n, dtype=jnp.int32))
    )
    return x, cache._replace(keys=keys, values=values)
