"""The loop over the steps of a run: progress, log, callback and checkpoints on the way (chapter 6)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from tqdm.auto import tqdm

from . import checks
from .components import Components
from .train import Run

Callback = Callable[[int, dict[str, list[float]], Components], None]  # (step, losses, components)


def follow(
    run: Run,
    checkpoint: str | os.PathLike[str] | None,
    checkpoint_every: int,
    callback: Callback | None,
    progress: bool,
    log: str | os.PathLike[str] | None = None,
) -> None:
    """Take all steps that are left of a run.

    Raises:
        NonFiniteLoss: inputs, attributions or a loss are NaN or infinite.
    """
    writes = run.local.writes
    log = log if writes else None
    if log is not None:
        old = Path(log).read_text(encoding="utf-8").splitlines(True) if run.step and Path(log).exists() else []
        # A run that was killed may have left half a line.
        kept = [line for line in old if line.endswith("\n") and json.loads(line)["step"] < run.step]
        Path(log).write_text("".join(kept), encoding="utf-8")
    live = sys.stderr.isatty() or "ipykernel" in sys.modules  # else the bar goes to a file, line by line
    every = 0.1 if live else 60
    with (
        tqdm(
            total=run.config.steps, initial=run.step, disable=not (progress and writes), unit="step", mininterval=every
        ) as bar,
        open(os.devnull if log is None else log, "a", encoding="utf-8") as lines,
    ):
        while run.step < run.config.steps:
            try:
                losses = run.advance()
            except checks.NotFinite as error:
                message = f"step {run.step}: {error}; the last finite state is in .result"
                raise checks.NonFiniteLoss(message, run.so_far(run.last_finite)) from error
            bar.update()
            if run.config.logs(run.step - 1):
                bar.set_postfix({name: f"{min(values):.1e}" for name, values in losses.items()})
                lines.write(json.dumps({"step": run.step - 1, **losses}, allow_nan=False) + "\n")
                lines.flush()
                if callback is not None:
                    callback(run.step - 1, losses, run.components.map(Tensor.detach))
            if checkpoint is not None and (run.step % checkpoint_every == 0 or run.step == run.config.steps):
                from .checkpoint import save

                save(run, checkpoint)
