"""Models of Equinox: parameters and code in one tree, taken apart before and after."""

import jax
import jax.numpy as jnp
import pytest
from steps import paths, stand

import lorax_jax as lj

eqx = pytest.importorskip("equinox")
pytestmark = pytest.mark.usefixtures("relaxed")
IDS = jnp.arange(8).reshape(2, 4)


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        keys = jax.random.split(key, 2)
        self.attention = eqx.nn.MultiheadAttention(2, 6, key=keys[0])
        self.norm = eqx.nn.LayerNorm(6)
        self.mlp = eqx.nn.MLP(6, 6, 8, 1, activation=jax.nn.gelu, key=keys[1])
        self.dropout = eqx.nn.Dropout(0.5)

    def __call__(self, x, key=None):
        x = x + self.attention(x, x, x, mask=jnp.tri(len(x), dtype=bool))
        y = self.dropout(jax.vmap(self.norm)(x), key=key, inference=key is None)
        return x + jax.vmap(self.mlp)(y)


class Model(eqx.Module):
    """One sequence in, as Equinox has it; `vmap` brings the batch."""

    embed: eqx.nn.Embedding
    blocks: list[Block]
    head: eqx.nn.Linear
    name: str = eqx.field(static=True)

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Embedding(9, 6, key=keys[0])
        self.blocks = [Block(key) for key in keys[1:3]]
        self.head = eqx.nn.Linear(6, 9, key=keys[3])
        self.name = "tiny"

    def __call__(self, ids, key=None):
        x = jax.vmap(self.embed)(ids)
        for block in self.blocks:
            x = block(x, key)
        return jax.vmap(self.head)(x)


BLOCK = [
    *(f"attention/{name}_proj/weight" for name in ("query", "key", "value", "output")),
    "mlp/layers/0/weight",
    "mlp/layers/1/weight",
]


@pytest.fixture
def parts():
    """A function of arrays, and the arrays."""
    model = Model(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(params, ids, key=None):
        model = eqx.combine(params, static)
        return jax.vmap(model, in_axes=(0, None))(ids, key)

    return fn, params


@pytest.mark.parametrize("key", [None, 3], ids=["evaluated", "with dropout"])
def test_partition_and_combine(parts, key):
    fn, params = parts
    key = None if key is None else jax.random.key(key)
    plan = stand(fn, params, IDS, key, targets="blocks/.*(proj|layers/.)/weight")
    assert paths(plan) == [f"blocks/{i}/{path}" for i in range(2) for path in BLOCK]
    # Kernels are (d_out, d_in), and the trace says so.
    up = {site.path: site for site in plan}["blocks/0/mlp/layers/0/weight"]
    assert up.shape == (8, 6) and (up.role.inputs, up.role.outputs) == ((1,), (0,))


def test_a_table_and_a_head_by_name(parts):
    fn, params = parts
    plan = stand(fn, params, IDS, targets=["embed/weight", "head/weight"])
    assert [site.role.lookup for site in plan] == [True, False]


def test_layers_made_by_filter_vmap():
    """Equinox's own way to stack: `filter_vmap` makes layers, `lax.scan` runs them."""
    blocks = eqx.filter_vmap(Block)(jax.random.split(jax.random.key(0), 3))
    params, static = eqx.partition({"blocks": blocks}, eqx.is_inexact_array)

    def fn(params, x):
        def step(x, block):
            return eqx.combine(block, static)["blocks"](x), None

        return jax.vmap(lambda x: jax.lax.scan(step, x, params)[0])(x)

    plan = stand(fn, params, jax.random.normal(jax.random.key(1), (2, 4, 6)))
    assert {slot.layers for slot in plan.slots} == {(3,)}
    assert set(paths(plan)) == {f"blocks/{i}/{p}" for i in range(3) for p in BLOCK}


def test_the_model_whole():
    """Activations and other code among the leaves: the tree is taken as it is."""
    model = Model(jax.random.key(0))

    def fn(model, ids):
        return jax.vmap(model)(ids)

    config = lj.LoraConfig("all-linear", rank=2, init=False)
    plan = lj.plan(config, model, fn, (IDS,))
    adapter = lj.init(plan, model, key=jax.random.key(1))
    got = lj.adapt(fn)(lj.bind(model, adapter), IDS)
    expected = fn(lj.merge(model, adapter), IDS)
    assert jnp.allclose(got, expected, atol=1e-5)
