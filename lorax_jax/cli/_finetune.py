"""`lorax-jax finetune`: from a data file to an adapter folder."""

import shlex
from pathlib import Path
from typing import Any

import click

from ._program import Command, Failure, interrupted_status
from ._types import SEED, Number, Prompt

TIES = ("shared", "lookup", "head")
DTYPES = ("float32", "bfloat16", "float16")


@click.command(cls=Command)
@click.option("--model", help="Folder or hub id of the base. [default: embedded]")
@click.option("--data", type=Path, help=".txt or .jsonl. [default: embedded]")
@click.option("--out", type=Path, help="Folder to write. [default: lorax-out]")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run's files.")
@click.option("--resume", type=Path, help="Go on with the run in this folder.")
@click.option("--export", is_flag=True, help="Also write the merged model.")
@click.option(
    "--targets",
    multiple=True,
    default=["all-linear"],
    help="Regex of whole parameter paths; may be repeated. [default: all-linear]",
)
@click.option(
    "--exclude", multiple=True, help="Regex of paths to leave out; may be repeated."
)
@click.option(
    "--tie",
    type=click.Choice(TIES),
    help="Which use of a table that is also the head to adapt.",
)
@click.option(
    "--new-token",
    type=Prompt(),
    multiple=True,
    help="A token that the tokenizer lacks; may be repeated.",
)
@click.option("--rank", type=click.IntRange(1), default=8, help="[default: 8]")
@click.option(
    "--alpha",
    type=Number(0, min_open=True),
    default=16.0,
    help="Scales by alpha / rank. [default: 16]",
)
@click.option("--rslora", is_flag=True, help="Scales by alpha / sqrt(rank).")
@click.option(
    "--dropout",
    type=Number(0, 1, max_open=True),
    default=0.0,
    help="Of the inputs of A. [default: 0]",
)
@click.option(
    "--init", default="kaiming", help="How it starts; see above. [default: kaiming]"
)
@click.option(
    "--init-rows",
    type=click.IntRange(1),
    default=64,
    help="Rows that it reads, if it reads any. [default: 64]",
)
@click.option(
    "--rho",
    type=Number(1),
    default=1.0,
    help="How many times --rank a site may get with eva; 1 moves none. [default: 1]",
)
@click.option(
    "--steps", type=click.IntRange(1), help="Updates. [default: 200; embedded 250]"
)
@click.option("--batch", type=click.IntRange(1), help="Rows. [default: 4; embedded 8]")
@click.option(
    "--accumulate",
    type=click.IntRange(1),
    default=1,
    help="Batches that make one update. [default: 1]",
)
@click.option(
    "--length",
    type=click.IntRange(1),
    help="Tokens of a row. [default: 512; embedded 128]",
)
@click.option("--pack", is_flag=True, help="Several documents in a row; see above.")
@click.option(
    "--lr",
    type=Number(0, min_open=True),
    help="Learning rate. [default: 2e-4; embedded 5e-3]",
)
@click.option("--warmup", type=click.IntRange(0), help="Steps. [default: 5 %]")
@click.option("--weight-decay", type=Number(0), default=0.0, help="[default: 0]")
@click.option(
    "--heldout",
    type=Number(0, 1, max_open=True),
    default=0.1,
    help="Share of the data to measure on. [default: 0.1]",
)
@click.option("--eval-every", type=click.IntRange(1), help="Steps. [default: a fifth]")
@click.option(
    "--save-every", type=click.IntRange(1), default=100, help="Steps. [default: 100]"
)
@click.option("--seed", type=SEED, default=0, help="[default: 0]")
@click.option(
    "--dtype", type=click.Choice(DTYPES), help="Of the base. [default: as stored]"
)
@click.option("--scan-layers", is_flag=True, help="Stack layers: compiles faster.")
@click.option("--remat", is_flag=True, help="Less memory, more time.")
@click.option(
    "--prompt", type=Prompt(), help="What to sample from. [default: held-out words]"
)
@click.option(
    "--sample-tokens",
    type=click.IntRange(0),
    default=48,
    help="How much to sample; 0 for none. [default: 48]",
)
@click.pass_context
def finetune(ctx: click.Context, **options: Any) -> None:
    """Train an adapter on a text, and show what it learned.

    \b
    Examples:
      lorax-jax finetune
          a first run on a small model and a text that come with the library
      lorax-jax finetune --model HuggingFaceTB/SmolLM2-135M --data notes.txt
      lorax-jax finetune --model ./llama --data chat.jsonl --rank 16 --dtype bfloat16
      lorax-jax finetune --targets '.*/(q|v)_proj/kernel' --out small --export
      lorax-jax finetune --model ./llama --data notes.txt --init eva --rho 2
      lorax-jax finetune --data calls.txt --new-token '<tool>' --new-token '</tool>'
      lorax-jax finetune --resume lorax-out
          go on after Ctrl-C or SIGTERM; all other options are as they were

    The data is plain text (.txt), or a JSON object a line (.jsonl) with "text", with
    "prompt" and "completion", or with "messages" of "role" and "content". Completions
    and what the assistant says are learned; prompts are only read. A row holds one
    document; with --pack several, which is faster for short ones, but then each sees
    what stands before it in its row.

    A new token is one token wherever its text stands in the data. Its rows of the table
    and of the head are trained beside the adapter and saved with it; `generate` and
    `merge` grow the base alike.

    An adapter starts at random with --init kaiming, gaussian or orthogonal, from
    factors of the weight with pissa, pissa_niter_N, olora or mica, and from what the
    training rows say with eva, corda, corda_kpm or lora_ga, which read --init-rows of
    them first. With --init eva and --rho above 1, sites whose inputs vary along more
    directions get larger ranks, and others smaller ones; their sum stays as it is. The
    model is the same at the start, and the base is never changed.

    OUT gets adapter/ (PEFT's format, with the tokenizer), merged/ with --export,
    loss.png, history.jsonl, run.json, and state/ to resume from. An existing folder is
    never written to without --overwrite.
    """
    from . import _output, _settings
    from ._claim import claimed
    from ._training import Training

    resume, export = options["resume"], options["export"]
    if resume is not None:
        settings = _settings.resumed(resume, ctx)
        out = options["out"] or resume
        if out != resume:
            raise Failure(
                "--out and --resume name two folders; a run stays in its own."
            )
    else:
        settings = _settings.complete(options)
        out = _output.new_folder(
            options["out"], usual="lorax-out", overwrite=options["overwrite"]
        )
    with claimed(out):
        if resume is None:
            inputs = {"base": settings["model"], "data": settings["data"]}
            _output.check_replaceable(out, **inputs)
        training = Training.prepare(settings)
        training.check_output(out, export=export)
        training.start(resume=resume is not None)
        settings["ranks"] = training.moved
        if training.moved is not None:  # maybe to wider weights
            training.check_output(out, export=export)
        if resume is None:
            _output.forget(out)
            _settings.write(out, settings)
        try:
            finished = training.run(out, resume=resume is not None)
        except BaseException:
            if resume is None:
                _output.forget_failed(out)
            raise
        if not finished:
            ctx.exit(interrupted_status())
        files = training.write(out)
        if export:
            files.append(training.export(out))
    for path in files:
        click.echo(f"wrote     {path}")
    one_line = "\n" not in training.rows.prompt
    prompt = shlex.quote(training.rows.prompt) if one_line else '"..."'
    click.echo(f"next      lorax-jax generate --adapter {files[0]} --prompt {prompt}")
