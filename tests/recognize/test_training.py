"""The training frame: batches, augmentation, soft labels, evaluation, resuming."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from grainwise import images as im
from grainwise.recognize.training import (
    ArrayImages,
    ImageCollator,
    RecognitionTrainer,
    accuracy,
    accuracy_of,
    labels_of,
    predict_logits,
    train_recogniser,
)

VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 8,
    "patch_size": 4,
}


def vit(**options):
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**VIT, num_labels=3, **options))


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    return ArrayImages(rng.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8), np.arange(30) % 3)


def arguments(folder, **options):
    quiet = {"report_to": [], "disable_tqdm": True, "log_level": "error", "save_strategy": "no"}
    return TrainingArguments(folder, use_cpu=True, **quiet | options)


def test_collator_takes_arrays_tensors_and_pictures():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    forms = [pixels, torch.from_numpy(pixels), Image.fromarray(pixels)]
    for form in forms:
        batch = ImageCollator()([{"image": form, "label": 1}] * 2)
        torch.testing.assert_close(batch["pixel_values"][0], torch.from_numpy(pixels).permute(2, 0, 1) / 255)
        assert batch["labels"].tolist() == [1, 1]
    floats = torch.rand(3, 6, 5)
    assert torch.equal(ImageCollator()([{"pixel_values": floats}])["pixel_values"][0], floats)
    assert "labels" not in ImageCollator()([{"pixel_values": floats}])
    mixed = [{"image": Image.new("RGB", (9, 7))}, {"image": Image.new("RGB", (4, 4))}]
    assert ImageCollator(size=6)(mixed)["pixel_values"].shape == (2, 3, 6, 6)
    with pytest.raises(ValueError, match="different shapes .* give the collator a size"):
        ImageCollator()(mixed)
    with pytest.raises(ValueError, match="an item needs 'pixel_values' or 'image'; this one has 'picture'"):
        ImageCollator()([{"picture": 1}])


def test_augmentation_follows_the_default_generator(data):
    collate = ImageCollator(im.Pipeline(im.random_flip))
    items = [data[i] for i in range(8)]
    torch.manual_seed(3)
    one, two = collate(items)["pixel_values"], collate(items)["pixel_values"]
    torch.manual_seed(3)
    assert torch.equal(collate(items)["pixel_values"], one)
    assert not torch.equal(one, two)


def test_evaluation_is_not_augmented(data, tmp_path):
    model = vit()
    blank = im.Pipeline(lambda images: images * 0)
    half = im.Pipeline(partial(im.normalise, mean=(0.5,) * 3, std=(0.5,) * 3))
    trainer = RecognitionTrainer(model, arguments(tmp_path), augment=blank, prepare=half, train_dataset=data, eval_dataset=data)
    seen = next(iter(trainer.get_train_dataloader()))["pixel_values"]
    assert (seen == -1).all()
    expected = accuracy(model, data, prepare=half)
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(expected)
    assert trainer.predict(data).metrics["test_accuracy"] == pytest.approx(expected)


def test_soft_labels_use_cross_entropy(data, tmp_path):
    model = vit()
    mix = partial(im.mixup, num_labels=3, alpha=1.0)
    trainer = RecognitionTrainer(model, arguments(tmp_path), mix=mix, train_dataset=data)
    torch.manual_seed(0)
    batch = trainer.data_collator([data[i] for i in range(6)])
    loss = trainer.compute_loss(model, dict(batch))
    expected = -(batch["labels"] * model(batch["pixel_values"]).logits.log_softmax(-1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    assert train_recogniser(model, data, epochs=1, lr=1e-3, mix=mix, bf16=True).losses[0] > 0


def test_a_resumed_run_ends_where_an_unbroken_one_does(data, tmp_path):
    def trainer(folder):
        options = {"num_train_epochs": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 10}
        args = arguments(folder, save_strategy="epoch", **options)
        return RecognitionTrainer(vit(hidden_dropout_prob=0.1), args, augment=im.Pipeline(im.random_flip), train_dataset=data)

    whole = trainer(tmp_path / "a")
    whole.train()
    again = trainer(tmp_path / "b")
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    for one, two in zip(whole.model.parameters(), again.model.parameters()):
        torch.testing.assert_close(one, two)


def test_the_best_checkpoint_comes_back(data, tmp_path):
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": "accuracy", "num_train_epochs": 3}
    args = arguments(tmp_path, load_best_model_at_end=True, learning_rate=1e-2, **options)
    trainer = RecognitionTrainer(vit(), args, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert accuracy(trainer.model, data) == pytest.approx(trainer.state.best_metric)
    best = ViTForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    torch.testing.assert_close(predict_logits(trainer.model, data), predict_logits(best, data))


def test_a_loss_that_is_not_finite_stops_with_the_step(data):
    with pytest.raises(FloatingPointError, match="at step 0: lower the learning rate"):
        train_recogniser(vit(), ArrayImages(torch.full((6, 3, 8, 8), float("nan")), torch.zeros(6)), epochs=1, lr=1e-3)


def test_prediction(data):
    model = vit()
    tensor = im.from_uint8(data.images)
    torch.testing.assert_close(predict_logits(model, tensor, batch_size=7), predict_logits(model, data))
    assert labels_of([{"label": 2}, {"labels": 0}]).tolist() == [2, 0]
    with pytest.raises(ValueError, match="no images"):
        predict_logits(model, tensor[:0])


def test_metric_and_dataset_errors():
    class Prediction:
        predictions = (np.array([[0.1, 0.9], [0.8, 0.2]]), "rest")
        label_ids = np.array([1, 1])

    assert accuracy_of(Prediction) == {"accuracy": 0.5}
    with pytest.raises(ValueError, match="as many labels as images"):
        ArrayImages(np.zeros((2, 4, 4, 3), np.uint8), [1])
