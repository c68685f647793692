"""`generate`: the tokens a plain loop gives, from one program that is reused."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_jax import models
from lorax_jax.models import _generate

# Grouped queries with scaled rotary positions, a sliding window, learned positions.
SOME = ["llama3", "mistral", "gpt2"]


@pytest.fixture
def counted():
    """`counted(apply)`: the same function, counting how often it is traced."""

    def wrap(apply):
        def traced(*args, **kwargs):
            traced.times += 1
            return apply(*args, **kwargs)

        traced.times = 0
        return traced

    return wrap


@pytest.fixture(scope="module")
def slowly():
    """Greedy decoding without a cache: the whole sequence again for every token."""

    def decode(model, params, ids, n):
        apply = jax.jit(model.apply)
        width = ids.shape[1] + n
        ids = np.asarray(ids)
        for _ in range(n):
            logits = apply(params, np.pad(ids, ((0, 0), (0, width - ids.shape[1]))))
            best = np.asarray(logits[:, ids.shape[1] - 1].argmax(-1))
            ids = np.concatenate([ids, best[:, None].astype(np.int32)], axis=1)
        return ids

    return decode


@pytest.fixture(scope="module")
def decode(tiny):
    """`decode(name, ids, ...)`: six new tokens, most options as they come."""

    def run(name, ids, *, scan_layers=False, **kwargs):
        model, params = tiny(name, scan_layers=scan_layers)
        return models.generate(
            model.apply,
            params,
            np.asarray(ids),
            max_new_tokens=kwargs.pop("max_new_tokens", 6),
            **kwargs,
        )

    return run


@pytest.fixture(scope="module")
def alone(decode):
    """`alone(name, row)`: the six tokens after one prompt.

    Decoded twice, side by side: batches of two are what the other tests compile.
    """

    def run(name, row, **kwargs):
        out, _ = decode(name, np.stack([np.asarray(row)] * 2), **kwargs)
        return out[0, -6:].tolist()

    return run


@pytest.mark.parametrize("name", SOME)
def test_greedy_equals_recomputation(tiny, decode, slowly, scan, name, ids):
    model, params = tiny(name, scan_layers=scan)
    out, cache = decode(name, ids, scan_layers=scan)
    np.testing.assert_array_equal(out, slowly(model, params, ids, 6))
    assert int(cache.length) == 18  # every returned token has been seen
    assert cache.valid.sum(axis=1).tolist() == [18, 18]
    assert cache.next_position.tolist() == [18, 18]


@pytest.mark.parametrize("name", SOME)
def test_left_padded_rows_continue_as_if_alone(decode, alone, name, ragged):
    batch, mask, rows = ragged
    out, cache = decode(name, batch, mask=mask)
    for new, row in zip(out[:, -6:].tolist(), rows, strict=True):
        assert new == alone(name, row)
    assert cache.next_position.tolist() == [len(row) + 6 for row in rows]


def test_explicit_positions(decode, ragged):
    batch, mask, _ = ragged
    counted = np.maximum(mask.cumsum(axis=1) - 1, 0)
    said, cache = decode("gpt2", batch, mask=mask, positions=counted)
    default, same = decode("gpt2", batch, mask=mask)
    np.testing.assert_array_equal(said, default)
    np.testing.assert_array_equal(cache.next_position, same.next_position)
    _, cache = decode("gpt2", batch, mask=mask, positions=counted + 9)
    assert cache.next_position.tolist() == [12 + 9 + 6, 5 + 9 + 6]


def test_second_call_compiles_nothing(tiny, counted, caplog, ids):
    model, params = tiny("llama3")
    apply = counted(model.apply)

    def run(ids, seed, temperature, top_p, params):
        key = jax.random.key(seed)
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            caplog.clear()
            out, _ = models.generate(
                apply,
                params,
                ids,
                max_new_tokens=4,
                key=key,
                temperature=temperature,
                top_p=top_p,
                eos_id=seed,
            )
        return [r for r in caplog.records if "ompil" in r.getMessage()], out

    other = jax.tree.map(lambda leaf: leaf * 0.5, params)
    numbers = np.asarray(ids)
    first, _ = run(numbers, 0, 0.7, 0.9, params)
    traces = apply.times
    assert first and traces
    assert run(numbers, 1, 0.7, 0.9, params)[0] == []
    assert run(numbers[:, ::-1], 2, 1.3, 0.5, other)[0] == []
    assert run(numbers[:, :9], 3, 0.2, 0.1, params)[0] == []  # the same bucket
    assert apply.times == traces


def test_greedy_programs_do_not_depend_on_sampling_values(tiny, counted, ids):
    model, params = tiny("llama3")
    apply = counted(model.apply)
    for top_p in (1.0, 0.5):
        for key in (None, jax.random.key(0)):
            models.generate(apply, params, ids, max_new_tokens=2, key=key, top_p=top_p)
    assert apply.times == 2  # the prompt and the loop's body, once each


def test_rows_end_at_eos_and_are_filled(decode, ids):
    free, _ = decode("llama3", ids)
    new = np.asarray(free[:, 12:])
    stop = int(new[0, 2])
    first = [list(row).index(stop) if stop in row else 5 for row in new]
    out, cache = decode("llama3", ids, eos_id=stop, pad_id=96)
    for row, free_row, end in zip(np.asarray(out)[:, 12:], new, first, strict=True):
        np.testing.assert_array_equal(row[: end + 1], free_row[: end + 1])
        assert (row[end + 1 :] == 96).all()
    seen = [12 + end + 1 for end in first]
    assert cache.valid.sum(axis=1).tolist() == seen
    assert cache.next_position.tolist() == seen
    several, _ = decode("llama3", ids, eos_id=[stop, 500], pad_id=96)
    np.testing.assert_array_equal(several, out)


def test_decoding_stops_when_every_row_has_ended(decode, ids):
    twice = ids[jnp.array([0, 0])]
    free, _ = decode("llama3", twice)
    _, cache = decode("llama3", twice, eos_id=int(free[0, 12]))
    assert int(cache.length) == 13


@pytest.mark.parametrize("name", SOME)
def test_a_conversation_continues_from_its_cache(tiny, decode, scan, name, ids):
    cache = tiny(name, scan_layers=scan)[0].init_cache(2, 48)
    first, cache = decode(name, ids[:, :5], scan_layers=scan, cache=cache)
    second, cache = decode(name, ids[:, 5:], scan_layers=scan, cache=cache)
    whole = jnp.concatenate([first, ids[:, 5:]], axis=1)
    wanted, _ = decode(name, whole, scan_layers=scan)
    np.testing.assert_array_equal(second[:, -6:], wanted[:, -6:])
    assert int(cache.length) == 24


def test_a_conversation_continues_where_each_row_ended(tiny, decode, alone, ids):
    free, _ = decode("llama3", ids)
    stop = int(free[0, 13])
    cache = tiny("llama3")[0].init_cache(2, 48)
    first, cache = decode("llama3", ids, cache=cache, eos_id=stop)
    second, _ = decode("llama3", ids[:, :4], cache=cache)
    for i in range(2):
        told = np.asarray(first[i])
        ends = np.flatnonzero(told[12:] == stop)
        told = told[: 12 + ends[0] + 1] if len(ends) else told
        prompt = np.concatenate([told, ids[i, :4]])
        assert second[i, -6:].tolist() == alone("llama3", prompt)


def test_params_are_opaque(tiny, decode, ids):
    model, params = tiny("llama3")

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Halves:
        low: jax.Array
        high: jax.Array

    def apply(params, *args, **kwargs):
        def whole(leaf):
            return leaf.low + leaf.high if isinstance(leaf, Halves) else leaf

        dense = jax.tree.map(
            whole, params, is_leaf=lambda node: isinstance(node, Halves)
        )
        return model.apply(dense, *args, **kwargs)

    split = jax.tree.map(lambda leaf: Halves(0.5 * leaf, 0.5 * leaf), params)
    ours, _ = models.generate(apply, split, ids, max_new_tokens=6)
    np.testing.assert_array_equal(ours, decode("llama3", ids)[0])


def test_inside_jit_and_vmap(tiny, decode, ids):
    model, params = tiny("llama3")

    def one(ids):
        return models.generate(model.apply, params, ids[None], max_new_tokens=6)[0][0]

    np.testing.assert_array_equal(jax.jit(jax.vmap(one))(ids), decode("llama3", ids)[0])


def test_prompt_and_continuation_may_fill_every_position_of_gpt2(tiny):
    model, params = tiny("gpt2")
    prompt = np.ones((1, 60), np.int32)
    out, _ = models.generate(model.apply, params, prompt, max_new_tokens=4)
    assert out.shape == (1, 64)
    with pytest.raises(ValueError, match="has learned 64 positions"):
        models.generate(model.apply, params, prompt, max_new_tokens=5)


def test_sampling_is_decided_by_the_key(decode, ids):
    def sampled(seed, **kwargs):
        key = jax.random.key(seed)
        out, _ = decode("llama3", ids, key=key, **{"temperature": 1.0} | kwargs)
        return out.tolist()

    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)
    assert sampled(0, top_p=0.9) == sampled(0, top_p=0.9)
    # Little temperature or little mass leaves the likeliest token alone.
    greedy = decode("llama3", ids)[0].tolist()
    assert sampled(0, temperature=1e-4) == greedy
    assert sampled(0, top_p=1e-4) == greedy
    # One value per row.
    mixed = sampled(0, temperature=np.array([1e-4, 1.0]), top_p=np.ones(2))
    assert [mixed[0], mixed[1]] == [greedy[0], sampled(0)[1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "`max_new_tokens` = 0 must be at least 1"),
        ({"temperature": 0.5}, "`temperature` = 0.5 samples, which needs a `key`"),
        ({"temperature": -1.0}, "`temperature` = -1.0 must not be negative"),
        ({"temperature": np.array([0.0, 1.0])}, "is 0 for some rows"),
        ({"temperature": np.ones(3)}, r"one per row, shape \(2,\); got shape \(3,\)"),
        ({"top_p": 0.0}, "`top_p` = 0.0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, "`top_p` = 1.5 must be above 0"),
        ({"ids": np.ones(3, np.int32)}, r"`ids` must be integers of shape \(batch"),
        ({"ids": np.ones((2, 0), np.int32)}, "at least one token long"),
        ({"mask": np.ones((2, 3))}, r"`mask` must have the shape of `ids`, \(2, 12\)"),
        ({"positions": np.ones((2, 3))}, "`positions` must have the shape"),
        (
            {"mask": np.arange(24).reshape(2, 12) < 23},
            r"last token of rows \[1\] as padding",
        ),
        ({"cache": 15}, "15 slots, 0 of them used; 12 prompt tokens and 4 new ones"),
    ],
)
def test_wrong_arguments_are_refused(tiny, ids, arguments, message):
    model, params = tiny("llama3")
    if np.shape(arguments.get("temperature")) == (3,):
        arguments = arguments | {"key": jax.random.key(0)}
    with pytest.raises(ValueError, match=message):
        models.generate(
            model.apply, params, **({"ids": ids, "max_new_tokens": 4} | arguments)
        )


@pytest.mark.parametrize(
    ("length", "bucket"), [(1, 16), (16, 16), (17, 32), (256, 256), (257, 512)]
)
def test_buckets(length, bucket):
    assert _generate._bucket(length) == bucket
