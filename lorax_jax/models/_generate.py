"""Decoding: one compiled program per shape, prompt in and tokens out."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from ._cache import Cache
from ._sampling import GREEDY, NUCLEUS, PLAIN, sample

# Prompts are padded on the right to one of these lengths, then to multiples of the
# last, so that prompts of similar lengths share a program.
BUCKETS = (16, 32, 64, 128, 256)


def generate(
    apply: Callable[..., Any],
    params: Any,
    ids: ArrayLike,
    *,
    max_new_tokens: int,
    mask: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    key: PRNGKeyArray | None = None,
    temperature: ArrayLike = 0.0,
    top_p: ArrayLike = 1.0,
    eos_id: int | Sequence[int] | None = None,
    cache: Cache | int | None = None,
    pad_id: int = 0,
) -> tuple[Int[Array, "batch total"], Cache]:
    """Continues each row of `ids` by up to `max_new_tokens` tokens.

    The prompt is processed in one call, then tokens follow one by one in a loop inside
    one jitted program. A program is compiled for each `apply`, shape of the inputs,
    `max_new_tokens` and kind of sampling (greedy, plain, top-p), and reused whatever
    the values of parameters, prompt, `temperature`, `top_p`, `eos_id` and `key` are.
    So keep one `apply`: a new function object means a new program.

    Args:
        apply: `model.apply`, or any function with its signature.
        params: what `apply` takes first; any pytree.
        ids: the prompts, `(batch, seq)`. Shorter ones are padded on the left.
        max_new_tokens: how many tokens to make at most.
        mask: `(batch, seq)`, true (or 1) for real tokens; None says that all are.
        positions: of the tokens of `ids`, if not counted from the mask (and from where
            the cache ends).
        key: the randomness; needed when `temperature` is not 0.
        temperature: 0 takes the likeliest token, 1 samples as the model says. One
            number, or one per row (then none may be 0).
        top_p: sample from the likeliest tokens that hold this much of the probability.
            One number, or one per row.
        eos_id: a row ends after this token, or after any of these.
        cache: what came before `ids`: from `model.init_cache` or an earlier `generate`.
            By default (or with a number of slots) a new one is made.
        pad_id: fills rows after their end.

    Returns:
        `(ids, cache)`: the prompts with the new tokens behind them, shape
        `(batch, seq + max_new_tokens)`, and the cache, which has seen every token of
        it. To continue, pass the cache with the next turn's tokens alone.

    Raises:
        ValueError: if the arguments contradict each other or the cache is too small.

    Example:
        >>> from . import from_config
        >>> model = from_config({
        ...     "model_type": "gpt2", "n_layer": 1, "n_embd": 8,
        ...     "n_head": 2, "n_positions": 32, "vocab_size": 16})
        >>> params = model.init(jax.random.key(0))
        >>> ids, cache = generate(
        ...     model.apply, params, jnp.array([[1, 2, 3]]), max_new_tokens=4)
        >>> ids.shape, int(cache.length)
        ((1, 7), 7)
    """
    tokens, real, positions = _prompt(ids, mask, positions)
    batch, seq = tokens.shape
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` = {max_new_tokens} must be at least 1.")
    kind = _kind(key, temperature, top_p)
    padded, cache = _lengths(seq, max_new_tokens, cache)
    prompt = _Prompt(
        ids=_pad(tokens, padded, pad_id),
        mask=None if real is None else _pad(real, padded, False),
        positions=None if positions is None else _pad(positions, padded, 0),
        length=np.asarray(seq, np.int32),
    )
    # No token is -1: so one program does with and without an `eos_id`.
    stop = np.atleast_1d(np.asarray(-1 if eos_id is None else eos_id, np.int32))
    new, after = _run(
        params,
        prompt,
        None if isinstance(cache, int) else cache,
        key if kind != GREEDY else None,
        _per_row("temperature", temperature, batch),
        _per_row("top_p", top_p, batch),
        stop,
        np.asarray(pad_id, np.int32),
        apply=apply,
        slots=cache if isinstance(cache, int) else None,
        max_new_tokens=max_new_tokens,
        kind=kind,
    )
    return _beside(tokens, new), after


class _Prompt(NamedTuple):
    """The prompt as the program takes it, padded on the right to `ids.shape[1]`."""

    ids: Int[Array | np.ndarray, "batch padded"]
    mask: Bool[Array | np.ndarray, "batch padded"] | None
    positions: Int[Array | np.ndarray, "batch padded"] | None
    length: Int[Array | np.ndarray, ""]


class _State(NamedTuple):
    """What the decoding loop carries."""

    step: Int[Array, ""]
    tokens: Int[Array, "batch new"]
    done: Bool[Array, "batch"]
    logits: Float[Array, "batch vocab"]
    cache: Cache


@functools.partial(
    jax.jit, static_argnames=("apply", "slots", "max_new_tokens", "kind")
)
def _run(
    params: Any,
    prompt: _Prompt,
    cache: Cache | None,
    key: PRNGKeyArray | None,
    temperature: Float[Array, "rows"],
    top_p: Float[Array, "rows"],
    stop: Int[Array, "stops"],
    pad_id: Int[Array, ""],
    *,
    apply: Callable[..., Any],
    slots: int | None,
    max_new_tokens: int,
    kind: str,
) -> tuple[Int[Array, "batch new"], Cache]:
    """The whole of `generate` on the device."""
    batch = prompt.ids.shape[0]
    logits, after = apply(
        params,
        prompt.ids,
        mask=prompt.mask,
        positions=prompt.positions,
        cache=slots if cache is None else cache,
        column=prompt.length - 1,
    )

    def more(state: _State) -> Bool[Array, ""]:
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def step(state: _State) -> _State:
        token = sample(
            state.logits,
            kind=kind,
            key=None if key is None else jax.random.fold_in(key, state.step),
            temperature=temperature,
            top_p=top_p,
        )
        token = jnp.where(state.done, pad_id, token)  # (batch,)
        tokens = jax.lax.dynamic_update_slice(
            state.tokens, token[:, None], (0, state.step)
        )
        # Rows that had ended feed padding, which the cache marks as not valid.
        logits, cache = apply(
            params, token[:, None], mask=~state.done[:, None], cache=state.cache
        )
        ended = jnp.any(token[:, None] == stop[None, :], axis=-1)
        return _State(state.step + 1, tokens, state.done | ended, logits[:, 0], cache)

    start = _State(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full((batch, max_new_tokens), pad_id, jnp.int32),
        done=jnp.zeros((batch,), bool),
        logits=logits[:, 0],
        cache=_without_padding(after, prompt),
    )
    end = jax.lax.while_loop(more, step, start)
    return end.tokens, end.cache


def _without_padding(after: Cache, prompt: _Prompt) -> Cache:
    """Takes the padding on the right back out of the cache.

    The slots stay written, but `length` goes back, so the next tokens overwrite them;
    until then causality hides them.
    """
    extra = prompt.ids.shape[1] - prompt.length
    length = after.length - extra
    slot = jnp.arange(after.slots, dtype=jnp.int32)
    after = after._replace(length=length, valid=after.valid & (slot < length)[None, :])
    if prompt.mask is None and prompt.positions is None:
        # Padding was counted. With a mask it is not, and where positions are given it
        # has position 0, which is never a row's last.
        after = after._replace(next_position=after.next_position - extra)
    return after


def _kind(key: Any, temperature: Any, top_p: Any) -> str:
    """Which of the sampling programs; what is known of the values decides."""
    if not _all(temperature, lambda t: t >= 0):
        raise ValueError(f"`temperature` = {temperature} must not be negative.")
    if not _all(top_p, lambda p: (p > 0) & (p <= 1)):
        raise ValueError(f"`top_p` = {top_p} must be above 0 and at most 1.")
    if _is_number(temperature, 0):
        return GREEDY
    if not _all(temperature, lambda t: t > 0):
        raise ValueError(
            f"`temperature` = {temperature} is 0 for some rows. Decode greedy rows in "
            "a call of their own."
        )
    if key is None:
        raise ValueError(
            f"`temperature` = {temperature} samples, which needs a `key`, e.g. "
            "key=jax.random.key(0). For the likeliest tokens leave out `temperature`."
        )
    return PLAIN if _is_number(top_p, 1) else NUCLEUS


def _all(value: Any, test: Callable[[Any], Any]) -> bool:
    """Whether every entry passes; a tracer's are taken to."""
    return isinstance(value, Tracer) or bool(np.all(test(np.asarray(value))))


def _is_number(value: Any, number: float) -> bool:
    known = not isinstance(value, Tracer)
    return known and np.ndim(value) == 0 and float(value) == number


def _bucket(length: int) -> int:
    """The smallest bucket that holds `length`."""
    step = BUCKETS[-1]
    return next((b for b in BUCKETS if length <= b), -(-length // step) * step)


def _lengths(
    seq: int, max_new_tokens: int, cache: Cache | int | None
) -> tuple[int, Cache | int]:
    """What the prompt is padded to, and the cache or the slots of a new one."""
    padded = _bucket(seq)
    if cache is None:
        # A bucket too, not padded + max_new_tokens: a prompt and its continuation that
        # fit a power of two, such as GPT-2's 1024 positions, must not ask for more.
        return padded, _bucket(seq + max_new_tokens)
    if isinstance(cache, int):
        slots, used = cache, 0
    else:
        slots = cache.slots
        if isinstance(cache.length, Tracer):
            return seq, cache  # how much room there is cannot be known here
        used = int(cache.length)
    if used + seq + max_new_tokens > slots:
        raise ValueError(
            f"`cache` has {slots} slots, {used} of them used; {seq} prompt tokens and "
            f"{max_new_tokens} new ones do not fit. Make it longer: "
            f"model.init_cache(batch, {used + seq + max_new_tokens})."
        )
    return min(padded, slots - used), cache


def _prompt(ids: Any, mask: Any, positions: Any) -> tuple[Any, Any, Any]:
    """The three arrays, on the host where they are known, and their shapes checked."""
    ids = _host(ids)
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer) or not ids.shape[1]:
        raise ValueError(
            "`ids` must be integers of shape (batch, seq), at least one token long; "
            f"got {ids.dtype} of shape {ids.shape}. For one sequence pass `ids[None]`."
        )
    ids = ids.astype(np.int32)
    if mask is not None:
        mask = _host(mask).astype(bool)
    if positions is not None:
        positions = _host(positions).astype(np.int32)
    for name, array in (("mask", mask), ("positions", positions)):
        if array is not None and array.shape != ids.shape:
            raise ValueError(
                f"`{name}` must have the shape of `ids`, {ids.shape}; got "
                f"{array.shape}."
            )
    if isinstance(mask, np.ndarray):
        if not mask[:, -1].all():
            rows = np.flatnonzero(~mask[:, -1]).tolist()
            raise ValueError(
                f"`mask` marks the last token of rows {rows} as padding. Pad prompts "
                'on the left, e.g. with `tokenizer(..., padding_side="left")`.'
            )
        if mask.all():
            mask = None  # attention without a mask is faster
    return ids, mask, positions


def _per_row(name: str, value: Any, batch: int) -> Any:
    """A number, or one per row, as a float32 vector of length 1 or `batch`."""
    value = _host(value)
    if value.shape not in ((), (1,), (batch,)):
        raise ValueError(
            f"`{name}` must be one number or one per row, shape ({batch},); got "
            f"shape {value.shape}."
        )
    return value.astype(np.float32).reshape(-1)


def _host(value: Any) -> Any:
    """As a NumPy array, so that preparing a call compiles nothing; tracers stay."""
    return value if isinstance(value, Tracer) else np.asarray(value)


def _pad(array: Any, length: int, fill: Any) -> Any:
    width = ((0, 0), (0, length - array.shape[1]))
    library = np if isinstance(array, np.ndarray) else jnp
    return library.pad(array, width, constant_values=fill)


def _beside(ids: Any, new: Array) -> Array:
    if isinstance(ids, Tracer) or isinstance(new, Tracer):
        return jnp.concatenate([ids, new], axis=1)
    # `device_put`, since `jnp.asarray` would compile something for a new shape.
    return jax.device_put(np.concatenate([ids, np.asarray(new)], axis=1))
