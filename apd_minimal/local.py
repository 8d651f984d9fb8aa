"""What of a run is on this process: all of it, unless several processes share it (`scale.processes`, chapter 22)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .components import Components
from .kernels.totals import Totals
from .network import Network

if TYPE_CHECKING:
    from .train import Run


class Local:
    """A process on its own: it has all samples and all components, and nobody to tell.

    A run asks this object wherever several processes would differ from one. In `scale.processes.Shared`, each process
    has a part of each batch and a part of the components.
    """

    single = True
    """Whether there is no other process."""

    writes = True
    """Whether this process writes the files and shows the progress."""

    def begin(self, run: Run) -> None:
        """Check that the run can be shared, before its first step.

        Raises:
            ValueError: it cannot, or the processes were given different ones.
        """

    def agree_on(self, what: str, given: Any) -> None:
        """Raise a ValueError if the processes were given different ones, as JSON has them."""

    def network(self, network: Network) -> Network:
        """Give the network that runs the components of this process."""
        return network

    def mode(self, at: str) -> str | None:
        """Name the mode that gradient attributions at `at` must take; None for any."""
        return None

    def samples(self, x: Tensor) -> Tensor:
        """Take this process's samples of a batch [B, ...]."""
        return x

    def own(self, whole: Tensor) -> Tensor:
        """Take this process's components of a tensor [R, C, ...]."""
        return whole

    def whole(self, own: Tensor) -> Tensor:
        """Put together the tensor of which `own` gives a part."""
        return own

    def count(self, n_active: int, n: int) -> float:
        """Say how many of this process's n samples are worked on, before their scores and gates are asked for.

        Returns:
            float: the share of all processes' samples that is worked on; 1 if there is none (then all are).
        """
        return (n_active or n) / n

    def all_scores(self, own: Tensor) -> Tensor:
        """Put together the scores [R, B, ..., C] of all samples and components."""
        return own

    def all_gates(self, own: torch.Size) -> list[int]:
        """Give the shape of the gates of all samples and components, from that of this process's gates."""
        return list(own)

    def own_gates(self, whole: Tensor, n: int) -> Tensor:
        """Take from the gates of all what is about this process's n samples and its components."""
        return whole

    def weight(self, n: int) -> float:
        """Give what the mean over this process's n samples counts for in the mean over processes."""
        return 1.0

    def mean(self, values: Tensor) -> Tensor:
        """Average over the processes that have different samples."""
        return values

    def losses(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give a step's losses, each [R], over all samples and components."""
        return losses

    def reduce(self, parameters: list[Tensor]) -> None:
        """Add up, in place, the gradients of what every process has as a whole."""

    def totals(self, components: Components) -> Totals:
        """Give what the losses see of the factors."""
        return Totals(components)

    def agree(self, tensors: list[Tensor]) -> None:
        """Put in place, on all processes, what the first of them has."""

    def wait(self) -> None:
        """Wait until all processes are here."""
