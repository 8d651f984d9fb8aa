"""Create data/larger.*: a transformer of 270,000 parameters with six tasks, decomposed (chapter 23).

python -m experiments.larger [--only answer-0 ...] [--processes N]     (two minutes for the target, ten for each run)

One target, of seed 0, rounded to half precision before it is decomposed: all twelve matrices ("answer"), or the
queries and keys alone ("reading"). The seeds are those of the decomposition; the recipes were found on the target of
seed 100.
"""

from __future__ import annotations

import json
import resource
import time
from functools import cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import apd_minimal as apd
from apd_minimal.losses import kl
from apd_minimal.selection import batch_top_k
from apd_minimal.targets.transformer import Transformer, answer_shares, last_position
from experiments.experiment import DATA, Row, Rows, Study, Tensors, numbers, taken_apart

ARRAYS = DATA / "larger.safetensors"
QUESTIONS = 4096  # for everything that is measured
RUNS = ("answer-0", "answer-1", "reading-0", "reading-1")
READING: dict[str, Any] = {  # changes to the recipe where only queries and keys are decomposed
    "weights": [f"blocks.{i}.{part}.weight" for i in range(2) for part in "qk"],
    "n_components": 12,
    "top_k": 2.0,
    "steps": 600,
    "init_std": 0.08,
    "faithfulness": 1000.0,
    "simplicity": ((0.0, 75.0), (0.7, 1.0)),  # a loss over a quarter of the weights counts four times as much
}


def state_of(target: Transformer) -> Tensors:
    """Return the target's state as it is stored, in half precision."""
    return {f"target.{k}": v.half() if v.is_floating_point() else v for k, v in target.state_dict().items()}


@cache
def stored_target() -> Transformer:
    """Load the target, or train it if it is not stored."""
    target, tensors = Transformer(seed=0), load_file(ARRAYS) if ARRAYS.exists() else {}
    if not any(name.startswith("target.") for name in tensors):
        tensors = state_of(target.fit(seed=0))
    target.load_state_dict({k.removeprefix("target."): v for k, v in tensors.items() if k.startswith("target.")})
    return target.requires_grad_(False)


def short(results: Any) -> Any:
    """Round to six digits: the size of the stored data is limited."""
    return json.loads(json.dumps(results), parse_float=lambda number: float(f"{float(number):.6g}"))


def questions(target: Transformer) -> Tensor:
    """Draw the questions on which everything is measured; no run sees this stream."""
    return target.data(QUESTIONS)(0, torch.Generator().manual_seed(77_000_007))


def means(values: Tensor, which: Tensor) -> list[float]:
    """Average values [B] over groups: `which` [B] holds each sample's group 0, 1, ..."""
    return [values[which == i].mean().item() for i in range(int(which.max()) + 1)]


@torch.no_grad()
def causal(network: apd.Network, components: apd.Components, x: Tensor, groups: dict[str, Tensor]) -> dict[str, Any]:
    """Take each component out of the target, and run each alone: KL and share of equal answers, [C, groups]."""
    target_outputs = network(x)
    names = [f"{run} {what} by {group}" for group in groups for run in ("out", "alone") for what in ("kl", "right")]
    table: dict[str, list[list[float]]] = {name: [] for name in names}
    for c in range(components.n_components):
        gates = torch.ones(len(x), components.n_components)
        gates[:, c] = 0
        for name, outputs in (
            ("out", network(x, components, gates, remainder=True)),
            ("alone", network(x, components, 1 - gates)),
        ):
            error, right = kl(outputs, target_outputs), (outputs.argmax(-1) == target_outputs.argmax(-1)).float()
            for group, which in groups.items():
                table[f"{name} kl by {group}"].append(means(error, which))
                table[f"{name} right by {group}"].append(means(right, which))
    return table


@torch.no_grad()
def scrubbed(network: apd.Network, components: apd.Components, x: Tensor, mask: Tensor) -> dict[str, list[float]]:
    """Measure KL and share of equal answers with several gates: active, all, scrubbed, exchanged, none."""
    generator = torch.Generator().manual_seed(0)
    target_outputs = network(x)
    coin = (torch.rand(mask.shape, generator=generator) < 0.5).float()
    half = (torch.rand(mask.shape, generator=generator) < 0.5).float()
    others = mask[torch.randperm(len(mask), generator=generator)]  # the active components of another question
    gates = {
        "active": mask,
        "all": torch.ones_like(mask),
        "scrubbed": torch.maximum(mask, coin),
        "anti-scrubbed": mask * half + (1 - mask) * coin,
        "inactive alone": 1 - mask,
        "another's active": others,
        "none": torch.zeros_like(mask),
    }
    runs = {name: network(x, components, g) for name, g in gates.items()}
    runs["uniform answer"] = torch.zeros_like(target_outputs)
    return {
        name: [
            kl(out, target_outputs).mean().item(),
            (out.argmax(-1) == target_outputs.argmax(-1)).float().mean().item(),
        ]
        for name, out in runs.items()
    }


def control(network: apd.Network, components: apd.Components) -> apd.Components:
    """Build a control of as many components of the same ranks: singular directions dealt to them at random."""
    generator = torch.Generator().manual_seed(0)
    C, A, B = components.n_components, {}, {}
    for path, weight in network.weights.items():
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        hands = torch.randperm(len(S), generator=generator).tensor_split(C)
        m = max(map(len, hands))
        A[path], B[path] = torch.zeros(C, len(weight), m), torch.zeros(C, m, weight.shape[1])
        for c, hand in enumerate(hands):
            A[path][c, :, : len(hand)] = U[:, hand] * S[hand]
            B[path][c, : len(hand)] = Vh[hand]
    return apd.Components(A, B)


def recipe_of(target: Transformer, name: str) -> dict[str, Any]:
    """Return the arguments of `decompose` for a run."""
    kind, seed = name.split("-")
    recipe = {**target.recipe, "seed": int(seed)}
    return recipe | READING if kind == "reading" else recipe


def run(job: tuple[str]) -> tuple[list[Row], Tensors]:
    """Decompose the target and measure."""
    (name,), target = job, stored_target()
    recipe = recipe_of(target, name)
    network = apd.Network(target, recipe["weights"], output=last_position)
    x = questions(target)
    groups = {"task": x[:, 0] - target.n_letters, "answer": network(x).argmax(-1)}
    usage: list[dict[str, Any]] = []

    def watch(step: int, losses: dict[str, list[float]], components: apd.Components) -> None:
        if step >= len(usage) * recipe["steps"] // 20:
            some = x[:1024]
            mask = batch_top_k(answer_shares(network, components.restart(0), some), recipe["top_k"])
            by = {group: [means(on, which[:1024]) for on in mask.T] for group, which in groups.items()}
            usage.append({"step": step, **by})
            print(name, step, f"{time.process_time() - start:.0f} s", flush=True)

    start = time.process_time()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, seconds = taken_apart(target, recipe, callback=watch)
    order = result.components.norms().argsort(descending=True).tolist()
    components = result.components.subset(order).map(lambda t: t.half().float())
    mask = batch_top_k(answer_shares(network, components, x), recipe["top_k"])
    facts = {
        "seconds": round(seconds),
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "history": {k: [v if k == "step" else v[0] for v in values] for k, values in result.history.items()},
        "usage": usage,
        "order": order,
        "use": {group: [means(on, which) for on in mask.T] for group, which in groups.items()},
        "relative_faithfulness": apd.metrics.relative_faithfulness(components, network.weights).item(),
        "ranks": {path: r.tolist() for path, r in components.ranks().items()},
        "causal": causal(network, components, x, groups),
        "scrubbing": scrubbed(network, components, x, mask),
        "control": causal(network, control(network, components), x, groups),
    }
    both = (("A", components.A), ("B", components.B))
    tensors = {f"{name}.{f}.{path}": t.half().contiguous() for f, own in both for path, t in own.items()}
    return [short(facts)], tensors | state_of(target)


def settings_of(job: tuple[str]) -> Row:
    """Return the settings as they are stored."""
    recipe = recipe_of(Transformer(seed=0), job[0])
    return numbers(recipe, batch=recipe["batches"].batch_size)


def accuracy() -> Row:
    """Measure the target's accuracy on each task."""
    target = stored_target()
    x = questions(target)
    right = (target(x)[:, -1].argmax(-1) == target.answers(x)).float()
    return {"accuracy": short(means(right, x[:, 0] - target.n_letters))}


STUDY = Study(
    "larger",
    {"runs": Rows(("name",), lambda rows: [(name,) for name in RUNS], run, settings_of)},
    about=lambda processes: accuracy(),
    prefixes=lambda job: (f"{job[0]}.", "target."),
    compact=True,
)

if __name__ == "__main__":
    STUDY.main(__doc__)
