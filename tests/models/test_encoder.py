"""`Encoder`: three heads, one tree, padding unseen, layers stacked or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from berts import BERT, HEADS, MASK, tiny
from helpers import primitives

from lorax_jax import models
from lorax_jax.checkpoint import NameMap
from lorax_jax.models import ConfigError, Encoder, mean_pool
from lorax_jax.models._config import config_from_hf


def run(model, params, ids, **kwargs):
    return jax.jit(model.apply)(params, ids, **kwargs)


@pytest.mark.parametrize("head", HEADS)
def test_tree_has_the_paths_of_the_name_table(head, scan):
    model = models.from_config(BERT | HEADS[head], scan_layers=scan)
    paths = {
        "/".join(key.key for key in keys)
        for keys, _ in jax.tree_util.tree_flatten_with_path(model.abstract())[0]
    }
    n = 1 if scan else model.num_layers
    wanted = {
        ours.replace("/{i}", "") if scan else ours.format(i=i)
        for ours, _, _ in model.names
        for i in range(n)
    }
    assert paths == wanted


def test_names_are_those_of_transformers_modules():
    names = NameMap.of(models.from_config(BERT).names)
    path = "encoder/layer/3/attention/self/query/kernel"
    assert names.module(path) == "encoder.layer.3.attention.self.query"
    assert names.layout(path) == "linear" and names.tied is None
    names = models.from_config(BERT | HEADS["masked_lm"]).names
    assert names.module(path) == "bert.encoder.layer.3.attention.self.query"
    assert names.head == "cls.predictions.decoder"
    assert names.tied == "embeddings/word_embeddings/embedding"


@pytest.mark.parametrize(
    ("head", "shape"),
    [
        ("bare", (2, 12, 32)),
        ("masked_lm", (2, 12, 97)),
        ("untied", (2, 12, 97)),
        ("classifier", (2, 3)),
    ],
)
def test_what_apply_gives(head, shape, scan, ids):
    model, params = tiny(head, scan)
    assert isinstance(model, Encoder)
    states = jax.jit(model.hidden)(params, ids)
    out = run(model, params, ids)
    assert states.shape == (2, 12, 32) and out.shape == shape
    np.testing.assert_allclose(out, model.head(params, states), atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_scanned_equals_unrolled(head, ids):
    both = [run(*tiny(head, scan), ids, mask=MASK) for scan in (False, True)]
    np.testing.assert_allclose(both[0], both[1], atol=5e-6)


def test_init_draws_layers_alike():
    params = jax.jit(models.from_config(BERT).init)(jax.random.key(0))
    scanned = models.from_config(BERT, scan_layers=True)
    stacked = jax.jit(scanned.init)(jax.random.key(0))["encoder"]["layer"]
    for i in range(2):
        jax.tree.map(
            lambda one, stack, i=i: np.testing.assert_array_equal(one, stack[i]),
            params["encoder"]["layer"][str(i)],
            stacked,
        )
    query = params["encoder"]["layer"]["0"]["attention"]["self"]["query"]
    assert np.isclose(query["kernel"].std(), 0.1, rtol=0.1)
    assert (query["bias"] == 0).all()


def test_bert_base_has_its_110_million_parameters():
    model = models.from_config({"model_type": "bert"})
    assert sum(s.size for s in jax.tree.leaves(model.abstract())) == 109_482_240


def test_every_token_sees_every_other(ids):
    model, params = tiny("bare")
    changed = run(model, params, ids.at[0, 11].set(5)) - run(model, params, ids)
    assert (jnp.abs(changed[0]).max(axis=-1) > 1e-4).all()
    assert not changed[1].any()


def test_padding_is_seen_by_nobody(ids):
    model, params = tiny("bare")
    together = run(model, params, ids, mask=MASK.astype(np.int32))
    alone = run(model, params, ids[1:, :5])
    np.testing.assert_allclose(together[1, :5], alone[0], atol=5e-6)


def test_types_and_positions(ids):
    model, params = tiny("bare")
    plain = run(model, params, ids)
    zeros, counted = np.zeros((2, 12), int), np.tile(np.arange(12), (2, 1))
    same = run(model, params, ids, types=zeros, positions=counted)
    np.testing.assert_array_equal(same, plain)
    for other in ({"types": zeros + 1}, {"positions": counted + 2}):
        assert jnp.abs(run(model, params, ids, **other) - plain).max() > 1e-2


@pytest.mark.parametrize("remat", [None, "full"])
def test_remat_changes_no_gradient(ids, scan, remat):
    _, params = tiny("classifier", scan)
    model = models.from_config(
        BERT | HEADS["classifier"], scan_layers=scan, remat=remat
    )
    loss = lambda params: model.apply(params, ids, mask=MASK).var()  # noqa: E731
    plain = lambda params: tiny("classifier", scan)[0].apply(  # noqa: E731
        params, ids, mask=MASK
    )
    wanted = jax.jit(jax.grad(lambda params: plain(params).var()))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        jax.jit(jax.grad(loss))(params),
        wanted,
    )
    found = {"checkpoint", "remat", "remat2"} & set(
        primitives(jax.make_jaxpr(loss)(params))
    )
    assert bool(found) is (remat is not None)


@pytest.mark.parametrize("head", HEADS)
def test_bfloat16_stays_bfloat16(head, ids):
    model = models.from_config(BERT | HEADS[head], dtype="bfloat16")
    shapes = model.abstract()
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}
    assert jax.eval_shape(model.apply, shapes, ids).dtype == jnp.bfloat16


def test_pooled_is_tanh_of_the_first_token(ids):
    model, params = tiny("bare")
    states = model.hidden(params, ids)
    dense = params["pooler"]["dense"]
    wanted = jnp.tanh(states[:, 0] @ dense["kernel"] + dense["bias"][None])
    np.testing.assert_allclose(model.pooled(params, states), wanted, atol=1e-6)
    model, params = tiny("masked_lm")
    with pytest.raises(ValueError, match="This BERT has no pooler"):
        model.pooled(params, states)


def test_mean_pool():
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 4)), "bfloat16")
    rows = np.asarray(hidden, np.float64)
    wanted = np.stack([rows[0].mean(0), rows[1, :5].mean(0)])
    for mask in (MASK, MASK.astype(int)):
        found = mean_pool(hidden, mask)
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=2**-8)
    np.testing.assert_allclose(
        np.asarray(mean_pool(hidden), np.float64), rows.mean(1), rtol=2**-8, atol=1e-3
    )
    assert not mean_pool(hidden, MASK & False).any()
    with pytest.raises(ValueError, match=r"`mask` has the shape \(2, 11\)"):
        mean_pool(hidden, MASK[:, 1:])


# --- What is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_decoder": True}, "`is_decoder` = True makes BERT's attention causal"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"position_embedding_type": "relative_key"}, "type = 'relative_key'"),
        ({"hidden_act": "tanh"}, "`hidden_act` = 'tanh' is not one of"),
        ({"hidden_size": 33}, "`hidden_size` = 33 is not a multiple of"),
        ({"embedding_size": 8}, r"embedding_size = 8    \(usual: None\)"),
        (
            {"architectures": ["BertForQuestionAnswering"]},
            r"`architectures` = \['BertForQuestionAnswering'\] is not one of those",
        ),
    ],
)
def test_configs_that_compute_something_else(changes, message):
    with pytest.raises(ConfigError, match=message):
        config_from_hf(BERT | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": None},
        {"position_embedding_type": "absolute", "gradient_checkpointing": False},
        {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.0},
        {"classifier_dropout": 0.2, "is_decoder": False, "pad_token_id": 3},
    ],
)
def test_what_has_no_effect_is_ignored(changes):
    assert config_from_hf(BERT | changes) == config_from_hf(BERT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": jnp.zeros((1, 17), int)}, "this BERT has learned 16 positions"),
        ({"types": jnp.zeros((2, 11), int)}, "`types` must be integers of the shape"),
        ({"positions": jnp.zeros((2, 12))}, "`positions` must be integers of the"),
        ({"mask": jnp.ones((2, 12))}, "`mask` must mark the real tokens"),
        ({"ids": jnp.zeros(12, int)}, "`ids` must be integers of shape"),
    ],
)
def test_apply_refuses_arguments(ids, arguments, message):
    model, params = tiny("bare")
    with pytest.raises(ValueError, match=message):
        model.apply(params, **({"ids": ids} | arguments))


def test_params_of_another_head_are_refused(ids):
    model, _ = tiny("classifier")
    with pytest.raises(ValueError, match=r"missing \['classifier'\]"):
        model.apply(tiny("bare")[1], ids)
