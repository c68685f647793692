"""`Model`: pure functions, one tree, the same answer however the layers are run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_jax import models

# Grouped queries with scaled rotary positions, a sliding window, learned positions.
SOME = ["llama3", "mistral", "gpt2"]


def _equations(jaxpr):
    """Every equation, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def test_tree_has_the_paths_of_the_name_table(config_of, family, scan):
    model = models.from_config(config_of(family), scan_layers=scan)
    paths = {
        "/".join(key.key for key in keys)
        for keys, _ in jax.tree_util.tree_flatten_with_path(model.abstract())[0]
    }
    wanted = set()
    for ours, _, _ in model.names:
        if scan:
            wanted.add(ours.replace("/{i}", ""))
        else:
            wanted |= {ours.format(i=i) for i in range(model.num_layers)}
    assert paths == wanted


@pytest.mark.parametrize("name", ["qwen3_biases", "gpt2_untied"])
def test_init(config_of, name):
    model = models.from_config(config_of(name))
    shapes = model.abstract()
    assert all(isinstance(s, jax.ShapeDtypeStruct) for s in jax.tree.leaves(shapes))
    params = jax.jit(model.init)(jax.random.key(0))
    assert shapes == jax.eval_shape(lambda: params)

    # Layers are drawn alike whether they are stacked or not.
    scanned = models.from_config(config_of(name), scan_layers=True)
    stacked = jax.jit(scanned.init)(jax.random.key(0))
    layers = "h" if name.startswith("gpt2") else "layers"
    for i in range(model.num_layers):
        jax.tree.map(
            lambda one, stack, i=i: np.testing.assert_array_equal(one, stack[i]),
            params[layers][str(i)],
            stacked[layers],
        )


def test_init_is_distributed_as_transformers_initializes(config_of):
    model = models.from_config(config_of("gpt2"))
    params = model.init(jax.random.key(0))
    block = params["h"]["0"]
    assert np.isclose(params["wte"]["embedding"].std(), 0.1, rtol=0.1)
    assert np.isclose(block["attn"]["c_attn"]["kernel"].std(), 0.1, rtol=0.1)
    last = 0.1 / np.sqrt(2 * model.num_layers)
    assert np.isclose(block["mlp"]["c_proj"]["kernel"].std(), last, rtol=0.1)
    assert (block["ln_1"]["scale"] == 1).all()
    assert (block["attn"]["c_attn"]["bias"] == 0).all()


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"model_type": "gpt2"}, 124_439_808),
        # Llama 2 7B and Llama 3.2 1B, from their model cards' configs.
        ({"model_type": "llama"}, 6_738_415_616),
        (
            {
                "model_type": "llama",
                "vocab_size": 128256,
                "hidden_size": 2048,
                "intermediate_size": 8192,
                "num_hidden_layers": 16,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "tie_word_embeddings": True,
            },
            1_235_814_400,
        ),
    ],
)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_full_size_parameter_counts(config, count, scan_layers):
    model = models.from_config(config, scan_layers=scan_layers)
    assert sum(s.size for s in jax.tree.leaves(model.abstract())) == count


@pytest.mark.parametrize("name", [*SOME, "qwen3_biases"])
def test_scanned_equals_unrolled(tiny, jitted, name, ids):
    model, params = tiny(name)
    scanned, scanned_params = tiny(name, scan_layers=True)
    np.testing.assert_allclose(
        jitted(model)(params, ids),
        jitted(scanned)(scanned_params, ids),
        atol=2e-6,
    )


@pytest.mark.parametrize(
    "remat", ["full", jax.checkpoint_policies.dots_with_no_batch_dims_saveable]
)
def test_remat_changes_neither_values_nor_gradients(tiny, config_of, scan, remat, ids):
    model, params = tiny("llama3", scan_layers=scan)
    saving = models.from_config(config_of("llama3"), scan_layers=scan, remat=remat)

    def loss(model):
        return lambda params: jnp.square(model.apply(params, ids)).mean()

    plain, plain_gradient = jax.jit(jax.value_and_grad(loss(model)))(params)
    value, gradient = jax.jit(jax.value_and_grad(loss(saving)))(params)
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        gradient,
        plain_gradient,
    )
    names = {e.primitive.name for e in _equations(jax.make_jaxpr(loss(saving))(params))}
    assert names & {"checkpoint", "remat", "remat2"}


@pytest.mark.parametrize("name", SOME)
def test_left_padded_batch_equals_single_rows(tiny, jitted, name, ragged):
    model, params = tiny(name)
    batch, mask, rows = ragged
    together = jitted(model)(params, batch, mask=mask)
    for i, row in enumerate(rows):
        alone = jitted(model)(params, row[None])
        np.testing.assert_allclose(together[i, -len(row) :], alone[0], atol=2e-6)


def test_padding_may_be_marked_with_zeros_and_ones(tiny, jitted, ragged):
    model, params = tiny("llama3")
    batch, mask, _ = ragged
    np.testing.assert_array_equal(
        jitted(model)(params, batch, mask=mask.astype(np.int32)),
        jitted(model)(params, batch, mask=mask),
    )


def test_explicit_positions(tiny, jitted, ids):
    # Only differences of rotary positions count, so a shift changes nothing, and a
    # stretch does.
    model, params = tiny("llama3")
    plain = jitted(model)(params, ids)
    counted = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
    shifted = jitted(model)(params, ids, positions=counted + 5)
    stretched = jitted(model)(params, ids, positions=counted * 2)
    np.testing.assert_allclose(shifted, plain, atol=1e-5)
    assert jnp.abs(stretched - plain).max() > 1e-3


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 5, 1, 1]])
@pytest.mark.parametrize("name", SOME)
def test_cache_equals_recomputation(tiny, jitted, scan, name, pieces, ids):
    model, params = tiny(name, scan_layers=scan)
    whole = jitted(model)(params, ids)
    cache, parts, start = model.init_cache(2, 16), [], 0
    for n in pieces:
        logits, cache = jitted(model)(params, ids[:, start : start + n], cache=cache)
        parts.append(logits)
        start += n
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=3e-6)
    assert int(cache.length) == 12
    assert cache.next_position.tolist() == [12, 12]
    assert cache.valid.sum(axis=1).tolist() == [12, 12]


@pytest.mark.parametrize("name", SOME)
def test_cache_of_a_left_padded_batch(tiny, jitted, name, ragged):
    model, params = tiny(name)
    batch, mask, rows = ragged
    _, cache = jax.jit(lambda *args, mask: model.apply(*args, mask=mask, cache=14))(
        params, batch[:, :10], mask=mask[:, :10]
    )
    logits, cache = jitted(model)(params, batch[:, 10:], cache=cache)
    assert cache.next_position.tolist() == [len(row) for row in rows]
    for i, row in enumerate(rows):
        alone = jitted(model)(params, row[None])
        np.testing.assert_allclose(logits[i], alone[0, -2:], atol=3e-6)


def test_cache_dtype_is_the_models_unless_said_otherwise(config_of):
    model = models.from_config(config_of("qwen2"), dtype="bfloat16")
    assert model.init_cache(1, 4).keys[0].dtype == jnp.bfloat16
    assert model.init_cache(1, 4, jnp.float32).keys[0].dtype == jnp.float32


def test_column_computes_one_columns_logits(tiny, jitted, ids):
    model, params = tiny("gpt2")
    whole = jitted(model)(params, ids)
    np.testing.assert_allclose(
        jitted(model)(params, ids, column=7), whole[:, 7:8], atol=1e-6
    )


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_apply_is_head_of_hidden(tiny, jitted, name, ids):
    model, params = tiny(name)
    states = jax.jit(model.hidden)(params, ids)
    np.testing.assert_allclose(
        model.head(params, states), jitted(model)(params, ids), atol=1e-6
    )
    shapes = jax.eval_shape(lambda: model.hidden(params, ids, cache=16))
    assert shapes[0].shape == states.shape


def _check_half(model, ids, dtype):
    shapes = model.abstract()
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(dtype)}
    jaxpr = jax.make_jaxpr(model.apply)(shapes, ids)
    assert [out.dtype for out in jaxpr.out_avals] == [jnp.dtype(dtype)]
    products = [e for e in _equations(jaxpr) if e.primitive.name == "dot_general"]
    wide = [e for e in products if e.outvars[0].aval.dtype != jnp.dtype(dtype)]
    # The one float32 product of a layer is attention's scores, for the softmax; CPUs
    # have no attention in float16, so there both of its products are.
    layers = 1 if model.scan_layers else model.num_layers
    emulated = dtype == "float16" and jax.default_backend() == "cpu"
    assert len(wide) == (2 * layers if emulated else layers)
    assert all(e.outvars[0].aval.ndim > 3 for e in wide)


def test_bfloat16_stays_bfloat16(config_of, family, scan, ids):
    model = models.from_config(config_of(family), scan_layers=scan, dtype="bfloat16")
    _check_half(model, ids, "bfloat16")


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_float16_stays_float16(config_of, name, ids):
    model = models.from_config(config_of(name), dtype="float16")
    _check_half(model, ids, "float16")


def test_float32_parameters_in_a_bfloat16_model(tiny, jitted, config_of, ids):
    _, params = tiny("llama3")
    model = models.from_config(config_of("llama3"), dtype="bfloat16")
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    logits = jitted(model)(params, ids)
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        logits.astype(jnp.float32), jitted(model)(low, ids).astype(jnp.float32)
    )


def test_no_custom_derivatives_stand_between_weights_and_gradients(
    config_of, family, ids
):
    model = models.from_config(config_of(family))
    jaxpr = jax.make_jaxpr(model.apply)(model.abstract(), ids)
    names = {equation.primitive.name for equation in _equations(jaxpr)}
    assert not {name for name in names if "custom_vjp" in name}


def test_apply_under_vmap(tiny, jitted, ids):
    model, params = tiny("qwen3")
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    mapped = jax.jit(jax.vmap(model.apply, in_axes=(0, None)))(both, ids)
    np.testing.assert_allclose(mapped[0], jitted(model)(params, ids), atol=1e-5)


def test_nothing_leaks_when_a_model_is_first_used_while_tracing(ids):
    model = models.from_config(_small() | {"initializer_range": 0.07})
    params = model.init(jax.random.key(1))

    def loss(params):
        return model.apply(params, ids[:, :3] % 8).sum()

    with jax.checking_leaks():
        gradient = jax.jit(jax.grad(loss))(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_model_is_frozen_hashable_and_equal_by_value(config_of):
    one, other = (models.from_config(config_of("llama3")) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != models.from_config(config_of("llama3"), scan_layers=True)
    with pytest.raises(AttributeError, match="scan_layers"):
        one.scan_layers = True  # pyright: ignore[reportAttributeAccessIssue]


def test_ids_outside_the_vocabulary_give_nan(tiny, jitted, ids):
    model, params = tiny("llama3")
    wrong = ids.at[0, 11].set(97)
    assert jnp.isnan(jitted(model)(params, wrong)[0, 11]).all()


def _small():
    return {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float64"}, "`dtype` = float64 must be one of float32"),
        ({"remat": "half"}, "`remat` = 'half' must be None, 'full' or a policy"),
        ({"attention": "flash"}, "`attention` = 'flash' must be one of auto"),
    ],
)
def test_from_config_refuses_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.from_config(_small(), **arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda ids: {"ids": ids[0]},
            r"`ids` must be integers of shape \(batch, seq\)",
        ),
        (lambda ids: {"ids": jnp.ones((2, 12))}, r"got float32 of shape \(2, 12\)"),
        (lambda ids: {"mask": jnp.ones((2, 11), bool)}, "With a cache it covers"),
        (lambda ids: {"mask": jnp.ones((2, 12))}, "`mask` must mark the real tokens"),
        (lambda ids: {"positions": jnp.arange(12)}, "`positions` must be integers of"),
        (lambda ids: {"cache": 11}, "`cache` has 11 slots, 0 of them used; 12 more"),
    ],
)
def test_apply_refuses_arguments(tiny, ids, call, message):
    model, params = tiny("llama3")
    with pytest.raises(ValueError, match=message):
        model.apply(params, **({"ids": ids} | call(ids)))


def test_a_full_cache_is_refused(tiny, ids):
    model, params = tiny("llama3")
    cache = model.init_cache(2, 14)._replace(length=jnp.asarray(12, jnp.int32))
    with pytest.raises(ValueError, match=r"14 slots, 12 of them used; 3 more tokens"):
        model.apply(params, ids[:, :3], cache=cache)


def test_a_cache_of_another_batch_is_refused(tiny, ids):
    model, params = tiny("llama3")
    with pytest.raises(ValueError, match="2 rows but `cache` was made for 3"):
        model.apply(params, ids, cache=model.init_cache(3, 16))


def test_gpt2_refuses_more_positions_than_it_learned(tiny):
    model, params = tiny("gpt2")
    with pytest.raises(ValueError, match="has learned 64 positions"):
        model.apply(params, jnp.zeros((1, 65), jnp.int32))
    with pytest.raises(ValueError, match=r"model.init_cache\(batch, 64\)"):
        model.init_cache(1, 65)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p | {"more": 1}, r"missing \[\], unexpected \['more'\]"),
        (lambda p: {"norm": p["norm"]}, r"at its root: missing \['embed_tokens'"),
        (
            lambda p: p | {"norm": jnp.ones(3)},
            "at norm, where the model expects a dict",
        ),
        (
            lambda p: p | {"norm": {"scale": "one"}},
            "of type str at norm/scale; the model expects an array",
        ),
    ],
)
def test_params_of_another_tree_are_refused(tiny, ids, spoil, message):
    model, params = tiny("llama3")
    with pytest.raises(ValueError, match=message):
        model.apply(spoil(params), ids)
