"""Create data/digits.json: a trained network without a known truth, taken apart by the call of chapter 33.

python -m experiments.digits [--only trained random ...] [--processes N]      (some minutes of one core)

Small convolutional networks that read drawn digits (experiments/drawn_digits.py), one for each seed. The settings are
those of experiments/architectures.py with the batch of its first runs, with six mechanisms expected and one on a
sample: a guess, since nobody knows. "Random" is the same network with every weight replaced by a random one of the same
singular values.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import apd_minimal as apd
from apd_minimal.attributions import gradient
from apd_minimal.study import controls, leakage, matching
from apd_minimal.study.rate import Judge, costs
from experiments import architectures
from experiments.drawn_digits import Reader, digits
from experiments.experiment import Row, Rows, Study, Tensors, prefix

Job = tuple[str, int]  # "trained" or "random", seed
EXPECTED, ACTIVE, SHOWN = 6, 1.0, 8
BATCH = architectures.SMALL
EPSILONS = (0.03, 0.1, 0.3)


def jobs() -> list[Job]:
    """List the runs."""
    return [("trained", 8400), ("random", 8400)]


def settings_of(job: Job) -> Row:
    """List the settings."""
    return {**architectures.settings_of(("CNN", job[1], "planted"), BATCH), "expected": EXPECTED, "active": ACTIVE}


@torch.no_grad()
def without_training(target: Reader, seed: int) -> Reader:
    """Replace every weight by a random one of the same singular values, and scale the scores as in training."""
    generator = torch.Generator().manual_seed(seed)
    sites = {site.path: site.rule for site in apd.Network(target, target.weights).sites}
    for path, own in sites.items():
        parameter = target.get_parameter(path)
        U, S, Vh = torch.linalg.svd(own.matrix(parameter), full_matrices=False)
        U, V = (torch.linalg.qr(torch.randn(m.shape, generator=generator)).Q for m in (U, Vh.T))
        parameter.copy_(own.weight(U @ S.diag() @ V.T))
    scores = target(digits(2048, generator)[0])
    for p in target.layers[5].parameters():
        p.div_((scores - scores.mean(0)).square().mean().sqrt())
    return target


def gates_of(network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
    """Open the gates of the most attributed components of all samples, one a sample on average."""
    scores = gradient(network, components, x)
    return (scores >= scores.flatten().topk(round(ACTIVE * len(x))).values[-1]).float()


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Train a network, take it apart, and measure what can be measured without a truth."""
    kind, seed = job
    target = Reader(seed).fit(seed)
    if kind == "random":
        target = without_training(target, seed)
    paths = list(target.weights)
    x, y = digits(2048, torch.Generator().manual_seed(20_000 + seed))
    arguments: dict[str, Any] = architectures.settings(target, paths, x, EXPECTED, ACTIVE, seed + 1000)
    # There is no truth whose bits could be reached, and the outputs are no sums: larger errors are allowed.
    arguments["judge"] = Judge(EPSILONS)
    start = time.process_time()
    found = apd.decompose(target, lambda _, g: digits(BATCH, g)[0], paths, progress=False, **arguments)
    seconds = time.process_time() - start
    every, network = found.restarts, apd.Network(target, paths)
    assert every is not None and every.restarts is not None and found.scores is not None
    best = sorted(range(every.restarts), key=found.scores.__getitem__)
    used = found.components.subset((found.components.norms() > 0).nonzero().flatten().tolist())
    dealt = controls.dealt(used, seed, turned=True)
    again = matching.match_weights(used, every.restart(best[1]))
    scores, gates = gradient(network, used, x), gates_of(network, used, x)
    outputs = target(x)
    leaks = leakage.leakage(target, used, x[:1024], ACTIVE, outputs="classes") if used.n_components > 1 else None

    def agreement(components: apd.Components, gates: Tensor) -> float:
        return float((network(x, components, gates).argmax(1) == outputs.argmax(1)).float().mean())

    by_class = torch.stack([scores[y == c].mean(0) for c in range(10)], 1)
    row: Row = {
        "seconds": round(seconds, 1),
        "accuracy": float((outputs.argmax(1) == y).float().mean()),
        "agreement": agreement(used, gates),
        "agreement_dealt": agreement(dealt, gates_of(network, dealt, x)),
        "sum": float(apd.metrics.relative_faithfulness(used, network.weights)),
        "in_use": used.n_components,
        "ranks": {path: r.tolist() for path, r in used.ranks().items()},
        "scores": found.scores,
        "bits": [c.bits() for c in costs(network, used, x, EPSILONS)],
        "bits_dealt": [c.bits() for c in costs(network, dealt, x, EPSILONS)],
        "second start": {
            "mean": again.mean, "chance": float(again.chance.mean()),
            "largest_chance": float(again.chance.mean(1).max()),
            "pairs": len(again.first), "above": int(again.above_chance.sum()),
        },
        "by_class": [[round(v, 4) for v in line] for line in F.normalize(by_class, dim=1, p=1).tolist()],
        "use": gates.mean(0).tolist(),
        "leakage": {} if leaks is None else {
            name: [leaks[test].components, leaks[test].dealt, leaks[test].chance]
            for name, test in (("its answer", leakage.ITS), ("own answer", leakage.OWN), ("nearer", leakage.NEARER))
        },
    }  # fmt: skip
    most = scores.topk(SHOWN, dim=0).indices.T  # [C, SHOWN]
    pictures = (x[most, 0].clamp(0, 1) * 255).to(torch.uint8)
    return [row], {f"{prefix(job)}pictures": pictures.contiguous()}


RUNS = Rows(fields=("kind", "seed"), jobs=lambda rows: jobs(), run=run, settings=settings_of)
STUDY = Study("digits", {"runs": RUNS}, about=lambda processes: {"processes": processes}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
