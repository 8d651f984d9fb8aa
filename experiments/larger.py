"""Makes data/larger.*: a transformer of 270,000 parameters with six tasks, taken apart (chapter 23).

python -m experiments.larger [--only answer-0 ...]     (on one core, two minutes for the target and ten for each run)

One target, of seed 0, rounded to half precision before it is taken apart: all twelve matrices ("answer"), or the
queries and keys alone ("reading"). The seeds are those of the decomposition; the recipes were found on the target of
seed 100. What is there with the settings of today is kept.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import asdict
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import apd_minimal as apd
from apd_minimal.losses import kl
from apd_minimal.selection import batch_top_k
from apd_minimal.targets.transformer import Transformer, answer_shares, last_position
from experiments.tms import DATA, write_manifest

TABLE, ARRAYS = DATA / "larger.json", DATA / "larger.safetensors"
QUESTIONS = 4096  # for everything that is measured
RUNS = ("answer-0", "answer-1", "reading-0", "reading-1")
READING: dict[str, Any] = {  # what differs where queries and keys are taken apart, and nothing else
    "weights": [f"blocks.{i}.{part}.weight" for i in range(2) for part in "qk"],
    "n_components": 12,
    "top_k": 2.0,
    "steps": 600,
    "init_std": 0.08,
    "faithfulness": 1000.0,
    "simplicity": ((0.0, 75.0), (0.7, 1.0)),  # a loss over a quarter of the weights counts four times as much
}
BUILT_IN = ("batches", "weights", "output", "attribution", "divergence")


def stored_target(tensors: dict[str, Tensor]) -> Transformer:
    """The target, trained now if it is not among the tensors."""
    target = Transformer(seed=0)
    if not any(name.startswith("target.") for name in tensors):
        state = target.fit(seed=0).state_dict()
        half = {f"target.{k}": v.half() if v.is_floating_point() else v for k, v in state.items()}
        tensors.update(half)
    target.load_state_dict({k.removeprefix("target."): v for k, v in tensors.items() if k.startswith("target.")})
    return target.requires_grad_(False)


def questions(target: Transformer) -> Tensor:
    """The questions on which everything is measured; no run sees this stream."""
    return target.data(QUESTIONS)(0, torch.Generator().manual_seed(77_000_007))


def means(values: Tensor, which: Tensor) -> list[float]:
    """Means of values [B] over the groups 0, 1, ... that which [B] names."""
    return [values[which == i].mean().item() for i in range(int(which.max()) + 1)]


@torch.no_grad()
def causal(network: apd.Network, components: apd.Components, x: Tensor, groups: dict[str, Tensor]) -> dict[str, Any]:
    """Take each component out of the target, and run each alone: KL and share of equal answers, [C, groups]."""
    wanted = network(x)
    names = [f"{run} {what} by {group}" for group in groups for run in ("out", "alone") for what in ("kl", "right")]
    table: dict[str, list[list[float]]] = {name: [] for name in names}
    for c in range(components.n_components):
        gates = torch.ones(len(x), components.n_components)
        gates[:, c] = 0
        for name, outputs in (
            ("out", network(x, components, gates, remainder=True)),
            ("alone", network(x, components, 1 - gates)),
        ):
            error, right = kl(outputs, wanted), (outputs.argmax(-1) == wanted.argmax(-1)).float()
            for group, which in groups.items():
                table[f"{name} kl by {group}"].append(means(error, which))
                table[f"{name} right by {group}"].append(means(right, which))
    return table


@torch.no_grad()
def scrubbed(network: apd.Network, components: apd.Components, x: Tensor, mask: Tensor) -> dict[str, list[float]]:
    """KL and share of equal answers: with the active ones, all, some exchanged, some by chance, none."""
    generator = torch.Generator().manual_seed(0)
    wanted = network(x)
    coin = (torch.rand(mask.shape, generator=generator) < 0.5).float()
    half = (torch.rand(mask.shape, generator=generator) < 0.5).float()
    others = mask[torch.randperm(len(mask), generator=generator)]  # the active ones of another question
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
    runs["uniform answer"] = torch.zeros_like(wanted)
    return {
        name: [kl(out, wanted).mean().item(), (out.argmax(-1) == wanted.argmax(-1)).float().mean().item()]
        for name, out in runs.items()
    }


def control(network: apd.Network, components: apd.Components) -> apd.Components:
    """As many components, of the same ranks, that know nothing of the tasks: singular directions dealt at random."""
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
    """The arguments of `decompose` for a run."""
    kind, seed = name.split("-")
    recipe = {**target.recipe, "seed": int(seed)}
    return recipe | READING if kind == "reading" else recipe


def settings_of(target: Transformer, name: str) -> dict[str, Any]:
    """The numbers among the arguments of `decompose`, as they are stored."""
    recipe = recipe_of(target, name)
    config = asdict(apd.Config.from_dict({k: v for k, v in recipe.items() if k not in BUILT_IN}))
    return json.loads(json.dumps({"batch": recipe["batches"].batch_size, **config}))


def run(target: Transformer, name: str) -> tuple[dict[str, Any], apd.Components]:
    """Take the target apart and measure."""
    recipe = recipe_of(target, name)
    network = apd.Network(target, recipe["weights"], output=last_position)
    x = questions(target)
    groups = {"task": x[:, 0] - target.n_letters, "answer": network(x).argmax(-1)}
    usage: list[dict[str, Any]] = []

    def watch(step: int, components: apd.Components) -> None:
        if step >= len(usage) * recipe["steps"] // 20:
            some = x[:1024]
            mask = batch_top_k(answer_shares(network, components.restart(0), some), recipe["top_k"])
            by = {group: [means(on, which[:1024]) for on in mask.T] for group, which in groups.items()}
            usage.append({"step": step, **by})
            print(name, step, f"{time.process_time() - start:.0f} s", flush=True)

    start = time.process_time()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = apd.decompose(target, **recipe, watch=watch, progress=False)
    seconds = time.process_time() - start
    order = result.components.norms().argsort(descending=True).tolist()
    components = result.components.subset(order).map(lambda t: t.half().float())
    mask = batch_top_k(answer_shares(network, components, x), recipe["top_k"])
    facts = {
        "name": name,
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
        "settings": settings_of(target, name),
    }
    return facts, components


def kept(target: Transformer) -> list[dict[str, Any]]:
    """The runs that are there with the settings of today."""
    runs = json.loads(TABLE.read_text())["runs"] if TABLE.exists() else []
    return [r for r in runs if r["settings"] == settings_of(target, r["name"])]


def store(target: Transformer, facts: dict[str, Any], components: apd.Components) -> None:
    """Add a run to what is in the files by now: another process may have added its own."""
    name = facts["name"]
    runs = sorted([*(r for r in kept(target) if r["name"] != name), facts], key=lambda r: r["name"])
    x = questions(target)
    right = (target(x)[:, -1].argmax(-1) == target.answers(x)).float()
    about = {"torch": torch.__version__, "threads": 1, "accuracy": means(right, x[:, 0] - target.n_letters)}
    tensors = {k: v for k, v in load_file(ARRAYS).items() if k.split(".")[0] in ("target", *(r["name"] for r in runs))}
    for letter, factors in (("A", components.A), ("B", components.B)):
        tensors |= {f"{name}.{letter}.{path}": t.half().contiguous() for path, t in factors.items()}
    text = json.dumps({"about": about, "runs": runs})
    short = json.loads(text, parse_float=lambda number: float(f"{float(number):.6g}"))  # the data have a budget
    TABLE.write_text(json.dumps(short, separators=(",", ":")) + "\n")
    save_file(tensors, ARRAYS)
    write_manifest()


def main() -> None:
    """Make what is missing and write the files after each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=RUNS, choices=RUNS)
    names = parser.parse_args().only
    torch.set_num_threads(1)
    tensors = load_file(ARRAYS) if ARRAYS.exists() else {}
    known = len(tensors)
    target = stored_target(tensors)
    if len(tensors) > known:
        save_file(tensors, ARRAYS)
    for name in names:
        if all(r["name"] != name for r in kept(target)):
            store(target, *run(target, name))


if __name__ == "__main__":
    main()
