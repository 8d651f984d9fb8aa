"""Checkpoints: the state from which a stopped run goes on bit for bit, and which run it is a state of (chapter 6)."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import checks, store
from .config import Config
from .decomposition import fingerprint, name_of
from .network import Network
from .stored import differences, logged

if TYPE_CHECKING:
    from .train import Run


def identity(
    config: Config, network: Network, divergence: Any, attribution: Any, selection: Any = None
) -> dict[str, Any]:
    """Collect what the meaning of a run depends on, as JSON can hold it.

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
        "output": name_of(network.output),
        "divergence": name_of(divergence),
        "attribution": name_of(attribution),
        "selection": name_of(selection),
    }


def save(run: Run, path: str | os.PathLike[str]) -> None:
    """Write a checkpoint of a run, that of all processes if they share it.

    Args:
        run: between two steps.
        path: the file; the process that writes replaces it.
    """
    tensors = {"generator": run.generator.get_state()}
    for i, (p, shared) in enumerate(run.shared()):
        for name, t in {f"factor.{i}": p, **{f"adam.{i}.{k}": t for k, t in run.optimiser.state[p].items()}}.items():
            whole = run.local.whole(t.detach()) if shared else t.detach()
            if run.local.writes:
                tensors[name] = whole.cpu()
    tensors |= {f"selection.{i}": t.detach().cpu() for i, t in enumerate(run.selection.state())}
    if run.local.writes:
        facts = {"step": run.step, "history": run.history, **run.identity}
        store.write_tensors(path, "checkpoint", tensors, facts)
    run.local.wait()


def begin(run: Run, path: str | os.PathLike[str], extend: bool = False) -> None:
    """Take up the state of a checkpoint if there is one; if not, make sure that one can be written.

    Args:
        run: before its first step.
        path: the file; its folder is made if missing.
        extend: the checkpoint may be of a run of fewer steps.

    Raises:
        ValueError: there can be no such file; a StoreError is as for `resume`.
    """
    if Path(path).exists():
        return resume(run, path, extend)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"checkpoint must be a file in a folder that can be made, got {path}: {error}") from error


def resume(run: Run, path: str | os.PathLike[str], extend: bool = False) -> None:
    """Take up the state of a checkpoint.

    Args:
        run: before its first step.
        path: the file.
        extend: the checkpoint may be of a run of fewer steps.

    Raises:
        StoreError: a damaged file, or a checkpoint of another run; the message says what differs.
    """
    state = read_state(path, run.identity, extend)
    run.step, run.history = state.step, state.history
    with store.reading(path, "checkpoint"):
        run.generator.set_state(state.generator)
        for (p, shared), factor, moments in zip(run.shared(), state.factors, state.moments, strict=True):
            own = run.local.own if shared else Tensor.clone
            p.data.copy_(_checked("a factor", own(factor), p))
            run.optimiser.state[p] = {name: own(t).to(p.device) for name, t in moments.items()}
        for own_state, stored in zip(run.selection.state(), state.selection, strict=True):
            own_state.copy_(_checked("the selection's state", stored, own_state))
    run.remember()


def _checked(name: str, stored: Tensor, like: Tensor) -> Tensor:
    if checks.tensor(name, stored, *like.shape).dtype != like.dtype:
        raise TypeError(f"{name} must be of {like.dtype}, got {checks.given(stored)}")
    return stored


@dataclass(frozen=True)
class State:
    """What a checkpoint holds; see `save`."""

    step: int
    history: dict[str, list[Any]]
    generator: Tensor
    factors: list[Tensor]
    moments: list[dict[str, Tensor]]
    selection: list[Tensor]


def read_state(path: str | os.PathLike[str], run: dict[str, Any], extend: bool = False) -> State:
    """Read a checkpoint.

    Args:
        path: the file.
        run: the `identity` of the run that wants it.
        extend: it may be of a run of fewer steps.

    Returns:
        State: what was written.

    Raises:
        StoreError: a damaged file, or a checkpoint of another run; the message says what differs.
    """
    checks.kind("checkpoint", path, (str, os.PathLike), "a path")
    tensors, facts = store.read_tensors(path, "checkpoint")
    with store.reading(path, "checkpoint"):
        return _state(path, run, tensors, facts, extend)


def _state(
    path: str | os.PathLike[str], run: dict[str, Any], tensors: dict[str, Tensor], facts: dict[str, Any], extend: bool
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
    longer = other == ["steps"] and stored["steps"] < own["steps"]
    if other and not (extend and longer):
        differ = "; ".join(f"{name} was {stored[name]!r}, given {own[name]!r}" for name in other)
        raise store.StoreError(
            f"take the same settings, or another file: {path} belongs to a run with other settings: {differ}"
            + ("; extend=True goes on with it for more steps" if longer else "")
        )
    factors = [tensors[f"factor.{i}"] for i in range(sum(name.startswith("factor.") for name in tensors))]
    moments = [
        {name.rpartition(".")[2]: t for name, t in tensors.items() if name.startswith(f"adam.{i}.")}
        for i in range(len(factors))
    ]
    step = checks.number("step", facts["step"], 1, run["config"]["steps"], whole=True)
    history = logged(facts["history"])
    if history["step"] and history["step"][-1] >= step:
        raise ValueError(f"the history is of other steps than the {step} that were done")
    for i, known in enumerate(moments):
        if known.keys() != {"step", "exp_avg", "exp_avg_sq"} or int(known["step"]) != step:
            raise ValueError(f"Adam's moments of factor {i} are not those after {step} steps, got {sorted(known)}")
        for name in ("exp_avg", "exp_avg_sq"):
            _checked(f"{name} of factor {i}", known[name], factors[i])
        if known["exp_avg_sq"].lt(0).any():
            raise ValueError(f"exp_avg_sq of factor {i} must be 0 or above, got {checks.given(known['exp_avg_sq'])}")
    selection = [tensors[f"selection.{i}"] for i in range(sum(name.startswith("selection.") for name in tensors))]
    if len(tensors) != 1 + 4 * len(factors) + len(selection):
        raise ValueError(
            f"a generator, factors with three moments each and a selection are expected, got {sorted(tensors)}"
        )
    return State(step, history, tensors["generator"], factors, moments, selection)
