"""Tell look-alikes apart: species, products, cultivars, defects, persons.

Trained recognisers are `PreTrainedModel`s known to `AutoModelForImageClassification`, one system a module, listed once in
`registration`; they train with `transformers.Trainer`, most simply with `RecognitionTrainer`, which stacks, augments and
evaluates images. Some systems change only how any `*ForImageClassification` is trained (`mixoe`). They share `training`
(data, augmentation in batches, accuracy) and `vit_layout` (where a ViT keeps its tokens).

Training-free recognisers adapt a frozen image-text model from a few labelled images, in closed form, as scikit-learn
estimators. They share `FeatureBank` (features computed once), `TextClassifier` (class names as weights) and
`LogitEnsemble` (zero-shot logits plus weighted evidence).
"""

from __future__ import annotations

from grainwise.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "training": ("ArrayImages", "ImageCollator", "RecognitionTrainer", "accuracy", "predict_logits", "train_recogniser"),
        "glsim": ("GLSimConfig", "GLSimForImageClassification", "global_local_similarity", "select_crops", "topk_box"),
        "mixoe": ("MixOutlierExposure", "OODDetector", "OutlierExposureTrainer"),
        "feature_bank": ("FeatureBank",),
        "text_classifier": ("TextClassifier",),
        "logit_ensemble": ("LogitEnsemble",),
        "gda": ("GDAClassifier",),
        "caps_adapter": ("CapSAdapter", "TipAdapter", "TipX"),
        "support_set": ("DiffusersGenerator", "TransformersCaptioner", "build_support"),
        "microworld_support": ("MicroworldGenerator",),
    },
)
