"""Create data/letters.json: a small transformer trained on a text, taken apart by the call of chapter 33.

python -m experiments.letters [--only trained untrained ...] [--processes N]      (about ten minutes of one core)

Transformers of one layer that learn the next character of the text that Python ships as its language reference
(experiments/reading.py), one for each seed. Attention and neurons are taken apart, as they work for the character
after the last of the window; gates are for a whole window. "Untrained" is the same network with every decomposed weight
replaced by a random one of the same singular values. Settings were made on seed 90 ("log" in data/digits.json).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import apd_minimal as apd
from apd_minimal.targets.transformer import last_position
from experiments.experiment import Row, Rows, Study, Tensors
from experiments.reading import LETTERS, Writer, table_loss, windows, words
from experiments.trained import BATCH, SHOWN, TOLD, by_group, measured, settings, taken_apart, without_training

Job = tuple[str, int, str]  # "trained" or "untrained", seed, way
SEEDS = (8530, 8531)


def jobs() -> list[Job]:
    """List the runs."""
    return [("trained", seed, "told") for seed in SEEDS] + [("untrained", SEEDS[0], "told")]


def settings_of(job: Job) -> Row:
    """List the settings."""
    return settings(job[2], TOLD, BATCH, job[1] + 1000)


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Train a network, take it apart, and measure what can be measured without a truth."""
    kind, seed, way = job
    target = Writer(seed).fit(seed)
    network = apd.Network(target, list(target.weights), last_position)
    both = windows(2048, torch.Generator().manual_seed(20_000 + seed), held_out=True)
    x, y = both[:, :-1], both[:, -1]
    if kind == "untrained":
        without_training(network, seed)
        network = apd.Network(target, list(target.weights), last_position)
    outputs = network(x)
    found, seconds = taken_apart(network, lambda _, g: windows(BATCH, g)[:, :-1], way, x, TOLD, seed + 1000)
    row, scores, gates = measured(network, found, x, seed)
    strongest = scores.topk(SHOWN, dim=0).indices.T  # [C, SHOWN]
    row |= {
        "seconds": seconds,
        "loss": float(F.cross_entropy(outputs, y)),
        "tables": [table_loss(both, n) for n in range(3)],
        "right": float((outputs.argmax(1) == y).float().mean()),
        "by_last": by_group(gates, x[:, -1], len(LETTERS)),
        "by_answer": by_group(gates, outputs.argmax(1), len(LETTERS)),
        "letters": LETTERS,
        "contexts": [
            [[text, LETTERS[a]] for text, a in zip(words(x[rows]), outputs[rows].argmax(1).tolist(), strict=True)]
            for rows in strongest
        ],
    }
    return [row], {}


RUNS = Rows(
    fields=("kind", "seed", "way"),
    jobs=lambda rows: jobs(),
    run=run,
    settings=settings_of,
    order=lambda job: jobs().index(job),
)
STUDY = Study("letters", {"runs": RUNS}, about=lambda processes: {"processes": processes}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
