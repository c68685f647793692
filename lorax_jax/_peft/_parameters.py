"""PEFT's `target_parameters`: bare parameters of modules that have no layer of it."""

from collections.abc import Collection, Mapping
from typing import Any

from .._errors import CheckpointError, shorten
from ._patterns import endings, short_targets

# What PEFT raises for beside `target_parameters`: it adds to the parameter, and has
# neither the input of A nor the output of B at hand.
_ALONE = {
    "lora_dropout": "the input of A cannot be dropped",
    "use_dora": "magnitudes have no place",
    "lora_bias": "a bias of B has no place",
    "fan_in_fan_out": "a Conv1D layer that is adapted too makes PEFT raise",
}


class Parameters:
    """Which tensors PEFT adapts by `target_parameters`.

    An entry takes the tensor of that name, and every tensor whose name ends in a dot
    and the entry. Nothing narrows it: not `exclude_modules`, not `layers_to_transform`.

    Args:
        config: the fields of an `adapter_config.json`.
        what: what to call it in messages.

    Raises:
        CheckpointError: if the field is no list of names, or another one is set that
            PEFT does not combine it with.

    Example:
        >>> taken = Parameters({"target_parameters": ["experts.up"]}, "it")
        >>> taken("h.0.experts.up"), taken("h.0.my_experts.up")
        (True, False)
    """

    def __init__(self, config: Mapping[str, Any], what: str):
        names = config.get("target_parameters") or ()
        listed = isinstance(names, Collection) and not isinstance(names, str | Mapping)
        if not listed or not all(isinstance(name, str) and name for name in names):
            raise CheckpointError(
                f"{what} has `target_parameters` = {names!r:.80}; a list of names of "
                "parameters is meant."
            )
        self.names = frozenset(names)
        if self.names:
            check_alone(config, what)

    def __call__(self, tensor: str) -> bool:
        """Whether the tensor of this name is adapted."""
        parts = tensor.split(".")
        return any(".".join(parts[i:]) in self.names for i in range(len(parts)))


def check_alone(config: Mapping[str, Any], what: str) -> None:
    """Refuses fields that PEFT does not combine with `target_parameters`.

    Raises:
        CheckpointError: naming every one of them.
    """
    odd = [
        f"  {field} = {config[field]!r}: {reason}"
        for field, reason in _ALONE.items()
        if config.get(field)
    ]
    if config.get("bias", "none") not in ("none", None):
        odd.append(
            f"  bias = {config['bias']!r}: which biases of wrapped modules PEFT would "
            "keep is not known here"
        )
    if odd:
        raise CheckpointError(
            f"{what} has `target_parameters`, which PEFT does not combine with\n"
            + "\n".join(odd)
            + "\nLeave these out, or adapt no bare parameters of experts."
        )


def check_owners(
    modules: Collection[str], parameters: Collection[str], what: str
) -> None:
    """Refuses a parameter of the whole model, and one of an adapted module.

    Args:
        modules: names of the modules that are adapted.
        parameters: names of the tensors that are.
        what: what asks for them, for messages.

    Raises:
        CheckpointError: naming them.
    """
    top = sorted(name for name in parameters if "." not in name)
    both = sorted(n for n in parameters if n.rpartition(".")[0] in set(modules))
    if top or both:
        where = (
            f"{shorten(top)}, which no module of the model holds"
            if top
            else f"{shorten(both)} of modules that it adapts as well"
        )
        raise CheckpointError(
            f"{what} adapts the bare parameters {where}, and PEFT refuses that. Leave "
            "them out."
        )


def exact_parameters(tensors: Collection[str], others: Collection[str]) -> list[str]:
    """Entries of `target_parameters` that are whole names.

    Args:
        tensors: names of those to take.
        others: names of all others of the model.

    Raises:
        CheckpointError: if the whole name of one ends the name of another, so that no
            entry takes it alone.
    """
    left = {ending for other in others for ending in endings(other)}
    odd = [tensor for tensor in tensors if tensor in left]
    if odd:
        raise CheckpointError(
            f"PEFT's `target_parameters` cannot name {odd[0]!r} alone: the name of "
            "another parameter ends in it. Adapt both, or none."
        )
    return list(tensors)


def short_parameters(tensors: Collection[str], others: Collection[str]) -> list[str]:
    """The fewest entries of `target_parameters` that take exactly these tensors.

    Args:
        tensors, others: as `exact_parameters`.

    Raises:
        CheckpointError: as `exact_parameters`.

    >>> short_parameters(["h.0.experts.up", "h.1.experts.up"], ["h.0.mlp.up"])
    ['experts.up']
    """
    exact_parameters(tensors, others)
    return short_targets(tensors, others)
