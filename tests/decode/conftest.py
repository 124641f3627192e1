"""A tiny Llama with random weights, in double precision so that no rounding decides between two tokens."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=41, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=128, initializer_range=0.4,
        bos_token_id=0, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


@pytest.fixture
def prompt():
    return torch.tensor([[5, 9, 2, 30, 7, 9, 2]])
