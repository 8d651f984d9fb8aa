"""What the ranks of a test do; as a script, started once for every rank."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import runs
import torch
import torch.distributed as dist
from oracles import case
from test_importance import Penalised
from test_learned_selection import Learned
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

import apd_minimal as apd
from apd_minimal import store
from apd_minimal.bottleneck import Bottleneck
from apd_minimal.scale import processes

STEPS = 15
Decompose = Callable[..., apd.Decomposition]


def sparse(step: int, generator: torch.Generator) -> Tensor:
    """65 samples, most of them with nothing in them: no number of ranks has equal shares."""
    return apd.data.SparseFeatures(5, 0.1, batch_size=65)(step, generator).double()


def tms(decompose: Decompose, **changes: Any) -> apd.Decomposition:
    """Tied weights, restarts, merging and new starts, all losses."""
    settings: dict[str, Any] = {"steps": STEPS, "restarts": 2, "tidy_every": 0.2, "lr": 0.05, "progress": False}
    target = runs.tms().double()
    source = changes.pop("source", sparse)
    return decompose(target, source, ["encode.weight"], **{"n_components": 7, "top_k": 1.2, **settings, **changes})


def sequence(decompose: Decompose, **changes: Any) -> apd.Decomposition:
    """Positions, two layers, a loss on hidden activations, pieces of batches."""
    one = case("sequence")
    settings: dict[str, Any] = {
        "steps": STEPS, "per_position": True, "tidy_every": 0.0, "micro_batch": 2, "recompute": True,
        "hidden_modules": ["norm"], "hidden": 1.0, "lr": 0.03, "progress": False,
    }  # fmt: skip
    with patch("apd_minimal.outcome.HELD_OUT_SAMPLES", 50):
        return decompose(one.target, lambda step, g: one.inputs(11, g), list(one.stored), 5, 1.5, **settings, **changes)


def half_empty(step: int, generator: torch.Generator) -> Tensor:
    """64 samples, of which the second half is empty: on two ranks, all of the second one's."""
    x = apd.data.SparseFeatures(5, 0.3, batch_size=64)(step, generator).double()
    return torch.cat([x[:32], torch.zeros_like(x[:32])])


CASES: dict[str, Callable[[Decompose], apd.Decomposition]] = {
    "tms": tms,
    "tms from the component model": lambda d: tms(
        d, attribute_at="components", unit_norm=True, per_sample=True, top_k=1, tidy_every=0.0
    ),
    "tms with empty shares": lambda d: tms(d, source=half_empty),
    "sequence": sequence,
    # k follows the error of all samples, and is the same on all ranks.
    # Without merging, as below.
    "k that follows the error": lambda d: tms(d, top_k=None, selection=Bottleneck(0.9, (2.0, 6.0)), tidy_every=0.0),
    "k that follows the error, with empty shares": lambda d: tms(
        d, source=half_empty, top_k=None, selection=Bottleneck(gain=4.0), tidy_every=0.0
    ),
    # Every rank has all of the selection's parameters, and the gradient through its own gates alone.
    # Without merging, since what Adam does with a component that is all but empty, rounding decides.
    "learned selection": lambda d: tms(d, top_k=None, selection=Learned(), simplicity=0.5, tidy_every=0.0),
    "learned with a penalty": lambda d: tms(d, source=half_empty, top_k=None, selection=Penalised(), tidy_every=0.0),
    "learned with empty shares": lambda d: tms(
        d, source=half_empty, top_k=None, selection=Learned(), micro_batch=9, tidy_every=0.0
    ),
}


def write(path: Path, result: apd.Decomposition) -> None:
    """All restarts, the history and the scores of a result."""
    assert result.restarts is not None
    tensors = {str(i): t for i, t in enumerate(result.restarts.parameters())}
    store.write_tensors(path, "test", tensors, {"history": result.history, "scores": result.scores})


def spread(mesh: DeviceMesh) -> Decompose:
    """`decompose` on a mesh."""
    return lambda *given, **rest: apd.decompose(*given, **{"mesh": mesh, **rest})


def equal(folder: Path) -> None:
    """Every case on every mesh of these ranks, the same on all of them; rank 0 writes what came out."""
    for components in (1, 2, 4):
        if dist.get_world_size() % components:
            continue
        for name, run in CASES.items():
            result = run(spread(processes.mesh(components)))
            assert result.restarts is not None
            for t in result.restarts.parameters():
                first = t.clone()
                dist.broadcast(first, src=0)
                assert torch.equal(t, first)
            if dist.get_rank() == 0:
                write(folder / f"{name}-{components}", result)


def checkpointed(folder: Path, how: str) -> None:
    """A run that goes on from what is there, and is killed on the last rank at step 8, if that is asked for."""

    def source(step: int, generator: torch.Generator) -> Tensor:
        if how == "kill" and step == 8 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return sparse(step, generator)

    mesh = processes.mesh(min(2, dist.get_world_size()))
    log = folder / "log.jsonl"
    result = tms(spread(mesh), source=source, checkpoint=folder / "run.safetensors", checkpoint_every=3, log=log)
    if dist.get_rank() == 0:
        write(folder / "result", result)


def refused(folder: Path) -> None:
    """Wrong input, and losses that break: what each rank says."""
    found = {}
    rank = dist.get_rank()

    def says(components: int = 2, **changes: Any) -> str:
        try:
            tms(spread(processes.mesh(components)), **changes)
        except (ValueError, apd.NonFiniteLoss) as error:
            return str(error)
        return "nothing"

    def few(step: int, generator: torch.Generator) -> Tensor:
        return torch.rand(1, 5, generator=generator, dtype=torch.float64)

    def other(step: int, generator: torch.Generator) -> Tensor:
        return sparse(step, generator) * (1 + rank)

    def one(network: apd.Network, components: apd.Components, x: Tensor) -> Tensor:
        return torch.ones(2, len(x), 7)

    found["attribution"] = says(attribution=one)
    found["attribution along the data"] = says(1, attribution=one)
    found["few samples"] = says(1, source=few)
    found["few components"] = says(n_components=1, top_k=1)
    found["other settings"] = says(lr=0.01 * (1 + rank))
    found["other pieces"] = says(micro_batch=3 + rank)
    found["other batches"] = says(source=other)
    found["other checkpoints"] = says(checkpoint=folder / "one" if rank else None)
    found["no such mesh"] = says(mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    found["broken"] = says(lr=1e200)[:13]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        target = runs.tms()
        source = apd.data.SparseFeatures(5, 0.1, batch_size=65)
        result = spread(processes.mesh(2))(target, source, ["encode.weight"], 7, 1.2, steps=4, progress=False)
        found["autocast"] = str(all(bool(torch.isfinite(t).all()) for t in result.components.parameters()))
    try:
        processes.mesh(3)
    except ValueError as error:
        found["mesh"] = str(error)
    (folder / f"refused-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where = sys.argv[1], Path(sys.argv[2])
    processes.mesh(1)  # joins the others
    {"equal": equal, "refused": refused}.get(what, lambda folder: checkpointed(folder, what))(where)
    dist.destroy_process_group()
