import json

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from grainwise.context import attention_registration, patch_attention, unpatch_attention
from grainwise.context.attention_registration import CONFIG_KEY, chosen_layers

EVERYTHING = {"block": 16, "samples": 300, "min_seq_len": 16}  # reads every key: exact
FEW = {"block": 8, "samples": 8, "min_seq_len": 16, "projections": 4}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_registering_twice_changes_nothing():
    from transformers import AttentionInterface

    attention_registration.register()
    names = list(AttentionInterface().valid_keys())
    attention_registration.register()
    assert list(AttentionInterface().valid_keys()) == names
    assert {"hyper", "cache_kit"} <= set(names)


def test_hyper_works_by_name_and_is_exact_on_short_prompts(llama, ids):
    exact = llama(ids).logits
    llama.set_attn_implementation("hyper")
    assert torch.equal(llama(ids).logits, exact)


@pytest.mark.parametrize("padded", [False, True])
def test_a_full_budget_changes_nothing(llama, ids, padded):
    mask = torch.ones_like(ids)
    mask[0, :23] = 0 if padded else 1
    exact = llama(ids, attention_mask=mask).logits
    patch_attention(llama, layers="all", **EVERYTHING)
    found = llama(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], exact[mask.bool()])


def test_only_chosen_layers_are_approximated(llama, ids):
    def states():
        return llama(ids, output_hidden_states=True).hidden_states

    exact = states()
    patch_attention(llama, layers=[1], **FEW)
    found = states()
    assert torch.equal(found[1], exact[1])
    assert not torch.allclose(found[2], exact[2])


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_prefills_by_hyper_and_decodes_exactly(llama, ids, cache):
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    if cache:
        options |= {"cache_implementation": cache, "disable_compile": True}
    exact = llama.generate(ids, **options)
    patch_attention(llama, **EVERYTHING)
    assert torch.equal(llama.generate(ids, **options), exact)


def test_one_query_is_exact(llama, ids):
    past = llama(ids, use_cache=True).past_key_values
    exact = llama(ids[:, :1], past_key_values=past, use_cache=True).logits
    past.crop(-1)
    patch_attention(llama, **FEW)
    torch.testing.assert_close(llama(ids[:, :1], past_key_values=past).logits, exact)


def test_the_setting_survives_saving(llama, ids, tmp_path):
    patch_attention(llama, layers="last:2", seed=3, **FEW)
    logits = llama(ids).logits
    llama.save_pretrained(tmp_path / "one")
    saved = json.loads((tmp_path / "one" / "config.json").read_text())[CONFIG_KEY]
    assert saved == {"kind": "hyper", "layers": [1, 2], "options": FEW | {"seed": 3}, "replaced": "sdpa"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert torch.equal(again(ids).logits, logits)
    again.save_pretrained(tmp_path / "two")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "two")(ids).logits, logits)
    unpatch_attention(again)
    again.save_pretrained(tmp_path / "three")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "three")
    assert plain.config._attn_implementation == "sdpa"
    assert not hasattr(plain.config, CONFIG_KEY)


def test_unpatching_restores_the_exact_model(llama, ids):
    exact = llama(ids).logits
    patch_attention(llama, **FEW)
    patch_attention(llama, layers=[0], **FEW)  # patching again keeps what was there at first
    assert not torch.allclose(llama(ids).logits, exact)
    unpatch_attention(llama)
    assert torch.equal(llama(ids).logits, exact)
    with pytest.raises(ValueError, match="not patched"):
        unpatch_attention(llama)


def test_it_works_under_autocast(llama, ids):
    with torch.autocast("cpu", torch.bfloat16):
        exact = llama(ids).logits.float()
        patch_attention(llama, layers=[1], **EVERYTHING)
        found = llama(ids).logits.float()
    torch.testing.assert_close(found, exact, atol=0.02, rtol=0.05)


@torch.enable_grad()
def test_gradients_agree_under_gradient_checkpointing(llama, ids):
    patch_attention(llama, **FEW)
    llama.train()
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            llama.gradient_checkpointing_enable()
        llama.zero_grad()
        llama(ids, labels=ids, use_cache=False).loss.backward()
        found.append([p.grad.clone() for p in llama.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [("all", [0, 1, 2, 3]), ("odd", [1, 3]), ("even", [0, 2]), ("first:1", [0]), ("last:3", [1, 2, 3]), ([2, 0, 2], [0, 2])],
)
def test_layers_are_chosen_by_word_or_number(spec, wanted):
    assert chosen_layers(spec, 4) == wanted


@pytest.mark.parametrize("spec", ["last", "last:0", "last:5", "middle:2", [4], [-1], [], [True]])
def test_wrong_layers_are_refused(spec):
    with pytest.raises(ValueError, match="layers"):
        chosen_layers(spec, 4)


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"kind": "hiper"}, ValueError, "Did you mean 'hyper'"),
        ({"blok": 8}, ValueError, "Did you mean 'block'"),
        ({"block": 0}, ValueError, "block must be an integer"),
        ({"seed": "a"}, TypeError, "seed must be an integer"),
        ({"layers": "last:9"}, ValueError, "last:N with N from 1 to 3"),
    ],
)
def test_wrong_requests_are_refused_before_anything_changes(llama, request_, error, message):
    with pytest.raises(error, match=message):
        patch_attention(llama, **request_)
    assert llama.config._attn_implementation == "sdpa"
    assert not hasattr(llama.config, CONFIG_KEY)


def test_dropout_is_refused_where_it_would_be_ignored(llama, ids):
    llama.config.attention_dropout = 0.1
    for layer in llama.model.layers:
        layer.self_attn.attention_dropout = 0.1
    patch_attention(llama, layers=[0], **FEW)
    llama.train()
    with pytest.raises(ValueError, match=r"attention dropout 0\.1 is not supported"):
        llama(ids)


def test_other_masks_are_refused_in_chosen_layers(llama, ids):
    patch_attention(llama, layers=[2], **FEW)
    causal = torch.ones(2, 1, 100, 100, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="only causal attention, full attention and padding"):
        llama(ids, attention_mask=causal)


def test_sliding_windows_stay_exact_or_are_refused(ids):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=20,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    exact = model(ids).logits
    patch_attention(model, layers=[0], **FEW)
    with pytest.raises(ValueError, match="layer 0"):
        model(ids)
    setattr(model.config, CONFIG_KEY, getattr(model.config, CONFIG_KEY) | {"layers": []})
    torch.testing.assert_close(model(ids).logits, exact)


def test_the_recipe_step_switches_and_measures(llama, tmp_path):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from grainwise.context.hyperattention import recipe_step
    from grainwise.recipe_state import RecipeState

    words = {f"w{i}": i for i in range(97)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w2")
    text = " ".join(f"w{(i * i) % 97}" for i in range(300))
    rows = Dataset.from_list([{"text": text}])
    state = RecipeState(model=llama, tokenizer=tokenizer, train=rows, test=rows, seed=0, folder=tmp_path)
    figures = recipe_step(state, layers="last:2", block=8, samples=8, min_seq_len=32, length=128)
    assert figures["replaced_layers"] == 2
    assert figures["perplexity_hyper"] != figures["perplexity_exact"]
    assert llama.config._attn_implementation == "hyper"
    with pytest.raises(ValueError, match="must exceed min_seq_len"):
        recipe_step(state, min_seq_len=512, length=512)
    with pytest.raises(ValueError, match="exceeds the model's window of 512"):
        recipe_step(state, min_seq_len=512, length=513)
