"""(b) The paper's formulation (braun2025), written from its description: one pass per output, everything dense.

    attributions   component activations [B, I, C, d_out] of every layer; for each output, its gradient with respect
                   to every layer's output, contracted with them by an einsum
    sparse forward all components, with a mask
    simplicity     over [B, I, C, m]

Our step is compared with it, in results (they are equal) and in time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, einsum

from benchmarks.cases import INIT_STD, Case
from benchmarks.stacked import Stacked


class Paper:
    """Decompose I stacked targets.

    Args:
        case: which experiment.
        batches: inputs [B, I, n], used in turn.
        A: per weight, the left factors [I, C, d_in, m]; None draws them.
        B: per weight, the right factors [I, C, m, d_out].
    """

    def __init__(
        self,
        case: Case,
        batches: Sequence[Tensor],
        A: Sequence[Tensor] | None = None,
        B: Sequence[Tensor] | None = None,
    ) -> None:
        self.case, self.stacked, self.batches, self.done = case, Stacked(case), batches, 0
        lead = (case.instances, case.n_components)
        if A is None or B is None:
            generator = torch.Generator().manual_seed(0)
            A = [INIT_STD * torch.randn(*lead, d, min(d, e), generator=generator) for d, e in case.shapes]
            B = [INIT_STD * torch.randn(*lead, min(d, e), e, generator=generator) for d, e in case.shapes]
        self.A = [a.clone().requires_grad_() for a in A]
        self.B = [b.clone().requires_grad_() for b in B]
        self.optimiser = torch.optim.Adam([*self.A, *self.B], lr=1e-3)  # unfused

    def activations(self, use: int, rows: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compute every component's activations for a layer's inputs.

        Args:
            use: which use of a weight.
            rows: its inputs [B, I, d].
            mask: which components are on, [B, I, C]; None for all.

        Returns:
            Tensor: component activations [B, I, C, d'].
        """
        which, transposed = self.case.uses[use]
        first, second = self.A[which], self.B[which]
        if transposed:
            first, second = second.transpose(-2, -1), first.transpose(-2, -1)
        inner = einsum("bid,icdm->bicm", rows, first)
        if mask is not None:
            inner = inner * mask[..., None]
        return einsum("bicm,icme->bice", inner, second)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Run the component model, [B, I, n]: dense over components, summed at the end of each layer."""
        return self.stacked.forward(x, lambda use, rows: self.activations(use, rows, mask).sum(-2))

    def attributions(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Compute squared gradient attributions, summed over outputs, at the target.

        Args:
            x: inputs [B, I, n].

        Returns:
            tuple[Tensor, Tensor, list[Tensor]]: attributions [B, I, C]; the target's outputs; its hidden activations.
        """
        before, after = [], []

        def apply(use: int, rows: Tensor) -> Tensor:
            before.append(rows)
            after.append(self.stacked.weigh(use, rows))
            return after[-1]

        out, hidden = self.stacked.forward(x, apply)
        with torch.no_grad():
            components = [self.activations(use, rows) for use, rows in enumerate(before)]
        scores = torch.zeros_like(components[0][..., 0])
        for o in range(out.shape[-1]):
            gradients = torch.autograd.grad(out[..., o].sum(), after, retain_graph=True)
            along = [einsum("bice,bie->bic", y, g) for y, g in zip(components, gradients, strict=True)]
            scores += torch.stack(along).sum(0) ** 2
        return scores, out.detach(), [h.detach() for h in hidden]

    def mask(self, scores: Tensor) -> Tensor:
        """Apply batch top-k in every instance: the int(k B) largest of [B, I, C] become 1."""
        batch, instances, _ = scores.shape
        flat = scores.transpose(0, 1).reshape(instances, -1)
        kept = flat.topk(int(self.case.top_k * batch), dim=-1).indices
        mask = torch.zeros_like(flat).scatter_(-1, kept, 1.0)
        return mask.reshape(instances, batch, -1).transpose(0, 1)

    def faithfulness(self) -> Tensor:
        """Compute the mean squared error of the sums of components, [I]."""
        errors = [
            (einsum("icdm,icme->ide", a, b) - w.detach()).square().sum((-2, -1))
            for a, b, w in zip(self.A, self.B, self.stacked.weights, strict=True)
        ]
        return torch.stack(errors).sum(0) / self._n_entries

    def simplicity(self, mask: Tensor) -> Tensor:
        """Compute the penalty [I] on column lengths, in place of singular values, over all of [B, I, C, m]."""
        penalties = []
        for a, b in zip(self.A, self.B, strict=True):
            lengths = a.square().sum(-2) * b.square().sum(-1)  # [I, C, m]
            # The mask is outside the power, so that inactive components cost nothing, not even the 1e-16.
            active = einsum("icm,bic->bicm", (lengths + 1e-16).pow(self.case.p / 2), mask)
            penalties.append(active.sum((0, 2, 3)))
        return torch.stack(penalties).sum(0) / (self._n_entries * len(mask))

    @property
    def _n_entries(self) -> int:
        return sum(d * e for d, e in self.case.shapes)

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """Compute each loss, [I]."""
        scores, target_outputs, target_hidden = self.attributions(x)
        self.forward(x)  # all components: the reference runs this too, and does not use it
        mask = self.mask(scores)
        out, hidden = self.forward(x, mask)
        losses = {
            "faithfulness": self.faithfulness(),
            "minimality": (out - target_outputs).square().mean((0, 2)),
            "simplicity": self.simplicity(mask),
        }
        if self.case.weights[3]:
            pairs = zip(hidden, target_hidden, strict=True)
            losses["hidden"] = torch.stack([(h - w).square().mean((0, 2)) for h, w in pairs]).sum(0)
        return losses

    def step(self) -> dict[str, Tensor]:
        """Take one training step; return the losses before it."""
        losses = self.losses(self.batches[self.done % len(self.batches)])
        weighted = [w * losses[name].sum() for w, name in zip(self.case.weights, losses, strict=False)]
        self.optimiser.zero_grad()
        torch.stack(weighted).sum().backward()
        self.optimiser.step()
        self.done += 1
        return {name: value.detach() for name, value in losses.items()}
