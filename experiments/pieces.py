"""Create data/pieces.json: an induction circuit found from random starts, in pieces that are merged (chapter 36).

python -m experiments.pieces [--only "as it is" "usual inputs" ...] [--processes N]          (about an hour of one core)

The target is chapter 36's, "lean": no query or key has more rank than its head needs. Inputs ask one circuit each.
Eight components, one on at a time, at a high price of rank, become pieces of circuits. When that price has fallen, k is
2 for a moment, and pieces that are on together are merged by bits. From there on one is on at a time again, and the
others fade as fast as the error allows (`Held`), at a low price of rank. The judge picks among four starts.

One thing is changed at a time, on three targets each: "full", the target that the chapter began with, whose circuits
have more rank than they need; "usual inputs", on which any number of circuits is asked; "no merging"; "no fading".
"random" has no circuits: every matrix is a random one of the same singular values.

The settings were made on seeds 90, 91 and 8640, which are in "log", with what was tried before. All others are from
8660 up, and each is run once. They were listed before any of these targets was made.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.algorithm import begin, finish
from apd_minimal.config import Config
from apd_minimal.selection import TopK
from apd_minimal.study import controls, matching
from apd_minimal.study.rate import Judge
from apd_minimal.targets.induction import Induction
from apd_minimal.tidy.merge import merge_by_bits
from experiments import induction
from experiments.experiment import Row, Rows, Study, Tensors, numbers

Job = tuple[str, int]  # what is changed, seed
FIRST, BATCH = 8660, 256
SETTINGS: Row = {
    "n_components": 8, "rank": 4, "steps": 1500, "restarts": 4, "lr": 3e-2,
    "faithfulness": 20.0, "minimality": 20.0, "scrub": 20.0,
    "simplicity": ((0.0, 100.0), (0.6, 0.0), (0.65, 10.0), (0.9, 0.0)),
    "top_k": ((0.0, 1.0), (0.59, 1.0), (0.6, 2.0), (0.61, 1.0)),
    "tidy_every": 0.6, "tidy_from": 0.5, "tidy_until": 0.7, "alpha": 0.5, "reseed_until": 0.0,
}  # fmt: skip
SINCE = 0.62  # progress from which the others fade; 1 for not at all
CHANGES: dict[str, Row] = {
    name: {} for name in ("as it is", "full", "usual inputs", "no merging", "no fading", "random")
}
CHANGES["no merging"] = {"tidy_every": 0.0}
TARGETS = dict.fromkeys(CHANGES, 3) | {"as it is": 10, "random": 2}
EXACT = (0.001,)  # the judge's error: so small that no answer can be left out, as in the chapter


@dataclass
class Held(TopK):
    """The top k; and from a point of the run on the others are not off, but fade as fast as the error allows.

    A head of which a part is missing looks at nothing, and then no gradient says what is missing. While the others are
    on by a share, it looks at the right place, and more of it can be asked for.

    Args:
        since: progress from which it holds.
        allowed: error of the sparse network, as a share of the error with nothing active, up to which the share falls.
        rate: by which the share falls in a step, or rises.
    """

    since: float = SINCE
    allowed: float = 0.2
    rate: float = 0.005
    observes = True

    def start(self, n_restarts: int, n_components: int, like: Tensor) -> None:
        """Begin with all on."""
        super().start(n_restarts, n_components, like)
        self.left = torch.ones(n_restarts, dtype=like.dtype, device=like.device)

    def choose(self, scores: Tensor, t: float, share: float = 1.0) -> Tensor:
        """Choose the k most attributed, and leave a share of the others."""
        mask = super().choose(scores, t, share)
        left = self.left.reshape(-1, *[1] * (scores.ndim - 1)).to(scores)
        return torch.where(mask, 1.0, left.expand_as(scores)) if t >= self.since else mask

    def observe(self, error: Tensor, nothing: Tensor, t: float) -> None:
        """Let the share fall where the error is allowed, and rise where it is not."""
        if t >= self.since:
            step = torch.where(error < self.allowed * nothing, -self.rate, self.rate)
            self.left = (self.left + step).clamp(0, 1)

    def state(self) -> list[Tensor]:
        """Give the shares, which are a part of the run."""
        return [self.left]


def jobs() -> list[Job]:
    """List the runs."""
    return [(change, FIRST + i) for change, n in TARGETS.items() for i in range(n)]


def settings_of(job: Job) -> Row:
    """Give the settings of a run."""
    change, seed = job
    return {**SETTINGS, **CHANGES[change], "seed": seed + 1000}


def target_of(job: Job) -> Induction:
    """Make the target of a run."""
    change, seed = job
    target = Induction(seed=seed, lean=change != "full")
    return induction.without_circuits(target, seed) if change == "random" else target


def by_use(network: apd.Network, components: apd.Components, x: Tensor, k: float) -> apd.Components:
    """Merge components that are on together, as a run does at its one merging: nothing is trained.

    Args:
        network: the target.
        components: C of them.
        x: inputs.
        k: how many are on, on average.
    """
    scores = induction.attribution(network, components, x)
    least = scores.flatten().topk(int(k * len(x))).values[-1]
    stacked = components.map(lambda t: t.detach()[None].clone())
    merge_by_bits(stacked, (scores >= least)[None].float(), SETTINGS["alpha"])
    return stacked.restart(0)


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Take one target apart from random starts, and measure."""
    change, seed = job
    known, target = Induction(seed=seed, lean=change != "full"), target_of(job)
    score, began = induction.scores_of("sequence"), time.process_time()
    network, exact = apd.Network(target, target.weights), Judge(EXACT, attribution=score)
    source = target.data(BATCH) if change == "usual inputs" else induction.OneAtATime(known, BATCH)
    settings = settings_of(job)
    selection = Held(settings["top_k"], since=1.0 if change == "no fading" else SINCE)
    started = begin(network, source, Config.from_dict(settings), attribution=score, selection=selection)
    started.judge = exact
    found = finish(started, None, 500, None, False, None)
    seconds = time.process_time() - began
    parts, every = found.components, found.restarts
    assert every is not None and every.restarts is not None and found.scores is not None
    best = sorted(range(every.restarts), key=found.scores.__getitem__)
    again = matching.match_weights(parts, every.restart(best[1]))
    row: Row = {
        "in_use": int((parts.norms() > 0).sum()),
        "relative_faithfulness": apd.metrics.relative_faithfulness(parts, network.weights).item(),
        "scores": [induction.finite(s) for s in found.scores],
        "second start": {"mean": again.mean, "chance": float(again.chance.mean())},
        "seconds": round(seconds, 1),
    }
    if change == "random":
        return [row], {}
    x = source(0, torch.Generator().manual_seed(20_000 + seed))
    truth = target.mechanisms()
    true, dealt = apd.Components.from_matrices(truth, SETTINGS["rank"]), controls.dealt(parts, seed)
    heads = apd.Components.from_matrices(induction.heads(target), SETTINGS["rank"])
    own = apd.metrics.ownership(parts, truth)
    every_own = [apd.metrics.ownership(every.restart(r), truth) for r in range(every.restarts)]
    owners = [[int(j)] for j in own.owner]
    other = Induction(seed=seed + 50, lean=change != "full").mechanisms()

    def owned_by(components: apd.Components) -> list[bool]:
        return apd.metrics.ownership(components, truth).owned.tolist()

    row |= {
        "owned": own.owned.tolist(),
        "cosine": [round(v, 4) for v in own.cosine.tolist()],
        "length_ratio": [round(v, 4) for v in own.length_ratio.tolist()],
        "owned_by_restart": [o.owned.tolist() for o in every_own],
        "summed": [[round(v, 4) for v in induction.summed(every.restart(r), truth)] for r in range(every.restarts)],
        "dealt_owned": owned_by(dealt),
        "dealt_cosine": apd.metrics.ownership(dealt, truth).cosine.mean().item(),
        "another_cosine": apd.metrics.ownership(parts, other).cosine.mean().item(),
        "heads_owned": owned_by(heads),
        "heads_merged_owned": owned_by(by_use(network, heads, x, 4 / 3)),
        "bits": induction.finite(exact(network, parts, x)),
        "bits_of_the_truth": exact(network, true, x),
        "bits_dealt": induction.finite(exact(network, dealt, x)),
        "causal": induction.causal(target, parts, owners, seed).tolist(),
        "causal_dealt": induction.causal(target, dealt, owners, seed).tolist(),
    }
    return [row], {}


RUNS = Rows(
    fields=("change", "seed"),
    jobs=lambda rows: jobs(),
    run=run,
    settings=lambda job: numbers(settings_of(job), batch=BATCH, since=1.0 if job[0] == "no fading" else SINCE),
    order=lambda job: (list(CHANGES).index(job[0]), job[1]),
)
STUDY = Study("pieces", {"runs": RUNS}, about=lambda processes: {"processes": processes}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
