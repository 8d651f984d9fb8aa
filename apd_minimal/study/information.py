"""How many bits one thing tells about another, estimated so that a mask that fits one sample only tells nothing.

The usual estimate puts counted frequencies into the formula. With masks it fails: nearly every sample has a mask of its
own, so that each seems to determine the answer, and the estimate is the answer's whole entropy H(answer) whatever the
masks are. Here a predictor is fitted on a part of the samples and tested on others. For any predictor q,

    I(mask; answer) >= H(answer) - mean of -log2 q(answer | mask) over samples that were not used for the fit,

so that a poor predictor reports too little, never too much (but for the noise of a finite number of samples).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import checks

PENALTIES = (1.0, 0.1, 0.01, 1e-3, 1e-4)  # of the predictor's squared weights; one is chosen on samples of their own


@dataclass(frozen=True)
class Information:
    """Bits that a mask tells about a label; see `information`.

    Attributes:
        bits: a lower bound, from samples that the predictor had not seen; noise can make it slightly negative.
        shuffled: the same with the masks dealt to other samples, among those with the same `given`: about 0.
        ceiling: entropy of the label (of the label given the other label): what there is to tell.
    """

    bits: float
    shuffled: float
    ceiling: float


def information(mask: Tensor, label: Tensor, given: Tensor | None = None, seed: int = 0) -> Information:
    """Estimate I(mask; label), or I(mask; label | given), in bits, from below.

    A linear softmax predictor of the label sees the mask (and `given`). It is fitted on half of the samples; how much
    its weights are held back is chosen on a quarter, and it is tested on the last quarter. What only a predictor that
    is not linear can read is not counted. The entropy in the bound is that of the sample, which is slightly too small
    where labels are rare.

    Args:
        mask: gates [B, ...], booleans or numbers.
        label: whole numbers [B], such as the answers.
        given: whole numbers [B] that are known already.
        seed: of the split of the samples and of the shuffled masks.

    Returns:
        Information: bits, those of shuffled masks, and the ceiling.

    Raises:
        TypeError, ValueError: fewer than 8 samples, other numbers of labels, labels that are no whole numbers, or a
            mask that is not finite.
    """
    n = len(checks.tensor("mask", mask, "B", ..., "C"))
    for name, other in (("label", label), ("given", given)):
        if other is not None and len(checks.tensor(name, other, "B", finite=False)) != n:
            raise ValueError(
                f"mask and {name} must be about the same samples, got {checks.given(mask)} and {checks.given(other)}"
            )
    if n < 8:
        raise ValueError(
            f"mask must have at least 8 samples, to fit on some and test on others; got {checks.given(mask)}"
        )
    label = whole_numbers("label", label, n)
    before = torch.zeros_like(label) if given is None else whole_numbers("given", given, n)
    generator = torch.Generator().manual_seed(checks.number("seed", seed, 0, 2**62, whole=True))
    order = torch.randperm(n, generator=generator)
    parts = order[: n // 2], order[n // 2 : 3 * n // 4], order[3 * n // 4 :]
    known = torch.nn.functional.one_hot(before).double()[:, 1:]
    ceiling = entropy(label * (int(before.max()) + 1) + before) - entropy(before)
    flat, found = mask.detach().cpu().flatten(1).double(), []
    for rows in (torch.arange(n), _shuffle(before, generator)):
        features = torch.cat([flat[rows], known], dim=1)
        found.append(ceiling - _held_out(features, label, parts))
    return Information(found[0], found[1], ceiling)


def entropy(label: Tensor) -> float:
    """Compute the entropy of the label's frequencies, in bits.

    Args:
        label: whole numbers, 0 or above, [B].
    """
    p = torch.bincount(label).double() / len(label)
    return float(torch.special.entr(p).sum() / torch.log(torch.tensor(2.0)))


def whole_numbers(name: str, label: Tensor, n: int) -> Tensor:
    """Check labels [B], and number them 0, 1, ... in order.

    Args:
        name: of the argument, for the message.
        label: what was given.
        n: B.

    Raises:
        TypeError, ValueError: no tensor of whole numbers, or not one for each sample.
    """
    checks.tensor(name, label, n, finite=False)
    if label.is_floating_point() or label.is_complex():
        raise TypeError(f"{name} must be whole numbers [B], got {checks.given(label)}")
    return label.detach().cpu().unique(return_inverse=True)[1]


def _shuffle(given: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a random order that moves samples only within groups of the same `given`."""
    first, second = (torch.randperm(len(given), generator=generator) for _ in range(2))
    rows = torch.empty_like(first)
    rows[first[given[first].argsort(stable=True)]] = second[given[second].argsort(stable=True)]
    return rows


def _held_out(features: Tensor, label: Tensor, parts: tuple[Tensor, Tensor, Tensor]) -> float:
    """Fit a predictor of the label, and give its mean surprise on the last part, in bits."""
    fit, choose, test = parts
    features = features - features[fit].mean(0)
    prior = (torch.bincount(label[fit], minlength=int(label.max()) + 1) + 0.5).double().log()
    weights = torch.zeros(features.shape[1], len(prior), dtype=torch.float64)
    best, surprise = torch.inf, torch.inf
    for penalty in PENALTIES:
        weights, prior = _fitted(features[fit], label[fit], weights, prior, penalty)
        chosen, tested = (
            float(torch.nn.functional.cross_entropy(features[rows] @ weights + prior, label[rows]))
            for rows in (choose, test)
        )
        if chosen < best:
            best, surprise = chosen, tested
    return surprise / float(torch.log(torch.tensor(2.0)))


def _fitted(x: Tensor, label: Tensor, weights: Tensor, prior: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Fit a linear softmax predictor, from the weights given: the loss is convex, so that only time depends on them."""
    leaves = [weights.clone().requires_grad_(), prior.clone().requires_grad_()]
    optimiser = torch.optim.LBFGS(leaves, max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        with torch.enable_grad():
            error = torch.nn.functional.cross_entropy(x @ leaves[0] + leaves[1], label)
            # The bias is held back a little, or a label that was never seen would be ruled out for good.
            total = error + penalty * leaves[0].square().sum() / 2 + 1e-4 * leaves[1].square().sum()
            total.backward()
        return total

    optimiser.step(loss)
    return leaves[0].detach(), leaves[1].detach()
