"""The checks of the fill-in cells: right answers pass, every kind of mistake is named, an empty cell is met kindly.

The right answers are written here with other operations than in the checks; each planted mistake is one that a reader
could make, with a word that the verdict must contain.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apd_minimal.book import exercises, judge

CHAPTERS = sorted((Path(__file__).parent.parent / "chapters").glob("*.ipynb"))


def cut(W: Tensor) -> Tensor:
    return torch.stack([torch.eye(len(W))[:, j : j + 1] @ W[j : j + 1] for j in range(len(W))])


def kept(A: Tensor, n: int) -> Tensor:
    edge = A.flatten().sort(descending=True).values[n - 1]
    return (A >= edge).float()


def inner(g: Tensor, P: Tensor) -> Tensor:
    return (g[:, None] * P[None, :, None]).sum(-1)  # [B, C, n_out]


RIGHT: dict[str, list[Callable[..., Any]]] = {
    "gap": [
        lambda P, W: (W - P.sum(0)).square().mean(),
        lambda P, W: ((P.sum(dim=0) - W) ** 2).mean().item(),
        lambda P, W: torch.nn.functional.mse_loss(P.sum(0), W),
    ],
    "rotated_mechanisms": [
        lambda W, Q: Q.T @ cut(W),
        lambda W, Q: Q[:, :, None] * W[:, None, :],
        lambda W, Q: torch.stack([torch.outer(Q[j], W[j]) for j in range(len(W))]),
    ],
    "gated_weights": [
        lambda P, theta, gates, rest: gates @ P + (theta - P.sum(0) if rest else 0),
        lambda P, theta, gates, rest: theta + (gates - 1) @ P if rest else gates @ P,
    ],
    "attribution": [
        lambda g, P: inner(g, P).square().mean(-1).sqrt(),
        lambda g, P: (g @ P.T).square().mean(1).sqrt(),
    ],
    "batch_mask": [
        lambda A, k: kept(A, int(k * len(A))),
        lambda A, k: kept(A, int(k * len(A))) > 0,
        lambda A, k: kept(A, int(k * len(A))).long(),
    ],
    "price": [
        lambda A, B, p: (A.square().sum(1) * B.square().sum(2)).pow(p / 2).sum(1),
        lambda A, B, p: (A.norm(dim=1) * B.norm(dim=2)).pow(p).sum(-1),
    ],
    "scrub_gates": [
        lambda mask, u: torch.maximum(mask, (u < 0.5).to(mask)),
        lambda mask, u: torch.where(mask > 0, mask, (u < 0.5).float()),
        lambda mask, u: (mask + (u < 0.5)).clamp(max=1),
    ],
}
WRONG: dict[str, dict[str, Callable[..., Any]]] = {
    "gap": {
        "averaged": lambda P, W: (W - P.mean(0)).square().mean(),
        "by itself": lambda P, W: torch.stack([(W - p).square().mean() for p in P]).mean(),
        "Divide": lambda P, W: ((W - P.sum(0)) ** 2).sum(),
        "root": lambda P, W: (W - P.sum(0)).norm() / W.numel() ** 0.5,
        "absolute": lambda P, W: (W - P.sum(0)).abs().mean(),
        "above and below": lambda P, W: W.mean() - P.sum(0).mean(),
        "below and above": lambda P, W: P.sum(0).mean() - W.mean(),
        "shape": lambda P, W: (W - P.sum(0)).square().mean(0),
        "finite": lambda P, W: torch.tensor(float("nan")),
        "a value is not": lambda P, W: torch.tensor(0.0),
    },
    "rotated_mechanisms": {
        "before the rotation": lambda W, Q: cut(W),
        "columns of Q": lambda W, Q: Q @ cut(W),
        "row by row": lambda W, Q: cut(Q.T @ W),
        "row j of the rotated": lambda W, Q: torch.stack([torch.outer(q, w) for q, w in zip(Q, Q.T @ W, strict=True)]),
        "swapped": lambda W, Q: (Q.T @ cut(W)).permute(1, 0, 2),
        r"shape \[5, 2\]": lambda W, Q: Q.T @ W,
    },
    "gated_weights": {
        "gates are not used": lambda P, theta, gates, rest: P.sum(0) + 0 * gates @ P,
        "although it is switched off": lambda P, theta, gates, rest: gates @ P + theta - P.sum(0),
        "missing": lambda P, theta, gates, rest: gates @ P,
        "gated sum": lambda P, theta, gates, rest: gates @ P + rest * (theta - gates @ P),
        "wrong sign": lambda P, theta, gates, rest: gates @ P + rest * (P.sum(0) - theta),
        "all the weights": lambda P, theta, gates, rest: gates @ P + rest * theta,
        r"shape \[7\]": lambda P, theta, gates, rest: (gates @ P).mean(0),
    },
    "attribution": {
        "root is missing": lambda g, P: inner(g, P).pow(2).mean(2),
        "Take the mean over them": lambda g, P: inner(g, P).pow(2).sum(2).sqrt(),
        "root and mean": lambda g, P: inner(g, P).pow(2).sum(2),
        "averaged with their signs": lambda g, P: inner(g, P).mean(2),
        "averaged before the square": lambda g, P: inner(g, P).mean(2).square().sqrt(),
        "absolute": lambda g, P: inner(g, P).abs().mean(2),
        "entries are squared": lambda g, P: (g[:, None] * P[None, :, None]).square().sum(-1).mean(-1).sqrt(),
        "largest output": lambda g, P: inner(g, P).abs().max(2).values,
        r"shape \[5, 4\]": lambda g, P: inner(g, P).square().mean(-1).sqrt().T,
    },
    "batch_mask": {
        "for each sample": lambda A, k: torch.stack([kept(row, max(1, round(k))) for row in A]),
        "smallest": lambda A, k: kept(-A, int(k * len(A))),
        "k times B": lambda A, k: kept(A, 1),
        "all entries": lambda A, k: kept(A, min(A.numel(), int(k * A.numel()))),
        "scores": lambda A, k: kept(A, int(k * len(A))) * A,
    },
    "price": {
        "p / 2": lambda A, B, p: (A.square().sum(1) * B.square().sum(2)).pow(p).sum(1),
        "power p is missing": lambda A, B, p: (A.square().sum(1) * B.square().sum(2)).sqrt().sum(1),
        "singular values": lambda A, B, p: torch.linalg.svd(A @ B).S.pow(p).sum(1),
        "whole factors": lambda A, B, p: (A.square().sum((1, 2)) * B.square().sum((1, 2))).pow(p / 2),
        "before the power": lambda A, B, p: (A.norm(dim=1) * B.norm(dim=2)).sum(1) ** p,
        "1 / p": lambda A, B, p: (A.norm(dim=1) * B.norm(dim=2)).pow(p).sum(1) ** (1 / p),
    },
    "scrub_gates": {
        "active ones as well": lambda mask, u: (u < 0.5).float(),
        "switched off": lambda mask, u: mask * (u < 0.5),
        "gate 2": lambda mask, u: mask + (u < 0.5),
        "turns components over": lambda mask, u: (mask - (u < 0.5).float()).abs(),
        "every other": lambda mask, u: torch.ones_like(mask),
        "mask itself": lambda mask, u: mask,
        "exchanged": lambda mask, u: torch.maximum(mask, (u >= 0.5).float()),
    },
}
NAMES = [name for name, thing in vars(exercises).items() if getattr(thing, "__module__", "") == exercises.__name__]
CHECKS = [name for name in NAMES if not name.startswith("_")]


def test_every_check_is_tried() -> None:
    assert set(CHECKS) == set(RIGHT) == set(WRONG)


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_pass(name: str) -> None:
    for answer in RIGHT[name]:
        verdict = getattr(exercises, name)(answer)
        assert verdict, verdict.words
        assert verdict.words.startswith("Right. ")


@pytest.mark.parametrize(("name", "word"), [(name, word) for name, cases in WRONG.items() for word in cases])
def test_mistakes_are_named(name: str, word: str) -> None:
    verdict = getattr(exercises, name)(WRONG[name][word])
    assert not verdict
    assert verdict.words.startswith("Not yet: ")
    assert re.search(word, verdict.words), verdict.words


@pytest.mark.parametrize("name", RIGHT)
def test_an_empty_cell_is_met_kindly(name: str) -> None:
    for empty in (None, ...):
        verdict = getattr(exercises, name)(lambda *_, empty=empty: empty)
        assert not verdict
        assert repr(verdict) == verdict.words == judge.EMPTY
    strange = getattr(exercises, name)(lambda *_: "seven")
    assert not strange
    assert "str" in strange.words


def test_a_check_cannot_be_fooled_by_changing_its_inputs() -> None:
    def lazy(P: Tensor, W: Tensor) -> Tensor:
        P.zero_()
        W.zero_()
        return W.sum()

    assert not exercises.gap(lazy)


@pytest.mark.parametrize("path", CHAPTERS[:6], ids=lambda path: path.stem)
def test_a_chapter_asks_and_its_solution_passes(path: Path) -> None:
    """The cell as stored has three dots and says so; the folded solution calls the same check, and passes."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    asked: set[str] = set()
    solved: set[str] = set()
    for cell in cells:
        source = "".join(cell["source"])
        shown = "".join(str(output.get("text", "")) + str(output.get("data", "")) for output in cell["outputs"])
        for name in re.findall(r"exercises\.(\w+)\(", source):
            if re.search(r"^ +\.\.\.", source, re.MULTILINE):
                asked.add(name)
                assert judge.EMPTY in shown
                assert not cell["metadata"].get("tags"), "the reader's cell is in view"
            else:
                solved.add(name)
                assert "Right. " in shown
    assert asked, "nothing to fill in"
    assert asked == solved
