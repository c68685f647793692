"""`init_lora_weights`: PEFT's names and options of initializers, and ours."""

import dataclasses

import pytest
from peft_fields import NAMES, fields

import lorax_jax as lj
from lorax_jax import _peft
from lorax_jax._errors import ConfigError
from lorax_jax._peft import _inits

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
