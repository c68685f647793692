"""`lorax-jax`: the command line, thin over the same functions that a program calls.

Commands import what they need when they run, so that `--help` does not wait for it.
"""

import click

from ._finetune import finetune
from ._generate import generate
from ._inspect import inspect
from ._merge import merge
from ._program import Program

main = Program(
    name="lorax-jax",
    commands=[finetune, generate, merge, inspect],
    help="""LoRA for JAX models.

\b
Examples:
  lorax-jax finetune                        a first run: no download, a minute or two
  lorax-jax generate --adapter lorax-out/adapter --prompt "PATIENCE, n."
  lorax-jax inspect lorax-out/adapter
  lorax-jax merge lorax-out/adapter merged

Each command has examples of its own: lorax-jax COMMAND --help.
""",
)
main = click.version_option(package_name="lorax-jax", prog_name="lorax-jax")(main)
