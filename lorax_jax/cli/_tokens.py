"""New tokens: in the tokenizer, in the model, and among what is trained."""

import re
from collections.abc import Sequence

from .. import _paths
from ..planning import Plan
from ._base import Base
from ._program import Failure


def with_tokens(base: Base, tokens: Sequence[str]) -> Base:
    """A base that knows more tokens.

    The tokenizer gets them; the model's tables grow if it has no rows to spare, as
    those have that were padded when the model was made.

    Args:
        base: the model and its tokenizer, which is changed.
        tokens: whole texts, such as `<tool>`.

    Returns:
        The base, with the new tokens' rows of every table and head in `token_rows`.

    Raises:
        Failure: if a token is empty, named twice, or no new one.
    """
    if not tokens:
        return base
    from .. import models

    known = base.tokenizer.get_vocab()
    count = base.model.config.vocab_size
    if max(known.values()) >= count:
        raise Failure(
            f"The tokenizer beside {base.where} knows token {max(known.values())}, and "
            f"the model's table has {count} rows. Is it the model's own tokenizer?"
        )
    for i, token in enumerate(tokens):
        if not token.strip() or token in tokens[:i]:
            what = "is named twice" if token.strip() else "is empty"
            raise Failure(f"--new-token {token!r} {what}. Name each new token once.")
        if token in known:
            raise Failure(
                f"--new-token {token!r} is token {known[token]} of the tokenizer "
                "already. Leave it out."
            )
    base.tokenizer.add_tokens(list(tokens))
    ids = tuple(base.tokenizer.convert_tokens_to_ids(list(tokens)))
    model, params, growth = base.model, base.params, None
    if max(ids) >= count:
        model, params, growth = models.grow(model, params, to=max(ids) + 1)
    leaves = dict(_paths.flatten(params)[0])
    rows = {
        re.escape(path): ids
        for path in models.token_axes(model)
        if leaves[path].ndim > 1
    }
    return base._replace(model=model, params=params, token_rows=rows, growth=growth)


def check_rows(plan: Plan) -> None:
    """Raises if a table has factors and trained rows: a file of PEFT's holds one.

    Raises:
        Failure: see above.
    """
    rows = {slot.role.path for slot in plan.slots if slot.ids}
    for slot in plan.slots:
        if not slot.ids and slot.role.path in rows:
            raise Failure(
                f"--targets takes {slot.role.path}, and --new-token trains rows of it; "
                "an adapter has one of the two. Leave it out with --exclude."
            )
