"""Gathers: experts, rows of tables, and what is neither."""

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, made_shapes, random_adapter

import lorax_jax as lj
from lorax_jax._errors import PlanError, TransformError
from lorax_jax.adapters import Role

E, D, F, T = 5, 4, 6, 3


@pytest.fixture
def x(key):
    return jax.random.normal(key, (T, D))


def role_of(fn, shape, *args, tie=None):
    params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
    config = lj.LoraConfig("w", rank=1, tie=tie)
    (slot,) = lj.plan(config, params, lambda p, *a: fn(p["w"], *a), args).slots
    return slot.role


EXPERT = Role("w", (1,), (2,), (0,))
IDS = jnp.arange(T) % E


def test_one_expert_per_token_is_an_expert(x):
    fn = lambda w, x, ids: jnp.einsum("td,tdf->tf", x, w[ids])  # noqa: E731
    assert role_of(fn, (E, D, F), x, IDS) == EXPERT


def test_several_experts_for_one_token_are_experts(x):
    """Nothing runs in parallel: the experts are a free axis of the product."""
    fn = lambda w, x, ids: jnp.einsum("d,kdf->kf", x, w[ids])  # noqa: E731
    assert role_of(fn, (E, D, F), x[0], IDS) == EXPERT


def test_a_token_scanned_past_its_expert(x):
    def fn(w, x, ids):
        return jax.lax.scan(lambda c, xw: (c, xw[0] @ xw[1]), 0.0, (x, w[ids]))[1]

    assert role_of(fn, (E, D, F), x, IDS) == EXPERT


def test_a_table_is_a_table_whatever_comes_after(x):
    """Elementwise, returned, summed, multiplied by a weight: rows are activations."""
    v = jnp.ones((D, F))
    table = Role("w", (0,), (1,), lookup=True)
    for fn in (
        lambda w, x, ids: w[ids] + x,
        lambda w, x, ids: w[ids],
        lambda w, x, ids: w[ids].sum(),
        lambda w, x, ids: w[ids] @ v,
        lambda w, x, ids: jnp.einsum("td,td->t", x, w[ids]),
        lambda w, x, ids: jnp.einsum("sd,td->st", w[ids], w[ids]),
        lambda w, x, ids: jnp.concatenate([w[ids], x]),
        lambda w, x, ids: jax.lax.scan(
            lambda c, row: (jnp.tanh(c + row), None), x[0], w[ids]
        )[0],
        lambda w, x, ids: jax.lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h), w[ids]),
    ):
        assert role_of(fn, (E, D), x, IDS) == table


def test_a_table_of_matrices_beside_a_weight_is_a_table(x):
    """Rows of three axes look like experts: what they meet is a weight, no token."""
    params = {
        "w": jax.ShapeDtypeStruct((E, D, F), jnp.float32),
        "v": jax.ShapeDtypeStruct((F, D), jnp.float32),
    }

    def fn(params, ids):
        return jnp.einsum("thk,kd->thd", params["w"][ids], params["v"])

    plan = lj.plan(lj.LoraConfig("w", rank=1), params, fn, (IDS,))
    assert plan.slots[0].role == Role("w", (0,), (1, 2), lookup=True)


def test_experts_may_multiply_rows_of_a_table():
    params = {
        "w": jax.ShapeDtypeStruct((E, D, F), jnp.float32),
        "v": jax.ShapeDtypeStruct((9, D), jnp.float32),
    }

    def fn(params, tokens, ids):
        return jnp.einsum("td,tdf->tf", params["v"][tokens], params["w"][ids])

    plan = lj.plan(lj.LoraConfig(["w", "v"], rank=1), params, fn, (IDS, IDS))
    assert [slot.role for slot in plan.slots] == [
        Role("v", (0,), (1,), lookup=True),
        EXPERT,
    ]


def test_the_delta_of_every_expert_is_never_built(key, x):
    """Factors are gathered as the weight is: the work grows with tokens alone."""
    params = {"w": jax.random.normal(key, (E, D, F))}

    def fn(params, x, ids):
        return jnp.einsum("td,tdf->tf", x, params["w"][ids])

    bound = lj.bind(params, random_adapter(key, params, [EXPERT]))
    jaxpr = jax.make_jaxpr(lj.adapt(fn))(bound, x, IDS)
    assert not {(E, D, F), (T, D, F)} & set(made_shapes(jaxpr))


@pytest.mark.parametrize("mode", ["fill", "clip", "wrap"])
def test_indices_out_of_range_do_what_they_did(key, x, mode):
    params = {"w": jax.random.normal(key, (E, D, F))}
    ids = jnp.array([1, E + 1, 0])

    def fn(params, x):
        w = jnp.take(params["w"], ids, axis=0, mode=mode, fill_value=0.5)
        return jnp.einsum("td,tdf->tf", x, w)

    adapter = random_adapter(key, params, [EXPERT])
    got = lj.adapt(fn)(lj.bind(params, adapter), x)
    assert_close(got, fn(lj.merge(params, adapter), x))


@pytest.mark.parametrize(
    "choose, shape, role",
    [
        (lambda w, i: w[1, i], (2, E, D, F), Role("w", (2,), (3,), (0, 1))),
        (lambda w, i: w[i, i], (E, E, D, F), Role("w", (2,), (3,), (0, 1))),
        (lambda w, i: w[i, :, 1].swapaxes(1, 0), (E, F, E, D), None),
        (lambda w, i: w[:, i], (D, E, F), Role("w", (0,), (2,), (1,))),
        (lambda w, i: w[None, i[:, None]][0, :, 0], (E, D, F), EXPERT),
        (
            lambda w, i: jnp.take_along_axis(w, i[:, None, None, None], axis=1)[:, 0],
            (T, E, D, F),
            Role("w", (2,), (3,), (0, 1)),
        ),
    ],
)
def test_gathers_along_several_axes(key, choose, shape, role):
    """Axis by axis: each factor by the columns of the indices that it runs along."""
    role = role or Role("w", (3,), (1,), (0, 2))
    params = {"w": jax.random.normal(key, shape)}

    x = jax.random.normal(key, (7, shape[role.inputs[0]]))

    def fn(params, x):
        w = choose(params["w"], IDS)
        axis = w.shape.index(shape[role.inputs[0]])
        return jnp.tensordot(x, w, (1, axis))

    adapter = random_adapter(key, params, [role])
    got = lj.adapt(fn)(lj.bind(params, adapter), x)
    assert_close(got, fn(lj.merge(params, adapter), x))


def test_entries_picked_along_in_and_out_are_refused(key, x):
    params = {"w": jax.random.normal(key, (D, F))}
    bound = lj.bind(params, random_adapter(key, params, [Role("w", (0,), (1,))]))
    with pytest.raises(TransformError, match="run over axes \\(0, 1\\) together"):
        lj.adapt(lambda p, x: x[:, :T] @ p["w"][IDS, IDS])(bound, x)


def test_partial_slices_at_indices_are_refused(key, x):
    params = {"w": jax.random.normal(key, (E, D, F))}
    bound = lj.bind(params, random_adapter(key, params, [EXPERT]))

    def fn(params, x):
        cut = jax.vmap(lambda i: jax.lax.dynamic_slice_in_dim(params["w"], i, 2))(IDS)
        return jnp.einsum("td,tndf->tnf", x, cut)

    with pytest.raises(TransformError, match="indices take partial slices"):
        lj.adapt(fn)(bound, x)
    with pytest.raises(PlanError, match="only gather reads it"):
        lj.plan(lj.LoraConfig("w", rank=1), params, fn, (x,))


def test_filling_an_axis_that_no_factor_holds_is_refused(key, x):
    params = {"w": jax.random.normal(key, (D, F))}
    bound = lj.bind(params, random_adapter(key, params, [Role("w", (0,), (1,))]))

    def fn(params, x):
        many = jnp.broadcast_to(params["w"], (E, D, F))
        w = many.at[IDS + 3].get(mode="fill", fill_value=0.0)
        return jnp.einsum("td,tdf->tf", x, w)

    with pytest.raises(TransformError, match="one that no factor runs along"):
        lj.adapt(fn)(bound, x)


@pytest.mark.parametrize(
    "config", [{}, {"dora": True}, {"token_rows": [1, 3]}], ids=str
)
@pytest.mark.parametrize("axis", [0, 1])
def test_one_row_at_a_time_under_vmap(key, config, axis):
    """`w[i]` of a scalar, mapped over: a gather along two axes, one of them whole."""
    shape = (E, D) if axis == 0 else (D, E)
    params = {"w": jax.random.normal(key, shape), "v": jnp.eye(D)}

    def fn(params, ids):
        one = lambda i: jax.lax.dynamic_index_in_dim(params["w"], i, axis, False)  # noqa: E731
        return jax.vmap(jax.vmap(one))(ids) @ params["v"]

    ids = jnp.array([[0, 3], [1, 9]])  # the last is out of range, and clamped
    targets = "v" if "token_rows" in config else "w|v"
    whole = lj.LoraConfig(targets, rank=2, init=False, **config)
    plan = lj.plan(whole, params, fn, (ids,))
    (slot,) = [slot for slot in plan.slots if slot.role.path == "w"]
    assert (slot.role.inputs, slot.role.lookup) == ((axis,), True)
    adapter = lj.init(plan, params, key=key)
    if "token_rows" in config:
        rows = adapter.train["w@rows"]
        adapter.train["w@rows"] = {"rows": rows["rows"] + 1}
    got = jax.jit(lj.adapt(fn))(lj.bind(params, adapter), ids)
    want = fn(lj.merge(params, adapter), ids)
    assert_close(got, want, length=D * 2)
