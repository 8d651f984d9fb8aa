"""Create data/parallel.json, runs on several processes (chapter 22): equal results, seconds, memory, messages.

python -m experiments.parallel [--only runs | times | jump] [--again]     (about 10 minutes of both cores)

Run nothing else meanwhile. torchrun starts the same script on every rank: --rank selects the part of the work.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import apd_minimal as apd
from apd_minimal import store
from apd_minimal.scale import processes
from apd_minimal.targets import TMS
from experiments.experiment import DATA, Row, Study

MESHES = ((1, 1), (2, 1), (1, 2), (2, 2))  # ranks along data, ranks along components
TIMED = ((1, 1), (2, 1), (1, 2))  # no more processes than cores
SEEDS = (0, 1)
JUMP = {"seed": 1, "data": 1, "components": 2, "until": 720}  # the run that jumps, and past where
WIDTHS = (256, 1024, 1024, 32)
SIZE: dict[str, Any] = {"n_components": 256, "rank": 4, "top_k": 8.0, "tidy_every": 0.0, "steps": 10_000}
BATCH, WARM_UP, STEPS = 256, 3, 10


def perceptron() -> nn.Sequential:
    """Draw a network of 1.3 million weights: what a step costs does not depend on their values."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(d, e) for d, e in pairwise(WIDTHS)]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def inputs(step: int, generator: torch.Generator) -> Tensor:
    """Draw dense inputs."""
    return torch.randn(BATCH, WIDTHS[0], generator=generator)


class Enough(BaseException):
    """Ends a run after the timed steps."""


def decomposer(n_ranks: int, components: int) -> Callable[..., apd.Decomposition]:
    """Return `decompose`, on these ranks or alone."""
    if n_ranks == 1:
        return apd.decompose
    mesh = processes.mesh(components)
    return lambda *given, **rest: apd.decompose(*given, mesh=mesh, **rest)


def same(n_ranks: int, components: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run on TMS 5-2, and compare the components with those of one process along the run."""
    target = TMS().fit(seed=seed)
    ranks = processes.Ranks(None if n_ranks == 1 else processes.mesh(components)["components"])
    snapshots: dict[str, Tensor] = {}

    def record(step: int, losses: dict[str, list[float]], own: apd.Components) -> None:
        for i, t in enumerate(own.parameters()):
            columns = [len(part) for part in torch.arange(target.recipe["n_components"]).tensor_split(ranks.size)]
            snapshots[f"{step}.{i}"] = ranks.join(t, 1, columns).clone()

    start = time.perf_counter()
    settings = {**target.recipe, "seed": seed, "progress": False, "callback": record}
    result = decomposer(n_ranks, components)(target, **settings)
    seconds = time.perf_counter() - start
    file = folder / f"seed-{seed}"
    if n_ranks == 1:
        store.write_tensors(file, "seen", snapshots, {})
    expected = store.read_tensors(file, "seen")[0]
    steps = sorted({int(name.split(".")[0]) for name in snapshots})
    differences = [
        max(float((snapshots[f"{s}.{i}"] - expected[f"{s}.{i}"]).abs().max()) for i in range(2)) for s in steps
    ]
    own = apd.metrics.ownership(result.components, target.mechanisms())
    return {
        "seed": seed, "steps": steps, "difference": differences,
        "largest": max(float(t.abs().max()) for t in snapshots.values()),
        "owned": int(own.owned.sum()), "score": min(result.scores), "chosen": result.chosen, "seconds": seconds,
    }  # fmt: skip


def jump(n_ranks: int, components: int, folder: Path) -> dict[str, Any]:
    """Run again until past a jump, and compare entry by entry, matrix by matrix, and after matching the components."""
    target = TMS().fit(seed=JUMP["seed"])
    ranks = processes.Ranks(None if n_ranks == 1 else processes.mesh(components)["components"])
    snapshots: dict[str, Tensor] = {}

    def record(step: int, losses: dict[str, list[float]], own: apd.Components) -> None:
        if step > JUMP["until"]:
            raise Enough
        columns = [len(part) for part in torch.arange(target.recipe["n_components"]).tensor_split(ranks.size)]
        for i, t in enumerate(own.parameters()):
            snapshots[f"{step}.{i}"] = ranks.join(t, 1, columns).clone()

    try:
        settings = {**target.recipe, "seed": JUMP["seed"], "progress": False, "callback": record}
        decomposer(n_ranks, components)(target, **settings)
    except Enough:
        pass
    if n_ranks == 1:
        store.write_tensors(folder / "jump", "seen", snapshots, {})
        return {}
    expected = store.read_tensors(folder / "jump", "seen")[0]
    (path,) = target.weights
    steps = sorted({int(name.split(".")[0]) for name in snapshots})
    found: dict[str, Any] = {**JUMP, "steps": steps, "factors": [], "matrices": [], "matched": [], "cosine": []}
    for s in steps:
        one, other = (apd.Components({path: seen[f"{s}.0"]}, {path: seen[f"{s}.1"]}) for seen in (expected, snapshots))
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        found["factors"].append(max(float((a - b).abs().max()) for a, b in pairs))
        found["matrices"].append(float((one.matrices(path) - other.matrices(path)).abs().max()))
        apart, alike = [], []
        for r in range(target.recipe["restarts"]):
            match = apd.metrics.match_weights(one.restart(r), other.restart(r), n_draws=1)
            first, second = one.restart(r).subset(match.first), other.restart(r).subset(match.second)
            apart.append(float((first.matrices(path) - second.matrices(path)).abs().max()))
            alike.append(float(match.similarity.min()))
        found["matched"].append(max(apart))
        found["cosine"].append(min(alike))
    return found


class Talk(TorchDispatchMode):
    """Count collectives, and the bytes that this rank sends, for each kind of them."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation if it is a collective, and run it."""
        if function.namespace == "_c10d_functional" and function.__name__.startswith("all_"):
            name = function.__name__.split(".")[0]
            self.messages[name] += 1
            self.bytes[name] += args[0].numel() * args[0].element_size()
        return function(*args, **(kwargs or {}))


def steps(n_ranks: int, components: int, n: int) -> list[float]:
    """Time n steps: when each began, and when the last one ended."""
    times: list[float] = []

    def source(step: int, generator: torch.Generator) -> Tensor:
        times.append(time.perf_counter())
        if len(times) == n + 2:  # one more batch is drawn before the first step, to check the network
            raise Enough
        return inputs(step, generator)

    try:
        decomposer(n_ranks, components)(
            perceptron(), source, ["0.weight", "2.weight", "4.weight"], progress=False, **SIZE
        )
    except Enough:
        pass
    return times[1:]


def timed(n_ranks: int, components: int) -> dict[str, Any]:
    """Measure seconds of a step, peak memory of a rank, and the messages of a step."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = sorted(b - a for a, b in pairwise(steps(n_ranks, components, WARM_UP + STEPS)[WARM_UP:]))
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    counted = []
    for n in (1, 2):
        with Talk() as talk:
            steps(n_ranks, components, n)
        counted.append(talk)
    return {
        "seconds": seconds[len(seconds) // 2],
        "fastest": seconds[0],
        "slowest": seconds[-1],
        "megabytes": megabytes,
        "messages": dict(counted[1].messages - counted[0].messages),
        "bytes": dict(counted[1].bytes - counted[0].bytes),
    }


def rank(what: str, components: int, folder: Path) -> None:
    """Do the work of one rank; the first one writes the results."""
    torch.set_num_threads(1)
    n_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if n_ranks > 1:
        processes.mesh(components)
    if what == "same":
        results: Any = [same(n_ranks, components, seed, folder) for seed in SEEDS]
    else:
        results = jump(n_ranks, components, folder) if what == "jump" else timed(n_ranks, components)
    if n_ranks == 1 or dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(results))
    if n_ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def start(what: str, n_data: int, components: int, folder: Path) -> Any:
    """Start the ranks, wait, and read the results of the first one."""
    n = n_data * components
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    command = [sys.executable, *launcher, "-m", "experiments.parallel", "--rank", what, str(components), str(folder)]
    subprocess.run(command, check=True, cwd=DATA.parent, env={**os.environ, "OMP_NUM_THREADS": "1"})
    results = json.loads((folder / "found.json").read_text())
    print(what, n_data, components, json.dumps(results)[:300], flush=True)
    return results


def times() -> list[Row]:
    """Measure what a step costs on each mesh."""
    with tempfile.TemporaryDirectory() as folder:
        return [{"data": d, "components": c, **start("timed", d, c, Path(folder))} for d, c in TIMED]


def runs() -> list[Row]:
    """Do whole runs on each mesh; the first is one process, with which the others are compared."""
    with tempfile.TemporaryDirectory() as folder:
        return [{"data": d, "components": c, **r} for d, c in MESHES for r in start("same", d, c, Path(folder))]


def jumps() -> Row:
    """Look at the run that jumps, beside the one of a single process."""
    with tempfile.TemporaryDirectory() as folder:
        start("jump", 1, 1, Path(folder))
        found: Row = start("jump", JUMP["data"], JUMP["components"], Path(folder))
        return found


STUDY = Study(
    "parallel",
    lists={},
    measurements={"runs": runs, "times": times, "jump": jumps},
    about=lambda processes: {"widths": WIDTHS, "batch": BATCH, "steps": STEPS, **SIZE},
)

if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
    else:
        STUDY.main(__doc__)
