"""Create data/merging.*: runs that start with four times too many components, merged or not (chapter 20).

python -m experiments.merging [--only tms-5-2 | tms-40-10] [--processes N]     (about 30 minutes on one core)

Each target is decomposed by its recipe with C four times its number of features: merging by description length, by
cosine as in the recipe, or not at all; and TMS 5-2 on three seeds, with two restarts, with other alphas, with merging
from the start, and with two features that are always on together. Afterwards, each result is shortened by description
length with each alpha. The main alpha, 4, was fixed before any run: log2 of the initial 20 components is 4.3, so that a
rank costs about as much as an index. TMS 40-10 has batches of 128 and one restart. There both rules merge from the
start of a run, as the recipe has it, and from 40% of it on, which was chosen for the bits on seed 100; and bits have
the largest alpha too, which is what that rule of thumb says for 160 components.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.losses import mse
from apd_minimal.targets import TMS
from apd_minimal.tidy.merge import shortened
from apd_minimal.train import Run
from experiments.experiment import Row, Rows, Study, Tensors, numbers, prefix, taken_apart

SIZES = {"tms-5-2": (5, 2), "tms-40-10": (40, 10)}
SEEDS = {"tms-5-2": range(60, 70), "tms-40-10": range(60, 65)}
FEW = range(60, 63)
FIRST = range(60, 62)  # of TMS 40-10: no merging, and the largest alpha
ALPHA, ALPHAS = 4.0, (0.5, 1.0, 2.0, 4.0, 8.0)
MAIN = {"bits": ALPHA, "cosine": None, "none": None}
TIMES = 4  # components per feature
Job = tuple[str, str, float | None, int]  # target, rule, alpha in training, seed


@dataclass(frozen=True)
class Paired:
    """Batches [B, 5] of nonempty samples, in which features 0 and 1 are always on together, with independent values."""

    batch_size: int

    def __call__(self, step: int, generator: torch.Generator) -> Tensor:
        x = apd.data.SparseFeatures(4, 0.05, batch_size=self.batch_size, nonempty=True)(step, generator)
        value = torch.rand(len(x), 1, generator=generator)
        return torch.cat([x[:, :1], value * (x[:, :1] > 0), x[:, 1:]], dim=1)


def jobs(name: str) -> list[Job]:
    """List the runs on one target."""
    every: list[Job] = [(name, rule, alpha, seed) for rule, alpha in MAIN.items() for seed in SEEDS[name]]
    if name == "tms-40-10":
        every = [job for job in every if job[1] != "none" or job[3] in FIRST]
        every += [(name, "cosine from 40%", None, seed) for seed in SEEDS[name]]
        every += [(name, "bits from the start", ALPHA, seed) for seed in SEEDS[name]]
        every += [(name, "bits", ALPHAS[-1], seed) for seed in FIRST]
    if name == "tms-5-2":
        every += [(name, "bits", alpha, seed) for alpha in ALPHAS if alpha != ALPHA for seed in FEW]
        every += [(name, "bits from the start", ALPHA, seed) for seed in FEW]
        every += [(name, "cosine from the start", None, seed) for seed in FEW]
        every += [(name, "bits, paired", ALPHA, seed) for seed in FEW]
        every += [(name, "cosine, paired", None, seed) for seed in FEW]
    return every


@cache
def target_of(name: str, seed: int) -> TMS:
    """Train the target of a seed."""
    return TMS(*SIZES[name]).fit(seed=seed)


def settings_of(job: Job) -> dict[str, Any]:
    """Return the arguments of `decompose` for a run."""
    name, rule, alpha, seed = job
    target = TMS(*SIZES[name])
    settings = target.recipe | {"n_components": TIMES * target.n_features, "seed": 1000 + seed, "alpha": alpha}
    if name == "tms-5-2" and (rule not in MAIN or alpha not in (ALPHA, None)):
        settings |= {"restarts": 2}
    if name == "tms-40-10":
        settings |= {"batches": replace(settings["batches"], batch_size=128), "restarts": 1}
        if rule in ("bits", "cosine from 40%"):  # by then, components have found their directions
            settings |= {"tidy_from": 0.4, "reseed_until": 0.65}
    if rule == "none":
        settings |= {"tidy_every": 0.0}
    if "from the start" in rule:
        settings |= {"tidy_from": 0.0}
    if "paired" in rule:
        settings |= {"batches": Paired(settings["batches"].batch_size)}
    return settings


def stored_settings(job: Job) -> Row:
    """Return the settings as stored; they identify a run."""
    settings = settings_of(job)
    return numbers(settings, batch=settings["batches"].batch_size)


def n_left(components: apd.Components) -> Any:
    """Count the nonzero components: a number, or one for each restart."""
    return (components.norms() > 0).sum(-1).tolist()


def facts_of(target: TMS, components: apd.Components, x: Tensor, k: float) -> dict[str, Any]:
    """Measure components: number, ownership, errors, description length."""
    own = apd.metrics.ownership(components, target.mechanisms())
    network = apd.Network(target, target.weights)
    k = min(k, components.n_components)
    errors = apd.metrics.scrubbing(target, components, x, k)
    nonzero = components.subset((components.norms() > 0).nonzero().flatten().tolist())  # zeros have no name
    mask = apd.selection.batch_top_k(apd.attributions.gradient(network, nonzero, x), min(k, nonzero.n_components))
    return {
        "left": n_left(components),
        "owned": int(own.owned.sum()),
        "length_ratio": own.length_ratio.mean().item(),
        "relative_faithfulness": apd.metrics.relative_faithfulness(components, network.weights).item(),
        "top_k": errors.top_k.mean().item(),
        "scrubbed": errors.scrubbed.mean().item(),
        "bits": apd.metrics.description_length(nonzero, mask, ALPHA).item(),
        "factor_bytes": sum(t.numel() * t.element_size() for t in components.parameters()),
    }


def peak_bytes(job: Job, n_components: int) -> int:
    """Measure the peak memory of tensors in one step of a run with so many components: gradients and temporaries only.

    Between steps, factors and Adam's two moments are kept: three times the bytes of the factors.
    """
    settings = settings_of(job)
    k = settings["top_k"][0][1]
    config = apd.Config.from_dict(numbers(settings | {"n_components": n_components, "top_k": k, "restarts": 1}))
    target = TMS(*SIZES[job[0]])
    run = Run(apd.Network(target, target.weights), settings["batches"], config, mse, None)
    run.advance()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        run.advance()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return peak


def run(job: Job) -> tuple[list[Row], Tensors]:
    """Decompose one target; return measurements and tensors."""
    name, _, _, seed = job
    target, settings = target_of(name, seed), settings_of(job)
    left: list[Any] = []
    result, seconds = taken_apart(
        target, settings, callback=lambda step, losses, components: left.append(n_left(components))
    )
    source = replace(settings["batches"], batch_size=8192)
    x = source(0, torch.Generator().manual_seed(20_000 + seed))
    k = settings["top_k"][-1][1]
    network, found = apd.Network(target, target.weights), result.components
    mask = apd.selection.batch_top_k(apd.attributions.gradient(network, found, x), k)
    after = {f"{bits:g}": facts_of(target, shortened(found, mask, bits), x, k) for bits in ALPHAS}
    assert result.restarts is not None
    facts = {
        "seconds": seconds,
        "n_features": target.n_features,
        "chosen": result.chosen,
        "score": result.scores[result.chosen],
        "left_in_each_restart": n_left(result.restarts),
        "left_along_the_way": [row[result.chosen] for row in left],
        "steps": result.history["step"],
        **facts_of(target, found, x, k),
        "after": after,
        "peak_step_bytes": {
            "before": peak_bytes(job, found.n_components),
            "after": peak_bytes(job, after[f"{ALPHA:g}"]["left"]),
        },
    }
    tensors = {"target.encode.weight": target.encode.weight.detach(), "target.bias": target.bias.detach()}
    tensors |= {f"A.{p}": found.A[p] for p in found.paths} | {f"B.{p}": found.B[p] for p in found.paths}
    return [facts], {prefix(job) + name: t.clone().contiguous() for name, t in tensors.items()}


RUNS = Rows(
    fields=("target", "rule", "alpha", "seed"),
    jobs=lambda rows: [job for name in SIZES for job in jobs(name)],
    run=run,
    settings=stored_settings,
    order=lambda job: "/".join(map(str, job)),
)
STUDY = Study("merging", {"runs": RUNS}, about=lambda processes: {"alphas": ALPHAS, "alpha": ALPHA}, compact=True)

if __name__ == "__main__":
    STUDY.main(__doc__)
