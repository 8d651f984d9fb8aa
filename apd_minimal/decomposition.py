"""The result of `decompose`: components, how they came about, and a folder to keep them in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .components import Components
from .config import Config
from .network import Network, as_network
from .selection import FinalSelection, Selection, TopK


def fingerprint(state: Mapping[str, Any]) -> str:
    """Hash the tensors of a target's `state_dict()`, biases and buffers too, so that a stored one can be recognised.

    After the hash of all, one line for each tensor (path, type and shape, hash), for `differences` to compare. Extra
    state that is no tensor (`get_extra_state`) is left out: it has no bytes that are the same everywhere.
    """
    digest, lines = hashlib.sha256(), []
    for path in sorted(path for path, value in state.items() if isinstance(value, Tensor)):
        tensor = state[path].detach().cpu().contiguous()
        kind, data = f"{list(tensor.shape)} {tensor.dtype}", tensor.flatten().view(torch.uint8).numpy().tobytes()
        digest.update(f"{path} {kind}".encode())
        digest.update(data)
        lines.append(f"{path}\t{kind}\t{hashlib.sha256(data).hexdigest()[:16]}")
    return "\n".join([digest.hexdigest(), *lines])


def name_of(function: Any) -> str | None:
    """Name a function by module and qualified name, a partial by the function inside, an object by its class."""
    if function is None:
        return None
    while isinstance(function, partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{getattr(named, '__module__', None)}.{named.__qualname__}"


@dataclass(frozen=True)
class Decomposition:
    """A target, taken apart.

    Attributes:
        components: C components, those of the chosen restart.
        config: the settings.
        history: "step" and every loss, logged along the run; each loss is a list over restarts, [None] where it
            was off.
        scores: held-out sparse reconstruction error of each restart, or what the run's judge gave, by which one was
            chosen; NaN if a run broke and they could not be computed, and then the first was chosen.
        chosen: index of that restart.
        finished: False if the run was stopped before its last step.
        fingerprint: hash of the target's parameters and buffers.
        restarts: the components of all restarts, stacked; stored if `save` is asked to.
        threshold: the attribution above which a component is active, as the selection gave it at the end of the run;
            None if it gave none.
        selection: what chose the active components of the run, in all restarts; None after `load`, and `active` says
            what then needs doing.
        attribution: name of the run's own attribution; None for gradients.
        selection_name: name of the selection's class; None for one loaded from a file of an earlier version.
        active_name: name of the selection's `active`, which may be one of its own; None as above.
        output: name of the function that picked the outputs that count; None if all did.
    """

    components: Components = field(repr=False)
    config: Config
    history: dict[str, list[Any]] = field(repr=False)
    scores: list[float]
    chosen: int
    finished: bool
    fingerprint: str = field(repr=False)
    restarts: Components | None = field(default=None, repr=False)
    threshold: float | None = None
    selection: Selection | None = None
    attribution: str | None = None
    selection_name: str | None = None
    active_name: str | None = None
    output: str | None = None

    @property
    def final_selection(self) -> FinalSelection:
        """The run's selection as it is at its end, for attributions of the chosen restart.

        After `load`, it is the top k of the settings. A selection of the run's own is not stored: put it back first,
        with `dataclasses.replace(decomposition, selection=...)`.

        Raises:
            ValueError: the decomposition was loaded, and its run had a selection of its own, which is not stored.
        """
        if self.selection is None and (why := self._own_selection):
            raise ValueError(f"{why}, which is not stored: put it back with dataclasses.replace(..., selection=...)")
        selection = self.selection or TopK(self.config.top_k, self.config.per_sample)
        place = (1, 0) if type(selection) is TopK else (self.config.restarts, self.chosen)
        return FinalSelection(selection, *place, self.threshold, self.config.per_position)

    @property
    def _own_selection(self) -> str:
        """Say why the run's selection was not the top k of the settings; an empty text if it was."""
        k = self.config.top_k
        if self.selection_name is None:  # an earlier version: top_k was set so where a selection decided
            guess = f"top_k is {k}, all components, as in runs with a selection of their own"
            return guess if k == self.config.n_components else ""
        return "" if self.selection_name == name_of(TopK) else f"the run's selection was {self.selection_name}"

    def attributions(self, target: nn.Module | Network, x: Tensor, attribution: Any = None) -> Tensor:
        """Compute the attributions by which the run chose who is active.

        Args:
            target: the network that was decomposed.
            x: inputs [B, ...].
            attribution: the one of the run; None for gradients.

        Returns:
            Tensor: [B, C], or [B, positions, C] where the run has attributions for each position.

        Raises:
            ValueError: the run had an attribution of its own and none is given, or an `output` and the target has
                none, or the inputs do not fit.

        Warns:
            UserWarning: the target's parameters or buffers are others than when it was decomposed.
        """
        from .attributions import gradient
        from .stored import warn_of_another

        checks.function("attribution", attribution)
        if attribution is None and self.attribution is not None:
            raise ValueError(f"attribution must be that of the run, {self.attribution}, got None")
        network, config = as_network(target, self.components), self.config
        warn_of_another(self.fingerprint, network.target)
        if self.output is not None and network.output is None:
            raise ValueError(f"the run's outputs were picked by {self.output}: give Network(target, weights, output)")
        if attribution is not None:
            scores = attribution(network, self.components, x)
            return checks.tensor("attributions", scores, len(x), ..., self.components.n_components)
        return gradient(network, self.components, x, at=config.attribute_at, per_position=config.per_position)

    def active(self, target: nn.Module | Network, x: Tensor, attribution: Any = None) -> Tensor:
        """Say which components are active on each sample, whatever else is in the batch.

        A loaded decomposition has only the name of its run's selection. If that was the top k of the settings, or went
        by its `threshold`, which is stored, nothing needs doing. Otherwise put the selection back first:
        `dataclasses.replace(decomposition, selection=...)`.

        Args:
            target: the network that was decomposed.
            x: inputs [B, ...].
            attribution: the one of the run; None for gradients.

        Returns:
            Tensor: boolean [B, C], or [B, positions, C] where the run has attributions for each position.

        Raises:
            ValueError: the run's selection says nothing about a sample alone (`Selection.active`), or is missing and
                did not go by a threshold; the run had an attribution of its own and none is given; or the inputs do
                not fit.
        """
        scores = self.attributions(target, x, attribution)
        old = self.selection_name is None and not self.config.per_sample  # all that such a file can tell
        if self.selection is None and self.threshold is not None:
            if old or self.active_name == name_of(Selection.active):
                return scores > self.threshold
        return self.final_selection.active(scores)

    def save(self, folder: str | os.PathLike[str], restarts: bool = False) -> None:
        """Write `cfg.json` and `components.safetensors` (keys path.A [C, d_in, m] and path.B [C, m, d_out]).

        Args:
            folder: made if missing; a decomposition that is there is replaced.
            restarts: write those of all restarts too (keys path.A.restarts [R, C, d_in, m], and so on).

        Raises:
            ValueError: restarts are asked for, and this decomposition has none; components that are not those of its
                configuration, or not finite; a `cfg.json` in the folder that is another program's.
        """
        from .stored import save

        save(self, folder, restarts)

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
        from .stored import load

        return load(folder, target)
