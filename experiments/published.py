"""Create data/published.json: the recipe of the released configuration, step for step, on TMS (chapter 6).

python -m experiments.published [--only tms-5-2 | tms-5-2-paper | tms-40-10] [--processes N]

The plain variant of experiments/tms.py goes through `decompose`, with its schedule and its start. Here nothing is ours:
a constant learning rate after the warm-up (TMS 40-10: a quarter cosine), factors of rank min(d_in, d_out) + 1 whose
standard deviation is that of the reference, batches with their empty samples, no merging, pruning, new starts, scrub
loss or last stage. The seeds are those of experiments/tms.py, and so are the targets. A target gets four starts, or
one of TMS 40-10; they share batches.

The released configuration and the paper differ: it takes the attributions of TMS 5-2 at the target, and the paper at
the component model ("tms-5-2-paper"); for TMS 40-10 it has C = 40, k = 2 and simplicity 15, and the paper 50, 1 and 20.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.selection import batch_top_k
from experiments.experiment import Row, Rows, Study, Tensors
from experiments.tms import stored_target

RECIPES: dict[str, Row] = {
    "tms-5-2": {
        "n_components": 5,
        "rank": 3,
        "top_k": 0.211,
        "minimality": 1.0,
        "simplicity": 0.7,
        "p": 1.0,
        "lr": 3e-2,
        "lr_schedule": "constant",
        "warmup": 0.05,
        "steps": 20_000,
        "batch_size": 2048,
        "attribute_at": "target",
        "instances": 12,
        "starts": 4,
    }
}
RECIPES["tms-5-2-paper"] = RECIPES["tms-5-2"] | {"attribute_at": "components"}
RECIPES["tms-40-10"] = RECIPES["tms-5-2"] | {
    "n_components": 40,
    "rank": 11,
    "top_k": 2.0,
    "minimality": 10.0,
    "simplicity": 15.0,
    "p": 0.9,
    "lr": 1e-3,
    "lr_schedule": "cosine",
    "instances": 3,
    "starts": 1,
}
SEEDS = {"tms-5-2": range(10, 20), "tms-5-2-paper": range(10, 15), "tms-40-10": range(20, 21)}
PATH = "encode.weight"
Job = tuple[str, int]  # recipe, seed


def start_std(d_in: int, d_out: int, n_components: int, instances: int) -> float:
    """Give the reference's standard deviation of factors [instances, C, d_in, d_out].

    It is that of Xavier's rule for a stack of convolutions: the first two axes are taken for channels, and the other
    two for the size of the kernel, so that it depends on the number of instances.
    """
    return math.sqrt(2 / (d_in * d_out * (n_components + instances)))


def lr_at(step: int, recipe: Row) -> float:
    """Give the learning rate of a step: from 0 up to `lr`, then constant, or down a quarter cosine to 0."""
    warm = int(recipe["steps"] * recipe["warmup"])
    if step < warm:
        return float(recipe["lr"] * step / warm)
    later = (step - warm) / (recipe["steps"] - warm - 1)
    return float(recipe["lr"] * (math.cos(math.pi / 2 * later) if recipe["lr_schedule"] == "cosine" else 1.0))


def start(target: apd.targets.TMS, recipe: Row, generator: torch.Generator) -> apd.Components:
    """Draw the factors A [starts, C, n, m] and B [starts, C, m, d]."""
    n, d, m = target.n_features, target.d_hidden, recipe["rank"]
    lead, stacked = (recipe["starts"], recipe["n_components"]), (recipe["n_components"], recipe["instances"])
    A = start_std(n, m, *stacked) * torch.randn(*lead, n, m, generator=generator)
    B = start_std(m, d, *stacked) * torch.randn(*lead, m, d, generator=generator)
    return apd.Components({PATH: A}, {PATH: B})


def scores(target: apd.targets.TMS, P: Tensor, x: Tensor, at: str) -> Tensor:
    """Give the squared attributions [S, B, C] of components P [S, C, n, d], at the target or at the component model.

    An output that is on moves along P_c by x (P_c W^T + W P_c^T), where W is the target's matrix or the sum of P; one
    that is off does not move.
    """
    W = target.encode.weight.detach().T.expand(len(P), -1, -1) if at == "target" else P.sum(1)  # [S, n, d]
    on = (x @ W) @ W.mT + target.bias > 0  # [S, B, n]
    effects = torch.einsum("scid,sod->sico", P, W)
    effects = effects + effects.transpose(1, 3)
    moves = torch.einsum("bi,sico->sbco", x, effects) * on[:, :, None]
    return moves.square_().sum(-1)


def sparse(target: apd.targets.TMS, P: Tensor, mask: Tensor, x: Tensor) -> Tensor:
    """Give the outputs [S, B, n] where each sample x [B, n] has the components that its mask [S, B, C] keeps."""
    W = (mask @ P.flatten(2)).unflatten(2, P.shape[2:])  # [S, B, n, d]
    hidden = torch.einsum("bi,sbid->sbd", x, W)
    return torch.relu(torch.einsum("sbd,sbod->sbo", hidden, W) + target.bias.detach())


def losses(target: apd.targets.TMS, components: apd.Components, x: Tensor, recipe: Row) -> dict[str, Tensor]:
    """Work out the three losses of a batch x [B, n] with its empty samples, each [S].

    On an empty sample every output is that of the biases, whatever the components are: no error, no attribution. So
    only the others are worked on, and the means are over all.
    """
    full = len(x)
    x = x[x.amax(1) > 0]
    share, P = len(x) / full, components.matrices(PATH)
    with torch.no_grad():
        mask = batch_top_k(scores(target, P, x, recipe["attribute_at"]), recipe["top_k"] / share)
        wanted = target(x)
    return {
        "faithfulness": apd.losses.faithfulness(components, {PATH: target.encode.weight.detach().T}),
        "minimality": share * (sparse(target, P, mask, x) - wanted).square().mean((1, 2)),
        "simplicity": share * apd.losses.simplicity(components, mask, recipe["p"]),
    }


def train(target: apd.targets.TMS, recipe: Row, seed: int, steps: int | None = None) -> apd.Components:
    """Take the recipe's steps, or the first `steps` of them."""
    generator = torch.Generator().manual_seed(seed)
    components = start(target, recipe, generator).map(lambda t: t.requires_grad_())
    optimiser = torch.optim.Adam(components.parameters(), fused=True)
    data = target.data(recipe["batch_size"])
    for step in range(recipe["steps"] if steps is None else steps):
        optimiser.param_groups[0]["lr"] = lr_at(step, recipe)
        loss = losses(target, components, data(step, generator), recipe)
        optimiser.zero_grad()
        total = loss["faithfulness"] + recipe["minimality"] * loss["minimality"]
        (total + recipe["simplicity"] * loss["simplicity"]).mean().backward()
        optimiser.step()
    return components.map(Tensor.detach)


def measured(target: apd.targets.TMS, components: apd.Components, recipe: Row, seed: int) -> Row:
    """Measure one start, on as many samples as experiments/tms.py does, empty ones among them."""
    truth = target.mechanisms()
    own = apd.metrics.ownership(components, truth)
    x = target.data(8192)(0, torch.Generator().manual_seed(10_000 + seed))
    loss = losses(target, components.stacked(), x, recipe)
    return {
        "owned": own.owned.tolist(),
        "cosine": own.cosine.tolist(),
        "length_ratio": own.length_ratio.tolist(),
        "purity": own.purity.tolist(),
        "mmcs": apd.metrics.mmcs(components, truth).item(),
        "ml2r": apd.metrics.ml2r(components, truth).item(),
        **{name: value.item() for name, value in loss.items()},
    }


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Decompose one stored target; a row for each start."""
    name, seed = job
    target, recipe = stored_target(name.removesuffix("-paper"), seed), RECIPES[name]
    begin = time.process_time()
    found = train(target, recipe, seed)
    seconds = round(time.process_time() - begin, 1)
    rows = [measured(target, found.restart(i), recipe, seed) for i in range(recipe["starts"])]
    return [{"start": i, "seconds": seconds, **row} for i, row in enumerate(rows)], {}


RUNS = Rows(
    fields=("recipe", "seed"),
    jobs=lambda rows: [(name, seed) for name in RECIPES for seed in SEEDS[name]],
    run=run,
    settings=lambda job: RECIPES[job[0]],
)
STUDY = Study("published", {"runs": RUNS}, about=lambda processes: {"processes": processes})

if __name__ == "__main__":
    STUDY.main(__doc__)
