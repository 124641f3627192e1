"""A CLIP image tower with a head on its unit features, as one classifier; and how recognisers take part in a recipe."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoModelForImageClassification, PreTrainedModel, TrainerCallback
from transformers.utils import ModelOutput

from grainwise.recognize.text_classifier import TextClassifier

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import CLIPModel

    from grainwise.vision_state import VisionState

FOLDER = "classifier"


class ClipRecogniser(nn.Module):
    """Logits of a head, (n, dimension) -> (n, classes), on the unit features of a CLIP's image tower, which it shares."""

    def __init__(self, clip: CLIPModel, head: nn.Module) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = clip.vision_model, clip.visual_projection
        self.head = head
        self.eval()

    def forward(self, pixel_values: Tensor) -> ModelOutput:
        """pixel_values: normalised float (n, 3, H, W)."""
        features = self.visual_projection(self.vision_model(pixel_values=pixel_values).pooler_output)
        return ModelOutput(logits=self.head(normalize(features.float(), dim=1)))


def zero_shot(clip: CLIPModel, text: TextClassifier) -> ClipRecogniser:
    """The classifier that knows the classes by their texts only."""
    head = nn.Linear(text.dimension, text.classes, bias=False)
    with torch.no_grad():
        head.weight.copy_(text.scale * text.weights.T)
    return ClipRecogniser(clip, head)


def trainable_classifier(state: VisionState) -> PreTrainedModel:
    """The classifier of an earlier step, to go on with, or else a copy of the recipe's image tower with a new linear head."""
    if isinstance(state.recogniser, PreTrainedModel):
        return state.recogniser
    from transformers import CLIPForImageClassification

    config = copy.deepcopy(state.clip.config)
    config.num_labels = len(state.classes)
    torch.manual_seed(state.seed)
    model = CLIPForImageClassification(config)
    model.vision_model.load_state_dict(state.clip.vision_model.state_dict())
    return model


def keep_classifier(state: VisionState, model: PreTrainedModel) -> None:
    """Make a trained classifier the recipe's recogniser and save it in the step's folder."""
    state.recogniser = model.eval()
    model.config.id2label = dict(enumerate(state.classes.names))
    model.config.label2id = {name: i for i, name in enumerate(state.classes.names)}
    model.save_pretrained(state.folder / FOLDER)


def saved_classifier(folder: Path) -> PreTrainedModel:
    """What `keep_classifier` left in a step's folder."""
    return AutoModelForImageClassification.from_pretrained(folder / FOLDER).eval()


class ShowProgress(TrainerCallback):
    """Moves a recipe's progress bar with every training step."""

    def __init__(self, state: VisionState, what: str) -> None:
        self.state, self.what = state, what

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.state.progress(state.global_step, state.max_steps, self.what)
