"""Fields of an `adapter_config.json`, and the names of a small model."""

from lorax_jax._names import NameMap

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
