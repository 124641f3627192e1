"""The inflated model is the same function at a larger cost."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from grainwise.zoo import inflate

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
}
SOURCES = {
    "llama": lambda **k: LlamaForCausalLM(LlamaConfig(**SHAPE, **k)),
    "llama with biases": lambda **k: LlamaForCausalLM(LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, **k)),
    "llama with wide heads": lambda **k: LlamaForCausalLM(LlamaConfig(**SHAPE, head_dim=8, **k)),
    "mistral": lambda **k: MistralForCausalLM(MistralConfig(**SHAPE, **k)),
    "qwen2": lambda **k: Qwen2ForCausalLM(Qwen2Config(**SHAPE, **k)),
}


def source(name: str = "llama", seed: int = 0, **settings):
    """A random model whose gains and biases are not the ones and zeros of its initialisation."""
    torch.manual_seed(seed)
    model = SOURCES[name](**settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(6.0)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_computes_the_same_function(name, tied, ids):
    model = source(name, tie_word_embeddings=tied)
    wide = inflate(model, width=4)
    assert wide.config.hidden_size == 64
    assert (wide.lm_head.weight is wide.model.embed_tokens.weight) == tied
    logits = model(ids).logits
    assert logits.std() > 0.1
    torch.testing.assert_close(wide(ids).logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("width", [1, 2, 3])
@torch.no_grad()
def test_any_width(width, ids):
    model = source()
    torch.testing.assert_close(inflate(model, width)(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_bfloat16_keeps_dtype_and_function(ids):
    model = source().to(torch.bfloat16)
    wide = inflate(model)
    assert {p.dtype for p in wide.parameters()} == {torch.bfloat16}
    exact = model.float()(ids).logits
    assert (wide(ids).logits - exact).abs().max() < 0.05 * exact.abs().max()
    torch.testing.assert_close(wide.float()(ids).logits, exact, atol=1e-4, rtol=1e-4)  # the weights themselves are exact


def test_costs_width_squared_and_keeps_the_source(ids):
    model = source(tie_word_embeddings=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wide = inflate(model, width=4)
    assert wide.model.layers[1].mlp.up_proj.weight.numel() == 16 * model.model.layers[1].mlp.up_proj.weight.numel()
    assert wide.model.layers[0].self_attn.head_dim == model.model.layers[0].self_attn.head_dim
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.device.type == "cpu" for p in wide.parameters())


def test_generates_and_reloads_alike(tmp_path, ids):
    model = source()
    wide = inflate(model, width=2)
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(wide.generate(ids, max_new_tokens=8, do_sample=False), wanted)
    wide.save_pretrained(tmp_path)
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded.generate(ids, max_new_tokens=8, do_sample=False), wanted)


def test_refuses_what_it_cannot_widen():
    with pytest.raises(ValueError, match=r"llama, mistral, qwen2.*GPT2LMHeadModel"):
        inflate(GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=1)))
    with pytest.raises(ValueError, match="LlamaModel"):
        inflate(source().model)
    for width in (0, 1.5):
        with pytest.raises(ValueError, match="width must be"):
            inflate(source(), width)
