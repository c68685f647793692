"""GPT-2: learned positions, layer norms with biases, one fused q-k-v kernel."""

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ._activations import ACTIVATIONS
from ._attention import Backend, Sight, attend
from ._cache import Cache, Page
from ._config import Gpt2Config
from ._modules import Embed, LayerNorm, Linear
from ._stack import Remat, make_layers, run_layers

Hidden = Float[Array, "batch seq width"]


class Attention(nnx.Module):
    """Self-attention; `c_attn` makes queries, keys and values side by side."""

    def __init__(self, config: Gpt2Config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.dtype = dtype
        width, std = config.n_embd, config.initializer_range
        self.c_attn = Linear(
            width, 3 * width, use_bias=True, std=std, dtype=dtype, rngs=rngs
        )
        self.c_proj = Linear(
            width, width, use_bias=True, std=_last_std(config), dtype=dtype, rngs=rngs
        )

    def __call__(
        self, x: Hidden, sight: Sight, page: Page | None, backend: Backend
    ) -> tuple[Hidden, Page | None]:
        config = self.config
        head_dim = config.n_embd // config.n_head
        qkv = self.c_attn(x)  # (batch, seq, 3 * width)
        q, k, v = (
            part.reshape(*x.shape[:-1], config.n_head, head_dim)
            for part in jnp.split(qkv, 3, axis=-1)
        )  # (batch, seq, heads, head_dim) each
        if page is not None:
            page = page.write(k, v)
            if not sight.causal:  # else the new tokens are all there is to see
                k, v = page.read(self.dtype)  # (batch, slots, heads, head_dim)
        scale = head_dim**-0.5 if config.scale_attn_weights else 1.0
        y = attend(q, k, v, sight, scale=scale, backend=backend)
        return self.c_proj(y.reshape(x.shape)), page


class Mlp(nnx.Module):
    """`c_proj(act(c_fc(x)))`."""

    def __init__(self, config: Gpt2Config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.act = config.activation_function
        self.c_fc = Linear(
            config.n_embd,
            config.n_inner,
            use_bias=True,
            std=config.initializer_range,
            dtype=dtype,
            rngs=rngs,
        )
        self.c_proj = Linear(
            config.n_inner,
            config.n_embd,
            use_bias=True,
            std=_last_std(config),
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: Hidden) -> Hidden:
        return self.c_proj(ACTIVATIONS[self.act](self.c_fc(x)))


def _last_std(config: Gpt2Config) -> float:
    """GPT-2's paper scales the kernels that end a residual branch by their number."""
    return config.initializer_range / math.sqrt(2 * config.n_layer)


class Block(nnx.Module):
    """One layer: attention and MLP, each after a norm and around a residual."""

    def __init__(self, config: Gpt2Config, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        norm = {"eps": config.layer_norm_epsilon, "dtype": dtype}
        self.ln_1 = LayerNorm(config.n_embd, **norm)
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.ln_2 = LayerNorm(config.n_embd, **norm)
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Hidden, sight: Sight, page: Page | None, backend: Backend
    ) -> tuple[Hidden, Page | None]:
        y, page = self.attn(self.ln_1(x), sight, page, backend)
        x = x + y
        return x + self.mlp(self.ln_2(x)), page


class Gpt2(nnx.Module):
    """Embeddings, layers, norm and head; attribute names are the parameter tree's."""

    def __init__(
        self, config: Gpt2Config, *, dtype: jnp.dtype, scan: bool, rngs: nnx.Rngs
    ):
        self.config = config
        std, width = config.initializer_range, config.n_embd
        self.wte = Embed(config.vocab_size, width, std=std, dtype=dtype, rngs=rngs)
        self.wpe = Embed(config.n_positions, width, std=std, dtype=dtype, rngs=rngs)
        self.h = make_layers(
            lambda rngs: Block(config, dtype=dtype, rngs=rngs),
            config.n_layer,
            rngs,
            scan=scan,
        )
        self.ln_f = LayerNorm(width, eps=config.layer_norm_epsilon, dtype=dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                width,
                config.vocab_size,
                use_bias=False,
                std=std,
                dtype=dtype,
                rngs=rngs,
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
        x = self.wte(ids) + self.wpe(positions)  # (batch, seq, width)
        x, cache = run_layers(
            self.h,
            x,
            lambda block, x, page: block(x, sight, page, backend),
            n=self.config.n_layer,
            scan=scan,
            remat=remat,
            cache=cache,
        )
        return self.ln_f(x), cache

    def head(self, hidden: Hidden) -> Float[Array, "batch seq vocab"]:
        """Logits, in the model's dtype."""
        if self.config.tie_word_embeddings:
            return self.wte.attend(hidden)
        return self.lm_head(hidden)
