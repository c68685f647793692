"""Every rule by which PEFT selects modules, on a live model, and what we make of it."""

import pytest
import twins
from hypothesis import given, settings
from hypothesis import strategies as st

import lorax_jax as lj
from lorax_jax import _peft
from lorax_jax._errors import ConfigError, LoraxError
from lorax_jax._peft._from_peft import USUAL
from lorax_jax.models._config import FAMILIES

L0 = "model.layers.0."

# What is asked for, as fields of PEFT's configuration: both adapt the same modules at
# the same ranks and scales, and PEFT does so again with what `to_peft` makes of it.
SAME = {
    # A list: whole names, or what follows a dot.
    "suffix": {"target_modules": ["q_proj"]},
    "suffix of two parts": {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
    "whole name": {"target_modules": [f"{L0}mlp.up_proj"]},
    "head by its whole name": {"target_modules": ["lm_head", "q_proj"]},
    "more than 20 entries": {
        "target_modules": [
            f"model.layers.{i}.{m}"
            for i in range(3)
            for m in (
                *(f"self_attn.{x}_proj" for x in "qkvo"),
                *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
            )
        ]
    },
    # A string: a regex of the whole name.
    "regex": {"target_modules": r".*\.(q|v)_proj"},
    "regex of layers": {"target_modules": r"model\.layers\.[02]\.mlp\..*_proj"},
    # What is left out.
    "excluded suffix": {
        "target_modules": ["q_proj", "k_proj"],
        "exclude_modules": ["layers.1.self_attn.q_proj"],
    },
    "excluded whole name": {
        "target_modules": ["q_proj"],
        "exclude_modules": [f"{L0}self_attn.q_proj"],
    },
    "excluded regex": {
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": r".*layers\.[02]\.self_attn.*",
    },
    "excluded in vain by a container": {
        "target_modules": ["q_proj", "up_proj"],
        "exclude_modules": ["mlp", "k_proj"],
        "_ours": {"exclude_modules": ["k_proj"]},
    },
    "inside what is saved": {
        "target_modules": ["q_proj", "up_proj"],
        "modules_to_save": ["mlp"],
    },
    "inside what is saved in one layer": {
        "target_modules": ["q_proj", "up_proj"],
        "modules_to_save": ["layers.1.mlp"],
    },
    "what is saved is a regex": {
        "target_modules": ["q_proj", "up_proj"],
        "modules_to_save": ["layers.0.mlp", "lm_head"],
    },
    # Layers.
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layer zero": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "no layers are all": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "a whole name escapes layers": {
        "target_modules": ["q_proj", f"{L0}mlp.up_proj"],
        "layers_to_transform": [2],
    },
    "pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "patterns": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": ["h", "layers"],
    },
    "an empty pattern is none": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "",
    },
    # "all-linear".
    "all-linear": {"target_modules": "all-linear"},
    "all-linear in capitals": {"target_modules": "All-Linear"},
    "all-linear without some": {
        "target_modules": "all-linear",
        "exclude_modules": ["k_proj", f"{L0}mlp.up_proj"],
    },
    "all-linear by regex without some": {
        "target_modules": "all-linear",
        "exclude_modules": r".*mlp.*",
        "rank_pattern": {"q_proj": 2},
    },
    "all-linear beside what is saved": {
        "target_modules": "all-linear",
        "modules_to_save": ["layers.2.mlp", "lm_head"],
    },
    "all-linear of Conv1D": {"_family": "gpt2", "target_modules": "all-linear"},
    # Nothing said: query and value.
    "default": {},
    "default of gpt2": {"_family": "gpt2"},
    "default, tied": {"_family": "tied"},
    "default ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9}},
    "default layers": {"layers_to_transform": [1]},
    "default without some": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    # Ranks and alphas.
    "the first pattern wins": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.q_proj": 3},
    },
    "the first pattern wins, turned": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 3, "q_proj": 2},
    },
    "an anchored pattern": {
        "target_modules": ["q_proj"],
        "rank_pattern": {f"^{L0}self_attn.q_proj": 3},
    },
    "a pattern of several": {
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"q_proj|up_proj": 3},
        "alpha_pattern": {r"layers\.[12]\..*_proj": 5},
    },
    "rank alone rescales": {
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"q_proj": 2},
        "use_rslora": True,
    },
    "alpha alone": {
        "target_modules": ["q_proj", "k_proj"],
        "alpha_pattern": {"k_proj": 2.5},
    },
    # Bare parameters.
    "a parameter": {"target_modules": [], "target_parameters": ["up_proj.weight"]},
    "a parameter by its whole name": {
        "target_modules": ["q_proj"],
        "target_parameters": [f"{L0}mlp.up_proj.weight"],
        "rank_pattern": {"mlp.up_proj.weight": 2},
    },
    "nothing narrows parameters": {
        "target_modules": ["q_proj", "mlp.up_proj"],
        "target_parameters": ["down_proj.weight"],
        "exclude_modules": ["up_proj", "down_proj"],
        "layers_to_transform": [1],
    },
}

NUMBERS = {"r": 4, "lora_alpha": 6}


def peft_adapts(pair, fields):
    """What PEFT adapts, by name; a parameter of a linear layer is that layer."""
    import peft

    model = peft.get_peft_model(pair.fresh(), peft.LoraConfig(**fields))
    found = twins.modules_of(model)
    assert found
    return {name.removesuffix(".weight"): numbers for name, numbers in found.items()}


def we_adapt(pair, config):
    model, params = pair.ours()
    plan = lj.plan(config, params, fn=model.apply, args=(twins.IDS,))
    names = lj.checkpoint.NameMap.of(model.names)
    found = twins.sites_of([s for s in plan if s.rank], names)
    for site in plan:
        if site.use == "head":
            found[names.head] = site.rank, site.alpha, site.scale
    return found


@pytest.mark.parametrize("case", SAME)
def test_the_same(twin, case):
    asked = NUMBERS | SAME[case]
    pair = twin(asked.pop("_family", "llama"))
    ours = asked.pop("_ours", {})
    names = pair.ours()[0].names
    there = peft_adapts(pair, asked)
    config = lj.LoraConfig.from_peft({"peft_type": "LORA"} | asked | ours, names)
    assert we_adapt(pair, config) == there
    fields = config.to_peft(names)
    fields = {k: v for k, v in fields.items() if k not in ("peft_type", "peft_version")}
    assert peft_adapts(pair, fields) == there


# What both refuse. The messages are ours.
REFUSED = {
    "a part of a component": ({"target_modules": ["proj"]}, "the targets proj, which"),
    "a regex takes whole names": ({"target_modules": "q_proj"}, "the targets q_proj"),
    "everything is excluded": (
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        "the targets q_proj, which take no module",
    ),
    "everything is saved": (
        {"target_modules": ["up_proj"], "modules_to_save": ["mlp"]},
        "the targets up_proj, which take no module",
    ),
    "a regex with layers": (
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        "`layers_to_transform` = .* PEFT takes them for a list",
    ),
    "a pattern without layers": (
        {"target_modules": ["q_proj"], "layers_pattern": "layers"},
        "`layers_pattern` = .* PEFT takes them for a list",
    ),
    "no such layers": (
        {"target_modules": ["q_proj"], "layers_to_transform": [7, 9]},
        "matched no parameter",
    ),
    "a pattern of no layers": (
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": [0],
            "layers_pattern": "blocks",
        },
        "the targets q_proj, which take no module",
    ),
    "no layer of its kind": ({"target_modules": ["input_layernorm"]}, "is a target"),
    "no targets": ({"target_modules": []}, r"the targets \(none\)"),
    "no list": (
        {"target_modules": [], "target_parameters": "w"},
        "a list of names of parameters",
    ),
    "parameters and dropout": (
        {
            "target_modules": [],
            "target_parameters": ["up_proj.weight"],
            "lora_dropout": 0.1,
        },
        "(?s)does not combine with.*lora_dropout = 0.1",
    ),
    "parameters and DoRA": (
        {
            "target_modules": [],
            "target_parameters": ["up_proj.weight"],
            "use_dora": True,
        },
        "(?s)does not combine with.*use_dora = True",
    ),
    "parameters and a bias of B": (
        {
            "target_modules": [],
            "target_parameters": ["up_proj.weight"],
            "lora_bias": True,
        },
        "(?s)does not combine with.*lora_bias = True",
    ),
    "a parameter of an adapted module": (
        {"target_modules": ["up_proj"], "target_parameters": ["up_proj.weight"]},
        "of modules that it adapts as well",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_both(twin, case):
    fields, message = REFUSED[case]
    pair = twin("llama")
    with pytest.raises((ValueError, TypeError), match="."):
        peft_adapts(pair, NUMBERS | fields)
    names = pair.ours()[0].names
    with pytest.raises(LoraxError, match=message):
        given = {"peft_type": "LORA"} | NUMBERS | fields
        we_adapt(pair, lj.LoraConfig.from_peft(given, names))


# What PEFT lets pass, at most with a warning, and then adapts something else than was
# written: here each is an error that names what takes nothing.
STRICTER = {
    "one of two targets": (
        {"target_modules": ["q_proj", "typo_proj"]},
        "the targets typo_proj, which take no module",
    ),
    "rank_pattern": (
        {"target_modules": ["q_proj"], "rank_pattern": {"proj": 2}},
        "`rank_pattern` 'proj', which takes no adapted module",
    ),
    "alpha_pattern": (
        {"target_modules": ["q_proj"], "alpha_pattern": {"k_proj": 2}},
        "`alpha_pattern` 'k_proj', which takes no adapted module",
    ),
    "exclude_modules": (
        {"target_modules": ["q_proj"], "exclude_modules": ["typo"]},
        "'typo' in `exclude_modules`, which takes no module",
    ),
    "a container": (
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["mlp"]},
        "'mlp' in `exclude_modules`, which takes no module",
    ),
    "an excluded regex": (
        {"target_modules": ["q_proj"], "exclude_modules": "q_proj"},
        "'q_proj' in `exclude_modules`, which takes no module",
    ),
    "modules_to_save": (
        {"target_modules": ["q_proj"], "modules_to_save": ["typo"]},
        "'typo' in `modules_to_save`, which takes no module",
    ),
    "target_parameters": (
        {"target_modules": ["q_proj"], "target_parameters": ["typo"]},
        "'typo' in `target_parameters`, which takes no tensor",
    ),
    "parameters alone": (
        {"target_parameters": ["up_proj.weight"]},
        "no `target_modules`, and PEFT then adapts query and value too",
    ),
}


@pytest.mark.parametrize("case", STRICTER)
def test_refused_here_alone(twin, case):
    fields, message = STRICTER[case]
    pair = twin("llama")
    there = peft_adapts(pair, NUMBERS | fields)
    assert f"{L0}self_attn.q_proj" in there
    with pytest.raises(ConfigError, match=message):
        given = {"peft_type": "LORA"} | NUMBERS | fields
        lj.LoraConfig.from_peft(given, pair.ours()[0].names)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_usual_targets_are_theirs(model_type):
    """For the architectures that are loaded here, nothing said is what PEFT takes."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as usual

    assert sorted(usual[model_type]) in [sorted(targets) for targets in USUAL]


# --- The rules on names alone ---------------------------------------------------------

KEYS = [
    "q",
    "h.0.q",
    "model.h.0.q",
    "model.layers.1.attn.q",
    "model.layers.11.attn.q",
    "model.layers.1.attn.xq",
    "model.layers.1.mlp.experts.0.w1",
    "model.layers.0.mlp.experts.1.w1",
    "model.layers.1.mlp",
    "encoder.blocks.1.layers.2.q",
    "model.head",
    "model.aux_head.q",
    "model.layers.1.q.default.q",
]
_NAMES = st.lists(
    st.sampled_from(["q", "attn.q", "w1", "head", "mlp", "model.h.0.q", *KEYS]),
    min_size=1,
    max_size=3,
)
_REGEXES = st.sampled_from(
    ["q", r".*\.q", r"model\..*", r".*layers\.1\..*", "(?!.*mlp).*q|head"]
)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {"target_modules": _NAMES},
        optional={
            "exclude_modules": _NAMES | _REGEXES,
            "modules_to_save": _NAMES | st.just(["layers.[01].mlp", "mode."]),
            "layers_to_transform": st.lists(st.integers(0, 2)) | st.integers(0, 2),
        },
    )
    | st.fixed_dictionaries(
        {"target_modules": _REGEXES},
        optional={"exclude_modules": _NAMES | _REGEXES, "modules_to_save": _NAMES},
    ),
    st.sampled_from(["", "layers", ["blocks", "layers"], ["layers", "blocks"], "h|x"]),
)
def test_which_names_are_taken(fields, pattern):
    """The same answers as PEFT's own function, name by name."""
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists

    if fields.get("layers_to_transform") not in (None, []):
        fields = fields | {"layers_pattern": pattern}
    theirs = peft.LoraConfig(**fields)
    ours = _peft.Targets(fields, "it")
    for key in KEYS:
        assert ours(key) == bool(check_target_module_exists(theirs, key)), key


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            ["q", "^model.h.0.q", "h.0.q", "q|w1", r"layers\.\d\..*", ".*q", "x?q", "."]
        )
        | st.sampled_from(KEYS),
        st.integers(1, 9),
        min_size=1,
    )
)
def test_which_rank_a_name_has(pattern):
    from peft.utils.other import get_pattern_key

    ours = _peft.Ranks({"r": 10, "rank_pattern": pattern}, "it")
    for key in KEYS:
        assert ours(key)[0] == pattern.get(get_pattern_key(pattern, key), 10), key
