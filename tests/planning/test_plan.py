"""Selection, errors and the printed plan."""

import jax
import jax.numpy as jnp
import pytest

import lorax_jax as lj
from lorax_jax._errors import ConfigError, PlanError

LAYERS, D, F, ROWS = 3, 8, 12, 20


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def layer():
    return {
        "attn": {
            "q_proj": {"kernel": struct(D, D)},
            "v_proj": {"kernel": struct(D, D)},
        },
        "mlp": {"up": {"kernel": struct(D, F), "bias": struct(F)}},
        "down": {"kernel": struct(F, D)},
        "norm": {"scale": struct(D)},
    }


def block(p, x):
    x = x * p["norm"]["scale"][None, None]
    x = jnp.tanh(x @ p["attn"]["q_proj"]["kernel"]) + x @ p["attn"]["v_proj"]["kernel"]
    h = jnp.tanh(x @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"][None, None])
    return h @ p["down"]["kernel"]


@pytest.fixture
def unrolled():
    params = {"embed": struct(ROWS, D), "head": struct(D, ROWS), "dead": struct(D, D)}
    params["layers"] = {str(i): layer() for i in range(LAYERS)}

    def fn(params, ids):
        x = jnp.take(params["embed"], ids, axis=0)
        for i in range(LAYERS):
            x = block(params["layers"][str(i)], x)
        return x @ params["head"], x

    return params, fn, (struct(2, 5, dtype=jnp.int32),)


@pytest.fixture
def scanned(unrolled):
    params, _, args = unrolled
    stacked = jax.tree.map(lambda x: struct(LAYERS, *x.shape), layer())

    def fn(params, ids):
        x = jnp.take(params["embed"], ids, axis=0)
        x, _ = jax.lax.scan(lambda x, p: (block(p, x), None), x, params["layers"])
        return x @ params["head"], x

    return params | {"layers": stacked}, fn, args


def make(config, model, **kwargs):
    params, fn, args = model
    return lj.plan(config, params, fn, args, **kwargs)


def summary(plan):
    return {s.path: (s.shape, s.rank, s.alpha, s.scale, s.rule) for s in plan}


def test_scanned_and_unrolled_models_read_alike(unrolled, scanned):
    config = lj.LoraConfig(
        {r"layers/1/attn/.*": {"rank": 4, "alpha": 8}, "all-linear": {}}, rank=2
    )
    plans = [make(config, model) for model in (unrolled, scanned)]
    assert summary(plans[0]) == summary(plans[1])
    assert plans[0].trainable == plans[1].trainable
    assert [s.rank for s in plans[0]].count(4) == 2 and len(plans[0]) == 4 * LAYERS


def test_all_linear_leaves_out_head_embedding_biases_and_norms(unrolled):
    plan = make(lj.LoraConfig("all-linear"), unrolled)
    kernels = {s.path.split("/", 2)[2] for s in plan}
    assert kernels == {
        "attn/q_proj/kernel",
        "attn/v_proj/kernel",
        "mlp/up/kernel",
        "down/kernel",
    }


def test_a_head_is_known_by_its_rows_and_not_by_its_name(unrolled):
    """The product that reaches the result with as many outputs as a table has rows."""
    params, fn, args = unrolled

    def no_head(params, ids):  # the same weight, with another behind it
        logits, _ = fn(params, ids)
        return logits @ params["back"]

    params = params | {"back": struct(ROWS, D)}
    plan = lj.plan(lj.LoraConfig("all-linear"), params, no_head, args)
    assert {"head", "back"} <= {s.path for s in plan}


def test_none_takes_query_and_value_where_the_names_are_known(unrolled):
    plan = make(lj.LoraConfig(), unrolled)
    assert {s.path.split("/")[-2] for s in plan} == {"q_proj", "v_proj"}


def test_none_lists_candidates_where_they_are_not():
    with pytest.raises(PlanError, match="(?s)`targets` is None.*candidates  w\n"):
        lj.plan(
            lj.LoraConfig(),
            {"w": struct(D, F)},
            lambda p, x: x @ p["w"],
            (struct(2, D),),
        )


def test_exclude_layers_and_order(unrolled, scanned):
    config = lj.LoraConfig(".*/kernel", exclude=".*/mlp/.*", layers=[0, 2])
    for model in (unrolled, scanned):
        paths = {s.path for s in make(config, model)}
        assert len(paths) == 3 * 2
        assert not [p for p in paths if "/mlp/" in p or p.startswith("layers/1/")]


def test_the_leaf_of_a_stack_can_be_named_whole(scanned):
    plan = make(lj.LoraConfig("layers/down/kernel"), scanned)
    assert [s.path for s in plan] == [f"layers/{i}/down/kernel" for i in range(LAYERS)]
    assert plan.slots[0].shape_a() == (LAYERS, F, 8)


def test_expect_pins_a_count(unrolled):
    make(lj.LoraConfig({".*/q_proj/kernel": {"expect": 3}}), unrolled)
    with pytest.raises(PlanError, match="matches 3 sites, and `expect` = 4"):
        make(lj.LoraConfig({".*/q_proj/kernel": {"expect": 4}}), unrolled)


@pytest.mark.parametrize(
    "pattern, hint",
    [
        ("attn/(q|v)_proj/kernel", r"LoraConfig\(targets=r'\.\*/attn"),
        (
            "(q|v)_proj",
            r"Paths end in the leaf:  LoraConfig\(targets=r'\.\*/\(q\|v\)_proj/k",
        ),
        (".*/q_porj/kernel", "closest  layers/./attn/q_proj/kernel"),
    ],
)
def test_a_pattern_that_matches_nothing_says_what_is_closest(unrolled, pattern, hint):
    with pytest.raises(PlanError, match=f"(?s)`targets` matched no parameter.*{hint}"):
        make(lj.LoraConfig(pattern), unrolled)


def test_a_rule_behind_others_that_take_everything(unrolled):
    with pytest.raises(PlanError, match="matches 3 sites, and rules before it take"):
        make(lj.LoraConfig([".*/kernel", ".*/q_proj/kernel"]), unrolled)


def test_a_rule_of_which_everything_is_excluded(unrolled):
    config = lj.LoraConfig(".*/q_proj/kernel", exclude=".*/attn/.*")
    with pytest.raises(PlanError, match="left out by `exclude`"):
        make(config, unrolled)


@pytest.mark.parametrize(
    "path, reason",
    [
        ("dead", "nothing reads it"),
        ("layers/0/mlp/up/bias", "only add reads it"),
        ("layers/0/norm/scale", "only mul reads it"),
    ],
)
def test_leaves_that_no_product_uses(unrolled, path, reason):
    with pytest.raises(PlanError, match=f"(?s){path}.*no product or lookup.*{reason}"):
        make(lj.LoraConfig(path), unrolled)


def test_a_stacked_bias_is_no_matmul_weight(scanned):
    with pytest.raises(PlanError, match="only add reads it"):
        make(lj.LoraConfig("layers/mlp/up/bias"), scanned)


def test_a_rank_larger_than_the_matrix(unrolled):
    with pytest.raises(PlanError, match="`rank` = 9 exceeds 8, the rank that"):
        make(lj.LoraConfig(".*/down/kernel", rank=9), unrolled)


def tied(params, ids):
    x = jnp.take(params["embed"], ids, axis=0)
    return jnp.tanh(x @ params["w"]) @ params["embed"].T


TIED = (
    {"embed": struct(ROWS, D), "w": struct(D, D)},
    tied,
    (struct(2, 5, dtype=jnp.int32),),
)


def test_a_tie_must_be_decided():
    with pytest.raises(
        PlanError, match="(?s)'embed' of shape .* is tied.*'tie': 'head'"
    ):
        make(lj.LoraConfig("embed"), TIED)


@pytest.mark.parametrize(
    "tie, name, inputs, lookup",
    [
        ("shared", "embed", (0,), True),
        ("lookup", "embed@lookup", (0,), True),
        ("head", "embed@head", (1,), False),
    ],
)
def test_ties(tie, name, inputs, lookup):
    (slot,) = make(lj.LoraConfig({"embed": {"tie": tie}}), TIED).slots
    assert (slot.name, slot.role.inputs, slot.role.lookup) == (name, inputs, lookup)


@pytest.mark.parametrize("tie", ["lookup", "head"])
def test_a_tie_that_is_none(tie):
    """Of a rule it means each of its weights, of the configuration one of them."""
    with pytest.raises(
        PlanError,
        match=f"'w.embed' adapts one .* `tie` = '{tie}', and 'w' is multiplied by, at",
    ):
        make(lj.LoraConfig({"w|embed": {"tie": tie}}), TIED)
    with pytest.raises(PlanError, match="none of the 1 targets is tied: 'w' is mult"):
        make(lj.LoraConfig("w", tie=tie), TIED)
    assert len(make(lj.LoraConfig(["w", "embed"], tie=tie), TIED)) == 2
    untied = TIED[0], lambda p, ids: p["embed"][ids] @ p["w"], TIED[2]
    with pytest.raises(PlanError, match="'embed' is looked up and never multiplied by"):
        make(lj.LoraConfig({"embed": {"tie": tie}}), untied)
    # "shared" is the weight itself, whichever uses it has.
    assert len(make(lj.LoraConfig({"embed": {"tie": "shared"}}), untied)) == 1


def test_all_linear_leaves_a_tied_head_alone():
    assert [s.path for s in make(lj.LoraConfig("all-linear"), TIED)] == ["w"]


def test_a_weight_that_is_multiplied_in_two_ways():
    params, x = {"w": struct(D, D)}, struct(2, D)
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T  # noqa: E731
    with pytest.raises(
        PlanError, match="(?s)multiplied in several ways.*'tie': 'shared'"
    ):
        lj.plan(lj.LoraConfig("w"), params, fn, (x,))
    (site,) = lj.plan(lj.LoraConfig("w", tie="shared"), params, fn, (x,))
    assert site.role.inputs == (0,)


def test_a_weight_under_stop_gradient_is_warned_about():
    fn = lambda p, x: x @ jax.lax.stop_gradient(p["w"])  # noqa: E731
    with pytest.warns(UserWarning, match="'w' goes through `stop_gradient`"):
        lj.plan(lj.LoraConfig("w"), {"w": struct(D, D)}, fn, (struct(2, D),))


def test_an_axis_with_two_roles():
    def fn(p, x):  # heads run in parallel, sizes are summed: of one axis of the leaf
        return jnp.einsum("bhs,hsf->bhf", x, p["w"].reshape(2, 4, F))

    with pytest.raises(
        PlanError, match="axis 0 is split, and its parts have the roles"
    ):
        lj.plan(lj.LoraConfig("w"), {"w": struct(D, F)}, fn, (struct(2, 2, 4),))


def test_roles_can_be_declared():
    declared = {"w": {"inputs": (1,), "outputs": (0,)}}
    params = {"w": struct(D, F), "v": struct(D, F)}
    (site,) = lj.plan(lj.LoraConfig("w", rank=2), params, roles=declared)
    assert site.role.inputs == (1,)
    with pytest.raises(PlanError, match="`roles` names 'x', which is no leaf"):
        lj.plan(lj.LoraConfig("w"), params, roles={"x": {}})
    with pytest.raises(PlanError, match="must give each of the 2 axes"):
        lj.plan(lj.LoraConfig("w"), params, roles={"w": {"inputs": (0,)}})
    with pytest.raises(PlanError, match="no product or lookup of the function"):
        lj.plan(lj.LoraConfig("v"), params, roles=declared)


def test_a_function_or_roles_are_needed():
    with pytest.raises(PlanError, match="`plan` needs `fn`"):
        lj.plan(lj.LoraConfig("w"), {"w": struct(D, F)})


def test_an_unknown_initializer():
    with pytest.raises(PlanError, match="`init` = 'pizza' is no initializer. Known"):
        lj.plan(lj.LoraConfig("w", init="pizza"), {"w": struct(D, F)}, roles={})


def test_the_table(scanned):
    config = lj.LoraConfig(
        {r"layers/1/.*_proj/kernel": {"rank": 4}, "all-linear": {}}, rank=2
    )
    text = str(make(config, scanned))
    lines = text.splitlines()
    assert lines[0].split() == [
        *("weight", "sites", "shape", "in", "->", "out", "rank", "alpha", "scale"),
        "trainable",
    ]
    row = next(line for line in lines if line.startswith("layers/{0..2}/mlp/up/kernel"))
    assert row.split()[1:] == [
        "3",
        "8",
        "x",
        "12",
        "0",
        "->",
        "1",
        "2",
        "2",
        "1",
        "120",
    ]
    assert any(line.startswith("layers/{0,2}/attn/q_proj") for line in lines)
    assert "   2 sites by  layers/1/.*_proj/kernel" in lines
    assert "12 sites" in lines[-1] and "adapter" in lines[-1]


def test_memory_counts_padded_arrays(scanned):
    config = lj.LoraConfig(
        {r"layers/1/down/kernel": {"rank": 4}, "layers/down/kernel": {}}, rank=2
    )
    plan = make(config, scanned)
    assert plan.trainable == (2 + 4 + 2) * (F + D)
    assert plan.memory().adapter == 4 * 3 * 4 * (F + D)
    assert plan.memory(optimizer_copies=1).optimizer == plan.memory().adapter
    assert plan.total == plan.base + plan.trainable


def test_one_leaf_of_two_stacked_axes():
    """A scan over a scan: both stacks get virtual paths."""
    params = {"outer": {"inner": {"w": struct(2, 3, D, D), "v": struct(2, 3, D, D)}}}

    def fn(params, x):
        def body(x, p):
            x = jnp.tanh(x @ p["w"]) @ p["v"]
            return x, None

        def group(x, p):
            return jax.lax.scan(body, x, p["inner"])[0], None

        return jax.lax.scan(group, x, params["outer"])[0]

    plan = lj.plan(lj.LoraConfig("outer/inner/w", rank=2), params, fn, (struct(4, D),))
    assert len(plan) == 6 and plan.slots[0].shape_a() == (2, 3, D, 2)
    assert len({s.path for s in plan}) == 6


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"targets": "(["}, "which is not a regex"),
        ({"targets": []}, "`targets` is empty"),
        ({"targets": 3}, "is neither a regex, a list"),
        ({"targets": [3]}, "holds 3, which is not a regex string"),
        ({"targets": {"w": 3}}, "is not a dict of overrides"),
        ({"targets": {"w": {"rnak": 3}}}, "overrides 'rnak'.*Closest: 'rank'"),
        ({"targets": {"w": {"rank": 0}}}, "a rank is an integer from 1 up"),
        ({"targets": {"w": {"tie": "no"}}}, "one of 'shared', 'lookup', 'head'"),
        ({"rank": 0}, "`rank` = 0"),
        ({"rank": 2.0}, "`rank` = 2.0"),
        ({"alpha": float("nan")}, "alpha is a finite number"),
        ({"dropout": 1.0}, "`dropout` = 1.0"),
        ({"exclude": "*"}, "`exclude` holds"),
        ({"layers": [-1]}, "layer indices are integers"),
        ({"dtype": jnp.int8}, "cannot hold trainable factors"),
        ({"tie": "both"}, "`tie` = 'both'"),
        ({"bias": "some"}, "`bias` = 'some'; one of 'none', 'all', 'lora_only'"),
        ({"whole": "*"}, "`whole` holds"),
        ({"token_rows": {"*": [1]}}, "`token_rows` holds"),
        ({"token_rows": [-1]}, "`token_rows` holds -1"),
        ({"token_rows": ["a"]}, "`token_rows` holds 'a'"),
        ({"token_rows": "12"}, "`token_rows` holds '12'"),
        ({"token_rows": [True]}, "`token_rows` holds True"),
        ({"token_rows": [3, 3]}, "names a row twice"),
    ],
)
def test_configurations_that_cannot_be(kwargs, match):
    with pytest.raises(ConfigError, match=match):
        lj.LoraConfig(**kwargs)


def test_configurations_are_hashable_data():
    one = lj.LoraConfig({"w": {"rank": 2}}, exclude=["a"], layers=[1, 2])
    two = lj.LoraConfig({"w": {"rank": 2}}, exclude=("a",), layers=(1, 2))
    assert one == two and hash(one) == hash(two)
    assert lj.LoraConfig(rank=4).scale(4, 8) == 2.0
    assert lj.LoraConfig(rslora=True).scale(4, 8) == 4.0
