"""The loop over the steps of a run: progress, log, callback and checkpoints on the way (chapter 6)."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable

from tqdm.auto import tqdm

from .components import Components
from .interrupt import whole_steps
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
        KeyboardInterrupt: Ctrl-C was pressed; the step that it fell in is done.
        NonFiniteLoss: a loss is NaN or infinite.
        ValueError: the log is another file, or the checkpoint.
    """
    lines, shown = None, progress and run.local.writes
    if log is not None and run.local.writes:
        from .log import Log

        lines = Log(log, run.step, checkpoint)
    # In a file, the bar is a line each time it is shown.
    every = 0.1 if sys.stderr.isatty() or "ipykernel" in sys.modules else 60
    with (
        whole_steps() as asked,
        tqdm(total=run.config.steps, initial=run.step, disable=not shown, unit="step", mininterval=every) as bar,
    ):
        while run.step < run.config.steps and not asked:
            losses = run.advance()
            bar.update()
            if run.config.logs(run.step - 1):
                bar.set_postfix({name: f"{min(values):.1e}" for name, values in losses.items()}, refresh=False)
                if lines is not None:
                    lines.write(run.step - 1, losses)
                if callback is not None:
                    callback(run.step - 1, copy.deepcopy(losses), run.components.map(lambda t: t.detach().clone()))
            if checkpoint is not None and (run.step % checkpoint_every == 0 or run.step == run.config.steps):
                from .checkpoint import save

                save(run, checkpoint)
