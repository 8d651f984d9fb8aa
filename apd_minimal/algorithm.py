"""The algorithm: `decompose` learns components by gradient descent on APD's losses (chapter 6)."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .attributions import Attribution, gradient
from .checkpoint import identity, read_state, write_state
from .components import Components, confine, normalise_columns
from .config import Config, Schedule, at_progress
from .data import Batches, checked
from .decomposition import Decomposition, fingerprint
from .gates import Network
from .losses import DIVERGENCES, Divergence, faithfulness, minimality, simplicity
from .merge import merge_and_prune
from .reseed import reseed
from .sites import Use, busy
from .topk import batch_top_k, sample_top_k
from .totals import Totals

HELD_OUT_SAMPLES = 8192
TIDY_SAMPLES = 4096


class NonFiniteLoss(ArithmeticError):
    """A loss became NaN or infinite. Its `result` is the last good state, marked unfinished."""

    def __init__(self, message: str, result: Decomposition) -> None:
        super().__init__(message)
        self.result = result


def decompose(
    target: nn.Module,
    batches: Batches,
    weights: Sequence[str],
    n_components: int,
    top_k: Schedule,
    *,
    output: Callable[[Any], Tensor] | None = None,
    divergence: str | Divergence = "mse",
    hidden_modules: Sequence[str] = (),
    attribution: Attribution | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    watch: Callable[[int, Components], None] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Decomposition:
    """Decompose a network's weights into components that sum to them, few and simple on every input.

    Args:
        target: any network with weights of known kinds; it is left exactly as it is.
        batches: batches(step, generator) gives the inputs [B, ...] of a step; all randomness from the generator.
        weights: parameter paths such as "encode.weight".
        n_components: C; more than the mechanisms you expect.
        top_k: mean number of active components per sample; a number, or points (progress, value) of a schedule.
        output: picks the outputs that count, [B, ...], from what the target returns.
        divergence: "mse", "kl" (of softmax over the last axis) or (outputs, wanted) -> [..., B].
        hidden_modules: paths of modules whose outputs the sparse forward pass must match too, weighted by the
            setting `hidden`.
        attribution: (network, components, x) -> [..., B, C]; None takes exact gradient attributions.
        checkpoint: a file from which an interrupted run of the same settings resumes, bit for bit. It knows
            functions by their names alone, and the batches not at all (`checkpoint.identity`); a generator that
            an attribution draws from is not in it.
        checkpoint_every: steps between checkpoints.
        watch: called as watch(step, components) at every logged step.
        progress: show a progress bar with the losses.
        **settings: any field of `Config`.

    Under torch.autocast the networks and attributions run in the lower precision; the sum of the components, the
    losses, merging and the choice among restarts stay in the precision of the weights.

    Returns:
        Decomposition: the restart with the smallest held-out sparse reconstruction error. After Ctrl-C, the
        state so far, marked unfinished.

    Raises:
        KeyError, TypeError, ValueError: input that does not fit; the message names what was given and expected.
        NonFiniteLoss: a loss became NaN or infinite.
        StoreError: the checkpoint is damaged, or belongs to another run; the message says what differs.
        Exception: whatever a function given here raises. After the first step, it carries the state so far as its
            attribute `result`; if the restarts cannot be scored then, there is a warning, and the scores are NaN.
    """
    config = Config.from_dict({"n_components": n_components, "top_k": top_k, **settings})
    config.check()
    if isinstance(divergence, str) and divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {list(DIVERGENCES)} or a function, got {divergence!r}")
    if bool(hidden_modules) != bool(config.hidden):
        raise ValueError(
            f"hidden_modules and the weight hidden belong together, got {list(hidden_modules)} and {config.hidden}"
        )
    run = _Run(
        Network(target, weights, output, hidden_modules),
        batches,
        config,
        DIVERGENCES[divergence] if isinstance(divergence, str) else divergence,
        attribution,
    )
    run.network.check(run.inputs(0, torch.Generator().manual_seed(config.seed)))
    if checkpoint is not None and Path(checkpoint).exists():
        run.resume(checkpoint)
    try:
        with tqdm(total=config.steps, initial=run.step, disable=not progress, unit="step") as bar:
            while run.step < config.steps:
                losses = run.advance()
                bar.update()
                if run.config.logs(run.step - 1):
                    bar.set_postfix({name: f"{min(values):.1e}" for name, values in losses.items()})
                    if watch is not None:
                        watch(run.step - 1, run.components.map(Tensor.detach))
                if checkpoint is not None and (run.step % checkpoint_every == 0 or run.step == config.steps):
                    run.save(checkpoint)
        return run.result()
    except KeyboardInterrupt:
        return run.so_far()
    except NonFiniteLoss:
        raise
    except Exception as error:
        if run.step:  # before the first step there is nothing to lose
            error.result = run.so_far()  # type: ignore[attr-defined]
            if hasattr(error, "add_note"):  # from Python 3.11
                error.add_note(f"decompose: the result after {run.step} steps is in this exception's .result")
        raise


class _Run:
    """The state of a run: components, optimiser, generator, history."""

    def __init__(
        self,
        network: Network,
        batches: Batches,
        config: Config,
        divergence: Divergence,
        attribution: Attribution | None,
    ) -> None:
        self.network, self.batches, self.config, self.divergence = network, batches, config, divergence
        self.attribution = attribution or self._gradient
        self.identity = identity(config, network, divergence, attribution)
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
        # The fused kernel updates all factors in one call, so that Ctrl-C cannot fall in between.
        self.optimiser = torch.optim.Adam(self.components.parameters(), lr=config.lr, fused=True)
        self.step = 0
        self.history: dict[str, list[Any]] = {"step": []}
        self.good = self.components.map(lambda t: t.detach().clone())

    def _gradient(self, network: Network, components: Components, x: Tensor) -> Tensor:
        return gradient(network, components, x, at=self.config.attribute_at, per_position=self.config.per_position)

    def inputs(self, step: int, generator: torch.Generator) -> Tensor:
        """The inputs of one step, checked."""
        x = checked(self.batches(step, generator), step)
        return x.to(self.components.parameters()[0].device)

    def many_inputs(self, n_samples: int, generator: torch.Generator) -> Tensor:
        """At least so many inputs, from as many batches as it takes."""
        batches = [self.inputs(self.step, generator)]
        while sum(map(len, batches)) < n_samples:
            batches.append(self.inputs(self.step, generator))
        return torch.cat(batches)

    def mask(self, x: Tensor, components: Components | None = None, share: float = 1.0) -> Tensor:
        """Which components are active: [R, B, (positions,) C]. x is the given share of the batch that k is for."""
        components = components or self.components
        scores = self.attribution(self.network, components.map(Tensor.detach), x)
        config = self.config
        top_k = at_progress(config.top_k, self.step / config.steps)
        expected = [config.restarts, len(x), config.n_components]
        if [*scores.shape[:2], scores.shape[-1]] != expected:
            raise ValueError(f"attributions must be {expected}, got {list(scores.shape)}")
        if config.per_sample:
            return sample_top_k(scores, top_k)
        return batch_top_k(scores.flatten(1, -2), min(top_k / share, config.n_components)).reshape(scores.shape)

    def losses(self, x: Tensor, t: float, totals: Totals) -> dict[str, tuple[float, Tensor]]:
        """Each loss that is in force at progress t, with its weight: name -> (weight, [R])."""
        config = self.config
        weight = {name: at_progress(getattr(config, name), t) for name in config.schedules}
        wanted_hidden: list[Tensor] = []
        sparse_hidden: list[Tensor] = []
        with torch.no_grad():
            uses: list[Use] = []
            wanted = self.network(x, record=uses, activations=wanted_hidden)
            # What has nothing to say to any component adds nothing to the losses but to their denominators.
            kept, share = busy(uses, len(x)).nonzero().flatten(), 1.0
            if 0 < len(kept) < len(x):
                wanted, wanted_hidden = wanted[kept], [h[kept] for h in wanted_hidden]
                x, share = x[kept], len(kept) / len(x)
            mask = self.mask(x, share=share)
        outputs = self.network(x, self.components, mask.bool(), activations=sparse_hidden)
        terms = {"minimality": minimality(outputs, wanted, self.divergence)}
        if weight["simplicity"]:
            terms["simplicity"] = simplicity(totals, mask, config.p)
        if weight["hidden"]:
            pairs = zip(sparse_hidden, wanted_hidden, strict=True)
            terms["hidden"] = torch.stack([minimality(sparse, full) for sparse, full in pairs]).sum(0)
        if weight["scrub"]:
            coin = torch.rand(mask.shape, generator=self.generator).to(mask) < 0.5
            scrubbed = self.network(x, self.components, torch.maximum(mask, coin.to(mask)))
            terms["scrub"] = minimality(scrubbed, wanted, self.divergence)
        terms = {name: share * value for name, value in terms.items()}
        terms["faithfulness"] = faithfulness(totals, self.network.weights)
        return {name: (weight[name], terms[name]) for name in config.schedules if name in terms}

    def advance(self) -> dict[str, list[float]]:
        """One step; gives the losses of each restart."""
        config, t = self.config, self.step / self.config.steps
        totals = Totals(self.components)
        losses = self.losses(self.inputs(self.step, self.generator), t, totals)
        values = {name: value.detach().tolist() for name, (_, value) in losses.items()}
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
        total = torch.stack([weight * value.sum() for weight, value in losses.values()]).sum()
        totals.backward(total)
        self.optimiser.param_groups[0]["lr"] = config.lr_at(t)
        self.optimiser.step()
        torch.clear_autocast_cache()  # else the network would go on with rounded copies of the old factors
        if config.unit_norm:
            normalise_columns(self.components)
        self.step += 1
        if config.tidies(self.step):
            with torch.autocast(self.device, enabled=False):
                self._tidy()
        return values

    @torch.no_grad()
    def _tidy(self) -> None:
        """Merge what points the same way, prune what is not used, and start what is free anew."""
        x = self.many_inputs(TIDY_SAMPLES, self.generator)
        # Worked out on a copy, so that Ctrl-C does not fall in between.
        tidy = self.components.map(lambda p: p.detach().clone())
        changed = merge_and_prune(tidy, self.mask(x), self.config.min_cosine)
        if self.step < self.config.reseed_until * self.config.steps:
            changed |= reseed(self.network, tidy, self.mask(x, tidy), x, self.divergence)
        for p, new in zip(self.components.parameters(), tidy.parameters(), strict=True):
            p.copy_(new)
            state = self.optimiser.state[p]
            state["exp_avg"][changed] = 0
            state["exp_avg_sq"][changed] = state["exp_avg_sq"].mean()

    @torch.no_grad()
    def scores(self, components: Components) -> Tensor:
        """The sparse reconstruction error of each restart on held-out inputs: [R]."""
        x = self.many_inputs(HELD_OUT_SAMPLES, torch.Generator().manual_seed(self.config.seed + 1_000_003))
        with torch.autocast(self.device, enabled=False):
            outputs = self.network(x, components, self.mask(x, components).bool())
            return minimality(outputs, self.network(x), self.divergence)

    def result(self, components: Components | None = None, scores: Tensor | None = None) -> Decomposition:
        """Choose among the restarts by their scores, those of an earlier state if one is given."""
        everything = (components or self.components).map(lambda t: t.detach().clone())
        scores = self.scores(everything) if scores is None else scores
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
        )

    def so_far(self, components: Components | None = None) -> Decomposition:
        """The result in any case: of the last good state, and with NaN for scores where scoring fails too."""
        if components is None and not all(bool(torch.isfinite(p).all()) for p in self.components.parameters()):
            components = self.good
        try:
            return self.result(components)
        except (Exception, KeyboardInterrupt) as error:
            message = f"the restarts could not be compared, so that the first was chosen: {error!r}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
            return self.result(components, torch.full((self.config.restarts,), torch.nan))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint."""
        factors = self.components.parameters()
        write_state(path, self.identity, self.step, self.history, self.generator, factors, self.optimiser)

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Take up the state of a checkpoint."""
        factors = self.components.parameters()
        self.step, self.history = read_state(path, self.identity, self.generator, factors, self.optimiser)
        self.good = self.components.map(lambda t: t.detach().clone())
