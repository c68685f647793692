"""What every model must stand: a plan, a training step, a merge."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import assert_close, on_device

import lorax_jax as lj


def drawn(shapes):
    """Parameters from their shapes, norms and biases too; compiles nothing."""
    draw = np.random.default_rng(0)

    def leaf(shape):
        values = (len(shape.shape) == 1) + 0.3 * draw.normal(size=shape.shape)
        return on_device(values, shape.dtype)

    return jax.tree.map(leaf, shapes)


def floats(tree):
    """The floating leaves of what a model returned."""
    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


def projection(tree):
    """One number from all floating outputs, each entry with a random sign and size.

    A plain mean would be constant behind a norm or a softmax.
    """
    total = jnp.zeros((), jnp.float32)
    for i, leaf in enumerate(floats(tree)):
        weights = np.random.default_rng(i).normal(size=leaf.shape) / leaf.size**0.5
        total = total + (leaf.astype(jnp.float32) * weights.astype("f4")).sum()
    return total


def stand(fn, params, *args, targets="all-linear", factor=16.0, merged=None, **kwargs):
    """Plans, trains one step and merges, and checks what must hold on the way.

    - With B = 0 the adapted function gives the original's outputs.
    - With B != 0 every A and every B of every layer gets a gradient.
    - After an Optax step the adapted function equals the function of merged weights.

    Args:
        fn: `fn(params, *args, **kwargs)`.
        params: its parameters.
        args: and the rest.
        targets: as for `LoraConfig`.
        factor: of the tolerance; errors multiply from layer to layer.
        merged: what `fn` gives after merging, a function of the adapter, where no
            merged weights can say it.
        kwargs: passed on.

    Returns:
        The plan.
    """
    config = lj.LoraConfig(targets, rank=2, alpha=3, init=False)
    plan = lj.plan(config, params, fn, args, kwargs)

    train, fixed = lj.init(plan, params, key=jax.random.key(7))
    base = jax.jit(lambda params: floats(fn(params, *args, **kwargs)))

    @jax.jit
    def adapted(train):
        bound = lj.bind(params, lj.Adapter(train, fixed))
        return floats(lj.adapt(fn)(bound, *args, **kwargs))

    @jax.jit
    def step(train):
        grads = jax.grad(lambda train: projection(adapted(train)))(train)
        tx = optax.adamw(1e-2)
        updates, _ = tx.update(grads, tx.init(train), train)
        return optax.apply_updates(train, updates), grads

    original = base(params)
    zeros = {
        name: factors | {"b": jnp.zeros_like(factors["b"])}
        for name, factors in train.items()
    }
    assert_close(adapted(zeros), original, factor=factor)

    after, grads = step(train)
    for slot in plan.slots:
        for name, grad in grads[slot.name].items():
            by_layer = np.abs(np.asarray(grad, "f4").reshape(len(slot.sites), -1))
            assert np.isfinite(by_layer).all(), (slot.name, name)
            assert (by_layer.max(axis=1) > 0).all(), (slot.name, name)

    adapter = lj.Adapter(after, fixed)
    if merged is None:
        expected = base(lj.merge(params, adapter))
    else:
        expected = floats(merged(adapter))
    assert_close(adapted(after), expected, factor=factor)
    moved = [jnp.abs(a - b).max() for a, b in zip(expected, original, strict=True)]
    assert max(moved) > 1e-4
    return plan


def paths(plan):
    """The paths of a plan's sites."""
    return [site.path for site in plan]
