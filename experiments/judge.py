"""Create data/judge.json: bits at fixed errors of decompositions made with k too small, right and too large.

python -m experiments.judge [--only tms-5-2 | tms-40-10 | computed | residual] [--processes N]

Chapters 24 and 25. The recipes of `TMS.recipe` with k times a factor, everything else as it is; every restart is a row,
with what it owns of the truth, its held-out sparse error, and its costs (`rate.costs`) on 2,048 inputs. Seeds 10 to
19 (TMS 5-2, as it is and with rotated inputs) and 20 to 29 (TMS 40-10), fixed before; 15 to 19 rotated and 25 to 29
were added later, and fixed before they ran. The errors of `rate.EPSILONS` were chosen after the runs on 10, 11 and 12
had been seen, and before those on the others. Rotated targets ran twice: at first a target was rotated again for each
run.
`computed` does the same on residual MLPs of one layer (compressed computation, seeds 0 to 4; 2 to 4 were added later,
and fixed before they ran), of which the recipe has one restart; with its own k they are those that are stored
(experiments/residual.py). Errors are shares of the error with nothing active, since most of the outputs pass the layer
by.
`residual` judges the stored decompositions of the one-layer residual MLP (experiments/residual.py) beside two that need
no training: one component for each neuron, and the network as one lump.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import asdict

import torch

import apd_minimal as apd
from apd_minimal.config import at_progress
from apd_minimal.study import rate
from experiments.experiment import Row, Rows, Study, Tensors, numbers, scaled, taken_apart
from experiments.residual import stored_target as stored_mlp
from experiments.tms import SIZES, stored_target

FACTORS = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)
SEEDS = {"tms-5-2": range(10, 20), "tms-5-2 rotated": range(10, 20), "tms-40-10": range(20, 30)}
EPSILONS = (0.001, 0.003, 0.01, 0.03, 0.1)
SEEDS_OF_RESIDUAL, SEEDS_OF_COMPUTED = range(5), range(5)
Job = tuple[str, float, int]  # target, factor, seed


def target_of(kind: str, seed: int) -> apd.targets.TMS:
    """Load a stored target, its inputs rotated or not."""
    name, *rotated = kind.split()
    target = stored_target(name, seed)  # one object for all jobs of a process, so that a copy is rotated
    return deepcopy(target).rotate(seed=seed) if rotated else target


def held_out(target: apd.targets.TMS, seed: int) -> torch.Tensor:
    """Draw the inputs on which everything is judged, the same for whatever is compared on a target."""
    return target.data(2048, nonempty=True)(0, torch.Generator().manual_seed(20_000 + seed))


def costs(target: apd.targets.TMS, components: apd.Components, x: torch.Tensor) -> list[Row]:
    """Measure the cost at each error."""
    return listed(rate.costs(target, components, x, EPSILONS, attribution=target.attributions))


def listed(found: list[rate.Cost], epsilons: tuple[float, ...] = EPSILONS) -> list[Row]:
    """Write costs as JSON has them: None for what is infinite, where the error is never reached."""
    rows = []
    for epsilon, cost in zip(epsilons, map(asdict, found), strict=True):
        rows.append({"epsilon": epsilon} | {n: v if math.isfinite(v) else None for n, v in cost.items()})
    return rows


def settings_of(job: Job) -> Row:
    """Give the recipe with another k."""
    kind, factor, seed = job
    recipe = apd.targets.TMS(*SIZES[kind.split()[0]]).recipe
    return {**recipe, "top_k": scaled(recipe["top_k"], factor), "seed": seed}


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Decompose one target with one k, and measure every restart."""
    kind, _, seed = job
    target = target_of(kind, seed)
    result, seconds = taken_apart(target, settings_of(job), attribution=target.attributions)
    assert result.restarts is not None
    x, truth, rows = held_out(target, seed), target.mechanisms(), []
    for i, score in enumerate(result.scores):
        components = result.restarts.restart(i)
        rows.append(
            {
                "restart": i,
                "k": at_progress(result.config.top_k, 0.0),
                "owned": int(apd.metrics.ownership(components, truth).owned.sum()),
                "error": score,
                "costs": costs(target, components, x),
                "seconds": seconds,
            }
        )
    return rows, {}


RUNS = Rows(
    fields=("target", "factor", "seed"),
    jobs=lambda rows: [(kind, f, seed) for kind, seeds in SEEDS.items() for seed in seeds for f in FACTORS],
    run=run,
    settings=lambda job: numbers(settings_of(job)),
)


def settings_of_computed(job: tuple[float, int]) -> Row:
    """Give the recipe of the residual MLP with another k."""
    factor, seed = job
    recipe = apd.targets.ResidualMLP(neurons=(50,)).recipe
    return {**recipe, "top_k": scaled(recipe["top_k"], factor), "seed": seed}


def computed(job: tuple[float, int]) -> tuple[list[Row], Tensors]:
    """Decompose one residual MLP with one k, and measure as above."""
    factor, seed = job
    target, components = stored_mlp("50", seed)
    settings, seconds = settings_of_computed(job), None
    if factor != 1:
        result, seconds = taken_apart(target, settings | {"attribution": target.attributions})
        components = result.components
    x, k = target.data(2048)(0, torch.Generator().manual_seed(20_000 + seed)), at_progress(settings["top_k"], 1.0)
    with torch.no_grad():
        network = apd.Network(target, target.weights)
        off = torch.zeros(len(x), components.n_components)
        nothing = float(apd.losses.mse(network(x, components, off), network(x)).mean())

    def share(outputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return apd.losses.mse(outputs, wanted) / nothing

    errors = apd.metrics.scrubbing(target, components, x, k, attribution=target.attributions)
    row = {
        "k": k,
        "owned": int(target.ownership(components).owned.sum()),
        "error": errors.means()["top_k"] / nothing,
        "costs": listed(
            rate.costs(network, components, x, EPSILONS, divergence=share, attribution=target.attributions)
        ),
        "seconds": seconds,
    }
    return [row], {}


COMPUTED = Rows(
    fields=("factor", "seed"),
    jobs=lambda rows: [(f, seed) for seed in SEEDS_OF_COMPUTED for f in FACTORS],
    run=computed,
    settings=lambda job: numbers(settings_of_computed(job)),
)


def residual(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Judge what is stored of one residual MLP, its neurons, and the whole."""
    target, found = stored_mlp("50", job[1])
    network = apd.Network(target, target.weights)
    (read, W_in), (write, W_out) = network.weights.items()
    eye = torch.eye(W_in.shape[1])
    by_neuron = apd.Components(
        {read: W_in.T[:, :, None], write: eye[:, :, None]}, {read: eye[:, None, :], write: W_out[:, None, :]}
    )
    lump = apd.Components({read: W_in[None], write: eye[None]}, {read: eye[None], write: W_out[None]})
    x = target.data(2048)(0, torch.Generator().manual_seed(20_000 + job[1]))
    rows = []
    for name, components in {"found": found, "neurons": by_neuron, "one lump": lump}.items():
        rows.append({"name": name, "costs": listed(rate.costs(network, components, x, EPSILONS))})
    return rows, {}


RESIDUAL = Rows(("target", "seed"), lambda rows: [("residual", seed) for seed in SEEDS_OF_RESIDUAL], residual)
STUDY = Study(
    "judge",
    {"runs": RUNS, "computed": COMPUTED, "residual": RESIDUAL},
    about=lambda processes: {"processes": processes},
    compact=True,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
