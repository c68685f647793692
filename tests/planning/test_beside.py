"""Whole leaves, biases and rows in a plan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_jax as lj
from lorax_jax._errors import PlanError

LAYERS, D, ROWS = 3, 8, 20


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def layer():
    return {
        "q": {"kernel": struct(D, D), "bias": struct(D)},
        "k": {"kernel": struct(D, D)},
        "norm": {"scale": struct(D), "bias": struct(D)},
    }


def block(p, x):
    x = x * p["norm"]["scale"][None] + p["norm"]["bias"][None]
    return jnp.tanh(x @ p["q"]["kernel"] + p["q"]["bias"][None]) @ p["k"]["kernel"]


@pytest.fixture
def unrolled():
    params = {"embed": struct(ROWS, D), "head": {"kernel": struct(D, 5)}}
    params["layers"] = {str(i): layer() for i in range(LAYERS)}
    params["count"] = struct(4, dtype=jnp.int32)

    def fn(params, ids):
        x = jnp.take(params["embed"], ids, axis=0)
        for i in range(LAYERS):
            x = block(params["layers"][str(i)], x)
        return x @ params["head"]["kernel"], params["count"] + 1

    return params, fn, (struct(6, dtype=jnp.int32),)


@pytest.fixture
def scanned(unrolled):
    params, _, args = unrolled
    stacked = jax.tree.map(lambda x: struct(LAYERS, *x.shape), layer())

    def fn(params, ids):
        x = jnp.take(params["embed"], ids, axis=0)
        x, _ = jax.lax.scan(lambda x, p: (block(p, x), None), x, params["layers"])
        return x @ params["head"]["kernel"], params["count"] + 1

    return params | {"layers": stacked}, fn, args


def make(model, targets=r".*/q/kernel", **config):
    params, fn, args = model
    return lj.plan(lj.LoraConfig(targets, rank=2, **config), params, fn, args)


def beside(plan):
    return {s.path: (s.role.kind, s.trainable, s.rule) for s in plan if not s.rank}


CASES = {
    "head": ({"whole": "head/kernel"}, {"head/kernel"}),
    "norms": (
        {"whole": ".*/norm/.*"},
        {f"layers/{i}/norm/{n}" for i in range(LAYERS) for n in ("scale", "bias")},
    ),
    "some layers": (
        {"whole": r"layers/(0|2)/norm/scale"},
        {"layers/0/norm/scale", "layers/2/norm/scale"},
    ),
    "all biases": (
        {"bias": "all"},
        {f"layers/{i}/{n}/bias" for i in range(LAYERS) for n in ("q", "norm")},
    ),
    "biases of targets": (
        {"bias": "lora_only"},
        {f"layers/{i}/q/bias" for i in range(LAYERS)},
    ),
    "biases of some targets": (
        {"bias": "lora_only", "layers": [1]},
        {"layers/1/q/bias"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_scanned_and_unrolled_models_read_alike(unrolled, scanned, case):
    config, paths = CASES[case]
    one, other = (make(model, **config) for model in (unrolled, scanned))
    assert set(beside(one)) == paths and beside(one) == beside(other)
    assert one.trainable == other.trainable
    assert {kind for kind, _, _ in beside(one).values()} == {"whole"}


@pytest.mark.parametrize("case", CASES)
def test_copies_start_as_the_leaves(scanned, key, case):
    params = jax.tree.map(
        lambda x: jnp.arange(np.prod(x.shape), dtype=x.dtype).reshape(x.shape),
        scanned[0],
    )
    plan = make(scanned, **CASES[case][0])
    adapter = lj.init(plan, params, key=key)
    for slot in plan.slots:
        if slot.role.kind == "whole":
            assert adapter.train[slot.name]["whole"].shape == slot.shapes()["whole"]
    same = lj.merge(params, adapter)
    assert jax.tree.all(jax.tree.map(np.array_equal, same, params))
    assert str(lj.count(params, adapter)).startswith(
        f"trainable params: {plan.trainable:,} "
    )


def test_rows(unrolled):
    for rows in ([7, 2], {"embed": (2, 7)}, {"emb.*": [2, 7]}):
        plan = make(unrolled, token_rows=rows)
        (slot,) = [s for s in plan.slots if s.role.kind == "rows"]
        assert slot.ids == (2, 7) and slot.name == "embed@rows"
        assert beside(plan)["embed"][1] == 2 * D
    plan = make(unrolled, token_rows={"head/kernel": [4]})
    (slot,) = [s for s in plan.slots if s.role.kind == "rows"]
    assert (slot.role.inputs, slot.role.outputs) == ((1,), (0,))
    assert "rows" in str(plan)


REFUSED = {
    "no match": ({"whole": "nrom/.*"}, r"(?s)`whole` = 'nrom/.*' matched no.*closest"),
    "a target": ({"whole": ".*/q/kernel"}, "trained whole, and a target adapts it too"),
    "integers": ({"whole": "count"}, "'count' has the dtype int32.* be trained"),
    "no bias": (
        {"bias": "lora_only", "targets": ".*/k/kernel"},
        "none of the 3 has one",
    ),
    "whole and rows": (
        {"whole": "embed", "token_rows": [1]},
        "'embed' is trained whole, and `token_rows` names rows",
    ),
    "rows twice": (
        {"token_rows": {"embed": [1], "emb.*": [2]}},
        "Two entries of `token_rows` name rows of 'embed'",
    ),
    "no table": (
        {"token_rows": {"wte": [1]}},
        r"names 'wte', which matches no.*\n.*embed",
    ),
    "no rows": ({"token_rows": {"layers/0/norm/scale": [1]}}, "neither looks up along"),
    "integer rows": ({"token_rows": {"count": [1]}}, "int32.* rows cannot be trained"),
    "too far": ({"token_rows": [ROWS]}, "asks for row 20 of 'embed', which has 20"),
    "bias of a table": (
        {"lora_bias": True, "targets": "embed"},
        "gives B a bias, which 'embed' cannot have: it is looked up",
    ),
    "bias and dora": ({"lora_bias": True, "dora": True}, "it is DoRA. Leave one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_plans_that_cannot_be(unrolled, case):
    config, message = REFUSED[case]
    with pytest.raises(PlanError, match=message):
        make(unrolled, **config)


def test_no_bias_at_all(unrolled):
    params, _, args = unrolled

    def fn(params, ids):
        return jnp.take(params["embed"], ids, axis=0) @ params["head"]["kernel"]

    less = {name: params[name] for name in ("embed", "head")}
    with pytest.raises(PlanError, match="`bias` = 'all' matched no parameter"):
        make((less, fn, args), "head/kernel", bias="all")


def test_several_tables():
    params = {"a": struct(5, D), "b": struct(7, D), "q": struct(D, D)}

    def fn(params, ids):
        x = jnp.take(params["a"], ids, axis=0) + jnp.take(params["b"], ids, axis=0)
        return x @ params["q"]

    model = params, fn, (struct(3, dtype=jnp.int32),)
    with pytest.raises(PlanError, match="does not say of which table.* looks up 2"):
        make(model, "q", token_rows=[1])
    assert make(model, "q", token_rows={"b": [6]}).slots[-1].ids == (6,)


def test_rules_that_disagree_in_a_stack(unrolled, scanned):
    rules = {r"layers/0/q/kernel": {"dora": True}, r".*/q/kernel": {}}
    kinds = [s.role.kind for s in make(unrolled, rules)]
    assert kinds == ["dora", "lora", "lora"]
    with pytest.raises(PlanError, match="disagree about `dora`.* share one array"):
        make(scanned, rules)


def test_a_part_of_stacks_within_stacks(key):
    params = {"w": struct(2, 3, D, D), "b": struct(2, 3, D)}

    def fn(params, x):
        def outer(x, p):
            return jax.lax.scan(lambda x, q: (x @ q["w"] + q["b"], None), x, p)

        return jax.lax.scan(outer, x, params)[0]

    model = params, fn, (struct(D),)
    assert len(beside(make(model, "w", whole="b"))) == 6
    with pytest.raises(PlanError, match="stacks within stacks, and only some"):
        make(model, "w", whole="0/.*/b|0/b")
