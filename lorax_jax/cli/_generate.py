"""`lorax-jax generate`: text from a base or an adapted model."""

from pathlib import Path

import click

from ._program import Command
from ._types import SEED, Number, Prompt


@click.command(cls=Command)
@click.option("--adapter", type=Path, help="Folder of an adapter; finds its base.")
@click.option("--model", help="Folder or hub id. [default: the adapter's base]")
@click.option("--prompt", type=Prompt(), required=True, help="What to go on from.")
@click.option("--chat", is_flag=True, help="The prompt is a user's message.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option(
    "--temperature",
    type=Number(0),
    default=0.7,
    show_default=True,
    help="0 takes the likeliest token.",
)
@click.option(
    "--top-p",
    type=Number(0, 1, min_open=True),
    default=0.95,
    show_default=True,
)
@click.option("--seed", type=SEED, default=0, show_default=True)
def generate(
    adapter: Path | None,
    model: str | None,
    prompt: str,
    chat: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> None:
    """Go on from a prompt, with or without an adapter.

    \b
    Examples:
      lorax-jax generate --adapter lorax-out/adapter --prompt "PATIENCE, n."
      lorax-jax generate --model lorax-out/merged --prompt "PATIENCE, n."
      lorax-jax generate --prompt "In the beginning"
          the base that comes with the library, as it is
      lorax-jax generate --adapter a --model ./llama --prompt "Hi" --temperature 0

    The text goes to the standard output, prompt first. The same seed gives the same
    text. With --chat the prompt is written as finetune writes a user's message: by the
    tokenizer's chat template, or as "User: ..." and "Assistant:".
    """
    from .. import transform
    from ..train import chat_prompt
    from ._base import load_base, load_bound
    from ._text import continue_text

    if adapter is None:
        base = load_base(model)
        apply, params = base.model.apply, base.params
    else:
        base, params = load_bound(adapter, model)
        apply = transform.adapt(base.model.apply)
    if chat:
        prompt = chat_prompt(prompt, base.tokenizer)
    text = continue_text(
        apply,
        params,
        base.tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        positions=base.positions,
        window=base.window,
    )
    click.echo(prompt + text)
