"""Dictionaries against SAELens' own classes, in an environment of its own: `make saelens` (not part of `make test`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.transcoder import SkipTranscoder, SkipTranscoderConfig, Transcoder, TranscoderConfig
from torch import Tensor

from apd_minimal.study.baselines import Dictionary, match_directions

D, F = 6, 16
L1 = 0.2
SPARSITY = {"relu": L1, "topk": 3, "batch_topk": 2.5}


def theirs(kind: str) -> Any:
    options: dict[str, Any] = {"d_in": D, "d_sae": F, "device": "cpu", "dtype": "float32"}
    if kind == "relu":
        return StandardTrainingSAE(StandardTrainingSAEConfig(**options, l1_coefficient=L1, apply_b_dec_to_input=True))
    if kind == "topk":
        return TopKTrainingSAE(TopKTrainingSAEConfig(**options, k=3, apply_b_dec_to_input=True))
    return BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**options, k=2.5, apply_b_dec_to_input=True))


def step(x: Tensor) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x, coefficients={"l1": L1}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False
    )


def copied(own: Dictionary, other: Any) -> None:
    """Give another dictionary the same weights."""
    with torch.no_grad():
        other.W_enc.copy_(own.encoder)
        other.b_enc.copy_(own.encoder_bias)
        other.W_dec.copy_(own.decoder)
        other.b_dec.copy_(own.decoder_bias)


def dictionary(kind: str, seed: int = 0) -> Dictionary:
    own = Dictionary([D], [D], F, kind, SPARSITY[kind], centred=True, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    own.encoder.data = torch.randn(D, F, generator=generator)
    own.encoder_bias.data = 0.3 * torch.randn(F, generator=generator)
    own.decoder_bias.data = 0.3 * torch.randn(D, generator=generator)
    return own


def batch(seed: int, n: int = 64) -> Tensor:
    """Sparse features along random directions."""
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(n, 8, generator=generator) < 0.15
    return (on * (0.5 + torch.rand(n, 8, generator=generator))) @ TRUE


TRUE = torch.nn.functional.normalize(torch.randn(8, D, generator=torch.Generator().manual_seed(99)), dim=1)


@pytest.mark.parametrize("kind", SPARSITY)
@pytest.mark.parametrize("seed", range(3))
def test_the_same_weights_give_the_same_codes_reconstructions_and_losses(kind: str, seed: int) -> None:
    own, other, x = dictionary(kind, seed), theirs(kind), batch(seed)
    copied(own, other)
    out = other.training_forward_pass(step(x))
    error, penalty, codes = own.losses(x, x)
    torch.testing.assert_close(codes, out.feature_acts)
    torch.testing.assert_close(own(x), out.sae_out)
    torch.testing.assert_close(error, out.losses["mse_loss"])
    torch.testing.assert_close(error + penalty, out.loss)
    assert (codes > 0).any()


def test_outside_training_batch_topk_is_a_jumprelu() -> None:
    own, x = dictionary("batch_topk").eval(), batch(5)
    own.threshold.fill_(0.6)
    other = JumpReLUSAE(JumpReLUSAEConfig(d_in=D, d_sae=F, device="cpu", apply_b_dec_to_input=True))
    copied(own, other)
    with torch.no_grad():
        other.threshold.fill_(0.6)
    torch.testing.assert_close(own.encode(x), other.encode(x))
    torch.testing.assert_close(own(x), other(x))


@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_agree(skip: bool) -> None:
    own = Dictionary([D], [4], F, "relu", L1, skip=skip, seed=3)
    options: dict[str, Any] = {"d_in": D, "d_out": 4, "d_sae": F, "device": "cpu", "apply_b_dec_to_input": False}
    other = SkipTranscoder(SkipTranscoderConfig(**options)) if skip else Transcoder(TranscoderConfig(**options))
    generator = torch.Generator().manual_seed(4)
    for parameter in own.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    copied(own, other)
    if skip:
        with torch.no_grad():
            other.W_skip.copy_(own.skip.T)
    x = batch(6)
    torch.testing.assert_close(own.encode(x), other.encode(x))
    torch.testing.assert_close(own(x), other(x))


@pytest.mark.parametrize("kind", SPARSITY)
def test_a_short_training_agrees(kind: str) -> None:
    """Adam on their loss and on ours from the same weights, decoder rows scaled to unit length after each step."""
    own, other = dictionary(kind), theirs(kind)
    copied(own, other)
    first = Dictionary.directions(own).clone()
    ours = torch.optim.Adam([own.encoder, own.encoder_bias, own.decoder, own.decoder_bias], 3e-3)
    their = torch.optim.Adam([other.W_enc, other.b_enc, other.W_dec, other.b_dec], 3e-3)
    for i in range(100):
        x = batch(1000 + i)
        error, penalty, _ = own.losses(x, x)
        ours.zero_grad()
        (error + penalty).backward()
        ours.step()
        own.normalise()
        their.zero_grad()
        out = other.training_forward_pass(step(x))
        out.loss.backward()
        their.step()
        with torch.no_grad():
            other.W_dec.div_(other.W_dec.norm(dim=1, keepdim=True))
    torch.testing.assert_close((error + penalty).detach(), out.loss.detach(), rtol=1e-3, atol=1e-4)
    for mine, yours in ((own.encoder, other.W_enc), (own.decoder, other.W_dec), (own.decoder_bias, other.b_dec)):
        torch.testing.assert_close(mine, yours, rtol=1e-3, atol=1e-3)
    matching = match_directions(own.directions(), other.W_dec.detach())
    assert matching.similarity.min() > 0.9999
    moved = torch.nn.functional.cosine_similarity(first, own.directions())
    assert moved.min() < 0.999  # they have learned
