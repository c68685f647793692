"""Steps to audit: layers in several forms, and a model of them."""

import inspect

import jax
import jax.numpy as jnp
from jax import lax

import lorax_jax as lj

WIDTH, OUT, LAYERS = 16, 12, 3
NAMES = (
    "no dense update",
    "no base-size gradient",
    "no large constant",
    "no wider activation",
    "no extra collective",
    "no zero gradient",
)


def new_layer():
    """A function that nothing has traced before."""

    def layer(w, x):
        return jnp.tanh(x @ w)

    return layer


layer = new_layer()
FORMS = {
    "plain": lambda layer: layer,
    "jit": jax.jit,
    "remat": lambda layer: jax.jit(jax.checkpoint(layer)),
}


def build(fn, dtype=jnp.float32, *, tokens=WIDTH, rank=5):
    """Parameters, adapter and input for `fn`, with as many tokens as features."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "layers": jax.random.normal(keys[0], (LAYERS, WIDTH, WIDTH), dtype) / 4,
        "head": jax.random.normal(keys[1], (WIDTH, OUT), dtype) / 4,
    }
    x = jax.random.normal(keys[2], (tokens, WIDTH), dtype)
    config = lj.LoraConfig(["layers", "head"], rank=rank)
    plan = lj.plan(config, params, fn, (x,))
    return params, lj.init(plan, params, key=keys[3]), x


def model(stack, apply, prepare=lambda w: w):
    """A stack of layers and a head; `prepare` is what is done to each layer's w."""

    def fn(params, x):
        x = stack(lambda w, x: apply(prepare(w), x), params["layers"], x)
        return x @ params["head"]

    return fn


def line_of(fn, text):
    """`file:line` of the first line of `fn` that holds `text`."""
    lines, first = inspect.getsourcelines(fn)
    at = next(i for i, line in enumerate(lines) if text in line)
    return f"{inspect.getsourcefile(fn)}:{first + at} "


def model_scanned():
    return model(
        lambda apply, w, x: lax.scan(lambda x, w: (apply(w, x), None), x, w)[0], layer
    )
