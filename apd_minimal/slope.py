"""Refuse a divergence that has no slope by the outputs, so that a run would train on nothing (chapter 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from .decomposition import name_of
from .losses import sample_errors
from .train import Run

N_PLACES = 12
"""Places between the outputs at the start and those of the target: each is half as far from these as the last."""


def check_divergence(run: Run, x: Tensor) -> None:
    """Check that the divergence has a slope somewhere between the outputs of the first components and the target's.

    Training has to go that way. Only a divergence that changes on it, and still has no slope anywhere, moves in steps.
    One that does not change may have nothing to say about these inputs, or saturate: that is none of this.

    Args:
        run: before its first step.
        x: inputs of the first step [B, ...].

    Raises:
        TypeError: the divergence has no derivative.
        ValueError: it changes in steps, or changes its arguments in place.
    """
    with torch.no_grad():
        wanted = run.target(x)
        start = run.target(x, run.components)
    errors = []
    for place in range(N_PLACES):
        outputs = (wanted + 0.5**place * (start - wanted)).requires_grad_()
        lent, versions = outputs.clone(), wanted._version
        error = sample_errors(lent, wanted, run.divergence)
        if lent._version or wanted._version != versions:
            name = name_of(run.divergence)
            raise ValueError(
                f"divergence must leave the outputs that it is given as they are, got {name}, which does not"
            )
        (slope,) = torch.autograd.grad(error.sum(), outputs, allow_unused=True)
        if slope is not None and slope.any():  # NaN counts
            return
        errors.append(error.detach())
    if not all(torch.equal(error, errors[0]) for error in errors):
        raise ValueError(
            f"divergence must have a slope by the outputs, got {name_of(run.divergence)}, which goes from "
            f"{errors[0].mean():.3g} at the first components to {errors[-1].mean():.3g} near the target without any: "
            "nothing would train (does it round, compare or detach the outputs?)"
        )
