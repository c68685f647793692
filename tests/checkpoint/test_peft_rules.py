"""`LoraConfig.from_peft` and `.to_peft`; how PEFT's patterns match."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_fields import NAMES, TIED, fields, rules

import lorax_jax as lj
from lorax_jax import _peft
from lorax_jax._errors import CheckpointError, ConfigError


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
