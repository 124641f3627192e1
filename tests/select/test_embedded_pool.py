from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from grainwise.select import embedded_pool
from grainwise.select.embedded_pool import EmbeddedPool
from grainwise.select.text_encoder import Encoder, TransformerEncoder


class Letters:
    """An encoder without a network: how often each vowel occurs. Counts the texts that it was given."""

    def __init__(self, vowels: str = "aeiou") -> None:
        self.vowels, self.seen = vowels, 0

    def fingerprint(self) -> str:
        return hashlib.sha256(self.vowels.encode()).hexdigest()

    def encode(self, texts):
        self.seen += len(texts)
        return np.array([[1 + t.count(v) for v in self.vowels] for t in texts], np.float32)


@pytest.fixture
def corpus():
    rows = [f"row {i} " + "a" * (i % 7) + "e" * (i % 3) for i in range(40)]
    return Dataset.from_dict({"prompt": rows, "response": [r[::-1] for r in rows]})


def test_rows_and_batches_cross_shard_borders(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((23, 3)).astype(np.float32)
    pool = EmbeddedPool.from_batches([vectors[:10], vectors[10:15], vectors[15:]], tmp_path, dtype="float32")
    assert (len(pool), pool.dimension) == (23, 3)
    np.testing.assert_array_equal(pool.embeddings, vectors)
    np.testing.assert_array_equal(pool.rows([22, 0, 10, 9, 9]), vectors[[22, 0, 10, 9, 9]])
    starts = [(start, len(batch)) for start, batch in pool.batches(4)]
    assert starts == [(0, 4), (4, 4), (8, 2), (10, 4), (14, 1), (15, 4), (19, 4)]
    with pytest.raises(ValueError, match=r"0\.\.22"):
        pool.rows([23])


@pytest.mark.parametrize(
    "value, words", [(np.nan, r"rows \[2\] are NaN"), (np.inf, r"rows \[2\] are NaN"), (0.0, r"rows \[2\] are zero")]
)
def test_broken_rows_are_named(tmp_path, value, words):
    vectors = np.ones((4, 3), np.float32)
    vectors[2] = value
    with pytest.raises(ValueError, match=words):
        EmbeddedPool.from_array(vectors)
    with pytest.raises(ValueError, match=words):
        EmbeddedPool.from_batches([vectors], tmp_path)


def test_values_beyond_float16_are_refused_with_the_remedy(tmp_path):
    with np.errstate(over="ignore"), pytest.raises(ValueError, match="store as float32"):
        EmbeddedPool.from_batches([np.full((2, 2), 1e6)], tmp_path)


@pytest.mark.parametrize("array", [np.ones(3), np.ones((0, 3))])
def test_arrays_of_the_wrong_shape_are_refused(array):
    with pytest.raises(ValueError, match="rows >= 1"):
        EmbeddedPool.from_array(array)


def test_a_data_set_is_embedded_with_progress(corpus):
    steps = []
    pool = EmbeddedPool.from_dataset(corpus, encoder=Letters(), progress=lambda done, total, what: steps.append((done, total)))
    assert steps == [(40, 40)]
    expected = Letters().encode([f"{r['prompt']}\n{r['response']}" for r in corpus])
    np.testing.assert_array_equal(pool.embeddings, expected)
    only = EmbeddedPool.from_dataset(corpus, encoder=Letters(), text=["prompt"], progress=False)
    np.testing.assert_array_equal(only.embeddings, Letters().encode(corpus["prompt"]))


def test_a_cached_pool_is_reused_and_an_interrupted_one_is_continued(tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(embedded_pool, "SHARD_ROWS", 16)
    first = EmbeddedPool.from_dataset(corpus, encoder=Letters(), folder=tmp_path, progress=False).embeddings
    encoder = Letters()
    EmbeddedPool.from_dataset(corpus, encoder=encoder, folder=tmp_path, progress=False)
    assert encoder.seen == 0
    (tmp_path / "shard-00001.npy").unlink()
    with pytest.raises(ValueError, match=r"incomplete, shard-00001.npy is missing: run"):
        EmbeddedPool.open(tmp_path)
    again = EmbeddedPool.from_dataset(corpus, encoder=encoder, folder=tmp_path, progress=False)
    assert encoder.seen == 16
    np.testing.assert_array_equal(again.embeddings, first)


def test_a_pool_of_another_encoder_or_of_other_texts_is_refused(tmp_path, corpus):
    EmbeddedPool.from_dataset(corpus, encoder=Letters(), folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="another encoder"):
        EmbeddedPool.from_dataset(corpus, encoder=Letters("xyz"), folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="another encoder"):
        EmbeddedPool.open(tmp_path, encoder=Letters("xyz"))
    with pytest.raises(ValueError, match="other texts"):
        EmbeddedPool.from_dataset(corpus.select(range(39)), encoder=Letters(), folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="stored as float16, not float32"):
        EmbeddedPool.from_dataset(corpus, encoder=Letters(), folder=tmp_path, dtype="float32", progress=False)
    assert len(EmbeddedPool.open(tmp_path, encoder=Letters())) == 40


def test_damaged_pools_are_refused(tmp_path, corpus):
    with pytest.raises(ValueError, match="holds no embedded pool"):
        EmbeddedPool.open(tmp_path)
    EmbeddedPool.from_dataset(corpus, encoder=Letters(), folder=tmp_path, progress=False)
    manifest = json.loads((tmp_path / "pool.json").read_text())
    (tmp_path / "pool.json").write_text(json.dumps(manifest | {"rows": 41}))
    with pytest.raises(ValueError, match="promises 41 rows"):
        EmbeddedPool.open(tmp_path)
    (tmp_path / "pool.json").write_text("{")
    with pytest.raises(ValueError, match="does not describe a pool"):
        EmbeddedPool.open(tmp_path)
    (tmp_path / "pool.json").write_text(json.dumps(manifest))
    (tmp_path / "shard-00000.npy").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot read the shard"):
        EmbeddedPool.open(tmp_path)


def test_wrong_columns_and_empty_texts_are_named(corpus):
    with pytest.raises(ValueError, match=r"no column 'promt'. Did you mean 'prompt'"):
        EmbeddedPool.from_dataset(corpus, encoder=Letters(), text=["promt"])
    with pytest.raises(ValueError, match=r"rows \[1\] have no text"):
        EmbeddedPool.from_texts(["a", " "], encoder=Letters(), progress=False)
    with pytest.raises(ValueError, match="no rows"):
        EmbeddedPool.from_texts([], encoder=Letters(), progress=False)


TEXTS = ["short", "a somewhat longer text with more letters", "mid length text", "x"]


def hidden(model, characters, text):
    ids = torch.tensor([characters(text)["input_ids"]])
    return model.base_model(input_ids=ids).last_hidden_state[0].detach().numpy()


REDUCTIONS = {"mean": lambda h: h.mean(0), "last": lambda h: h[-1], "first": lambda h: h[0]}


@pytest.mark.parametrize("pooling", REDUCTIONS)
def test_pooled_vectors_equal_one_text_at_a_time(tiny_llama, characters, pooling):
    encoder = TransformerEncoder(tiny_llama, characters, pooling=pooling, normalize=False, batch_tokens=64)
    assert isinstance(encoder, Encoder)
    expected = np.stack([REDUCTIONS[pooling](hidden(tiny_llama, characters, t)) for t in TEXTS])
    np.testing.assert_allclose(encoder.encode(TEXTS), expected, atol=1e-5)
    unit = TransformerEncoder(tiny_llama, characters, pooling=pooling).encode(TEXTS)
    np.testing.assert_allclose(unit, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


def test_long_texts_are_averaged_over_windows_by_their_tokens(tiny_llama, characters):
    text = "a somewhat longer text"  # 22 tokens: windows of 10, 10 and 2
    parts = [hidden(tiny_llama, characters, text[i : i + 10]) for i in (0, 10, 20)]
    encoder = TransformerEncoder(tiny_llama, characters, length=10, normalize=False)
    np.testing.assert_allclose(encoder.encode([text])[0], np.concatenate(parts).mean(0), atol=1e-5)
    first = TransformerEncoder(tiny_llama, characters, length=10, windows=1, normalize=False)
    np.testing.assert_allclose(first.encode([text])[0], parts[0].mean(0), atol=1e-5)


def test_an_encoder_only_model_works_too(characters):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    bert = BertModel(
        BertConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    vectors = TransformerEncoder(bert.eval(), characters, pooling="first").encode(TEXTS)
    assert vectors.shape == (4, 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_the_fingerprint_follows_weights_and_options(tiny_llama, characters):
    encoder = TransformerEncoder(tiny_llama, characters)
    before = encoder.fingerprint()
    assert before == TransformerEncoder(tiny_llama, characters).fingerprint()
    assert before != TransformerEncoder(tiny_llama, characters, pooling="last").fingerprint()
    with torch.no_grad():
        tiny_llama.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    assert before != encoder.fingerprint()


def test_adapters_are_part_of_the_encoder(tiny_llama, characters):
    from peft import LoraConfig, get_peft_model

    plain = TransformerEncoder(tiny_llama, characters).encode(TEXTS)
    adapted = get_peft_model(tiny_llama, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    assert not np.allclose(TransformerEncoder(adapted, characters).encode(TEXTS), plain, atol=1e-4)


def test_wrong_encoder_options_are_refused(tiny_llama, characters):
    with pytest.raises(ValueError, match=r"unknown pooling 'men'. Did you mean 'mean'"):
        TransformerEncoder(tiny_llama, characters, pooling="men")
    with pytest.raises(ValueError, match="at least 1"):
        TransformerEncoder(tiny_llama, characters, length=0)
    with pytest.raises(ValueError, match=r"texts \[1\] have no tokens"):
        TransformerEncoder(tiny_llama, characters).encode(["a", ""])
