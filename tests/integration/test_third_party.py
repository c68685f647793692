"""Models that other people wrote: planned, trained a step and merged as they come.

Each test is skipped where its package is not installed. To run them all, in an
environment of their own (Tunix brings older versions of transformers and safetensors):

    pip install dm-haiku esm2quinox google-tunix mamba2-jax megalodon-jax nano-moe-jax
    pip install --no-deps recurrentgemma "typeguard<3" sentencepiece einops

(RecurrentGemma asks for an older NumPy, which it does not need here.)
"""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from steps import drawn, paths, stand

import lorax_jax as lj

pytestmark = [
    pytest.mark.usefixtures("relaxed"),
    # What other packages warn about, while imported and run, is theirs.
    pytest.mark.filterwarnings("ignore"),
]

IDS = jax.random.randint(jax.random.key(0), (2, 8), 4, 16)
POSITIONS = jnp.tile(jnp.arange(8), (2, 1))


def wanted(module):
    """A module of somebody else's, or a skip with the reason."""
    return pytest.importorskip(module, exc_type=ImportError)


def from_nnx(module, call, *args, **kwargs):
    """`stand` for an NNX module with parameters drawn anew, called by `call`."""
    fn, params, state = lj.functional(module)

    def outputs(params, *inputs):
        return call(fn(params, state, *inputs)[0])

    return stand(outputs, drawn(params), *args, **kwargs)


# --- Linen ----------------------------------------------------------------------------


def test_recurrentgemma():
    """Griffin: block-diagonal gates of a linear recurrence beside local attention."""
    common, griffin = wanted("recurrentgemma.common"), wanted("recurrentgemma.jax")
    kinds = common.TemporalBlockType
    config = common.GriffinConfig(
        vocab_size=16,
        width=8,
        mlp_expanded_width=12,
        num_heads=2,
        lru_width=8,
        block_types=(kinds.RECURRENT, kinds.ATTENTION),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=4,
        logits_soft_cap=30.0,
        scan_type=common.ScanType.LINEAR_NATIVE,
    )
    model = griffin.Griffin(config)
    args = IDS, POSITIONS
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), *args))
    plan = stand(lambda v, *args: model.apply(v, *args)[0], variables, *args)
    # Every product but the tied head; gates have a block for each head, and `ffw_up`
    # makes gate and value in one product, with a joint update.
    roles = {site.path: site.role for site in plan}
    assert len(roles) == 7 + 6
    gate = roles["params/blocks.0/recurrent_block/rg_lru/a_gate/w"]
    assert (gate.batch, gate.inputs, gate.outputs, gate.stack) == ((0,), (1,), (2,), 0)
    up = roles["params/blocks.1/mlp_block/ffw_up/w"]
    assert (up.inputs, up.outputs) == ((1,), (0, 2))


def test_nano_moe():
    """A mixture of experts whose router chooses with a softmax and a top-k."""
    nano_moe = wanted("nano_moe")
    config = nano_moe.NanoMoEConfig(
        vocab_size=16,
        n_layers=1,
        n_heads=2,
        d_model=8,
        d_ff=12,
        n_experts=3,
        block_size=8,
    )
    model = nano_moe.NanoMoE(config)
    variables = jax.jit(model.init)(jax.random.key(0), IDS)
    plan = stand(lambda v, ids: model.apply(v, ids)[0], variables, IDS)
    found = paths(plan)
    assert sum("expert" in path for path in found) == 2 * config.n_experts


# --- NNX ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_tunix(family):
    """Google's Tunix, whose kernels are (width, heads, head_dim) einsums."""
    code = wanted(f"tunix.models.{family}.model")
    config = code.ModelConfig(
        num_layers=2,
        vocab_size=16,
        embed_dim=8,
        hidden_dim=12,
        num_heads=2,
        head_dim=4,
        num_kv_heads=1,
        rope_theta=10_000,
        norm_eps=1e-5,
    )
    model = getattr(code, family.capitalize())(config, rngs=nnx.Rngs(0))
    mask = jnp.tile(jnp.tri(8, dtype=bool), (2, 1, 1))
    plan = from_nnx(model, lambda out: out[0], IDS, POSITIONS, None, mask)
    roles = {site.path: site.role for site in plan}
    assert len(roles) == 2 * 7
    query, out = (roles[f"layers/1/attn/{name}_proj/w"] for name in "qo")
    assert (query.inputs, query.outputs) == ((0,), (1, 2))
    assert (out.inputs, out.outputs) == ((0, 1), (2,))


def test_mamba2():
    """A state-space model in chunks; its depthwise convolution stays as it is."""
    mamba2 = wanted("mamba2_jax")
    config = mamba2.Mamba2Config(
        vocab_size=16,
        hidden_size=8,
        state_size=4,
        head_dim=4,
        chunk_size=4,
        num_hidden_layers=2,
        tie_word_embeddings=False,
    )
    model = mamba2.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    targets = ".*/(in_proj|out_proj)/kernel"
    plan = from_nnx(model, lambda out: out["logits"], IDS, targets=targets)
    assert len(plan) == 4


# --- Equinox and Haiku ----------------------------------------------------------------


def test_esm2():
    """A protein language model whose layers are stacked and scanned."""
    eqx, esm2quinox = wanted("equinox"), wanted("esm2quinox")
    model = esm2quinox.ESM2(2, 8, 2, token_dropout=True, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(params, ids):
        return jax.vmap(eqx.combine(params, static))(ids).logits

    plan = stand(fn, drawn(params), IDS, targets=r"layers/.*(proj|linear\d)/weight")
    assert {slot.layers for slot in plan.slots} == {(2,)}
    assert len(plan) == 2 * 6 and "layers/1/attn/query_proj/weight" in paths(plan)


def test_megalodon():
    """Chunked attention over complex moving averages."""
    eqx, megalodon = wanted("equinox"), wanted("megalodon_jax")
    config = megalodon.MegalodonConfig(
        vocab_size=16,
        model_dim=8,
        num_layers=2,
        num_heads=1,
        z_dim=4,
        value_dim=8,
        ffn_hidden_dim=12,
        cema_ndim=2,
        chunk_size=4,
        norm_num_groups=2,
    )
    model = megalodon.MegalodonForCausalLM(config, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(params, ids):
        return eqx.combine(params, static)(ids)[0]

    plan = stand(fn, params, IDS)
    found = paths(plan)
    assert len(found) == 2 * 7 and "model/layers/1/attn/wz/weight" in found


def test_haiku():
    """Haiku's modules under `hk.transform`: paths keep the slashes of its names."""
    hk = wanted("haiku")

    def model(ids):
        x = hk.Embed(16, 8)(ids)
        x = x + hk.MultiHeadAttention(2, 4, w_init_scale=1.0, model_size=8)(x, x, x)
        x, _ = hk.dynamic_unroll(hk.GRU(8), x, hk.GRU(8).initial_state(2), False)
        return hk.nets.MLP([12, 16], activation=jnp.tanh)(x)

    pure = hk.without_apply_rng(hk.transform(model))
    params = drawn(jax.eval_shape(pure.init, jax.random.key(0), IDS))
    plan = stand(pure.apply, params, IDS)
    # A slash inside a name is written `~1`, as in JSON Pointer.
    assert {"mlp~1~0~1linear_0/w", "gru/w_h"} < set(paths(plan)) and len(plan) == 7
