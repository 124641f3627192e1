"""The frame of structural compression: dispatch, calibration data in all its forms, counting."""

from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grainwise.compress.architecture import ARCHITECTURES, architecture_of
from grainwise.compress.structural import (
    CompressionReport,
    ModelSize,
    StructuralConfig,
    calibration_batches,
    compress,
    model_size,
)

LIMITS = {"vocabulary": 97, "longest": 64}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@dataclass(frozen=True)
class Nothing(StructuralConfig):
    """A method that changes nothing: shows the dispatch."""

    def apply(self, model, calibration, progress):
        return model, CompressionReport("nothing", model_size(model), model_size(model))


def test_compress_calls_the_method_of_the_config(model):
    same, report = compress(model, Nothing())
    assert same is model
    assert report.figures()["flops_ratio"] == 1.0
    assert "1.000" in report.table()


def test_compress_refuses_what_is_no_method_or_model(model):
    with pytest.raises(TypeError, match=r"structural method \(.*Nothing.*got dict"):
        compress(model, {"sparsity": 0.5})
    with pytest.raises(TypeError, match="transformers model, got Linear"):
        compress(torch.nn.Linear(2, 2), Nothing())


def test_compress_refuses_adapters_and_quantised_models(model):
    from peft import LoraConfig, get_peft_model

    fresh = LlamaForCausalLM(model.config)
    with pytest.raises(TypeError, match="merge it first"):
        compress(get_peft_model(fresh, LoraConfig(target_modules=["q_proj"])), Nothing())
    quantised = LlamaForCausalLM(LlamaConfig.from_dict(model.config.to_dict()))
    quantised.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="is quantised"):
        compress(quantised, Nothing())


def test_size_counts_tied_weights_once_and_flops_for_every_product(model):
    size = model_size(model)
    block = 4 * 16 * 16 + 3 * 16 * 24
    assert size.parameters == 97 * 16 + 2 * (block + 2 * 16) + 16
    assert size.bytes == 4 * size.parameters
    assert size.flops_per_token == 2 * (2 * block + 97 * 16)
    half = ModelSize(size.parameters // 2, size.bytes // 2, size.flops_per_token // 2)
    assert CompressionReport("x", size, half).figures()["flops_ratio"] == 0.5


def test_blocks_batches_and_text_become_the_same_batches():
    ids = torch.arange(40).view(10, 4)
    from_blocks = calibration_batches(ids, **LIMITS)
    assert [len(b["input_ids"]) for b in from_blocks] == [8, 2]
    from_mappings = calibration_batches([{"input_ids": ids[:8]}, {"input_ids": ids[8:]}], **LIMITS)
    from_tensors = calibration_batches([ids[:8], ids[8:]], **LIMITS)
    for one, two, three in zip(from_blocks, from_mappings, from_tensors):
        assert torch.equal(one["input_ids"], two["input_ids"])
        assert torch.equal(one["attention_mask"], torch.ones_like(one["input_ids"]))
        assert torch.equal(three["input_ids"], two["input_ids"])


def test_rows_of_text_with_their_tokenizer():
    class Letters:
        eos_token_id = 0

        def __call__(self, texts, **settings):
            return {"input_ids": [[ord(c) - 96 for c in t] for t in texts]}

    (batch,) = calibration_batches(([{"text": "ab" * 200}], Letters()), **LIMITS)
    assert batch["input_ids"].shape == (6, 64)  # blocks no longer than the model reads
    assert batch["input_ids"][0, :4].tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize(
    "calibration, kind, message",
    [
        (None, ValueError, "needs calibration data"),
        (torch.zeros(0, 8, dtype=torch.long), ValueError, "empty"),
        ([], ValueError, "empty"),
        (torch.zeros(8, dtype=torch.long), ValueError, r"\(count, length\)"),
        (torch.zeros(2, 8), TypeError, "integer type, got torch.float32"),
        ("some text", TypeError, "cannot calibrate on str"),
        ([{"text": "hello"}], ValueError, "expected input_ids"),
        (torch.full((1, 8), 97), ValueError, "vocabulary has 97"),
        (torch.zeros(1, 65, dtype=torch.long), ValueError, "at most 64"),
        ([{"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4)}], ValueError, "all padding"),
        ([{"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 5)}], ValueError, "attention_mask"),
    ],
)
def test_bad_calibration_data(calibration, kind, message):
    with pytest.raises(kind, match=message):
        calibration_batches(calibration, **LIMITS)


def test_map_names_real_modules(model):
    architecture = architecture_of(model)
    for layer in architecture.layers_of(model):
        for sub in architecture.sublayers:
            for name in (sub.norm, sub.writer, *sub.readers):
                layer.get_submodule(name)
    for name in (*architecture.embeddings, architecture.final_norm, architecture.head):
        model.get_submodule(name)
    assert architecture.linear_names == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_unknown_architectures_are_answered_with_the_known_ones(model):
    class Other(torch.nn.Module):
        config = type("Config", (), {"model_type": "lama"})

    with pytest.raises(ValueError, match=r"'lama'.*'llama'"):
        architecture_of(Other())
    Other.config.model_type = "zzz"
    with pytest.raises(ValueError, match=", ".join(sorted(ARCHITECTURES))):
        architecture_of(Other())
    with pytest.raises(ValueError, match="no language-model head"):
        architecture_of(model.model)
