"""Shapes of models, in Flax and by hand: each is planned, trained a step and merged."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from steps import drawn, paths, stand

import lorax_jax as lj

pytestmark = pytest.mark.usefixtures("relaxed")

X = jax.random.normal(jax.random.key(0), (2, 5, 6))
IDS = jax.random.randint(jax.random.key(1), (2, 5), 0, 11)


def linen(model, *inputs):
    """`apply`, and variables; see `drawn`."""
    shapes = jax.eval_shape(model.init, jax.random.key(2), *inputs)
    return model.apply, drawn(shapes)


# --- Plain functions ------------------------------------------------------------------


def test_lists_tuples_and_dictionaries():
    key = jax.random.key(0)
    params = {
        "layers": [(jax.random.normal(key, (6, 6)), jnp.ones(6)) for _ in range(3)],
        "out": {"w": jax.random.normal(key, (6, 4))},
    }

    def fn(params, x):
        for w, b in params["layers"]:
            x = jnp.tanh(x @ w + b)
        return {"y": x @ params["out"]["w"], "n": x.shape[0]}

    plan = stand(lambda params, x: fn(params, x)["y"], params, X)
    assert paths(plan) == ["layers/0/0", "layers/1/0", "layers/2/0", "out/w"]


def test_leaves_of_a_dataclass():
    @functools.partial(jax.tree_util.register_dataclass)
    @dataclasses.dataclass
    class Params:
        up: jax.Array
        down: jax.Array

    up, down = jax.random.normal(jax.random.key(0), (2, 6, 6))

    def fn(params, x):
        return jax.nn.silu(x @ params.up) @ params.down.T

    assert paths(stand(fn, Params(up, down), X)) == ["up", "down"]


# --- Vision ---------------------------------------------------------------------------


class VisionTransformer(nn.Module):
    """Patches by reshape and product, a class token, learned positions."""

    @nn.compact
    def __call__(self, images):
        n, height, width, channels = images.shape
        patches = images.reshape(n, height // 2, 2, width // 2, 2, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, 4 * channels)
        x = nn.Dense(8, name="patches")(patches)
        token = self.param("token", nn.initializers.normal(), (1, 1, 8))
        x = jnp.concatenate([jnp.tile(token, (n, 1, 1)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], 8))
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))
        return nn.Dense(3, name="head")(nn.LayerNorm()(x)[:, 0])


def test_a_vision_transformer():
    images = jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
    plan = stand(*linen(VisionTransformer(), images), images)
    found = paths(plan)
    # Patches, four projections and two dense layers, and the head, which is no head of
    # a language model: nothing is looked up in a table of three rows.
    assert len(found) == 1 + 6 + 1
    assert {"params/patches/kernel", "params/head/kernel"} < set(found)


# --- Two towers -----------------------------------------------------------------------


class EncoderDecoder(nn.Module):
    """One table for both sides and the head; cross attention in between."""

    tied: bool = True

    @nn.compact
    def __call__(self, source, target):
        table = nn.Embed(11, 8, name="tokens")
        memory = table(source)
        attend = nn.MultiHeadDotProductAttention(2, name="encoder")
        memory = memory + attend(memory)
        x = table(target)
        causal = nn.make_causal_mask(target)
        x = x + nn.MultiHeadDotProductAttention(2, name="decoder")(x, mask=causal)
        x = x + nn.MultiHeadDotProductAttention(2, name="cross")(x, memory)
        head = table if self.tied else nn.Embed(11, 8, name="head")
        return head.attend(nn.LayerNorm()(x))


@pytest.mark.parametrize("tie", ["shared", "lookup", "head"])
def test_cross_attention_and_a_tied_table(tie):
    fn, variables = linen(EncoderDecoder(), IDS, IDS[:, :4])
    rules = {"params/tokens/embedding": {"tie": tie}, "all-linear": {}}

    def merged(adapter):
        """The same model with two tables, only one of which is changed."""
        path = "params/tokens/embedding"
        names = {f.role.path: name for name, f in adapter.fixed.items()}
        rest = lj.Adapter(*({**part} for part in adapter))
        factors, fixed = (part.pop(names[path]) for part in rest)
        delta = fixed["scale"] * factors["a"] @ factors["b"]
        weights = lj.merge(variables, rest)["params"]
        table = weights["tokens"]["embedding"]
        tables = {"tokens": table, "head": table}
        if tie == "lookup":
            tables["tokens"] = table + delta
        else:
            tables["head"] = table + delta.T
        weights = weights | {name: {"embedding": w} for name, w in tables.items()}
        args = {"params": weights}, IDS, IDS[:, :4]
        return jax.jit(EncoderDecoder(tied=False).apply)(*args)

    untied = None if tie == "shared" else merged
    plan = stand(fn, variables, IDS, IDS[:, :4], targets=rules, merged=untied)
    assert len(plan) == 3 * 4 + 1
    uses = {site.path: site.use for site in plan}
    assert uses["params/tokens/embedding"] == (None if tie == "shared" else tie)
    assert "params/cross/key/kernel" in uses


# --- Recurrence -----------------------------------------------------------------------


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.LSTMCell, nn.OptimizedLSTMCell])
def test_linen_cells_over_time(cell):
    """`nn.RNN` scans over time with the same kernels in every step."""
    fn, variables = linen(nn.RNN(cell(8)), X)
    plan = stand(fn, variables, X)
    assert all(slot.layers == () for slot in plan.slots)
    assert len(plan) == (6 if cell is nn.GRUCell else 8)


@pytest.mark.parametrize("cell", [nnx.GRUCell, nnx.LSTMCell, nnx.OptimizedLSTMCell])
def test_nnx_cells_over_time(cell):
    module = nnx.RNN(cell(6, 8, rngs=nnx.Rngs(0)))
    fn, params, state = lj.functional(module)
    plan = stand(lambda p, x: fn(p, state, x)[0], params, X)
    assert all(slot.layers == () for slot in plan.slots)


def test_a_scan_over_time_by_hand():
    """`lax.scan` with the kernels closed over, and layers stacked around it."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "layers": {
            "w": jax.random.normal(keys[0], (3, 6, 6)) / 3,
            "u": jax.random.normal(keys[1], (3, 6, 6)) / 3,
        }
    }

    def layer(x, p):
        def step(h, x):
            h = jnp.tanh(x @ p["w"] + h @ p["u"])
            return h, h

        _, y = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), x.swapaxes(0, 1))
        return y.swapaxes(0, 1), None

    def fn(params, x):
        return jax.lax.scan(layer, x, params["layers"])[0]

    plan = stand(fn, params, X)
    assert paths(plan) == [f"layers/{i}/{name}" for name in "uw" for i in range(3)]


def test_a_block_diagonal_state_space():
    """Gates with a block for each head, and a recurrence in logarithmic depth."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "gate": jax.random.normal(keys[0], (3, 2, 2)),
        "input": jax.random.normal(keys[1], (6, 6)) / 2,
        "output": jax.random.normal(keys[2], (6, 6)) / 2,
        "decay": jnp.linspace(-1.0, 1.0, 6),
    }

    def fn(params, x):
        heads = x.reshape(*x.shape[:2], 3, 2)
        gate = jax.nn.sigmoid(jnp.einsum("bthi,hio->btho", heads, params["gate"]))
        a = jax.nn.sigmoid(params["decay"]) * gate.reshape(x.shape)  # (b, t, 6)
        y = x @ params["input"]

        def combine(left, right):
            return left[0] * right[0], right[0] * left[1] + right[1]

        _, h = jax.lax.associative_scan(combine, (a, y), axis=1)
        return h @ params["output"]

    plan = stand(fn, params, X)
    (gate,) = [slot for slot in plan.slots if slot.role.path == "gate"]
    # One pair of factors for each block: a batch axis that is no stack of layers.
    assert (gate.experts, gate.layers) == ((3,), ())
    assert gate.shape_a() == (3, 2, 2)


# --- Tables ---------------------------------------------------------------------------


class RelativeAttention(nn.Module):
    """T5's attention: no positions, a learned bias by bucket of distance and head."""

    @nn.compact
    def __call__(self, x):
        heads, width = 4, x.shape[-1]
        q, k, v = (
            nn.DenseGeneral((heads, 3), use_bias=False, name=name)(x) for name in "qkv"
        )
        distance = np.arange(x.shape[1])[None, :] - np.arange(x.shape[1])[:, None]
        buckets = jnp.asarray(np.clip(distance, -2, 2) + 2)
        bias = nn.Embed(5, heads, name="bias")(buckets)  # (queries, keys, heads)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) + bias.transpose(2, 0, 1)[None]
        y = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), v)
        return nn.DenseGeneral(width, axis=(-2, -1), use_bias=False, name="o")(y)


def test_a_table_of_relative_positions():
    rules = {"params/bias/embedding": {}, "all-linear": {}}
    plan = stand(*linen(RelativeAttention(), X), X, targets=rules)
    assert sorted(paths(plan)) == [
        "params/bias/embedding",
        *(f"params/{name}/kernel" for name in "koqv"),
    ]
