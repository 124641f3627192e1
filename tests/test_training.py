"""The training loop: learns, is reproducible, and stops with a clear word."""

import copy

import pytest
import torch

from grainwise.evaluate.language import bits_per_byte, mean_loss, perplexity, stream_loss
from grainwise.training import batches_of, learning_rate_factor, train_lm, trainable


@pytest.fixture
def data():
    return torch.arange(4 * 24).remainder(7).view(4, 24) + 3


def test_learns_and_repeats(tiny_llama, data):
    other = copy.deepcopy(tiny_llama)
    before = mean_loss(tiny_llama, data)
    records = [train_lm(m, batches_of(data, 4, 20, seed=1), steps=20, lr=1e-2) for m in (tiny_llama, other)]
    assert mean_loss(tiny_llama, data) < before / 2
    assert records[0].losses == records[1].losses
    assert len(records[0].losses) == 20
    assert perplexity(tiny_llama, data) == pytest.approx(torch.tensor(mean_loss(tiny_llama, data)).exp().item(), rel=1e-5)


def test_penalty_is_trained(tiny_llama, data):
    weight = tiny_llama.model.norm.weight
    train_lm(tiny_llama, batches_of(data, 2, 30, seed=0), steps=30, lr=1e-2, penalty=lambda: 100 * (weight - 3).square().mean())
    assert weight.mean() > 1.15


def test_every_epoch_shows_every_block():
    batches = list(batches_of(torch.arange(6).view(6, 1), 2, 6, seed=0))
    seen = torch.cat([b["input_ids"] for b in batches]).flatten().tolist()
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))


def test_schedules():
    assert learning_rate_factor(0, 100, 0.1, "linear") == pytest.approx(0.1)
    assert learning_rate_factor(10, 100, 0.1, "linear") == 1.0
    assert learning_rate_factor(55, 100, 0.1, "linear") == pytest.approx(0.5)
    assert learning_rate_factor(55, 100, 0.1, "cosine") == pytest.approx(0.5)
    assert learning_rate_factor(99, 100, 0.1, "constant") == 1.0
    with pytest.raises(ValueError, match="expected linear, cosine or constant"):
        learning_rate_factor(50, 100, 0.1, "cubic")


def test_clear_errors(tiny_llama, data):
    with pytest.raises(ValueError, match="ended after 1 of 2 steps"):
        train_lm(tiny_llama, [{"input_ids": data, "labels": data}], steps=2)
    with torch.no_grad():
        tiny_llama.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        train_lm(tiny_llama, batches_of(data, 2, 3, seed=0), steps=3)
    with pytest.raises(ValueError, match="no trainable parameter"):
        trainable(tiny_llama.requires_grad_(False))
    with pytest.raises(ValueError, match=r"got \(0, 5\)"):
        mean_loss(tiny_llama, torch.zeros(0, 5, dtype=torch.long))


def test_stream_loss_counts_every_token_once(tiny_llama):
    stream = torch.randint(3, 97, (50,), generator=torch.Generator().manual_seed(0))
    whole = stream_loss(tiny_llama, stream, window=64)
    logits = tiny_llama(input_ids=stream[None, :-1]).logits[0]
    assert whole == pytest.approx(torch.nn.functional.cross_entropy(logits, stream[1:], reduction="sum").item(), rel=1e-5)
    with torch.no_grad():
        tiny_llama.lm_head.weight.zero_()  # uniform: every token costs log(97), in whatever window it is read
    expected = 49 * torch.tensor(97.0).log().item()
    assert stream_loss(tiny_llama, stream, window=10) == pytest.approx(expected, rel=1e-5)


def test_bits_per_byte_of_a_uniform_model():
    from grainwise import zoo

    model, tokenizer = zoo.load("llama-nano")
    model.tie_weights()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    rows = [{"text": "Where the bee sucks, there suck I."}, {"text": "Ariel"}]
    tokens = sum(len(tokenizer(r["text"])["input_ids"]) + 1 for r in rows)
    expected = tokens * 12 / sum(len(r["text"]) for r in rows)  # a vocabulary of 2^12
    assert bits_per_byte(model, rows, tokenizer, window=8) == pytest.approx(expected, rel=1e-4)
