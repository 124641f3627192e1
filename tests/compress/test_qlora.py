"""QLoRA: the 4-bit layer, the quantiser in transformers, LoRA on top, the recipe's parts, errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from grainwise.compress import nf4
from grainwise.compress.qlora import (
    NF4Config,
    NF4Linear,
    bits_per_param,
    dequantize_model,
    ensure_pad_token,
    nf4_layers,
    prepare_training,
    quantize_model,
    recipe_step,
    relabel_folder,
)
from grainwise.compress.registration import MERGE_REFUSED, register
from grainwise.training import train_lm, trainable

FLOAT = NF4Config(compute_dtype="float32")


def llama(tied: bool = False, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=64, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("float")
    llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized_folder(float_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    quantize_model(AutoModelForCausalLM.from_pretrained(float_folder), FLOAT).save_pretrained(folder)
    return folder


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(3))


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(
        first[k].dtype == second[k].dtype and torch.equal(first[k], second[k]) for k in first
    )


def test_layer_keeps_the_contract_of_a_linear_layer():
    linear = nn.Linear(128, 24)
    layer = NF4Linear.from_linear(linear, FLOAT)
    x = torch.randn(2, 5, 128)
    weight = layer.dequantize()
    assert (layer.in_features, layer.out_features, weight.shape) == (128, 24, (24, 128))
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.shape == (24 * 64, 1)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, linear.bias), atol=1e-5, rtol=1e-5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("sizes", [(128, 24), (37, 5)])
def test_gradients_equal_those_of_a_plain_layer_with_the_dequantised_weight(sizes):
    torch.manual_seed(1)
    layer = NF4Linear.from_linear(nn.Linear(*sizes, bias=False), FLOAT)
    plain = nn.Linear(*sizes, bias=False)
    plain.weight.data = layer.dequantize()
    results = []
    for base in (layer, plain):
        torch.manual_seed(2)
        base.requires_grad_(False)
        adapted = get_peft_model(
            nn.ModuleDict({"base": base}), LoraConfig(r=3, target_modules=["base"], init_lora_weights=False)
        )
        inner = adapted.base_model.model["base"]
        torch.manual_seed(3)
        for factor in (inner.lora_A.default, inner.lora_B.default):
            nn.init.normal_(factor.weight)
        x = torch.randn(7, sizes[0], generator=torch.Generator().manual_seed(4), requires_grad=True)
        inner(x).square().sum().backward()
        results.append((x.grad, inner.lora_A.default.weight.grad, inner.lora_B.default.weight.grad))
        assert inner.base_layer.weight.grad is None
    for ours, theirs in zip(*results):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_loading_with_a_config_quantises(float_folder, ids):
    loaded = AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=FLOAT)
    in_place = quantize_model(AutoModelForCausalLM.from_pretrained(float_folder), FLOAT)
    assert same_state(loaded, in_place)
    assert type(loaded.lm_head) is nn.Linear
    assert len(nf4_layers(loaded)) == 14
    assert not any(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded(ids).logits, in_place(ids).logits)


def test_saved_folder_comes_back_bit_for_bit(quantized_folder, ids):
    first = AutoModelForCausalLM.from_pretrained(quantized_folder)
    config = json.loads((quantized_folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "grainwise_4bit"
    again = quantized_folder / "again"
    first.save_pretrained(again)
    second = AutoModelForCausalLM.from_pretrained(again)
    assert same_state(first, second)
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert first.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, 16)


@pytest.mark.parametrize("bits", nf4.FORMATS)
@pytest.mark.parametrize("double", [False, True])
def test_every_format_round_trips_in_half_precision_models(bits, double, tmp_path):
    model = quantize_model(llama(tied=True).to(torch.bfloat16), NF4Config(bits, double_quant=double, block=32))
    model.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_state(model, back)
    assert nf4_layers(back)[0][1].kind == bits
    assert back.dtype == torch.bfloat16


def test_state_dict_loads_into_an_empty_layer():
    layer = NF4Linear.from_linear(nn.Linear(64, 8), FLOAT)
    empty = NF4Linear(64, 8, bias=True, config=FLOAT)
    with pytest.raises(ValueError, match="holds no weights yet"):
        empty(torch.randn(1, 64))
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty.dequantize(), layer.dequantize())
    assert torch.equal(empty.bias, layer.bias)
    with pytest.raises(RuntimeError, match="this layer needs"):
        NF4Linear(64, 9, bias=True, config=FLOAT).load_state_dict(layer.state_dict())


def test_casting_a_model_leaves_the_scales_alone():
    layer = NF4Linear.from_linear(nn.Linear(64, 8), FLOAT)
    before = layer.dequantize()
    layer.to(torch.bfloat16)
    assert layer.nested_absmax.dtype == torch.float32
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(), before)


def test_without_trained_lora_the_output_is_the_base_bit_for_bit(quantized_folder, ids):
    base = AutoModelForCausalLM.from_pretrained(quantized_folder)
    expected = base(ids).logits
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    assert torch.equal(adapted(ids).logits, expected)


def test_lora_on_all_layers_trains_saves_and_reloads(quantized_folder, ids, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(quantized_folder), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    )
    adapted = model.peft_config["default"].target_modules
    assert {name.split(".")[-1] for name in adapted} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_A" in n or "lora_B" in n for n in names)
    held = {id(p) for p in trainable(model)}
    assert held == {id(p) for n, p in model.named_parameters() if n in names}
    packed = {n: b.clone() for n, b in model.state_dict().items() if "lora" not in n}
    record = train_lm(model, [{"input_ids": ids, "labels": ids}] * 8, steps=8, lr=2e-2)
    assert record.losses[-1] < record.losses[0]
    assert all(torch.equal(b, model.state_dict()[n]) for n, b in packed.items())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(quantized_folder), tmp_path).eval()
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_merging_is_refused(quantized_folder):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(quantized_folder), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match=MERGE_REFUSED):
        model.merge_and_unload()
    with pytest.raises(ValueError, match=MERGE_REFUSED):
        model.merge_adapter(safe_merge=True)


def test_dequantised_model_merges(quantized_folder, ids):
    model = AutoModelForCausalLM.from_pretrained(quantized_folder)
    expected = model(ids).logits
    plain = model.dequantize(torch.float32)
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(plain(ids).logits, expected, atol=1e-5, rtol=1e-4)
    assert not getattr(plain.config, "quantization_config", None)
    get_peft_model(plain, LoraConfig(r=2, target_modules="all-linear")).merge_and_unload()
    with pytest.raises(ValueError, match="no 4-bit layer"):
        bits_per_param(dequantize_model(plain))


def test_measured_bits_of_a_model():
    big = nn.ModuleDict({"a": nn.Linear(256, 256, bias=False), "b": nn.Linear(256, 512, bias=False)})
    quantize_model(big, FLOAT)
    offsets = 2 * 32 / (256 * 256 + 256 * 512)
    assert bits_per_param(big) == pytest.approx(4 + 8 / 64 + 32 / 16384 + offsets, abs=1e-12)


@pytest.mark.needs_bitsandbytes
def test_folders_are_exchanged_with_bitsandbytes(float_folder, quantized_folder, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    ours = AutoModelForCausalLM.from_pretrained(quantized_folder)
    ours.save_pretrained(tmp_path / "ours")
    relabel_folder(tmp_path / "ours", "bitsandbytes")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    layer = theirs.model.layers[1].mlp.up_proj
    assert isinstance(layer, bnb.nn.Linear4bit)
    read = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(read, ours.model.layers[1].mlp.up_proj.dequantize())

    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=config).save_pretrained(tmp_path / "theirs")
    relabel_folder(tmp_path / "theirs", "grainwise")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert isinstance(back.model.layers[0].mlp.up_proj, NF4Linear)
    assert same_state(back, ours)


def test_relabelling_refuses_what_does_not_fit(float_folder, tmp_path):
    with pytest.raises(ValueError, match="describes no 4-bit model"):
        relabel_folder(float_folder, "grainwise")
    quantize_model(llama(), NF4Config("int4")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="int4"):
        relabel_folder(tmp_path, "bitsandbytes")


def test_training_in_4_bits_is_refused(quantized_folder):
    model = AutoModelForCausalLM.from_pretrained(quantized_folder)
    with pytest.raises(ValueError, match="no trainable parameter"):
        trainable(model)
    with pytest.raises(ValueError, match="cannot be trained: attach an adapter"):
        model.model.layers[0].mlp.up_proj.requires_grad_(True)


def test_head_and_tied_embeddings_need_saying_so():
    tied = llama(tied=True)
    with pytest.raises(ValueError, match="shares its weights with the input embedding"):
        quantize_model(tied, NF4Config(quantize_head=True))
    head = quantize_model(llama(), NF4Config(quantize_head=True)).lm_head
    assert isinstance(head, NF4Linear)
    skipping = quantize_model(llama(), NF4Config(skip=["down_proj", r"model\.layers\.0\."]))
    assert {name.split(".")[2] for name, _ in nf4_layers(skipping)} == {"1"}
    assert not any("down_proj" in name for name, _ in nf4_layers(skipping))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'nf4'"):
        NF4Config("nf3")
    with pytest.raises(ValueError, match="power of two"):
        NF4Config(block=100)
    with pytest.raises(ValueError, match="compute_dtype must be one of"):
        NF4Config(compute_dtype="int8")
    with pytest.raises(TypeError, match="no option 'blocksize'"):
        NF4Config(blocksize=64)
    with pytest.warns(UserWarning, match="float16 compute is unstable"):
        NF4Config(compute_dtype=torch.float16)
    with pytest.raises(ValueError, match="no linear layer left"):
        quantize_model(nn.Sequential(nn.ReLU()), FLOAT)
    model = quantize_model(llama(), FLOAT)
    with pytest.raises(ValueError, match="quantised already"):
        quantize_model(model, FLOAT)
    with pytest.raises(ValueError, match="the input has 32 features"):
        NF4Linear.from_linear(nn.Linear(64, 4))(torch.randn(1, 32))


def test_broken_weights_are_named():
    model = llama()
    model.model.layers[1].mlp.gate_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight holds NaN"):
        quantize_model(model, FLOAT)


def test_registering_again_changes_nothing():
    assert register() == register()


def test_registered_when_the_frame_is_imported_first():
    code = "import grainwise.compress.quantizer; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; "
    code += "print('grainwise_4bit' in known)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr[-1500:]


def test_prepared_model_trains_with_checkpointing(ids):
    model = prepare_training(quantize_model(llama().to(torch.bfloat16), NF4Config()))
    assert model.model.norm.weight.dtype == torch.float32
    assert model.config.use_cache is False
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    adapted.train()
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in trainable(adapted))


def test_new_pad_rows_are_the_mean_of_the_old_rows():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    model = llama()
    before = {n: model.get_parameter(n).data.clone() for n in ("model.embed_tokens.weight", "lm_head.weight")}
    assert ensure_pad_token(model, tokenizer) == 1
    assert model.config.pad_token_id == 97
    for name, old in before.items():
        rows = model.get_parameter(name).data
        assert torch.equal(rows[:97], old)
        torch.testing.assert_close(rows[97], old.mean(dim=0))
    assert ensure_pad_token(model, tokenizer) == 0


def test_recipe_step_reports_bytes_and_bits(tmp_path):
    from grainwise.recipe_state import RecipeState

    state = RecipeState(model=llama(tied=True), tokenizer=None, train=None, test=None, seed=0, folder=tmp_path)
    figures = recipe_step(state, bits="nf4", double_quant=True)
    assert figures["bytes_after"] < figures["bytes_before"]
    assert 4.12 < figures["bits_per_parameter"] < 4.2
    assert figures["layers"] == 14
    assert figures["kernel"].split(" ")[0] in ("avx512", "torch")
