"""Create data/modular.json: arithmetic with a remainder taken apart, where frequencies are the answer and where not.

python -m experiments.modular [--only tokens task frequency ...] [--processes N]      (about 100 minutes of one core)

Chapter 35. Targets are written by hand (`targets.ModularArithmetic`), so that nothing of them is trained:

- "tokens": one-hot inputs, p = 13, all six frequencies always on; the first matrix alone is decomposed.
- "task": two additions and a subtraction with two frequencies each, after an embedding; each sample opens one.
- "frequency": one addition with five frequencies, after an embedding; each is open on a fifth of the samples.
- "task, larger" and "frequency, larger": four tasks of moduli up to 31, and eight frequencies modulo 31.
- "task, multiplication": an addition, a subtraction and a multiplication modulo 23, two frequencies each.
- "task, drawn": the tasks of "task", and each seed draws other frequencies: networks, not bases of one.
- "frequency, always on": the addition of "frequency" without its switches, so that all five are on in every sample.
- "task, no waves", "frequency, no waves" and "tokens, no waves": the controls. The same switches, or the same one-hot
  inputs, and every frequency's weights replaced by random ones of the same singular values: nothing is left of the
  arithmetic.

Seeds of the embedding from 7700 up, and 1,000 more for the decomposition. Every target is taken apart under two sets of
weights of the losses, both made on seeds 90 to 93: one was better for tasks there, the other for frequencies. The judge
is to choose. The number of components is that of the mechanisms, and on five targets also others. (The strong set was
run on all of these targets first, found tasks and no frequencies, and only then were the runs with the other set added.
The
larger ones came later, then "tokens, no waves", multiplication, and last "frequency, always on", "frequency, no waves"
further targets of the larger and the drawn kinds, and other numbers of components on four more targets, with nothing
changed.)
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.study import controls
from apd_minimal.study.rate import Judge
from apd_minimal.targets.modular import GRID, ModularArithmetic, ModularTask
from experiments.experiment import Row, Rows, Study, Tensors, numbers

Job = tuple[str, int, int, str]  # kind, number of components, seed, weights of the losses
MECHANISMS = {
    "tokens": 26, "task": 3, "frequency": 5, "task, no waves": 3, "task, larger": 4, "frequency, larger": 8,
    "tokens, no waves": 26, "task, multiplication": 3, "task, drawn": 3, "frequency, always on": 5,
    "frequency, no waves": 5,
}  # fmt: skip
ACTIVE = {  # on a sample; else one mechanism
    "tokens": 2.0, "frequency, larger": 1.6, "tokens, no waves": 2.0, "frequency, always on": 5.0,
}  # fmt: skip
FIRST = 7700
OTHERS = {"task": (2, 4, 6), "frequency": (4, 6, 10)}  # numbers of components on five targets
WEIGHTS: dict[str, dict[str, Any]] = {
    "strong": {"faithfulness": 100.0, "minimality": 50.0, "scrub": 50.0, "simplicity": ((0.0, 30.0), (1.0, 0.0))},
    "gentle": {"faithfulness": 10.0, "minimality": 20.0, "scrub": 10.0, "simplicity": ((0.0, 60.0), (0.7, 0.0))},
}


def jobs() -> list[Job]:
    """List the runs: every target under both sets of weights, of which the judge is to choose."""
    one = [("tokens", 40, FIRST + i) for i in range(5)]
    one += [(kind, MECHANISMS[kind], FIRST + i) for kind in ("task", "frequency") for i in range(10)]
    others = {"task, no waves": 5, "task, larger": 5, "frequency, larger": 5}
    one += [(kind, MECHANISMS[kind], FIRST + i) for kind, targets in others.items() for i in range(targets)]
    one += [("tokens, no waves", 40, FIRST + i) for i in range(5)]
    late = {"task, multiplication": 10, "task, drawn": 10, "frequency, always on": 5, "frequency, no waves": 5}
    one += [(kind, MECHANISMS[kind], FIRST + i) for kind, targets in late.items() for i in range(targets)]
    one += [(kind, c, FIRST + i) for i in range(5) for kind, counts in OTHERS.items() for c in counts]
    return [(*job, weights) for job in one for weights in WEIGHTS]


def target_of(kind: str, seed: int) -> ModularArithmetic:
    """Write down a target."""
    if "tokens" in kind:
        plain = ModularArithmetic([ModularTask(13)])
        return without_waves(plain, seed) if "no waves" in kind else plain
    if kind == "frequency, larger":
        task = ModularTask(31, 1, (1, 3, 4, 6, 9, 11, 12, 14))
        return ModularArithmetic([task], switches="frequency", embedding=True, seed=seed)
    if kind == "task, multiplication":
        tasks = [ModularTask(23, 1, (1, 4)), ModularTask(23, -1, (3, 7)), ModularTask(23, 1, (3, 5), multiply=True)]
        return ModularArithmetic(tasks, switches="task", embedding=True, seed=seed)
    if kind == "task, larger":
        moduli, signs, pairs = (31, 29, 23, 19), (1, -1, 1, 1), ((1, 5), (3, 8), (2, 7), (4, 6))
        tasks = [ModularTask(*task) for task in zip(moduli, signs, pairs, strict=True)]
        return ModularArithmetic(tasks, switches="task", embedding=True, seed=seed)
    if kind.startswith("frequency"):
        task, switches = ModularTask(23, 1, (1, 3, 4, 6, 9)), None if "always on" in kind else "frequency"
        target = ModularArithmetic([task], switches=switches, embedding=True, seed=seed)
    else:
        frequencies = drawn(seed) if "drawn" in kind else ((1, 4), (3, 7), (2, 5))
        tasks = [ModularTask(*task) for task in zip((23, 23, 19), (1, -1, 1), frequencies, strict=True)]
        target = ModularArithmetic(tasks, switches="task", embedding=True, seed=seed)
    return without_waves(target, seed) if "no waves" in kind else target


def drawn(seed: int) -> tuple[tuple[int, int], ...]:
    """Draw two frequencies for each task: four different ones of the 11 modulo 23, and two of the 9 modulo 19."""
    generator = torch.Generator().manual_seed(seed)
    a, b, c, d = (1 + torch.randperm(11, generator=generator)[:4]).tolist()
    e, f = (1 + torch.randperm(9, generator=generator)[:2]).tolist()
    return (a, b), (c, d), (e, f)


def like(w: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a matrix of the shape and the singular values of another, with random singular directions."""
    U, S, Vh = torch.linalg.svd(w, full_matrices=False)
    U, V = (torch.linalg.qr(torch.randn(m.shape, generator=generator)).Q for m in (U, Vh.T))
    return U @ S.diag() @ V.T


@torch.no_grad()
def without_waves(target: ModularArithmetic, seed: int) -> ModularArithmetic:
    """Replace what every frequency reads and writes by random matrices of the same singular values."""
    generator = torch.Generator().manual_seed(seed)

    for start in range(0, len(target.hidden.weight), GRID):
        block = slice(start, start + GRID)
        target.hidden.weight[block] = like(target.hidden.weight[block], generator)
        target.out.weight[:, block] = like(target.out.weight[:, block], generator)
    return target


def truth_of(kind: str, target: ModularArithmetic) -> dict[str, Tensor]:
    """Give what a decomposition is compared with: columns of the first matrix, tasks or frequencies."""
    if "tokens" not in kind:
        return target.mechanisms("frequency" if "frequency" in kind else "task")
    W = target.hidden.weight.detach().T
    return {"hidden.weight": torch.eye(len(W))[:, :, None] * W}


def used(components: apd.Components) -> int:
    """Count the parts that have more than a hundredth of the largest one's squared length."""
    sizes = torch.stack([components.matrices(path).detach().square().sum((1, 2)) for path in components.paths]).sum(0)
    return int((sizes > 0.01 * sizes.max()).sum())


def settings_of(job: Job) -> Row:
    """Give the settings; one set for all kinds but for what is on a sample: two tokens, or one mechanism."""
    kind, n_components, seed, weights = job
    tokens = "tokens" in kind
    settings: dict[str, Any] = {
        "n_components": n_components, "rank": 4 if tokens else None, "top_k": ACTIVE.get(kind, 1.0),
        "steps": 800, "restarts": 2 if tokens else 12, "seed": seed + 1000,
        **WEIGHTS[weights],
    }  # fmt: skip
    return settings


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Take one target apart, and measure what is owned, and the bits."""
    kind, _, seed, _ = job
    target = target_of(kind, seed)
    weights = target.weights[:1] if "tokens" in kind else target.weights
    truth, judge = truth_of(kind, target), Judge()
    start = time.process_time()
    found = apd.decompose(target, target.data(256), weights, judge=judge, progress=False, **settings_of(job))
    seconds = time.process_time() - start
    x = target.data(2048)(0, torch.Generator().manual_seed(20_000 + seed))
    network, every = apd.Network(target, weights), found.restarts
    assert every is not None and every.restarts is not None
    own = apd.metrics.ownership(found.components, truth)
    dealt = controls.dealt(found.components, seed, turned="tokens" in kind)  # there most are of rank one
    widest = min(truth["hidden.weight"].shape[1:])
    row = {
        "owned": int(own.owned.sum()),
        "cosine": [round(v, 4) for v in own.cosine.tolist()],
        "length_ratio": [round(v, 4) for v in own.length_ratio.tolist()],
        "owned_by_restart": [
            int(apd.metrics.ownership(every.restart(r), truth).owned.sum()) for r in range(every.restarts)
        ],
        "scores": found.scores,
        "bits": judge(network, found.components, x),
        "bits_of_the_truth": judge(network, apd.Components.from_matrices(truth, widest), x),
        "bits_dealt": judge(network, dealt, x),
        "dealt_cosine": apd.metrics.ownership(dealt, truth).cosine.mean().item(),
        "seconds": round(seconds, 1),
    }
    if "tokens" in kind:
        waves = {"hidden.weight": target.mechanisms()["hidden.weight"]}
        row["wave_cosine"] = apd.metrics.ownership(found.components, waves).cosine.mean().item()
        row["dealt_wave_cosine"] = apd.metrics.ownership(dealt, waves).cosine.mean().item()
    else:
        another = truth_of(kind, target_of(kind, seed + 50))
        if "always on" in kind:
            lump = {path: w[None] for path, w in network.weights.items()}
            row["bits_of_one_lump"] = judge(network, apd.Components.from_matrices(lump, widest), x)
            row["used"] = used(found.components)
            row["used_by_restart"] = [used(every.restart(r)) for r in range(every.restarts)]
        row["cosine_with_another"] = apd.metrics.ownership(found.components, another).cosine.mean().item()
    return [row], {}


RUNS = Rows(
    fields=("kind", "n_components", "seed", "weights"),
    jobs=lambda rows: jobs(),
    run=run,
    settings=lambda job: numbers(settings_of(job)),
    order=lambda job: (list(MECHANISMS).index(job[0]), job[1], job[2], job[3]),
)
STUDY = Study("modular", {"runs": RUNS}, about=lambda processes: {"processes": processes}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
