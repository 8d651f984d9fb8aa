"""Dictionaries against hand-made numbers, loops and planted truths; other decompositions against their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.study import baselines
from apd_minimal.study import dictionaries as study
from apd_minimal.study.baselines import Dictionary
from apd_minimal.study.dictionaries import _revive


def tiny(kind: str = "relu", sparsity: float = 0.5, **options: Any) -> Dictionary:
    """Three features of two inputs, with weights that can be worked out by hand."""
    own = Dictionary([2], [2], 3, kind, sparsity, **options)
    own.encoder.data = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
    own.encoder_bias.data = torch.tensor([0.0, -1.0, -2.0])
    own.decoder.data = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
    own.decoder_bias.data = torch.tensor([0.5, -0.5])
    return own


X = torch.tensor([[1.0, 3.0], [-1.0, 0.5]])


def test_codes_outputs_and_losses_by_hand() -> None:
    own = tiny()
    torch.testing.assert_close(own.encode(X), torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(own(X), torch.tensor([[7.5, 11.5], [0.5, -0.5]]))
    error, penalty, _ = own.losses(X, X)
    assert error.item() == pytest.approx((6.5**2 + 8.5**2 + 1.5**2 + 1) / 2)
    # Codes count with the lengths of the decoder rows: 1, 2 and 5.
    assert penalty.item() == pytest.approx(0.5 * (1 * 1 + 2 * 2 + 2 * 5) / 2)
    # A crosscoder's length is the sum over its places: |3| + |4| in place of 5.
    own.writes = [1, 1]
    assert own.losses(X, X)[1].item() == pytest.approx(0.5 * (1 + 4 + 14) / 2)


def test_the_rate_falls_at_the_end_and_the_penalty_comes_in_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """In closed form: the rate in the last fifth falls to zero; the penalty has its full weight after a tenth."""
    steps, seen = 20, list[tuple[float, float]]()
    step = torch.optim.Adam.step

    def noted(optimiser: torch.optim.Adam, *args: Any) -> Any:
        (group,) = optimiser.param_groups
        bias = group["params"][-1]
        seen.append((group["lr"], 0.0 if bias.grad is None else float(bias.grad.sum())))
        return step(optimiser, *args)

    def losses(own: Dictionary, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        last = list(own.parameters())[-1]
        return 0 * last.sum(), last.sum() / last.numel(), own.encode(x)

    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    monkeypatch.setattr(Dictionary, "losses", losses)
    baselines.fit(nn.Linear(8, 3), sparse, "input of ", 4, steps=steps, lr=0.5, revive=0)
    for i, (rate, weight) in enumerate(seen):
        assert rate == pytest.approx(0.5 * (1.0 if i <= 16 else (20 - i) / 4))
        assert weight == pytest.approx(min(1.0, i / 2), abs=1e-6)
    assert len(seen) == steps


def test_the_output_bias_is_taken_off_first_where_it_is_centred() -> None:
    codes = tiny(centred=True).encode(X)
    torch.testing.assert_close(codes, torch.tensor([[0.5, 2.5, 2.0], [0.0, 0.0, 0.0]]))


def test_the_skip_path() -> None:
    own = tiny(skip=True)
    assert own.skip is not None
    torch.testing.assert_close(own(X), tiny()(X))  # it starts at zero
    own.skip.data = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    torch.testing.assert_close(own(X), tiny()(X) + torch.tensor([[6.0, 1.0], [1.0, -1.0]]))


@pytest.mark.parametrize("skip", [False, True])
def test_scales_change_units_and_nothing_else(skip: bool) -> None:
    own, scaled = tiny(skip=skip), tiny(skip=skip)
    if own.skip is not None and scaled.skip is not None:
        own.skip.data = scaled.skip.data = torch.tensor([[0.5, 1.0], [2.0, -3.0]])
    scaled.scale_in, scaled.scale_out = torch.tensor([2.0, 4.0]), torch.tensor([0.5, 10.0])
    torch.testing.assert_close(scaled.encode(X / torch.tensor([2.0, 4.0])), own.encode(X))
    out = scaled(X / torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(out, own(X) / torch.tensor([0.5, 10.0]))
    y = torch.randn(2, 2)
    losses = scaled.losses(X / torch.tensor([2.0, 4.0]), y / torch.tensor([0.5, 10.0]))
    torch.testing.assert_close(losses, own.losses(X, y))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 999))
def test_the_largest_codes_are_kept_as_by_a_loop(k: int, B: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, 3, generator=generator)
    plain, per_sample, per_batch = (Dictionary([3], [3], 6, kind, k, seed=seed) for kind in baselines.GRIDS)
    codes = plain.encode(x)
    for row, got in zip(codes.tolist(), per_sample.encode(x).tolist(), strict=True):
        for value, kept in zip(row, got, strict=True):
            assert kept == (value if sum(other > value for other in row) < k else 0.0)
    every = codes.flatten().tolist()
    for value, kept in zip(every, per_batch.encode(x).flatten().tolist(), strict=True):
        assert kept == (value if sum(other > value for other in every) < k * B else 0.0)


def test_outside_training_the_threshold_decides_not_the_batch() -> None:
    own = Dictionary([3], [3], 6, "batch_topk", 1.0).eval()
    own.threshold.fill_(0.4)
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    one_by_one = torch.cat([own.encode(row[None]) for row in x])
    torch.testing.assert_close(own.encode(x), one_by_one)
    assert own.encode(x)[own.encode(x) > 0].min() > 0.4


def test_the_gradient_of_the_penalty_is_the_closed_form() -> None:
    """d/dE_if of weight * mean_b sum_f c_bf |D_f| = weight |D_f| mean_b x_bi [c_bf > 0]."""
    own = Dictionary([4], [3], 5, "relu", 0.7, seed=3).double()
    own.decoder.data *= torch.rand(5, 1) + 0.5
    x = torch.randn(9, 4, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    _, penalty, codes = own.losses(x, torch.zeros(9, 3, dtype=torch.double))
    by_autograd = torch.autograd.grad(penalty, (own.encoder, own.decoder))
    on = (codes > 0).double()
    lengths = own.decoder.norm(dim=1)
    torch.testing.assert_close(by_autograd[0], 0.7 * lengths * (x.T @ on) / 9)
    torch.testing.assert_close(by_autograd[1], 0.7 * codes.mean(0)[:, None] * own.decoder / lengths[:, None])


class Planted(nn.Module):
    """Sparse inputs along random directions: places "mix" (a matrix), and "out" (another)."""

    def __init__(self, n: int = 8, d: int = 12) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.mix, self.out = nn.Linear(n, d, bias=False), nn.Linear(d, n, bias=False)
        for layer in (self.mix, self.out):
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator)
        self.mix.weight.data /= self.mix.weight.norm(dim=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(x))

    @property
    def true(self) -> Tensor:
        return self.mix.weight.detach().T


def sparse(step: int, generator: torch.Generator) -> Tensor:
    on = torch.rand(256, 8, generator=generator) < 0.12
    return on * (0.5 + torch.rand(256, 8, generator=generator))


PLANTED = Planted()


@pytest.mark.parametrize(("kind", "sparsity"), [("relu", 0.1), ("topk", 2), ("batch_topk", 1.0)])
@pytest.mark.parametrize("writes", [None, "output of mix"])
def test_a_planted_dictionary_is_found(kind: str, sparsity: float, writes: str | None) -> None:
    reads = "output of mix" if writes is None else "input of mix"
    own = baselines.fit(PLANTED, sparse, reads, 16, kind, sparsity, writes=writes, steps=800, lr=1e-2)
    torch.testing.assert_close(own.decoder.norm(dim=1), torch.ones(16))
    matching = baselines.match_directions(PLANTED.true, own.directions())
    assert (matching.similarity > 0.9).sum() >= 7, matching
    assert matching.mean > matching.chance.mean(1).max() + 0.1
    x = sparse(0, torch.Generator().manual_seed(77))
    y = PLANTED.mix(x)
    read = y if writes is None else x
    assert (own(read) - y).square().mean() < 0.1 * y.square().mean()


def test_a_crosscoder_over_two_places_finds_both_directions() -> None:
    own = baselines.fit(PLANTED, sparse, ["output of mix", "output of out"], 16, "batch_topk", 1.0, steps=800, lr=1e-2)
    assert own.reads == own.writes == [12, 8]
    first, second = own.directions().split([12, 8], 1)
    wanted = PLANTED.true, PLANTED.true @ PLANTED.out.weight.detach().T
    matchings = [baselines.match_directions(w, f) for w, f in zip(wanted, (first, second), strict=True)]
    assert all((m.similarity > 0.95).sum() >= 7 for m in matchings), [str(m) for m in matchings]


def test_activations_are_what_stands_there_and_replaced_puts_others_there() -> None:
    x = sparse(0, torch.Generator().manual_seed(1))
    hidden, seen, out = baselines.activations(PLANTED, x, ["output of mix", "input of out", "output of "])
    torch.testing.assert_close(hidden, PLANTED.mix(x))
    torch.testing.assert_close(seen, hidden)
    torch.testing.assert_close(out, PLANTED(x))
    other = torch.randn_like(hidden)
    for place in ("output of mix", "input of out"):
        torch.testing.assert_close(baselines.replaced(PLANTED, x, place, [other]), PLANTED.out(other))
    with pytest.raises(ValueError, match="never reached"):
        baselines.activations(Unused(), x, "output of spare")


def test_values_stand_at_every_position() -> None:
    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))  # [B, T, d]
    (hidden,) = baselines.activations(PLANTED, x, "output of mix")
    assert hidden.shape == (15, 12)
    out = baselines.replaced(PLANTED, x, "output of mix", [2 * hidden])
    torch.testing.assert_close(out, 2 * PLANTED(x))
    with pytest.raises(ValueError, match=r"values must be of shape \[15, 12\]"):
        baselines.replaced(PLANTED, x, "output of mix", [hidden[:5]])


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x


def exact() -> Dictionary:
    """The transcoder that is the planted matrix: each input is a feature."""
    own = Dictionary([8], [12], 8, "relu", 0.0)
    lengths = PLANTED.true.norm(dim=1)
    own.encoder.data, own.decoder.data = torch.diag(lengths), PLANTED.true / lengths[:, None]
    return own


def test_a_transcoder_that_is_the_layer_has_the_layers_columns_as_components() -> None:
    components = baselines.transcoded(exact(), "mix.weight")
    want = torch.eye(8)[:, :, None] * PLANTED.true[:, None, :]
    torch.testing.assert_close(components.matrices("mix.weight"), want)
    own = exact()
    own.scale_in, own.scale_out = torch.full((8,), 3.0), torch.full((12,), 3.0)
    torch.testing.assert_close(baselines.transcoded(own, "mix.weight").matrices("mix.weight"), want)
    assert apd.metrics.ownership(components, {"mix.weight": want}).complete


def test_a_skip_path_is_one_more_component() -> None:
    own = Dictionary([8], [12], 2, skip=True)
    assert own.skip is not None
    own.skip.data = torch.randn(8, 12)
    components = baselines.transcoded(own, ["mix.weight"])
    assert components.n_components == 3
    torch.testing.assert_close(components.matrices("mix.weight")[2], own.skip.data)


def test_bits_of_a_dictionary_are_those_of_the_same_components() -> None:
    """Where the features are the inputs, leaving out a code and leaving out a component are the same."""
    x = sparse(0, torch.Generator().manual_seed(3))
    got = baselines.costs(PLANTED, exact(), x, "input of mix", "output of mix", [0.02, 0.2])
    variance = (PLANTED(x) - PLANTED(x).mean(0)).square().mean()
    sizes = (x * PLANTED.true.norm(dim=1)).flatten()
    for cost, epsilon in zip(got, (0.02, 0.2), strict=True):
        n = round(cost.active * len(x))
        left = torch.zeros(x.numel()).scatter(0, sizes.argsort(descending=True, stable=True)[:n], 1.0).view_as(x) * x
        error = (PLANTED(left) - PLANTED(x)).square().mean() / variance
        assert cost.error == pytest.approx(error.item(), rel=1e-4) and error <= epsilon
        assert cost.ranks == cost.active and cost.in_use == 8
    exact_skip = Dictionary([8], [12], 1, skip=True)
    exact_skip.decoder.data *= 0
    assert exact_skip.skip is not None
    exact_skip.skip.data = PLANTED.true.clone()
    (cost,) = baselines.costs(PLANTED, exact_skip, x, "input of mix", "output of mix", [0.01])
    assert (cost.active, cost.ranks) == (1.0, 8.0)


def test_singular_vectors_sum_to_the_weights_one_at_a_time() -> None:
    weights = {"a": torch.randn(4, 3), "b": torch.randn(3, 5)}
    components = baselines.singular(weights)
    assert components.n_components == 6
    for path, w in weights.items():
        torch.testing.assert_close(components.sum(path), w)
    torch.testing.assert_close(components.norms()[:3], torch.linalg.svdvals(weights["a"]))
    assert not components.matrices("b")[:3].any() and not components.matrices("a")[3:].any()
    flat = components.flat()
    torch.testing.assert_close(flat @ flat.T, torch.diag(components.norms().square()), atol=1e-5, rtol=1e-5)


def test_neurons_sum_to_the_weights_and_span_what_goes_in_and_out() -> None:
    weights = {"in": torch.randn(4, 3), "out": torch.randn(3, 5), "last": torch.randn(5, 2)}
    components = baselines.neurons(weights, [{"in": "output", "out": "input"}, {"last": "output"}])
    assert components.n_components == 5
    for path, w in weights.items():
        torch.testing.assert_close(components.sum(path), w)
    want = torch.zeros(4, 3)
    want[:, 1] = weights["in"][:, 1]
    torch.testing.assert_close(components.matrices("in")[1], want)
    assert components.matrices("out")[1].nonzero()[:, 0].unique().tolist() == [1]
    with pytest.raises(ValueError, match="must name every weight once"):
        baselines.neurons(weights, [{"in": "output"}])


def test_directions_are_matched_one_to_one() -> None:
    true = torch.eye(4)
    found = torch.stack([true[2], true[0] + 0.1 * true[1], true[0], -true[3], true[1] + true[2]])
    matching = baselines.match_directions(true, found)
    assert dict(zip(matching.first.tolist(), matching.second.tolist(), strict=True))[0] in (1, 2)
    assert dict(zip(matching.first.tolist(), matching.second.tolist(), strict=True))[2] == 0
    assert matching.similarity[3] < 0.01  # the opposite direction is none
    assert matching.chance.shape == (20, 4) and 0.3 < matching.chance.mean() < 0.8


def test_splitting_is_counted() -> None:
    true = torch.eye(3)
    found = torch.tensor([[1.0, 0, 0], [1.0, 0.2, 0], [0, 1.0, 0.9], [-1.0, 0, 0], [0, 0, 0]])
    assert baselines.copies(true, found).tolist() == [2, 0, 0]
    Z = torch.zeros(2, 2, 3)
    Z[0, 0], Z[1, 1] = torch.tensor([1.0, 2, 2]), torch.tensor([0.0, 1, 0])
    parts = apd.Components.from_matrices({"w": torch.stack([0.55 * Z[0], 0.4 * Z[0] + Z[1], 0.05 * Z[0]])})
    assert baselines.owners(parts, {"w": Z}).tolist() == [2, 1]


def test_the_sparsity_is_chosen_by_bits() -> None:
    chosen = baselines.choose(
        PLANTED,
        sparse,
        "input of mix",
        16,
        "batch_topk",
        [0.2, 1.5, 16],
        writes="output of mix",
        steps=300,
        lr=1e-2,
        epsilons=[0.1],
    )
    means = [sum(row["bits"]) for row in chosen.tried]
    assert [row["sparsity"] for row in chosen.tried] == [0.2, 1.5, 16]
    assert chosen.sparsity == 1.5 and means[1] == min(means) and math.isfinite(means[1])
    assert chosen.best.sparsity == 1.5


def test_the_same_seed_gives_the_same_dictionary_and_another_another() -> None:
    a, b, c = (baselines.fit(PLANTED, sparse, "output of mix", 8, steps=40, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.decoder, b.decoder) and not torch.equal(a.decoder, c.decoder)


def test_silent_features_start_anew() -> None:
    """With a bias that silences all but one, the others are heard again only if they start anew."""
    silent = []
    for revive in (0, 4):
        own = baselines.fit(PLANTED, sparse, "output of mix", 40, "topk", 1, steps=300, lr=1e-2, revive=revive)
        x = PLANTED.mix(sparse(0, torch.Generator().manual_seed(9)))
        silent.append(int((own.encode(x) == 0).all(0).sum()))
    assert silent[1] < silent[0]


@pytest.mark.parametrize(("steps", "revive", "after"), [(100, 4, [10, 20, 30, 40]), (9, 1, [2]), (3, 2, [1, 2])])
def test_they_start_anew_so_many_times_evenly_in_the_first_half(
    steps: int, revive: int, after: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, seen = [0], list[int]()
    step = torch.optim.Adam.step

    def counted(optimiser: torch.optim.Adam, *args: Any) -> Any:
        taken[0] += 1
        return step(optimiser, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", counted)
    monkeypatch.setattr(study, "_revive", lambda *_: seen.append(taken[0]))
    baselines.fit(PLANTED, sparse, "output of mix", 4, steps=steps, revive=revive)
    assert seen == after


@pytest.mark.parametrize("silent", [[False, True, False], [True, True, True]])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_whatever_is_silent_points_at_errors_of_any_size(silent: list[bool], size: float) -> None:
    """Also if all features are, and if hardly any error is left."""
    own, which = tiny(), torch.tensor(silent)
    optimiser = torch.optim.Adam(own.parameters(), 1e-3)
    error, penalty, _ = own.losses(X, X)
    (error + penalty).backward()
    optimiser.step()
    before = own.decoder.detach().clone()
    away = size * torch.tensor([[0.6, 0.8], [-1.0, 0.0]])
    _revive(own, optimiser, which, X, own(X).detach() + away, torch.Generator().manual_seed(0))
    assert all(t.isfinite().all() for t in own.parameters())
    cosines = own.decoder.detach()[which] @ (away / size).T
    torch.testing.assert_close(cosines.amax(1), torch.ones(sum(silent)), atol=1e-3, rtol=0)
    torch.testing.assert_close(own.decoder.detach()[~which], before[~which])
    lengths = own.encoder.detach().norm(dim=0)  # of what they read: as those of the others
    expected = torch.tensor(1.0) if all(silent) else lengths[~which].mean()
    torch.testing.assert_close(lengths[which], expected.expand(sum(silent)))
    assert not own.encoder_bias[which].any() and not optimiser.state[own.decoder]["exp_avg"][which].any()


def test_the_target_is_left_as_it_was() -> None:
    target = Planted().train()
    before = {name: t.clone() for name, t in target.state_dict().items()}
    baselines.fit(target, sparse, "output of mix", 4, steps=3)
    assert target.training and all(torch.equal(before[name], t) for name, t in target.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in target.modules())


@pytest.mark.parametrize("kind", ["relu", "batch_topk"])
def test_a_list_of_exactly_as_many_batches_as_steps_is_enough(kind: str) -> None:
    target = apd.targets.TMS(5, 2)
    source = target.data(32, nonempty=True)
    generator = torch.Generator().manual_seed(0)
    items = [source(step, generator) for step in range(5)]
    own = apd.baselines.fit(target, lambda step, generator: items[step], "output of encode", 6, kind, 1.0, steps=5)
    assert torch.isfinite(own.decoder).all()
    chosen = apd.baselines.choose(
        target, lambda step, generator: items[step], "output of encode", 6, kind, [1.0], steps=5
    )
    torch.testing.assert_close(chosen.best.decoder, own.decoder)


def test_read_directions_are_those_along_which_codes_grow() -> None:
    own = tiny()
    own.scale_in = torch.tensor([2.0, 4.0])
    x = torch.full((1, 2), 5.0, requires_grad=True)  # where all are on
    codes, found = own.encode(x)[0], own.directions("read")
    assert not found.requires_grad
    for code, direction in zip(codes, found, strict=True):
        (slope,) = torch.autograd.grad(code, x, retain_graph=True)
        torch.testing.assert_close(direction, slope[0] / slope.norm())


def test_the_first_input_of_a_module_with_two_is_a_place() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.join = nn.Bilinear(3, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.join(x, x + 1)

    target, x, other = Two(), torch.randn(4, 3), torch.randn(4, 3)
    (seen,) = baselines.activations(target, x, "input of join")
    torch.testing.assert_close(seen, x)
    torch.testing.assert_close(baselines.replaced(target, x, "input of join", [other]), target.join(other, x + 1))


def test_a_dictionary_is_trained_on_draws_of_its_own() -> None:
    """Not on those that a target of the same seed had, and the same as ever, so that results can be made again."""
    seen: list[Tensor] = []

    def source(step: int, generator: torch.Generator) -> Tensor:
        seen.append(sparse(step, generator))
        return seen[-1]

    baselines.fit(PLANTED, source, "output of mix", 4, steps=3, seed=7)
    for seed, same in ((7 + 3_000_000_019, True), (7, False)):
        generator = torch.Generator().manual_seed(seed)
        assert all(torch.equal(x, sparse(0, generator)) for x in seen[:3]) is same


def test_any_seed_that_a_run_may_have_is_one_for_a_choice() -> None:
    arguments: dict[str, Any] = {"reads": "output of mix", "n_features": 4, "kind": "relu"}
    chosen = baselines.choose(PLANTED, sparse, **arguments, grid=[0.1], epsilons=[0.5], steps=2, seed=2**62)
    direct = baselines.fit(PLANTED, sparse, **arguments, sparsity=0.1, steps=2, seed=2**62)
    assert torch.equal(chosen.best.decoder, direct.decoder)
    with pytest.raises(ValueError, match="seed must be"):
        baselines.choose(PLANTED, sparse, **arguments, grid=[0.1], seed=2**62 + 1)


def test_the_smallest_cosine_and_the_smallest_share_are_enough() -> None:
    """And what has no direction is a copy of nothing, however little is asked."""
    found = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    for least, counts in ((0.9, [1, 1]), (0.0, [2, 2]), (-1.0, [2, 2])):
        assert baselines.copies(torch.eye(2), found, least).tolist() == counts
    twice = torch.eye(2).repeat(2, 1)
    shares = torch.tensor([0.5, 0.5, 0.25, 0.25])[:, None, None]
    parts, Z = apd.Components({"w": twice[:, :, None]}, {"w": shares * twice[:, None]}), torch.diag_embed(torch.eye(2))
    for least, n in ((0.25, 2), (0.5, 1)):
        assert baselines.owners(parts, {"w": Z}, least).tolist() == [n, n]
