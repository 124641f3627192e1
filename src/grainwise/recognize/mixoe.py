"""MixOE: fine-tune a classifier on mixtures of its images with outliers, so that its confidence falls on the way out.

Paper: Mixture Outlier Exposure: Towards Out-of-Distribution Detection in Fine-grained Environments (arXiv 2106.03917). Plain
outlier exposure trains on outliers that lie far from the known classes and leaves the region between, where an unseen sister
species falls, to chance. Here each training image is mixed with an outlier (mixup, or an outlier rectangle pasted into it), and
the target is mixed likewise between its label and the uniform distribution: the confidence decays linearly from known to
unknown.

Departures from the authors' code: outliers are recycled when they run out (theirs skips the rest of the epoch's batches);
the pasted rectangle keeps its whole side instead of the next smaller even one; a concatenated forward pass is an option.
"""

from __future__ import annotations

import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler

from grainwise.evaluate.ood import SCORERS, ood_scores, threshold_at
from grainwise.images import Pipeline, blend, cut_boxes, draw_beta, kept_share, paste, random_flip, resize, soft_labels
from grainwise.naming import did_you_mean
from grainwise.recognize.training import LABEL_KEYS, ImageCollator, RecognitionTrainer, predict_logits

if TYPE_CHECKING:
    from grainwise.vision_state import VisionState

MixOp = Callable[[Tensor, Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]  # images, outliers, weight -> mixed, weight
UNKNOWN = -1  # the label of what is none of the classes
SETTINGS = "ood.json"


class MixOutlierExposure:
    """Mixing known images with outliers: a function of a batch, and the weight of its loss.

    op: `mixup`, `cutmix`, or a callable (images, outliers, weight, generator) -> (mixed, weight kept). alpha: of
    Beta(alpha, alpha), from which the weight of the known image comes (1.0 for mixup, 2.0 for cutmix in the paper). beta:
    weight of the mixed loss. per_sample: a weight, and a rectangle, for each image, not one for the batch. weight: a fixed
    one instead of a draw; 0 gives classic outlier exposure. Raises ValueError for alpha <= 0 or beta < 0.
    """

    def __init__(
        self,
        op: Literal["mixup", "cutmix"] | MixOp = "mixup",
        *,
        alpha: float = 1.0,
        beta: float = 5.0,
        per_sample: bool = False,
        weight: float | None = None,
    ) -> None:
        operations: dict[str, MixOp] = {"mixup": mix_up, "cutmix": cut_mix}
        if not callable(op) and op not in operations:
            raise ValueError(f"no way of mixing {op!r}. {did_you_mean(str(op), operations)}")
        if not alpha > 0 or beta < 0:
            raise ValueError(f"alpha must be positive and beta not negative, got alpha {alpha}, beta {beta}")
        if weight is not None and not 0 <= weight <= 1:
            raise ValueError(f"a fixed weight lies in [0, 1], got {weight}")
        self.op = op if callable(op) else operations[op]
        self.alpha, self.beta, self.per_sample, self.weight = alpha, beta, per_sample, weight

    def __call__(
        self, images: Tensor, labels: Tensor, outliers: Tensor, *, num_labels: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """(mixed images, soft targets (batch, num_labels)); images and outliers: (batch, channels, H, W), prepared alike.

        Raises ValueError for one class (uniform is then no different from the label) and for shapes that differ.
        """
        if num_labels < 2:
            raise ValueError("MixOE needs at least two classes: with one, every target is the same")
        if images.shape != outliers.shape:
            raise ValueError(f"images and outliers must have one shape, got {tuple(images.shape)} and {tuple(outliers.shape)}")
        count = len(images) if self.per_sample else 1
        if self.weight is None:
            drawn = draw_beta(self.alpha, count, generator).to(images.device)
        else:
            drawn = torch.full((count,), self.weight, device=images.device)
        mixed, kept = self.op(images, outliers, drawn, generator)
        return mixed, toward_uniform(soft_labels(labels, num_labels), kept)


def mix_up(images: Tensor, outliers: Tensor, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """weight * images + (1 - weight) * outliers, and the weight; weight: (batch,) or (1,)."""
    return blend(images, outliers, weight), weight


def cut_mix(images: Tensor, outliers: Tensor, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A rectangle of each outlier in its image, and the share of the image's pixels that is left."""
    height, width = images.shape[2:]
    boxes = cut_boxes(weight, height, width, generator)
    return paste(images, outliers, boxes), kept_share(boxes, height, width)


def toward_uniform(targets: Tensor, kept: Tensor) -> Tensor:
    """kept * targets + (1 - kept) / classes; targets: (batch, classes), kept: (batch,) or (1,)."""
    kept = kept.to(targets)[:, None]
    return kept * targets + (1 - kept) / targets.shape[1]


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean of -sum_k targets_k log softmax(logits)_k, in float32."""
    return functional.cross_entropy(logits.float(), targets)


class OutlierExposureTrainer(RecognitionTrainer):
    """`Trainer` that adds the mixed loss: CE(f(x), y) + beta * SoftCE(f(mixed), mixed target).

    outlier_dataset: items as in the training set; labels in it are ignored. It is shuffled by the training seed, recycled, and
    goes on where it was after a resumed checkpoint. resize_outliers: bring outliers to the size of the training images
    instead of refusing them. concatenated: one forward pass over known and mixed images together, which is faster, but
    gives batch norm other statistics than the paper's two passes. With beta = 0 the outliers are not touched.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        outlier_dataset: Dataset,
        mix_outliers: MixOutlierExposure | None = None,
        resize_outliers: bool = False,
        concatenated: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, args, **options)
        self.mix_outliers = mix_outliers or MixOutlierExposure()
        self.outlier_dataset, self.resize_outliers, self.concatenated = outlier_dataset, resize_outliers, concatenated
        self.outlier_collator = OutlierCollator(self.data_collator)
        self._outliers: Iterator[tuple[Tensor, torch.Generator]] | None = None
        if not len(outlier_dataset):
            raise ValueError("the outlier set is empty")
        if any(key in outlier_dataset[0] for key in LABEL_KEYS):
            warnings.warn("the outlier set has labels; they are ignored", stacklevel=2)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._outliers = None  # a stream starts with the first step, so that a resumed run knows where it is
        return super().train(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        beta = self.mix_outliers.beta
        if not beta or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        images, labels = inputs["pixel_values"], inputs["labels"]
        mixed, targets = self._mixed(images, labels)
        if self.concatenated:
            output = model(pixel_values=torch.cat([images, mixed]))
            known, unsure = output.logits.split(len(images))
            loss = functional.cross_entropy(
                known.float(), labels, label_smoothing=self.args.label_smoothing_factor
            ) + beta * soft_cross_entropy(unsure, targets)
            output = {"loss": loss, "logits": known}
        else:
            loss, output = super().compute_loss(model, inputs, True, num_items_in_batch)
            loss = loss + beta * soft_cross_entropy(model(pixel_values=mixed).logits, targets)
        return (loss, output) if return_outputs else loss

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        new = self._outliers is None
        self._outliers = self._outliers or self._stream()
        outliers, generator = next(self._outliers)
        outliers = fitting(outliers[: len(images)].to(images), images, may_resize=self.resize_outliers)
        if new:
            require_same_range(outliers, images)
        return self.mix_outliers(images, labels, outliers, num_labels=self._num_labels(), generator=generator)

    def _num_labels(self) -> int:
        return self.accelerator.unwrap_model(self.model).config.num_labels

    def _stream(self) -> Iterator[tuple[Tensor, torch.Generator]]:
        """Batches of outliers with a generator each; batch n is the same whether the run began at step 0 or was resumed."""
        size, seeds = self.args.train_batch_size, (self.args.seed, self.args.process_index)
        first = self.state.global_step * self.args.gradient_accumulation_steps
        loader = DataLoader(
            self.outlier_dataset,
            batch_size=size,
            sampler=EndlessSampler(len(self.outlier_dataset), seeds, first=first * size),
            collate_fn=self.outlier_collator,
            num_workers=self.args.dataloader_num_workers,
            generator=_generator(*seeds),
        )
        batches = iter(loader)
        for number in itertools.count(first):
            generator = _generator(*seeds, number)
            with torch.random.fork_rng(devices=[]):  # the training's own random numbers stay as they would be without us
                torch.manual_seed(generator.initial_seed())
                outliers = next(batches)["pixel_values"]
            yield outliers, generator


class EndlessSampler(Sampler[int]):
    """Indices 0..count-1, shuffled anew by the seeds for each round, without end, from position `first` of that sequence."""

    def __init__(self, count: int, seeds: tuple[int, ...], *, first: int = 0) -> None:
        self.count, self.seeds, self.first = count, seeds, first

    def __iter__(self) -> Iterator[int]:
        round_, place = divmod(self.first, self.count)
        while True:
            yield from torch.randperm(self.count, generator=_generator(*self.seeds, round_))[place:].tolist()
            round_, place = round_ + 1, 0


class OutlierCollator:
    """Prepares outliers like training images, without labels."""

    def __init__(self, collator: Callable[..., dict[str, Tensor]]) -> None:
        plain = isinstance(collator, ImageCollator)
        self.collator = ImageCollator(collator.steps, size=collator.size) if plain else collator  # no mixup among outliers

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return self.collator([{k: v for k, v in item.items() if k not in LABEL_KEYS} for item in items])


def fitting(outliers: Tensor, images: Tensor, *, may_resize: bool = False) -> Tensor:
    """Outliers of the images' height and width. Raises ValueError for other channels, or another size without `may_resize`."""
    if outliers.shape[1] != images.shape[1]:
        raise ValueError(f"outliers have {outliers.shape[1]} channels, the training images {images.shape[1]}")
    if outliers.shape[2:] == images.shape[2:]:
        return outliers
    if not may_resize:
        raise ValueError(
            f"outliers are {tuple(outliers.shape[2:])} high and wide, the training images {tuple(images.shape[2:])}: "
            "bring them to one size, or pass resize_outliers=True"
        )
    return resize(outliers, (images.shape[2], images.shape[3]))


def require_same_range(outliers: Tensor, images: Tensor) -> None:
    """Raise ValueError where one batch is normalised (it has negative values) and the other is not."""
    if bool((images < 0).any()) != bool((outliers < 0).any()):
        which = "the training images are" if bool((images < 0).any()) else "the outliers are"
        raise ValueError(
            f"only {which} normalised: mixing would change the statistics; give both as pixels and normalise in `prepare`"
        )


class OODDetector:
    """A classifier that says when an image is none of its classes.

    score: one of `grainwise.evaluate.ood.SCORERS`. prepare: the transforms of evaluation batches. After `calibrate`,
    `threshold_` is the score that a share `tpr` of known images reaches.
    """

    def __init__(
        self, model: nn.Module, score: str = "msp", *, temperature: float | None = None, prepare: Pipeline | None = None
    ) -> None:
        if score not in SCORERS:
            raise ValueError(f"no score {score!r}. {did_you_mean(score, SCORERS)}")
        self.model, self.score, self.prepare = model, score, prepare
        self.temperature = SCORERS[score][1] if temperature is None else temperature
        self.threshold_: float | None = None

    def calibrate(self, known: Dataset | Tensor, *, tpr: float = 0.95) -> OODDetector:
        """Set the threshold on held-out images of the known classes (never on the training images, which score too high)."""
        self.threshold_ = threshold_at(self.score_of(known), tpr)
        return self

    def predict(self, images: Dataset | Tensor) -> tuple[Tensor, Tensor]:
        """(labels (count,), -1 where the score is below the threshold; scores float64 (count,)).

        images: a data set, or (count, channels, H, W). Raises ValueError before `calibrate`.
        """
        if self.threshold_ is None:
            raise ValueError("no threshold yet: call calibrate(...) with held-out images of the known classes")
        logits = predict_logits(self.model, images, prepare=self.prepare)
        scores = torch.from_numpy(ood_scores(logits, self.score, temperature=self.temperature))
        return torch.where(scores >= self.threshold_, logits.argmax(1), UNKNOWN), scores

    def score_of(self, images: Dataset | Tensor) -> np.ndarray:
        """float64 (count,): how known each image looks."""
        return ood_scores(predict_logits(self.model, images, prepare=self.prepare), self.score, temperature=self.temperature)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """The model's folder, with `ood.json` in it: score, temperature, threshold. `prepare` is code and not saved."""
        home = Path(folder)
        self.model.save_pretrained(home)
        settings = {"score": self.score, "temperature": self.temperature, "threshold": self.threshold_}
        temporary = home / f"{SETTINGS}.partial"
        temporary.write_text(json.dumps(settings, indent=1) + "\n")
        os.replace(temporary, home / SETTINGS)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, prepare: Pipeline | None = None) -> OODDetector:
        """Read what `save` wrote; prepare: as it was given before. Raises ValueError for a folder without good settings."""
        from transformers import AutoModelForImageClassification

        file = Path(folder) / SETTINGS
        try:
            settings = json.loads(file.read_text())
            score, temperature, threshold = (settings[k] for k in ("score", "temperature", "threshold"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} holds no detector settings ({error}): save one with OODDetector.save") from error
        detector = cls(AutoModelForImageClassification.from_pretrained(folder), score, temperature=temperature, prepare=prepare)
        detector.threshold_ = threshold
        return detector


def _generator(*seeds: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> 1))


def recipe_step(
    state: VisionState,
    *,
    op: str = "mixup",
    alpha: float = 1.0,
    beta: float = 5.0,
    epochs: int = 10,
    lr: float = 1e-3,
    batch_size: int = 32,
) -> dict[str, float | int | str]:
    """Go on training the recipe's classifier (or a copy of its image tower) with mixtures of training pictures and outliers.

    epochs: passes over the training pictures. lr: of AdamW, cosine schedule. Raises ValueError when an outlier is one of the
    test pictures.
    """
    from grainwise.evaluate.ood import require_disjoint
    from grainwise.recognize.clip_recogniser import ShowProgress, keep_classifier, trainable_classifier
    from grainwise.recognize.training import ArrayImages, train_recogniser

    assert state.outliers is not None  # the card says that the step needs them
    novel = [image for pictures in (state.near, state.far) if pictures is not None for image in pictures.images]
    require_disjoint(state.outliers, id_test=state.test.images, ood_test=novel)
    model = trainable_classifier(state)
    record = train_recogniser(
        model,
        ArrayImages(state.train.images, state.train.labels),
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        seed=state.seed,
        augment=Pipeline(random_flip),
        prepare=state.prepare,
        trainer=OutlierExposureTrainer,
        trainer_options={
            "outlier_dataset": [{"pixel_values": image} for image in state.outliers],
            "mix_outliers": MixOutlierExposure(cast(Any, op), alpha=alpha, beta=beta),
            "callbacks": [ShowProgress(state, f"training with {op} outliers")],
        },
        lr_scheduler_type="cosine",
    )
    keep_classifier(state, model)
    return {"outliers": len(state.outliers), "steps": len(record.losses), "final_loss": round(record.losses[-1], 4)}


def recipe_restore(state: VisionState, **options: Any) -> None:
    """Set `state.recogniser` from the classifier that `recipe_step` left in `state.folder`."""
    from grainwise.recognize.clip_recogniser import saved_classifier

    state.recogniser = saved_classifier(state.folder)
