"""Brute force for a network: every sample alone, with weights of its own in place of the target's (chapter 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.graph import allow_mutation_on_saved_tensors
from torch.func import functional_call

from . import checks
from .components import Components
from .network import Network, evaluating
from .sites import Use


def differ(a: Tensor, b: Tensor, size: Tensor, tolerance: float, scale: Tensor | None = None) -> bool:
    """Tell whether a and b differ by more than `tolerance * size` plus the rounding error of `scale` (of b)."""
    rounding = 32 * torch.finfo(b.dtype).eps * (b.norm() if scale is None else scale)
    return not bool((a - b).norm() <= tolerance * size + rounding)  # NaN differs


class Trial:
    """Random components near the target's weights, gates by sample of either sign, and both ways to run them."""

    def __init__(self, network: Network, x: Tensor, chosen: Tensor, tolerance: float, seed: int) -> None:
        self.network, self.all, self.chosen, self.x, self.tolerance = network, x, chosen, x[chosen], tolerance
        generator = torch.Generator().manual_seed(seed)
        self.parts: dict[str, tuple[Tensor, Tensor]] = {}
        self.gates = {}
        self.steps = True  # whether outputs have moved each time without a slope, or cannot have one
        for path, matrix in network.weights.items():
            noise = torch.randn(matrix.shape, generator=generator).to(matrix)
            noise = noise * (0.1 * matrix.square().mean().sqrt() + 1e-3)
            P = torch.stack([0.6 * matrix + noise, 0.3 * matrix])
            one = torch.eye(min(matrix.shape)).to(P).expand(2, -1, -1)
            self.parts[path] = (one, P) if matrix.shape[0] < matrix.shape[1] else (P, one)
            self.gates[path] = (0.7 + 0.6 * torch.rand(len(self.x), 2, generator=generator)).to(matrix)
        with torch.no_grad():
            self.before = network(self.x)
        self.cotangent = torch.randn(self.before.shape, generator=generator).to(self.before)
        self.modules = {
            path: " and ".join(f"module {site.name!r}" for site in network.sites if site.path == path)
            for path in network.weights
        }

    def problem(self) -> str | None:
        """Describe what is not reproduced, by the path of the weight at fault; None if everything is."""
        paths = list(self.network.weights)
        # At last with the other sign: weights that are clamped, or of which the sign is taken away, show only there.
        for remainder, sign in ((False, 1), (True, 1), (False, -1)):
            self.gates = {path: sign * gate for path, gate in self.gates.items()}
            if together := self._compare(paths, remainder, far=sign < 0):
                return next(filter(None, (self._compare([path], remainder, sign < 0) for path in paths)), together)
        if apart := self._among_all():
            return apart
        if self.steps:
            self.gates = {path: torch.ones_like(gate) for path, gate in self.gates.items()}  # the target itself
            if not any(g.any() for g in self._hooked(self._components(paths), remainder=True)[1].values()):
                what = checks.given(self.before)
                return f"{', '.join(paths)}: the outputs, {what}, have no slope by it: pick others (output=)"
        return None

    def _compare(self, paths: Sequence[str], remainder: bool, far: bool) -> str | None:
        """Describe what is wrong when the weights at some paths are gated and the others stay; None if nothing.

        Far from its own weights only outputs count, and nothing is said of NaN.
        """
        components = self._components(paths)
        true, gradients = self._real(components, remainder)
        ours, hook_gradients = self._hooked(components, remainder)
        change, error = (true - self.before).norm(), (ours - true).norm()
        if differ(ours, true, change, self.tolerance) and not (far and not true.isfinite().all()):
            return (
                f"{', '.join(paths)}: the network uses this weight in a way that its modules' calls do not show "
                f"(changing it moves the output by {change:.3g}, of which the hooks at "
                f"{', '.join(self.modules[path] for path in paths)} miss {error:.3g}): only modules may use it, on "
                "a first argument whose first axis is the samples in their order, and give the product with it plus "
                "what does not depend on it (a weight that is scaled or masked there needs a rule, apd.rules)"
            )
        if far:
            return None
        largest = torch.stack([gradient.norm() for gradient in gradients.values()]).max()
        self.steps = self.steps and not largest and bool(change or not hook_gradients)
        for path, gradient in gradients.items():
            hook_gradient = hook_gradients.get(path, torch.zeros_like(gradient))
            if differ(hook_gradient, gradient, gradient.norm(), self.tolerance, largest):
                return (
                    f"{path}: the gradients at {self.modules[path]} are not those of the weight: they differ by "
                    f"{(hook_gradient - gradient).norm():.3g} of {gradient.norm():.3g} (does forward differentiate?)"
                )
            moved = self.before if path in hook_gradients else self._hooked(self._components([path]), True)[0]
            if differ(moved, self.before, 0 * change, self.tolerance):
                return (
                    f"{path}: no gradient reaches {self.modules[path]}, though the weight moves the output: it is "
                    "detached, run under torch.no_grad, or checkpointed with use_reentrant=True"
                )
        return None

    @torch.no_grad()
    def _among_all(self) -> str | None:
        """Describe how the checked samples are others among the whole batch, with gates by sample; None if not."""
        paths, generator = list(self.network.weights), torch.Generator().manual_seed(0)
        gates = {p: (0.7 + 0.6 * torch.rand(len(self.all), 2, generator=generator)).to(self.before) for p in paths}
        among = self.network(self.all, self._components(paths), gates)[self.chosen]
        few = self.network(self.x, self._components(paths), {p: gate[self.chosen] for p, gate in gates.items()})
        change, error = (few - self.before).norm(), (among - few).norm()
        if not differ(among, few, change, self.tolerance):
            return None
        return (
            f"{', '.join(paths)}: among all {len(self.all)} samples {len(self.x)} get other outputs than by themselves "
            f"when each has gates of its own (off by {error:.3g} of {change:.3g}): they are sorted, packed without "
            "their padding, taken in pieces, or mixed when they are many"
        )

    def _components(self, paths: Sequence[str]) -> Components:
        return Components(*({path: self.parts[path][i] for path in paths} for i in (0, 1)))

    def _hooked(self, components: Components, remainder: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Run all samples at once through the network: outputs [n, ...], gradients [n, d_in, d_out] by path."""
        record: list[Use] = []
        out = self.network(self.x, components, self.gates, remainder, record=record)
        gradients: dict[str, Tensor] = {}
        for use, delta in zip(record, self._back(out, [use.shift for use in record], self.cotangent), strict=True):
            if delta is not None:
                left, right = (t.detach().reshape(len(self.x), -1, t.shape[-1]) for t in (use.rows, delta))
                gradient = right.mT @ left if use.site.transposed else left.mT @ right
                gradients[use.site.path] = gradients.get(use.site.path, 0) + gradient
        return out.detach(), gradients

    def _real(self, components: Components, remainder: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Run sample by sample, with changed weights in place of the target's: the same two results by brute force."""
        try:
            return self._alone(components, remainder, allow_mutation_on_saved_tensors)
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):  # torch.func.grad in the target takes none
                raise
            return self._alone(components, remainder, nullcontext)

    def _alone(
        self, components: Components, remainder: bool, guard: Callable[[], AbstractContextManager[Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        network = self.network
        outs, gradients = [], []
        zeros = [torch.zeros_like(network.weights[path]) for path in components.paths]
        for i in range(len(self.x)):
            matrices: dict[str, Tensor] = {}
            for path in components.paths:
                P = components.A[path] @ components.B[path]
                matrix = torch.einsum("c,cij->ij", self.gates[path][i], P)
                matrix = matrix + network.weights[path] - P.sum(0) if remainder else matrix
                matrices[path] = matrix.detach().requires_grad_()
            # Every user by name: functional_call's gradient tying does not put back a module with two names.
            users = {
                f"{site.name}.{site.parameter}".lstrip("."): site.rule.weight(m.T if site.transposed else m)
                for site in network.sites
                if (m := matrices.get(site.path)) is not None
            }
            with evaluating(network.target), ExitStack() as undo, guard():
                # The row of an embedding's padding has a gradient, which torch leaves out: it is a weight like others.
                for site in network.sites:
                    if hasattr(site.module, "padding_idx"):
                        undo.enter_context(patch.object(site.module, "padding_idx", None))
                out = functional_call(network.target, users, (self.x[i : i + 1],), tie_weights=False)
                out = network.output(out) if network.output is not None else out
                gradient = self._back(out, list(matrices.values()), self.cotangent[i : i + 1])
            outs.append(out.detach())
            gradients.append([zero if g is None else g for g, zero in zip(gradient, zeros, strict=True)])
        return torch.cat(outs), {
            path: torch.stack([g[k] for g in gradients]) for k, path in enumerate(components.paths)
        }

    def _back(self, out: Tensor, leaves: list[Tensor], cotangent: Tensor) -> Sequence[Tensor | None]:
        """Compute gradients through the target; no decomposed module may be run again during the backward pass.

        Raises:
            ValueError: gradients cannot pass; the message says what stands in the way.
        """
        if not out.requires_grad:
            return [None] * len(leaves)

        def again(*args: Any) -> None:
            raise RuntimeError("a decomposed module is run again during the backward pass")

        try:
            with ExitStack() as undo:
                for site in self.network.sites:
                    undo.enter_context(site.module.register_forward_pre_hook(again))
                return torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
        except RuntimeError as error:
            from .hints import backward

            paths = ", ".join(self.network.weights)
            raise ValueError(
                f"{paths}: gradients cannot pass through the target ({error}); {backward(error)}"
            ) from error
