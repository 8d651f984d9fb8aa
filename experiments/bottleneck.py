"""Create data/bottleneck.json: TMS of several sizes decomposed without a k, which follows an allowed error.

python -m experiments.bottleneck [--only 5-2 7-3 ...] [--processes N]

Chapter 28. `Bottleneck` as it stands; everything else is the same at every size: three components for each feature,
rank 4, a simplicity loss from 20 to 0, six restarts that differ in how fast k follows, of which the judge picks one.
The settings were made on target seeds 90 to 95; the seeds here were fixed before, and run once. The decomposition has
another seed than its target. At one size the data is also sparser and denser (probability 0.01 and 0.1), with nothing
changed. Every restart is kept with what it owns and its held-out error, so that other picks can be compared, and so is
how k went.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import apd_minimal as apd
from apd_minimal.bottleneck import GAINS, Bottleneck
from apd_minimal.study import rate
from experiments.experiment import Row, Rows, Study, Tensors
from experiments.tuned import known

TARGETS = {"5-2": 10, "7-3": 5, "10-4": 3, "20-6": 2, "40-10": 1}
FIRST_SEED = 7400
OTHER_DATA = {"5-2": 2}  # targets at each of the other probabilities
KINDS = {"rotated": 2}  # targets of 5-2 whose inputs are rotated
BATCH = 512
Job = tuple[str, float, int]  # size, perhaps "rotated"; probability of a feature; seed


def jobs() -> list[Job]:
    """List the runs; the longest is last."""
    plain = [(size, 0.05, FIRST_SEED + i) for size, n in TARGETS.items() for i in range(n)]
    other = [(size, p, FIRST_SEED + i) for size, n in OTHER_DATA.items() for p in (0.01, 0.1) for i in range(n)]
    rotated = [(f"5-2 {kind}", 0.05, FIRST_SEED + i) for kind, n in KINDS.items() for i in range(n)]
    small, large = plain[:-1], plain[-1:]
    return [*small, *other, *rotated, *large]


def settings_of(job: Job) -> Row:
    """Give the settings: only C follows the size."""
    n_features = int(job[0].split("-")[0])
    selection = Bottleneck(gain=GAINS)
    return {
        "n_components": 3 * n_features,
        "rank": 4,
        "steps": 1500,
        "lr": 1e-2,
        "simplicity": ((0.0, 20.0), (0.7, 0.0)),
        "restarts": len(GAINS),
        "seed": job[2] + 1000,  # another than the target's, so that nothing can start where its weights did
        "selection": {"allowed": selection.allowed, "gain": selection.gain, "first": selection.first},
    }


def target_of(job: Job) -> apd.targets.TMS:
    """Train a target, and rotate its inputs if its name says so."""
    size, *rotated = job[0].split()
    n, d = map(int, size.split("-"))
    target = apd.targets.TMS(n, d, probability=job[1]).fit(seed=job[2])
    return target.rotate(seed=job[2]) if rotated else target


class Noted(Bottleneck):
    """It notes its k and the error at a hundred moments of the run."""

    def observe(self, error: torch.Tensor, nothing: torch.Tensor, t: float) -> None:
        """Note, and follow."""
        super().observe(error, nothing, t)
        self.noted: list[Row] = getattr(self, "noted", [])
        if t >= len(self.noted) / 100:
            sparse, off = self.state()[1]
            share = (sparse / off).tolist() if bool((off > 0).all()) else None
            self.noted.append({"t": round(t, 4), "k": [round(k, 4) for k in self.k.tolist()], "error": share})


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Train a target, decompose it without a k, and measure."""
    target, settings, selection = target_of(job), settings_of(job), Noted(gain=GAINS)
    settings.pop("selection")
    batches, judge = target.data(BATCH), rate.Judge(attribution=target.attributions)
    start = time.process_time()
    found = apd.decompose(
        target, batches, target.weights, selection=selection, judge=judge, attribution=target.attributions,
        progress=False, **settings,
    )  # fmt: skip
    seconds = time.process_time() - start
    x = target.data(8192)(0, torch.Generator().manual_seed(20_000 + job[2]))
    network = apd.Network(target, target.weights)
    assert found.restarts is not None
    rows: list[dict[str, Any]] = []
    for i, bits in enumerate(found.scores):
        components = found.restarts.restart(i)
        own, k = target.ownership(components), float(selection.k[i])
        errors = apd.metrics.scrubbing(target, components, x, k, attribution=target.attributions)
        rows.append(
            {
                "owned": int(own.owned.sum()),
                "least_cosine": float(own.cosine.min()),
                "bits": bits,
                "k": k,
                "error": errors.means()["top_k"],
                "alive": int((components.norms() > 0).sum()),
            }
        )
    row = {
        "owned": rows[found.chosen]["owned"],
        "chosen": found.chosen,
        "mean_active": batches.mean_active,
        "bits": judge(network, found.components, x),
        "known": {name: judge(network, components, x) for name, components in known(target).items()},
        "same_line": target.same_line,
        "restarts": rows,
        "noted": selection.noted,
        "seconds": round(seconds, 1),
    }
    return [row], {}


RUNS = Rows(
    fields=("size", "probability", "seed"),
    jobs=lambda rows: jobs(),
    run=run,
    settings=settings_of,
    order=jobs().index,
)
STUDY = Study("bottleneck", {"runs": RUNS}, about=lambda processes: {"processes": processes}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
