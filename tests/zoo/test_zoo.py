"""The zoo: what is shipped loads, fits its limits and is as good as its record says."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from grainwise import zoo
from grainwise.zoo import commands, language
from grainwise.zoo.specs import SPECS, VOCABULARY


def test_names_paths_and_errors():
    assert set(SPECS) <= set(zoo.names())
    assert zoo.resolve("zoo/llama-nano") == zoo.path("llama-nano")
    assert zoo.resolve("some/hub-id") == "some/hub-id"
    with pytest.raises(ValueError, match="Did you mean 'llama-mini'"):
        zoo.path("zoo/llama-mni")
    with pytest.raises(ValueError, match="no zoo model"):
        commands.train("llama-huge", None, compiled=False, console=Console(quiet=True))


def test_size_limits():
    sizes = {n: sum(f.stat().st_size for f in Path(zoo.path(n)).iterdir()) for n in zoo.names()}
    assert all(size <= 15e6 for size in sizes.values()), sizes
    assert sum(sizes.values()) <= 80e6


@pytest.mark.parametrize("name, most", [("llama-mini", 6.5e6), ("llama-draft", 1.3e6), ("llama-nano", 0.2e6)])
def test_shape_and_record(name, most):
    model, tokenizer = zoo.load(name)
    metrics = zoo.metrics(name)
    parameters = sum(p.numel() for p in model.parameters())
    assert most / 2 < parameters == metrics["parameters"] <= most
    assert len(tokenizer) == model.config.vocab_size == VOCABULARY
    assert metrics["script"] == f"grainwise zoo train {name}"
    assert {"seed", "bits_per_byte", "perplexity_512", "kneser_ney_5gram_bits_per_byte", "text"} <= set(metrics)
    on_disk = json.loads((Path(zoo.path(name)) / "config.json").read_text())
    assert on_disk["dtype"] == "bfloat16"


def test_one_tokenizer_that_loses_nothing():
    vocabularies = {json.dumps(zoo.load(n)[1].get_vocab(), sort_keys=True) for n in SPECS}
    assert len(vocabularies) == 1
    tokenizer = zoo.load("llama-nano")[1]
    text = "def f(x):\n\treturn x ** 2  # Σ, été, 北京, \U0001f40d\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_llama_mini_beats_the_5_gram_model():
    """Measured again on a part of the held-out text; the record holds the whole."""
    from grainwise.data import blocks, load
    from grainwise.evaluate.language import mean_loss

    metrics = zoo.metrics("llama-mini")
    assert metrics["bits_per_byte"] < 0.9 * metrics["kneser_ney_5gram_bits_per_byte"]
    model, tokenizer = zoo.load("llama-mini")
    held_out = blocks(load("pydoc", "test"), tokenizer, 512)[:16]
    trained = mean_loss(model, held_out)
    nano = mean_loss(zoo.load("llama-nano")[0], held_out)
    assert trained < nano < torch.tensor(float(VOCABULARY)).log()


def test_check_compares_with_the_record(tmp_path, monkeypatch):
    shutil.copytree(zoo.path("llama-nano"), tmp_path / "llama-nano")
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path)
    monkeypatch.setattr(language, "measure", lambda folder: {"bits_per_byte": zoo.metrics("llama-nano")["bits_per_byte"]})
    commands.check([], Console(quiet=True))
    monkeypatch.setattr(language, "measure", lambda folder: {"bits_per_byte": 99.0})
    with pytest.raises(ValueError, match="llama-nano bits_per_byte"):
        commands.check([], Console(quiet=True))


def test_training_writes_a_whole_folder(tmp_path, monkeypatch):
    """A few steps of the real script on a little text."""
    from dataclasses import replace

    monkeypatch.setattr(language, "training_texts", lambda: (["def one(): return 1\n" * 400], ["two three four " * 300]))
    monkeypatch.setattr(language, "measure", lambda folder: {"bits_per_byte": 1.0})
    monkeypatch.setattr(language, "ngram_baseline", lambda *texts: {})
    spec = replace(SPECS["llama-nano"], tokens=6 * 128, batch_tokens=128, length=32, long_length=64)
    tokenizer = zoo.load("llama-nano")[1]
    seen = []
    metrics = language.train(spec, tmp_path / "m", tokenizer=tokenizer, progress=lambda *a: seen.append(a))
    assert [s[0] for s in seen] == list(range(1, 7))
    assert metrics["training_tokens"] == 768
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    assert json.loads((tmp_path / "m" / "metrics.json").read_text()) == metrics
    assert language.train_tokenizer(["some text here"] * 20)("some text")["input_ids"]
