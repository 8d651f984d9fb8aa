"""A run of the algorithm: its state, and one step (chapter 6)."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import checks
from .attributions.gradients import Attribution, gradient
from .batch import Batch, Batches
from .components import Components, confine, normalise_columns
from .config import Config, at_progress
from .decomposition import Decomposition
from .local import Local
from .losses import Divergence, faithfulness, hidden, minimality, simplicity
from .network import Network
from .selection import Selection, TopK
from .sites import Use, busy


class Run:
    """The state of a run: components, optimiser, generator, history.

    Args:
        network: the target with the weights that are decomposed.
        batches: batches(step, generator) gives the inputs of a step.
        config: the settings.
        divergence: (outputs, target outputs) -> [..., B].
        attribution: None for gradients.
        micro_batch: samples worked on at a time; None for all.
        selection: who is active; None for the top k of the settings.
        local: what of the run is on this process; None for everything.
    """

    judge: Any = None
    """By which its restarts are compared (`outcome.Judge`); None for the held-out error."""

    def __init__(
        self,
        network: Network,
        batches: Batches,
        config: Config,
        divergence: Divergence,
        attribution: Attribution | None,
        micro_batch: int | None = None,
        selection: Selection | None = None,
        local: Local | None = None,
    ) -> None:
        self.batches, self.config, self.divergence, self.micro_batch = batches, config, divergence, micro_batch
        self.given = attribution, selection
        self.attribution = attribution or self._gradient
        self.selection = selection or TopK(config.top_k, config.per_sample)
        self.chooser = type(self.selection).__name__
        self.local = local or Local()
        self.target = network
        weight = next(iter(network.weights.values()))
        self.device = weight.device
        self.local.begin(self)
        self.network = self.local.network(network)
        self.generator = torch.Generator().manual_seed(config.seed)
        size = config.n_components, config.rank, config.restarts
        components = Components.random(network.shapes, *size, config.init_std, self.generator, weight.device)
        if config.per_weight is not None:
            confine(components, config.per_weight)
        self.components = components.map(lambda t: self.local.own(t.to(weight.dtype)).requires_grad_())
        self.selection.start(config.restarts, config.n_components, self.components.parameters()[0].detach())
        checks.leaves(f"{self.chooser}.parameters", self.selection.parameters())
        # The fused kernel updates all factors in one call, so that Ctrl-C cannot fall in between.
        self.optimiser = torch.optim.Adam(self.parameters(), lr=config.lr, fused=True)
        self.step, self.moved = 0, False  # whether any component has had an attribution other than 0
        self.history: dict[str, list[Any]] = {"step": []}
        self.remember()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the meaning of the run depends on, as JSON has it."""
        from .checkpoint import identity

        return identity(self.config, self.target, self.divergence, *self.given)

    def parameters(self) -> list[Tensor]:
        """List what is trained: the factors, and the selection's own parameters."""
        return [*self.components.parameters(), *self.selection.parameters()]

    def remember(self) -> None:
        """Keep a copy of what is trained, as the last finite state."""
        self.last_finite = self.components.map(lambda p: p.detach().clone())
        self.last_finite_selection = [p.detach().clone() for p in self.selection.tensors()]

    def _gradient(self, network: Network, components: Components, x: Tensor) -> Tensor:
        # Without its checks: where a run diverges, its losses say so, on all processes at once.
        at, each = self.config.attribute_at, self.config.per_position
        return inspect.unwrap(gradient)(network, components, x, at=at, per_position=each, mode=self.local.mode(at))

    def next_batch(self, step: int, generator: torch.Generator) -> Tensor:
        """Ask for the inputs of one step, and check them."""
        x = checks.batch(self.batches(step, generator), step)
        self.batch_size = len(x)  # what is done besides the steps takes as many samples at a time
        return x.to(self.device)

    def many_inputs(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """Collect at least so many inputs, but of 256 batches at most, from those of the steps done so far, in turn.

        A source that draws from the generator gives others than it gave in these steps. The number of batches bounds
        the work, since they are worked on one by one.
        """
        batches = [self.next_batch(0, generator)]
        while len(batches) < 256 and sum(map(len, batches)) < n_samples:
            batches.append(self.next_batch(len(batches) % max(1, self.step), generator))
        return self.local.samples(checks.joined(batches))

    def attributions(self, x: Tensor, components: Components) -> Tensor:
        """Score this process's components on its samples, as many at a time as a step has: [R, B, (positions,) C].

        Raises:
            TypeError, ValueError: attributions of another shape, or that changed their arguments in place.
        """
        scores = []
        for part in x.split(self.micro_batch or self.batch_size):
            lent = [part, *components.parameters()]
            versions = [t._version for t in lent]
            found = self.attribution(self.network, components.map(Tensor.detach), part)
            if versions != [t._version for t in lent]:
                raise ValueError("attribution must leave its components and x as they are: let it work on copies")
            shape = self.config.restarts, len(part), ..., components.n_components
            scores.append(checks.tensor("attributions", found, *shape, finite=False, real=True))
        # Under autocast some ways to attributions give bfloat16 and others do not.
        return torch.cat(scores, dim=1).to(components.parameters()[0].dtype)

    def gates(self, x: Tensor, components: Components, share: float) -> Tensor:
        """Choose the active components: [R, B, (positions,) C]. k is for a batch of which x is the given share.

        Raises:
            TypeError, ValueError: the selection gives no gates of the scores' shape, or some that are not in [0, 1].
        """
        with torch.no_grad():
            scores = self.local.all_scores(self.attributions(x, components))
        self.moved = self.moved or bool(scores.any())
        gates = self.selection.choose(scores, self.step / self.config.steps, share)
        return self.local.own_gates(checks.gates(f"gates of {self.chooser}.choose", gates, *scores.shape), len(x))

    def mask(self, x: Tensor, components: Components) -> Tensor:
        """Say which components are active at all: zeros and ones [R, B, (positions,) C]."""
        return (self.gates(x, components, self.local.count(len(x), len(x))) > 0).to(components.parameters()[0].dtype)

    def prepare(self, x: Tensor, scrubs: bool) -> Batch:
        """Run the target on the inputs, and choose who is to be active on them."""
        uses: list[Use] = []
        activations: list[Tensor] = []
        with torch.no_grad(), checks.running(x, f"its own weights, at step {self.step}"):
            outputs = self.network(x, record=uses, activations=activations)
        n = len(x)
        # Where the input of every decomposed weight is zero, components change nothing: there is nothing to work out.
        active = busy(uses, n).nonzero().flatten()
        share = self.local.count(len(active), n)
        if 0 < len(active) < n:
            x, outputs, activations = x[active], outputs[active], [h[active] for h in activations]
        gates, noise = self.gates(x, self.components, share), None
        if scrubs:
            drawn = torch.rand(self.local.all_gates(gates.shape), generator=self.generator)
            noise = self.local.own_gates(drawn, len(x)).to(self.components.parameters()[0].detach())
        return Batch(x, outputs, activations, gates, noise, len(x) / n * self.local.weight(n))

    def sparse_losses(self, batch: Batch, weight: dict[str, float]) -> dict[str, Tensor]:
        """Work out the losses of the sparse forward passes, each [R]."""
        activations: list[Tensor] = []
        outputs = self.network(batch.x, self.components, batch.gates, activations=activations)
        losses = {"minimality": minimality(outputs, batch.outputs, self.divergence)}
        if weight["hidden"]:
            losses["hidden"] = hidden(activations, batch.hidden)
        if batch.noise is not None:
            drawn = self.selection.draw(batch.gates, batch.noise)
            gates = checks.gates(f"gates of {self.chooser}.draw", drawn, *batch.gates.shape)
            outputs = self.network(batch.x, self.components, gates)
            losses["scrub"] = minimality(outputs, batch.outputs, self.divergence)
        if self.selection.observes:  # what the components are does not matter then: one restart will do
            one, off = self.components.map(lambda p: p.detach()[:1]), torch.zeros_like(batch.gates[:1])
            nothing = minimality(self.network(batch.x, one, off), batch.outputs, self.divergence)
            losses["nothing"] = nothing.expand(self.config.restarts)
        return {name: batch.share * value for name, value in losses.items()}

    def advance(self) -> dict[str, list[float]]:
        """Take one step; gives the losses of each restart."""
        config, t = self.config, self.step / self.config.steps
        weight = {"penalty": 1.0, "nothing": 0.0}
        weight |= {name: at_progress(getattr(config, name), t) for name in config.schedules}
        totals = self.local.totals(self.components)
        x = self.local.samples(self.next_batch(self.step, self.generator))
        batch = self.prepare(x, bool(weight["scrub"]))
        gates = batch.gates
        # Soft gates are leaves of the losses, which come in pieces; from there the gradient goes on once, at the end.
        soft = [gates.detach().requires_grad_()] if gates.requires_grad else []
        batch = replace(batch, gates=soft[0]) if soft else batch
        dense = {"faithfulness": faithfulness(totals, self.network.weights)}
        if weight["simplicity"]:
            dense["simplicity"] = batch.share * simplicity(totals, batch.gates, config.p)
        if (own := self.selection.penalty(batch.gates, t)) is not None:
            loss = checks.tensor(f"{self.chooser}.penalty", own, config.restarts, finite=False, real=True)
            dense["penalty"] = batch.share * loss
        losses = {name: value.detach() for name, value in dense.items()}
        self.optimiser.zero_grad()
        pieces = batch.pieces(self.micro_batch)
        for i, piece in enumerate(pieces):
            sparse = self.sparse_losses(piece, weight)
            for name, value in sparse.items():
                losses[name] = losses.get(name, 0) + value.detach()
            # The losses of the factors themselves are added once, with the last piece.
            last = i == len(pieces) - 1
            terms = sparse | dense if last else sparse
            loss = torch.stack([weight[name] * value.sum() for name, value in terms.items()]).sum()
            if last:
                totals.backward(loss, soft)
            else:
                torch.autograd.backward(loss, inputs=[*self.components.parameters(), *soft])
        if soft:
            torch.autograd.backward(gates, soft[0].grad, inputs=self.selection.parameters())
        self.local.reduce(self.selection.parameters())
        values = self.checked(losses)
        for p in self.selection.parameters():  # Adam counts a step in which the gates are hard, too
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        self.optimiser.param_groups[0]["lr"] = config.lr_at(t)
        self.optimiser.step()
        torch.clear_autocast_cache()  # else the network would go on with rounded copies of the old factors
        if config.unit_norm:
            normalise_columns(self.components)
        self.step += 1
        if not self.moved and self.step == min(100, config.steps):
            from .hints import NO_SLOPE

            warnings.warn(NO_SLOPE.format(self.step), UserWarning, stacklevel=2)
        if config.tidies(self.step):
            from .tidy.tidy import tidy

            with torch.autocast(self.device.type, enabled=False):
                tidy(self)
        return values

    def checked(self, losses: dict[str, Tensor]) -> dict[str, list[float]]:
        """Make numbers of the step's losses [R], in the order of the settings; they must be finite. Log them.

        Raises:
            NonFiniteLoss: one is NaN or infinite.
        """
        losses = self.local.losses(losses)
        config, names = self.config, [*self.config.schedules, "penalty"]
        values = {name: losses[name].tolist() for name in names if name in losses}
        for name, per_restart in values.items():
            if not all(map(math.isfinite, per_restart)):
                raise checks.NonFiniteLoss(
                    f"step {self.step}: the {name} loss is {per_restart}; the last finite state is in .result",
                    self.so_far(self.last_finite),
                )
        if config.logs(self.step):
            self.history["step"].append(self.step)
            for name in names:
                if name in values or name in self.history:
                    none = [None] * config.restarts  # for steps at which this loss is not in force
                    rows = self.history.setdefault(name, [none] * (len(self.history["step"]) - 1))
                    rows.append(values.get(name, none))
            self.remember()
        if self.selection.observes:
            self.selection.observe(losses["minimality"], losses["nothing"], self.step / config.steps)
        return values

    def so_far(self, components: Components | None = None) -> Decomposition:
        """Give the result as it stands, or that of an earlier state."""
        from .outcome import so_far

        return so_far(self, components)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, work on all samples and components, as if there were no other process."""
        shared = self.local, self.network
        self.local, self.network = Local(), self.target
        try:
            yield
        finally:
            self.local, self.network = shared

    def shared(self) -> list[tuple[Tensor, bool]]:
        """List the parameters, each with whether other processes have other parts of it."""
        return [(p, True) for p in self.components.parameters()] + [(p, False) for p in self.selection.parameters()]

    def whole(self, components: Components) -> Components:
        """Copy the components of all processes."""
        return components.map(lambda p: self.local.whole(p.detach()).clone())
