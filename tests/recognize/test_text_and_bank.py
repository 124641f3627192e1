from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from grainwise.recognize.feature_bank import FeatureBank, random_view
from grainwise.recognize.text_classifier import TextClassifier, encode_texts


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=40, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1, **layers)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, **layers)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).train()


@pytest.fixture(scope="module")
def words():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    listed = ["<s>", "</s>", "<unk>", "a", "photo", "of", "robin", "wren", "red", "small", "bird"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(listed)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def images():
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_weights_are_normalised_means_over_the_prompts_of_a_class(clip, words):
    more = {"wren": ["small bird"]}
    text = TextClassifier.from_prompts(clip, words, ["robin", "wren"], ["a {}", "photo of a {}"], descriptions=more)
    features = encode_texts(clip, words, ["a wren", "photo of a wren", "small bird"])
    torch.testing.assert_close(text.weights[:, 1], normalize(features.mean(0), dim=0))
    assert text.weights.shape == (12, 2)
    assert clip.training  # left as it was
    torch.testing.assert_close(text.logits(features)[0], 100 * features[0] @ text.weights)


def test_text_weights_are_saved_and_reloaded(clip, words, tmp_path):
    text = TextClassifier.from_prompts(clip, words, ["robin", "wren"])
    text.save(tmp_path / "text.safetensors")
    again = TextClassifier.load(tmp_path / "text.safetensors")
    assert torch.equal(again.weights, text.weights)
    assert again.class_names == ("robin", "wren")
    with pytest.raises(ValueError, match="expected a saved feature bank"):
        FeatureBank.load(tmp_path / "text.safetensors")
    (tmp_path / "broken").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="no readable safetensors"):
        TextClassifier.load(tmp_path / "broken")


def test_wrong_prompts_are_named(clip, words):
    with pytest.raises(ValueError, match="has no {}"):
        TextClassifier.from_prompts(clip, words, ["robin"], ["a bird"])
    with pytest.raises(ValueError, match=r"repeated: \['wren'\]"):
        TextClassifier.from_prompts(clip, words, ["wren", "wren"])
    with pytest.raises(ValueError, match="neither template nor description"):
        TextClassifier.from_prompts(clip, words, ["wren"], [])
    with pytest.raises(ValueError, match="list of at least one"):
        TextClassifier.from_prompts(clip, words, "wren")
    with pytest.raises(ValueError, match="unit columns"):
        TextClassifier(torch.ones(3, 2))
    with pytest.raises(ValueError, match="1 class names for 2"):
        TextClassifier(torch.eye(3)[:, :2], ("one",))
    with pytest.raises(ValueError, match=r"need \(rows, 3\)"):
        TextClassifier(torch.eye(3)[:, :2]).logits(torch.ones(1, 4))


def test_long_texts_are_counted(clip, words):
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than 8 tokens"):
        encode_texts(clip, words, ["red " * 20, "red"])


def test_a_bank_keeps_every_view(clip, words, images):
    bank = FeatureBank.encode(clip, images, [0, 1, 1, 0, 2], views=3, texts=["red bird"] * 5, tokenizer=words)
    assert bank.views.shape == (5, 3, 12)
    assert bank.x.shape == (15, 12)
    assert bank.y.tolist() == [0] * 3 + [1] * 6 + [0] * 3 + [2] * 3
    assert bank.groups[:4].tolist() == [0, 0, 0, 1]
    torch.testing.assert_close(bank.keys, normalize(bank.views.mean(1), dim=1))
    assert bank.texts.shape == (5, 12)
    assert torch.equal(bank.views, FeatureBank.encode(clip, images, views=3, seed=0).views)
    assert not torch.equal(bank.views, FeatureBank.encode(clip, images, views=3, seed=1).views)


def test_one_view_is_the_image_itself(clip, images):
    bank = FeatureBank.encode(clip, images, mean=(0, 0, 0), std=(1, 1, 1))
    with torch.no_grad():
        expected = clip.eval().get_image_features(pixel_values=images).pooler_output
    torch.testing.assert_close(bank.x, normalize(expected, dim=1))
    with pytest.raises(ValueError, match="no labels"):
        _ = bank.y


def test_a_bank_is_saved_and_reloaded(clip, images, tmp_path):
    bank = FeatureBank.encode(clip, images, [0, 0, 1, 1, 2], views=2)
    bank.save(tmp_path / "bank.safetensors")
    again = FeatureBank.load(tmp_path / "bank.safetensors")
    assert torch.equal(again.views, bank.views)
    assert torch.equal(again.labels, bank.labels)
    assert again.texts is None


def test_views_are_crops_of_the_image():
    ramp = torch.linspace(0, 1, 32).expand(64, 3, 32, 32).clone()  # brighter to the right
    seen = random_view(ramp, torch.Generator().manual_seed(0))
    width = (seen[..., -1] - seen[..., 0]).mean((1, 2))
    assert seen.shape == ramp.shape
    assert 16 < int((width < 0).sum()) < 48  # about half are flipped
    assert float(width.abs().min()) > 0.5  # the narrowest crop: sqrt(0.5 · 3/4) of the width
    assert float(width.abs().max()) <= 1.0


def test_wrong_banks_are_refused(clip, words, images):
    with pytest.raises(TypeError, match="divide 8-bit images by 255"):
        FeatureBank.encode(clip, (images * 255).to(torch.uint8))
    with pytest.raises(ValueError, match="before normalisation"):
        FeatureBank.encode(clip, images * 2 - 1)
    with pytest.raises(ValueError, match="images, 3, height, width"):
        FeatureBank.encode(clip, images[0])
    with pytest.raises(ValueError, match="5 images and 2 labels"):
        FeatureBank.encode(clip, images, [0, 1])
    with pytest.raises(ValueError, match="5 images and 1 captions"):
        FeatureBank.encode(clip, images, texts=["red"], tokenizer=words)
    with pytest.raises(ValueError, match="give tokenizer="):
        FeatureBank.encode(clip, images, texts=["red"] * 5)
    with pytest.raises(ValueError, match="at least 1"):
        FeatureBank.encode(clip, images, views=0)
    with pytest.raises(ValueError, match="unit length"):
        FeatureBank(torch.ones(2, 1, 3))
    with pytest.raises(ValueError, match="one for each image"):
        FeatureBank(torch.eye(3)[:, None], texts=torch.eye(3)[:2])
    with pytest.raises(ValueError, match="need 3 labels"):
        FeatureBank(torch.eye(3)[:, None], torch.zeros(2))
