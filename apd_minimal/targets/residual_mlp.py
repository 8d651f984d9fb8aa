"""Compressed computation: more ReLU functions than neurons, in a residual network (braun2025)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import SparseFeatures
from .training import train


class ResidualMLP(nn.Module):
    """x [B, n_features] -> W_E -> residual stream -> W_E^T, with MLP layers that are to add ReLU(x).

    Every layer reads the residual stream r [B, d_resid] and adds relu(r W_in) W_out. The embedding W_E
    [n_features, d_resid] is fixed: random rows of length one. There are no biases.

    Args:
        n_features: number of features.
        d_resid: width of the residual stream.
        neurons: neurons of each layer, for example (50,) or (25, 25).
        probability: chance that a feature is on, for the data that it trains on; values are uniform in [-1, 1].
        seed: of the embedding.
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
        if min(n_features, d_resid, *neurons) < 1 or not neurons:
            raise ValueError(f"sizes must be at least 1, got {n_features}, {d_resid} and neurons {neurons}")
        self.n_features, self.d_resid, self.probability = n_features, d_resid, probability
        E = torch.randn(n_features, d_resid, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("embedding", E / E.norm(dim=1, keepdim=True))
        self.read = nn.ModuleList(nn.Linear(d_resid, n, bias=False) for n in neurons)
        self.write = nn.ModuleList(nn.Linear(n, d_resid, bias=False) for n in neurons)

    @property
    def layers(self) -> list[tuple[nn.Linear, nn.Linear]]:
        """What reads the stream and what writes to it, layer by layer."""
        return list(zip(self.read, self.write, strict=True))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [..., n_features]."""
        r = x @ self.embedding
        for read, write in self.layers:
            r = r + write(torch.relu(read(r)))
        return r @ self.embedding.T

    def data(self, batch_size: int = 2048) -> SparseFeatures:
        """Its source of batches [batch_size, n_features]."""
        return SparseFeatures(self.n_features, self.probability, low=-1.0, high=1.0, batch_size=batch_size)

    @staticmethod
    def labels(x: Tensor) -> Tensor:
        """What it is trained to give: x + ReLU(x)."""
        return x + torch.relu(x)

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
        data, generator = self.data(batch_size), torch.Generator().manual_seed(seed)
        parameters = [layer.weight for pair in self.layers for layer in pair]
        with torch.no_grad():
            for weight in parameters:
                nn.init.xavier_normal_(weight, generator=generator)
        optimiser = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

        def loss(step: int) -> Tensor:
            x = data(step, generator)
            return (self.composed(x) - self.labels(x)).square().mean()

        train(optimiser, schedule, steps, loss)
        return self

    def composed(self, x: Tensor) -> Tensor:
        """The same outputs without the residual stream: every product of weights is formed once, for all samples.

        A layer sees the features through W_E W_in and earlier layers through their W_out W_in; the outputs see the
        features through W_E W_E^T and the layers through W_out W_E^T.
        """
        E, out = self.embedding, x @ (self.embedding @ self.embedding.T)
        active: list[tuple[Tensor, Tensor]] = []  # a layer's neurons, and what they write
        for read, write in self.layers:
            before = x @ (E @ read.weight.T)
            for h, W in active:
                before = before + h @ (W @ read.weight.T)
            active.append((torch.relu(before), write.weight.T))
        for h, W in active:
            out = out + h @ (W @ E.T)
        return out

    @torch.no_grad()
    def contributions(self) -> Tensor:
        """How much every neuron does for every feature: [n_features, neurons of all layers].

        Entry (i, n) is how strongly neuron n reads feature i times how strongly it writes to output i.
        """
        E = self.embedding
        parts = [(E @ read.weight.T) * (write.weight.T @ E.T).T for read, write in self.layers]
        return torch.cat(parts, dim=1)
