"""`Model`: a config turned into pure functions over a tree of arrays."""

import dataclasses
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from ._attention import new_positions, sight_into_cache, sight_without_cache
from ._base import Architecture, Params
from ._cache import Cache, empty_cache
from ._checks import (
    check_positions,
    check_room,
    checked_ids,
    checked_integers,
    checked_mask,
)
from ._config import Gpt2Config, LlamaConfig
from ._gpt2 import Gpt2
from ._llama import Llama
from ._names import Names, names_for


@dataclasses.dataclass(frozen=True)
class Model(Architecture[LlamaConfig | Gpt2Config]):
    """A model that predicts the next token, without its parameters.

    Frozen and hashable, so it may be a static argument of `jax.jit`; its methods are
    pure functions of a nested dictionary of arrays:

        >>> from lorax_jax.models import from_config
        >>> config = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16,
        ...           "intermediate_size": 24, "num_hidden_layers": 2,
        ...           "num_attention_heads": 2}
        >>> model = from_config(config)
        >>> params = model.init(jax.random.key(0))
        >>> params["layers"]["0"]["self_attn"]["q_proj"]["kernel"].shape
        (16, 16)
        >>> model.apply(params, jnp.array([[1, 2, 3]])).shape  # (batch, seq, vocab)
        (1, 3, 32)

    Its attributes are those of `Architecture`.
    """

    @property
    def names(self) -> Names:
        """`(ours, theirs, layout)` for every parameter; see `_names.py`.

        Paths hold `{i}` for the layer, scanned or not.
        """
        return names_for(self.config)

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        return self.config.num_layers

    def build(self, rngs: nnx.Rngs) -> Llama | Gpt2:
        """The module, with parameters drawn from `rngs`."""
        family: Any = Gpt2 if isinstance(self.config, Gpt2Config) else Llama
        return family(self.config, dtype=self.dtype, scan=self.scan_layers, rngs=rngs)

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> Cache:
        """An empty key-value cache.

        Args:
            batch: rows.
            length: how many tokens fit in each row, prompt and new ones together.
            dtype: of keys and values; the model's by default.

        Returns:
            A `Cache`, for `apply(..., cache=cache)` and `generate(..., cache=cache)`.

        Raises:
            ValueError: if GPT-2 has fewer positions than `length`.
        """
        if isinstance(self.config, Gpt2Config):
            _check_learned(self.config, length)
        kv_heads, head_dim = self.config.cached_shape
        return empty_cache(
            layers=self.num_layers,
            batch=batch,
            slots=length,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=jnp.dtype(dtype or self.dtype),
            stacked=self.scan_layers,
        )

    @overload
    def apply(
        self,
        params: Params,
        ids: ArrayLike,
        *,
        positions: ArrayLike | None = ...,
        mask: ArrayLike | None = ...,
        cache: None = ...,
        column: int | Array | None = ...,
    ) -> Array: ...

    @overload
    def apply(
        self,
        params: Params,
        ids: ArrayLike,
        *,
        positions: ArrayLike | None = ...,
        mask: ArrayLike | None = ...,
        cache: Cache | int,
        column: int | Array | None = ...,
    ) -> tuple[Array, Cache]: ...

    def apply(
        self,
        params: Params,
        ids: ArrayLike,
        *,
        positions: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        cache: Cache | int | None = None,
        column: int | Int[Array, ""] | None = None,
    ) -> (
        Float[Array, "batch kept vocab"]
        | tuple[Float[Array, "batch kept vocab"], Cache]
    ):
        """The logits of every token's successor.

        Without `mask` (and without a cache that holds something) attention is causal
        with no mask in memory, and on an NVIDIA GPU in half precision it runs as
        cuDNN's flash attention. So pass no mask where padding is on the right: a causal
        model never looks there.

        Args:
            params: a nested dictionary of arrays, as from `init` or `load`.
            ids: token ids, `(batch, seq)`.
            positions: each token's position, `(batch, seq)`; by default the real
                tokens are counted from 0, or from where the cache ends.
            mask: `(batch, seq)`, true (or 1) for real tokens, false for padding, e.g.
                on the left of shorter rows. Logits of padding mean nothing.
            cache: from `init_cache` or an earlier call; the new tokens see what it
                holds. A number makes an empty one with that many slots.
            column: compute the logits of this one column of `ids` only.

        Returns:
            Logits of shape `(batch, seq, vocab)` in the model's dtype, or
            `(batch, 1, vocab)` with `column`; with a cache, the pair
            `(logits, cache)`.

        Raises:
            ValueError: if shapes or dtypes do not fit, the cache is full, or `params`
                is not this model's tree.
        """
        module = self._module(params)
        states, after = self._run(module, ids, positions, mask, cache)
        if column is not None:
            states = jax.lax.dynamic_slice_in_dim(states, column, 1, axis=1)
        logits = module.head(states)
        return logits if after is None else (logits, after)

    @overload
    def hidden(
        self,
        params: Params,
        ids: ArrayLike,
        *,
        positions: ArrayLike | None = ...,
        mask: ArrayLike | None = ...,
        cache: None = ...,
    ) -> Array: ...

    @overload
    def hidden(
        self,
        params: Params,
        ids: ArrayLike,
        *,
        positions: ArrayLike | None = ...,
        mask: ArrayLike | None = ...,
        cache: Cache | int,
    ) -> tuple[Array, Cache]: ...

    def hidden(
        self,
        params: Params,
        ids: ArrayLike,
        *,
        positions: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        cache: Cache | int | None = None,
    ) -> (
        Float[Array, "batch seq width"] | tuple[Float[Array, "batch seq width"], Cache]
    ):
        """What `apply` computes before the head: `apply` is `head(hidden(...))`.

        A loss that takes `hidden` and `head` apart can compute its logits a slice at a
        time and never hold `(batch, seq, vocab)`.

        Args:
            params: this and the others as for `apply`.
            ids: token ids, `(batch, seq)`.
            positions: where they are.
            mask: which are real.
            cache: what came before.

        Returns:
            Normed hidden states, or the pair `(states, cache)`.
        """
        states, after = self._run(self._module(params), ids, positions, mask, cache)
        return states if after is None else (states, after)

    def head(
        self, params: Params, hidden: Float[Array, "batch seq width"]
    ) -> Float[Array, "batch seq vocab"]:
        """Logits of hidden states.

        Args:
            params: as for `apply`.
            hidden: from `hidden`, or any slice of it.

        Returns:
            Logits in the model's dtype.
        """
        return self._module(params).head(hidden)

    def _run(
        self, module: Llama | Gpt2, ids: Any, positions: Any, mask: Any, cache: Any
    ) -> tuple[Float[Array, "batch seq width"], Cache | None]:
        """What `hidden` does, after its arguments were read."""
        ids = checked_ids(ids)
        batch, seq = ids.shape
        mask = checked_mask(mask, ids)
        # A cache that was made here is empty: attention need not look into it.
        seen = None if isinstance(cache, int) else cache
        after = self.init_cache(batch, cache) if isinstance(cache, int) else cache
        if after is not None:
            check_room(after, batch, seq)
        elif isinstance(self.config, Gpt2Config):
            _check_learned(self.config, seq)

        if positions is None:
            start = None if seen is None else seen.next_position
            positions = new_positions(mask, start, seq)
        else:
            positions = checked_integers("positions", positions, ids)
        if after is not None:
            after = _note_tokens(after, positions, mask, seq)
        window = getattr(self.config, "sliding_window", None)
        if seen is None or after is None:
            sight = sight_without_cache(mask, seq, window)
        else:
            sight = sight_into_cache(seen, after.valid, seq, window)
        states, after = module.hidden(
            ids,
            positions,
            sight,
            after,
            scan=self.scan_layers,
            remat=self.remat,
            backend=self.attention,
        )
        if after is not None:
            # Layers wrote at the old length; now that all have, it moves on.
            after = after._replace(length=after.length + seq)
        return states, after


def _note_tokens(
    cache: Cache,
    positions: Int[Array, "rows seq"],
    mask: Bool[Array, "batch seq"] | None,
    seq: int,
) -> Cache:
    """The cache with the new tokens marked valid and counted; not yet stored."""
    batch = cache.valid.shape[0]
    real = jnp.ones((batch, seq), bool) if mask is None else mask
    after = jnp.where(real, jnp.broadcast_to(positions, real.shape) + 1, 0)
    return cache._replace(
        valid=jax.lax.dynamic_update_slice(cache.valid, real, (0, cache.length)),
        next_position=jnp.maximum(cache.next_position, after.max(axis=1)),
    )


def _check_learned(config: Gpt2Config, length: int) -> None:
    limit = config.n_positions
    advice = f"If what you decode fits, pass cache=model.init_cache(batch, {limit})."
    check_positions(length, limit, "GPT-2", "n_positions", advice)
