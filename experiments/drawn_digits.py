"""Digits drawn from the typefaces that matplotlib ships, and a small convolutional network that reads them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

FACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold",
    "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10", "cmb10",
)  # fmt: skip
LARGE, SIDE = 48, 12  # pixels of a side, as drawn and as the network sees it


@cache
def drawn() -> Tensor:
    """Draw every digit once in each typeface: [faces, 10, LARGE, LARGE], between 0 and 1."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    pictures = []
    for face in FACES:
        for digit in range(10):
            figure = Figure(figsize=(1, 1), dpi=LARGE)
            canvas = FigureCanvasAgg(figure)
            figure.text(0.5, 0.47, str(digit), font=folder / f"{face}.ttf", size=52, ha="center", va="center_baseline")
            canvas.draw()
            pictures.append(1 - np.asarray(canvas.buffer_rgba())[:, :, 0] / 255.0)
    return torch.tensor(np.stack(pictures), dtype=torch.float32).reshape(len(FACES), 10, LARGE, LARGE)


def digits(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw n digits of random typeface, size, place, angle and noise.

    Args:
        n: how many.
        generator: source of randomness.

    Returns:
        tuple[Tensor, Tensor]: pictures [n, 1, SIDE, SIDE] and digits [n].
    """
    face = torch.randint(len(FACES), (n,), generator=generator)
    digit = torch.randint(10, (n,), generator=generator)
    u = 2 * torch.rand(n, 4, generator=generator) - 1
    angle, size = 0.2 * u[:, 0], 0.75 + 0.12 * u[:, 1]
    turn = torch.stack([angle.cos(), -angle.sin(), 0.2 * u[:, 2], angle.sin(), angle.cos(), 0.2 * u[:, 3]], 1)
    grid = F.affine_grid((turn * size[:, None]).reshape(n, 2, 3), [n, 1, LARGE, LARGE], align_corners=False)
    pictures = F.grid_sample(drawn()[face, digit][:, None], grid, align_corners=False)
    pictures = F.avg_pool2d(pictures, LARGE // SIDE)
    return pictures + 0.05 * torch.randn(pictures.shape, generator=generator), digit


class Reader(nn.Module):
    """Two convolutions of stride 2 and a linear layer: pictures [B, 1, 12, 12] to scores [B, 10].

    Args:
        seed: of the first weights and of the training.
    """

    weights = ("layers.0.weight", "layers.2.weight", "layers.5.weight")

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(144, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Score the ten digits: [B, 10]."""
        scores: Tensor = self.layers(x)
        return scores

    def fit(self, seed: int, steps: int = 1500) -> Reader:
        """Train by Adam on the cross-entropy, then scale the last layer so that centred scores have mean square 1."""
        generator = torch.Generator().manual_seed(seed)
        optimiser = torch.optim.Adam(self.parameters(), lr=3e-3, weight_decay=1e-4)
        for _ in range(steps):
            x, y = digits(128, generator)
            loss = F.cross_entropy(self(x), y)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            scores = self(digits(2048, generator)[0])
            size = (scores - scores.mean(0)).square().mean().sqrt()
            for p in self.layers[5].parameters():
                p.div_(size)
        return self.requires_grad_(False)
