"""Adapters that are more than plain LoRA, by name, and their files."""

import json

from safetensors.numpy import load_file

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
STEM = "base_model.model."

RULES = {
    r"(layers|h)/1/mlp/(up_proj|c_fc)/kernel": {"rank": 3, "alpha": 5},
    r"(layers|h)/\d/(self_attn/q_proj|attn/c_attn)/kernel": {},
}
TABLE = {"embed_tokens/embedding": {}}

# Name -> family, rules and arguments of `LoraConfig`, for what PEFT can say.
CASES = {
    "dora": ("llama", RULES, {"dora": True}),
    "dora gpt2": ("gpt2", RULES, {"dora": True, "rslora": True}),
    "dora table": ("llama", RULES | TABLE, {"dora": True}),
    "dora head": ("tied", RULES | {"embed.*": {"tie": "head"}}, {"dora": True}),
    "bias of B": ("gpt2", RULES, {"lora_bias": True}),
    "all biases": ("gpt2", RULES, {"bias": "all"}),
    "biases of targets": ("gpt2", RULES, {"bias": "lora_only", "lora_bias": True}),
    "head and norm": ("llama", RULES, {"whole": ["lm_head/kernel", "norm/scale"]}),
    "norms": ("gpt2", RULES, {"whole": ".*/ln_1/.*"}),
    "some norms": ("llama", RULES, {"whole": "layers/1/input_layernorm/scale"}),
    "tied table": ("tied", RULES, {"whole": "embed_tokens/embedding"}),
    "everything": (
        "gpt2",
        RULES,
        {"bias": "all", "whole": "ln_f/.*", "token_rows": {"wte/.*": [3]}},
    ),
    "rows": ("llama", RULES, {"token_rows": [7, 2]}),
    "rows of a tied table": ("tied", RULES, {"token_rows": [1, 40, 9]}),
    "rows of a head": ("llama", RULES, {"token_rows": {"lm_head/kernel": [4, 5]}}),
}
# And for what only our own files can.
OURS = {
    "two kinds": ("llama", {r".*q_proj.*": {"dora": True}, r".*v_proj.*": {}}, {}),
    "some leaves of a norm": ("gpt2", RULES, {"whole": ".*/ln_1/scale"}),
    "rows and factors": ("llama", RULES | TABLE, {"token_rows": [1]}),
    "one magnitude for both": (
        "tied",
        {"embed.*": {"tie": "shared"}} | RULES,
        {"dora": True},
    ),
}


def tensors_of(folder):
    return load_file(folder / TENSORS)


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())
