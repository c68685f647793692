"""Builders and comparisons that tests share."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
from reference import dense

from lorax_jax import Adapter
from lorax_jax.adapters import Adapted, Fixed, Role
from lorax_jax.transform._jaxpr import equations


def on_device(values, dtype=jnp.float32):
    """A NumPy array on the device: `jnp.asarray` compiles a program for each shape."""
    return jax.device_put(np.asarray(values, dtype))


def numbers(key, shape, dtype=jnp.float32, scale=1.0):
    """Normal numbers of this size, drawn by NumPy, which compiles nothing."""
    seed = np.asarray(jax.random.key_data(key)).tolist()
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return on_device(values, dtype)


def draw(key, shape, dtype=jnp.float32):
    """A weight with entries of size `1 / sqrt(first axis)`."""
    values = np.asarray(numbers(key, shape)) / np.sqrt(max(shape[0], 1))
    return on_device(values, dtype)


def random_adapter(key, params, roles, *, rank=3, scale=0.5, dtype=jnp.float32):
    """An adapter with both factors random, for leaves given as path -> `Role`.

    `params` is a flat dictionary.
    """
    train, fixed = {}, {}
    for i, role in enumerate(roles):
        shape = params[role.path].shape
        key_a, key_b = jax.random.split(jax.random.fold_in(key, i))
        shape_a, shape_b = role.shapes(shape, rank)
        a, b = draw(key_a, shape_a, dtype), draw(key_b, shape_b, dtype)
        train[role.name] = {"a": a, "b": b}
        layers = role.sizes(shape, role.stacked)
        fixed[role.name] = Fixed(
            role,
            {
                "scale": jnp.full(layers, scale, jnp.float32),
                "rank": jnp.full(layers, rank, jnp.int32),
            },
        )
    return Adapter(train, fixed)


def dense_params(params, adapters):
    """A flat dictionary of parameters with the adapters added, in float32."""
    out = dict(params)
    for adapter in adapters:
        for name, fixed in adapter.fixed.items():
            role: Role = fixed.role
            train = adapter.train[name]
            built = dense(
                out[role.path],
                train["a"],
                train["b"],
                fixed["scale"],
                role.inputs,
                role.outputs,
                role.batch,
                role.groups,
            )
            out[role.path] = on_device(built)
    return out


def tolerance(dtype, length, factor=1.0):
    """Relative error to expect of a sum of `length` products in `dtype`.

    Rounding errors of independent terms add like a random walk: epsilon times the
    square root of the length. Eight times that is what no run should exceed; `factor`
    is for what multiplies errors further, such as a gradient through several layers.
    """
    return 8 * float(jnp.finfo(dtype).eps) * np.sqrt(length) * factor


def assert_close(actual, expected, *, dtype=jnp.float32, length=32, factor=1.0):
    """Compares trees leaf by leaf, relative to each leaf's largest entry."""
    bound = tolerance(dtype, length, factor)

    def compare(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape, (x.shape, y.shape)
        scale = max(np.abs(y).max(initial=0.0), 1e-6)
        error = np.abs(x - y).max(initial=0.0) / scale
        assert error <= bound, f"relative error {error:.2e} exceeds {bound:.2e}"

    jax.tree.map(compare, actual, expected)


def primitives(jaxpr):
    """How often each primitive occurs, inner jaxprs included."""
    return collections.Counter(eqn.primitive.name for eqn in equations(jaxpr))


def made_shapes(jaxpr):
    """Shapes of everything that products, additions and multiplications make."""
    products = ("dot_general", "conv_general_dilated", "ragged_dot_general")
    arithmetic = (*products, "add", "add_any", "mul", "sub")
    return collections.Counter(
        var.aval.shape
        for eqn in equations(jaxpr)
        if eqn.primitive.name in arithmetic
        for var in eqn.outvars
    )


def is_adapted(x):
    return isinstance(x, Adapted)


class Counter:
    """Wraps a function and counts how often it is traced or called."""

    def __init__(self, fn):
        self.fn = fn
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.fn(*args, **kwargs)
