"""One run of the algorithm: its state, a step, merging and new starts, checkpoints, the result (chapter 6)."""

from __future__ import annotations

import inspect
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import checks
from .attributions import Attribution, gradient
from .batch import Batch
from .checkpoint import identity, read_state, write_state
from .components import Components, confine, normalise_columns
from .config import Config, at_progress
from .data import Batches, checked
from .decomposition import Decomposition, fingerprint
from .kernels.totals import Totals
from .losses import Divergence, faithfulness, minimality, simplicity
from .network import Network
from .selection import Selection, TopK
from .sites import Use, busy
from .store import reading
from .tidy.merge import merge_and_prune, merge_by_bits
from .tidy.reseed import reseed

HELD_OUT_SAMPLES = 8192
TIDY_SAMPLES = 4096


class NonFiniteLoss(ArithmeticError):
    """A loss became NaN or infinite. Its `result` is the last good state, marked unfinished."""

    def __init__(self, message: str, result: Decomposition) -> None:
        super().__init__(message)
        self.result = result


class Run:
    """The state of a run: components, optimiser, generator, history.

    Args:
        network: the target with the weights that are decomposed.
        batches: batches(step, generator) gives the inputs of a step.
        config: the settings.
        divergence: (outputs, wanted) -> [..., B].
        attribution: None for gradients.
        micro_batch: samples worked on at a time; None for all.
        selection: who is active; None for the top k of the settings.
    """

    def __init__(
        self,
        network: Network,
        batches: Batches,
        config: Config,
        divergence: Divergence,
        attribution: Attribution | None,
        micro_batch: int | None = None,
        selection: Selection | None = None,
    ) -> None:
        self.micro_batch = micro_batch
        self.network, self.batches, self.config, self.divergence = network, batches, config, divergence
        self.attribution = attribution or self._gradient
        self.selection = selection or TopK(config.top_k, config.per_sample)
        self.identity = identity(config, network, divergence, attribution, selection)
        self.generator = torch.Generator().manual_seed(config.seed)
        weight = next(iter(network.weights.values()))
        self.device = weight.device.type
        components = Components.random(
            network.shapes,
            config.n_components,
            config.rank,
            config.restarts,
            config.init_std,
            self.generator,
            weight.device,
        )
        if config.per_weight is not None:
            confine(components, config.per_weight)
        self.components = components.map(lambda t: t.to(weight.dtype).requires_grad_())
        self.selection.start(config.restarts, config.n_components, self.components.parameters()[0].detach())
        # The fused kernel updates all factors in one call, so that Ctrl-C cannot fall in between.
        self.optimiser = torch.optim.Adam(self.parameters(), lr=config.lr, fused=True)
        self.step = 0
        self.history: dict[str, list[Any]] = {"step": []}
        self.good = self.components.map(lambda t: t.detach().clone())
        self.good_selection = [p.detach().clone() for p in self.selection.parameters()]

    def parameters(self) -> list[Tensor]:
        """What is trained: the factors, and what the selection has of its own."""
        return [*self.components.parameters(), *self.selection.parameters()]

    def _gradient(self, network: Network, components: Components, x: Tensor) -> Tensor:
        # Without its checks: where a run diverges, its losses say so, on all processes at once.
        return inspect.unwrap(gradient)(
            network, components, x, at=self.config.attribute_at, per_position=self.config.per_position
        )

    def drawn(self, step: int, generator: torch.Generator) -> Tensor:
        """The inputs of one step, checked."""
        x = checked(self.batches(step, generator), step)
        self.batch_size = len(x)  # what is done besides the steps takes as many samples at a time
        return x.to(self.components.parameters()[0].device)

    def inputs(self, step: int, generator: torch.Generator) -> Tensor:
        """Of one step's inputs, those that this process works on: all."""
        return self.drawn(step, generator)

    def many_inputs(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """At least so many inputs, from as many batches as it takes: those of the steps that were done, in turn.

        A source that draws from the generator gives others than it gave in these steps.
        """
        batches = [self.drawn(0, generator)]
        while sum(map(len, batches)) < n_samples:
            batches.append(self.drawn(len(batches) % max(1, self.step), generator))
        return torch.cat(batches)

    def gates(self, x: Tensor, components: Components | None = None, share: float = 1.0) -> Tensor:
        """Which components are active: [R, B, (positions,) C]. x is the given share of the batch that k is for."""
        with torch.no_grad():
            scores = self.attributions(x, self.components if components is None else components)
        gates = self.selection.choose(scores, self.step / self.config.steps, share)
        if gates.shape != scores.shape:
            raise ValueError(
                f"{type(self.selection).__name__}.choose must give gates of the scores' shape {list(scores.shape)}, "
                f"got {list(gates.shape)}"
            )
        return gates

    def mask(self, x: Tensor, components: Components) -> Tensor:
        """Which components are active at all: zeros and ones."""
        return (self.gates(x, components) > 0).to(components.parameters()[0].dtype)

    def attributions(self, x: Tensor, components: Components) -> Tensor:
        """By which the components are chosen: [R, B, (positions,) C]."""
        found = []
        for part in x.split(self.micro_batch or len(x)):
            scores = self.attribution(self.network, components.map(Tensor.detach), part)
            expected = [self.config.restarts, len(part), components.n_components]
            if not isinstance(scores, Tensor) or [*scores.shape[:2], scores.shape[-1]] != expected:
                shape = list(scores.shape) if isinstance(scores, Tensor) else checks.given(scores)
                raise ValueError(f"attributions must be {expected}, got {shape}")
            found.append(scores)
        # Under autocast some ways to attributions give bfloat16 and others do not.
        return torch.cat(found, dim=1).to(components.parameters()[0].dtype)

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Uniform numbers for the gates of the stochastic pass."""
        return torch.rand(shape, generator=self.generator).to(self.components.parameters()[0].detach())

    def kept(self, busy: Tensor) -> Tensor:
        """Which of the busy samples [B] are worked on: indices, of all of them."""
        return busy.nonzero().flatten()

    def prepared(self, x: Tensor, scrubs: bool) -> Batch:
        """What the target does with the inputs, and who is to be active on them."""
        uses: list[Use] = []
        hidden: list[Tensor] = []
        with torch.no_grad():
            wanted = self.network(x, record=uses, activations=hidden)
        # What has nothing to say to any component adds nothing to the losses but to their denominators.
        kept, share = self.kept(busy(uses, len(x))), 1.0
        if 0 < len(kept) < len(x):
            wanted, hidden = wanted[kept], [h[kept] for h in hidden]
            x, share = x[kept], len(kept) / len(x)
        gates = self.gates(x, share=share)
        return Batch(x, wanted, hidden, gates, self.noise(gates.shape) if scrubs else None, share)

    def sparse_losses(self, batch: Batch, weight: dict[str, float]) -> dict[str, Tensor]:
        """The losses of the sparse forward passes, each [R]."""
        hidden: list[Tensor] = []
        outputs = self.network(batch.x, self.components, batch.gates, activations=hidden)
        terms = {"minimality": minimality(outputs, batch.wanted, self.divergence)}
        if weight["hidden"]:
            pairs = zip(hidden, batch.hidden, strict=True)
            terms["hidden"] = torch.stack([minimality(sparse, full) for sparse, full in pairs]).sum(0)
        if batch.noise is not None:
            outputs = self.network(batch.x, self.components, self.selection.draw(batch.gates, batch.noise))
            terms["scrub"] = minimality(outputs, batch.wanted, self.divergence)
        return {name: batch.share * value for name, value in terms.items()}

    def advance(self) -> dict[str, list[float]]:
        """One step; gives the losses of each restart."""
        config, t = self.config, self.step / self.config.steps
        weight = {name: at_progress(getattr(config, name), t) for name in config.schedules}
        totals = self.totals()
        batch = self.prepared(self.inputs(self.step, self.generator), bool(weight["scrub"]))
        chosen = batch.gates
        # Soft gates are leaves of the losses, since these come in pieces; the way back goes on from there once.
        soft = [chosen.detach().requires_grad_()] if chosen.requires_grad else []
        batch = replace(batch, gates=soft[0]) if soft else batch
        terms = {"faithfulness": faithfulness(totals, self.network.weights)}
        if weight["simplicity"]:
            terms["simplicity"] = batch.share * simplicity(totals, batch.gates, config.p)
        found = {name: value.detach() for name, value in terms.items()}
        self.optimiser.zero_grad()
        pieces = batch.pieces(self.micro_batch)
        for i, piece in enumerate(pieces):
            sparse = self.sparse_losses(piece, weight)
            for name, value in sparse.items():
                found[name] = found.get(name, 0) + value.detach()
            # What the factors say through their sums and lengths comes but once, with the last piece.
            last = i == len(pieces) - 1
            parts = sparse | terms if last else sparse
            loss = torch.stack([weight[name] * value.sum() for name, value in parts.items()]).sum()
            if last:
                totals.backward(loss, soft)
            else:
                torch.autograd.backward(loss, inputs=[*self.components.parameters(), *soft])
        if soft:
            torch.autograd.backward(chosen, soft[0].grad, inputs=self.selection.parameters())
        values = self.checked(found)
        self.optimiser.param_groups[0]["lr"] = config.lr_at(t)
        self.optimiser.step()
        torch.clear_autocast_cache()  # else the network would go on with rounded copies of the old factors
        if config.unit_norm:
            normalise_columns(self.components)
        self.step += 1
        if config.tidies(self.step):
            with torch.autocast(self.device, enabled=False):
                self.tidy()
        return values

    def totals(self) -> Totals:
        """What the losses see of the factors."""
        return Totals(self.components)

    def checked(self, found: dict[str, Tensor]) -> dict[str, list[float]]:
        """The step's losses, each [R], as numbers in the order of the settings; they must be finite. Logs them."""
        config = self.config
        values = {name: found[name].tolist() for name in config.schedules if name in found}
        for name, per_restart in values.items():
            if not all(map(math.isfinite, per_restart)):
                raise NonFiniteLoss(
                    f"step {self.step}: the {name} loss is {per_restart}; the last good state is in .result",
                    self.so_far(self.good),
                )
        if config.logs(self.step):
            self.history["step"].append(self.step)
            for name in config.schedules:
                if name in values or name in self.history:
                    none = [None] * config.restarts  # for steps at which this loss is not in force
                    rows = self.history.setdefault(name, [none] * (len(self.history["step"]) - 1))
                    rows.append(values.get(name, none))
            self.good = self.components.map(lambda p: p.detach().clone())
            self.good_selection = [p.detach().clone() for p in self.selection.parameters()]
        return values

    @torch.no_grad()
    def tidied(self, components: Components) -> Tensor:
        """Merge what points the same way, prune what is not used, start what is free anew, in place: changed [R, C]."""
        x = self.many_inputs(TIDY_SAMPLES, self.generator)
        mask, alpha = self.mask(x, components), self.config.alpha
        if alpha is None:
            changed = merge_and_prune(components, mask, self.config.min_cosine)
        else:
            changed = merge_by_bits(components, mask, alpha)
        if self.step < self.config.reseed_until * self.config.steps:
            size = self.micro_batch or self.batch_size
            changed |= reseed(self.network, components, self.mask(x, components), x, self.divergence, size=size)
        return changed

    def tidy(self) -> None:
        """Tidy a copy, so that Ctrl-C does not fall in between, and put it in place."""
        tidy = self.whole(self.components)
        changed = self.tidied(tidy)
        self.replace(tidy, changed)

    @torch.no_grad()
    def replace(self, components: Components, changed: Tensor) -> None:
        """Put in place what became of the components; the optimiser forgets those that changed [R, C]."""
        for p, new in zip(self.components.parameters(), components.parameters(), strict=True):
            p.copy_(new)
        for p in self.parameters():
            state = self.optimiser.state[p]
            state["exp_avg"][changed] = 0
            state["exp_avg_sq"][changed] = self.mean(state["exp_avg_sq"])
        self.selection.forget(changed)

    def mean(self, moments: Tensor) -> Tensor:
        """Over all components of a factor."""
        return moments.mean()

    def whole(self, components: Components) -> Components:
        """A copy of all components; `parallel` has them on several processes."""
        return components.map(lambda p: p.detach().clone())

    @torch.no_grad()
    def scores(self, components: Components) -> tuple[Tensor, Tensor | None]:
        """The sparse reconstruction error of each restart on held-out inputs, and its threshold: [R] each."""
        x = self.many_inputs(HELD_OUT_SAMPLES, torch.Generator().manual_seed(self.config.seed + 1_000_003))
        with torch.autocast(self.device, enabled=False):
            return self.errors(x, components), self.selection.threshold(self.attributions(x, components))

    def errors(self, x: Tensor, components: Components) -> Tensor:
        """The mean error of the sparse outputs: [R]."""
        mask, size = self.gates(x, components), self.micro_batch or self.batch_size
        sums = [
            minimality(self.network(part, components, gates), self.network(part), self.divergence) * len(part)
            for part, gates in zip(x.split(size), mask.split(size, dim=1), strict=True)
        ]
        return torch.stack(sums).sum(0) / len(x)

    def result(self, components: Components | None = None, scores: Tensor | None = None) -> Decomposition:
        """Choose among the restarts by their scores, those of an earlier state if one is given."""
        everything = self.whole(components or self.components)
        done = components is None and scores is None
        finite, threshold = all(bool(p.isfinite().all()) for p in everything.parameters()), None
        if scores is None and finite:
            scores, threshold = self.scores(components or self.components)
        elif scores is None:
            scores = torch.full((self.config.restarts,), torch.nan)
        if done and not (finite and scores.isfinite().all()):
            raise NonFiniteLoss(
                f"step {self.step}: the components or their scores {scores.tolist()} are NaN or infinite; the last "
                "good state is in .result",
                self.so_far(self.good),
            )
        chosen = int(scores.nan_to_num(torch.inf).argmin())
        return Decomposition(
            components=everything.restart(chosen),
            config=self.config,
            history=self.history,
            scores=scores.tolist(),
            chosen=chosen,
            finished=components is None and self.step == self.config.steps,
            fingerprint=fingerprint(self.network.target.state_dict()),
            restarts=everything,
            threshold=None if threshold is None else float(threshold[chosen]),
            selection=self.selection,
            attribution=self.identity["attribution"],
        )

    def so_far(self, components: Components | None = None) -> Decomposition:
        """The result in any case: of the last good state, and with NaN for scores where scoring fails too."""
        finite = all(bool(torch.isfinite(p).all()) for p in self.parameters())
        if components is self.good or not finite:
            for p, good in zip(self.selection.parameters(), self.good_selection, strict=True):
                p.data.copy_(good)
        if components is None and not finite:
            components = self.good
        try:
            return self.result(components)
        except (Exception, KeyboardInterrupt) as error:
            message = f"the restarts could not be compared, so that the first was chosen: {error!r}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            return self.result(components, torch.full((self.config.restarts,), torch.nan))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint."""
        write_state(path, self.identity, self.step, self.history, self.generator, self.parameters(), self.moments())

    def moments(self) -> list[dict[str, Tensor]]:
        """What the optimiser knows about each of the parameters."""
        return [dict(self.optimiser.state[p]) for p in self.parameters()]

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Take up the state of a checkpoint."""
        state = read_state(path, self.identity)
        self.step, self.history = state.step, state.history
        with reading(path, "checkpoint"):
            self.generator.set_state(state.generator)
            for p, factor, moments in zip(self.parameters(), state.factors, state.moments, strict=True):
                p.data.copy_(checks.tensor("a factor", self.own(factor), *p.shape))
                self.optimiser.state[p] = {name: self.own(t).to(p.device) for name, t in moments.items()}
        self.good = self.components.map(lambda t: t.detach().clone())
        self.good_selection = [p.detach().clone() for p in self.selection.parameters()]

    def own(self, factor: Tensor) -> Tensor:
        """Of something about all components [R, C, ...], what is about those of this process."""
        return factor
