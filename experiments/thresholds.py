"""Create data/thresholds.json: other ways to do without a k, on targets of chapter 28.

python -m experiments.thresholds [--only runs tries] [--processes N]     (about seven minutes of a core)

"Runs" keep the fewest pairs (sample, component) that hold a share of the batch's squared attributions; the share was
given, and so were two others, on TMS 5-2 only: one that does not fall, and one that falls early. The targets are the
first of "runs" in data/bottleneck.json, so that the rule of chapter 28 can be compared on the same ones, and so are all
settings but the selection; with restarts that differ by their random start alone, of which the judge picks one, six on
TMS 5-2 and two on TMS 40-10. "Tries" learn a threshold for each component at a price for each open gate, straight
through or with gates that are drawn, with the simplicity loss and without, on target 90, on which nothing is reported
otherwise: it did not get far enough to run it on others. Most of those without it were first tried by hand, with three
restarts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal import bottleneck
from apd_minimal.config import Schedule, at_progress
from apd_minimal.selection import Selection
from experiments.bottleneck import BATCH, measured, n_components, target_of
from experiments.experiment import Row, Rows, Study, Tensors, scaled

LEFT: dict[str, Schedule] = {  # share of the squares that may be left out
    "squares": ((0.0, 0.6), (0.5, 0.3), (0.7, 0.05), (1.0, 0.02)),
    "constant": 0.05,
    "fast": ((0.0, 0.6), (0.3, 0.1), (0.7, 0.05), (1.0, 0.02)),
}
PRICES: dict[str, Schedule] = {  # of a gate, in units of the error with nothing active
    "0.1": 0.1,
    "0.02": 0.02,
    "0": 0.0,  # came last: does the simplicity loss alone close the gates?
    "late": ((0.0, 0.0), (0.3, 0.0), (0.6, 0.02)),
    "0.1 alone": 0.1,  # without the simplicity loss, whose slope by the gates is a price, too; components of rank one
    "0.5 alone": 0.5,
    "2 alone": 2.0,
}
FIRST = 0.5  # pairs of a sample that are on at first, as in the rule of chapter 28
STRETCH = (-0.1, 1.1)  # of hard-concrete gates, before they are cut off at 0 and 1
SEEDS = {"5-2": range(7600, 7605), "40-10": range(7600, 7602)}
RESTARTS = {"5-2": 6, "40-10": 2}


class Share(Selection):
    """Active are the fewest pairs (sample, component) of the batch that hold a share of its squared attributions."""

    def __init__(self, left: Schedule) -> None:
        self.left = left
        self.noted: list[Row] = []

    def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
        """Choose among scores [R, B, (positions,) C]: boolean gates."""
        squares, where = scores.flatten(1).double().square().sort(dim=1, descending=True)
        held = squares.cumsum(1)
        on = held - squares < (1 - at_progress(self.left, t)) * held[:, -1:]
        gates = torch.zeros_like(on).scatter(1, where, on).reshape(scores.shape)
        self.k = gates.flatten(1).sum(1).clamp_min(1) / scores[0, ..., 0].numel()
        return gates

    def threshold(self, scores: Tensor) -> Tensor:
        """Give the smallest active score, a little less: [R]."""
        return scores.where(self.choose(scores, 1.0), math.inf).flatten(1).amin(1) * (1 - 1e-6)


class Straight(Selection):
    """Active is what scores above a threshold of its component, which is learned at a fixed price of a gate.

    A gate is 0 or 1, and its slope is that of a sigmoid of the score's logarithm over the threshold's.

    Args:
        price: of a gate that is on, in the unit of the error; a number or points (progress, value).
        seed: of the noise, where there is any.
    """

    def __init__(self, price: Schedule, seed: int = 0) -> None:
        self.price, self.generator = price, torch.Generator().manual_seed(seed)
        self.noted: list[Row] = []

    def start(self, n_restarts: int, n_components: int, like: Tensor) -> None:
        """Make log thresholds [R, C]; they are set by the first batch."""
        self.log = like.new_full((n_restarts, n_components), math.nan).requires_grad_()

    def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
        """Choose among scores [R, B, C]: gates in [0, 1]."""
        log = scores.clamp_min(1e-12).log()
        if self.log.isnan().any():
            n = max(1, int(FIRST * share * scores.shape[1]))
            self.log.data[:] = log.flatten(1).topk(n, dim=1).values[:, -1:]
        gates = self.opened(log - self.log[:, None], t)
        self.k = (gates.detach() > 0.5).flatten(1).sum(1).clamp_min(1) / scores.shape[1]
        return gates

    def opened(self, margin: Tensor, t: float) -> Tensor:
        """Open gates by how far scores are above the threshold: 0 or 1."""
        soft = margin.sigmoid()
        return (margin > 0).to(soft) + (soft - soft.detach())

    def penalty(self, gates: Tensor, t: float) -> Tensor:
        """Charge for each gate: [R]."""
        return at_progress(self.price, t) * gates.sum(-1).mean(1)

    def parameters(self) -> list[Tensor]:
        """List the log thresholds [R, C]."""
        return [self.log]

    def active(self, scores: Tensor, threshold: Tensor | None) -> Tensor:
        """Say who scores above its threshold."""
        return scores.clamp_min(1e-12).log() > self.log[:, None]


class Concrete(Straight):
    """The same with gates that are drawn: a sigmoid of margin and noise, stretched and cut off at 0 and 1."""

    def opened(self, margin: Tensor, t: float) -> Tensor:
        """Open gates by the margin, with logistic noise while it trains: in [0, 1]."""
        u = torch.rand(margin.shape, generator=self.generator).clamp(1e-6, 1 - 1e-6)
        noise = torch.logit(u) if t < 1 else torch.zeros_like(u)
        low, high = STRETCH
        return (((margin + noise) * 1.5).sigmoid() * (high - low) + low).clamp(0, 1)


def decomposed(
    size: str, seed: int, selection_of: Callable[[float], Selection], **changes: float
) -> tuple[list[Row], Tensors]:
    """Train a target, decompose it by a selection, given the error with nothing active, and measure."""
    same = (size, 0.05, seed)
    target = target_of(same)
    batches = target.data(BATCH, nonempty=True)
    x = target.data(8192, nonempty=True)(0, torch.Generator().manual_seed(30_000 + seed))
    settings = bottleneck.settings(apd.Network(target, target.weights), x, n_components(same))
    nothing = settings["faithfulness"] / bottleneck.FAITHFULNESS
    settings |= {"n_components": n_components(same), "seed": seed + 1000, "restarts": RESTARTS[size]} | changes
    row = measured(same, target, batches, settings, selection_of(nothing))
    del row["noted"]
    return [row], {}


def run(job: tuple[str, str, int]) -> tuple[list[Row], Tensors]:
    """Keep the fewest pairs that hold a share of the squares."""
    way, size, seed = job
    return decomposed(size, seed, lambda nothing: Share(LEFT[way]))


def attempt(job: tuple[str, str, int]) -> tuple[list[Row], Tensors]:
    """Learn thresholds."""
    way, price, seed = job
    kind = {"straight": Straight, "concrete": Concrete}[way]
    changes = {"simplicity": 0.0, "rank": 1} if "alone" in price else {}
    return decomposed("5-2", seed, lambda nothing: kind(scaled(PRICES[price], nothing), seed), **changes)


def settings_of(job: tuple[str, str, int]) -> Row:
    """List what differs from chapter 28, and how long a run is."""
    C = n_components((job[1], 0.05, job[2]))
    return {
        "n_components": C,
        "steps": max(1500, 25 * C),
        "lr": 1e-2,
        "restarts": RESTARTS[job[1]],
        "selection": {"left": LEFT[job[0]]},
    }


RUNS = Rows(
    ("way", "size", "seed"),
    lambda rows: [
        (way, size, seed) for way in LEFT for size in SEEDS if way == "squares" or size == "5-2" for seed in SEEDS[size]
    ],
    run,
    settings_of,
    lambda job: (list(LEFT).index(job[0]), list(SEEDS).index(job[1]), job[2]),
)
TRIES = Rows(
    ("way", "price", "seed"),
    lambda rows: [(w, p, 90) for w in ("straight", "concrete") for p in PRICES],
    attempt,
    lambda job: {"price_at": PRICES[job[1]], "first": FIRST, "stretch": STRETCH, "lr": 1e-2},
)
STUDY = Study(
    "thresholds", {"runs": RUNS, "tries": TRIES}, about=lambda processes: {"processes": processes}, compact=True
)

if __name__ == "__main__":
    STUDY.main(__doc__)
