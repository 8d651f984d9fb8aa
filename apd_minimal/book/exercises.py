"""Checks for the cells that a reader fills in: is the answer right, and if not, which mistake is it?

A check runs the reader's function on small random inputs and compares with the definition, written out entry by entry.
An answer that is wrong in a known way is told which way. No answer raises: a cell that is not filled in yet says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .judge import Verdict, judge


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def gap(answer: Callable[..., Any]) -> Verdict:
    """Check the mean squared difference between a sum of components and the weights (chapter 1).

    Args:
        answer: a function of components [C, d_in, d_out] and weights [d_in, d_out] that gives one number.

    Returns:
        Verdict: right or not, and in words why.
    """

    def right(P: Tensor, W: Tensor) -> Tensor:
        total = 0.0
        for i in range(W.shape[0]):
            for j in range(W.shape[1]):
                total += (float(W[i, j]) - sum(float(p[i, j]) for p in P)) ** 2
        return torch.tensor(total / W.numel())

    return judge(
        answer,
        [(_normal(3, 4, 2), _normal(4, 2)), (_normal(1, 2, 2), _normal(2, 2))],
        right,
        {
            "the components are averaged. They have to add up: take their sum.": lambda P, W: (
                (W - P.mean(0)).square().mean()
            ),
            "every component is compared with the weights by itself. Add them up first.": lambda P, W: (
                (W - P).square().mean()
            ),
            "this is the sum of the squares. Divide it by the number of entries.": lambda P, W: (
                (W - P.sum(0)).square().sum()
            ),
            "this is the root of the mean square. Leave the root out.": lambda P, W: (
                (W - P.sum(0)).square().mean().sqrt()
            ),
            "these are absolute differences. Square them instead.": lambda P, W: (W - P.sum(0)).abs().mean(),
            "the squares are missing: differences above and below zero cancel.": lambda P, W: (W - P.sum(0)).mean(),
            "the squares are missing: differences below and above zero cancel.": lambda P, W: (P.sum(0) - W).mean(),
        },
        "Try it on the components of the run, with PATH and W from above.",
    )


def rotated_mechanisms(answer: Callable[..., Any]) -> Verdict:
    """Check the true mechanisms of a TMS whose inputs are rotated (chapter 2).

    Args:
        answer: a function of W [n, d] and the rotation Q [n, n] that gives the mechanisms [n, n, d], the first axis
            for the feature.

    Returns:
        Verdict: right or not, and in words why.
    """

    def right(W: Tensor, Q: Tensor) -> Tensor:
        Z = torch.zeros(len(W), *W.shape)
        for j in range(W.shape[0]):
            for i in range(W.shape[0]):
                for k in range(W.shape[1]):
                    Z[j, i, k] = Q[j, i] * W[j, k]
        return Z

    def cut(W: Tensor) -> Tensor:
        return torch.eye(len(W))[:, :, None] * W

    inputs = [(_normal(n, 2), torch.linalg.qr(_normal(n, n)).Q) for n in (5, 4)]
    return judge(
        answer,
        inputs,
        right,
        {
            "these are the mechanisms before the rotation: Q plays no part.": lambda W, Q: cut(W),
            "the columns of Q are used. A sample with only feature j on is a multiple of row j of Q.": lambda W, Q: (
                torch.einsum("ij,jk->jik", Q, W)
            ),
            "this cuts the rotated matrix row by row. Its rows belong to no feature: each mixes all of them.": (
                lambda W, Q: cut(Q.T @ W)
            ),
            "row j of Q is right, but it writes row j of the rotated matrix. Feature j writes row j of W.": (
                lambda W, Q: Q[:, :, None] * (Q.T @ W)[:, None]
            ),
            "the first two axes are swapped. The first axis is for the feature, the second for the inputs.": (
                lambda W, Q: right(W, Q).transpose(0, 1)
            ),
        },
        "Each has rank one, none has a zero, and they sum to the rotated weights.",
    )


def gated_weights(answer: Callable[..., Any]) -> Verdict:
    """Check the weights with which each sample runs when components are gated (chapter 3).

    Args:
        answer: a function of components [C, N], weights [N], gates [B, C] and a bool for the remainder that gives
            weights [B, N].

    Returns:
        Verdict: right or not, and in words why.
    """

    def right(P: Tensor, theta: Tensor, gates: Tensor, remainder: bool) -> Tensor:
        out = torch.zeros(len(gates), len(theta))
        for b in range(len(gates)):
            for c in range(len(P)):
                out[b] += gates[b, c] * P[c]
            for c in range(len(P)):
                out[b] -= remainder * P[c]
            out[b] += remainder * theta
        return out

    three = _normal(3, 7), _normal(7), _normal(4, 3).sigmoid()
    two = _normal(2, 5), _normal(5), (_normal(6, 2) > 0).float()
    return judge(
        answer,
        [(*three, False), (*three, True), (*two, True), (*two, False)],
        right,
        {
            "the remainder is missing where it is switched on.": lambda P, theta, gates, remainder: gates @ P,
            "the remainder is taken against the gated sum, so every sample gets the target's weights. It is what all "
            "components together leave over, whatever the gates.": lambda P, theta, gates, remainder: theta.expand(
                len(gates), -1
            ),
            "the gates are not used: every sample gets the sum of all components.": lambda P, theta, gates, remainder: (
                P.sum(0) + remainder * (theta - P.sum(0))
            ).expand(len(gates), -1),
            "the remainder is added although it is switched off.": lambda P, theta, gates, remainder: (
                gates @ P + (not remainder) * (theta - P.sum(0))
            ),
            "the remainder has the wrong sign. It is the weights minus the sum.": lambda P, theta, gates, remainder: (
                gates @ P - remainder * (theta - P.sum(0))
            ),
            "all the weights are added, and not only what the components leave over.": (
                lambda P, theta, gates, remainder: gates @ P + remainder * theta
            ),
        },
        "With all gates at 1 and the remainder on, these are the target's own weights.",
    )


def attribution(answer: Callable[..., Any]) -> Verdict:
    """Check the attribution of every component on every sample (chapter 4).

    Args:
        answer: a function of the outputs' gradients [B, n_out, N] and components [C, N] that gives scores [B, C].

    Returns:
        Verdict: right or not, and in words why.
    """

    def right(gradient: Tensor, P: Tensor) -> Tensor:
        out = torch.zeros(len(gradient), len(P))
        for b in range(len(gradient)):
            for c in range(len(P)):
                squares = [float((g * P[c]).sum()) ** 2 for g in gradient[b]]
                out[b, c] = (sum(squares) / len(squares)) ** 0.5
        return out

    def signed(gradient: Tensor, P: Tensor) -> Tensor:
        return torch.einsum("bon,cn->bco", gradient, P)

    return judge(
        answer,
        [(_normal(4, 3, 6), _normal(5, 6)), (_normal(2, 1, 4), _normal(3, 4))],
        right,
        {
            "the root is missing.": lambda g, P: signed(g, P).square().mean(-1),
            "this is the root of the sum over outputs. Take the mean over them.": lambda g, P: signed(g, P).norm(
                dim=-1
            ),
            "root and mean are missing: this is the sum of squares over outputs.": lambda g, P: (
                signed(g, P).square().sum(-1)
            ),
            "the outputs are averaged with their signs, so that they cancel. Square first.": lambda g, P: signed(
                g, P
            ).mean(-1),
            "the outputs are averaged before the square, so that they cancel. Square first.": lambda g, P: (
                signed(g, P).mean(-1).abs()
            ),
            "these are mean absolute values. Square, take the mean, and then the root.": lambda g, P: (
                signed(g, P).abs().mean(-1)
            ),
            "the entries are squared before they are summed. Sum over the entries first: that is the inner product.": (
                lambda g, P: torch.einsum("bon,cn->bco", g.square(), P.square()).mean(-1).sqrt()
            ),
            "this is the largest output alone. Take the root mean square over all of them.": lambda g, P: (
                signed(g, P).abs().amax(-1)
            ),
        },
        "It is linear in the component before the square, and never negative after it.",
    )


def batch_mask(answer: Callable[..., Any]) -> Verdict:
    """Check the mask of batch top-k (chapter 4).

    Args:
        answer: a function of attributions [B, C] and k that gives a mask [B, C] of zeros and ones.

    Returns:
        Verdict: right or not, and in words why.
    """

    def largest(A: Tensor, n: int) -> Tensor:
        mask = torch.zeros_like(A)
        for i in sorted(range(A.numel()), key=lambda i: -float(A.flatten()[i]))[:n]:
            mask[i // A.shape[1], i % A.shape[1]] = 1
        return mask

    def per_sample(A: Tensor, k: float) -> Tensor:
        return torch.cat([largest(row[None], max(1, round(k))) for row in A])

    return judge(
        answer,
        [(_normal(8, 4).abs(), 0.5), (_normal(6, 5).abs(), 1.5)],
        lambda A, k: largest(A, int(k * len(A))),
        {
            "the choice is made for each sample by itself. Choose once, from the whole table.": per_sample,
            "the smallest are kept.": lambda A, k: largest(-A, int(k * len(A))),
            "k counts components for one sample. The budget of the whole batch is k times B.": lambda A, k: largest(
                A, max(1, int(k))
            ),
            "the budget is k times all entries. It is k times the number of samples.": lambda A, k: largest(
                A, min(A.numel(), int(k * A.numel()))
            ),
            "the scores are kept in place of ones. A mask has only zeros and ones.": lambda A, k: (
                A * largest(A, int(k * len(A)))
            ),
        },
        "A sample can get none, or several: only the mean over the batch is k.",
    )


def price(answer: Callable[..., Any]) -> Verdict:
    """Check the factorised stand-in for the Schatten price of every component (chapter 5).

    Args:
        answer: a function of factors A [C, d_in, m] and B [C, m, d_out] and of p that gives prices [C].

    Returns:
        Verdict: right or not, and in words why.
    """

    def right(A: Tensor, B: Tensor, p: float) -> Tensor:
        out = torch.zeros(len(A))
        for c in range(len(A)):
            for r in range(A.shape[2]):
                a = sum(float(v) ** 2 for v in A[c, :, r])
                b = sum(float(v) ** 2 for v in B[c, r])
                out[c] += (a * b) ** (p / 2)
        return out

    def lengths(A: Tensor, B: Tensor) -> Tensor:
        return A.norm(dim=1) * B.norm(dim=2)  # [C, m]

    return judge(
        answer,
        [(_normal(3, 5, 2), _normal(3, 2, 4), 0.6), (_normal(2, 4, 3), _normal(2, 3, 4), 1.0)],
        right,
        {
            "the power is p where the squared lengths need p / 2.": lambda A, B, p: lengths(A, B).pow(2 * p).sum(1),
            "the power p is missing.": lambda A, B, p: lengths(A, B).sum(1),
            "this is the true price, by singular values. The stand-in uses only the lengths of a_r and b_r.": (
                lambda A, B, p: torch.linalg.svdvals(A @ B).pow(p).sum(1)
            ),
            "whole factors are measured. Every term r has its own lengths: sum over r at the end.": lambda A, B, p: (
                A.flatten(1).norm(dim=1) * B.flatten(1).norm(dim=1)
            ).pow(p),
            "the terms are added up before the power. Raise each to p first.": lambda A, B, p: (
                lengths(A, B).sum(1).pow(p)
            ),
            "the last root, 1 / p, is too much: the price is the quasi-norm to the power p.": lambda A, B, p: (
                lengths(A, B).pow(p).sum(1).pow(1 / p)
            ),
        },
        "It is never below the true price for p up to 1.",
    )


def scrub_gates(answer: Callable[..., Any]) -> Verdict:
    """Check the gates of the scrub loss (chapter 6).

    Args:
        answer: a function of a mask [B, C] of zeros and ones and of uniform numbers [B, C] in [0, 1) that gives gates
            [B, C]. A number below one half is heads.

    Returns:
        Verdict: right or not, and in words why.
    """

    def gates(rule: Callable[[bool, bool], float]) -> Callable[[Tensor, Tensor], Tensor]:
        """Apply a rule for one component, from whether it is active and whether its coin shows heads."""
        return lambda mask, u: torch.tensor(
            [[rule(bool(m), float(v) < 0.5) for m, v in zip(*rows, strict=True)] for rows in zip(mask, u, strict=True)]
        )

    numbers = torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(3))
    return judge(
        answer,
        [((numbers[0] < 0.4).float(), numbers[1]), ((numbers[1] < 0.3).float(), numbers[0])],
        gates(lambda active, heads: float(active or heads)),
        {
            "coins are tossed for the active ones as well. What is active stays on.": gates(
                lambda _, heads: float(heads)
            ),
            "nothing inactive joins in: these are active ones, some of them switched off.": gates(
                lambda active, heads: float(active and heads)
            ),
            "an active component whose coin shows heads has the gate 2. On is 1.": gates(
                lambda active, heads: float(active) + float(heads)
            ),
            "the coin turns components over: an active one with heads goes off.": gates(
                lambda active, heads: float(active != heads)
            ),
            "every other component joins in. Each should do so by its own coin.": gates(lambda active, heads: 1.0),
            "nothing joins in: this is the mask itself.": gates(lambda active, heads: float(active)),
            "heads and tails are exchanged: below one half is heads.": gates(
                lambda active, heads: float(active or not heads)
            ),
        },
        "What is active stays, and every other component joins with probability one half.",
    )
