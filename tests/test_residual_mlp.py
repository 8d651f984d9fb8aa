"""The residual MLP against its definition, written out, and what it learns against the naive solution."""

from __future__ import annotations

import pytest
import torch

import apd_minimal as apd
from apd_minimal.targets import ResidualMLP


@pytest.mark.parametrize("neurons", [(4,), (3, 2), (2, 3, 2)])
def test_closed_form_and_composed(neurons: tuple[int, ...]) -> None:
    target = ResidualMLP(6, 20, neurons).double()
    x = torch.randn(30, 6, dtype=torch.float64)
    E = target.embedding
    r = x @ E
    for read, write in zip(target.read, target.write, strict=True):
        r = r + (r @ read.weight.T).clamp_min(0) @ write.weight.T
    torch.testing.assert_close(target(x), r @ E.T)
    torch.testing.assert_close(target.composed(x), target(x))
    torch.testing.assert_close(E.norm(dim=1), torch.ones(6, dtype=torch.float64))


def test_the_embedding_has_its_own_seed_and_is_not_trained() -> None:
    first, again = ResidualMLP(5, 30, (3,)), ResidualMLP(5, 30, (3,)).fit(seed=3, steps=3, batch_size=64)
    assert torch.equal(first.embedding, again.embedding)
    assert not torch.equal(first.embedding, ResidualMLP(5, 30, (3,), seed=1).embedding)
    assert set(first.weights) == {name for name, _ in first.named_parameters()}


def test_the_start_knows_nothing_of_the_embedding() -> None:
    target = ResidualMLP(20, 500, (10,), seed=3).fit(seed=3, steps=1, batch_size=8)
    reads = target.read[0].weight.detach()
    cosines = target.embedding @ (reads / reads.norm(dim=1, keepdim=True)).T
    assert cosines.abs().max() < 0.25  # chance gives 0.04, as standard deviation


def test_components_do_not_start_along_the_embedding() -> None:
    """With rank one a start from the embedding's own stream is the embedding, row by row."""
    target = ResidualMLP(20, 500, (10,), seed=3)
    result = apd.decompose(
        target, target.data(8), target.weights, 30, 1.0, rank=1, steps=1, lr=1e-12, seed=3, progress=False
    )
    starts = result.components.A["read.0.weight"].squeeze(-1)
    cosines = target.embedding @ (starts / starts.norm(dim=1, keepdim=True)).T
    assert cosines.abs().max() < 0.25


def test_fitting_is_reproducible_and_trains_every_layer() -> None:
    one, two = (ResidualMLP(8, 40, (3, 3)).fit(seed=5, steps=20, batch_size=128) for _ in range(2))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    other = ResidualMLP(8, 40, (3, 3)).fit(seed=6, steps=20, batch_size=128)
    assert all(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_it_learns_to_add_the_relu() -> None:
    target = ResidualMLP(10, 400, (10,), probability=0.05).fit(steps=1500, batch_size=512)
    x = target.data(4096)(0, torch.Generator().manual_seed(1))
    wanted = target.labels(x)
    with torch.no_grad():
        learned, untouched = (target(x) - wanted).square().mean(), (x - wanted).square().mean()
    assert learned < 0.2 * untouched, "as many neurons as features: nearly all can be computed"


def test_the_sizes_are_those_of_the_paper_unless_one_says_otherwise() -> None:
    """Compressed computation: 100 features, 50 neurons, a residual stream of 1000 (braun2025)."""
    target = ResidualMLP()
    assert target.embedding.shape == (100, 1000)
    assert [read.weight.shape for read in target.read] == [(50, 1000)]


def test_labels() -> None:
    x = torch.tensor([[-0.5, 0.0, 0.25]])
    assert ResidualMLP.labels(x).tolist() == [[-0.5, 0.0, 0.5]]


def test_contributions_are_products_of_reading_and_writing() -> None:
    target = ResidualMLP(4, 12, (3, 2))
    C = target.contributions()
    assert C.shape == (4, 5)
    E = target.embedding
    reads = target.read[1].weight @ E[2]  # of feature 2, by the neurons of the second layer
    writes = E[2] @ target.write[1].weight
    torch.testing.assert_close(C[2, 3:], reads * writes)


def test_decompose_reaches_both_weights() -> None:
    target = ResidualMLP(6, 20, (4,))
    result = apd.decompose(target, target.data(32), target.weights, 8, 1.0, rank=2, steps=3, progress=False)
    assert set(result.components.paths) == {"read.0.weight", "write.0.weight"}


@pytest.mark.parametrize("sizes", [(0, 5, (2,)), (3, 0, (2,)), (3, 5, (0,)), (3, 5, ())])
def test_sizes_are_checked(sizes: tuple[int, int, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ResidualMLP(*sizes)


def by_function(target: ResidualMLP) -> apd.Components:
    """A component for each function: what reads its feature, and what writes to its output; contributions by hand."""
    E = target.embedding
    dual = torch.linalg.pinv(E)  # [d_resid, F]: column i meets feature i alone
    A, B = {}, {}
    for i, (read, write) in enumerate(target.layers):
        A[f"read.{i}.weight"], B[f"read.{i}.weight"] = dual.T[:, :, None], (E @ read.weight.T)[:, None, :]
        A[f"write.{i}.weight"], B[f"write.{i}.weight"] = (write.weight.T @ E.T).T[:, :, None], dual.T[:, None, :]
    return apd.Components(A, B).map(lambda t: t.detach().contiguous())


@pytest.mark.parametrize("neurons", [(9,), (4, 5)])
def test_contributions_of_components(neurons: tuple[int, ...]) -> None:
    """Each function's part has its row and nothing else; ownership sees it, and sees what is wrong."""
    target = ResidualMLP(6, 40, neurons)
    rows, parts = target.contributions(), by_function(target)
    expected = torch.zeros(6, 6, sum(neurons))
    expected[torch.arange(6), torch.arange(6)] = rows
    torch.testing.assert_close(target.contributions(parts), expected, atol=1e-5, rtol=1e-4)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    own = target.ownership(parts.subset(order), 0.99, (0.9, 1.1), 0.98)
    assert own.complete
    assert own.owner.tolist() == order.argsort().tolist()

    short = parts.map(torch.clone)
    for path in short.paths:  # the contributions are products of two parts
        short.A[path][2] *= 0.6
    assert target.ownership(short).owned.tolist() == [True, True, False, True, True, True]
    assert target.ownership(short).length_ratio[2] == pytest.approx(0.36, rel=1e-3)

    both = apd.Components.from_matrices({path: parts.matrices(path).clone() for path in parts.paths})
    merged = {path: both.matrices(path) for path in both.paths}
    for matrices in merged.values():
        matrices[0] += matrices[1]
        matrices[1] = 0
    owned = target.ownership(apd.Components.from_matrices(merged)).owned
    assert not owned[0] and not owned[1] and owned[2:].all()


def test_how_long_an_owner_may_be() -> None:
    """By itself from half to one and a half of the function's length."""
    target = ResidualMLP(6, 40, (9,))
    parts = by_function(target)
    for factor, owned in ((0.45, False), (0.55, True), (1.45, True), (1.55, False)):
        one = parts.map(torch.clone)
        one.A["read.0.weight"][2] *= factor
        assert bool(target.ownership(one).owned[2]) is owned, factor


def test_weights_that_no_sample_reaches_decay_alone() -> None:
    """Without a gradient, AdamW multiplies them by 1 - lr / 100 each step, for lr from 3e-3 along a cosine to 0."""
    steps, parts = 400, []
    for n in (1, steps):
        target = ResidualMLP(3, 5, (2,), probability=1e-30).fit(seed=0, steps=n, batch_size=1)
        parts.append(torch.cat([weight.detach().flatten() for weight in target.parameters()]))
    rates = 1.5e-3 * (1 + torch.cos(torch.pi * torch.arange(steps) / steps))
    torch.testing.assert_close(
        parts[1] / parts[0], (1 - 0.01 * rates[1:]).prod().expand(len(parts[0])), rtol=1e-4, atol=0
    )


def test_the_recipe_is_that_of_decompose() -> None:
    target = ResidualMLP(6, 30, (3, 2), probability=0.2)
    trained_on, used = target.data(), target.recipe["batches"]
    assert (used.low, used.high, used.probability) == (trained_on.low, trained_on.high, trained_on.probability)
    result = apd.decompose(target, **{**target.recipe, "steps": 2}, progress=False)
    assert result.components.n_components == 12
    assert len(result.history["hidden"]) == 2
