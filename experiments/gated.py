"""Create data/gated.*: hand-coded gated functions decomposed (chapter 10).

python -m experiments.gated [--only ours plain rotated beside] [--processes N]   (a quarter of an hour on two cores)

Seeds 0 to 9 were not used to find the recipe: that was done on seeds from 100 up. "rotated" is the same recipe,
untouched, on other targets, in a stream whose axes are rotated at random; ten were planned, five fixed before the first
result. "beside" is the recipe on these five in their own axes, run afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from experiments.experiment import Row, Rows, Study, Tensors, factors, numbers, ownership_lists, prefix, taken_apart

SEEDS = {"ours": range(10), "plain": range(5), "rotated": range(20, 25), "beside": range(20, 25)}
Job = tuple[str, int]  # recipe, seed


@dataclass(frozen=True)
class RotatedInputs:
    """A source of batches [batch_size, n + 2]: those of `GatedInputs` in the stream, rotated.

    Attributes:
        own: the source in its own axes.
        Q: orthogonal [n + 2, n + 2].
    """

    own: apd.targets.GatedInputs
    Q: Tensor

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        """Draw a batch; the same one, before it is rotated, as `own` draws."""
        return torch.nn.functional.pad(self.own(step, generator), (0, 1)) @ self.Q

    @property
    def share_nonempty(self) -> float:
        """Probability that a sample has at least one bit on."""
        return self.own.share_nonempty


class Rotated(apd.targets.GatedFunctions):
    """The same network with its stream in other axes: r Q [B, n + 2] in place of r = (x, bits, y).

    Its inputs are streams (with y at 0), so that x and the bits and y are mixed. Outputs and neurons are the same.
    """

    Q: Tensor

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(seed=seed, **options)
        d = self.n_functions + 2
        self.register_buffer("Q", torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed))).Q)
        with torch.no_grad():
            for read, write in self.layers:
                read.weight.copy_(read.weight @ self.Q)
                write.weight.copy_(self.Q.T @ write.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map rotated streams [..., n + 2] to y [..., 1], or to 3 y and the neurons."""
        stream, active = x, []
        for read, write in self.layers:
            active.append(torch.relu(read(stream)))
            stream = stream + write(active[-1])
        y = stream @ self.Q[-1:].T
        return torch.cat([apd.targets.gated.SHOWN_Y * y, *active], dim=-1) if self.show_neurons else y

    def data(self, batch_size: int = 1024, nonempty: bool = False) -> RotatedInputs:  # type: ignore[override]
        """Create the source of rotated batches."""
        return RotatedInputs(super().data(batch_size, nonempty), self.Q)


def settings_of(recipe: str, seed: int) -> tuple[apd.targets.GatedFunctions, dict[str, Any]]:
    """Return a target and the arguments of `decompose`.

    "plain" has the paper's settings (braun2025, appendix), but 3,000 steps of 2,000 samples in place of 200,000 of
    10,000, and without their empty samples.
    """
    kind = Rotated if recipe == "rotated" else apd.targets.GatedFunctions
    target = kind(seed=seed, show_neurons=recipe != "plain")
    if recipe != "plain":
        return target, target.recipe
    data = target.data(371, nonempty=True)  # the non-empty samples of a batch of 2,000
    share = data.share_nonempty
    return target, {
        "batches": data,
        "weights": target.weights,
        "n_components": 4,
        "top_k": 0.2217 / share,
        "faithfulness": 0.1,
        "minimality": 5 * share,
        "simplicity": 5 * share,
        "p": 1.0,
        "lr": 3e-3,
        "warmup": 0.004,
        "steps": 3_000,
        "scrub": 0.0,
        "tidy_every": 0.0,
    }


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Decompose one target and measure."""
    recipe, seed = job
    target, settings = settings_of(recipe, seed)
    result, seconds = taken_apart(target, settings, seed=seed)
    truth, components, every = target.mechanisms(), result.components, result.restarts
    assert every is not None
    owned = [apd.metrics.ownership(every.restart(r), truth) for r in range(result.config.restarts)]
    own = owned[result.chosen]
    facts = {
        "seconds": seconds,
        **ownership_lists(own),
        "relative_faithfulness": apd.metrics.relative_faithfulness(
            components, apd.Network(target, target.weights).weights
        ).item(),
        "scores": result.scores,
        "chosen": result.chosen,
        "restarts_owned": [int(o.owned.sum()) for o in owned],
        "restarts_least_cosine": [o.cosine.min().item() for o in owned],
    }
    return [facts], factors(components, prefix(job))


RUNS = Rows(
    fields=("recipe", "seed"),
    jobs=lambda rows: [(recipe, seed) for recipe, seeds in SEEDS.items() for seed in seeds],
    run=run,
    settings=lambda job: numbers(settings_of(*job)[1], seed=job[1]),
)
STUDY = Study("gated", {"runs": RUNS}, about=lambda processes: {"processes": processes})

if __name__ == "__main__":
    STUDY.main(__doc__)
