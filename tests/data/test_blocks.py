"""Blocks and completion batches."""

import pytest
import torch

from grainwise import zoo
from grainwise.data import CompletionCollator, blocks


@pytest.fixture(scope="module")
def tokenizer():
    return zoo.load("llama-nano")[1]


def test_blocks_hold_the_rows_in_order(tokenizer):
    rows = [{"text": "alpha beta gamma"}, {"prompt": "q", "response": "a"}]
    ids = tokenizer("alpha beta gamma")["input_ids"] + [tokenizer.eos_token_id]
    ids += tokenizer("q\na")["input_ids"] + [tokenizer.eos_token_id]
    found = blocks(rows, tokenizer, 3)
    assert found.flatten().tolist() == ids[: len(ids) // 3 * 3]
    with pytest.raises(ValueError, match="fewer than one block of 500"):
        blocks(rows, tokenizer, 500)
    with pytest.raises(ValueError, match="0 tokens"):
        blocks([], tokenizer, 4)


def test_loss_falls_on_the_response_alone(tokenizer):
    rows = [{"prompt": "What is two and two?", "response": "four"}, {"text": "free text"}]
    batch = CompletionCollator(tokenizer)(rows)
    kept = batch["labels"] != -100
    decoded = [tokenizer.decode(batch["labels"][i][kept[i]], skip_special_tokens=True) for i in range(2)]
    assert decoded == ["four", "free text"]
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])
    assert torch.equal(batch["attention_mask"].sum(1) > 0, torch.tensor([True, True]))
    assert not kept[batch["attention_mask"] == 0].any()


def test_long_rows_are_cut(tokenizer):
    batch = CompletionCollator(tokenizer, prompt_length=4, response_length=6)(
        [{"prompt": "a b c " * 20, "response": "d e f " * 20}]
    )
    assert batch["input_ids"].shape == (1, 10)
    assert batch["input_ids"][0, -1] == tokenizer.eos_token_id
