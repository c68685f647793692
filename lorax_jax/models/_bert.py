"""BERT: an encoder with learned positions and a norm after each residual."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ._activations import ACTIVATIONS
from ._attention import Backend, Sight, attend
from ._bert_config import BertConfig
from ._modules import Embed, LayerNorm, Linear, spread
from ._stack import Remat, make_layers, run_layers

Hidden = Float[Array, "batch seq width"]


class Embeddings(nnx.Module):
    """The sum of three lookups, normed."""

    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        def table(rows: int) -> Embed:
            return Embed(
                rows,
                config.hidden_size,
                std=config.initializer_range,
                dtype=dtype,
                rngs=rngs,
            )

        self.word_embeddings = table(config.vocab_size)
        self.position_embeddings = table(config.max_position_embeddings)
        self.token_type_embeddings = table(config.type_vocab_size)
        self.LayerNorm = _norm(config, dtype)

    def __call__(
        self,
        ids: Int[Array, "batch seq"],
        types: Int[Array, "rows seq"],
        positions: Int[Array, "rows seq"],
    ) -> Hidden:
        x = self.word_embeddings(ids) + self.token_type_embeddings(types)
        return self.LayerNorm(x + self.position_embeddings(positions))


class Output(nnx.Module):
    """`LayerNorm(residual + dense(y))`, which ends each half of a layer."""

    def __init__(
        self, config: BertConfig, d_in: int, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        self.dense = _dense(config, d_in, config.hidden_size, dtype, rngs)
        self.LayerNorm = _norm(config, dtype)

    def __call__(self, y: Float[Array, "batch seq d_in"], residual: Hidden) -> Hidden:
        return self.LayerNorm(residual + self.dense(y))


class Attention(nnx.Module):
    """Self-attention, residual and norm."""

    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        width = config.hidden_size
        self.self = nnx.Dict(
            {
                name: _dense(config, width, width, dtype, rngs)
                for name in ("query", "key", "value")
            }
        )
        self.output = Output(config, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Hidden, sight: Sight, backend: Backend) -> Hidden:
        heads = self.config.num_attention_heads
        head_dim = self.config.hidden_size // heads
        q, k, v = (
            self.self[name](x).reshape(*x.shape[:-1], heads, head_dim)
            for name in ("query", "key", "value")
        )  # (batch, seq, heads, head_dim) each
        y = attend(q, k, v, sight, scale=head_dim**-0.5, backend=backend)
        return self.output(y.reshape(x.shape), x)


class Block(nnx.Module):
    """One layer: attention, then an MLP whose halves are `intermediate`, `output`."""

    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.act = config.hidden_act
        width, inner = config.hidden_size, config.intermediate_size
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.intermediate = nnx.Dict(dense=_dense(config, width, inner, dtype, rngs))
        self.output = Output(config, inner, dtype=dtype, rngs=rngs)

    def __call__(self, x: Hidden, sight: Sight, backend: Backend) -> Hidden:
        x = self.attention(x, sight, backend)
        y = ACTIVATIONS[self.act](self.intermediate["dense"](x))  # (batch, seq, inner)
        return self.output(y, x)


class Predictions(nnx.Module):
    """The masked-LM head: a dense layer, a norm, and logits with a bias.

    Tied, the logits are products with the table of tokens, and only the bias is here.
    """

    def __init__(self, config: BertConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.act = config.hidden_act
        width, vocab = config.hidden_size, config.vocab_size
        dense = _dense(config, width, width, dtype, rngs)
        self.transform = nnx.Dict(dense=dense, LayerNorm=_norm(config, dtype))
        if config.tied:
            self.bias = nnx.Param(jnp.zeros((vocab,), dtype))
        else:
            self.decoder = _dense(config, width, vocab, dtype, rngs)

    def __call__(self, x: Hidden, table: Embed) -> Float[Array, "batch seq vocab"]:
        x = ACTIVATIONS[self.act](self.transform["dense"](x))
        x = self.transform["LayerNorm"](x)
        if not hasattr(self, "bias"):
            return self.decoder(x)
        logits = table.attend(x)
        return logits + spread(self.bias[...].astype(logits.dtype), logits.ndim)


class Bert(nnx.Module):
    """Embeddings, layers and a head; attribute names are the parameter tree's."""

    def __init__(
        self, config: BertConfig, *, dtype: jnp.dtype, scan: bool, rngs: nnx.Rngs
    ):
        self.config = config
        width = config.hidden_size
        self.embeddings = Embeddings(config, dtype=dtype, rngs=rngs)
        layers = make_layers(
            lambda rngs: Block(config, dtype=dtype, rngs=rngs),
            config.num_hidden_layers,
            rngs,
            scan=scan,
        )
        self.encoder = nnx.Dict(layer=layers)
        if config.pooler:
            self.pooler = nnx.Dict(dense=_dense(config, width, width, dtype, rngs))
        if config.head == "masked_lm":
            self.cls = nnx.Dict(predictions=Predictions(config, dtype=dtype, rngs=rngs))
        if config.head == "classifier":
            self.classifier = _dense(config, width, config.num_labels, dtype, rngs)

    def hidden(
        self,
        ids: Int[Array, "batch seq"],
        types: Int[Array, "rows seq"],
        positions: Int[Array, "rows seq"],
        sight: Sight,
        *,
        scan: bool,
        remat: Remat,
        backend: Backend,
    ) -> Hidden:
        """The states after the last layer."""
        return run_layers(
            self.encoder["layer"],
            self.embeddings(ids, types, positions),
            lambda block, x, page: (block(x, sight, backend), page),
            n=self.config.num_hidden_layers,
            scan=scan,
            remat=remat,
            cache=None,
        )[0]

    def pooled(self, hidden: Hidden) -> Float[Array, "batch width"]:
        """`tanh(dense(first token))`."""
        return jnp.tanh(self.pooler["dense"](hidden[:, 0]))

    def head(self, hidden: Hidden) -> Float[Array, "batch ..."]:
        """Logits; the states themselves where there is no head."""
        if self.config.head == "masked_lm":
            return self.cls["predictions"](hidden, self.embeddings.word_embeddings)
        if self.config.head == "classifier":
            return self.classifier(self.pooled(hidden))
        return hidden


def _dense(
    config: BertConfig, d_in: int, d_out: int, dtype: jnp.dtype, rngs: nnx.Rngs
) -> Linear:
    std = config.initializer_range
    return Linear(d_in, d_out, use_bias=True, std=std, dtype=dtype, rngs=rngs)


def _norm(config: BertConfig, dtype: jnp.dtype) -> LayerNorm:
    return LayerNorm(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype)
