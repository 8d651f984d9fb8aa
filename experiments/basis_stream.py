"""Create data/basis_stream.json: small residual MLPs in other bases of the stream and the neurons (chapter 31).

python -m experiments.basis_stream [--processes N]       (about six minutes of one core)

20 functions in two layers of 5 neurons, as in chapter 9's small run: the recipe of residual MLPs with 1,500 steps. The
stream is linear: it can be rotated. The neurons are not: they can be put in another order and multiplied by positive
numbers, here from 1/4 to 4. Target seeds 7600 to 7604, the decomposition's 1,000 more; nothing was tuned, each was run
once. "Another start" is the control.
"""

from __future__ import annotations

import torch

from apd_minimal.targets import ResidualMLP
from experiments.basis_networks import orthogonal
from experiments.experiment import Row, Rows, Study, Tensors, numbers, ownership_lists, taken_apart

SEEDS = range(7600, 7605)
BASES = ("plain", "another start", "stream rotated", "neurons scaled")


@torch.no_grad()
def changed(target: ResidualMLP, name: str, seed: int) -> ResidualMLP:
    """Put a residual MLP into another basis, in place; its function stays the same."""
    if name == "stream rotated":
        R = orthogonal(target.d_resid, seed).float()
        target.embedding.copy_(target.embedding @ R)
        for read, write in target.layers:
            read.weight.copy_(read.weight @ R)
            write.weight.copy_(R.T @ write.weight)
    if name == "neurons scaled":
        generator = torch.Generator().manual_seed(seed)
        for read, write in target.layers:
            order = torch.randperm(len(read.weight), generator=generator)
            scale = 4 ** (2 * torch.rand(len(order), generator=generator) - 1)
            read.weight.copy_(scale[:, None] * read.weight[order])
            write.weight.copy_(write.weight[:, order] / scale)
    return target


def fitted(name: str, seed: int) -> ResidualMLP:
    """Train a target, and put it into a basis."""
    return changed(ResidualMLP(20, 200, (5, 5), seed=seed).fit(seed=seed, steps=3000, batch_size=1024), name, seed)


def recipe(target: ResidualMLP, job: tuple[str, int]) -> Row:
    """Give the settings of `decompose`."""
    return target.recipe | {"steps": 1500, "seed": (2000 if job[0] == "another start" else 1000) + job[1]}


def run(job: tuple[str, int]) -> tuple[list[Row], Tensors]:
    """Train one target, take it apart in one basis, and measure."""
    plain, target = fitted("plain", job[1]), fitted(*job)
    x = target.data(1024)(0, torch.Generator().manual_seed(1))
    with torch.no_grad():
        apart = float((plain(x) - target(x)).abs().max())
    result, seconds = taken_apart(target, recipe(target, job))
    return [{"seconds": seconds, "outputs_apart": apart, **ownership_lists(target.ownership(result.components))}], {}


APD = Rows(
    fields=("basis", "seed"),
    jobs=lambda rows: [(name, seed) for name in BASES for seed in SEEDS],
    run=run,
    settings=lambda job: numbers(recipe(ResidualMLP(20, 200, (5, 5)), job)),
    order=lambda job: (BASES.index(job[0]), job[1]),
)
STUDY = Study("basis_stream", {"apd": APD})

if __name__ == "__main__":
    STUDY.main(__doc__)
