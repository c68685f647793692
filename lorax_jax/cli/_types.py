"""Values of options that click's own types let through."""

from typing import Any

import click

SEED = click.IntRange(0, 2**32 - 1)
"""What a random key is made of; JAX drops all higher bits."""

# Above it the files say that they were damaged.
_LARGEST = 1e30


class Number(click.FloatRange):
    """A range of numbers without NaN, which compares with nothing, and infinity."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        found = super().convert(value, param, ctx)
        if not abs(found) < _LARGEST:
            self.fail(f"{value} is not a number that can be used here.", param, ctx)
        return found


class Prompt(click.ParamType):
    """Text that a tokenizer can read."""

    name = "text"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            self.fail("it holds bytes that are not UTF-8.", param, ctx)
        return value
