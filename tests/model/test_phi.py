"""Properties of the model that hold without another implementation to compare with."""

import pytest
import torch

from kernels.ops import DropoutSeed
from megaphi.config import Model
from megaphi.model.attention import AttentionOptions, Sequences, attention, causal_mask
from megaphi.model.init import initial_value, initialize
from megaphi.model.phi import Phi

SMALL = Model(
    num_layers=2,
    hidden_size=64,
    num_heads=2,
    vocab_size=101,
    max_sequence_length=32,
    residual_dropout=0.3,
    attention_dropout=0.3,
)


@pytest.fixture(scope="module")
def phi() -> Phi:
    """A small model with weights from seed 3."""
    model = Phi(SMALL)
    initialize(model.named_parameters(), SMALL, seed=3)
    return model


def test_a_token_does_not_see_the_future(phi: Phi) -> None:
    tokens = torch.randint(0, 101, (1, 20))
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 101
    before, after = phi(tokens), phi(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_loss_is_the_cross_entropy_of_the_logits(phi: Phi) -> None:
    tokens = torch.randint(0, 101, (3, 21))
    loss = phi(tokens[:, :-1], tokens[:, 1:])
    logits = phi(tokens[:, :-1]).double()
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_dropout_does_not_depend_on_the_cut_into_micro_batches(phi: Phi) -> None:
    """Residual and attention dropout: two micro-batches lose as much as one of both."""
    tokens = torch.randint(0, 101, (4, 17))

    def loss(rows: slice) -> float:
        seed = DropoutSeed(seed=9, step=5, first_token=(rows.start or 0) * 16)
        return float(phi(tokens[rows, :-1], tokens[rows, 1:], dropout=seed).detach())

    whole = loss(slice(0, 4))
    assert loss(slice(0, 2)) + loss(slice(2, 4)) == pytest.approx(whole, rel=1e-6)
    without = float(phi(tokens[:, :-1], tokens[:, 1:]).detach())
    assert abs(whole - without) > 1e-3


def test_plain_attention_with_dropout_equals_the_formula() -> None:
    """The mask scales the softmax weights; the mean over many masks is no dropout."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    exact = attention(q, k, v)
    draws = [
        attention(
            q,
            k,
            v,
            AttentionOptions(dropout_probability=0.2),
            Sequences(dropout=DropoutSeed(seed=s, step=1, first_token=0)),
        )
        for s in range(600)
    ]
    mean = torch.stack(draws).mean(0)
    spread = torch.stack(draws).std(0) / 600**0.5
    assert float(((mean - exact).abs() / (spread + 1e-6)).max()) < 6
    assert not torch.allclose(draws[0], exact)


def test_masked_attention_equals_float64_softmax() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    key_mask = torch.tensor([[True] * 5, [False, False, True, True, True]])
    scores = (q.double() @ k.double().transpose(-1, -2)) / 8**0.5
    visible = causal_mask(3, 5, q.device)[None, None] & key_mask[:, None, None, :]
    expected = scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v.double()
    result = attention(q, k, v, sequences=Sequences(key_mask_bs=key_mask))
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    shape = torch.Size((64, 64))
    first = initial_value("blocks.0.qkv.weight", shape, SMALL, 1)
    assert torch.equal(first, initial_value("blocks.0.qkv.weight", shape, SMALL, 1))
    assert not torch.equal(first, initial_value("blocks.1.qkv.weight", shape, SMALL, 1))
    assert not torch.equal(first, initial_value("blocks.0.qkv.weight", shape, SMALL, 2))
    assert float(first.std()) == pytest.approx(0.02, rel=0.05)
    out = initial_value("blocks.0.out.weight", shape, SMALL, 1)
    assert float(out.std()) == pytest.approx(0.02 / 2, rel=0.05)  # 1 / sqrt(2 x 2 layers)


def test_initial_loss_is_that_of_a_uniform_guess(phi: Phi) -> None:
    tokens = torch.randint(0, 101, (8, 31))
    loss = float(phi(tokens[:, :-1], tokens[:, 1:]).detach()) / (8 * 30)
    assert loss == pytest.approx(float(torch.tensor(101.0).log()), abs=0.1)
