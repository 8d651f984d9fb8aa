"""Checkpoints: the state from which a stopped run goes on bit for bit, and which run it is a state of (chapter 6)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import checks, store
from .config import Config
from .decomposition import differences, fingerprint
from .network import Network


def identity(
    config: Config, network: Network, divergence: Any, attribution: Any, selection: Any = None
) -> dict[str, Any]:
    """What the meaning of a run depends on, as JSON can hold it.

    Functions count by module and qualified name, a partial by the function inside, any other object by its class.
    So what a function does, what a partial holds and which of two lambdas in one scope it was is not compared,
    nor are the batches: a source that broke may be mended. A function that moved counts as another one.

    Args:
        config: the settings.
        network: the target, with the weights, the output and the hidden modules that were picked.
        divergence: a function.
        attribution: a function, or None for gradient attributions.
        selection: an object, or None for the top k of the settings.

    Returns:
        dict[str, Any]: name to value.
    """
    return {
        "config": asdict(config),
        "fingerprint": fingerprint(network.target.state_dict()),
        "weights": list(network.weights),
        "hidden modules": network.hidden,
        "output": _name(network.output),
        "divergence": _name(divergence),
        "attribution": _name(attribution),
        "selection": _name(selection),
    }


def _name(function: Any) -> str | None:
    if function is None:
        return None
    while isinstance(function, partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(named, '__module__', None)}.{named.__qualname__}"


def write_state(
    path: str | os.PathLike[str],
    run: dict[str, Any],
    step: int,
    history: dict[str, list[Any]],
    generator: torch.Generator,
    factors: Sequence[Tensor],
    moments: Sequence[Mapping[str, Tensor]],
) -> None:
    """Write a checkpoint.

    Args:
        path: the file.
        run: the run's `identity`.
        step: steps done.
        history: what was logged.
        generator: of the run's randomness.
        factors: the components' factors, in the order of `Components.parameters`.
        moments: what the optimiser knows about each of them.
    """
    tensors = {"generator": generator.get_state()}
    for i, (factor, known) in enumerate(zip(factors, moments, strict=True)):
        tensors[f"factor.{i}"] = factor.detach()
        for name, value in known.items():
            tensors[f"adam.{i}.{name}"] = value
    store.write_tensors(path, "checkpoint", tensors, {"step": step, "history": history, **run})


@dataclass(frozen=True)
class State:
    """What a checkpoint holds; see `write_state`."""

    step: int
    history: dict[str, list[Any]]
    generator: Tensor
    factors: list[Tensor]
    moments: list[dict[str, Tensor]]


def read_state(path: str | os.PathLike[str], run: dict[str, Any]) -> State:
    """Read a checkpoint.

    Args:
        path: the file.
        run: the `identity` of the run that wants it.

    Returns:
        State: what was written.

    Raises:
        StoreError: a damaged file, or a checkpoint of another run; the message says what differs.
    """
    checks.kind("checkpoint", path, (str, os.PathLike), "a path")
    tensors, facts = store.read_tensors(path, "checkpoint")
    with store.reading(path, "checkpoint"):
        return _state(path, run, tensors, facts)


def _state(
    path: str | os.PathLike[str], run: dict[str, Any], tensors: dict[str, Tensor], facts: dict[str, Any]
) -> State:
    other_target = differences(facts["fingerprint"], run["fingerprint"])
    if other_target:
        raise store.StoreError(
            f"{path} belongs to a run on another target: {other_target}; take that one, or another file"
        )
    stored = facts | asdict(Config.from_dict(facts["config"]))
    own = run | run["config"]
    # A checkpoint of an earlier version does not say everything; what it does not say is not compared.
    other = [
        name for name in own if name not in ("config", "fingerprint") and name in stored and stored[name] != own[name]
    ]
    if other:
        differ = "; ".join(f"{name} was {stored[name]!r}, given {own[name]!r}" for name in other)
        raise store.StoreError(
            f"take the same settings, or another file: {path} belongs to a run with other settings: {differ}"
        )
    factors = [tensors[f"factor.{i}"] for i in range(sum(name.startswith("factor.") for name in tensors))]
    moments = [
        {name.rpartition(".")[2]: t for name, t in tensors.items() if name.startswith(f"adam.{i}.")}
        for i in range(len(factors))
    ]
    step = checks.number("step", facts["step"], 0, run["config"]["steps"], whole=True)
    history = checks.kind("history", facts["history"], dict, "a mapping from names to lists")
    if any(done >= step for done in history["step"]) or any(
        len(rows) != len(history["step"]) for rows in history.values()
    ):
        raise ValueError(f"the history is of other steps than the {step} that were done")
    for i, known in enumerate(moments):
        if known.keys() != {"step", "exp_avg", "exp_avg_sq"} or int(known["step"]) != step:
            raise ValueError(f"Adam's moments of factor {i} are not those after {step} steps, got {sorted(known)}")
        for name in ("exp_avg", "exp_avg_sq"):
            checks.tensor(f"{name} of factor {i}", known[name], *factors[i].shape)
    return State(step, history, tensors["generator"], factors, moments)
