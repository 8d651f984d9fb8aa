"""Makes data/tricks.json: every trick that makes a step cheaper, on and off (chapter 19).

python -m experiments.tricks [--only runs | steps] [--processes N]     (about 20 minutes, 5 of them the timings)

`runs`: whole decompositions with a trick on, for who owns what, on two small targets and five seeds each. The recipes
are those of chapter 16 (TMS 5-2 with its own k, the residual MLP with the k that its search chose); a trick changes one
thing and nothing is tuned for it. `steps`: time and memory of a step (benchmarks/trick_steps.py), on one thread of a
quiet machine. The 8-bit optimiser needs torchao 0.18, which the project does not: without it these runs stay as they
are.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.algorithm import begin, follow
from apd_minimal.attributions import gradient
from apd_minimal.targets import TMS, ResidualMLP
from apd_minimal.train import Run

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "data" / "tricks.json"
SEEDS = range(5)
FACTOR = 0.8  # of the residual MLP's k, chosen in chapter 16 on seed 100
SETTINGS: dict[str, dict[str, Any]] = {  # what a trick changes
    "off": {},
    "rank full": {"rank": None},
    "rank 2": {"rank": 2},
    "rank 1": {"rank": 1},
    "4 probes": {"n_probes": 4},
    "1 probe": {"n_probes": 1},
    "bfloat16": {"autocast": True},
    "both moments in bfloat16": {"optimiser": "both"},
    "8-bit moments": {"optimiser": "8-bit"},
}
TRICKS = {  # "off" is full rank for TMS 5-2 and rank 1 for the residual MLP, so that these two are not run again
    "residual-20-10": ("off", "rank full", "rank 2", "4 probes", "1 probe", "bfloat16", "both moments in bfloat16",
                       "8-bit moments"),
    "tms-5-2": ("off", "rank 1", "1 probe", "bfloat16", "both moments in bfloat16"),
}  # fmt: skip
Job = tuple[str, str, int]  # target, trick, seed


class SmallMoments(torch.optim.Optimizer):
    """Adam whose moments are kept in bfloat16, rounded to the nearest: the first alone, or both.

    Args:
        parameters: to train.
        lr: learning rate.
        both: the second moment too.
    """

    def __init__(self, parameters: list[Tensor], lr: float, both: bool) -> None:
        super().__init__(parameters, {"lr": lr})
        self.both = both

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update, as Adam's with its usual constants."""
        group = self.param_groups[0]
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(p, dtype=torch.bfloat16)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.bfloat16 if self.both else p.dtype)
            state["step"] += 1
            first = state["exp_avg"].to(p.dtype).lerp_(p.grad, 0.1)
            second = state["exp_avg_sq"].to(p.dtype).mul_(0.999).addcmul_(p.grad, p.grad, value=0.001)
            state["exp_avg"].copy_(first)
            state["exp_avg_sq"].copy_(second)
            scale = (second / (1 - 0.999 ** state["step"])).sqrt_().add_(1e-8)
            p.addcdiv_(first, scale, value=-group["lr"] / (1 - 0.9 ** state["step"]))


def optimiser_of(kind: str, parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
    """An optimiser with small states.

    Raises:
        ImportError: 8-bit states without torchao.
    """
    if kind != "8-bit":
        return SmallMoments(parameters, lr, both=kind == "both")
    from torchao.optim import Adam8bit

    return Adam8bit(parameters, lr=torch.tensor(lr))


@cache
def target_of(name: str, seed: int) -> TMS | ResidualMLP:
    """The trained target of a seed."""
    if name == "residual-20-10":
        return ResidualMLP(20, 200, (10,), seed=seed).fit(seed=seed, steps=3000, batch_size=1024)
    return TMS(5, 2).fit(seed=seed)


def recipe_of(name: str, seed: int) -> dict[str, Any]:
    """The arguments of `decompose` with every trick off."""
    target = target_of(name, seed)
    recipe = {k: v for k, v in target.recipe.items() if k != "attribution"} | {"seed": seed}
    if name == "residual-20-10":
        *points, last = recipe["top_k"]
        top_k = (*((t, FACTOR * k) for t, k in points), last)
        recipe |= {"batches": replace(recipe["batches"], batch_size=32), "steps": 1500, "top_k": top_k}
    return recipe


def decompose(target: TMS | ResidualMLP, recipe: dict[str, Any], trick: dict[str, Any], seed: int) -> apd.Decomposition:
    """A run with a trick on; without one it is that of `apd.decompose`."""
    recipe = dict(recipe)
    batches, weights = recipe.pop("batches"), recipe.pop("weights")
    network = apd.Network(target, weights, None, recipe.pop("hidden_modules", ()))
    if "rank" in trick:
        recipe["rank"] = trick["rank"]
    estimate = None
    if "n_probes" in trick:
        generator = torch.Generator().manual_seed(1_000 + seed)
        estimate = partial(gradient, n_probes=trick["n_probes"], generator=generator)
    with torch.autocast("cpu", torch.bfloat16) if trick.get("autocast") else nullcontext():
        run = begin(Run, network, batches, apd.Config.from_dict(recipe), "mse", estimate, None)
        if "optimiser" in trick:
            run.optimiser = optimiser_of(trick["optimiser"], run.components.parameters(), run.config.lr)  # type: ignore[assignment]
        if trick.get("optimiser") == "8-bit":
            set_lr(run)
        follow(run, None, 1, None, progress=False)
        return run.result()


def set_lr(run: Run) -> None:
    """torchao takes a learning rate that changes as a tensor, else it compiles anew for every value."""
    optimiser, plain = run.optimiser, run.optimiser.step

    def step() -> None:
        for group in optimiser.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]))
        plain()

    optimiser.step = step  # type: ignore[method-assign,assignment]


def shared(components: apd.Components, target: TMS | ResidualMLP) -> int:
    """How many mechanisms have their largest part in a component that has another's largest part too."""
    if isinstance(target, ResidualMLP):
        rows, n = target.contributions(), target.n_features
        truth = torch.zeros(n, *rows.shape)
        truth[torch.arange(n), torch.arange(n)] = rows
        parts = target.contributions(components)
    else:
        truth, parts = target.mechanisms()["encode.weight"], components.matrices("encode.weight")
    along = parts.flatten(1) @ truth.flatten(1).T / truth.flatten(1).square().sum(1)  # [C, J]
    holders = along.argmax(0).tolist()
    return sum(holders.count(c) > 1 for c in holders)


def stored_settings(job: Job) -> dict[str, Any]:
    """The settings as they are stored, by which a run is known."""
    name, trick, seed = job
    recipe = recipe_of(name, seed)
    numbers = {k: v for k, v in recipe.items() if k not in ("weights", "hidden_modules", "batches")}
    return json.loads(json.dumps(numbers | {"batch": recipe["batches"].batch_size, "trick": SETTINGS[trick]}))


def run(job: Job) -> dict[str, Any]:
    """Take one target apart with one trick."""
    name, trick, seed = job
    torch.set_num_threads(1)
    target, recipe = target_of(name, seed), recipe_of(name, seed)
    start = time.process_time()
    result = decompose(target, recipe, SETTINGS[trick], seed)
    seconds = time.process_time() - start
    components = result.components
    own = target.ownership(components)
    weights = apd.Network(target, target.weights).weights
    facts = {
        "target": name,
        "trick": trick,
        "seed": seed,
        "owned": int(own.owned.sum()),
        "n": len(own.owned),
        "shared": shared(components, target),
        "cosine": own.cosine.mean().item(),
        "relative_faithfulness": apd.metrics.relative_faithfulness(components, weights).item(),
        "score": min(result.scores),
        "seconds": round(seconds, 1),
        "settings": stored_settings(job),
    }
    print(*job, f"owned {facts['owned']}/{facts['n']}, {facts['shared']} share, {seconds:.0f} s", flush=True)
    return facts


def has_torchao() -> bool:
    """Is the 8-bit optimiser there?"""
    try:
        import torchao.optim  # noqa: F401
    except ImportError:
        return False
    return True


def job_of(facts: dict[str, Any]) -> Job:
    """The job whose result this is."""
    return facts["target"], facts["trick"], facts["seed"]


def main() -> None:
    """Make what is missing, and write the table after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("runs", "steps"), help="one half of the table")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stored = json.loads(TABLE.read_text()) if TABLE.exists() else {"runs": []}
    jobs = [(name, trick, seed) for seed in SEEDS for name, tricks in TRICKS.items() for trick in tricks]
    if arguments.only != "steps":
        runs = [r for r in stored["runs"] if job_of(r) in jobs and r["settings"] == stored_settings(job_of(r))]
        todo = [job for job in jobs if job not in set(map(job_of, runs))]
        if not has_torchao():
            todo = [job for job in todo if job[1] != "8-bit moments"]
        print(f"{len(runs)} runs kept, {len(todo)} to make", flush=True)
        with multiprocessing.get_context("spawn").Pool(arguments.processes) as pool:
            for facts in pool.imap_unordered(run, todo):
                runs = sorted([*runs, facts], key=job_of)
                about = {"torch": torch.__version__, "threads": 1}
                stored = json.loads(TABLE.read_text()) if TABLE.exists() else {}  # the timings may be new
                TABLE.write_text(json.dumps(stored | {"about": about, "runs": runs}, indent=1) + "\n")
    if arguments.only != "runs":
        subprocess.run([sys.executable, "-m", "benchmarks.trick_steps"], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
