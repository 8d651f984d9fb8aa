"""New starts of free components where the sparse network still fails (chapter 6).

The samples with the largest errors show what is missing: the negative gradients of their errors, propagated to the
target's weights. Power iteration finds directions in parameter space along which a few of these gradients are large,
and free components start there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attributions.choose import shapes_of
from ..components import Components
from ..losses import Divergence
from ..network import Network
from ..sites import Use
from .merge import NUMBERS, pieces

POWER_STEPS = 20


def missing(network: Network, x: Tensor, lacking: Tensor) -> Tensor:
    """Compute each sample's gradient of <lacking_b, f(x_b)> with respect to the decomposed weights, at the target.

    Args:
        network: the target.
        x: inputs [B, ...].
        lacking: direction in which each sample's outputs should change [B, *rest], after the network's `output`.

    Returns:
        Tensor: gradients [B, N], in the order of `Components.flat`.
    """
    gradients = [(left.mT @ right).flatten(1) for left, right in _sides(network, x, lacking)]
    return torch.cat(gradients, dim=1)


def _sides(network: Network, x: Tensor, lacking: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Find, for each weight, of what these gradients [d_in, d_out] are products: [B, T, d_in] and [B, T, d_out]."""
    record: list[Use] = []
    with torch.enable_grad():
        out = network(x, record=record)
    deltas = torch.autograd.grad(out, [use.shift for use in record], lacking, materialize_grads=True)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in network.weights}
    for use, delta in zip(record, deltas, strict=True):
        rows, delta = (t.detach().reshape(len(x), -1, t.shape[-1]) for t in (use.rows, delta))
        found[use.site.path].append((delta, rows) if use.site.transposed else (rows, delta))
    # A weight with several uses counts as one with as many positions.
    return [(torch.cat([u for u, _ in uses], 1), torch.cat([v for _, v in uses], 1)) for uses in found.values()]


class _Whole:
    """Gradients [B, N] as they are."""

    def __init__(self, gradients: Tensor) -> None:
        self.gradients = gradients

    def longest(self) -> Tensor:
        """Return the one of the largest length, [N]."""
        return self.gradients[self.gradients.norm(dim=1).argmax()]

    def along(self, v: Tensor) -> Tensor:
        """Multiply each by a vector [N]: [B]."""
        return self.gradients @ v

    def added(self, shares: Tensor) -> Tensor:
        """Add them up with the given shares [B]: [N]."""
        return shares @ self.gradients

    def remove(self, v: Tensor) -> None:
        """Take away what they have along a unit vector [N]."""
        self.gradients = self.gradients - (self.gradients @ v)[:, None] * v


class _Products:
    """The same where all gradients would take far more memory than a step: by the sides of which they are products."""

    def __init__(self, sides: list[tuple[Tensor, Tensor]]) -> None:
        self.sides = sides  # of each weight, [B, T, d_in] and [B, T, d_out]
        squares = [((left @ left.mT) * (right @ right.mT)).sum((1, 2)) for left, right in sides]
        self.squares = torch.stack(squares).sum(0)  # [B]
        self.removed: list[tuple[Tensor, Tensor]] = []  # vectors [N], and how much of them each gradient had [B]

    def longest(self) -> Tensor:
        """Return the one of the largest length, [N]."""
        shares = torch.zeros_like(self.squares)
        shares[self.squares.argmax()] = 1
        return self.added(shares)

    def along(self, v: Tensor) -> Tensor:
        """Multiply each by a vector [N]: [B]."""
        shapes = [(left.shape[-1], right.shape[-1]) for left, right in self.sides]
        parts = v.split([d_in * d_out for d_in, d_out in shapes])
        matrices = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        products = zip(self.sides, matrices, strict=True)
        found = torch.stack([(left @ matrix * right).sum((1, 2)) for (left, right), matrix in products]).sum(0)
        for removed, lengths in self.removed:
            found = found - lengths * (removed @ v)
        return found

    def added(self, shares: Tensor) -> Tensor:
        """Add them up with the given shares [B]: [N]."""
        weighed = [(left * shares[:, None, None]).flatten(0, 1) for left, _ in self.sides]
        pairs = zip(weighed, self.sides, strict=True)
        total = torch.cat([(left.mT @ right.flatten(0, 1)).flatten() for left, (_, right) in pairs])
        for removed, lengths in self.removed:
            total = total - (shares @ lengths) * removed
        return total

    def remove(self, v: Tensor) -> None:
        """Take away what they have along a unit vector [N]."""
        lengths = self.along(v)
        self.squares = self.squares - lengths.square()
        self.removed.append((v, lengths))


def _held(
    network: Network, x: Tensor, lacking: Tensor, dtype: torch.dtype, most: int = 2 * NUMBERS
) -> _Whole | _Products:
    """Compute what `missing` does, in the form that takes less memory if it takes more than `most` numbers."""
    n_entries = sum(weight.numel() for weight in network.weights.values())
    sides = sum(T * (d + e) for _, T, d, e in shapes_of(network, x).uses)
    parts = list(zip(x.split(max(1, most // sides)), lacking.split(max(1, most // sides)), strict=True))
    if n_entries < sides or n_entries * len(x) <= most:
        return _Whole(torch.cat([missing(network, *part) for part in parts]).to(dtype))
    found = zip(*[_sides(network, *part) for part in parts], strict=True)
    return _Products(
        [(torch.cat([u for u, _ in uses]).to(dtype), torch.cat([v for _, v in uses]).to(dtype)) for uses in found]
    )


@torch.no_grad()
def reseed(
    network: Network,
    components: Components,
    mask: Tensor,
    x: Tensor,
    divergence: Divergence,
    n_worst: int = 1024,
    most: int = 6,
    max_cosine: float = 0.35,
    size: int | None = None,
) -> Tensor:
    """Start up to `most` free (all zero) components of every restart where the sparse outputs fail, in place.

    Args:
        network: the target.
        components: stacked components [R, C, ...].
        mask: which are active on x, [R, B, (positions,) C].
        x: inputs [B, ...].
        divergence: per sample, as in the minimality loss.
        n_worst: number of samples with the largest errors that are used.
        most: largest number of new starts of one restart in one call.
        max_cosine: a start with a larger cosine to a nonzero component is skipped.
        size: samples per forward pass, so that the memory does not grow with x; None for all at once.

    Returns:
        Tensor: which components were started [R, C].
    """
    gates, parts = mask.bool(), []
    for i in range(0, len(x), size or len(x)):
        part = slice(i, i + (size or len(x)))
        parts.append(_lacking(network, components, gates[:, part], x[part], divergence))
    errors, lacking = (torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True))  # [R, B], [R, B, *rest]
    # torch cannot factorise half precision.
    dtype = torch.promote_types(components.parameters()[0].dtype, torch.float32)
    theta = torch.cat([weight.flatten() for weight in network.weights.values()]).to(dtype)
    started = torch.zeros(mask.shape[0], components.n_components, dtype=torch.bool, device=theta.device)
    for r in range(len(started)):
        own = components.restart(r)
        free = torch.cat([flat.norm(dim=-1) == 0 for _, flat in pieces(own)]).nonzero().flatten().tolist()
        if not free:
            continue
        worst = errors[r].topk(min(n_worst, len(x))).indices
        gradients = _held(network, x[worst], lacking[r, worst], dtype)
        for c in free[:most]:
            v = _strong_direction(gradients, network)
            gradients.remove(v)
            length = theta @ v
            if length <= 0 or _largest_cosine(own, v) > max_cosine:
                continue
            started[r, c] = True
            _put(components, r, c, length * v, network)
    return started


def _largest_cosine(components: Components, v: Tensor) -> float:
    """Find the largest cosine of a unit vector [N] with a nonzero component; -1 if there is none."""
    cosines = [v.new_full((1,), -1.0)]
    for _, flat in pieces(components):
        alive = flat[flat.norm(dim=-1) > 0].to(v)
        cosines.append(alive @ v / alive.norm(dim=-1))
    return float(torch.cat(cosines).max())


def _lacking(
    network: Network, components: Components, gates: Tensor, x: Tensor, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """Compute the errors [R, B] of the sparse outputs, and their negative gradients [R, B, *rest]."""
    outputs, target_outputs = network(x, components, gates), network(x)
    with torch.enable_grad():
        outputs = outputs.detach().requires_grad_()
        errors = divergence(outputs, target_outputs)
        return errors.detach(), -torch.autograd.grad(errors.sum(), outputs)[0]


def _strong_direction(gradients: _Whole | _Products, network: Network) -> Tensor:
    """Find a unit vector [N], of rank one in every weight, along which a few of the gradients are large."""
    v = gradients.longest()
    for _ in range(POWER_STEPS):
        # The third power gives the samples that agree most with the direction the largest weights; before, a power of
        # two, by which nothing is rounded, takes out how long the gradients are.
        shares = gradients.along(v).clamp_min(0)
        shares = torch.ldexp(shares, -torch.frexp(shares.max()).exponent)
        v = gradients.added(shares.pow(3))
        parts = []
        for part, (d_in, d_out) in zip(_split(v, network), network.shapes.values(), strict=True):
            U, S, Vh = torch.linalg.svd(part.view(d_in, d_out), full_matrices=False)
            parts.append((S[0] * U[:, :1] @ Vh[:1]).flatten())
        v = torch.cat(parts)
        v = v / v.norm().clamp_min(1e-12)
    return v


def _split(v: Tensor, network: Network) -> tuple[Tensor, ...]:
    return v.split([weight.numel() for weight in network.weights.values()])


def _put(components: Components, r: int, c: int, vector: Tensor, network: Network) -> None:
    """Write a vector [N] into one component, as balanced factors."""
    for path, part in zip(components.paths, _split(vector, network), strict=True):
        matrix = part.view(network.shapes[path])[None]
        factors = Components.from_matrices({path: matrix}, rank=components.A[path].shape[-1])
        components.A[path][r, c] = factors.A[path][0]
        components.B[path][r, c] = factors.B[path][0]
