from __future__ import annotations

import numpy as np
import pytest
import torch

from grainwise.select.quality import LengthScorer, LikelihoodScorer, RatingScorer, RewardModelScorer, gold_minus_generated

PROMPTS = ["say a", "a longer question", "b"]
RESPONSES = ["aaaa", "yes", "a long answer"]


def test_likelihood_equals_the_token_by_token_sum(tiny_llama, characters):
    scores = LikelihoodScorer(tiny_llama, characters, scale="log", batch_tokens=8).score(PROMPTS, RESPONSES)
    for prompt, response, score in zip(PROMPTS, RESPONSES, scores):
        ids = characters(f"{prompt}\n{response}")["input_ids"] + [characters.eos_token_id]
        chances = tiny_llama(torch.tensor([ids])).logits[0].log_softmax(-1)
        start = len(prompt) + 1
        expected = np.mean([chances[i - 1, ids[i]].item() for i in range(start, len(ids))])
        assert score == pytest.approx(expected, abs=1e-4)
    quality = LikelihoodScorer(tiny_llama, characters).score(PROMPTS, RESPONSES)
    np.testing.assert_allclose(quality, np.exp(scores), rtol=1e-4)


def test_scorers_read_rows_of_either_form(tiny_llama, characters):
    scorer = LikelihoodScorer(tiny_llama, characters)
    rows = [{"prompt": p, "response": r} for p, r in zip(PROMPTS, RESPONSES)]
    np.testing.assert_allclose(scorer(rows), scorer.score(PROMPTS, RESPONSES))
    assert LengthScorer(cap=3)([{"text": "one"}, {"text": "one two three four"}]).tolist() == [1, 3]
    assert np.isfinite(scorer([{"text": "one"}, rows[0]])).all()


def test_the_instance_score_changes_sign_when_gold_and_generated_swap(tiny_llama, characters):
    scorer = LikelihoodScorer(tiny_llama, characters, scale="log")
    generated = ["ab", "no", "zzz"]
    forward = gold_minus_generated(scorer, PROMPTS, RESPONSES, generated)
    np.testing.assert_allclose(forward, -gold_minus_generated(scorer, PROMPTS, generated, RESPONSES), atol=1e-5)
    assert np.abs(forward).min() > 1e-4
    np.testing.assert_allclose(gold_minus_generated(scorer, PROMPTS, RESPONSES, RESPONSES), 0, atol=1e-6)


class Fixed:
    def __init__(self, values):
        self.values = values

    def score(self, prompts, responses):
        return np.array(self.values)


def test_scorers_that_break_the_contract_are_refused():
    with pytest.raises(ValueError, match="one value for each of 4 pairs"):
        gold_minus_generated(Fixed([1.0]), ["a", "b"], ["c", "d"], ["e", "f"])
    with pytest.raises(ValueError, match=r"infinite values for pairs \[1\]"):
        gold_minus_generated(Fixed([1.0, 1, 1, np.nan]), ["a", "b"], ["c", "d"], ["e", "f"])
    with pytest.raises(ValueError, match="2 prompts, 1 references"):
        gold_minus_generated(Fixed([1.0]), ["a", "b"], ["c"], ["e", "f"])


def test_a_rating_is_the_expected_digit(tiny_llama, characters):
    template = "{prompt}|{response}|"
    scorer = RatingScorer(tiny_llama, characters, template=template, ratings=("1", "2", "3"), batch_tokens=30)
    for prompt, response, score in zip(PROMPTS, RESPONSES, scorer.score(PROMPTS, RESPONSES)):
        ids = characters(template.format(prompt=prompt, response=response))["input_ids"]
        logits = tiny_llama(torch.tensor([ids])).logits[0, -1, characters(["123"])["input_ids"][0]]
        assert score == pytest.approx((logits.softmax(-1) @ torch.tensor([1.0, 2, 3])).item(), abs=1e-4)
    with pytest.raises(ValueError, match=r"\['10'\] are not"):
        RatingScorer(tiny_llama, characters, template=template, ratings=("1", "10"))


def test_a_reward_model_gives_its_scalar(characters):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=2,
    )
    model = LlamaForSequenceClassification(config).eval()
    scores = RewardModelScorer(model, characters, batch_tokens=16).score(PROMPTS, RESPONSES)
    for prompt, response, score in zip(PROMPTS, RESPONSES, scores):
        ids = torch.tensor([characters(f"{prompt}\n{response}")["input_ids"]])
        assert score == pytest.approx(model(ids).logits.item(), abs=1e-5)
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="pad_token_id"):
        RewardModelScorer(model, characters)
    config.num_labels = 2
    with pytest.raises(ValueError, match="one output, this model has 2"):
        RewardModelScorer(LlamaForSequenceClassification(config), characters)


def test_unknown_scales_are_refused(tiny_llama, characters):
    with pytest.raises(ValueError, match=r"unknown scale 'lg'. Did you mean 'log'"):
        LikelihoodScorer(tiny_llama, characters, scale="lg")
