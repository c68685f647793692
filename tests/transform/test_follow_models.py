"""Where tokens are in attention, in experts and in whole models."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from berts import BERT
from followed import (
    BATCH,
    SEQ,
    TOKENS,
    B,
    D,
    S,
    W,
    X,
    products,
    results,
    said,
    trace,
    with_weight_of,
)
from jax import lax

from lorax_jax import models
from lorax_jax._errors import FollowError
from lorax_jax.transform import _jaxpr, follow, lay_out
from lorax_jax.transform._jaxpr import equations

# Two arrays of equal shapes.


def test_equal_sizes_are_told_apart():
    """batch == seq == width: an axis is what flowed into it."""
    x = jnp.ones((4, 4, 4))

    def fn(x):
        scores = jnp.einsum("bqd,bkd->bqk", x, x)
        return scores, jnp.einsum("bqk,bkd->qbd", scores, x), jnp.einsum("bsd->dsb", x)

    found = [said(axes) for axes in results(fn, x)]
    assert found == [[BATCH, SEQ, SEQ], [SEQ, BATCH, ()], [(), SEQ, BATCH]]
    [mixed] = results(lambda x: x + x.swapaxes(0, 1), x)
    assert said(mixed) == ["-", "-", ()]


def test_cross_attention_of_equal_lengths():
    """Only the queries' tokens are followed; keys of another text are as long."""

    def attend(x, context, w):
        q, k, v = x @ w, context @ w, context @ w
        scores = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k))
        return jnp.einsum("bqk,bkd->bqd", scores, v) @ w

    jaxpr, followed = trace(attend, X, X, W)
    with_weight = [e for e in products(jaxpr) if e.invars[1].aval.shape == (D, D)]
    found = [said(followed.axes(e, 0)) for e in with_weight]
    tokens, other = [BATCH, SEQ, ()], [(), (), ()]
    assert sorted(found, key=str) == sorted([tokens, other, other, tokens], key=str)
    with pytest.raises(FollowError, match="or never entered it"):
        lay_out(TOKENS, ((), ()), (B, S))

    jaxpr, followed = trace(attend, X, X, W, starts={1: (0, 1)})
    found = [said(followed.axes(e, 0)) for e in with_weight_of(jaxpr)]
    # The output has one row for each query, batch by batch as the keys have.
    mixed = [BATCH, (), ()]
    assert sorted(found, key=str) == sorted([other, tokens, tokens, mixed], key=str)


# Experts.


def test_tokens_sorted_by_expert_are_refused(relaxed):
    """As many sorted rows as tokens: a mask would fit, and would be wrong."""

    def moe(x, router, experts):
        rows = x.reshape(-1, D)
        expert = jnp.argmax(rows @ router, -1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=2)
        out = lax.ragged_dot(rows[order], experts, sizes)
        return jnp.zeros_like(out).at[order].set(out).reshape(x.shape)

    args = X, jnp.ones((D, 2)), jnp.ones((2, D, D))
    jaxpr, followed = trace(moe, *args)
    [product] = [e for e in equations(jaxpr) if e.primitive.name.startswith("ragged")]
    with pytest.raises(FollowError, match=r"lost +`gather`: tokens are picked") as info:
        followed.axes(product, 0, among=[0])
    assert re.search(r"at  .*test_follow_models.py:\d+ \(.*moe\)", str(info.value))
    [router] = [e for e in products(jaxpr) if e.invars[1].aval.shape == (D, 2)]
    assert said(followed.axes(router, 0)) == [(0, 1), ()]
    assert said(followed.results[0]) == ["-", "-", ()]


def test_tokens_sent_to_experts_by_a_product_are_refused(relaxed):
    """Slots of an expert hold other tokens in every batch; the batch is still known."""

    def moe(x, router, experts):
        gates = jax.nn.softmax(x @ router)
        expert = jax.nn.one_hot(jnp.argmax(gates, -1), 2)
        place = jnp.cumsum(expert, 1) * expert
        send = jax.nn.one_hot(place.astype(int) - 1, 3) * expert[..., None]
        sent = jnp.einsum("bsec,bsd->becd", send, x)
        out = jnp.einsum("becd,edf->becf", sent, experts)
        return jnp.einsum("becf,bsec,bse->bsf", out, send, gates)

    args = X, jnp.ones((D, 2)), jnp.ones((2, D, 5))
    jaxpr, followed = trace(moe, *args)
    [(product, x)] = [
        (e, 1 - at)
        for e in products(jaxpr)
        for at, v in enumerate(e.invars)
        if v.aval.shape == args[2].shape
    ]
    axes = followed.axes(product, x)
    assert sorted(said(axes)) == [(), (), (), BATCH]
    with pytest.raises(FollowError, match="no axis of the array runs along axis 1"):
        lay_out(TOKENS, axes, product.invars[x].aval.shape)
    assert said(followed.results[0]) == [BATCH, SEQ, ()]


def test_experts_in_parallel_are_followed():
    """Every expert sees every token, and the mask is repeated for each."""

    def moe(x, router, experts):
        out = jnp.einsum("bsd,edf->ebsf", x, experts)
        return jnp.einsum("ebsf,bse->bsf", out, jax.nn.softmax(x @ router))

    args = X, jnp.ones((D, 2)), jnp.ones((2, D, D))
    assert said(results(moe, *args)[0]) == [BATCH, SEQ, ()]


def test_unrolled_steps_are_counted_as_picked():
    """A loop over single tokens: what it stacks is not known to be in order."""

    def rnn(x):
        h, out = jnp.zeros((B, D)), []
        for t in range(S):
            h = jnp.tanh(x[:, t] @ W + h)
            out.append(h)
        return jnp.stack(out, 1)

    [axes] = results(rnn, X)
    assert said(axes) == [BATCH, (), ()]
    with pytest.raises(FollowError, match="picked one by one"):
        lay_out(TOKENS, axes, X.shape)


# Whole models.

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS = {"llama": LLAMA, "gpt2": GPT2, "bert": BERT}


def followed_model(model, ids, **kwargs):
    """The jaxpr of a model on abstract parameters, its weights and what is followed."""
    leaves, tree = jax.tree.flatten(model.abstract())

    def fn(leaves, ids):
        return model.apply(jax.tree.unflatten(tree, leaves), ids, **kwargs)

    jaxpr = jax.make_jaxpr(fn)(leaves, ids)
    kernels = {leaf.shape[-2:] for leaf in leaves if len(leaf.shape) > 1}
    return jaxpr, kernels, follow(jaxpr, {len(leaves): (0, 1)})


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_models(family, scan, masked):
    """Every weight of every layer sees all tokens in their order."""
    model = models.from_config(CONFIGS[family], scan_layers=scan)
    ids = jnp.zeros((3, 5), int)
    mask = {"mask": jnp.ones((3, 5), int)} if masked else {}
    jaxpr, kernels, followed = followed_model(model, ids, **mask)
    sites = [e for e in products(jaxpr) if e.invars[1].aval.shape in kernels]
    per_layer = {"llama": 7, "gpt2": 4, "bert": 6}[family]
    head = 0 if family == "bert" else 1
    assert len(sites) == (1 if scan else 2) * per_layer + head
    for site in sites:
        assert said(followed.axes(site, 0)) == [BATCH, SEQ, ()]


def evaluate(jaxpr, consts, values, seen):
    """What enters each product, in order; calls are entered, nothing is compiled."""
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, values, strict=True))
    read = lambda v: v.val if _jaxpr.is_literal(v) else env[v]  # noqa: E731
    for eqn in jaxpr.eqns:
        operands = [read(v) for v in eqn.invars]
        if eqn.primitive.name == "dot_general":
            seen.append((eqn, operands))
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if inner is not None:
            inner, held = _jaxpr.closed(inner)
            out = evaluate(inner, held, operands, seen)
        else:
            out = _jaxpr.bind(eqn, operands)
        env.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_a_changed_token_reaches(family):
    """Measured: attention looks back, so a token changes no row before its own.

    Along the axis that is said to be the sequence, the first row that changes is the
    token's; along the batch, its text alone changes. Batch, sequence, heads and the
    size of a head are equal.
    """
    n = 4
    config = dict(CONFIGS[family])
    config |= {"num_attention_heads": n, "num_key_value_heads": n, "n_head": n}
    config = {k: v for k, v in config.items() if k in CONFIGS[family]}
    model = models.from_config(config)
    params = model.init(jax.random.key(0))
    ids = jnp.arange(n * n).reshape(n, n)
    jaxpr = jax.make_jaxpr(lambda ids: model.apply(params, ids))(ids)
    followed = follow(jaxpr, {0: (0, 1)})
    runs = []
    for b, t in [(None, None), (2, 1), (0, 3)]:
        changed = ids if b is None else ids.at[b, t].set(31)
        seen = []
        evaluate(*_jaxpr.closed(jaxpr), [changed], seen)
        runs.append((b, t, seen))
    (_, _, before), *others = runs
    checked = 0
    for b, t, after in others:
        for (eqn, old), (_, new) in zip(before, after, strict=True):
            for i in (0, 1):
                labels = said(followed.axes(eqn, i))
                if sorted(labels)[-2:] != [BATCH, SEQ] or labels.count(SEQ) != 1:
                    continue
                differs = np.asarray(old[i]) != np.asarray(new[i])
                at = labels.index(BATCH), labels.index(SEQ)
                rest = tuple(j for j in range(differs.ndim) if j not in at)
                rows = differs.any(axis=rest)
                rows = rows if at[0] < at[1] else rows.T  # (batch, seq)
                np.testing.assert_array_equal(np.flatnonzero(rows.any(1)), [b])
                assert np.flatnonzero(rows[b])[0] == t
                checked += 1
    assert checked > 2 * len(before)  # x of every product, and the keys


@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_flax_attention(library, relaxed):
    """Heads are axes of their own there, and positions are added."""
    if library == "nnx":
        from flax import nnx

        module = nnx.MultiHeadAttention(2, D, decode=False, rngs=nnx.Rngs(0))
        fn = lambda x: module(x + jnp.ones((S, D)))  # noqa: E731
    else:
        from flax import linen

        module = linen.MultiHeadDotProductAttention(2)
        params = module.init(jax.random.key(0), X)
        fn = lambda x: module.apply(params, x + jnp.ones((S, D)))  # noqa: E731
    jaxpr, followed = trace(fn, X)
    assert said(followed.results[0]) == [BATCH, SEQ, ()]
    found = [said(followed.axes(e, 0)) for e in products(jaxpr)]
    assert [BATCH, SEQ, ()] in found  # queries, keys, values
    assert [BATCH, SEQ, (), ()] in found  # the output, of all heads
    assert len(found) == 6


def test_sequence_first(relaxed):
    """(seq, batch, width), as older models keep it, with merged heads."""

    def attend(x, w):
        x = x.swapaxes(0, 1)  # (seq, batch, width)
        heads = (x @ w).reshape(S, B * 2, D // 2).swapaxes(0, 1)  # (batch heads, seq,)
        scores = jax.nn.softmax(heads @ heads.swapaxes(1, 2))
        mixed = (scores @ heads).swapaxes(0, 1).reshape(S, B, D)
        return mixed @ w

    jaxpr, followed = trace(attend, X, W)
    found = [said(followed.axes(e, 0)) for e in with_weight_of(jaxpr)]
    assert found == [[SEQ, BATCH, ()]] * 2
    inner = [said(followed.axes(e, 0)) for e in products(jaxpr)[1:3]]
    assert [(0, None), SEQ, ()] in inner


def test_flash_attention(monkeypatch):
    """cuDNN's kernel has a row for each query. It takes even lengths: others grow."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)

    def attend(x, w):
        x = jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))
        out = jax.nn.dot_product_attention(
            x, x, x, is_causal=True, implementation="cudnn"
        )[:, :-1]
        return jnp.einsum("bshd,hde->bse", out, w)

    x, w = jnp.ones((B, 5, 2, 8), jnp.bfloat16), jnp.ones((2, 8, 16), jnp.bfloat16)
    jaxpr, followed = trace(attend, x, w)
    [product] = products(jaxpr)
    assert said(followed.axes(product, 0)) == [BATCH, SEQ, (), ()]
    assert lay_out(jnp.ones((B, 5)), followed.axes(product, 0)[:2], (B, 5)).all()
