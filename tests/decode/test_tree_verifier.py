import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

from grainwise.decode import TokenTree, TreeVerifier

SIZES = {"vocab_size": 41, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
FAMILIES = {
    "llama": lambda: LlamaConfig(intermediate_size=24, num_key_value_heads=1, **SIZES),
    "qwen2": lambda: Qwen2Config(intermediate_size=24, num_key_value_heads=2, **SIZES),
    "gpt2": lambda: GPT2Config(vocab_size=41, n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "opt": lambda: OPTConfig(ffn_dim=24, word_embed_proj_dim=16, **SIZES),
}


def build(family, attention="sdpa"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # attention far from uniform, so that a wrong mask shows
    return model.double().eval()


def random_tree(root, seed=0, count=9, depth=4):
    rng = np.random.default_rng(seed)
    return TokenTree.from_paths(root, rng.integers(0, 3, (count, depth)), budget=40)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_over_the_tree_equals_separate_passes(family, attention, prompt):
    model = build(family, attention)
    tree = random_tree(int(prompt[0, -1]))
    verifier = TreeVerifier(model)
    verifier.prefill(prompt[:, :-1])
    logits = verifier.verify(tree)
    assert logits.shape == (len(tree), 41)
    for node in range(len(tree)):
        path = torch.from_numpy(tree.tokens[tree.path(node)])[None]
        with torch.no_grad():
            plain = model(torch.cat([prompt[:, :-1], path], dim=1)).logits[0, -1]
        torch.testing.assert_close(logits[node], plain, atol=1e-5, rtol=0)  # some families score in single precision


@pytest.mark.parametrize("family", FAMILIES)
def test_compacted_cache_equals_that_of_the_accepted_text(family, prompt):
    model = build(family)
    verifier = TreeVerifier(model)
    verifier.prefill(prompt[:, :-1])
    text = prompt[:, :-1]
    for seed in range(3):  # rows that were moved must serve later steps as well
        tree = random_tree(int(prompt[0, -1]) + seed, seed)
        verifier.verify(tree)
        kept = tree.path(len(tree) - 1)[: 4 - seed]
        verifier.keep(kept)
        text = torch.cat([text, torch.from_numpy(tree.tokens[kept])[None]], dim=1)
        with torch.no_grad():
            plain = model(text, use_cache=True).past_key_values
        assert verifier.past == verifier.cache.get_seq_length() == text.shape[1]
        for mine, theirs in zip(verifier.cache.layers, plain.layers):
            torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-6, rtol=0)
            torch.testing.assert_close(mine.values, theirs.values, atol=1e-6, rtol=0)


def test_prefill_continues_a_cache_that_was_begun(model, prompt):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt[:, :3], past_key_values=cache)
        plain = model(prompt).logits[0, -1]
    torch.testing.assert_close(TreeVerifier(model, cache).prefill(prompt[:, 3:]), plain, atol=1e-6, rtol=0)


def test_caches_that_cannot_be_compacted_are_refused(model):
    mistral = AutoModelForCausalLM.from_config(
        MistralConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                      num_key_value_heads=1, sliding_window=4)
    )  # fmt: skip
    with pytest.raises(ValueError, match="DynamicSlidingWindowLayer"):
        TreeVerifier(mistral)
    with pytest.raises(ValueError, match="StaticLayer"):
        TreeVerifier(model, StaticCache(config=model.config, max_cache_len=32))
    with pytest.raises(ValueError, match="offloaded"):
        TreeVerifier(model, DynamicCache(offloading=True))


def test_models_without_tree_attention_are_refused(model):
    with pytest.raises(ValueError, match="encoder-decoder"):
        TreeVerifier(T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2)))
    with pytest.raises(ValueError, match="position_ids"):
        TreeVerifier(AutoModelForCausalLM.from_config(BloomConfig(vocab_size=9, hidden_size=8, n_layer=1, n_head=2)))
    other = build("llama")
    other.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="flex_attention"):
        TreeVerifier(other)


def test_prefill_wants_one_sequence(model):
    for shape in ((2, 3), (1, 0), (3,)):
        with pytest.raises(ValueError, match="one sequence"):
            TreeVerifier(model).prefill(torch.zeros(shape, dtype=torch.long))
