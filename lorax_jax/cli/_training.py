"""What `lorax-jax finetune` does, step by step."""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from .. import _count, capturing, checkpoint, planning, train, transform
from .._config import LoraConfig
from ..adapters import Adapter, bind
from ._base import Base, folder_of, load_base, reference
from ._output import check_space
from ._program import note_saved
from ._rows import Rows, read_rows
from ._start import prepared
from ._text import continue_text
from ._tokens import check_rows, with_tokens

EVALUATIONS = 5

Ranks = Mapping[str, tuple[int, float]]


class Training:
    """A run, from its settings to its files.

    Args:
        settings: from `_settings`.
        base: the model.
        rows: the data.
        plan: where the adapter acts.

    Attributes:
        moved: name of a site -> the rank and alpha that it got by what was gathered;
            `None` where all have their own.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        base: Base,
        rows: Rows,
        plan: planning.Plan,
    ):
        self.settings, self.base, self.rows, self.plan = settings, base, rows, plan
        self.forward = transform.adapt(base.model.apply)
        self.adapter = Adapter({}, {})
        self.history: train.History = []
        self.moved: Ranks | None = None
        self.tx = train.optimizer(
            learning_rate=settings["lr"],
            steps=settings["steps"],
            warmup=settings["warmup"],
            weight_decay=settings["weight_decay"],
        )

    @classmethod
    def prepare(cls, settings: dict[str, Any]) -> "Training":
        """Reads and checks everything, and says what was found. Writes nothing."""
        records = train.read_records(settings["data"])
        base = load_base(
            settings["model"],
            dtype=settings["dtype"],
            scan_layers=settings["scan_layers"],
            remat="full" if settings["remat"] else None,
        )
        size = sum(leaf.size for leaf in jax.tree.leaves(base.params))
        dtype = base.model.dtype.name
        click.echo(f"base      {base.name}: {size:,} parameters, {dtype}")
        base = with_tokens(base, settings["new_token"])
        if base.token_rows:
            click.echo(f"tokens    {_new_tokens(base)}")
        rows = read_rows(records, base, settings)
        ids = jax.ShapeDtypeStruct((1, rows.data.weights.shape[1]), jnp.int32)
        config = LoraConfig(
            targets=settings["targets"],
            exclude=settings["exclude"],
            tie=settings["tie"],
            rank=settings["rank"],
            alpha=settings["alpha"],
            rslora=settings["rslora"],
            dropout=settings["dropout"],
            init=settings["init"],
            token_rows=base.token_rows,
        )
        plan = planning.plan(config, base.params, fn=base.model.apply, args=(ids,))
        check_rows(plan)
        click.echo(f"\n{plan}\n")
        return cls(settings, base, rows, plan)

    def start(self, *, resume: bool) -> None:
        """Makes the adapter that the run starts from.

        Whether it can be made is known before anything is gathered for it. A run that
        goes on finds its values in its state, so that its types are enough.
        """
        settings, params = self.settings, self.base.params
        if resume and settings.get("ranks") is not None:
            self._move(settings["ranks"])
        init = functools.partial(planning.init, key=jax.random.key(settings["seed"]))
        types = jax.eval_shape(
            lambda params, stats: init(self.plan, params, stats=stats),
            params,
            capturing.prepared_types(self.plan),
        )
        if resume:
            self.adapter = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), types)
            return
        plan, stats = prepared(self.plan, self.base, self.rows.data, settings)
        if plan is not self.plan:
            ranks = {site.name: (site.rank, site.alpha) for site in plan if site.rank}
            gone = {site.name: (0, 0.0) for site in self.plan if site.rank}
            self._move(gone | ranks)
        self.adapter = init(self.plan, params, stats=stats)

    def _move(self, ranks: Ranks) -> None:
        """Distributes ranks, and says how."""
        self.plan = planning.resized(self.plan, ranks)
        self.moved = ranks
        found = [rank for rank, _ in ranks.values()]
        click.echo(
            f"ranks     {min(found)} to {max(found)} for {len(found)} sites, by "
            "explained variance"
        )

    def check_output(self, out: Path, *, export: bool) -> None:
        """Raises if what the run will write has no place, or no room."""
        memory = self.plan.memory()
        # The adapter, and for a moment two states of adapter and optimizer.
        state = memory.adapter + memory.optimizer
        merged = 0
        if export:
            base = folder_of(self.base.where)
            merged = checkpoint.check_export(base, out / "merged")
            # A table that is adapted in one use gives the head a tensor of its own.
            merged += sum(4 * math.prod(site.shape) for site in self.plan if site.use)
            merged += sum(4 * site.trainable for site in self.plan if not site.rank)
        check_space(out, memory.adapter + 2 * state + merged, max(state, merged))

    def run(self, out: Path, *, resume: bool) -> bool:
        """Trains, and prints measurements and samples. False if interrupted."""
        settings = self.settings
        steps = settings["steps"]
        if not resume:
            click.echo(_count.count(self.base.params, self.adapter))
            self._sample("before", train.scaled(self.adapter, np.float32(0)))
        try:
            run = train.finetune(
                self.base.model.apply,
                self.base.params,
                self.adapter,
                self.rows.data,
                steps=steps,
                batch=settings["batch"],
                accumulate=settings["accumulate"],
                tx=self.tx,
                seed=settings["seed"],
                heldout=self.rows.heldout,
                eval_every=settings["eval_every"] or -(-steps // EVALUATIONS),
                folder=out / "state",
                save_every=settings["save_every"],
                resume=resume,
                progress=True,
                report=_report,
            )
        finally:  # whatever ends it, what is saved is saved
            if train.saved_steps(out / "state"):
                note_saved(out / "state")
        self.adapter, self.history = run.adapter, run.history
        if not run.finished:
            done = self.history[-1]["step"]
            click.echo(
                f"\nInterrupted after step {done} of {steps}. Saved: "
                f"{out / 'state'}. Go on with: lorax-jax finetune --resume {out}",
                err=True,
            )
            return False
        if run.tokens_per_second:  # a resumed run may have had no step left to make
            click.echo(
                f"speed     {run.tokens_per_second:,.0f} tokens/s, after "
                f"{run.compile_seconds:.1f} s for the first step, which is compiled"
            )
        self._compare()
        self._sample("after", self.adapter)
        return True

    def write(self, out: Path) -> list[Path]:
        """Writes the adapter, the history and the loss curve."""
        base, folder = self.base, out / "adapter"
        named = reference(base.where, folder, relative=self.settings["relative"])
        checkpoint.save_adapter(
            folder,
            self.adapter,
            plan=self.plan,
            names=base.model.names,
            params=base.params,
            base_model_name_or_path=named,
            task_type="CAUSAL_LM",
            tokenizer=base.tokenizer,
            grown=base.growth,
        )
        note_saved(folder)
        train.write_history(out / "history.jsonl", self.history)
        title = f"{base.name} on {Path(self.settings['data']).name}"
        train.plot_history(self.history, out / "loss.png", title=title)
        return [folder, out / "history.jsonl", out / "loss.png"]

    def export(self, out: Path) -> Path:
        """Writes the merged model."""
        base = folder_of(self.base.where)
        checkpoint.export_merged(base, out / "adapter", out / "merged")
        return out / "merged"

    def _compare(self) -> None:
        measured = [line for line in self.history if "heldout_loss" in line]
        if len(measured) > 1:
            first, last = measured[0]["heldout_loss"], measured[-1]["heldout_loss"]
            change = 100 * (last - first) / first
            click.echo(
                f"held out  {first:.4f} -> {last:.4f} nats/token ({change:+.1f} %)"
            )

    def _sample(self, when: str, adapter: Adapter) -> None:
        count = self.settings["sample_tokens"]
        if not count:
            return
        text = continue_text(
            self.forward,
            bind(self.base.params, adapter),
            self.base.tokenizer,
            self.rows.prompt,
            max_new_tokens=count,
            temperature=0.7,
            top_p=0.95,
            positions=self.base.positions,
            window=self.base.window,
        )
        first, *more = (self.rows.prompt + text).strip().splitlines()
        lines = [f"{when:9} {first}", *(f"{'':9} {line}".rstrip() for line in more)]
        click.echo("\n".join(lines))


def _new_tokens(base: Base) -> str:
    """What was added, and where it is."""
    ids = next(iter(base.token_rows.values()))
    known = ", ".join(f"{base.tokenizer.decode([i])} ({i})" for i in ids)
    growth = base.growth
    if growth is None:
        return f"{known}: rows that the model had to spare"
    return f"{known}: the vocabulary grew from {growth.before:,} to {growth.after:,}"


def _report(line: dict[str, Any]) -> None:
    tqdm.write(
        f"held out  {line['heldout_loss']:.4f} nats/token, "
        f"{line['bits_per_byte']:.4f} bits/byte after {line['step']} steps"
    )
