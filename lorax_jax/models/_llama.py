"""The Llama family: Llama 2 and 3, Mistral, Qwen2, Qwen3, SmolLM2."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ._activations import ACTIVATIONS
from ._attention import Backend, Sight, attend
from ._cache import Cache, Page
from ._config import LlamaConfig
from ._modules import Embed, Linear, RMSNorm
from ._rope import Tables, rope_tables, rotate
from ._stack import Remat, make_layers, run_layers

Hidden = Float[Array, "batch seq width"]


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        width, head_dim = config.hidden_size, config.head_dim
        q_width = config.num_attention_heads * head_dim
        kv_width = config.num_key_value_heads * head_dim

        def linear(d_in: int, d_out: int, use_bias: bool) -> Linear:
            return Linear(
                d_in,
                d_out,
                use_bias=use_bias,
                std=config.initializer_range,
                dtype=dtype,
                rngs=rngs,
            )

        self.q_proj = linear(width, q_width, config.qkv_bias)
        self.k_proj = linear(width, kv_width, config.qkv_bias)
        self.v_proj = linear(width, kv_width, config.qkv_bias)
        self.o_proj = linear(q_width, width, config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(head_dim, eps=config.rms_norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(head_dim, eps=config.rms_norm_eps, dtype=dtype)

    def __call__(
        self,
        x: Hidden,
        tables: Tables,
        sight: Sight,
        page: Page | None,
        backend: Backend,
    ) -> tuple[Hidden, Page | None]:
        config = self.config
        heads = (*x.shape[:-1], -1, config.head_dim)
        q = self.q_proj(x).reshape(heads)  # (batch, seq, heads, head_dim)
        k = self.k_proj(x).reshape(heads)  # (batch, seq, kv_heads, head_dim)
        v = self.v_proj(x).reshape(heads)  # (batch, seq, kv_heads, head_dim)
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, tables), rotate(k, tables)
        if page is not None:
            page = page.write(k, v)
            if not sight.causal:  # else the new tokens are all there is to see
                k, v = page.read(self.dtype)  # (batch, slots, kv_heads, head_dim)
        y = attend(q, k, v, sight, scale=config.head_dim**-0.5, backend=backend)
        return self.o_proj(y.reshape(*x.shape[:-1], -1)), page


class Mlp(nnx.Module):
    """`down(act(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.act = config.hidden_act
        width, inner = config.hidden_size, config.intermediate_size

        def linear(d_in: int, d_out: int) -> Linear:
            return Linear(
                d_in,
                d_out,
                use_bias=config.mlp_bias,
                std=config.initializer_range,
                dtype=dtype,
                rngs=rngs,
            )

        self.gate_proj = linear(width, inner)
        self.up_proj = linear(width, inner)
        self.down_proj = linear(inner, width)

    def __call__(self, x: Hidden) -> Hidden:
        gate = ACTIVATIONS[self.act](self.gate_proj(x))  # (batch, seq, inner)
        return self.down_proj(gate * self.up_proj(x))


class Block(nnx.Module):
    """One layer: attention and MLP, each after a norm and around a residual."""

    def __init__(self, config: LlamaConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        norm = {"eps": config.rms_norm_eps, "dtype": dtype}
        self.input_layernorm = RMSNorm(config.hidden_size, **norm)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, **norm)
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Hidden,
        tables: Tables,
        sight: Sight,
        page: Page | None,
        backend: Backend,
    ) -> tuple[Hidden, Page | None]:
        y, page = self.self_attn(self.input_layernorm(x), tables, sight, page, backend)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), page


class Llama(nnx.Module):
    """Embedding, layers, norm and head.

    Attribute names are the parameter tree's; `_names.py` has their Hugging Face names.
    """

    def __init__(
        self, config: LlamaConfig, *, dtype: jnp.dtype, scan: bool, rngs: nnx.Rngs
    ):
        self.config = config
        self.dtype = dtype
        std = config.initializer_range
        width, vocab = config.hidden_size, config.vocab_size
        self.embed_tokens = Embed(vocab, width, std=std, dtype=dtype, rngs=rngs)
        self.layers = make_layers(
            lambda rngs: Block(config, dtype=dtype, rngs=rngs),
            config.num_hidden_layers,
            rngs,
            scan=scan,
        )
        self.norm = RMSNorm(width, eps=config.rms_norm_eps, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                width, vocab, use_bias=False, std=std, dtype=dtype, rngs=rngs
            )

    def hidden(
        self,
        ids: Int[Array, "batch seq"],
        positions: Int[Array, "rows seq"],
        sight: Sight,
        cache: Cache | None,
        *,
        scan: bool,
        remat: Remat,
        backend: Backend,
    ) -> tuple[Hidden, Cache | None]:
        """The states that the head reads, after the last norm."""
        config = self.config
        tables = rope_tables(config.rope, positions, config.head_dim, self.dtype)
        x, cache = run_layers(
            self.layers,
            self.embed_tokens(ids),
            lambda block, x, page: block(x, tables, sight, page, backend),
            n=config.num_hidden_layers,
            scan=scan,
            remat=remat,
            cache=cache,
        )
        return self.norm(x), cache

    def head(self, hidden: Hidden) -> Float[Array, "batch seq vocab"]:
        """Logits, in the model's dtype."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.attend(hidden)
        return self.lm_head(hidden)
