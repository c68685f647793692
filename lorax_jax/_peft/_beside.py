"""What PEFT trains beside the factors: whole modules, biases, rows of a table."""

from collections.abc import Collection, Mapping
from typing import Any

from .._errors import CheckpointError, closest, shorten
from .._names import NameMap

BIASES = ("none", "all", "lora_only")

# Heads that PEFT trains whole without being asked to.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


class Whole:
    """Which tensors of a model PEFT trains whole: `modules_to_save` and `bias`.

    A module is one of `modules_to_save` if its name ends in an entry. No dot need stand
    before it: `norm` takes `q_norm` too. Task types that come with a new head
    add the names of theirs.

    Args:
        config: the fields of an `adapter_config.json`.
        what: what to call it in messages.

    Raises:
        CheckpointError: if a field is not what PEFT writes.

    Example:
        >>> whole = Whole({"modules_to_save": ["norm"], "bias": "lora_only"}, "it")
        >>> whole.saves("h.0.norm.scale"), whole.saves("h.0.q_norm.scale")
        (True, True)
        >>> whole("h.0.q.bias", {"h.0.q"}), whole("h.0.k.bias", {"h.0.q"})
        (True, False)
    """

    def __init__(self, config: Mapping[str, Any], what: str):
        names = config.get("modules_to_save") or ()
        if isinstance(names, str) or not _all(names, str) or "" in names:
            raise CheckpointError(
                f"{what} has `modules_to_save` = {names!r:.80}; a list of names of "
                "modules is meant."
            )
        bias = config.get("bias") or "none"
        if bias not in BIASES:
            raise CheckpointError(
                f"{what} has `bias` = {bias!r:.80}; one of 'none', 'all', 'lora_only' "
                "is meant."
            )
        self.asked = tuple(dict.fromkeys(names))
        heads = _HEADS.get(str(config.get("task_type")), ())
        self.names = tuple(dict.fromkeys((*self.asked, *heads)))
        # A head that was not asked for need not be there.
        self.required = tuple(name for name in self.asked if name not in heads)
        self.bias = bias

    def saves(self, tensor: str) -> bool:
        """Whether the tensor is one of a module that is trained whole."""
        return any(saved_by(name, tensor) for name in self.names)

    def __call__(self, tensor: str, adapted: Collection[str]) -> bool:
        """Whether the tensor is trained whole.

        Args:
            tensor: its name.
            adapted: names of the modules that have factors.
        """
        return self.saves(tensor) or self.biases(tensor, adapted)

    def biases(self, tensor: str, adapted: Collection[str]) -> bool:
        """Whether the tensor is one of the trained biases."""
        module, _, last = tensor.rpartition(".")
        if last != "bias" or self.bias == "none":
            return False
        return self.bias == "all" or module in adapted


def saved_by(name: str, tensor: str) -> bool:
    """Whether an entry of `modules_to_save` takes a tensor.

    >>> saved_by("head", "aux_head.out.weight"), saved_by("head", "head.weight")
    (True, True)
    """
    parts = tensor.split(".")
    return any(".".join(parts[:i]).endswith(name) for i in range(1, len(parts)))


def token_rows(
    config: Mapping[str, Any], what: str
) -> dict[str | None, tuple[int, ...]]:
    """`trainable_token_indices`: rows by the ending of a module's name.

    They come in the order that the file's tensor has them in. A list is about the input
    embedding, whatever it is called: its key is `None`.

    Raises:
        CheckpointError: if the field is neither.

    >>> token_rows({"trainable_token_indices": [5, 2]}, "it")
    {None: (5, 2)}
    """
    found = config.get("trainable_token_indices") or {}
    by_name = found if isinstance(found, Mapping) else {None: found}
    for name, ids in by_name.items():
        fine = (name is None or isinstance(name, str)) and not isinstance(ids, str)
        if not fine or not _all(ids, int) or not all(int(i) >= 0 for i in ids):
            raise CheckpointError(
                f"{what} has `trainable_token_indices` = {found!r:.80}; a list of row "
                "numbers, or an object of those by module, is meant."
            )
        if len(set(ids)) < len(ids):
            raise CheckpointError(
                f"{what} has `trainable_token_indices` = {found!r:.80}, which names a "
                "row twice."
            )
    return {name: tuple(ids) for name, ids in by_name.items() if ids}


def rows_by_module(
    config: Mapping[str, Any], names: NameMap, what: str
) -> dict[str | None, tuple[int, ...]]:
    """Which rows PEFT trains, by the whole name of the module.

    A head that shares the table trains the same rows, and is not listed. The key is
    `None` for an input embedding that `names` does not tell.

    Args:
        config: the fields of an `adapter_config.json`.
        names: the model's name table.
        what: what to call the configuration in messages.

    Raises:
        CheckpointError: if a name takes no module, or the head of a tied model alone.
    """
    table = None if names.tokens is None else names.module(names.tokens)
    shares = names.tied is not None and names.module_path(names.head) is None
    known = [module.name for module in names.expand(1)] + [names.head] * shares
    found: dict[str | None, tuple[int, ...]] = {}
    for name, ids in token_rows(config, what).items():
        taken = [m for m in known if name is not None and m.endswith(name)]
        if name is not None and not taken:
            raise CheckpointError(
                f"{what} has `trainable_token_indices` for {name!r}, which takes no "
                f"module of `names`. Closest: {shorten(closest(name, known, 3))}."
            )
        found |= dict.fromkeys(taken or [table], ids)
    if shares and names.head in found:
        tied = names.module(names.tied or "")
        if found.get(tied) != found.pop(names.head):
            raise CheckpointError(
                f"{what} trains rows of {names.head!r} that are not those of {tied!r}, "
                "and the two are one table. Give both the same rows, or untie the "
                "model."
            )
    return found


def _all(values: Any, kind: type) -> bool:
    return isinstance(values, Collection) and all(
        isinstance(value, kind) and not isinstance(value, bool) for value in values
    )
