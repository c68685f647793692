"""What PEFT's configurations say beside factors: whole modules, biases, rows."""

import pytest
from peft_fields import NAMES, TIED, fields, rules

import lorax_jax as lj
from lorax_jax._errors import ConfigError
from lorax_jax._names import NameMap


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
