"""Parts tied by a shift of the tokens, against brute force: the function, the class, its size, prices, attributions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import apd_minimal as apd
from experiments import tied
from experiments.tied import HIDDEN, OUT, Tied, shares, shuffled, target_of

P, F = 13, 6


def drawn(model: Tied, n: int, seed: int = 0, restarts: int | None = None) -> apd.Components:
    generator = torch.Generator().manual_seed(seed)
    return apd.Components.random(dict.fromkeys(model.weights, (2, 1)), n, restarts=restarts, std=1, generator=generator)


def inputs(kind: str) -> Tensor:
    """Every pair, with switches as they are drawn."""
    target = target_of(kind)
    x = target.inputs()
    opens = torch.rand(len(x), len(target.opens), generator=torch.Generator().manual_seed(1)) < 0.5
    return torch.cat([x[:, : 2 * P], opens.float()], 1)


def shift(x: Tensor, a: int, b: int) -> Tensor:
    return torch.cat([x[:, :P].roll(a, 1), x[:, P : 2 * P].roll(b, 1), x[:, 2 * P :]], 1)


@pytest.mark.parametrize("kind", ["always", "switched"])
def test_the_tied_network_computes_what_the_target_does_also_with_gated_parts(kind: str) -> None:
    target, x = target_of(kind), inputs(kind)
    model = Tied(target)
    torch.testing.assert_close(model(x), target(x), atol=1e-5, rtol=0)
    components = drawn(model, 4)
    gates = torch.rand(len(x), 4, generator=torch.Generator().manual_seed(2))
    own, whole = apd.Network(model, model.weights), apd.Network(target, [HIDDEN, OUT])
    scores = whole(x, model.whole(components), gates)
    torch.testing.assert_close(own(x, components, gates), scores, atol=1e-5 * float(scores.abs().max()), rtol=0)


def actions(target: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    """What shifts of a and of b do to the rows of the first matrix, and what a shift of answers does to the second."""
    weights = apd.Network(target, [HIDDEN, OUT]).weights
    W, V = (weights[path].detach().double() for path in (HIDDEN, OUT))
    moves = {"a": torch.block_diag(torch.eye(P).roll(1, 0), torch.eye(P)).double()}
    moves["b"] = torch.block_diag(torch.eye(P), torch.eye(P).roll(1, 0)).double()
    inside = {name: torch.linalg.pinv(W, rtol=1e-5) @ S @ W for name, S in moves.items()}
    return moves, inside, V.roll(1, 1) @ torch.linalg.pinv(V, rtol=1e-5), W


def test_shifts_map_tied_parts_to_themselves_and_tokens_not() -> None:
    target = target_of("always")
    model = Tied(target)
    moves, inside, answers, W = actions(target)
    parts = model.whole(drawn(model, 5))
    read, write = (parts.matrices(path).double() for path in (HIDDEN, OUT))
    tokens = torch.eye(2 * P).double()[:, :, None] * W
    for name, S in moves.items():
        torch.testing.assert_close(S @ read, read @ inside[name], atol=1e-4, rtol=0)
        off = (S @ tokens - tokens @ inside[name]).flatten(1).norm(dim=1) / tokens.flatten(1).norm(dim=1)
        assert (off > 0.5).sum() == P  # of the number that is shifted
    torch.testing.assert_close(write.roll(1, 2), answers @ write, atol=1e-4, rtol=0)
    # The class holds 1 / p of a token's squared length.
    one = torch.eye(len(model.weights))[:, :, None]  # [component, weight, 1]
    basis = []
    for turn in ([1.0, 0.0], [0.0, 1.0]):
        A = {path: one[:, i, :, None] * torch.tensor(turn)[:, None] for i, path in enumerate(model.weights)}
        basis.append(model.whole(apd.Components(A, {path: torch.ones(len(one), 1, 1) for path in A})).matrices(HIDDEN))
    flat = torch.cat(basis).flatten(1).double()
    flat = flat[flat.norm(dim=1) > 0.1]
    held = tokens.flatten(1) @ torch.linalg.qr(flat.T).Q
    share = held.square().sum(1) / tokens.flatten(1).square().sum(1)
    torch.testing.assert_close(share, torch.full_like(share, 1 / P), atol=1e-5, rtol=0)


def test_nothing_else_is_tied() -> None:
    """Count the solutions of the equations: one complex number for each of 12 blocks read and 6 written."""
    target = target_of("always")
    moves, inside, answers, W = actions(target)
    rows = torch.linalg.svd(W).Vh[: 4 * F]  # parts outside of what the matrix writes cannot turn with it
    one, eye = torch.eye(2 * P).double(), torch.eye(4 * F).double()
    equations = [
        torch.kron(S, eye) - torch.kron(one, (rows @ inside[name] @ rows.T).T.contiguous()) for name, S in moves.items()
    ]
    sizes = torch.linalg.svdvals(torch.cat(equations))
    parts = Tied(target).whole(drawn(Tied(target), 60))
    rank = {path: int(torch.linalg.matrix_rank(parts.matrices(path).flatten(1), rtol=1e-4)) for path in parts.paths}
    assert int((sizes < 1e-4).sum()) == 2 * 2 * F == rank[HIDDEN] and sizes[-2 * 2 * F - 1] > 0.1
    V = torch.linalg.svd(target.out.weight.detach().double().T).U[:, : 2 * F]
    turn = V.T @ answers @ V
    back = torch.eye(P).double().roll(1, 1)  # M @ back shifts the columns of M
    sizes = torch.linalg.svdvals(
        torch.kron(torch.eye(2 * F).double(), back.T.contiguous()) - torch.kron(turn, torch.eye(P).double())
    )
    assert int((sizes < 1e-4).sum()) == 2 * F == rank[OUT] and sizes[-2 * F - 1] > 0.1


@pytest.mark.parametrize("kind", ["always", "switched"])
def test_what_tied_parts_do_is_shifted_with_the_tokens_and_attributions_do_not_see_them(kind: str) -> None:
    target, x = target_of(kind), inputs(kind)
    model = Tied(target)
    components, gates = drawn(model, 4), torch.rand(4, generator=torch.Generator().manual_seed(2)).expand(len(x), 4)
    network = apd.Network(model, model.weights)
    y = network(x, components, gates)
    moved = network(shift(x, 2, 5), components, gates)
    torch.testing.assert_close(moved, y.roll(7, 1), atol=1e-5 * float(y.abs().max()), rtol=0)
    scores = model.attribution(network, components, x)
    torch.testing.assert_close(model.attribution(network, components, shift(x, 3, 1)), scores)
    whole = apd.Network(target, [HIDDEN, OUT])
    torch.testing.assert_close(
        scores, apd.attributions.gradient(whole, model.whole(components), x), atol=1e-5, rtol=1e-4
    )
    stacked = drawn(model, 4, restarts=2)
    each = [model.attribution(network, stacked.restart(r), x) for r in range(2)]
    torch.testing.assert_close(model.attribution(network, stacked, x), torch.stack(each))


def test_losses_are_those_of_whole_matrices_and_a_deal_of_blocks_costs_what_frequencies_cost() -> None:
    target = target_of("always")
    model = Tied(target)
    network, whole = apd.Network(model, model.weights), apd.Network(target, [HIDDEN, OUT])
    components, mask = drawn(model, 3), torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    asked, given = tied.settings_of(("switched", "untied", 6, 0)), tied.settings_of(("switched", "tied", 6, 0))
    pairs = (
        (apd.losses.faithfulness(components, network.weights), "faithfulness"),
        (apd.losses.simplicity(components, mask, 0.9), "simplicity"),
    )
    full = model.whole(components)
    wanted = apd.losses.faithfulness(full, whole.weights), apd.losses.simplicity_exact(full, mask, 0.9)
    for (own, name), loss in zip(pairs, wanted, strict=True):
        weights = [s[name] if name == "faithfulness" else s[name][0][1] for s in (given, asked)]
        torch.testing.assert_close(weights[0] * own, weights[1] * loss, rtol=1e-3, atol=0)
    # Who has which block makes no difference, as long as all are on.
    pick = torch.randint(6, (len(model.weights),), generator=torch.Generator().manual_seed(0))
    kinds = {"frequencies": torch.arange(3 * F) // 3, "lump": torch.zeros(3 * F, dtype=torch.long), "dealt": pick}
    prices = []
    for owner in kinds.values():
        B = {path: (owner[i] == torch.arange(6)).float()[:, None, None] for i, path in enumerate(model.weights)}
        A = {path: network.weights[path].detach().expand(6, 2, 1) for path in B}
        made = model.whole(apd.Components(A, B))
        assert apd.metrics.relative_faithfulness(made, whole.weights) < 1e-6
        prices.append(apd.losses.simplicity_exact(made, torch.ones(1, 6), 0.9))
    torch.testing.assert_close(torch.stack(prices), prices[0].expand(3), rtol=1e-4, atol=0)


def test_shares_of_known_parts_and_of_blocks_drawn_anew() -> None:
    target = target_of("always")
    model, truth, made = Tied(target), target.mechanisms(), apd.Components.from_matrices
    assert shares(made(truth)) == {"wave": 1, "token": pytest.approx(1 / 26, abs=1e-4), "used": 6}
    lump = shares(made({path: m.sum(0)[None] for path, m in truth.items()}))
    assert lump == {"wave": pytest.approx(1 / 6, abs=1e-4), "token": pytest.approx(1 / 26, abs=1e-4), "used": 1}
    others = shares(made({HIDDEN: truth[HIDDEN], OUT: truth[OUT].roll(1, 0)}))  # each writes the next one's wave
    assert others["wave"] == pytest.approx(2 / 3, abs=1e-4)  # of three blocks of one length
    W = truth[HIDDEN].sum(0)
    tokens = made({HIDDEN: torch.eye(2 * P)[:, :, None] * W, OUT: torch.zeros(2 * P, *truth[OUT].shape[1:])})
    assert shares(tokens) == {"wave": pytest.approx(1 / 6, abs=1e-4), "token": 1, "used": 2 * P}
    components = drawn(model, 6)
    anew = shuffled(components, 3)
    for path in model.weights:
        torch.testing.assert_close(anew.sum(path), components.sum(path))
    moved = [(anew.matrices(p) - components.matrices(p)).abs().max() > 0.1 for p in model.weights]
    assert sum(moved) > 10 and len({tuple(anew.matrices(p)[:, 0, 0].argsort().tolist()) for p in model.weights}) > 3
