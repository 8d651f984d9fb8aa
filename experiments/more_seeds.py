"""Create data/more_seeds.json: the recipe on ten more targets of TMS 5-2, and how near features are to a line.

python -m experiments.more_seeds        (about 20 seconds of one core for each target)

Seeds 20 to 29 follow those of `tms.json`. Each was run once, with the recipe as it was; none was set aside. Seed 27 was
known before: it is why the others were run.
"""

from __future__ import annotations

import apd_minimal as apd
from experiments import tms
from experiments.experiment import Row, Rows, Study, Tensors

SIZE, SEEDS = "tms-5-2", range(20, 30)


def run(job: tuple[int]) -> tuple[list[Row], Tensors]:
    """Train one target, decompose it, and list pairs of features on one line, whatever was found."""
    facts = tms.run((SIZE, False, False, "ours", *job))[0][0]
    target = apd.targets.TMS(*tms.SIZES[SIZE]).fit(seed=job[0])
    W = target.encode.weight.detach().T  # [5, 2]
    W = W / W.norm(dim=1, keepdim=True)
    cosines = (W @ W.T).abs().triu(1)
    kept = ("seconds", "represented", "owned", "cosine", "length_ratio", "purity", "scores", "restarts_complete")
    return [{name: facts[name] for name in kept} | {"largest_cosine": cosines.max().item()}], {}


RUNS = Rows(
    fields=("seed",),
    jobs=lambda rows: [(seed,) for seed in SEEDS],
    run=run,
    settings=lambda job: tms.settings_of((SIZE, False, False, "ours", job[0])),
)
STUDY = Study("more_seeds", {"runs": RUNS})

if __name__ == "__main__":
    STUDY.main(__doc__)
