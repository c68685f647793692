"""Real functions with derivatives of their own: what the opt-ins make of them.

`custom="primal"` differentiates the function's body, as if it had no rule of its own;
`custom="materialize"` builds the adapted weight, lets the rule give its gradient for it
and takes that on to A and B.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from helpers import assert_close, random_adapter

import lorax_jax as lj
from lorax_jax._errors import PlanError, PlanWarning, TransformError
from lorax_jax.adapters import Role

TOKENS, WIDTH, ROWS, CHUNK = 12, 8, 20, 4


@jax.custom_vjp
def straight_through(w):
    """Rounds to eighths, and lets gradients through as if it did not."""
    return jnp.round(8.0 * w) / 8.0


straight_through.defvjp(lambda w: (straight_through(w), None), lambda _, g: (g,))


def rounded(params, x, labels):
    """A layer whose weight is rounded before it is used."""
    del labels
    return jnp.sin(x @ straight_through(params["head"])).sum()


def _chunks(h, labels):
    return h.reshape(-1, CHUNK, h.shape[-1]), labels.reshape(-1, CHUNK)


@jax.custom_vjp
def fused_loss(head, h, labels):
    """Cross-entropy on the outputs of a head, a chunk of tokens at a time."""

    def one(total, chunk):
        h, labels = chunk
        logits = h @ head
        chosen = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
        return total + (jax.nn.logsumexp(logits, -1) - chosen).sum(), None

    total, _ = jax.lax.scan(one, jnp.zeros((), h.dtype), _chunks(h, labels))
    return total / h.shape[0]


def _forward(head, h, labels):
    """The loss and, while the logits are there, its gradients."""
    count = h.shape[0]

    def one(carry, chunk):
        total, d_head = carry
        h, labels = chunk
        logits = h @ head
        chosen = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
        total = total + (jax.nn.logsumexp(logits, -1) - chosen).sum()
        d = jax.nn.softmax(logits, -1) - jax.nn.one_hot(labels, ROWS)
        return (total, d_head + h.T @ d / count), d @ head.T / count

    start = jnp.zeros((), h.dtype), jnp.zeros_like(head)
    (total, d_head), d_h = jax.lax.scan(one, start, _chunks(h, labels))
    return total / count, (d_head, d_h.reshape(h.shape))


fused_loss.defvjp(_forward, lambda res, g: (g * res[0], g * res[1], None))


def fused(params, x, labels):
    """A head whose loss never makes all logits at once."""
    return fused_loss(params["head"], jnp.tanh(x), labels)


def plain_loss(params, x, labels):
    """What `fused` computes."""
    logits = jax.nn.log_softmax(jnp.tanh(x) @ params["head"])
    return -jnp.take_along_axis(logits, labels[:, None], -1).mean()


def rounded_plainly(params, x, labels):
    """What `rounded` computes, without a rule: rounding has no gradient."""
    del labels
    return jnp.sin(x @ (jnp.round(8.0 * params["head"]) / 8.0)).sum()


@pytest.fixture
def params(key):
    return {"head": jax.random.normal(key, (WIDTH, ROWS))}


@pytest.fixture
def data(key):
    labels = jax.random.randint(jax.random.fold_in(key, 2), (TOKENS,), 0, ROWS)
    return jax.random.normal(jax.random.fold_in(key, 1), (TOKENS, WIDTH)), labels


@pytest.fixture
def adapter(key, params):
    return random_adapter(key, params, [Role("head", (0,), (1,))])


@pytest.mark.parametrize("fn", [rounded, fused])
def test_refused_by_name_and_line(fn, params, adapter, data):
    name = {rounded: "straight_through", fused: "fused_loss"}[fn]
    match = rf"(?s)`head`.*{name}.*test_custom_rules\.py:\d+.*custom="
    with pytest.raises(TransformError, match=match):
        lj.adapt(fn)(lj.bind(params, adapter), *data)


def test_a_plan_says_so_beforehand(params, data):
    with pytest.warns(PlanWarning, match="(?s)will refuse.*custom="):
        lj.plan(lj.LoraConfig("head", rank=2), params, fused, data)


def test_what_rounding_hides_is_declared(params, data):
    config = lj.LoraConfig("head", rank=2)
    with pytest.raises(PlanError, match="only round reads it.*roles={'head'.*`mater"):
        lj.plan(config, params, rounded, data)
    roles = {"head": {"inputs": (0,), "outputs": (1,)}}
    (site,) = lj.plan(config, params, rounded, data, roles=roles, custom="materialize")
    assert site.role.inputs == (0,)


def gradients(fn, params, adapter, data, custom):
    """Loss and gradients of A and B."""

    def loss(train):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        return lj.adapt(fn, custom=custom)(bound, *data)

    return jax.value_and_grad(loss)(adapter.train)


def merged_gradients(fn, params, adapter, data):
    """The same by building the weight from A and B and asking the function."""
    scale = adapter.fixed["head"]["scale"]

    def loss(train):
        a, b = train["head"]["a"], train["head"]["b"]
        return fn({"head": params["head"] + scale * a @ b}, *data)

    return jax.value_and_grad(loss)(adapter.train)


close = functools.partial(assert_close, length=TOKENS * ROWS, factor=4)


@pytest.mark.parametrize("fn", [rounded, fused])
def test_materialize_takes_the_rules_gradient(fn, params, adapter, data):
    got = gradients(fn, params, adapter, data, "materialize")
    close(got, merged_gradients(fn, params, adapter, data))


@pytest.mark.parametrize(
    ("fn", "body", "materialize"),
    # Rounding is no linear operation, with a rule of its own or without.
    [(rounded, rounded_plainly, ["round"]), (fused, plain_loss, "error")],
    ids=["rounded", "fused"],
)
def test_primal_differentiates_the_body(fn, body, materialize, params, adapter, data):
    def loss(train):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        return lj.adapt(fn, custom="primal", materialize=materialize)(bound, *data)

    got = jax.value_and_grad(loss)(adapter.train)
    close(got, merged_gradients(body, params, adapter, data))
