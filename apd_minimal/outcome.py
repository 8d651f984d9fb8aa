"""What comes out of a run: its restarts judged on held-out inputs, and the best of them (chapter 6)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from . import checks
from .components import Components
from .decomposition import Decomposition, fingerprint, name_of
from .losses import minimality
from .network import Network
from .train import Run

HELD_OUT_SAMPLES = 8192
Judge = Callable[[Network, Components, Tensor], float]  # (network, components without restarts, x) -> less is better


@torch.no_grad()
def scores(run: Run, components: Components) -> tuple[Tensor, Tensor | None]:
    """Judge each restart on held-out inputs, by its sparse error if by nothing else, and find thresholds: [R] each.

    Raises:
        TypeError: the run's judge gives no number.
    """
    x = run.many_inputs(HELD_OUT_SAMPLES, torch.Generator().manual_seed(run.config.seed + 1_000_003))
    with torch.autocast(run.device.type, enabled=False):
        if run.judge is None:
            errors = held_out_errors(run, x, components)
        else:
            found = [run.judge(run.network, components.restart(i), x) for i in range(run.config.restarts)]
            for value in (values := [checks.plain(value) for value in found]):
                if type(value) not in (int, float):
                    raise TypeError(f"judge must be a function that gives a number, got {checks.given(value)}")
            errors = torch.tensor(values, dtype=torch.double)
        threshold = run.selection.threshold(run.local.all_scores(run.attributions(x, components)))
        if threshold is not None:
            checks.tensor(f"{run.chooser}.threshold", threshold, run.config.restarts)
        return errors, threshold


def held_out_errors(run: Run, x: Tensor, components: Components) -> Tensor:
    """Average the error of the sparse outputs over samples x [B, ...]: [R]."""
    gates, size = run.gates(x, components, run.local.count(len(x), len(x))), run.micro_batch or run.batch_size
    sums = [
        minimality(run.network(part, components, on), run.network(part), run.divergence) * len(part)
        for part, on in zip(x.split(size), gates.split(size, dim=1), strict=True)
    ]
    return run.local.mean(torch.stack(sums).sum(0) / len(x) * run.local.weight(len(x)))


def outcome(run: Run, components: Components | None = None, errors: Tensor | None = None) -> Decomposition:
    """Choose among the restarts by their errors.

    Args:
        run: its components are judged, unless others are given.
        components: an earlier state, with which the run counts as unfinished.
        errors: held-out errors [R], if they are known.

    Raises:
        NonFiniteLoss: the run's own components or their errors are not finite.
    """
    everything = run.whole(components or run.components)
    done = components is None and errors is None
    finite, threshold = all(bool(p.isfinite().all()) for p in everything.parameters()), None
    if errors is None and finite:
        errors, threshold = scores(run, components or run.components)
    elif errors is None:
        errors = torch.full((run.config.restarts,), torch.nan)
    # A judge may find a restart infinitely bad, an error may not be.
    if done and not (finite and (errors.isfinite() if run.judge is None else ~errors.isnan()).all()):
        raise checks.NonFiniteLoss(
            f"step {run.step}: the components or their scores {errors.tolist()} are NaN or infinite; the last "
            "finite state is in .result",
            so_far(run, run.last_finite),
        )
    chosen = int(errors.nan_to_num(torch.inf).argmin())
    return Decomposition(
        components=everything.restart(chosen),
        config=run.config,
        history=run.history,
        scores=errors.tolist(),
        chosen=chosen,
        finished=components is None and run.step == run.config.steps,
        fingerprint=fingerprint(run.target.target.state_dict()),
        restarts=everything,
        threshold=None if threshold is None else float(threshold[chosen]),
        selection=copy.deepcopy(run.selection),
        output=name_of(run.target.output),
        attribution=name_of(run.given[0]),
        selection_name=name_of(run.selection),
        active_name=name_of(run.selection.active),
    )


def so_far(run: Run, components: Components | None = None) -> Decomposition:
    """Give the result in any case: of the last finite state, and with NaN for errors that cannot be worked out."""
    finite = all(bool(torch.isfinite(p).all()) for p in run.parameters())
    if components is run.last_finite or not finite:
        for p, last in zip(run.selection.tensors(), run.last_finite_selection, strict=True):
            p.data.copy_(last)
    if components is None and not finite:
        components = run.last_finite
    try:
        return outcome(run, components)
    except (Exception, KeyboardInterrupt) as error:
        message = f"the restarts could not be compared, so that the first was chosen: {error!r}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        return outcome(run, components, torch.full((run.config.restarts,), torch.nan))
