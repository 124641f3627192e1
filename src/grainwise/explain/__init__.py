"""Why a model answers as it does: explainers with Captum's shape, `attribute(inputs, target)`, and how faithful they are.

An explainer takes images in [0, 1] and a target class and gives a map of what supported it. Regions enter as a partition
of the pixels, from a saliency map, a grid, superpixels or masks. A model enters as a scorer, which turns images into class
probabilities and features in one batched pass and counts the images it saw, so that explainers compare at equal cost.

Members share the regions, the scorers, greedy selection of sets, the insertion and deletion curves by which every map is
judged with the same code, simple explainers to compare with (RISE, occlusion, Grad-CAM, Kernel SHAP, HSIC), and a picture
writer.
"""

from __future__ import annotations

from grainwise.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "regions": ("check_partition", "split_by_masks", "split_by_saliency", "split_grid", "split_superpixels"),
        "set_scorer": (
            "ClassifierScorer",
            "ClipScorer",
            "SetScorer",
            "entropy_confidence",
            "evidential_confidence",
            "evidential_loss",
        ),
        "greedy_sets": ("GreedyResult", "SetFunction", "greedy", "lazy_greedy", "stochastic_greedy"),
        "faithfulness": (
            "Curve",
            "Faithfulness",
            "compare",
            "deletion_curve",
            "insertion_curve",
            "judged",
            "mu_fidelity",
            "stages_of_map",
        ),
        "simple_explainers": ("gradcam", "hsic", "kernel_shap", "occlusion", "rise"),
        "drawing": ("picture", "save_picture"),
        "smdl": ("Attribution", "SMDL"),
    },
)
