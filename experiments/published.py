"""Create data/published.json: the recipe of the released configuration, step for step, on TMS (chapter 6).

python -m experiments.published [--only tms-5-2 | tms-40-10] [--processes N]

The plain variant of experiments/tms.py goes through `decompose`, with its schedule and its start. Here nothing is ours:
a constant learning rate after the warm-up (TMS 40-10: a quarter cosine), factors of rank min(d_in, d_out) + 1 whose
standard deviation is that of the reference, batches with their empty samples, no merging, pruning, new starts, scrub
loss or last stage. The seeds are those of experiments/tms.py, and so are the targets. Each gets four starts, or one
of TMS 40-10. Runs of TMS 5-2 stand on one tensor axis [S] and share their batches.

The released configuration and the paper differ: it takes the attributions of TMS 5-2 at the target, and the paper at
the component model, which was not run here; for TMS 40-10 it has C = 40, k = 2 and simplicity 15, and the paper 50, 1
and 20.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.selection import batch_top_k
from experiments.experiment import Row, Rows, Study, Tensors, ownership_lists
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
        "seeds": list(range(10, 20)),
        "starts": 4,
    }
}
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
    "seeds": list(range(20, 25)),
    "starts": 1,
}
TOGETHER = {"tms-5-2": 40, "tms-40-10": 1}  # runs on one axis: of the large size, one a time, for the cache
PATH = "encode.weight"
Job = tuple[str]  # recipe


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


class Targets:
    """The targets of S runs on one axis: weights W [S, n, d], biases b [S, 1, n]."""

    def __init__(self, targets: list[apd.targets.TMS]) -> None:
        self.W = torch.stack([t.encode.weight.detach().T for t in targets])
        self.b = torch.stack([t.bias.detach()[None] for t in targets])
        self.data = targets[0].data


def start(targets: Targets, recipe: Row, generator: torch.Generator) -> apd.Components:
    """Draw the factors A [S, C, n, m] and B [S, C, m, d]."""
    (S, n, d), m, C = targets.W.shape, recipe["rank"], recipe["n_components"]
    A = start_std(n, m, C, recipe["instances"]) * torch.randn(S, C, n, m, generator=generator)
    B = start_std(m, d, C, recipe["instances"]) * torch.randn(S, C, m, d, generator=generator)
    return apd.Components({PATH: A}, {PATH: B})


def scores(targets: Targets, P: Tensor, x: Tensor, at: str) -> Tensor:
    """Give the squared attributions [S, B, C] of components P [S, C, n, d], at the target or at the component model.

    An output that is on moves along P_c by x (P_c W^T + W P_c^T), where W is the target's matrix or the sum of P; one
    that is off does not move.
    """
    W = targets.W if at == "target" else P.sum(1)  # [S, n, d]
    on = (x @ W) @ W.mT + targets.b > 0  # [S, B, n]
    effects = torch.einsum("scid,sod->sico", P, W)
    effects = (effects + effects.transpose(1, 3)).flatten(2)  # [S, n, C n]
    moves = (x @ effects).unflatten(2, (P.shape[1], -1)) * on[:, :, None]
    return moves.square_().sum(-1)


def outputs(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Give the outputs [S, B, n] on x [B, n] of networks with a matrix W [S, B, n, d] for each sample."""
    hidden = torch.einsum("bi,sbid->sbd", x, W)
    return torch.relu(torch.einsum("sbd,sbod->sbo", hidden, W) + b)


def losses(targets: Targets, components: apd.Components, x: Tensor, recipe: Row) -> dict[str, Tensor]:
    """Work out the three losses of a batch x [B, n] with its empty samples, each [S].

    On an empty sample every output is that of the biases, whatever the components are: no error, no attribution. So
    only the others are worked on, and the means are over all.
    """
    full = len(x)
    x = x[x.amax(1) > 0]
    share, P = len(x) / full, components.matrices(PATH)
    with torch.no_grad():
        mask = batch_top_k(scores(targets, P, x, recipe["attribute_at"]), recipe["top_k"] / share)
        wanted = torch.relu((x @ targets.W) @ targets.W.mT + targets.b)
    sparse = outputs(x, (mask @ P.flatten(2)).unflatten(2, P.shape[2:]), targets.b)
    return {
        "faithfulness": (targets.W - P.sum(1)).square().mean((1, 2)),
        "minimality": share * (sparse - wanted).square().mean((1, 2)),
        "simplicity": share * apd.losses.simplicity(components, mask, recipe["p"]),
    }


def train(targets: Targets, recipe: Row, steps: int | None = None, draw: int = 0) -> apd.Components:
    """Take the recipe's steps, or the first `steps` of them, with starts and batches of one draw."""
    generator = torch.Generator().manual_seed(draw)
    components = start(targets, recipe, generator).map(lambda t: t.requires_grad_())
    optimiser = torch.optim.Adam(components.parameters(), fused=True)
    data = targets.data(recipe["batch_size"])
    every = recipe["steps"] // 20
    for step in range(recipe["steps"] if steps is None else steps):
        optimiser.param_groups[0]["lr"] = lr_at(step, recipe)
        loss = losses(targets, components, data(step, generator), recipe)
        optimiser.zero_grad()
        total = loss["faithfulness"] + recipe["minimality"] * loss["minimality"]
        (total + recipe["simplicity"] * loss["simplicity"]).sum().backward()
        optimiser.step()
        if step % every == 0:
            print(f"step {step}: {float(total.detach().mean()):.2e}", flush=True)
    return components.map(Tensor.detach)


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Decompose the stored targets, as many runs at once as `TOGETHER` says."""
    recipe, together = RECIPES[job[0]], TOGETHER[job[0]]
    every = [(seed, i) for seed in recipe["seeds"] for i in range(recipe["starts"])]
    pieces = [every[first : first + together] for first in range(0, len(every), together)]
    return [row for number, piece in enumerate(pieces) for row in run_together(job[0], piece, number)], {}


def run_together(name: str, every: list[tuple[int, int]], draw: int) -> list[Row]:
    """Decompose runs (seed, start) on one axis; a row for each, measured on 8,192 samples, empty ones among them."""
    recipe, each = RECIPES[name], [stored_target(name, seed) for seed, _ in every]
    targets, begin = Targets(each), time.process_time()
    found = train(targets, recipe, draw=draw)
    seconds = round(time.process_time() - begin, 1)
    x = targets.data(8192)(0, torch.Generator().manual_seed(10_000))
    loss, rows = losses(targets, found, x, recipe), []
    for i, (seed, number) in enumerate(every):
        components, truth = found.restart(i), each[i].mechanisms()
        own = apd.metrics.ownership(components, truth)
        rows.append(
            {
                "seed": seed,
                "start": number,
                **ownership_lists(own),
                "mmcs": apd.metrics.mmcs(components, truth).item(),
                "ml2r": apd.metrics.ml2r(components, truth).item(),
                **{name: value[i].item() for name, value in loss.items()},
                "seconds": seconds,
            }
        )
    return rows


RUNS = Rows(
    fields=("recipe",),
    jobs=lambda rows: [(name,) for name in RECIPES],
    run=run,
    settings=lambda job: RECIPES[job[0]],
)
STUDY = Study("published", {"runs": RUNS}, about=lambda processes: {"processes": processes})

if __name__ == "__main__":
    STUDY.main(__doc__)
