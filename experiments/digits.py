"""Create data/digits.json: a trained network without a known truth, taken apart by the call of chapter 33.

python -m experiments.digits [--only trained random ...] [--processes N]      (about 40 minutes of one core)

Small convolutional networks that read drawn digits (experiments/drawn_digits.py), one for each seed, taken apart in two
ways (experiments/trained.py). "Random" is the same network with every decomposed weight replaced by a random one of the
same singular values. "kinds" came later: networks of six other kinds that see the same pictures, taken apart by the
same call with the settings of the convolutional ones; at first one of each kind had a random twin, then all. "log"
has the runs on seed 90 of the convolutional network, and on the text of experiments/letters.py, by which the settings
of both studies were made, and some that came afterwards; "before" are the runs with the first recipe, batches of 64.
"""

from __future__ import annotations

import torch
from torch import Tensor

import apd_minimal as apd
from experiments.drawn_digits import (
    BilinearReader,
    DiagonalReader,
    ExpertsReader,
    FlatReader,
    Reader,
    RecurrentReader,
    SelectiveReader,
    digits,
)
from experiments.experiment import Row, Rows, Study, Tensors, prefix
from experiments.trained import BATCH, SHOWN, TOLD, WAYS, by_group, measured, settings, taken_apart, without_training

Job = tuple[str, int, str]  # "trained" or "random", seed, way; of another kind: its name, seed, "trained" or "random"
SEEDS = (8520, 8521, 8522)
KINDS: dict[str, type[Reader]] = {
    "MLP": FlatReader,
    "bilinear": BilinearReader,
    "experts": ExpertsReader,
    "RNN": RecurrentReader,
    "SSM": DiagonalReader,
    "selective": SelectiveReader,
}
KIND_SEEDS = (8540, 8541, 8542)


def jobs() -> list[Job]:
    """List the runs."""
    trained: list[Job] = [("trained", seed, way) for seed in SEEDS for way in WAYS]
    return trained + [("random", seed, "told") for seed in SEEDS]


def settings_of(job: Job) -> Row:
    """List the settings."""
    return settings(job[2], TOLD, BATCH, job[1] + 1000)


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Train a network, take it apart, and measure what can be measured without a truth."""
    row, pictures = read(Reader, *job)
    return [row], {f"{prefix(job)}pictures": pictures}


def run_kind(job: Job) -> tuple[list[Row], Tensors]:
    """Do the same with a network of another kind, k told."""
    row, pictures = read(KINDS[job[0]], job[2], job[1], "told")
    return [row], {f"{prefix(job)}pictures": pictures}


def read(reader: type[Reader], kind: str, seed: int, way: str) -> tuple[Row, Tensor]:
    """Train a network, take it apart, and measure; gives the row, and pictures [C, SHOWN, 12, 12] of each component."""
    target = reader(seed).fit(seed)
    network = apd.Network(target, list(target.weights))
    if kind == "random":
        untrained(target, seed)
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
    return row, pictures.contiguous()


@torch.no_grad()
def untrained(target: Reader, seed: int) -> None:
    """Replace the weights by random ones of the same singular values, and scale the scores as in training, in place.

    Biases stay as they were learnt, and the decays of a state-space model: random ones, some beyond 1, would explode.
    """
    without_training(apd.Network(target, [path for path in target.weights if path != "decay.a"]), seed)
    scores = target(digits(2048, torch.Generator().manual_seed(seed))[0])
    for p in target.get_submodule(target.ends).parameters():
        p.div_((scores - scores.mean(0)).square().mean().sqrt())


RUNS = Rows(
    fields=("kind", "seed", "way"),
    jobs=lambda rows: jobs(),
    run=run,
    settings=settings_of,
    order=lambda job: jobs().index(job),
)
OTHERS = Rows(
    fields=("network", "seed", "kind"),
    jobs=lambda rows: [(name, s, kind) for kind in ("trained", "random") for name in KINDS for s in KIND_SEEDS],
    run=run_kind,
    settings=lambda job: settings("told", TOLD, BATCH, job[1] + 1000),
    order=lambda job: (list(KINDS).index(job[0]), job[2] == "random", job[1]),
)
STUDY = Study("digits", {"runs": RUNS, "kinds": OTHERS}, about=lambda processes: {"processes": processes}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
