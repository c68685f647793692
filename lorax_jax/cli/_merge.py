"""`lorax-jax merge`: an adapter folder and its base to a plain model folder."""

from pathlib import Path

import click

from ._program import Command


@click.command(cls=Command)
@click.argument("adapter", type=Path, metavar="ADAPTER_DIR")
@click.argument("out", type=Path, metavar="OUT_DIR")
@click.option("--base", help="Folder or hub id. [default: as the adapter says]")
@click.option("--overwrite", is_flag=True, help="Replace what OUT_DIR holds.")
def merge(adapter: Path, out: Path, base: str | None, overwrite: bool) -> None:
    """Write the model that an adapter makes of its base.

    \b
    Examples:
      lorax-jax merge lorax-out/adapter merged
      lorax-jax merge my-adapter merged --base ./llama
      lorax-jax generate --model merged --prompt "PATIENCE, n."

    OUT_DIR becomes an ordinary Hugging Face folder that needs no adapter library. The
    base is read one tensor at a time and never changed.
    """
    from ..checkpoint import export_merged
    from ._base import base_of, folder_of
    from ._output import new_folder

    new_folder(out, usual="", overwrite=overwrite)
    folder = folder_of(base_of(adapter) if base is None else base)
    done = export_merged(folder, adapter, out, overwrite=overwrite)
    click.echo(f"merged    {len(done.merged)} tensors, {done.copied} as they were")
    click.echo(f"wrote     {out}")
