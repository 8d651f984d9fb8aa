"""How bad can the masks be? Inactive components switched on so as to do the most harm (bushnaq2026).

A component that is inactive on a sample may have any gate between its importance and 1 (an inactive one of a hard mask:
between 0 and 1), and the output must stay. Random gates, as in scrubbing, show the mean harm; an attack looks for the
largest. On a few components all corners, where each gate is at either end, can be tried: there the worst is exact, and
says how much an attack misses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import checks
from ..components import Components, usable
from ..losses import Divergence, mse, sample_errors
from ..network import Network, as_network

MOST = 14
"""Components at most whose corners are all tried."""


@dataclass(frozen=True)
class Worst:
    """Errors of each sample with its gates as they are, and with worse and worse ones, each [B]; see `worst`.

    Attributes:
        active: with the gates as they were given.
        half: mean over random corners, in which every inactive component is on with probability one half.
        searched: largest over these corners.
        ascended: largest over the corners that an attack passes.
        exact: largest over all corners; None where these are too many.
    """

    active: Tensor
    half: Tensor
    searched: Tensor
    ascended: Tensor
    exact: Tensor | None

    def means(self) -> dict[str, float]:
        """Average each over the samples."""
        return {name: float(v.mean()) for name, v in vars(self).items() if v is not None}


class Corners:
    """The gates that a sample may have, and the error at corners of this box.

    Args:
        target: the network, plain or wrapped.
        components: C components, without restarts.
        x: inputs [B, ...].
        gates: importances or a mask [B, C], in [0, 1]: the least gates; the largest are 1.
        divergence: (outputs, target outputs) -> [..., B].

    Raises:
        ValueError: gates of another shape, or not in [0, 1].
    """

    def __init__(
        self, target: nn.Module | Network, components: Components, x: Tensor, gates: Tensor, divergence: Divergence
    ) -> None:
        usable(components, alone=True)
        self.network, self.x, self.divergence = as_network(target, components), checks.inputs(x), divergence
        checks.gates("gates", gates, len(x), components.n_components)
        self.components = components.map(Tensor.detach)
        self.gates = gates.detach().to(self.components.parameters()[0])
        with torch.no_grad(), checks.running(x, f"components of {self.gates.dtype}"):
            self.wanted = self.network(x)

    def error(self, on: Tensor) -> Tensor:
        """Give the errors with some inactive components on: [B].

        Args:
            on: how far each gate goes from its least to 1, [B, C]; 0 or 1 at a corner.
        """
        gates = self.gates + (1 - self.gates) * on
        return sample_errors(self.network(self.x, self.components, gates), self.wanted, self.divergence)

    @torch.no_grad()
    def search(self, n_draws: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Try random corners: the mean error, and the largest, [B] each.

        Args:
            n_draws: corners.
            generator: draws them.
        """
        errors = [
            self.error((torch.rand(self.gates.shape, generator=generator) < 0.5).to(self.gates)) for _ in range(n_draws)
        ]
        return torch.stack(errors).mean(0), torch.stack(errors).amax(0)

    def ascend(self, steps: int, size: float, generator: torch.Generator) -> Tensor:
        """Go up by the gradient's sign from a random point; the largest error over the nearest corners passed: [B].

        Args:
            steps: of the attack.
            size: of a step, where gates go from 0 to 1.
            generator: draws the first point.
        """
        at = torch.rand(self.gates.shape, generator=generator).to(self.gates)
        worst = self.error((at > 0.5).to(at)).detach()
        for _ in range(steps):
            at.requires_grad_()
            (slope,) = torch.autograd.grad(self.error(at).sum(), at)
            at = (at.detach() + size * slope.sign()).clamp(0, 1)
            with torch.no_grad():
                worst = torch.maximum(worst, self.error((at > 0.5).to(at)))
        return worst

    @torch.no_grad()
    def enumerate(self) -> Tensor | None:
        """Try all corners of the components that are not empty: the largest error [B]; None if these are over `MOST`.

        One that is empty, of length zero, changes nothing.
        """
        free = (self.components.norms() > 0).nonzero().flatten()
        if len(free) > MOST:
            return None
        worst = self.error(torch.zeros_like(self.gates))
        for corner in range(1, 2 ** len(free)):
            on = torch.zeros_like(self.gates)
            on[:, [c for i, c in enumerate(free.tolist()) if corner >> i & 1]] = 1
            worst = torch.maximum(worst, self.error(on))
        return worst


def worst(
    target: nn.Module | Network,
    components: Components,
    x: Tensor,
    gates: Tensor,
    *,
    divergence: Divergence = mse,
    steps: int = 20,
    size: float = 0.1,
    n_draws: int = 20,
    seed: int = 0,
) -> Worst:
    """Look for the inactive components that, switched on, do the most harm on each sample.

    Args:
        target: the network that was decomposed.
        components: C components, without restarts. Up to 14 that are not empty, all corners are tried.
        x: inputs [B, ...].
        gates: who is active: a mask or importances [B, C] in [0, 1], such as `Decomposition.final_selection.gates`.
        divergence: the error, (outputs, target outputs) -> [..., B].
        steps: of the attack, each as dear as one run forward, one back, and one forward.
        size: of a step, for gates that go from 0 to 1 (bushnaq2026 evaluates with 20 steps of 0.1).
        n_draws: random corners.
        seed: of the random corners and the attack's start.

    Returns:
        Worst: exact >= ascended and exact >= searched >= half, sample by sample, up to rounding.

    Raises:
        TypeError, ValueError: input that does not fit.
    """
    steps, n_draws = checks.number("steps", steps, 0, whole=True), checks.number("n_draws", n_draws, 1, whole=True)
    size, seed = checks.number("size", size, 0, above=True), checks.number("seed", seed, 0, 2**62, whole=True)
    generator = torch.Generator().manual_seed(seed)
    corners = Corners(target, components, x, gates, divergence)
    half, searched = corners.search(n_draws, generator)
    with torch.no_grad():
        active = corners.error(torch.zeros_like(corners.gates))
    return Worst(active, half, searched, corners.ascend(steps, size, generator), corners.enumerate())
