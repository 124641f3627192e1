"""MixOE: targets, losses and mixing by their closed forms; the trainer; the detector."""

import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from grainwise import images as im
from grainwise.recognize.mixoe import (
    EndlessSampler,
    MixOutlierExposure,
    OODDetector,
    OutlierExposureTrainer,
    soft_cross_entropy,
    toward_uniform,
)
from grainwise.recognize.training import ArrayImages, RecognitionTrainer, train_recogniser

K, SIZE = 4, 8
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": SIZE,
    "patch_size": 4,
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def vit(num_labels=K, **options):
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**VIT, num_labels=num_labels, **options))


def arrays(count, seed, size=SIZE):
    rng = np.random.default_rng(seed)
    return ArrayImages(rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8), np.arange(count) % K)


@pytest.fixture
def known():
    return arrays(22, 0)


@pytest.fixture
def pool():
    return [{"image": i} for i in arrays(9, 1).images.numpy()]


def arguments(folder, **options):
    quiet = {
        "report_to": [],
        "disable_tqdm": True,
        "log_level": "error",
        "save_strategy": "no",
        "per_device_train_batch_size": 8,
    }
    return TrainingArguments(
        folder, use_cpu=True, **quiet | {"learning_rate": 1e-2, "num_train_epochs": 2, "seed": 3} | options
    )


def trainer(folder, known, pool, model=None, mix=None, **options):
    ours = {k: options.pop(k) for k in ("resize_outliers", "concatenated", "augment", "prepare") if k in options}
    return OutlierExposureTrainer(
        model or vit(), arguments(folder, **options), train_dataset=known, outlier_dataset=pool, mix_outliers=mix, **ours
    )


# targets and losses


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_soft_targets(seed, weight):
    labels = torch.randint(K, (6,), generator=seeded(seed))
    mix = MixOutlierExposure("mixup", weight=weight)
    images = torch.rand(6, 3, SIZE, SIZE)
    mixed, targets = mix(images, labels, 1 - images, num_labels=K, generator=seeded())
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    torch.testing.assert_close(targets.amax(1), torch.full((6,), weight + (1 - weight) / K))
    assert torch.equal(targets.argmax(1), labels) or weight < 1e-6
    torch.testing.assert_close(mixed, weight * images + (1 - weight) * (1 - images))


def test_targets_at_the_ends():
    one_hot = torch.eye(K)
    assert torch.equal(toward_uniform(one_hot, torch.ones(1)), one_hot)
    torch.testing.assert_close(toward_uniform(one_hot, torch.zeros(1)), torch.full((K, K), 1 / K))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_the_mixed_loss_splits_linearly(seed, weight):
    z = 5 * torch.randn(7, K, generator=seeded(seed), dtype=torch.float64).float()
    y = torch.randint(K, (7,), generator=seeded(seed + 1))
    targets = toward_uniform(im.soft_labels(y, K), torch.tensor([weight]))
    uniform = (z.logsumexp(1) - z.mean(1)).mean()
    torch.testing.assert_close(soft_cross_entropy(z, targets), weight * cross_entropy(z, y) + (1 - weight) * uniform)


def test_weight_zero_is_outlier_exposure(known, pool, tmp_path):
    model = vit().eval()
    made = trainer(tmp_path, known, pool, model, MixOutlierExposure("mixup", weight=0.0, beta=0.7))
    batch = made.data_collator([known[i] for i in range(8)])
    model.train()
    loss = made.compute_loss(model, dict(batch))
    order = next(iter([EndlessSampler(9, (3, 0))]))
    outliers = im.from_uint8(np.stack([pool[i]["image"] for i, _ in zip(order, range(8))]))
    z, o = model(batch["pixel_values"]).logits, model(outliers).logits
    expected = cross_entropy(z, batch["labels"]) + 0.7 * (o.logsumexp(1) - o.mean(1)).mean()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)


# mixing


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.floats(0.05, 4.0))
def test_cutmix_pixels_and_label_weight(seed, per_sample, alpha):
    images, outliers = torch.zeros(5, 3, 7, 9), torch.ones(5, 3, 7, 9)
    labels = torch.arange(5) % K
    mix = MixOutlierExposure("cutmix", alpha=alpha, per_sample=per_sample)
    mixed, targets = mix(images, labels, outliers, num_labels=K, generator=seeded(seed))
    assert ((mixed == 0) | (mixed == 1)).all()
    kept = (mixed == 0).all(1).float().mean((1, 2))  # counted pixels of the known image
    assert torch.equal((mixed == 1).any(1), (mixed == 1).all(1))
    torch.testing.assert_close(targets, toward_uniform(im.soft_labels(labels, K), kept), rtol=0, atol=1e-6)
    if not per_sample:
        assert torch.equal(mixed, mixed[:1].expand(5, -1, -1, -1))  # one weight, one rectangle for the batch


def test_one_weight_a_batch_or_one_a_sample():
    images = torch.rand(6, 3, SIZE, SIZE)
    for per_sample, distinct in ((False, 1), (True, 6)):
        mix = MixOutlierExposure("mixup", per_sample=per_sample)
        _, targets = mix(images, torch.zeros(6, dtype=torch.long), images, num_labels=K, generator=seeded())
        assert len(targets[:, 0].unique()) == distinct


def test_own_operation():
    mix = MixOutlierExposure(lambda images, outliers, weight, generator: (outliers, torch.zeros(1)))
    mixed, targets = mix(
        torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]), torch.ones(2, 3, 4, 4), num_labels=2, generator=seeded()
    )
    assert mixed.all()
    assert (targets == 0.5).all()


# the trainer


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_beta_zero_is_standard_training_bit_for_bit(known, tmp_path):
    class Untouchable:
        def __len__(self):
            return 5

        def __getitem__(self, index):
            if self.armed:
                raise AssertionError("outliers must not be read")
            return {"image": np.zeros((SIZE, SIZE, 3), np.uint8)}

        armed = False

    pool = Untouchable()
    flip = im.Pipeline(im.random_flip)
    model = vit(hidden_dropout_prob=0.1)
    ours = trainer(tmp_path, known, pool, model, MixOutlierExposure(beta=0.0), augment=flip)
    pool.armed = True
    ours.train()
    plain = RecognitionTrainer(vit(hidden_dropout_prob=0.1), arguments(tmp_path), train_dataset=known, augment=flip)
    plain.train()
    assert torch.equal(weights(ours.model), weights(plain.model))


def test_the_known_images_come_in_the_same_order_with_outliers(known, pool, tmp_path):
    seen = {}

    def watched(kind):
        class Watched(kind):
            def compute_loss(self, model, inputs, *args, **kwargs):
                seen.setdefault(kind, []).append(inputs["pixel_values"].clone())
                return super().compute_loss(model, inputs, *args, **kwargs)

        return Watched

    options = {"train_dataset": known, "augment": im.Pipeline(im.random_flip)}
    watched(RecognitionTrainer)(vit(), arguments(tmp_path), **options).train()
    watched(OutlierExposureTrainer)(vit(), arguments(tmp_path), outlier_dataset=pool, **options).train()
    for one, two in zip(seen[RecognitionTrainer], seen[OutlierExposureTrainer]):
        assert torch.equal(one, two)


def test_a_resumed_run_ends_where_an_unbroken_one_does(known, pool, tmp_path):
    def fresh(name):
        return trainer(tmp_path / name, known, pool, save_strategy="epoch", augment=im.Pipeline(im.random_flip))

    whole, again = fresh("a"), fresh("b")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    torch.testing.assert_close(weights(whole.model), weights(again.model))


def test_few_outliers_are_recycled(known, pool, tmp_path):
    made = trainer(tmp_path, known, pool[:3])
    made.train()
    assert made.state.global_step == 6  # no batch of the known images is skipped
    drawn = [i for i, _ in zip(EndlessSampler(3, (0,)), range(9))]
    assert sorted(drawn) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    late = [i for i, _ in zip(EndlessSampler(3, (0,), first=4), range(5))]
    assert late == drawn[4:]


def test_one_forward_pass_gives_the_same_loss_without_batch_norm(known, pool, tmp_path):
    losses = []
    for concatenated in (False, True):
        made = trainer(tmp_path, known, pool, concatenated=concatenated)
        made.model.train()
        batch = made.data_collator([known[i] for i in range(8)])
        losses.append(made.compute_loss(made.model, dict(batch)))
    torch.testing.assert_close(*losses)


def test_exposure_lowers_the_confidence_on_outliers():
    rng = np.random.default_rng(0)
    labels = np.arange(64) % 2
    shade = np.where(labels == 0, 40, 120)[:, None, None, None]
    known = ArrayImages((rng.integers(0, 60, (64, SIZE, SIZE, 3)) + shade).astype(np.uint8), labels)
    bright = [{"image": rng.integers(190, 256, (SIZE, SIZE, 3), dtype=np.uint8)} for _ in range(40)]
    sure = {}
    for beta in (0.0, 1.0):
        model = vit(num_labels=2)
        options = {"outlier_dataset": bright, "mix_outliers": MixOutlierExposure(beta=beta)}
        train_recogniser(model, known, epochs=20, lr=1e-2, trainer=OutlierExposureTrainer, trainer_options=options)
        sure[beta] = [OODDetector(model).score_of(images).mean() for images in (bright, known)]
    assert sure[0.0][0] > 0.9  # standard training is as sure of what it has never seen
    assert sure[1.0][0] < sure[0.0][0] - 0.1
    assert sure[1.0][1] > sure[1.0][0]


# the detector


def test_detector(known, tmp_path):
    detector = OODDetector(vit(), "energy").calibrate(known, tpr=0.5)
    labels, scores = detector.predict(known)
    assert (labels == -1).sum() == 11
    assert ((labels == -1) == (scores < detector.threshold_)).all()
    detector.save(tmp_path)
    assert json.loads((tmp_path / "ood.json").read_text())["score"] == "energy"
    again = OODDetector.load(tmp_path)
    torch.testing.assert_close(again.predict(known)[1], scores, rtol=1e-4, atol=1e-6)
    (tmp_path / "ood.json").write_text("{")
    with pytest.raises(ValueError, match="ood.json holds no detector settings"):
        OODDetector.load(tmp_path)


# bad input


def test_errors_teach(known, pool, tmp_path):
    images, labels = torch.rand(2, 3, 4, 4), torch.tensor([0, 0])
    with pytest.raises(ValueError, match="at least two classes"):
        MixOutlierExposure()(images, labels, images, num_labels=1, generator=seeded())
    with pytest.raises(ValueError, match="alpha must be positive"):
        MixOutlierExposure(alpha=0.0)
    with pytest.raises(ValueError, match="Did you mean 'cutmix'"):
        MixOutlierExposure("cutmx")
    with pytest.raises(ValueError, match="fixed weight lies in"):
        MixOutlierExposure(weight=1.5)
    with pytest.raises(ValueError, match="one shape"):
        MixOutlierExposure()(images, labels, torch.rand(2, 3, 4, 5), num_labels=2, generator=seeded())
    with pytest.raises(ValueError, match="outlier set is empty"):
        trainer(tmp_path, known, [])
    with pytest.raises(ValueError, match="no threshold yet"):
        OODDetector(vit()).predict(known)
    with pytest.raises(ValueError, match="Did you mean 'msp'"):
        OODDetector(vit(), "mps")


def test_outliers_of_another_size_channels_or_normalisation(known, tmp_path):
    larger = [{"image": i} for i in arrays(9, 1, size=12).images.numpy()]
    with pytest.raises(ValueError, match=r"outliers are \(12, 12\) .* training images \(8, 8\): .*resize_outliers=True"):
        trainer(tmp_path, known, larger).train()
    trainer(tmp_path, known, larger, resize_outliers=True, max_steps=1).train()
    grey = [{"pixel_values": torch.rand(1, SIZE, SIZE)} for _ in range(9)]
    with pytest.raises(ValueError, match="outliers have 1 channels, the training images 3"):
        trainer(tmp_path, known, grey).train()
    normalised = [{"pixel_values": torch.randn(3, SIZE, SIZE)} for _ in range(9)]
    with pytest.raises(ValueError, match="only the outliers are normalised"):
        trainer(tmp_path, known, normalised).train()


def test_labels_among_the_outliers_are_said_to_be_ignored(known, tmp_path):
    with pytest.warns(UserWarning, match="outlier set has labels; they are ignored"):
        made = trainer(tmp_path, known, arrays(9, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made.train()
