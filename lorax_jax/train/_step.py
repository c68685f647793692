"""One training step and one measurement, as pure jitted functions.

The base parameters are an argument of both, never a constant of the compiled program,
and gradients are taken of `Adapter.train` alone: `bind` happens inside the function
that is differentiated.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..adapters import Adapter, bind
from ..transform import adapt
from ._loss import cross_entropy
from ._scaled import scaled
from ._windows import Windows


class State(NamedTuple):
    """All that moves in training.

    Attributes:
        train: `Adapter.train`.
        opt_state: the optimizer's.
        step: how many steps were made.
        key: where the randomness of every step comes from; it stays the same.
    """

    train: dict[str, dict[str, jax.Array]]
    opt_state: Any
    step: Int[Array, ""]
    key: PRNGKeyArray


class Metrics(NamedTuple):
    """What a step reports: the loss before its update, and its gradient's norm."""

    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]


def start(
    adapter: Adapter, tx: optax.GradientTransformation, key: PRNGKeyArray
) -> State:
    """The state before the first step.

    `adapter.train` is copied, because steps donate their state: the adapter that was
    passed stays usable, and arrays that it shares with `fixed` stay as they are.
    """
    train = jax.tree.map(jnp.copy, adapter.train)
    return State(train, tx.init(train), jnp.zeros((), jnp.int32), jnp.copy(key))


def make_step(
    apply: Callable[..., Any], tx: optax.GradientTransformation
) -> Callable[..., tuple[State, Metrics]]:
    """Compiles a training step of a model.

    Args:
        apply: `(params, ids) -> logits`, shapes `(batch, length)` and
            `(batch, length, vocab)`.
        tx: any Optax transformation.

    Returns:
        `step(state, fixed, params, batch) -> (state, metrics)`, jitted. `batch` is
        `Windows` with a leading axis of parts, `(parts, rows, length)`: gradients of
        the parts are added, as if all rows had been one batch. The state is donated
        (use the new one); `fixed` and `params` never are. Dropout, where the adapter
        has it, draws anew in every step and part.

    Example:
        >>> import lorax_jax as lj, numpy as np
        >>> params = {"w": jnp.ones((8, 8))}
        >>> apply = lambda params, ids: jax.nn.one_hot(ids, 8) @ params["w"]
        >>> ids = np.arange(7)[None]
        >>> plan = lj.plan(lj.LoraConfig("w", rank=1), params, apply, (ids,))
        >>> adapter = lj.init(plan, params, key=jax.random.key(0))
        >>> tx = optax.sgd(0.1)
        >>> state, step = start(adapter, tx, jax.random.key(1)), make_step(apply, tx)
        >>> batch = Windows(ids[None], np.ones((1, 1, 6)))
        >>> state, metrics = step(state, adapter.fixed, params, batch)
        >>> int(state.step), round(float(metrics.loss), 2)
        (1, 2.08)
    """
    forward = adapt(apply)

    @functools.partial(jax.jit, donate_argnames=("state",))
    def step(state: State, fixed: Any, params: Any, batch: Windows):
        total = batch.weights.sum()

        def loss(train, part: Windows, key):
            bound = bind(params, Adapter(train, fixed), key=key)
            logits = forward(bound, part.ids[:, :-1])  # (rows, length, vocab)
            return cross_entropy(logits, part.ids[:, 1:], part.weights, total)

        def add(sums, xs):
            part, key = xs
            new = jax.value_and_grad(loss)(state.train, part, key)
            return jax.tree.map(jnp.add, sums, new), None

        parts = batch.ids.shape[0]
        key = jax.random.fold_in(state.key, state.step)
        if parts == 1:
            only = Windows(batch.ids[0], batch.weights[0])
            value, grads = jax.value_and_grad(loss)(state.train, only, key)
        else:
            nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.train)
            xs = Windows(*map(jnp.asarray, batch)), jax.random.split(key, parts)
            (value, grads), _ = jax.lax.scan(add, nothing, xs)
        with jax.numpy_dtype_promotion("standard"):  # Adam counts in integers
            updates, opt_state = tx.update(grads, state.opt_state, state.train)
            train: Any = optax.apply_updates(state.train, updates)
        after = State(train, opt_state, state.step + 1, state.key)
        return after, Metrics(value, optax.tree.norm(grads))

    return step


def make_score(
    apply: Callable[..., Any],
) -> Callable[..., tuple[Float[Array, ""], Float[Array, ""]]]:
    """Compiles a measurement of a model.

    Args:
        apply: as for `make_step`.

    Returns:
        `score(weight, adapter, params, batch) -> (nats, tokens)`, jitted: the summed
        loss and the summed weights of a batch `(rows, length)`. `weight` multiplies the
        adapter's scales, see `scaled`: before the first step, 0 measures the base with
        the same compiled program.
    """
    forward = adapt(apply)

    @jax.jit
    def score(weight: Any, adapter: Adapter, params: Any, batch: Windows):
        bound = bind(params, scaled(adapter, weight))
        logits = forward(bound, batch.ids[:, :-1])
        nats = cross_entropy(logits, batch.ids[:, 1:], batch.weights, total=1.0)
        return nats, batch.weights.sum()

    return score
