"""Sparse dictionaries of activations: SAE, transcoder and crosscoder in one class, with one training loop (chapter 30).

What a network holds at some places is written as a sum of few directions, each with a code that is 0 or above:

    codes = activation(s_in x E + b)  [B, F],      reconstruction = (codes D + c) / s_out  [B, d_out].

Read and written at the same places it is a sparse autoencoder (cunningham2023), over several at once a crosscoder
(lindsey2024); written elsewhere than read, a transcoder (dunefsky2024), which can have a skip path (paulo2025). The
activation is a ReLU with an L1 penalty, the k largest codes of each sample (gao2024), or the k largest for each sample
on average over a batch (bussmann2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from ..batch import Batches
from ..network import evaluating

KINDS = ("relu", "topk", "batch_topk")
AT_ONCE = 16  # steps whose activations are recorded in one pass


class Dictionary(nn.Module):
    """F features, each an encoder column [d_in] that gives a code, and a decoder row [d_out] that the code scales.

    Args:
        reads: sizes of the places that are read, d_in in all.
        writes: sizes of the places that are written, d_out in all.
        n_features: F.
        kind: "relu", "topk" or "batch_topk".
        sparsity: the weight of the L1 penalty for "relu", else k, codes other than 0 for each sample; whole for "topk".
        centred: subtract the output bias from the inputs first, as a sparse autoencoder does; needs reads = writes.
        skip: add a linear path from inputs to outputs.
        seed: of the first weights.

    Attributes:
        encoder: [d_in, F]; `encoder_bias` [F].
        decoder: [F, d_out], unit rows after training; `decoder_bias` [d_out].
        skip: [d_in, d_out], or None.
        scale_in: s_in [d_in]; `scale_out` is s_out [d_out]: in these units, places are of mean squared length 1.
        threshold: that codes of "batch_topk" must pass outside training, where no batch is at hand.

    Raises:
        TypeError, ValueError: sizes, kind or sparsity out of range.
    """

    encoder: nn.Parameter
    decoder: nn.Parameter
    scale_in: Tensor
    scale_out: Tensor
    threshold: Tensor

    def __init__(
        self,
        reads: Sequence[int],
        writes: Sequence[int],
        n_features: int,
        kind: str = "relu",
        sparsity: float = 0.1,
        *,
        centred: bool = False,
        skip: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.reads, self.writes = _sizes("reads", reads), _sizes("writes", writes)
        F = checks.number("n_features", n_features, 1, whole=True)
        self.kind, self.centred = checks.choice("kind", kind, KINDS), checks.flag("centred", centred)
        self.sparsity = (
            checks.number("sparsity", sparsity, 0)
            if kind == "relu"
            else checks.number("sparsity", sparsity, 0, F, above=True, whole=kind == "topk")
        )
        d_in, d_out = sum(self.reads), sum(self.writes)
        if centred and self.reads != self.writes:
            raise ValueError(f"centred needs the same places read and written, got sizes {reads} and {writes}")
        generator = torch.Generator().manual_seed(checks.number("seed", seed, 0, 2**62, whole=True))
        D = _unit(torch.randn(F, d_out, generator=generator))
        E = D.T.clone() if centred else _unit(torch.randn(F, d_in, generator=generator)).T.contiguous()
        self.encoder, self.decoder = nn.Parameter(E), nn.Parameter(D)
        self.encoder_bias, self.decoder_bias = nn.Parameter(torch.zeros(F)), nn.Parameter(torch.zeros(d_out))
        self.skip = nn.Parameter(torch.zeros(d_in, d_out)) if checks.flag("skip", skip) else None
        self.register_buffer("scale_in", torch.ones(d_in))
        self.register_buffer("scale_out", torch.ones(d_out))
        self.register_buffer("threshold", torch.zeros(()))

    @property
    def n_features(self) -> int:
        """F."""
        return len(self.decoder)

    def encode(self, x: Tensor) -> Tensor:
        """Compute the codes of inputs [B, d_in]: [B, F], 0 or above.

        In training, the codes of "batch_topk" are the largest of the batch; else they are those above the threshold.

        Args:
            x: what stands at the places that are read, side by side.
        """
        x = checks.tensor("x", x, "B", len(self.encoder), like=self.encoder) * self.scale_in
        codes = torch.relu((x - self.decoder_bias if self.centred else x) @ self.encoder + self.encoder_bias)
        if self.kind == "topk":
            kept = codes.topk(self.sparsity).indices
            return torch.zeros_like(codes).scatter(1, kept, codes.gather(1, kept))
        if self.kind == "batch_topk" and self.training:
            kept = codes.flatten().topk(int(self.sparsity * len(codes))).indices
            return torch.zeros_like(codes).flatten().scatter(0, kept, codes.flatten()[kept]).view_as(codes)
        return codes * (codes > self.threshold) if self.kind == "batch_topk" else codes

    def decode(self, codes: Tensor, x: Tensor) -> Tensor:
        """Compute the outputs [B, d_out] of codes [B, F].

        Args:
            codes: of the features.
            x: inputs [B, d_in], for the skip path; not used where there is none.
        """
        checks.tensor("codes", codes, "B", self.n_features, like=self.decoder)
        checks.tensor("x", x, len(codes), len(self.encoder), like=self.encoder)
        out = codes @ self.decoder + self.decoder_bias
        return (out if self.skip is None else out + (x * self.scale_in) @ self.skip) / self.scale_out

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruct what is written, [B, d_out].

        Args:
            x: inputs [B, d_in].
        """
        return self.decode(self.encode(x), x)

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the mean squared length of the error, the mean L1 penalty, which counts for "relu" alone, and codes.

        A code counts with the length of its decoder row, place by place: in a crosscoder, features that stand at one
        place are favoured (lindsey2024).

        Args:
            x: inputs [B, d_in].
            y: outputs [B, d_out].

        Returns:
            tuple: two scalars, in units of the scaled places, and the codes [B, F].
        """
        codes = self.encode(x)
        checks.tensor("y", y, len(x), self.decoder.shape[1], like=self.decoder)
        error = ((self.decode(codes, x) - y) * self.scale_out).square().sum(1).mean()
        lengths = torch.stack([part.norm(dim=1) for part in self.decoder.split(self.writes, dim=1)]).sum(0)
        weight = self.sparsity if self.kind == "relu" else 0.0
        return error, weight * (codes * lengths).sum(1).mean(), codes

    @torch.no_grad()
    def normalise(self) -> None:
        """Scale every decoder row to unit length, in place."""
        self.decoder.copy_(_unit(self.decoder))

    def directions(self, side: str = "write") -> Tensor:
        """Give the features' directions: [F, d_out] of the decoder ("write"), or [F, d_in] of the encoder ("read").

        Args:
            side: "write" or "read".
        """
        if checks.choice("side", side, ("write", "read")) == "write":
            return _unit(self.decoder.detach() / self.scale_out)
        return _unit(self.encoder.detach().T * self.scale_in)


def _sizes(name: str, sizes: Any) -> list[int]:
    if not len(checks.kind(name, sizes, (list, tuple), "a list of sizes")):
        raise ValueError(f"{name} must have at least one size, got none")
    return [checks.number(name, size, 1, whole=True) for size in sizes]


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


Places = str | Sequence[str]


def _places(target: nn.Module, name: str, places: Any) -> list[tuple[bool, nn.Module]]:
    """Find the modules of places such as "input of read.0": (is it the input, module)."""
    checks.kind("target", target, nn.Module, "a torch.nn.Module")
    given = [places] if isinstance(places, str) else places
    modules = dict(target.named_modules(remove_duplicate=False))
    found = []
    for place in given if isinstance(given, (list, tuple)) else [given]:
        side, of, path = place.partition(" of ") if isinstance(place, str) else ("", "", "")
        if side not in ("input", "output") or not of or path not in modules:
            raise ValueError(f"{name} must be such as 'output of encode', with a module of the target, got {place!r}")
        found.append((side == "input", modules[path]))
    if not found:
        raise ValueError(f"{name} must have at least one place, got none")
    return found


Edit = Callable[[int, Tensor], Tensor]  # (number of the place, what stands there) -> what stands there from now on


@contextmanager
def _hooked(places: list[tuple[bool, nn.Module]], edit: Edit) -> Iterator[None]:
    """Hand what stands at the places to `edit`, in evaluation."""

    def before(number: int) -> Callable[..., Any]:
        return lambda module, args: (edit(number, args[0]), *args[1:])

    def after(number: int) -> Callable[..., Any]:
        return lambda module, args, out: edit(number, out)

    with ExitStack() as undo:
        for number, (is_input, module) in enumerate(places):
            hook = module.register_forward_pre_hook if is_input else module.register_forward_hook
            undo.callback(hook((before if is_input else after)(number)).remove)
        yield


@torch.no_grad()
def activations(target: nn.Module, x: Tensor, places: Places) -> list[Tensor]:
    """Record what stands at places of a network: for each, [B, d], with positions as further samples.

    Args:
        target: any network.
        x: inputs [B, ...].
        places: "input of PATH" or "output of PATH" with a module's path, or a list of such.

    Returns:
        list[Tensor]: one for each place.

    Raises:
        ValueError: no such place, or one that is never reached, or reached twice.
    """
    found, seen = _places(target, "places", places), dict[int, Tensor]()

    def keep(number: int, value: Tensor) -> Tensor:
        if number in seen:
            raise ValueError(f"place {number} of {places!r} is reached twice: what stands there is not one tensor")
        seen[number] = value.detach().flatten(0, -2).clone()
        return value

    checks.inputs(x)
    with _hooked(found, keep), evaluating(target), checks.running(x, "its own weights"):
        target(x)
    if len(seen) < len(found):
        raise ValueError(f"of {places!r}, the places {sorted(set(range(len(found))) - set(seen))} are never reached")
    return [seen[number] for number in range(len(found))]


@torch.no_grad()
def replaced(target: nn.Module, x: Tensor, places: Places, values: Sequence[Tensor]) -> Tensor:
    """Run a network with other values at some places.

    Args:
        target: any network.
        x: inputs [B, ...].
        places: as for `activations`.
        values: what shall stand there, [B, d] for each.

    Returns:
        Tensor: the target's outputs.

    Raises:
        TypeError, ValueError: no such place, or values that are not one tensor of its shape for each.
    """
    found, x = _places(target, "places", places), checks.inputs(x)
    checks.kind("values", values, (list, tuple), "a list of tensors")
    if len(values) != len(found):
        raise ValueError(f"values must be one for each place of {places!r}, got {checks.given(values)}")

    def other(number: int, value: Tensor) -> Tensor:
        return checks.tensor("values", values[number], value.shape[:-1].numel(), value.shape[-1]).view_as(value)

    with _hooked(found, other), evaluating(target), checks.running(x, "its own weights"):
        return target(x)


def fit(
    target: nn.Module,
    batches: Batches,
    reads: Places,
    n_features: int,
    kind: str = "relu",
    sparsity: float = 0.1,
    *,
    writes: Places | None = None,
    skip: bool = False,
    steps: int = 2000,
    lr: float = 3e-3,
    revive: int = 4,
    seed: int = 0,
) -> Dictionary:
    """Train a dictionary on a network's activations: Adam, its rate falling to 0 along the last fifth of the steps.

    The L1 weight rises from 0 over the first tenth. Decoder rows have unit length after every step. Features that were
    silent for a while start anew along the error of a sample, drawn by its squared length; that happens `revive` times
    in the first half.

    Args:
        target: any network; it is left as it is.
        batches: batches(step, generator) gives the inputs of a step, 0 <= step < steps, as for `decompose`. They are
            drawn ahead, 16 at a time, and go through the target together; some are asked for again at the end.
        reads: places that are read, such as "output of encode"; several make a crosscoder.
        n_features: F.
        kind: "relu", "topk" or "batch_topk".
        sparsity: L1 weight, or k.
        writes: places that are written; None for those that are read, which makes a sparse autoencoder.
        skip: add a linear path.
        steps: training steps, each on one batch.
        lr: learning rate.
        revive: how often silent features start anew.
        seed: of the first weights and the data.

    Returns:
        Dictionary: in evaluation mode.

    Raises:
        TypeError, ValueError: settings out of range, places that do not exist, batches that do not fit.
    """
    steps, lr = checks.number("steps", steps, 1, whole=True), checks.number("lr", lr, 0, above=True)
    revive, checked = checks.number("revive", revive, 0, whole=True), checks.number("seed", seed, 0, 2**62, whole=True)
    if not callable(batches):
        raise TypeError(f"batches must be a function of (step, generator), got {checks.given(batches)}")
    checks.function("batches", batches)
    _places(target, "reads", reads)
    _places(target, "writes", reads if writes is None else writes)
    generator = torch.Generator().manual_seed(checked + 3_000_000_019)  # not the numbers of the target's own training

    read, written = _listed(reads), _listed(reads if writes is None else writes)
    drawn: list[tuple[Tensor, Tensor]] = []  # the next steps' inputs and outputs, last first
    sizes: list[int] = []

    def draw(step: int) -> tuple[Tensor, Tensor]:
        if not drawn:  # several batches go through the target at once, which takes less time
            parts = [checks.batch(batches(s % steps, generator), s % steps) for s in range(step, step + AT_ONCE)]
            if len(shapes := {part.shape[1:] for part in parts}) > 1:
                raise ValueError(f"batches must give inputs of one shape, got samples {sorted(map(list, shapes))}")
            values = activations(target, torch.cat(parts), read if writes is None else [*read, *written])
            sizes[:] = [value.shape[1] for value in values]
            sides = torch.cat(values[: len(read)], 1), torch.cat(values[-len(written) :], 1)
            drawn[:] = list(zip(*(side.chunk(AT_ONCE) for side in sides), strict=True))[::-1]
        return drawn.pop()

    x, y = first = draw(0)
    own = Dictionary(
        sizes[: len(read)],
        sizes[-len(written) :],
        n_features,
        kind,
        sparsity,
        centred=writes is None,
        skip=skip,
        seed=checked,
    )
    own.to(x)
    own.scale_in, own.scale_out = _scales(x, own.reads), _scales(y, own.writes)
    optimiser = torch.optim.Adam(own.parameters(), lr)
    heard = torch.zeros(own.n_features, dtype=torch.bool, device=own.decoder.device)
    every = max(1, steps // 2 // (revive + 1))
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, 5 * (1 - step / steps))
        x, y = draw(step) if step else first
        error, penalty, codes = own.losses(x, y)
        optimiser.zero_grad()
        (error + min(1.0, 10 * step / steps) * penalty).backward()
        optimiser.step()
        own.normalise()
        heard |= (codes > 0).any(0)
        if revive and (step + 1) % every == 0 and (step + 1) // every <= revive:
            _revive(own, optimiser, ~heard, x, y, generator)
            heard[:] = False
    own.zero_grad()
    if kind == "batch_topk":
        least = [own.encode(draw(steps + i)[0]) for i in range(20)]
        own.threshold = torch.stack([codes[codes > 0].min() for codes in least if (codes > 0).any()]).mean().detach()
    return own.eval()


def _listed(places: Places) -> list[str]:
    return [places] if isinstance(places, str) else list(places)


def _scales(values: Tensor, sizes: list[int]) -> Tensor:
    """Give for each place 1 over the root of its mean squared length, repeated for its entries."""
    lengths = [part.square().sum(1).mean().sqrt().clamp_min(1e-12) for part in values.split(sizes, 1)]
    return torch.cat([(1 / length).expand(size) for length, size in zip(lengths, sizes, strict=True)])


@torch.no_grad()
def _revive(
    own: Dictionary, optimiser: torch.optim.Adam, silent: Tensor, x: Tensor, y: Tensor, generator: torch.Generator
) -> None:
    """Point silent features along the errors of samples, and forget what the optimiser knows of them."""
    n = int(silent.sum())
    error = (y - own(x)) * own.scale_out
    weights = error.square().sum(1)
    if not n or not weights.sum() > 0:
        return
    chosen = torch.multinomial(weights.cpu(), n, replacement=True, generator=generator).to(x.device)
    rows = error[chosen] if own.centred else x[chosen] * own.scale_in
    alive = own.encoder[:, ~silent].norm(dim=0).mean() if n < own.n_features else own.encoder.new_ones(())
    own.decoder[silent], own.encoder[:, silent] = _unit(error[chosen]), alive * _unit(rows).T
    own.encoder_bias[silent] = 0
    for parameter, kept in ((own.decoder, (silent,)), (own.encoder, (slice(None), silent)), (own.encoder_bias, silent)):
        for name in ("exp_avg", "exp_avg_sq"):
            optimiser.state[parameter][name][kept] = 0
