"""Tiny models and updates that the tests of this room share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0,
        )
    ).eval()  # fmt: skip


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    return tiny_llama


@pytest.fixture
def lora() -> Callable[..., PeftModel]:
    """A tiny model with a LoRA whose factors are both random, as after training."""

    def make(seed: int = 0, base_seed: int = 0, **options: object) -> PeftModel:
        base = tiny_llama(base_seed)
        torch.manual_seed(100 + seed)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **options)
        model = get_peft_model(base, config).eval()
        for name, parameter in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                torch.nn.init.normal_(parameter, std=0.2)  # factors of one size, so that a global choice takes from both
        return model

    return make


@pytest.fixture
def ia3() -> PeftModel:
    config = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    return get_peft_model(tiny_llama(), config).eval()


@pytest.fixture
def update() -> Callable[..., dict[str, Tensor]]:
    """Random tensors of assorted shapes and magnitudes, as a ready-made update."""

    def make(seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = {"c": (7, 9), "a": (64,), "b": (3, 5, 11), "d": (1,)}
        return {key: torch.randn(shape, generator=generator) * (i + 1) for i, (key, shape) in enumerate(shapes.items())}

    return make
