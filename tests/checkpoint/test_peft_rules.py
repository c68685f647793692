"""`LoraConfig.from_peft` and `.to_peft`; how PEFT's patterns match."""

import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorax_jax as lj
from lorax_jax import _peft
from lorax_jax._errors import CheckpointError, ConfigError
from lorax_jax._names import NameMap
from lorax_jax._peft import _inits

NAMES = NameMap(
    (
        ("embed/embedding", "model.embed_tokens.weight", "same"),
        ("layers/{i}/attn/q/kernel", "model.layers.{i}.attn.q.weight", "linear"),
        ("layers/{i}/attn/q/bias", "model.layers.{i}.attn.q.bias", "same"),
        ("layers/{i}/attn/k/kernel", "model.layers.{i}.attn.k.weight", "linear"),
        ("layers/{i}/mlp/up/kernel", "model.layers.{i}.mlp.up.weight", "linear"),
        ("layers/{i}/norm/scale", "model.layers.{i}.norm.weight", "same"),
        ("lm_head/kernel", "lm_head.weight", "linear"),
    )
)
TIED = NameMap(NAMES.entries[:-1])


def fields(**changes):
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | changes


def rules(config):
    """Pattern -> what it overrides."""
    return {
        rule.pattern: {
            key: value
            for key in ("rank", "alpha", "tie")
            if (value := getattr(rule, key)) is not None
        }
        for rule in config.rules
    }


def test_a_list_of_suffixes():
    config = lj.LoraConfig.from_peft(fields(target_modules=["q", "mlp.up"]), NAMES)
    assert rules(config) == {
        r"layers/\d+/attn/q/kernel": {},
        r"layers/\d+/mlp/up/kernel": {},
    }
    assert (config.rank, config.alpha, config.rslora) == (4, 8, False)


def test_a_regex_takes_whole_names():
    config = lj.LoraConfig.from_peft(
        fields(target_modules=r".*layers\.[02]\..*\.q"), NAMES
    )
    assert rules(config) == {"layers/(?:0|2)/attn/q/kernel": {}}
    with pytest.raises(ConfigError, match="the targets q, which take no module"):
        lj.LoraConfig.from_peft(fields(target_modules="q"), NAMES)


def test_patterns_become_overrides_of_the_rules():
    config = lj.LoraConfig.from_peft(
        fields(
            target_modules=["q", "up"],
            rank_pattern={"layers.1.attn.q": 2, r"layers\.[0-9]\..*up": 16, "up": 32},
            alpha_pattern={"^model.layers.0.attn.q": 1, "attn.q": 3},
        ),
        NAMES,
    )
    assert rules(config) == {
        "layers/0/attn/q/kernel": {"alpha": 1},
        "layers/1/attn/q/kernel": {"rank": 2, "alpha": 3},
        r"layers/\d+/attn/q/kernel": {"alpha": 3},
        "layers/(?:0|1|2|3|4|5|6|7|8|9)/mlp/up/kernel": {"rank": 16},
        r"layers/\d+/mlp/up/kernel": {"rank": 32},
    }


def test_layers_and_exclusions():
    config = lj.LoraConfig.from_peft(
        fields(
            target_modules=["q", "k", "model.layers.5.attn.k"],
            exclude_modules=["layers.1.attn.k"],
            layers_to_transform=[1, 3],
        ),
        NAMES,
    )
    # An entry that is a whole name is not narrowed by `layers_to_transform`.
    assert rules(config) == {
        "layers/(?:1|3)/attn/q/kernel": {},
        "layers/(?:3|5)/attn/k/kernel": {},
    }
    one = fields(target_modules=["q"], layers_to_transform=2, layers_pattern="layers")
    assert list(rules(lj.LoraConfig.from_peft(one, NAMES))) == [
        "layers/2/attn/q/kernel"
    ]
    with pytest.raises(ConfigError, match="take no module"):
        lj.LoraConfig.from_peft(one | {"layers_pattern": ["blocks"]}, NAMES)


def test_all_linear():
    config = lj.LoraConfig.from_peft(
        fields(
            target_modules="All-Linear",
            rank_pattern={"layers.0.attn.q": 2},
            exclude_modules=["k"],
        ),
        NAMES,
    )
    assert rules(config) == {"layers/0/attn/q/kernel": {"rank": 2}, "all-linear": {}}
    assert config.exclude == (r"layers/\d+/attn/k/kernel",)


def test_what_else_is_read():
    config = lj.LoraConfig.from_peft(
        fields(use_rslora=True, lora_dropout=0.1, init_lora_weights="Gaussian"), NAMES
    )
    assert config.rules is None and config.rslora
    assert (config.dropout, config.init) == (0.1, "gaussian")
    for said, init in ((True, True), (False, False), (None, True), ("olora", "olora")):
        config = lj.LoraConfig.from_peft(fields(init_lora_weights=said), NAMES)
        assert config.init == init
    config = lj.LoraConfig.from_peft({"peft_type": "LORA"}, NAMES)
    assert (config.rank, config.alpha) == (8, 8)


@pytest.mark.parametrize(
    ("targets", "ensure", "tie"),
    [
        (["embed_tokens", "q"], False, "lookup"),
        (["lm_head", "q"], False, "head"),
        (["embed_tokens", "q"], True, "shared"),
        (["embed_tokens", "lm_head", "q"], True, "shared"),
    ],
)
def test_ties(targets, ensure, tie):
    given = fields(target_modules=targets, ensure_weight_tying=ensure)
    config = lj.LoraConfig.from_peft(given, TIED)
    assert rules(config) == {
        "layers/\\d+/attn/q/kernel": {},
        "embed/embedding": {"tie": tie},
    }
    again = lj.LoraConfig.from_peft(config.to_peft(TIED), TIED)
    assert rules(again) == rules(config)


def test_two_adapters_of_one_weight_are_refused():
    given = fields(target_modules=["embed_tokens", "lm_head"])
    with pytest.raises(ConfigError, match="separately, and they are one weight"):
        lj.LoraConfig.from_peft(given, TIED)
    assert len(lj.LoraConfig.from_peft(given, NAMES).rules) == 2


def test_a_folder(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(fields(target_modules=["q"]))
    )
    assert len(lj.LoraConfig.from_peft(tmp_path, NAMES).rules) == 1
    with pytest.raises(CheckpointError, match="cannot be read"):
        lj.LoraConfig.from_peft(tmp_path / "nowhere", NAMES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_modules": ["q", "typo"]}, "the targets typo, which take no module"),
        ({"target_modules": ["kernel"]}, "Closest: .*"),
        ({"target_modules": []}, r"the targets \(none\), which take no module"),
        (
            {"target_modules": ["q"], "exclude_modules": ["q"]},
            "the targets q, which take no module",
        ),
        (
            {"target_modules": ["q"], "rank_pattern": {"k": 2}},
            "`rank_pattern` 'k', which takes no adapted module",
        ),
        (
            {"target_modules": ["q"], "alpha_pattern": {"typo": 2}},
            "`alpha_pattern` 'typo', which takes no adapted module",
        ),
    ],
)
def test_what_takes_nothing(given, message):
    with pytest.raises(ConfigError, match=message):
        lj.LoraConfig.from_peft(fields(**given), NAMES)


def test_to_peft_writes_every_field():
    found = lj.LoraConfig(r"layers/\d+/attn/.*kernel", rank=4, alpha=8).to_peft(NAMES)
    assert set(found) == set(_peft.DEFAULTS) and list(found) == sorted(found)
    assert found["target_modules"] == ["k", "q"]
    assert found["inference_mode"] is False and found["peft_version"] == "0.21.2"
    assert (found["r"], found["lora_alpha"]) == (4, 8)


def test_to_peft_of_rules():
    config = lj.LoraConfig(
        {
            "layers/1/attn/q/kernel": {"rank": 2, "alpha": 1.5},
            r"layers/attn/q/kernel": {},  # the path of a stacked leaf
            r".*/up/kernel": {"rank": 6},
        },
        rank=4,
        alpha=8,
        rslora=True,
        dropout=0.1,
    )
    found = config.to_peft(NAMES)
    assert found["target_modules"] == ["q", "up"]
    assert found["rank_pattern"] == {"layers.1.attn.q": 2, "up": 6}
    assert found["alpha_pattern"] == {"layers.1.attn.q": 1.5}
    assert found["use_rslora"] is True and found["lora_dropout"] == 0.1


def test_to_peft_of_some_layers():
    found = lj.LoraConfig(".*/q/kernel", layers=[0, 2]).to_peft(NAMES)
    assert found["target_modules"] == ["layers.0.attn.q", "layers.2.attn.q"]
    found = lj.LoraConfig(".*/q/kernel", exclude=".*/1/.*", rank=4).to_peft(NAMES)
    assert len(found["target_modules"]) == _peft.LAYERS - 1


def test_to_peft_of_all_linear():
    found = lj.LoraConfig(
        {".*/up/kernel": {"rank": 2}, "all-linear": {}}, exclude=".*/k/.*", rank=4
    ).to_peft(NAMES)
    assert found["target_modules"] == "all-linear"
    assert found["rank_pattern"] == {"up": 2} == found["alpha_pattern"]
    assert found["exclude_modules"] == ["k"]


def test_to_peft_without_targets():
    assert lj.LoraConfig(rank=4).to_peft(NAMES)["target_modules"] is None


# Ours, and PEFT's.
STARTS = {
    True: True,
    False: False,
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "pissa": "pissa",
    "pissa_niter_4": "pissa_niter_4",
    "olora": "olora",
    "mica": "mica",
    "eva": "eva",
    "corda_ipm": "corda",
    "corda_kpm": "corda",
    "lora_ga": "lora_ga",
}


@pytest.mark.parametrize("init", STARTS)
def test_starts(init):
    for targets in (".*/q/kernel", None):
        found = lj.LoraConfig(targets, init=init).to_peft(NAMES)
        assert found["init_lora_weights"] == STARTS[init]
        assert lj.LoraConfig.from_peft(found, NAMES).init == init
    names = {"eva", "corda", "lora_ga"}
    said = {name for name in names if found[f"{name}_config"] is not None}
    assert said == names & {STARTS[init]}


def test_starts_of_several_names():
    for init, theirs in (("kaiming", True), ("random", False)):
        found = lj.LoraConfig(".*/q/kernel", init=init).to_peft(NAMES)
        assert found["init_lora_weights"] is theirs
    rules = {".*/q/kernel": {"init": "kaiming"}, ".*/k/kernel": {"init": True}}
    assert lj.LoraConfig(rules).to_peft(NAMES)["init_lora_weights"] is True


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"init_lora_weights": "loftq"}, "replaces the base by a quantized one"),
        ({"init_lora_weights": "EVA"}, "which PEFT does not know"),
        (
            {"init_lora_weights": "corda", "corda_config": {"corda_method": "x"}},
            "'ipm' or 'kpm' is meant",
        ),
        (
            {"init_lora_weights": "corda", "corda_config": {"method": "kpm"}},
            "'method', which is no option",
        ),
        (
            {"init_lora_weights": "eva", "eva_config": {"whiten": 3}},
            "a `eva_config` that cannot be",
        ),
        ({"init_lora_weights": "eva", "eva_config": 3}, "with 3, which is no option"),
    ],
)
def test_starts_that_are_not_known(said, match):
    with pytest.raises(ConfigError, match=match):
        lj.LoraConfig.from_peft(fields(**said), NAMES)


def test_how_statistics_were_gathered_is_no_part_of_the_start():
    eva = {"rho": 1.5, "tau": 0.9, "use_label_mask": False}
    said = fields(init_lora_weights="eva", eva_config=eva)
    assert lj.LoraConfig.from_peft(said, NAMES).init == "eva"


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Options as an initializer may have them."""

    direction: str = "ArB2r"
    gamma: int = 16

    def __post_init__(self):
        if self.gamma <= 0:
            raise ValueError("gamma is above 0")


def test_options_that_peft_lacks():
    config = lj.LoraConfig(".*/q/kernel", init=Gradients())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="which of PEFT's they are is not known"):
        config.to_peft(NAMES)


def test_starts_with_options(monkeypatch):
    options = _peft.Options(
        Gradients,
        lambda theirs: Gradients(theirs["direction"], theirs["stable_gamma"]),
        lambda ours: {"direction": ours.direction, "stable_gamma": ours.gamma},
    )
    monkeypatch.setattr(_inits, "_OPTIONS", {})
    _peft.register_options("lora_ga", options)
    init = Gradients("ArBr", 9)
    found = lj.LoraConfig(".*/q/kernel", init=init).to_peft(NAMES)
    assert found["init_lora_weights"] == "lora_ga"
    assert found["lora_ga_config"] == {
        "direction": "ArBr",
        "scale": "stable",
        "stable_gamma": 9,
    }
    assert lj.LoraConfig.from_peft(found, NAMES).init == init
    found["lora_ga_config"]["stable_gamma"] = -1
    with pytest.raises(ConfigError, match="cannot be: gamma is above 0"):
        lj.LoraConfig.from_peft(found, NAMES)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lj.LoraConfig("nothing"), "nothing take no path of `names`. Closest: "),
        (
            lj.LoraConfig({".*/q/kernel": {"dropout": 0.1}, ".*/k/kernel": {}}),
            r"`dropout` the values \['0.0', '0.1'\]; PEFT has one",
        ),
        (
            lj.LoraConfig({".*/q/kernel": {"init": "gaussian"}, ".*/k/kernel": {}}),
            "`init` the values",
        ),
        (
            lj.LoraConfig({"lm_head/kernel": {}, "all-linear": {}}),
            "'all-linear' cannot be combined with lm_head",
        ),
        (
            lj.LoraConfig("all-linear", layers=[1]),
            "'all-linear' cannot be combined with `layers`",
        ),
    ],
)
def test_what_peft_cannot_say(config, message):
    with pytest.raises(ConfigError, match=message):
        config.to_peft(NAMES)


def test_a_tied_embedding_needs_its_tie():
    with pytest.raises(ConfigError, match="which the head shares. Say which use"):
        lj.LoraConfig("embed/embedding").to_peft(TIED)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_there_and_back(data):
    """What a configuration adapts survives both ways."""
    pick = {}
    for leaf in ("attn/q", "attn/k", "mlp/up"):
        if data.draw(st.booleans()):
            layers = data.draw(st.sampled_from([r"\d+", "[0-3]", "1", r"\d"]))
            over = data.draw(
                st.fixed_dictionaries(
                    {}, optional={"rank": st.integers(1, 9), "alpha": st.integers(0, 9)}
                )
            )
            pick[f"layers/{layers}/{leaf}/kernel"] = over
    if not pick:
        return
    config = lj.LoraConfig(
        pick, rank=4, alpha=data.draw(st.sampled_from([None, 3, 2.5]))
    )
    again = lj.LoraConfig.from_peft(config.to_peft(NAMES), NAMES)

    def adapted(config):
        found = {}
        for module in NAMES.expand(40):
            for rule in map(config.resolve, config.rules):
                if rule.matches(module.path):
                    found[module.path] = rule.rank, rule.alpha
                    break
        return found

    assert adapted(again) == adapted(config)


# --- The rules themselves -------------------------------------------------------------

MODULES = ["a.q", "a.b.q", "a.xq", "a.b.c", "h.1.q", "h.11.q", "q", "h.1.b.q"]


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(MODULES), st.integers(1, 3), min_size=1))
def test_condensed_patterns_give_every_module_its_value(values):
    default = 2
    found = _peft.condense(values, default)
    ranks = _peft.Ranks({"r": default, "rank_pattern": found}, "it")
    for module, value in values.items():
        assert ranks(module)[0] == value
        # As PEFT itself looks it up.
        keys = (key for key in found if re.match(rf"(.*\.)?({key})$", module))
        assert found.get(next(keys, None), default) == value


def test_names_that_are_no_regexes_are_escaped():
    values = {"a.b": 1, "axb": 2, "(c": 3, "d+": 2}
    found = _peft.condense(values, 2)
    ranks = _peft.Ranks({"r": 2, "rank_pattern": found}, "it")
    assert {name: ranks(name)[0] for name in values} == values


@settings(max_examples=200, deadline=None)
@given(st.sets(st.sampled_from(MODULES), min_size=1))
def test_exact_targets_take_exactly_their_modules(modules):
    modules, others = sorted(modules), set(MODULES) - modules
    written = _peft.exact_targets(modules, others)
    chosen = _peft.Targets({"target_modules": written}, "it")
    assert [name for name in MODULES if chosen(name)] == [
        name for name in MODULES if name in modules
    ]


def test_the_first_pattern_wins_and_scale_follows_the_rank():
    config = {"r": 8, "lora_alpha": 16, "rank_pattern": {"q": 4, "b.q": 2}}
    ranks = _peft.Ranks(config, "it")
    assert ranks("a.b.q") == (4, 16, 4.0)
    assert ranks("a.k") == (8, 16, 2.0)
    assert _peft.Ranks(config | {"use_rslora": True}, "it")("a.q") == (4, 16, 8.0)


# --- What is trained beside factors ---------------------------------------------------


def beside(names=NAMES, **changes):
    """What `from_peft` says beside targets, and that `to_peft` says it again."""
    target = {"target_modules": ["q"]}
    config = lj.LoraConfig.from_peft(fields(**target | changes), names)
    again = lj.LoraConfig.from_peft(config.to_peft(names), names)
    assert again == config
    return config


def test_kinds():
    assert beside(use_dora=True).dora and not beside().dora
    assert beside(lora_bias=True).lora_bias


def test_modules_that_are_saved():
    assert beside(modules_to_save=["lm_head"]).whole == ("lm_head/kernel",)
    assert beside(modules_to_save=["norm"]).whole == (r"layers/\d+/norm/scale",)
    both = beside(modules_to_save=["layers.1.norm", "layers.3.norm"])
    assert both.whole == ("layers/(?:1|3)/norm/scale",)
    # A module that holds others, with every leaf of theirs.
    assert beside(modules_to_save=["layers.2.mlp"]).whole == ("layers/2/mlp/up/kernel",)


def test_entries_match_endings_and_not_components():
    """PEFT asks `path.endswith(entry)`: `orm` takes `norm`, and `p` takes `up`."""
    assert beside(modules_to_save=["orm"]).whole == (r"layers/\d+/norm/scale",)
    found = beside(modules_to_save=["p"])
    assert found.whole == (r"layers/\d+/mlp/up/kernel",)
    # What adapts leaves out what is saved, by components of its name.
    config = fields(target_modules=["q", "up"], modules_to_save=["mlp"])
    assert rules(lj.LoraConfig.from_peft(config, NAMES)) == {
        r"layers/\d+/attn/q/kernel": {}
    }


def test_saved_modules_that_are_not_there():
    with pytest.raises(ConfigError, match="has 'score' in `modules_to_save`, which"):
        beside(modules_to_save=["score"])
    # But those that a task adds need not be.
    assert beside(modules_to_save=["score"], task_type="SEQ_CLS").whole == ()
    assert beside(task_type="QUESTION_ANS").whole == ()


def test_biases():
    assert beside(bias="all").bias == "all"
    assert beside(bias="lora_only").bias == "lora_only"
    # Where the model has none of them, PEFT trains none.
    assert beside(bias="lora_only", target_modules=["k"]).bias == "none"
    bare = NameMap(tuple(e for e in NAMES.entries if not e[0].endswith("bias")))
    assert beside(bare, bias="all").bias == "none"


def test_rows():
    # The table that the name table tells, by its path; a head has rows too.
    assert beside(trainable_token_indices=[3, 1]).token_rows == (
        ("embed/embedding", (1, 3)),
    )
    rows = {"lm_head": [2], "embed_tokens": [1]}
    assert dict(beside(trainable_token_indices=rows).token_rows) == {
        "lm_head/kernel": (2,),
        "embed/embedding": (1,),
    }
    assert beside(TIED, trainable_token_indices=[3]).token_rows == (
        ("embed/embedding", (3,)),
    )
    both = {"lm_head": [2], "embed_tokens": [2]}
    assert len(beside(TIED, trainable_token_indices=both).token_rows) == 1
    with pytest.raises(ConfigError, match="and the two are one table"):
        beside(TIED, trainable_token_indices={"lm_head": [2]})
    unknown = NameMap([("q", "q.weight", "linear"), ("t", "t.weight", "same")])
    assert beside(unknown, trainable_token_indices=[3]).token_rows == ((None, (3,)),)
    with pytest.raises(ConfigError, match="for 'wte', which takes no module"):
        beside(trainable_token_indices={"wte": [2]})


def test_a_tied_table_that_is_saved():
    ensured = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    assert beside(TIED, **ensured).whole == ("embed/embedding",)
    ensured["modules_to_save"] = ["lm_head"]
    found = lj.LoraConfig.from_peft(fields(target_modules=["q"], **ensured), TIED)
    assert found.whole == ("embed/embedding",)
    for name in ("embed_tokens", "lm_head"):
        with pytest.raises(ConfigError, match="trains one use of .* whole"):
            beside(TIED, modules_to_save=[name])
    with pytest.raises(ConfigError, match="by `use_dora` magnitudes for each"):
        beside(
            TIED,
            target_modules=["embed_tokens"],
            ensure_weight_tying=True,
            use_dora=True,
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"whole": "layers/0/attn/q/bias"}, r"of 'model.layers.0.attn.q' only a part"),
        ({"whole": "nrom"}, "`whole` names 'nrom', which takes no path"),
        ({"token_rows": {"wte": [1]}}, "`token_rows` names 'wte', which takes no path"),
        (
            {"targets": {"embed/.*": {}}, "token_rows": {"embed/.*": [1]}},
            "has factors and trained rows",
        ),
        (
            {"targets": {".*/q/kernel": {"dora": True}, ".*/k/kernel": {}}},
            "give `dora` the values",
        ),
    ],
)
def test_what_to_peft_cannot_say(config, message):
    with pytest.raises(ConfigError, match=message):
        lj.LoraConfig(**{"targets": ".*/q/kernel"} | config).to_peft(NAMES)


def test_names_that_end_in_others():
    names = NameMap(
        [
            ("q", "q.weight", "linear"),
            ("head", "head.weight", "linear"),
            ("aux", "aux_head.weight", "linear"),
        ]
    )
    with pytest.raises(ConfigError, match="every module whose name ends in an entry"):
        lj.LoraConfig("q", whole="head").to_peft(names)
    assert lj.LoraConfig("q", whole="aux").to_peft(names)["modules_to_save"] == [
        "aux_head"
    ]
