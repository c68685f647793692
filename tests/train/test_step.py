import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Counter

import lorax_jax as lj
from lorax_jax import train
from lorax_jax.train import Windows, _step, cross_entropy


def batch_of(rows, parts=1, size=4):
    chosen = Windows(rows.ids[: parts * size], rows.weights[: parts * size])
    return Windows(*(x.reshape(parts, size, -1) for x in chosen))


def test_one_step_is_the_gradient_of_the_loss(model, params, adapter, rows):
    """Against the loss of the merged model, differentiated by A and B."""
    batch = batch_of(rows)
    ids, weights = batch.ids[0], batch.weights[0]

    def loss(factors):
        scale = adapter.fixed["head"]["scale"]
        whole = params["head"] + scale * factors["head"]["a"] @ factors["head"]["b"]
        logits = model(params | {"head": whole}, ids[:, :-1])
        return cross_entropy(logits, ids[:, 1:], weights)

    value, grads = jax.value_and_grad(loss)(adapter.train)
    tx = optax.sgd(0.5)
    state = train.start(adapter, tx, jax.random.key(0))
    step = train.make_step(model, tx)
    state, metrics = step(state, adapter.fixed, params, batch)
    # Products of 8 terms over 32 tokens, in float32.
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-5)
    np.testing.assert_allclose(metrics.grad_norm, optax.tree.norm(grads), rtol=1e-5)
    wanted = jax.tree.map(lambda x, g: x - 0.5 * g, adapter.train, grads)
    for found, want in zip(
        jax.tree.leaves(state.train), jax.tree.leaves(wanted), strict=True
    ):
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)


def test_parts_add_up_to_one_batch(model, params, adapter, rows):
    # Rows count differently, so a mean of the parts' means would be something else.
    weights = rows.weights * (np.arange(12) % 3 > 0)[:, None]
    uneven = Windows(rows.ids, weights.astype(np.float32))
    tx = optax.sgd(0.5)
    step, states = train.make_step(model, tx), []
    for parts, size in ((1, 12), (3, 4)):
        state = train.start(adapter, tx, jax.random.key(0))
        batch = batch_of(uneven, parts, size)
        states.append(step(state, adapter.fixed, params, batch))
    one, three = map(jax.tree.leaves, states)
    for a, b in zip(one, three, strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_only_the_state_is_donated(model, params, adapter, rows):
    tx = optax.sgd(0.5)
    state = train.start(adapter, tx, jax.random.key(0))
    step = train.make_step(model, tx)
    lowered = step.lower(state, adapter.fixed, params, batch_of(rows))
    donated = jax.tree.map(lambda info: info.donated, lowered.args_info)
    of_state, *others = donated[0]
    assert jax.tree.all(of_state)
    assert not any(jax.tree.leaves(others))


def test_the_base_is_no_constant(model, params, adapter, rows):
    tx = optax.sgd(0.5)
    state = train.start(adapter, tx, jax.random.key(0))
    args = (state, adapter.fixed, params, batch_of(rows))
    jaxpr = jax.make_jaxpr(train.make_step(model, tx))(*args)
    (call,) = jaxpr.eqns
    inner = call.params["jaxpr"]
    consts = [*jaxpr.consts, *inner.consts]
    assert sum(np.size(const) for const in consts) < 100


@pytest.fixture
def losses(monkeypatch):
    """Counts how often a step or a score is traced: each does its loss once."""
    counted = Counter(cross_entropy)
    monkeypatch.setattr(_step, "cross_entropy", counted)
    return counted


def test_a_second_step_compiles_nothing(model, params, adapter, rows, losses):
    tx = optax.adam(0.1)
    state = train.start(adapter, tx, jax.random.key(0))
    step = train.make_step(model, tx)
    state, _ = step(state, adapter.fixed, params, batch_of(rows))
    traced = losses.calls
    assert traced > 0
    for _ in range(2):
        state, _ = step(state, adapter.fixed, params, batch_of(rows))
    assert losses.calls == traced
    assert int(state.step) == 3


def test_the_adapter_that_was_passed_stays(model, params, adapter, rows):
    before = jax.tree.map(np.asarray, adapter.train)
    tx = optax.sgd(0.5)
    key = jax.random.key(0)
    state = train.start(adapter, tx, key)
    train.make_step(model, tx)(state, adapter.fixed, params, batch_of(rows))
    assert jax.tree.all(jax.tree.map(np.array_equal, before, adapter.train))
    assert not key.is_deleted()


def test_dropout_draws_anew(model, params, adapter_with, rows):
    adapter = adapter_with(params, dropout=0.5, init=False)
    tx = optax.sgd(0.0)
    step = train.make_step(model, tx)
    state = train.start(adapter, tx, jax.random.key(0))
    losses = []
    for _ in range(3):
        state, metrics = step(state, adapter.fixed, params, batch_of(rows))
        losses.append(float(metrics.loss))
    assert len(set(losses)) == 3
    again = train.start(adapter, tx, jax.random.key(0))
    _, metrics = step(again, adapter.fixed, params, batch_of(rows))
    assert float(metrics.loss) == losses[0]


def test_parts_of_a_batch_drop_different_inputs(model, params, adapter_with, rows):
    adapter = adapter_with(params, dropout=0.5, init=False)
    same = Windows(np.stack([rows.ids[:4]] * 2), np.stack([rows.weights[:4]] * 2))
    tx = optax.sgd(0.5)
    step = train.make_step(model, tx)
    ends = []
    for batch in (same, Windows(same.ids[:1], same.weights[:1])):
        state = train.start(adapter, tx, jax.random.key(0))
        state, _ = step(state, adapter.fixed, params, batch)
        ends.append(np.asarray(state.train["head"]["a"]))
    assert not np.allclose(*ends)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_base_of_half_precision(model, params, adapter_with, rows, dtype):
    half = jax.tree.map(lambda x: x.astype(dtype), params)
    adapter = adapter_with(half)
    tx = optax.sgd(0.5)
    state = train.start(adapter, tx, jax.random.key(0))
    state, metrics = train.make_step(model, tx)(
        state, adapter.fixed, half, batch_of(rows)
    )
    assert metrics.loss.dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.train))
    assert float(metrics.grad_norm) > 0


def test_score_at_weight_0_is_the_base(model, params, adapter_with, rows, losses):
    adapter = adapter_with(params, init=False)
    part = Windows(rows.ids[:4], rows.weights[:4])
    score = train.make_score(model)

    def loss(tree):
        return cross_entropy(
            model(tree, part.ids[:, :-1]), part.ids[:, 1:], part.weights, total=1.0
        )

    for weight, tree in ((0.0, params), (1.0, lj.merge(params, adapter))):
        nats, tokens = score(np.float32(weight), adapter, params, part)
        np.testing.assert_allclose(nats, loss(tree), rtol=1e-5)
        assert tokens == 32
    assert losses.calls == 1
