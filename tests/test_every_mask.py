"""The bound over all masks: a closed form, brute force, ascent; what it is made of, against the network itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import apd_minimal as apd
from apd_minimal.study import controls
from apd_minimal.targets import GroupOperations, ModularArithmetic, ModularTask
from experiments import verified
from experiments.every_mask import HIDDEN, OUT, Squares, bernstein, bounds, halve, monomials, trilinear

KINDS = ("task", "frequency", "group", "apart")


def target_of(kind: str) -> tuple[Squares, dict[str, Tensor]]:
    """Small ones: of two tasks, of three frequencies, of two groups with a switch and without."""
    if kind in ("group", "apart"):
        names = ["Z6", "S3"] if kind == "group" else ["Z4", "D3"]
        groups = GroupOperations(names, switches="group" if kind == "group" else None)
        return groups, groups.mechanisms("group")
    tasks = [ModularTask(5), ModularTask(3, -1)] if kind == "task" else [ModularTask(7)]
    target = ModularArithmetic(tasks, switches=kind, embedding=True)
    return target, target.mechanisms(kind)


def case(kind: str, most: int = 60) -> tuple[Squares, apd.Components, Tensor, Tensor]:
    """Parts in the wrong places, so that masks do harm, some inputs, and who is needed."""
    target, truth = target_of(kind)
    exact = apd.Components.from_matrices(truth, min(truth[HIDDEN].shape[1:]))
    x = verified.everything(target)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:most]]
    return target, controls.dealt(exact, 3), x, verified.at_work(target, x)


def errors(target: Squares, components: apd.Components, x: Tensor, gates: Tensor) -> Tensor:
    with torch.no_grad():
        return (apd.Network(target, [HIDDEN, OUT])(x, components, gates) - target(x)).square().mean(1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_coefficients_give_what_the_network_gives_at_any_mask(kind: str) -> None:
    target, components, x, needed = case(kind)
    free, rows = ~needed[0], (needed == needed[0]).all(1)
    x = x[rows]
    T = trilinear(target, components, x)
    b = bernstein(*monomials(T, needed[0]))
    generator = torch.Generator().manual_seed(1)
    for gate in torch.rand(20, len(free), generator=generator, dtype=torch.double):
        basis = torch.ones(1, dtype=torch.double)
        for g in gate[free]:
            powers = [math.comb(3, a) * g**a * (1 - g) ** (3 - a) for a in range(4)]
            basis = (basis[:, None] * torch.stack(powers)).flatten()
        gates = gate.masked_fill(~free, 1).float().expand(len(x), -1)
        with torch.no_grad():
            out = apd.Network(target, [HIDDEN, OUT])(x, components, gates)
        torch.testing.assert_close(torch.einsum("a,naq->nq", basis, b).float(), out, rtol=1e-4, atol=1e-5)


def test_halves_are_the_same_polynomial_on_half_the_box() -> None:
    b = torch.randn(3, 16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)

    def value(c: Tensor, s: float, t: float) -> Tensor:
        basis = [torch.tensor([math.comb(3, a) * u**a * (1 - u) ** (3 - a) for a in range(4)]) for u in (s, t)]
        return torch.einsum("a,b,kabq->kq", *(v.double() for v in basis), c.reshape(-1, 4, 4, 2))

    for axis in (0, 1):
        left, right = halve(b, axis, 2).chunk(2)
        for s, t in ((0.0, 0.3), (0.7, 1.0), (0.2, 0.9)):
            place = (s / 2, t) if axis == 0 else (s, t / 2)
            other = (s / 2 + 0.5, t) if axis == 0 else (s, t / 2 + 0.5)
            torch.testing.assert_close(value(left, s, t), value(b, *place), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(value(right, s, t), value(b, *other), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_no_mask_is_worse_than_the_bound_and_corners_are_those_of_brute_force(kind: str) -> None:
    target, components, x, needed = case(kind)
    found = bounds(target, components, x, needed)
    generator, corner = torch.Generator().manual_seed(2), torch.zeros(len(x))
    for mask in itertools.product((0.0, 1.0), repeat=components.n_components):
        gates = torch.tensor(mask).maximum(needed.float())
        corner = corner.maximum(errors(target, components, x, gates))
    torch.testing.assert_close(found.corner.float(), corner, rtol=1e-4, atol=1e-9)
    assert corner.max() > 0.01
    many = needed.float().repeat(1000, 1)  # masks of each input
    drawn = errors(target, components, x.repeat(1000, 1), torch.rand(many.shape, generator=generator).maximum(many))
    assert (drawn.reshape(1000, -1) <= (1 + 1e-4) * found.bound + 1e-9).all()
    steps = (found.corner, found.seen, found.bound, found.first, found.interval)
    for low, high in itertools.pairwise(steps):
        assert (low <= high * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_within_five_per_cent_of_what_ascent_finds(kind: str) -> None:
    target, components, x, needed = case(kind, most=12)
    found, starts = bounds(target, components, x, needed), 100
    many, needed = x.repeat(starts, 1), needed.float().repeat(starts, 1)
    network, wanted, best = apd.Network(target, [HIDDEN, OUT]), target(many).detach(), torch.zeros(len(many))
    gates = torch.rand(needed.shape, generator=torch.Generator().manual_seed(0))
    fixed = components.map(Tensor.detach)
    for step in range(60):
        gates = gates.maximum(needed).requires_grad_()
        error = (network(many, fixed, gates) - wanted).square().mean(1)
        best = best.maximum(error.detach())
        (slope,) = torch.autograd.grad(error.sum(), gates)
        gates = (gates.detach() + 0.2 * 0.93**step * slope.sign()).clamp(0, 1)
    best = best.reshape(starts, -1).amax(0)
    assert (best <= (1 + 1e-4) * found.bound + 1e-9).all()
    assert (found.bound <= 1.05 * best + 1e-9).all()


@pytest.mark.parametrize(("a", "b"), [(0.3, 0.1), (-0.2, 0.5), (-2.0, 0.1), (-1.0, -0.5), (-2.0, 1.3)])
def test_one_free_gate_has_a_closed_form(a: float, b: float) -> None:
    """All of the network, and a times what it reads with b times what it writes: (1 + a g)^2 (1 + b g) the outputs."""
    target = ModularArithmetic([ModularTask(5)])
    W = {path: w.detach() for path, w in apd.Network(target, [HIDDEN, OUT]).weights.items()}
    share = {HIDDEN: a, OUT: b}
    parts = {path: torch.stack([w, 0 * w, share[path] * w]) for path, w in W.items()}  # the second gate does nothing
    components, x = apd.Components.from_matrices(parts, 10), target.inputs()
    needed = torch.tensor([True, False, False]).expand(len(x), -1)
    found = bounds(target, components, x, needed)
    size = target(x).detach().double().square().mean(1)
    g = torch.linspace(0, 1, 100_001, dtype=torch.double)
    off = ((1 + a * g) ** 2 * (1 + b * g) - 1).square()
    torch.testing.assert_close(found.corner, off[-1] * size, rtol=1e-4, atol=1e-7)
    assert (found.bound >= off.max() * size * (1 - 1e-4) - 1e-7).all()
    assert (found.bound <= 1.021 * off.max() * size + 1e-7).all()
    if a > 0:  # all moves are to one side: intervals lose nothing
        torch.testing.assert_close(found.interval, found.corner)
    if a > -1:
        torch.testing.assert_close(found.bound, found.corner)
    if off.argmax() < len(g) - 1:  # between 0 and 1: what corners do not see
        assert (found.bound > 10 * found.corner).all()


def test_inputs_without_a_free_gate_have_the_error_of_that_mask() -> None:
    target, components, x, _ = case("task")
    every = torch.ones(len(x), components.n_components, dtype=torch.bool)
    found = bounds(target, components, x, every)
    for v in (found.corner, found.bound, found.interval):
        torch.testing.assert_close(v.float(), errors(target, components, x, every.float()), rtol=1e-4, atol=1e-9)


def test_what_is_needed_differs_from_input_to_input() -> None:
    target, components, x, needed = case("frequency")
    assert len(needed.unique(dim=0)) > 3
    found = bounds(target, components, x, needed)
    for i in range(0, len(x), 7):
        one = bounds(target, components, x[i : i + 1], needed[i : i + 1])
        torch.testing.assert_close(one.bound[0], found.bound[i], rtol=1e-9, atol=1e-12)
