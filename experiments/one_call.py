"""Create data/one_call.json: circuits of three kinds taken apart by one call, with one recipe (chapter 38).

python -m experiments.one_call [--only induction apart shared ...] [--processes N]      (two hours of one core)

The targets are those of chapters 36 and 37: induction beside two other circuits ("induction", lean), and products in
three groups, on disjoint vocabularies ("apart") or on shared tokens with a switch ("shared").

Three further kinds have other numbers of circuits: two ("shared, two") or four ("shared, four") groups on shared
tokens, and induction beside the first letter alone ("induction, two").

The call is that of experiments/pieces.py. It does not know how many mechanisms there are: eight starts have eight
components, six starts have four, and of the fourteen the judge keeps one. Attributions, the judge, the losses and all
other settings are the same for all kinds. Two things differ: the inputs are each target's own, and components are of
rank four in induction, of any rank in groups.

The controls, "no irreps", are the same networks of groups with random weights, of the same singular values, in place of
each representation's. What is found is compared with the random weights of each group.

Settled on seeds 90, 91 and 92 of groups, where starts with four components came in ("log" has these runs), and on those
of experiments/pieces.py. Reported are other ones, each run once: groups from 8670 up, and for induction the ten of
experiments/pieces.py, whose starts with eight components are those that are stored there. Two and four circuits came
last, with nothing changed, on five targets each (groups from 8670), and on three of induction (from 8660).
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.batch import Batches
from apd_minimal.study import controls
from apd_minimal.targets import GroupOperations
from apd_minimal.targets.induction import CIRCUITS, Induction
from experiments import groups, induction, pieces
from experiments.experiment import Row, Rows, Study, Tensors, numbers

Job = tuple[str, int, int]  # kind, number of components, seed
FIRST, BATCH = 8670, 256
TARGETS = {"shared": 10, "apart": 10, "induction": 10}
CONTROLS = {"shared, no irreps": 5, "apart, no irreps": 5}
OTHERS = {"shared, two": 5, "shared, four": 5, "induction, two": 3}  # numbers of circuits
KINDS = TARGETS | CONTROLS | OTHERS
STARTS = {4: 6, 8: 8}  # by the number of components
MEASURED = (
    "in_use", "relative_faithfulness", "scores", "owned_by_restart", "owned", "cosine", "dealt_owned", "dealt_cosine",
    "another_cosine", "seconds",
)  # fmt: skip


def jobs() -> list[Job]:
    """List the runs."""
    return [(kind, n, first_of(kind) + i) for kind, targets in KINDS.items() for i in range(targets) for n in STARTS]


def first_of(kind: str) -> int:
    """Give the first seed of a kind."""
    return pieces.FIRST if kind.startswith("induction") else FIRST


def as_in_pieces(seed: int) -> Row:
    """Look up what experiments/pieces.py found with eight components."""
    (row,) = (r for r in pieces.STUDY.stored()["runs"] if (r["change"], r["seed"]) == ("as it is", seed))
    return {name: row[name] for name in MEASURED}


def target_of(kind: str, seed: int) -> Induction | GroupOperations:
    """Make a target."""
    if kind.startswith("induction"):
        return Induction(CIRCUITS[:2] if kind == "induction, two" else CIRCUITS, seed=seed, lean=True)
    return groups.target_of(kind, seed)


def source(target: Induction | GroupOperations) -> Batches:
    """Give the inputs: for induction, sequences that ask one circuit each; a pair is a question for one group."""
    return induction.OneAtATime(target, BATCH) if isinstance(target, Induction) else target.data(BATCH)


def mechanisms(target: Induction | GroupOperations) -> dict[str, Tensor]:
    """Give the true mechanisms: three circuits, or three groups."""
    return target.mechanisms() if isinstance(target, Induction) else target.mechanisms("group")


def settings_of(job: Job) -> Row:
    """Give the settings of a run."""
    kind, n_components, seed = job
    changed = {"n_components": n_components, "restarts": STARTS[n_components], "seed": seed + 1000}
    return pieces.SETTINGS | changed | ({} if kind.startswith("induction") else {"rank": None})


def taken_apart(job: Job) -> Row:
    """Take one target apart with so many components, and measure every start."""
    kind, _, seed = job
    target, score, began = target_of(kind, seed), induction.scores_of("sequence"), time.process_time()
    network, truth = apd.Network(target, target.weights), mechanisms(target)
    found = apd.decompose(
        target, source(target), target.weights, attribution=score, judge=pieces.judged, progress=False,
        **settings_of(job),
    )  # fmt: skip
    seconds, parts, every = time.process_time() - began, found.components, found.restarts
    assert every is not None and every.restarts is not None and found.scores is not None
    own, dealt = apd.metrics.ownership(parts, truth), controls.dealt(parts, seed)
    dealt_own = apd.metrics.ownership(dealt, truth)
    other = apd.metrics.ownership(parts, mechanisms(target_of(kind, seed + 50)))
    return {
        "in_use": int((parts.norms() > 0).sum()),
        "relative_faithfulness": apd.metrics.relative_faithfulness(parts, network.weights).item(),
        "scores": [induction.finite(s) for s in found.scores],
        "owned_by_restart": [
            apd.metrics.ownership(every.restart(r), truth).owned.tolist() for r in range(every.restarts)
        ],
        "owned": own.owned.tolist(),
        "cosine": [round(v, 4) for v in own.cosine.tolist()],
        "dealt_owned": dealt_own.owned.tolist(),
        "dealt_cosine": dealt_own.cosine.mean().item(),
        "another_cosine": other.cosine.mean().item(),
        "seconds": round(seconds, 1),
    }


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Take one target apart, and let the judge score the truth and one lump beside what was found."""
    kind, n_components, seed = job
    row = as_in_pieces(seed) if (kind, n_components) == ("induction", 8) else taken_apart(job)
    target = target_of(kind, seed)
    network, truth = apd.Network(target, target.weights), mechanisms(target)
    x = source(target)(0, torch.Generator().manual_seed(20_000 + seed))
    lump = {path: m.sum(0, keepdim=True) for path, m in truth.items()}
    for name, matrices in (("truth", truth), ("lump", lump)):
        row[f"score_of_the_{name}"] = pieces.judged(network, apd.Components.from_matrices(matrices), x)
    return [row], {}


RUNS = Rows(
    fields=("kind", "n_components", "seed"),
    jobs=lambda rows: jobs(),
    run=run,
    settings=lambda job: numbers(settings_of(job), batch=BATCH),
    order=lambda job: (list(KINDS).index(job[0]), job[2], job[1]),
)
STUDY = Study("one_call", {"runs": RUNS}, about=lambda processes: {"processes": processes}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
