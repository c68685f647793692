"""The library's promises, read off the train step of whole models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Counter, assert_close, equations

import lorax_jax as lj

CONFIG = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 97,
    "n_positions": 32,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 2,
}


def build(config=CONFIG, rank=5, **kwargs):
    model = lj.models.from_config(config, **kwargs)
    params = model.init(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (2, 11), 0, 97)
    lora = lj.LoraConfig("all-linear", rank=rank, init=False)
    plan = lj.plan(lora, params, model.apply, (ids,))
    return model, params, lj.init(plan, params, key=jax.random.key(2)), ids


def loss_of(model):
    forward = lj.adapt(model.apply)

    def loss(train, fixed, params, ids):
        logits = forward(lj.bind(params, lj.Adapter(train, fixed)), ids)
        logits = logits[:, :-1].astype(jnp.float32)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return each.mean()

    return loss


@pytest.fixture(params=[False, True], ids=["unrolled", "scanned"])
def scan(request):
    return request.param


def depends_on(jaxpr, roots):
    """Equations of a jaxpr, inner ones included, that read any of the root inputs."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    tainted = {v for v, root in zip(inner.invars, roots, strict=True) if root}
    for eqn in inner.eqns:
        flags = [not hasattr(v, "val") and v in tainted for v in eqn.invars]
        if not any(flags):
            continue
        tainted.update(eqn.outvars)
        bodies = [
            value
            for value in eqn.params.values()
            if hasattr(value, "eqns") or hasattr(value, "jaxpr")
        ]
        if len(bodies) == 1 and len(_invars(bodies[0])) == len(flags):
            yield from depends_on(bodies[0], flags)
        else:
            yield eqn


def _invars(jaxpr):
    return getattr(jaxpr, "jaxpr", jaxpr).invars


@pytest.mark.parametrize("remat", [None, "full"])
def test_no_dense_delta_and_no_gradient_of_the_base(scan, remat):
    """Nothing of a weight's shape is computed from A and B, forward or backward."""
    model, params, adapter, ids = build(scan_layers=scan, remat=remat)
    step = jax.value_and_grad(loss_of(model))
    args = (adapter.train, adapter.fixed, params, ids)
    jaxpr = jax.make_jaxpr(step)(*args)
    sizes = [len(jax.tree.leaves(arg)) for arg in args]
    roots = [True] * sizes[0] + [False] * sum(sizes[1:])
    shapes = {
        shape
        for leaf in jax.tree.leaves(params)
        if leaf.ndim > 1
        for shape in (leaf.shape, leaf.shape[::-1], leaf.shape[1:], leaf.shape[:0:-1])
        if len(shape) > 1
    }
    made = [
        (eqn.primitive.name, var.aval.shape)
        for eqn in depends_on(jaxpr, roots)
        for var in eqn.outvars
        if var.aval.shape in shapes
    ]
    assert not made
    # And the check can fail: building the dense weight is seen.
    dense = jax.make_jaxpr(
        jax.grad(lambda t, f, p, i: model.apply(lj.merge(p, lj.Adapter(t, f)), i).sum())
    )(*args)
    assert any(
        var.aval.shape in shapes
        for eqn in depends_on(dense, roots)
        for var in eqn.outvars
    )


def test_bfloat16_models_see_no_float32_activation(scan):
    """Factors in float32, base in bfloat16: what a layer hands on is bfloat16."""
    model, params, adapter, ids = build(scan_layers=scan, dtype=jnp.bfloat16)
    plain = jax.make_jaxpr(model.apply)(params, ids)
    bound = lj.bind(params, adapter)
    adapted = jax.make_jaxpr(lj.adapt(model.apply))(bound, ids)

    def wide(jaxpr):
        return {
            var.aval.shape
            for eqn in equations(jaxpr)
            for var in eqn.outvars
            if getattr(var.aval, "dtype", None) == jnp.float32
        }

    batch, seq = ids.shape
    activations = {s for s in wide(adapted) - wide(plain) if s[:2] == (batch, seq)}
    assert not activations
    products = [e for e in equations(adapted) if e.primitive.name == "dot_general"]
    kinds = {str(e.outvars[0].aval.dtype) for e in products}
    before = [e for e in equations(plain) if e.primitive.name == "dot_general"]
    assert kinds == {str(e.outvars[0].aval.dtype) for e in before}
    assert jax.eval_shape(lj.adapt(model.apply), bound, ids).dtype == jnp.bfloat16


def test_alphas_and_scales_share_a_program(scan):
    """Alpha, scale and weight are data: three of each, one trace."""
    model, params, _, ids = build(scan_layers=scan)
    forward = lj.adapt(model.apply)
    counted = Counter(
        lambda p, adapter, w, ids: forward(lj.bind(p, adapter, weights=[w]), ids)
    )
    run = jax.jit(counted)
    outs = []
    for alpha, weight in ((4, 1.0), (8, 0.5), (16, 2.0)):
        config = lj.LoraConfig("all-linear", rank=4, alpha=alpha, init=False)
        plan = lj.plan(config, params, model.apply, (ids,))
        adapter = lj.init(plan, params, key=jax.random.key(2))
        outs.append(run(params, adapter, jnp.float32(weight), ids))
    assert counted.calls == 1
    assert_close(outs[0], outs[1], factor=8)  # 4 * 1 = 8 * 0.5
    assert not np.allclose(outs[0], outs[2], atol=1e-3)


def test_plain_adamw_with_decay_moves_nothing_that_is_fixed(scan, relaxed):
    """After 100 steps, what is fixed and the base are the same bits."""
    model, params, adapter, ids = build(scan_layers=scan)
    train, fixed = adapter
    frozen = jax.tree.map(np.array, (fixed, params))
    tx = optax.adamw(1e-2, weight_decay=0.1)
    loss = loss_of(model)

    @jax.jit
    def step(train, state, fixed, params, ids):
        value, grads = jax.value_and_grad(loss)(train, fixed, params, ids)
        updates, state = tx.update(grads, state, train)
        return optax.apply_updates(train, updates), state, value

    state, first = tx.init(train), None
    for _ in range(100):
        train, state, value = step(train, state, fixed, params, ids)
        first = value if first is None else first
    assert value < 0.9 * first
    same = jax.tree.map(np.array_equal, frozen, jax.tree.map(np.array, (fixed, params)))
    assert jax.tree.all(same)
    changed = jax.tree.map(lambda x, y: not np.array_equal(x, y), train, adapter.train)
    assert jax.tree.all(changed)


@pytest.mark.parametrize("config", [CONFIG, GPT2], ids=["llama", "gpt2"])
def test_adapted_equals_merged(config, scan):
    model, params, adapter, ids = build(config, scan_layers=scan)
    apply = jax.jit(model.apply)
    got = jax.jit(lj.adapt(model.apply))(lj.bind(params, adapter), ids)
    merged = apply(jax.jit(lj.merge)(params, adapter), ids)
    assert_close(got, merged, length=56, factor=8)
    assert not np.allclose(got, apply(params, ids), atol=1e-2)


def test_generation_on_adapted_weights(scan):
    """The cached decoding loop takes a bound tree as it takes a plain one."""
    model, params, adapter, ids = build(scan_layers=scan)
    forward, bound = lj.adapt(model.apply), lj.bind(params, adapter)
    got, _ = lj.models.generate(forward, bound, ids, max_new_tokens=6)
    merged = lj.merge(params, adapter)
    expected, _ = lj.models.generate(model.apply, merged, ids, max_new_tokens=6)
    assert np.array_equal(got, expected)


def test_gpt2_counts_as_the_guides_say():
    model = lj.models.from_config({"model_type": "gpt2"})
    shapes = model.abstract()
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    plan = lj.plan(lj.LoraConfig(rank=8), shapes, model.apply, (ids,))
    adapter = jax.eval_shape(lambda p: lj.init(plan, p, key=jax.random.key(0)), shapes)
    line = "trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.2364"
    assert str(lj.count(shapes, adapter)) == line
