"""Compressed computation: more ReLU functions than neurons, in a residual network (braun2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .. import checks
from ..components import Components, usable
from ..data import PROBABILITY, SparseFeatures
from ..network import Network
from ..study.metrics import Ownership, ownership
from .training import numbers, train, xavier

CHUNK = 64  # samples at a time, so that [CHUNK, C, n_features] stays in the cache


class ResidualMLP(nn.Module):
    """x [B, n_features] -> W_E -> residual stream -> W_E^T, with MLP layers trained to add ReLU(x).

    Every layer reads the residual stream r [B, d_resid] and adds relu(r W_in) W_out. The embedding W_E
    [n_features, d_resid] is fixed: random unit rows. There are no biases.

    Args:
        n_features: number of features.
        d_resid: width of the residual stream.
        neurons: neurons of each layer, for example (50,) or (25, 25).
        probability: chance that a feature is on, in the training data; values are uniform in [-1, 1].
        seed: of the embedding.

    Raises:
        TypeError, ValueError: sizes below 1, or a probability outside (0, 1].
    """

    embedding: Tensor

    def __init__(
        self,
        n_features: int = 100,
        d_resid: int = 1000,
        neurons: tuple[int, ...] = (50,),
        probability: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__()
        seed, n_features, d_resid = numbers(seed, n_features=(n_features, 1), d_resid=(d_resid, 1))
        if not isinstance(neurons, (tuple, list)) or not neurons:
            raise ValueError(
                f"neurons must be a number, at least 1, for each layer, such as (50,), got {checks.given(neurons)}"
            )
        neurons = tuple(checks.number("neurons", n, 1, whole=True) for n in neurons)
        self.n_features, self.d_resid = n_features, d_resid
        self.probability = checks.number("probability", probability, **PROBABILITY)
        # Not the random numbers of decompose(seed=seed): its rank-one components would start along these rows.
        generator = torch.Generator().manual_seed(seed + 2_000_000_011)
        E = torch.randn(n_features, d_resid, generator=generator)
        self.register_buffer("embedding", E / E.norm(dim=1, keepdim=True))
        self.read = nn.ModuleList(nn.Linear(d_resid, n, bias=False) for n in neurons)
        self.write = nn.ModuleList(nn.Linear(n, d_resid, bias=False) for n in neurons)
        self.neurons = nn.ModuleList(nn.ReLU() for _ in neurons)

    @property
    def layers(self) -> list[tuple[nn.Linear, nn.Linear]]:
        """The linear layers that read the stream and write to it, layer by layer."""
        return list(zip(self.read, self.write, strict=True))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., n_features] to outputs [..., n_features]."""
        checks.tensor("x", x, ..., self.n_features, finite=False, like=self.embedding)
        r = x @ self.embedding
        for read, relu, write in zip(self.read, self.neurons, self.write, strict=True):
            r = r + write(relu(read(r)))
        return r @ self.embedding.T

    def data(self, batch_size: int = 2048) -> SparseFeatures:
        """Create the source of batches [batch_size, n_features]."""
        return SparseFeatures(self.n_features, self.probability, low=-1.0, high=1.0, batch_size=batch_size)

    @staticmethod
    def labels(x: Tensor) -> Tensor:
        """Compute the training labels x + ReLU(x)."""
        checks.tensor("x", x, ..., finite=False, real=True)
        return x + torch.relu(x)

    @property
    def recipe(self) -> dict[str, Any]:
        """Inputs and settings of the decompositions in chapters 8 and 9, for `decompose(target, **target.recipe)`.

        They were found on target seeds from 100 up, with one layer of 50 neurons.
        """
        data = SparseFeatures(self.n_features, self.probability, -1.0, 1.0, batch_size=128, nonempty=True)
        # Active components per active feature: fewer than one at the end, so that each must do its work alone.
        active = data.mean_active
        return {
            "batches": data,
            "weights": self.weights,
            "attribution": self.attributions,
            "hidden_modules": [f"neurons.{i}" for i in range(len(self.neurons))],
            "n_components": 2 * self.n_features,
            "top_k": ((0.0, active), (0.4, active), (0.5, 0.6 * active)),
            "rank": 1,
            "steps": 4000,
            "lr": 5e-3,
            "warmup": 0.01,
            "init_std": 0.05,
            "faithfulness": ((0.0, 5.0), (0.7, 5.0), (0.9, 20.0)),
            "minimality": 20.0,
            "hidden": 20.0,
            "simplicity": ((0.0, 200.0), (0.4, 0.0)),
            "scrub": 5.0,
            "tidy_every": 0.0,
        }

    @property
    def weights(self) -> list[str]:
        """The parameter paths to decompose."""
        return [f"{part}.{i}.weight" for i in range(len(self.read)) for part in ("read", "write")]

    def fit(self, seed: int = 0, steps: int = 10_000, batch_size: int = 2048) -> ResidualMLP:
        """Train on the labels: AdamW, weight decay 0.01, learning rate 3e-3 falling along a cosine (braun2025).

        The fixed embedding is multiplied into the weights once a step instead of into every sample.

        Args:
            seed: for the initial weights and the data.
            steps: training steps.
            batch_size: samples a step.

        Returns:
            ResidualMLP: itself.
        """
        seed, steps, batch_size = numbers(seed, steps=(steps, 1), batch_size=(batch_size, 1))
        # Not the embedding's random numbers: the first neurons would start as the first features.
        data, generator = self.data(batch_size), torch.Generator().manual_seed(seed + 1_000_000_007)
        parameters = [layer.weight for pair in self.layers for layer in pair]
        for weight in parameters:
            xavier(weight, generator)
        optimiser = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

        def loss(step: int) -> Tensor:
            x = data(step, generator).to(parameters[0].device)
            return (self.composed(x) - self.labels(x)).square().mean()

        train(optimiser, schedule, steps, loss)
        return self

    def composed(self, x: Tensor) -> Tensor:
        """Compute the same outputs without the residual stream: weights are multiplied once, for all samples.

        A layer reads the features through W_E W_in and earlier layers through their W_out W_in; the outputs read the
        features through W_E W_E^T and the layers through W_out W_E^T.

        Args:
            x: inputs [B, n_features].
        """
        checks.tensor("x", x, ..., self.n_features, finite=False, like=self.embedding)
        E, out = self.embedding, x @ (self.embedding @ self.embedding.T)
        active: list[tuple[Tensor, Tensor]] = []  # a layer's activations, and the weights by which they write
        for read, write in self.layers:
            before = x @ (E @ read.weight.T)
            for h, W in active:
                before = before + h @ (W @ read.weight.T)
            active.append((torch.relu(before), write.weight.T))
        for h, W in active:
            out = out + h @ (W @ E.T)
        return out

    @torch.no_grad()
    def contributions(self, components: Components | None = None) -> Tensor:
        """Compute how much every neuron contributes to every feature: [n_features, neurons of all layers].

        Entry (i, n) is how strongly neuron n reads feature i times how strongly it writes to output i.

        Args:
            components: if given, the contributions of each of them, [C, n_features, neurons].
        """
        E, parts = self.embedding, []
        if components is not None:
            self._fits(usable(components, alone=True), all_weights=True)
        for i, (read, write) in enumerate(self.layers):
            if components is None:
                reads, writes = E @ read.weight.T, write.weight.T @ E.T
            else:
                r, w = f"read.{i}.weight", f"write.{i}.weight"
                reads = E @ components.A[r] @ components.B[r]
                writes = components.A[w] @ (components.B[w] @ E.T)
            parts.append(reads * writes.mT)
        return torch.cat(parts, dim=-1)

    def _fits(self, components: Components, all_weights: bool) -> None:
        """Check that the components are of all its weights, or of some, and of no others."""
        own = {path: (..., self.get_parameter(path).shape[1], "m") for path in self.weights}
        own = {path: shape for path, shape in own.items() if all_weights or path in components.A}
        checks.matrices("components", components.A, own, like=self.embedding)

    def ownership(
        self,
        components: Components,
        min_cosine: float = 0.95,
        length_range: tuple[float, float] = (0.5, 1.5),
        min_purity: float = 0.95,
    ) -> Ownership:
        """Match components with features by contributions; feature i's mechanism is row i of the target's (chapter 8).

        A contribution is a product of two weights, so that its cosine and purity are about the squares of those of a
        weight. An owner must have more than half of the length, so that it is unique.

        Args:
            components: C components, without restarts.
            min_cosine: least cosine of all contributions of an owner with those of its feature.
            length_range: least and largest ratio of lengths.
            min_purity: least share of the owner's squared contributions on its feature.
        """
        usable(components, alone=True)
        rows = self.contributions()
        truth = rows.new_zeros(self.n_features, *rows.shape)
        truth[torch.arange(self.n_features), torch.arange(self.n_features)] = rows
        own = Components.from_matrices({"contributions": self.contributions(components)})
        return ownership(own, {"contributions": truth}, min_cosine, length_range, min_purity)

    @torch.no_grad()
    def attributions(self, network: Network, components: Components, x: Tensor) -> Tensor:
        """Compute exact gradient attributions at the target, using the fixed embedding and the lack of biases.

        The same values as `apd_minimal.attributions.gradient`, for decompose(attribution=target.attributions). Every
        component is multiplied once by the weights that write to the stream and by those that read it, so that no
        per-sample product has the size d_resid. Samples in which no feature is on have attributions of 0.

        Args:
            network: the target, wrapped; not needed, since this is a method of the target.
            components: C components of all its weights or of some, with or without restarts.
            x: inputs [B, n_features].

        Returns:
            Tensor: [B, C], or [restarts, B, C].
        """
        self._fits(usable(components), all_weights=False)
        checks.tensor("x", x, "B", self.n_features, like=self.embedding)
        stacked = components.stacked()
        layers = _compose(self, stacked.map(lambda t: t.flatten(0, 1)))
        # Without biases, attributions are proportional to the length of the input, so that they are computed once per
        # direction: all samples with the same single feature on, at the same sign, share one.
        length = x.abs().amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        directions, which = (x / length).unique(dim=0, return_inverse=True)
        moved = torch.cat([self._tangents(layers, part).norm(dim=-1) for part in directions.split(CHUNK)])
        scores = moved[which] * (length * self.n_features**-0.5)  # the root mean square over outputs
        scores = rearrange(scores, "b (r c) -> r b c", r=stacked.restarts)
        return scores if components.restarts is not None else scores[0]

    def _tangents(self, layers: list[_Composed], x: Tensor) -> Tensor:
        """Compute how each component moves the target's outputs: [B, C, n_features], for x [B, n_features]."""
        values = x  # features and activations in the stream, [B, n_features + neurons so far]
        moved: Tensor | None = None  # tangents of everything that reads the stream later, [B, C, ...]
        for layer in layers:
            n = layer.read.shape[1]
            before = values @ layer.read
            d_before: Tensor | None = None
            if layer.reads is not None:
                # Few features are on: a sparse product adds up only their rows.
                d_before = (values.to_sparse() @ layer.reads).unflatten(1, (-1, n))
            if moved is not None:
                earlier, moved = moved[..., :n], moved[..., n:]
                d_before = earlier if d_before is None else d_before + earlier
            h = torch.relu(before)
            written = None if d_before is None else (d_before * (before > 0)[:, None]) @ layer.write
            if layer.writes is not None:
                if written is None:
                    written = (h @ layer.writes).unflatten(1, (-1, layer.write.shape[1]))
                else:
                    written.flatten(1).addmm_(h, layer.writes)
            elif layer.write_A is not None and layer.write_B is not None:
                u = (h @ layer.write_A).unflatten(1, (len(layer.write_B), -1)).transpose(0, 1)  # [C, B, m]
                own = (u @ layer.write_B).transpose(0, 1)
                written = own if written is None else written.add_(own)
            moved = written if moved is None or written is None else moved + written
            values = torch.cat([values, h], dim=1)
        assert moved is not None
        return moved


@dataclass
class _Composed:
    """A layer and its C components, multiplied by the stream's weights: S numbers are in it, T read it later."""

    read: Tensor  # [S, n]
    reads: Tensor | None  # of every component, [S, C n]; None if this weight is not decomposed
    write: Tensor  # [n, T]
    writes: Tensor | None  # of every component, [n, C T]; None where the factors are smaller
    write_A: Tensor | None  # [n, C m]; None if this weight is not decomposed
    write_B: Tensor | None  # [C, m, T]


def _compose(target: ResidualMLP, components: Components) -> list[_Composed]:
    """Form every product of fixed matrices and factors once, for all samples."""
    A, B, E = components.A, components.B, target.embedding
    layers, writers = [], E
    for i, (read, write) in enumerate(target.layers):
        readers = torch.cat([*(later.weight.T for later, _ in target.layers[i + 1 :]), E.T], dim=1)
        r, w = f"read.{i}.weight", f"write.{i}.weight"
        # In this order torch computes one product for all components if m is 1, which is many times faster.
        reads = _flat((A[r].mT @ writers.T).mT @ B[r]) if r in A else None
        writes = write_A = write_B = None
        if w in A:
            write_A, write_B = _flat(A[w]), B[w] @ readers
            _, m, T = write_B.shape
            n = len(write.weight.T)
            writes = _flat(A[w] @ write_B) if n * T < m * (n + T) else None
        layers.append(_Composed(writers @ read.weight.T, reads, write.weight.T @ readers, writes, write_A, write_B))
        writers = torch.cat([writers, write.weight.T])
    return layers


def _flat(each: Tensor) -> Tensor:
    """Place matrices [C, d, e] side by side: [d, C e]."""
    return rearrange(each, "c d e -> d (c e)")
