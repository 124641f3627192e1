"""Training an image classifier with `Trainer`: batches of images, augmentation on the whole batch, accuracy.

`RecognitionTrainer` is a `transformers.Trainer` for any `*ForImageClassification`. Items are dicts of an image and a label;
the collator stacks them and augments the batch at once. `train_recogniser` is the same in one call, for proofs and scripts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainingArguments

from grainwise.images import Pipeline, from_uint8, resize
from grainwise.images.geometry import Size, sides
from grainwise.training import TrainingRecord

IMAGE_KEYS = ("pixel_values", "image")
LABEL_KEYS = ("labels", "label")
Mix = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]  # images, labels -> images, soft labels


class ArrayImages(Dataset):
    """Images (count, H, W, 3) uint8 or (count, channels, H, W) float, with integer labels (count,), as a data set."""

    def __init__(self, images: np.ndarray | Tensor, labels: np.ndarray | Tensor) -> None:
        if len(images) != len(labels) or not len(images):
            raise ValueError(
                f"as many labels as images are needed, at least one: got {len(images)} images, {len(labels)} labels"
            )
        self.images, self.labels = torch.as_tensor(images), torch.as_tensor(labels).long()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class ImageCollator:
    """Items to one batch {"pixel_values": float (batch, channels, H, W), "labels": (batch,)}.

    An item's image is `pixel_values` or `image`: float (channels, H, W), uint8 (H, W, channels), or a Pillow image; its label
    `labels` or `label` (missing in all items: a batch without). steps: the transforms of the batch. mix: a function such
    as `partial(cutmix, num_labels=200)` that makes soft labels, applied last. size: resize images that have another one.

    Each batch's random numbers come from a seed drawn from torch's default generator, which `Trainer` seeds, restores when
    it resumes, and seeds differently in each data worker.
    """

    def __init__(self, steps: Pipeline | None = None, *, mix: Mix | None = None, size: Size | None = None) -> None:
        self.steps, self.mix, self.size = steps or Pipeline(), mix, size

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        images = self._stacked([_entry(item, IMAGE_KEYS) for item in items])
        if any(self.steps.random) or self.mix is not None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        else:
            generator = torch.Generator()
        batch = {"pixel_values": self.steps(images, generator)}
        if any(key in items[0] for key in LABEL_KEYS):
            batch["labels"] = torch.stack([torch.as_tensor(_entry(item, LABEL_KEYS)) for item in items])
        if self.mix is not None:
            batch["pixel_values"], batch["labels"] = self.mix(batch["pixel_values"], batch["labels"], generator)
        return batch

    def _stacked(self, images: Sequence[Any]) -> Tensor:
        tensors = [image if isinstance(image, Tensor) else torch.as_tensor(np.array(image)) for image in images]
        if self.size is not None:
            tensors = [_of_size(t, self.size) for t in tensors]
        shapes = {tuple(t.shape) for t in tensors}
        if len(shapes) > 1:
            raise ValueError(f"images of different shapes {sorted(shapes)[:3]}: give the collator a size")
        stacked = torch.stack(tensors)
        return from_uint8(stacked) if stacked.dtype == torch.uint8 else stacked


class RecognitionTrainer(Trainer):
    """`Trainer` for image classifiers.

    augment: transforms of training batches, before `prepare`. prepare: transforms of every batch, such as resizing and
    normalising. mix: mixup or cutmix of training batches (see `ImageCollator`). size: resize images that have another one.
    Evaluation reports `eval_accuracy`. With soft labels the loss is their cross-entropy, whatever the model's own is.
    """

    data_collator: Any

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        augment: Pipeline | None = None,
        prepare: Pipeline | None = None,
        mix: Mix | None = None,
        size: Size | None = None,
        **options: Any,
    ) -> None:
        args.remove_unused_columns = False  # the collator reads `image` and `label`, which no model's forward names
        prepare = prepare or Pipeline()
        train_steps = Pipeline(*(augment or Pipeline()).steps, *prepare.steps)
        options.setdefault("data_collator", ImageCollator(train_steps, mix=mix, size=size))
        options.setdefault("compute_metrics", accuracy_of)
        super().__init__(model, args, **options)
        self.evaluation_collator = ImageCollator(prepare, size=size)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not ("labels" in inputs and inputs["labels"].is_floating_point()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        output = model(**{k: v for k, v in inputs.items() if k != "labels"})
        loss = functional.cross_entropy(
            output.logits.float(), inputs["labels"], label_smoothing=self.args.label_smoothing_factor
        )
        return (loss, output) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return self._plainly(super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return self._plainly(super().get_test_dataloader, test_dataset)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read a checkpoint as `from_pretrained` does.

        Transformers 5 saves some models (ViT among them) under older parameter names; `Trainer` looks the names up as they
        are, finds none, and would go on from the weights it was given.
        """
        target = self.accelerator.unwrap_model(model if model is not None else self.model)
        if not isinstance(target, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        target.load_state_dict(type(target).from_pretrained(resume_from_checkpoint).state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _plainly(self, make: Callable[..., Any], dataset: Any) -> Any:
        """A data loader without augmentation."""
        training, self.data_collator = self.data_collator, self.evaluation_collator
        try:
            return make(dataset)
        finally:
            self.data_collator = training


def train_recogniser(
    model: PreTrainedModel,
    train: Dataset,
    *,
    epochs: float,
    lr: float,
    batch_size: int = 32,
    seed: int = 0,
    augment: Pipeline | None = None,
    prepare: Pipeline | None = None,
    mix: Mix | None = None,
    bf16: bool = False,
    trainer: Callable[..., Trainer] = RecognitionTrainer,
    trainer_options: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> TrainingRecord:
    """Train and return the losses (one a step) and the seconds. Nothing is written; progress is not shown.

    arguments: further `TrainingArguments`, such as `warmup_steps`, `lr_scheduler_type`, `optim`, `weight_decay`. trainer: the
    class, with `trainer_options`. Raises FloatingPointError at a loss that is not finite.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "num_train_epochs": epochs,
            "learning_rate": lr,
            "per_device_train_batch_size": batch_size,
            "seed": seed,
            "bf16": bf16,
            "use_cpu": not torch.cuda.is_available(),
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "log_level": "error",
        }
        made = trainer(
            model,
            TrainingArguments(folder, **options | arguments),
            train_dataset=train,
            augment=augment,
            prepare=prepare,
            mix=mix,
            **trainer_options or {},
        )
        _be_quiet(made)
        result = made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    bad = [step for step, loss in enumerate(losses) if not np.isfinite(loss)]
    if bad:
        raise FloatingPointError(
            f"the loss became {losses[bad[0]]} at step {bad[0]}: lower the learning rate or check the images and labels"
        )
    model.eval()
    return TrainingRecord(losses=losses, seconds=result.metrics["train_runtime"])


@torch.no_grad()
def predict_logits(
    model: nn.Module, images: Dataset | Tensor, *, prepare: Pipeline | None = None, batch_size: int = 128, bf16: bool = False
) -> Tensor:
    """float32 (count, labels): a model's logits, on the CPU, of a data set or of images (count, channels, H, W)."""
    collate, was_training = ImageCollator(prepare), model.training
    device = next(model.parameters()).device
    model.eval()
    found = []
    for start in range(0, len(images), batch_size):
        stop = min(start + batch_size, len(images))
        if isinstance(images, Tensor):
            batch = collate([{"pixel_values": i} for i in images[start:stop]])
        else:
            batch = collate([images[i] for i in range(start, stop)])
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found.append(model(pixel_values=batch["pixel_values"].to(device)).logits.float().cpu())
    model.train(was_training)
    if not found:
        raise ValueError("there are no images to classify")
    return torch.cat(found)


def labels_of(dataset: Dataset) -> Tensor:
    """(count,): the labels of a data set."""
    if isinstance(dataset, ArrayImages):
        return dataset.labels
    return torch.as_tensor([int(_entry(dataset[i], LABEL_KEYS)) for i in range(len(dataset))])


def accuracy(model: nn.Module, dataset: Dataset, **options: Any) -> float:
    """Share of images whose largest logit is their label; options: those of `predict_logits`."""
    return float((predict_logits(model, dataset, **options).argmax(1) == labels_of(dataset)).float().mean())


def accuracy_of(prediction: EvalPrediction) -> dict[str, float]:
    """`Trainer`'s metric: {"accuracy": share of right answers}."""
    logits = prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def _entry(item: Mapping[str, Any], keys: Sequence[str]) -> Any:
    for key in keys:
        if key in item:
            return item[key]
    raise ValueError(
        f"an item needs {' or '.join(repr(k) for k in keys)}; this one has {', '.join(map(repr, item)) or 'nothing'}"
    )


def _of_size(image: Tensor, size: Size) -> Tensor:
    batch = from_uint8(image[None]) if image.dtype == torch.uint8 else image[None]
    return (batch if tuple(batch.shape[2:]) == sides(size) else resize(batch, size))[0]


def _be_quiet(trainer: Trainer) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
