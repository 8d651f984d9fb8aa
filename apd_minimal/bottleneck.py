"""A selection without k: as few components as an allowed error takes (chapter 28).

What is kept of the target is fixed instead of how many components are on. The error of the sparse network is compared
with the error that it would have with nothing active; while it is above a share that is allowed, more components are
let through, and while it is below, fewer: dual ascent on a constraint, with log k in the place of the multiplier. The
other settings follow from the number of components and from the error with nothing active::

    network, x = Network(target, weights), batches(0, torch.Generator().manual_seed(0))
    decompose(target, batches, weights, C, judge=apd.rate.Judge(), **settings(network, x, C))

Where outputs are distributions, the run, the judge and the rule are all told::

    judge, rule = apd.rate.Judge(divergence="kl"), settings(network, x, C, "kl")
    decompose(target, batches, weights, C, judge=judge, divergence="kl", **rule)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import checks
from .components import Components
from .config import Schedule, at_progress, schedule
from .hints import NOT_STARTED
from .losses import DIVERGENCES, Divergence, minimality, simplicity_exact
from .network import Network
from .selection import Selection

GAINS = (4.0, 6.0, 8.0, 10.0, 12.0, 16.0)
"""Gains of six restarts, of which a judge picks one: no one of them is best at every size (chapter 28)."""
FAITHFULNESS = 60.0
"""Weight of the faithfulness loss, in units of the error with nothing active."""
SIMPLICITY = 100.0
"""First weight of the simplicity loss, in units of the error with nothing active over the loss of the whole network."""
MEMORY = 0.9
"""Share of the errors so far that is kept from step to step: about ten steps count."""


@dataclass(eq=False)
class Bottleneck(Selection):
    """Active are the k most attributed pairs (sample, component) of the batch, and k follows the error.

    The k of each restart begins small and grows, since components that come apart while few may be on stay apart.
    d log k / d progress is `gain` times log(error / allowed), the logarithm cut off at -1 and 1.

    Args:
        allowed: error of the sparse network as a share of the one with nothing active, above 0 and below 1; a number
            or points (progress, value).
        gain: most e-folds that k grows or shrinks in a run, above 0; a number, or one for each restart.
        first: mean number of active components at the start, of a sample on which the weights do anything; above 0.

    Raises:
        TypeError, ValueError: numbers out of range.
    """

    allowed: Schedule = ((0.0, 0.3), (0.3, 0.3), (0.6, 0.05), (0.7, 0.05), (0.8, 0.0125))
    gain: float | tuple[float, ...] = 8.0
    first: float = 0.5

    observes = True

    def __post_init__(self) -> None:
        self.allowed = schedule("allowed", self.allowed, partial(checks.number, low=0, high=1, above=True, below=True))
        gains = self.gain if isinstance(self.gain, (list, tuple)) else (self.gain,)
        checked = tuple(checks.number("gain", gain, 0, above=True) for gain in gains)
        if not checked:
            raise ValueError("gain must be a number or one for each restart, got ()")
        self.gain = checked if isinstance(self.gain, (list, tuple)) else checked[0]
        self.first = checks.number("first", self.first, 0, above=True)

    def start(self, n_restarts: int, n_components: int, like: Tensor) -> None:
        """Prepare a run: log k is not known before the first batch.

        Args:
            n_restarts: R.
            n_components: C.
            like: a tensor of the components' type and device.

        Raises:
            ValueError: gains for another number of restarts.
        """
        if isinstance(self.gain, tuple) and len(self.gain) != n_restarts:
            raise ValueError(f"gain must be one number or {n_restarts}, one for each restart, got {self.gain}")
        self._gain = torch.tensor(self.gain, dtype=torch.double, device=like.device)
        self._log_k = torch.full((n_restarts,), math.nan, dtype=torch.double, device=like.device)
        self._errors = torch.zeros(2, n_restarts, dtype=torch.double, device=like.device)  # sparse, and with nothing
        self._at = torch.zeros(1, dtype=torch.double)  # progress at which k was last changed

    @property
    def k(self) -> Tensor:
        """Mean number of active components of a sample as it stands, [R]; NaN before the first step."""
        return self._log_k.exp()

    def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
        """Choose the k most attributed of each restart: boolean gates. What scores 0 is never active.

        Args:
            scores: attributions [R, B, (positions,) C].
            t: progress of the run; not needed.
            share: of the step's samples, those that are in `scores`; k is for all of them.

        Raises:
            ValueError: no run has started it.
        """
        if not hasattr(self, "_log_k"):
            raise ValueError(NOT_STARTED.format(self))
        if self._log_k.isnan().any():
            self._log_k.fill_(math.log(self.first * share))
        flat = scores.flatten(1)
        rows, C = scores[0, ..., 0].numel(), scores.shape[-1]
        self._range = math.log(share / max(1, rows)), math.log(C * share)  # from one pair of the batch to all
        n = self._pairs(scores, share)
        values, where = flat.topk(int(n.max()) if flat.numel() else 0, dim=1)
        on = (torch.arange(values.shape[1], device=n.device) < n[:, None]) & (values > 0)
        return torch.zeros_like(flat, dtype=torch.bool).scatter(1, where, on).reshape(scores.shape)

    def observe(self, error: Tensor, nothing: Tensor, t: float) -> None:
        """Change k: up where the error is larger than allowed, down where it is smaller.

        Args:
            error: of the step's sparse network, [R].
            nothing: the error on the same samples with no component active, [R].
            t: progress of the run, in [0, 1].
        """
        self._errors.mul_(MEMORY).add_((1 - MEMORY) * torch.stack([error, nothing]).to(self._errors))
        sparse, off = self._errors
        ratio = (sparse / off).nan_to_num(1.0, 1.0)  # where nothing happens, there is nothing to learn
        change = (ratio.log() - math.log(at_progress(self.allowed, t))).clamp(-1, 1)
        self._log_k.add_(torch.where(off > 0, change, 0.0) * self._gain * (t - float(self._at)))
        self._log_k.clamp_(*self._range)  # so that k comes back as fast as it went
        self._at.fill_(t)

    def threshold(self, scores: Tensor) -> Tensor:
        """Give the middle between the smallest active score of each restart and the next one, [R].

        Args:
            scores: attributions [R, B, (positions,) C] on held-out samples.
        """
        ordered = scores.flatten(1).sort(dim=1, descending=True).values
        n = self._pairs(scores, 1.0).clamp(max=ordered.shape[1] - 1)[:, None]
        return (ordered.gather(1, n - 1) + ordered.gather(1, n))[:, 0] / 2

    def state(self) -> list[Tensor]:
        """List what a checkpoint must hold: log k [R], the errors [2, R], and the progress [1]."""
        return [self._log_k, self._errors, self._at]

    def _pairs(self, scores: Tensor, share: float) -> Tensor:
        """Give the number of pairs that are active, [R]: at least one, at most all."""
        rows, C = scores[0, ..., 0].numel(), scores.shape[-1]
        return (self.k * rows / share + 1e-6).long().clamp(1, max(1, rows * C))


@torch.no_grad()
def settings(network: Network, x: Tensor, n_components: int, divergence: str | Divergence = "mse") -> dict[str, Any]:
    """Make the settings of a decomposition without a k: the same rule for every network.

    The losses of the sparse network grow with the share of samples on which much is active, and with the unit of the
    outputs. Faithfulness and simplicity do not: their weights are in proportion to the error with nothing active.
    That of simplicity is also divided by what the loss would be with the whole network as one component that is always
    on, so that neither the unit of the weights nor the sizes of the matrices count. More components take more steps.

    Args:
        network: the target with the weights to decompose.
        x: inputs [B, ...] of the kind that the run draws, a thousand or more; best without samples that are all zero.
        n_components: C.
        divergence: that of the run.

    Returns:
        dict[str, Any]: arguments of `decompose`: the selection, and numbers for `Config`.

    Raises:
        TypeError, ValueError: arguments that do not fit, or a network that does the same with nothing active.
    """
    checks.kind("network", network, Network, "an apd_minimal.Network")
    n_components, x = checks.number("n_components", n_components, 1, whole=True), checks.inputs(x)
    if not callable(divergence):
        checks.choice("divergence", divergence, list(DIVERGENCES))
    function = DIVERGENCES[divergence] if isinstance(divergence, str) else divergence
    zeros = {path: w.new_zeros(1, 1, max(w.shape)) for path, w in network.weights.items()}
    A = {path: zeros[path][..., : w.shape[0]].mT for path, w in network.weights.items()}
    B = {path: zeros[path][..., : w.shape[1]] for path, w in network.weights.items()}
    with checks.running(x, "the network's weights"):
        nothing = float(minimality(network(x, Components(A, B)), network(x), function))
        whole = Components.from_matrices({path: w.detach()[None] for path, w in network.weights.items()})
    if not nothing > 0:
        raise ValueError(f"the network gives the same outputs with nothing active: the error is {nothing} on inputs x")
    simple = float(simplicity_exact(whole, next(iter(whole.A.values())).new_ones(1, 1)))
    return {
        "selection": Bottleneck(gain=GAINS),
        "restarts": len(GAINS),
        "rank": 4,
        "lr": 1e-2,
        "steps": max(1500, 25 * n_components),
        "faithfulness": FAITHFULNESS * nothing,
        "simplicity": ((0.0, SIMPLICITY * nothing / simple), (0.7, 0.0)),
    }
