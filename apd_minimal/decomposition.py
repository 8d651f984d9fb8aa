"""The result of `decompose`: components, how they came about, and a folder to keep them in."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import store
from .components import Components
from .config import Config
from .network import Network


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Hash of a target's `state_dict()`, biases and buffers too, by which a stored decomposition knows it."""
    digest = hashlib.sha256()
    for path in sorted(state):
        tensor = state[path].detach().cpu().contiguous()
        digest.update(f"{path} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Decomposition:
    """A target, taken apart.

    Attributes:
        components: C components, those of the chosen restart.
        config: the settings.
        history: "step" and every loss, logged along the run; each loss is a list over restarts.
        scores: held-out sparse reconstruction error of each restart, by which one was chosen; NaN if a run broke
            and they could not be computed, and then the first was chosen.
        chosen: index of that restart.
        finished: False if the run was stopped before its last step.
        fingerprint: hash of the target's parameters and buffers.
        restarts: the components of all restarts, stacked; stored if `save` is asked to.
    """

    components: Components
    config: Config
    history: dict[str, list[Any]]
    scores: list[float]
    chosen: int
    finished: bool
    fingerprint: str
    restarts: Components | None = None

    def save(self, folder: str | os.PathLike[str], restarts: bool = False) -> None:
        """Write `cfg.json` and `components.safetensors` (keys path.A [C, d_in, m] and path.B [C, m, d_out]).

        Args:
            folder: made if missing; a decomposition that is there is replaced.
            restarts: write those of all restarts too (keys path.A.restarts [R, C, d_in, m], and so on).

        Raises:
            ValueError: restarts are asked for, and this decomposition has none.
        """
        tensors = _named(self.components, "")
        if restarts:
            if self.restarts is None:
                raise ValueError("this decomposition has no restarts: it was loaded from a folder without them")
            tensors |= _named(self.restarts.map(torch.clone), ".restarts")  # the chosen one is a view of these
        # The tensors' file goes first and carries everything; cfg.json repeats the facts for people and tools.
        store.write_tensors(Path(folder) / "components.safetensors", "decomposition", tensors, self._facts())
        text = json.dumps({"format": store.FORMAT, **self._facts()}, indent=1)
        store.write(Path(folder) / "cfg.json", text.encode())

    def _facts(self) -> dict[str, Any]:
        return {
            "fingerprint": self.fingerprint,
            "weights": self.components.paths,
            "config": asdict(self.config),
            "finished": self.finished,
            "chosen": self.chosen,
            "scores": self.scores,
            "history": self.history,
        }

    @classmethod
    def load(cls, folder: str | os.PathLike[str], target: nn.Module) -> Decomposition:
        """Read what `save` wrote, and make sure that it belongs to the target.

        Args:
            folder: as given to `save`.
            target: the network that was decomposed.

        Returns:
            Decomposition: with the chosen restart's components, and those of all if they were stored.

        Raises:
            FileNotFoundError: no such folder or file.
            StoreError: a truncated or foreign file, or a decomposition of another target.
        """
        file = Path(folder) / "components.safetensors"
        tensors, facts = store.read_tensors(file, "decomposition")
        weights = facts["weights"]
        try:
            Network(target, weights)
        except (KeyError, TypeError) as error:
            raise store.StoreError(f"{file} decomposes {weights}, which this target does not have: {error}") from None
        own = fingerprint(target.state_dict())
        if own != facts["fingerprint"]:
            raise store.StoreError(
                f"{file} decomposes another target: its parameters hash to {facts['fingerprint'][:12]}, "
                f"these to {own[:12]}"
            )
        return cls(
            components=_taken(tensors, weights, ""),
            config=Config.from_dict(facts["config"]),
            history=facts["history"],
            scores=facts["scores"],
            chosen=facts["chosen"],
            finished=facts["finished"],
            fingerprint=facts["fingerprint"],
            restarts=_taken(tensors, weights, ".restarts") if f"{weights[0]}.A.restarts" in tensors else None,
        )


def _named(components: Components, ending: str) -> dict[str, Tensor]:
    """The factors by the names under which they are stored."""
    return {f"{path}.{name}{ending}": t for name in "AB" for path, t in getattr(components, name).items()}


def _taken(tensors: Mapping[str, Tensor], paths: list[str], ending: str) -> Components:
    """The components that `_named` gave names."""
    A, B = ({path: tensors[f"{path}.{name}{ending}"] for path in paths} for name in "AB")
    return Components(A, B)
