"""Create data/digits.json: a trained network without a known truth, taken apart by the call of chapter 33.

python -m experiments.digits [--only trained random ...] [--processes N]      (about ten minutes of one core)

Small convolutional networks that read drawn digits (experiments/drawn_digits.py), one for each seed, taken apart in two
ways (experiments/trained.py). "Random" is the same network with every decomposed weight replaced by a random one of the
same singular values. "log" has the runs on seed 90, and on the text of experiments/letters.py, by which the settings of
both studies were made, and some that came afterwards; "before" are the runs with the first recipe, batches of 64.
"""

from __future__ import annotations

import torch

import apd_minimal as apd
from experiments.drawn_digits import Reader, digits
from experiments.experiment import Row, Rows, Study, Tensors, prefix
from experiments.trained import BATCH, SHOWN, TOLD, WAYS, by_group, measured, settings, taken_apart, without_training

Job = tuple[str, int, str]  # "trained" or "random", seed, way
SEEDS = (8520, 8521, 8522)


def jobs() -> list[Job]:
    """List the runs."""
    return [("trained", seed, way) for seed in SEEDS for way in WAYS] + [("random", SEEDS[0], "told")]


def settings_of(job: Job) -> Row:
    """List the settings."""
    return settings(job[2], TOLD, BATCH, job[1] + 1000)


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Train a network, take it apart, and measure what can be measured without a truth."""
    kind, seed, way = job
    target = Reader(seed).fit(seed)
    network = apd.Network(target, list(target.weights))
    if kind == "random":
        without_training(network, seed)
        rescaled(target, seed)
        network = apd.Network(target, list(target.weights))
    x, y = digits(2048, torch.Generator().manual_seed(20_000 + seed))
    found, seconds = taken_apart(network, lambda _, g: digits(BATCH, g)[0], way, x, TOLD, seed + 1000)
    row, scores, gates = measured(network, found, x, seed)
    strongest = scores.topk(SHOWN, dim=0).indices.T  # [C, SHOWN]
    row |= {
        "seconds": seconds,
        "accuracy": float((target(x).argmax(1) == y).float().mean()),
        "by_class": by_group(gates, y, 10),
        "attributed": by_group(scores, y, 10),
    }
    pictures = (x[strongest, 0].clamp(0, 1) * 255).to(torch.uint8)
    return [row], {f"{prefix(job)}pictures": pictures.contiguous()}


@torch.no_grad()
def rescaled(target: Reader, seed: int) -> None:
    """Scale the scores as in training, in place."""
    scores = target(digits(2048, torch.Generator().manual_seed(seed))[0])
    for p in target.layers[5].parameters():
        p.div_((scores - scores.mean(0)).square().mean().sqrt())


RUNS = Rows(
    fields=("kind", "seed", "way"),
    jobs=lambda rows: jobs(),
    run=run,
    settings=settings_of,
    order=lambda job: jobs().index(job),
)
STUDY = Study("digits", {"runs": RUNS}, about=lambda processes: {"processes": processes}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
