"""Multiple choice by answer letters."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from grainwise.evaluate.answer_letters import Question, accuracy, letter_tokens, prompt_for

WORDS = ["<unk>", "A", "B", "C", "D", "Answer:", "red", "blue", "Sky?", "A.", "B."]
SKY = Question("Sky?", ("red", "blue"), answer=1)


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core)


class Fixed(nn.Module):
    """Always answers the same letter; remembers what it was shown."""

    def __init__(self, letter: str, longest: int = 100) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(len(WORDS)))
        self.bias.data[WORDS.index(letter)] = 1.0
        self.config = SimpleNamespace(max_position_embeddings=longest)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not self.training
        self.seen = input_ids
        return SimpleNamespace(logits=self.bias.expand(*input_ids.shape, -1))


def test_accuracy_counts_the_likeliest_letter():
    assert accuracy(Fixed("B"), tokenizer(), [SKY]) == 1.0
    assert accuracy(Fixed("A"), tokenizer(), [SKY, Question("Sky?", ("blue", "red"), answer=0)]) == 0.5
    assert accuracy(Fixed("D"), tokenizer(), [SKY]) == 0.0  # a letter that is no choice is not looked at; A wins the tie


def test_prompt_shows_solved_examples_and_ends_at_the_answer():
    text = prompt_for(SKY, [Question("Grass?", ("green", "pink"), answer=0)])
    assert text == "Grass?\nA. green\nB. pink\nAnswer: A\n\nSky?\nA. red\nB. blue\nAnswer:"


def test_training_mode_is_restored():
    model = Fixed("A").train()
    accuracy(model, tokenizer(), [SKY])
    assert model.training


def test_letters_that_share_a_token_are_refused():
    core = Tokenizer(models.WordLevel({"<unk>": 0, "Answer:": 1}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match="cannot be compared"):
        letter_tokens(PreTrainedTokenizerFast(tokenizer_object=core), 2)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="2 to 10 choices"):
        Question("?", ("only",), 0)
    with pytest.raises(ValueError, match="index into 2 choices"):
        Question("?", ("a", "b"), 2)
    with pytest.raises(ValueError, match="no questions"):
        accuracy(Fixed("A"), tokenizer(), [])
    with pytest.raises(ValueError, match="the model takes 3"):
        accuracy(Fixed("A", longest=3), tokenizer(), [SKY])
