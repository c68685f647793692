"""`Encoder`: BERT and MiniLM as pure functions over a tree of arrays."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from .._names import NameMap
from ._attention import Sight
from ._base import Architecture, Params
from ._bert import Bert
from ._bert_config import BertConfig
from ._checks import check_positions, checked_ids, checked_integers, checked_mask
from ._names import bert_names


@dataclasses.dataclass(frozen=True)
class Encoder(Architecture[BertConfig]):
    """An encoder without its parameters; every token sees every other.

    What `apply` gives is decided by `architectures` in the config, as in Transformers:

    | `architectures` | `apply` |
    |---|---|
    | `BertModel`, or not said | hidden states, `(batch, seq, width)` |
    | `BertForMaskedLM` | logits, `(batch, seq, vocab)` |
    | `BertForSequenceClassification` | logits, `(batch, num_labels)` |

    Example:
        >>> import jax
        >>> from lorax_jax.models import from_config, mean_pool
        >>> model = from_config({"model_type": "bert", "vocab_size": 32,
        ...     "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        ...     "num_attention_heads": 2})
        >>> params = model.init(jax.random.key(0))
        >>> block = params["encoder"]["layer"]["0"]
        >>> block["attention"]["self"]["query"]["kernel"].shape
        (16, 16)
        >>> mask = jnp.array([[1, 1, 1], [1, 1, 0]])  # the second row is one shorter
        >>> states = model.apply(params, jnp.array([[1, 2, 3], [4, 5, 0]]), mask=mask)
        >>> states.shape, mean_pool(states, mask).shape
        ((2, 3, 16), (2, 16))

    References:
        Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for
        Language Understanding", 2018. https://arxiv.org/abs/1810.04805
    """

    @property
    def names(self) -> NameMap:
        """`(ours, theirs, layout)` for every parameter, and the name of a tied head.

        Paths hold `{i}` for the layer, scanned or not.
        """
        return bert_names(self.config)

    @property
    def num_layers(self) -> int:
        """How many layers the encoder has."""
        return self.config.num_layers

    def build(self, rngs: nnx.Rngs) -> Bert:
        """The module, with parameters drawn from `rngs`."""
        return Bert(self.config, dtype=self.dtype, scan=self.scan_layers, rngs=rngs)

    def apply(
        self,
        params: Params,
        ids: ArrayLike,
        *,
        types: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        mask: ArrayLike | None = None,
    ) -> Float[Array, "batch ..."]:
        """Hidden states, or the head's logits: `head(params, hidden(...))`.

        Without `mask`, on an NVIDIA GPU in half precision, attention runs as cuDNN's
        flash attention.

        Args:
            params: a nested dictionary of arrays, as from `init` or `load`.
            ids: token ids, `(batch, seq)`.
            types: which of two texts each token belongs to, `(batch, seq)`, what
                tokenizers call `token_type_ids`; by default all the first.
            positions: each token's position, `(batch, seq)`; by default columns are
                counted, padding too, so put padding on the right.
            mask: `(batch, seq)`, true (or 1) for real tokens, false for padding, which
                no token then sees. What comes out at padding means nothing.

        Returns:
            See the table above; in the model's dtype.

        Raises:
            ValueError: if shapes or dtypes do not fit, there are more tokens than
                positions, or `params` is not this model's tree.
        """
        module = self._module(params)
        return module.head(self._run(module, ids, types, positions, mask))

    def hidden(
        self,
        params: Params,
        ids: ArrayLike,
        *,
        types: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        mask: ArrayLike | None = None,
    ) -> Float[Array, "batch seq width"]:
        """The states after the last layer, whatever head there is.

        Args:
            params: this and the others as for `apply`.
            ids: token ids.
            types: of which text they are.
            positions: where they are.
            mask: which are real.

        Returns:
            States in the model's dtype.
        """
        return self._run(self._module(params), ids, types, positions, mask)

    def head(
        self, params: Params, hidden: Float[Array, "batch seq width"]
    ) -> Float[Array, "batch ..."]:
        """The head on hidden states; without one, the states themselves.

        Args:
            params: as for `apply`.
            hidden: from `hidden`.

        Returns:
            As for `apply`.
        """
        return self._module(params).head(hidden)

    def pooled(
        self, params: Params, hidden: Float[Array, "batch seq width"]
    ) -> Float[Array, "batch width"]:
        """BERT's own vector for a row: `tanh(dense(first token))`.

        Sentence encoders such as MiniLM do not use it; see `mean_pool`.

        Args:
            params: as for `apply`.
            hidden: from `hidden`.

        Returns:
            One vector a row.

        Raises:
            ValueError: if the model has no pooler.
        """
        if not self.config.pooler:
            raise ValueError(
                "This BERT has no pooler: its checkpoint holds none, or its head is a "
                "masked-LM head, which needs none. For one vector a row use "
                "`mean_pool(hidden, mask)`, or `hidden[:, 0]`."
            )
        return self._module(params).pooled(hidden)

    def _run(
        self, module: Bert, ids: Any, types: Any, positions: Any, mask: Any
    ) -> Float[Array, "batch seq width"]:
        """What `hidden` does, after the parameters were read."""
        ids = checked_ids(ids)
        seq = ids.shape[1]
        limit = self.config.max_position_embeddings
        check_positions(seq, limit, "BERT", "max_position_embeddings")
        mask = checked_mask(mask, ids)
        columns = jnp.arange(seq, dtype=jnp.int32)[None]  # (1, seq)
        if positions is not None:
            columns = checked_integers("positions", positions, ids)
        first = jnp.zeros((1, seq), jnp.int32)
        return module.hidden(
            ids,
            first if types is None else checked_integers("types", types, ids),
            columns,
            Sight(
                None if mask is None else mask[:, None, None, :],  # (batch, 1, 1, seq)
                causal=False,
                window=None,
            ),
            scan=self.scan_layers,
            remat=self.remat,
            backend=self.attention,
        )


def mean_pool(
    hidden: Float[Array, "batch seq width"], mask: ArrayLike | None = None
) -> Float[Array, "batch width"]:
    r"""The mean of each row's real tokens: a sentence embedding, before it is normed.

    $$e = \frac{\sum_i m_i h_i}{\sum_i m_i}$$

    Summed in float32. For cosine similarities divide by the norm,
    `e / jnp.linalg.norm(e, axis=-1, keepdims=True)`, as MiniLM's pipeline does.

    Args:
        hidden: $h$, from `Encoder.hidden`.
        mask: $m$, true (or 1) for real tokens; None says that all are.

    Returns:
        $e$, in the dtype of `hidden`; zero for a row without tokens.

    Raises:
        ValueError: if `mask` does not cover `hidden`.

    Example:
        >>> hidden = jnp.array([[[1.0], [3.0], [9.0]]])
        >>> mean_pool(hidden, jnp.array([[1, 1, 0]])).tolist()
        [[2.0]]

    References:
        Reimers and Gurevych, "Sentence-BERT: Sentence Embeddings using Siamese
        BERT-Networks", 2019. https://arxiv.org/abs/1908.10084
    """
    wide = hidden.astype(jnp.float32)
    if mask is None:
        return wide.mean(axis=1).astype(hidden.dtype)
    mask = jnp.asarray(mask)
    if mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"`mask` has the shape {mask.shape}; `hidden` has {hidden.shape}, so it "
            f"must be {hidden.shape[:2]}, as it was given to the encoder."
        )
    weight = mask.astype(bool).astype(jnp.float32)[:, :, None]  # (batch, seq, 1)
    total = jnp.maximum(weight.sum(axis=1), 1.0)  # (batch, 1)
    return ((wide * weight).sum(axis=1) / total).astype(hidden.dtype)
