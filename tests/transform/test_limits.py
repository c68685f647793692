"""What the README says is not done yet: refused, and never silently wrong."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import lorax_jax as lj
from lorax_jax._errors import PlanError, TransformError

X = jnp.ones((2, 4))


def _cond(params, x):
    return lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: -(x @ w), params["w"])


def _while(params, x):
    def body(carry):
        return carry[0] @ params["w"], carry[1] + 1

    return lax.while_loop(lambda carry: carry[1] < 2, body, (x, 0))[0]


def _shard_map(params, x):
    mesh = jax.make_mesh((1,), ("d",))
    mapped = jax.shard_map(jnp.dot, mesh=mesh, in_specs=(P(), P()), out_specs=P())
    return mapped(x, params["w"])


@pytest.mark.parametrize("fn", [_cond, _while, _shard_map])
def test_weights_inside_control_flow(key, fn):
    params = {"w": jnp.eye(4)}
    plan = lj.plan(lj.LoraConfig("w", rank=1), params, fn, (X,))
    bound = lj.bind(params, lj.init(plan, params, key=key))
    with pytest.raises(TransformError, match="cannot use an adapted weight"):
        lj.adapt(fn)(bound, X)


@pytest.mark.parametrize(
    ("shape", "x", "fn"),
    [
        ((3, 2, 3, 3), (1, 2, 5, 5), lambda x, w: lax.conv(x, w, (1, 1), "SAME")),
        ((2, 4, 4), (2, 4), lambda x, w: lax.ragged_dot(x, w, jnp.array([1, 1]))),
    ],
    ids=["convolution", "ragged"],
)
def test_other_products(shape, x, fn):
    with pytest.raises(PlanError, match="no product or lookup of the function uses it"):
        lj.plan(
            lj.LoraConfig("w", rank=1),
            {"w": jnp.ones(shape)},
            lambda params, x: fn(x, params["w"]),
            (jnp.ones(x),),
        )


def test_a_table_read_one_index_at_a_time(key):
    """The head is not left out, and the table itself is refused."""
    params = {"e": jnp.ones((20, 8)), "l": jnp.ones((8, 8)), "h": jnp.ones((8, 20))}

    def one(params, i):
        return jax.nn.relu(params["e"][i] @ params["l"]) @ params["h"]

    fn, ids = jax.vmap(one, in_axes=(None, 0)), jnp.arange(6)
    plan = lj.plan(lj.LoraConfig("all-linear", rank=2), params, fn, (ids,))
    assert [site.path for site in plan] == ["h", "l"]
    with pytest.raises(PlanError, match="only gather reads it"):
        lj.plan(lj.LoraConfig("e", rank=2), params, fn, (ids,))
