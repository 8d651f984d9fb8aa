"""Every rule says how its module computes: rows times matrix, laid out again, plus bias."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import apd_minimal as apd
from apd_minimal.rules import TransposedLinear, rule


def check(module: nn.Module, x: Tensor) -> None:
    how = rule(module)
    weight = module.weight.detach()
    matrix = how.matrix(weight)
    assert matrix.ndim == 2
    assert torch.equal(how.weight(matrix), weight)
    out = module(x).detach()
    y = how.rows(x) @ matrix
    bias = getattr(module, "bias", None)
    torch.testing.assert_close(how.unrows(y if bias is None else y + bias.detach(), out), out)


@given(st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_linear_layers(d_in: int, d_out: int, bias: bool) -> None:
    for shape in [(2, d_in), (2, 3, d_in), (2, 3, 2, d_in)]:
        check(nn.Linear(d_in, d_out, bias=bias).double(), torch.rand(shape).double())
    encoder = nn.Linear(d_in, d_out).double()
    decoder = TransposedLinear(encoder)
    assert decoder.weight is encoder.weight
    check(decoder, torch.rand(2, d_out).double())


@given(st.integers(1, 5), st.integers(1, 3))
def test_embeddings(n: int, d: int) -> None:
    check(nn.Embedding(n, d).double(), torch.randint(0, n, (2, 4)))


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 3)),
    st.tuples(st.integers(0, 1), st.integers(0, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.booleans(),
)
def test_convolutions(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], bias: bool
) -> None:
    two = nn.Conv2d(2, 3, kernel, stride, padding, dilation, bias=bias).double()
    check(two, torch.rand(2, 2, 6, 7).double())
    one = nn.Conv1d(2, 3, kernel[0], stride[0], padding[0], dilation[0], bias=bias).double()
    check(one, torch.rand(2, 2, 7).double())


def test_unknown_kinds_are_named_with_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"Bilinear has no rule; known kinds: .*Conv1D, Conv1d, Conv2d, Conv"):
        apd.rules.rule(nn.Bilinear(2, 2, 2))
    with pytest.raises(TypeError) as raised:
        apd.rules.rule(nn.Bilinear(2, 2, 2))
    assert "RNN" not in str(raised.value)  # which has a rule that refuses it


def test_what_has_the_name_alone_or_the_size_alone_is_not_hugging_faces() -> None:
    sized = nn.Bilinear(2, 2, 2)
    sized.nf = 2  # type: ignore[assignment]
    for module in (type("Conv1D", (nn.Module,), {})(), sized):
        with pytest.raises(TypeError, match="has no rule"):
            apd.rules.rule(module)
