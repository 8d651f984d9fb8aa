"""A decomposition as a folder: components.safetensors carries everything, cfg.json repeats the facts for people."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from . import checks, store
from .components import Components, usable
from .config import Config
from .decomposition import Decomposition, fingerprint
from .network import Network

_hashed: WeakKeyDictionary[nn.Module, tuple[list[Any], str]] = WeakKeyDictionary()
NOT_FINITE = {"nan": None, "inf": "infinite", "-inf": "minus infinite"}  # what stands for them in a file


def differences(stored: str, own: str) -> str:
    """Say what differs between two fingerprints; an empty text if they are of the same target.

    Fingerprints of earlier versions have no lines, so that nothing is named.
    """
    if stored[:64] == own[:64]:
        return ""
    old, new = ({line.split("\t")[0]: line.split("\t")[1:] for line in f.splitlines()[1:]} for f in (stored, own))
    named = []
    for path in sorted(old.keys() | new.keys()) if old else ():
        before, after = old.get(path, ["missing"]), new.get(path, ["missing"])
        if before != after:
            named.append(f"{path} was {before[0]}, is {after[0]}" + (", other values" if before[0] == after[0] else ""))
    text = f"its parameters hash to {stored[:12]}, these to {own[:12]}"
    return text + (f" ({'; '.join(named[:5])}{'; ...' if named[5:] else ''})" if named else "")


def warn_of_another(stored: str, target: nn.Module) -> None:
    """Warn if a target is another than the one of a fingerprint."""
    # To hash a large target takes longer than to run it: once, until a tensor is replaced or written to.
    state = {path: value for path, value in target.state_dict().items() if isinstance(value, Tensor)}
    now = [(path, tensor.data_ptr(), tensor._version) for path, tensor in state.items()]
    if target not in _hashed or _hashed[target][0] != now:
        _hashed[target] = now, fingerprint(state)
    if other := differences(stored, _hashed[target][1]):
        warnings.warn(f"this is not the target that was decomposed: {other}", UserWarning, stacklevel=3)


def logged(history: Any) -> dict[str, list[Any]]:
    """Check a history: lists of one length, the first of them the steps, in order.

    Raises:
        TypeError, ValueError: it is none.
    """
    what = "a mapping from names to lists of one length, with the steps in order"
    steps = checks.kind("history", checks.kind("history", history, dict, what).get("step"), list, what)
    if sorted({checks.number("steps of the history", step, 0, whole=True) for step in steps}) != steps:
        raise ValueError(f"history must be {what}, got the steps {checks.given(steps)}")
    if any(len(checks.kind(f"history of {name}", rows, list, what)) != len(steps) for name, rows in history.items()):
        raise ValueError(f"history must be {what}, got {checks.given({k: len(v) for k, v in history.items()})}")
    for name in history.keys() - {"step"}:
        for value in (v for row in history[name] for v in checks.kind(f"history of {name}", row, list, what)):
            checks.kind(f"history of {name}", value, (int, float, type(None)), "of numbers, or of None")
    return history


def save(decomposition: Decomposition, folder: str | os.PathLike[str], restarts: bool = False) -> None:
    """Write a decomposition; see `Decomposition.save`.

    Raises:
        ValueError: restarts are asked for, and there are none; components that could not be read again; a `cfg.json`
            that is another program's.
    """
    checks.kind("folder", folder, (str, os.PathLike), "a path")
    restarts = checks.flag("restarts", restarts)
    n, expected = usable(decomposition.components, alone=True).n_components, decomposition.config.n_components
    if n != expected:
        raise ValueError(
            f"the components must be the {expected} of the configuration, got {n}: replace the config, too"
        )
    if (known := Path(folder) / "cfg.json").exists() and b"fingerprint" not in known.read_bytes():
        raise ValueError(f"{known} is not a decomposition's and would be replaced: give another folder")
    facts = _facts(decomposition)
    tensors = _named(decomposition.components, "")
    if restarts:
        if decomposition.restarts is None:
            raise ValueError("this decomposition has no restarts: it was loaded from a folder without them")
        tensors |= _named(decomposition.restarts.map(Tensor.clone), ".restarts")  # the chosen one is a view of these
    # The tensors' file goes first and carries everything; cfg.json repeats the facts for people and tools.
    store.write_tensors(Path(folder) / "components.safetensors", "decomposition", tensors, facts)
    text = json.dumps({"format": store.FORMAT, **facts}, indent=1, allow_nan=False)
    store.write(Path(folder) / "cfg.json", text.encode())


def _facts(decomposition: Decomposition) -> dict[str, Any]:
    return {
        "fingerprint": decomposition.fingerprint,
        "weights": decomposition.components.paths,
        "config": asdict(decomposition.config),
        "finished": decomposition.finished,
        "chosen": decomposition.chosen,
        # Strict JSON knows neither NaN nor infinite numbers.
        "scores": [score if math.isfinite(score) else NOT_FINITE[str(score)] for score in decomposition.scores],
        "history": decomposition.history,
        "threshold": decomposition.threshold,
        "attribution": decomposition.attribution,
        "output": decomposition.output,
        "selection": decomposition.selection_name,
        "active": decomposition.active_name,
    }


def load(folder: str | os.PathLike[str], target: nn.Module) -> Decomposition:
    """Read a decomposition; see `Decomposition.load`.

    Raises:
        StoreError: a damaged or foreign file, or a decomposition of another target.
    """
    checks.kind("folder", folder, (str, os.PathLike), "a path")
    checks.kind("target", target, nn.Module, "a torch.nn.Module")
    file = Path(folder) / "components.safetensors"
    tensors, facts = store.read_tensors(file, "decomposition")
    with store.reading(file, "decomposition"):
        weights = facts["weights"]
        try:
            network = Network(target, weights)
        except (KeyError, TypeError) as error:
            raise store.StoreError(f"{file} decomposes {weights}, which this target does not have: {error}") from None
        other = differences(facts["fingerprint"], fingerprint(target.state_dict()))
        if other:
            raise store.StoreError(f"{file} decomposes another target: {other}; load it with that one")
        config = Config.from_dict(facts["config"])
        factors = {f"{path}.{name}" for path in weights for name in "AB"}
        more = {f"{name}.restarts" for name in factors}
        if tensors.keys() not in (factors, factors | more):
            raise ValueError(f"tensors {sorted(factors)} are expected, got {sorted(tensors)}")
        components = usable(network._fit(_taken(tensors, weights, "")))
        if components.restarts is not None or components.n_components != config.n_components:
            raise ValueError(
                f"n_components is {config.n_components}, but there are factors of {components.n_components}"
            )
        restarts = usable(network._fit(_taken(tensors, weights, ".restarts"))) if tensors.keys() > factors else None
        if restarts is not None and restarts.restarts != len(facts["scores"]):
            raise ValueError(f"there are {len(facts['scores'])} scores, but factors of {restarts.restarts} restarts")
        scores = [_score(score) for score in facts["scores"]]
        return Decomposition(
            components=components,
            config=config,
            history=logged(facts["history"]),
            scores=scores,
            chosen=checks.number("chosen", facts["chosen"], 0, len(scores) - 1, whole=True),
            finished=checks.flag("finished", facts["finished"]),
            fingerprint=facts["fingerprint"],
            restarts=restarts,
            # Files of earlier versions have none.
            attribution=checks.kind("attribution", facts.get("attribution"), (str, type(None)), "a name or None"),
            output=checks.kind("output", facts.get("output"), (str, type(None)), "a name or None"),
            selection_name=checks.kind("selection", facts.get("selection"), (str, type(None)), "a name or None"),
            active_name=checks.kind("active", facts.get("active"), (str, type(None)), "a name or None"),
            threshold=None if (found := facts.get("threshold")) is None else checks.number("threshold", found),
        )


def _score(stored: Any) -> float:
    for text, instead in NOT_FINITE.items():
        if stored == instead:
            return float(text)
    return checks.number("scores", stored)


def _named(components: Components, ending: str) -> dict[str, Tensor]:
    """Name the factors as they are stored."""
    return {f"{path}.{name}{ending}": t for name in "AB" for path, t in getattr(components, name).items()}


def _taken(tensors: Mapping[str, Tensor], paths: list[str], ending: str) -> Components:
    """Make components of the factors that `_named` gave names."""
    A, B = ({path: tensors[f"{path}.{name}{ending}"] for path in paths} for name in "AB")
    return Components(A, B)
