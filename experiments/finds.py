"""Create data/finds.json: circuits found from random starts, kept, and tested by what they do (chapter 36).

python -m experiments.finds [--only again tests positions every]          (forty minutes of one core)

"Again" makes runs of experiments/pieces.py once more, with the same settings and seeds, and keeps the components of the
picks (data/finds.safetensors). Whether they are the same to the last digit is stored with them.

"Tests" asks of these components what was asked of those near the truth: scrubbing, and whether the mask must move with
the pattern. For that, gates are per position, with a threshold that lets as many be on as the truth has. Where they are
on is compared with where the circuits are needed. Then the circuits are cut by their matrices, and pieces that are on
together at positions are merged by bits, at several numbers of pieces that are on; the judge takes the cheapest. That
trains nothing. Beside it stand circuits dealt anew, the truth, the whole network as one lump, and a cut by heads.

"Every" runs all sequences that ask one circuit or none with all masks of zeros and ones (`every_sequence`) in which
the components of the circuit that is asked are on, and tries gates in between on some. On the first target it also says
on how many sequences the most attributed component is the circuit's, and asks the same of the same parts dealt anew, of
the truth and of a cut by heads. (For these, other targets are this one with other turns and tables.)

"Positions" starts at random with gates per position, with the call of experiments/pieces.py as far as it fits. What was
tried before on seed 90 is in "log".
"""

from __future__ import annotations

import json
import time

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.batch import Batches
from apd_minimal.study import controls
from apd_minimal.study.rate import Judge
from apd_minimal.targets.induction import CIRCUIT_OF, Induction
from experiments import every_sequence, induction, pieces
from experiments.experiment import DATA, Row, Rows, Study, Tensors, factors, numbers, of

Job = tuple[str, int]  # what, seed
AGAIN, POSITIONS = 5, 5  # targets of experiments/pieces.py, from its first
BATCH = 96  # sequences, with gates per position
ON = induction.ACTIVE["position"]  # circuits or roles, at a position
TRIED = (0.25, 0.35, 0.5, 0.65, 0.8, 1.0, 1.3)  # pieces of matrices that are on at a position


def again(job: Job) -> tuple[list[Row], Tensors]:
    """Make a run of experiments/pieces.py again, and keep the components of the pick."""
    what, seed = job
    began = time.process_time()
    target, _, found = pieces.taken_apart(("as it is", seed))
    own = apd.metrics.ownership(found.components, target.mechanisms())
    before = json.loads((DATA / "pieces.json").read_text())["runs"]
    stored = next(r for r in before if (r["change"], r["seed"]) == ("as it is", seed))
    assert found.scores is not None
    row: Row = {
        "scores": [induction.finite(s) for s in found.scores],
        "scores_before": stored["scores"],
        "owned": own.owned.tolist(),
        "cosine": [round(v, 4) for v in own.cosine.tolist()],
        "cosine_before": stored["cosine"],
        "seconds": round(time.process_time() - began, 1),
    }
    return [row], factors(found.components.map(Tensor.detach), f"{what}/{seed}/")


@torch.no_grad()
def scrubbed(network: apd.Network, components: apd.Components, x: Tensor, seed: int) -> Row:
    """Scrub with gates per sequence, one on in the mean: errors as shares of the answers' size.

    Args:
        network: the target.
        components: C of them.
        x: sequences.
        seed: of the coins.
    """
    score, k = induction.scores_of("sequence"), induction.ACTIVE["sequence"]
    found = apd.metrics.scrubbing(network, components, x, k, seed=seed, attribution=score, anti="all")
    size = network(x).square().mean()
    errors = {"active": found.top_k, "scrubbed": found.scrubbed, "anti": found.anti_scrubbed}
    return {name: float(e.mean() / size) for name, e in errors.items()}


def on_at_positions(network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
    """Say which components are on where, boolean [B, T, C]: the most attributed, as many as the truth has."""
    return induction.most_attributed(induction.attribution(network, components, x, per_position=True), ON)


@torch.no_grad()
def where(target: Induction, components: apd.Components, owner: list[int], seed: int) -> Row:
    """Compare where a circuit's component is on with where the circuit is needed.

    Args:
        target: with all circuits.
        components: C of them.
        owner: the component of each circuit.
        seed: of the sequences.

    Returns:
        Row: for each role the share of its positions at which its circuit's component is on, and ("chance") the share
        of all positions at which it is; of what is on, the share that is needed; and, with this mask alone and with
        half of the rest, the error as a share of the answers' size.
    """
    network = apd.Network(target, target.weights)
    x = induction.OneAtATime(target, 1024)(0, torch.Generator().manual_seed(30_000 + seed))
    on, uses = on_at_positions(network, components, x), target.uses(x)
    of_circuit = torch.stack([uses[..., torch.tensor(CIRCUIT_OF) == c].any(-1) for c in range(len(owner))], -1)
    wanted = target.answers(x)
    coin = torch.rand(on.shape, generator=torch.Generator().manual_seed(seed)) < 0.5

    def error(gates: Tensor) -> float:
        return float((network(x, components, gates.float()) - wanted).square().sum() / wanted.square().sum())

    mine = on[..., owner]
    return {
        "on": [float(mine[..., c][uses[..., r]].float().mean()) for r, c in enumerate(CIRCUIT_OF)],
        "chance": [float(mine[..., c].float().mean()) for c in CIRCUIT_OF],
        "needed": float((mine & of_circuit).sum() / on.sum()),
        "active": error(on),
        "scrubbed": error(on | coin),
    }


def by_matrices(components: apd.Components) -> apd.Components:
    """Cut every component by its matrices: one piece for each component and each path in which it is not zero."""
    C = components.n_components
    cut: dict[str, Tensor] = {}
    for i, path in enumerate(components.paths):
        own = components.matrices(path).detach()
        cut[path] = own.new_zeros(C * len(components.paths), *own.shape[1:])
        cut[path][i * C : (i + 1) * C] = own
    whole = apd.Components.from_matrices(cut)
    return whole.subset((whole.norms() > 0).nonzero().flatten().tolist())


def roles_of(target: Induction, components: apd.Components, seed: int) -> tuple[apd.Components, Row]:
    """Cut components by matrices and merge the pieces by use; the judge says with how many on.

    Args:
        target: with all circuits.
        components: C of them.
        seed: of the sequences.

    Returns:
        tuple[Components, Row]: what the judge takes, and bits and owned roles at every number that was tried.
    """
    network, source = apd.Network(target, target.weights), induction.OneAtATime(target, 512)
    x, held_out = (source(0, torch.Generator().manual_seed(start + seed)) for start in (20_000, 30_000))
    judge, cut = Judge(pieces.EXACT, attribution=induction.scores_of("position")), by_matrices(components)
    each = [pieces.by_use(network, cut, x, k, "position") for k in TRIED]
    bits = [judge(network, c, held_out) for c in each]
    owned = [int(apd.metrics.ownership(c, target.mechanisms("role")).owned.sum()) for c in each]
    best = each[min(range(len(each)), key=bits.__getitem__)]
    own = apd.metrics.ownership(best, target.mechanisms("role"))
    row = {
        "pieces": cut.n_components,
        "bits": [induction.finite(b) for b in bits],
        "owned_by_k": owned,
        "owned": own.owned.tolist(),
        "cosine": [round(v, 4) for v in own.cosine.tolist()],
        "in_use": int((best.norms() > 0).sum()),
    }
    return best, row


def tested(target: Induction, components: apd.Components, owner: list[int], seed: int) -> Row:
    """Test components by what they do.

    Args:
        target: with all circuits.
        components: C of them.
        owner: the component of each circuit.
        seed: of the sequences.
    """
    network = apd.Network(target, target.weights)
    inputs: dict[str, Batches] = {"one": induction.OneAtATime(target, 1024), "usual": target.data(1024)}
    roles, cut = roles_of(target, components, seed)
    return {
        "roles": cut,
        "scrubbing": {
            kind: scrubbed(network, components, source(0, torch.Generator().manual_seed(30_000 + seed)), seed)
            for kind, source in inputs.items()
        },
        "moved": induction.moved(target, components, ON, seed),
        "where": where(target, components, owner, seed),
        "roles_moved": induction.moved(target, roles, ON, seed),
    }


def untrained(target: Induction, seed: int) -> Row:
    """Give the same tests of the truth, and the roles that come of a cut by heads and of the whole network."""
    truth = target.mechanisms()
    heads = apd.Components.from_matrices(induction.heads(target))
    lump = apd.Components.from_matrices({path: m.sum(0, keepdim=True) for path, m in truth.items()})
    return {
        "truth": tested(target, apd.Components.from_matrices(truth), [0, 1, 2], seed),
        "heads": {"roles": roles_of(target, heads, seed)[1]},
        "lump": {"roles": roles_of(target, lump, seed)[1]},
    }


def tests(job: Job) -> tuple[list[Row], Tensors]:
    """Test what was kept, and controls, by what they do."""
    _, seed = job
    target = pieces.target_of(("as it is", seed))
    found, _ = of("finds", f"again/{seed}/")
    owner = apd.metrics.ownership(found, target.mechanisms()).owner.tolist()
    row: Row = {
        "relative_faithfulness": apd.metrics.relative_faithfulness(
            found, apd.Network(target, target.weights).weights
        ).item(),
        "found": tested(target, found, owner, seed),
        "dealt": tested(target, controls.dealt(found, seed), owner, seed),
    }
    return [row | untrained(target, seed)], {}


def every(job: Job) -> tuple[list[Row], Tensors]:
    """Run what was kept with every sequence and every mask; on the first target controls as well."""
    _, seed = job
    target = pieces.target_of(("as it is", seed))
    found, _ = of("finds", f"again/{seed}/")
    truth = target.mechanisms()
    own = [[int(j)] for j in apd.metrics.ownership(found, truth).owner]
    parts = {"found": (found, own)}
    heads = [[h for h, c in enumerate(induction.OF_HEADS) if c == circuit] for circuit in range(len(own))]
    if seed == SEEDS[0]:
        parts |= {
            "truth": (apd.Components.from_matrices(truth), [[0], [1], [2]]),
            "dealt": (controls.dealt(found, seed), own),
            "heads": (apd.Components.from_matrices(induction.heads(target)), heads),
        }
    rows: list[Row] = []
    for name, (components, groups) in parts.items():
        began = time.process_time()
        row = every_sequence.verified(target, components, groups)
        if name == "found" and seed == SEEDS[0]:
            row["chosen"] = every_sequence.chosen(target, components, groups)
        row["between"] = every_sequence.between(target, components, groups, seed)
        rows.append({"parts": name, **row, "seconds": round(time.process_time() - began, 1)})
    return rows, {}


def positions_settings(seed: int) -> Row:
    """Give the settings of a run with gates per position: those of experiments/pieces.py as far as they fit.

    Args:
        seed: of the target.
    """
    changed = {"n_components": 16, "restarts": 2, "steps": 1000, "top_k": ON}
    return pieces.SETTINGS | changed | {"seed": seed + 1000}


@torch.no_grad()
def judged(network: apd.Network, components: apd.Components, x: Tensor) -> float:
    """Count bits, and add a price for the error, as `pieces.judged`, with gates per position.

    Args:
        network: the target.
        components: C of them.
        x: sequences.
    """
    wanted = network(x)
    gap = network(x, components, on_at_positions(network, components, x).float()) - wanted
    error = float(gap.square().sum() / wanted.square().sum())
    bits = Judge(pieces.EXACT, attribution=induction.scores_of("position"))(network, components, x)
    return bits + pieces.PRICE * error


def positions(job: Job) -> tuple[list[Row], Tensors]:
    """Take one target apart from random starts, with gates per position."""
    _, seed = job
    target, score, began = pieces.target_of(("as it is", seed)), induction.scores_of("position"), time.process_time()
    source, roles = induction.OneAtATime(target, BATCH), target.mechanisms("role")
    found = apd.decompose(
        target, source, target.weights, attribution=score, judge=judged, progress=False, **positions_settings(seed)
    )
    seconds = time.process_time() - began
    parts, every = found.components, found.restarts
    assert every is not None and every.restarts is not None and found.scores is not None
    own, dealt = apd.metrics.ownership(parts, roles), controls.dealt(parts, seed)
    row: Row = {
        "in_use": int((parts.norms() > 0).sum()),
        "relative_faithfulness": apd.metrics.relative_faithfulness(
            parts, apd.Network(target, target.weights).weights
        ).item(),
        "scores": [induction.finite(s) for s in found.scores],
        "owned": own.owned.tolist(),
        "cosine": [round(v, 4) for v in own.cosine.tolist()],
        "owned_by_restart": [
            apd.metrics.ownership(every.restart(r), roles).owned.tolist() for r in range(every.restarts)
        ],
        "dealt_owned": apd.metrics.ownership(dealt, roles).owned.tolist(),
        "dealt_cosine": [round(v, 4) for v in apd.metrics.ownership(dealt, roles).cosine.tolist()],
        "circuits_cosine": [round(v, 4) for v in apd.metrics.ownership(parts, target.mechanisms()).cosine.tolist()],
        "moved": induction.moved(target, parts, ON, seed),
        "seconds": round(seconds, 1),
    }
    return [row], {}


SEEDS = [pieces.FIRST + i for i in range(AGAIN)]
AGAINS = Rows(
    fields=("what", "seed"),
    jobs=lambda rows: [("again", seed) for seed in SEEDS],
    run=again,
    settings=lambda job: numbers(pieces.settings_of(("as it is", job[1])), batch=pieces.BATCH),
    order=lambda job: job[1],
)
TESTS = Rows(("what", "seed"), lambda rows: [("tests", seed) for seed in SEEDS], tests, order=lambda job: job[1])
EACH = Rows(
    fields=("what", "seed"),
    jobs=lambda rows: [("positions", pieces.FIRST + i) for i in range(POSITIONS)],
    run=positions,
    settings=lambda job: numbers(positions_settings(job[1]), batch=BATCH),
    order=lambda job: job[1],
)
EVERY = Rows(("what", "seed"), lambda rows: [("every", seed) for seed in SEEDS], every, order=lambda job: job[1])
STUDY = Study(
    "finds",
    {"again": AGAINS, "tests": TESTS, "positions": EACH, "every": EVERY},
    about=lambda processes: {"processes": processes},
    compact=True,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
