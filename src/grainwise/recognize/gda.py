"""GDA: few labelled features turn a zero-shot classifier into a better one, in one closed-form step.

Wang, Liang, Sheng, He, Xu, Wang, Tan: "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", arXiv 2402.04087.
Features of a class are modelled as a Gaussian with a covariance shared by all classes; Bayes' rule then gives a linear
classifier, w_k = Σ⁻¹ μ_k and b_k = log π - ½ μ_kᵀ Σ⁻¹ μ_k, which is added to CLIP's own logits: 100 x T + α (x W + b). The
covariance is shrunk (Kubokawa and Srivastava), so that it can be inverted from a handful of images; new classes are added
from their names alone, and unlabelled features are used by expectation maximisation.

Departures: α is chosen on held-out images (cross-validation over whole images, or validation data), never on the test set,
and from a grid with two more values above the published 100, since the published precision shrinks like dimension / rows,
which many views of short features make small. Means and scatter are merged exactly batch by batch, and the system is solved
by Cholesky instead of inverted. For expectation maximisation Σ keeps its natural scale (the published precision is smaller by
about dimension / rows, which α absorbs in the classifier but which would make responsibilities flat).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from grainwise.naming import did_you_mean
from grainwise.recognize.class_statistics import ClassStatistics
from grainwise.recognize.logit_ensemble import LogitEnsemble, correct_along, stratified_folds
from grainwise.recognize.shared_covariance import SHRINKAGES, new_class_precision, shared_covariance, solve
from grainwise.recognize.text_classifier import TextClassifier
from grainwise.tensor_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from grainwise.vision_state import VisionState

ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4)
FOLDS = 5
MISSING = ("error", "text")
Labelled = tuple["ArrayLike | Tensor", "ArrayLike | Tensor"]


class GDAClassifier(ClassifierMixin, BaseEstimator):
    """Gaussian discriminant analysis beside a zero-shot classifier.

    text: zero-shot weights (`TextClassifier`), or None for the Gaussian part alone. shrinkage: `ks` (the paper's),
    `ledoit_wolf`, `oas`, `glasso`, `none` (pseudo-inverse) or `identity` (nearest mean). alpha: a number, or `cv` to choose
    from `alphas` by held-out accuracy. missing: what a class without rows does, `error` or `text` (its text weight is the
    mean).

    After fitting: `statistics_`, `coef_` float32 (dimension, classes), `intercept_` float32 (classes,), `alpha_`,
    `classes_`, `n_features_in_`; after `fit_unsupervised` also `log_likelihoods_`, one value an iteration.
    """

    def __init__(
        self,
        text: TextClassifier | None = None,
        *,
        shrinkage: str = "ks",
        alpha: float | str = "cv",
        alphas: Sequence[float] = ALPHAS,
        missing: str = "error",
    ) -> None:
        self.text = text
        self.shrinkage = shrinkage
        self.alpha = alpha
        self.alphas = alphas
        self.missing = missing

    def fit(
        self,
        X: ArrayLike | Tensor,
        y: ArrayLike | Tensor,
        *,
        groups: ArrayLike | Tensor | None = None,
        validation: Labelled | None = None,
    ) -> Self:
        """Fit to unit features X (rows, dimension) with labels y (rows,) in 0..classes-1.

        groups: which image each row shows, when rows are several views of fewer images; needed for an honest
        cross-validation. validation: (features, labels) to choose alpha on instead. Raises ValueError for labels that don't
        fit the text, classes without rows, or when alpha cannot be chosen.
        """
        self._check_options()
        x, labels = self._checked(X, y)
        classes = self.text.classes if self.text is not None else int(labels.max()) + 1
        self.statistics_: ClassStatistics | None = ClassStatistics.of(x, labels, classes)
        self.features_: Tensor | None = x
        self._solve()
        if self.text is None:
            self.alpha_ = 1.0
        elif not isinstance(self.alpha, str):
            self.alpha_ = float(self.alpha)
        elif validation is not None:
            self.alpha_ = self._alpha_on(*self._checked(*validation))
        else:
            member = torch.arange(len(x)) if groups is None else torch.as_tensor(groups, dtype=torch.long)
            self.alpha_ = self._cross_validated(x, labels, member)
        return self

    def partial_fit(self, X: ArrayLike | Tensor, y: ArrayLike | Tensor, classes: int | None = None) -> Self:
        """Add rows to what was fitted before; any order and any split gives the same classifier as one `fit`.

        alpha must be a number, or keeps the value that an earlier `fit` chose. classes: how many there are, needed at the
        first call without text. Classes may still be empty; the classifier is solved as soon as none is.
        """
        self._check_options()
        x, labels = self._checked(X, y)
        known = getattr(self, "statistics_", None)
        if known is None and hasattr(self, "coef_"):
            raise ValueError("a classifier made by extend has no statistics to add to: fit one to labelled rows instead")
        if isinstance(self.alpha, str) and self.text is not None and known is None:
            raise ValueError("partial_fit cannot choose alpha from a stream: give a number, or call fit on a part first")
        count = len(known.counts) if known is not None else self.text.classes if self.text is not None else classes
        if count is None:
            raise ValueError("without text the first partial_fit needs classes=, the number of classes")
        if int(labels.max()) >= count:
            raise ValueError(f"labels go up to {int(labels.max())}, but there are {count} classes (0..{count - 1})")
        batch = ClassStatistics.of(x, labels, count)
        total = batch if known is None else known.merged(batch)
        self.statistics_ = total
        self.alpha_ = 1.0 if self.text is None else self.alpha_ if isinstance(self.alpha, str) else float(self.alpha)
        self.features_ = None
        if self.missing == "text" or bool((total.counts > 0).all()):
            self._solve()
        return self

    def fit_unsupervised(self, X: ArrayLike | Tensor, *, iters: int = 10, validation: Labelled | None = None) -> Self:
        """Fit to unlabelled unit features X (rows, dimension) by expectation maximisation from the zero-shot predictions.

        alpha: a number is kept; `cv` is chosen on `validation`; without labels it becomes rows / dimension, which brings the
        published precision to its natural scale, so that the two log-probabilities are simply added.
        """
        self._check_options()
        if self.text is None:
            raise ValueError("fit_unsupervised starts from zero-shot predictions: give text=")
        if iters < 1:
            raise ValueError(f"iters must be at least 1, got {iters}")
        x = self._features(X)
        self.log_likelihoods_ = []
        statistics = ClassStatistics.soft(x, self.text.logits(x).softmax(1))
        for _ in range(iters):
            covariance, scale = shared_covariance(statistics, self.shrinkage)
            scores, constant = gaussian_log_densities(x, statistics.means, covariance * scale)
            joint = scores - np.log(len(statistics.counts))
            self.log_likelihoods_.append(float((joint.logsumexp(1) + constant).mean()))
            statistics = ClassStatistics.soft(x, joint.softmax(1))
        self.statistics_, self.features_ = statistics, x
        self._solve()
        if not isinstance(self.alpha, str):
            self.alpha_ = float(self.alpha)
        elif validation is not None:
            self.alpha_ = self._alpha_on(*self._checked(*validation))
        else:
            self.alpha_ = len(x) / x.shape[1] if self.shrinkage == "ks" else 1.0
        return self

    def extend(
        self,
        text: TextClassifier,
        *,
        k: int = 64,
        text_copies: int = 16,
        features: ArrayLike | Tensor | None = None,
    ) -> GDAClassifier:
        """A classifier for new classes that are known by name only, from the features of the classes fitted here.

        Every new text weight collects its `k` nearest features; their mean, with `text_copies` copies of the weight itself,
        is the class mean, and their spread around the weight the covariance. alpha is taken over. features: (rows,
        dimension), needed after `load` or `partial_fit`. The scores of old and new classes are not on one scale: as in the
        paper, each classifier decides among its own classes.
        """
        check_is_fitted(self, "coef_")
        rows = self.features_ if features is None else self._features(features)
        if rows is None:
            raise ValueError("the features are not kept by partial_fit and load: give features=")
        if text.dimension != rows.shape[1]:
            raise ValueError(f"the new text weights have dimension {text.dimension}, the features {rows.shape[1]}")
        if not 2 <= k <= len(rows) or text_copies < 0:
            raise ValueError(f"k must lie in 2..{len(rows)} and text_copies from 0 up, got k={k}, text_copies={text_copies}")
        weights = text.weights.T.to(rows)
        near = rows[(rows @ weights.T).topk(k, dim=0).indices.T].double()  # (new classes, k, dimension)
        means = (near.sum(1) + text_copies * weights.double()) / (k + text_copies)
        precision = new_class_precision(near - weights.double()[:, None])
        new = GDAClassifier(text, shrinkage=self.shrinkage, alpha=self.alpha_, alphas=self.alphas, missing=self.missing)
        new.statistics_, new.features_, new.alpha_ = None, rows, self.alpha_
        new._set(means @ precision, means)
        return new

    def predict_logits(self, X: ArrayLike | Tensor) -> Tensor:
        """float32 (rows, classes): 100 x T + α (x W + b)."""
        check_is_fitted(self, "coef_")
        x = self._features(X).float()
        base, extra = self._blocks(x)
        return extra if base is None else LogitEnsemble({"gda": self.alpha_})(base, {"gda": extra})

    def predict(self, X: ArrayLike | Tensor) -> np.ndarray:
        """int64 (rows,): the class of the highest logit."""
        return self.predict_logits(X).argmax(1).cpu().numpy()

    def to_linear(self) -> nn.Linear:
        """The whole classifier as one layer: weight 100 T + α W, bias α b."""
        check_is_fitted(self, "coef_")
        weight, bias = self.coef_ * self.alpha_, self.intercept_ * self.alpha_
        if self.text is not None:
            weight = weight + self.text.scale * self.text.weights.to(weight)
        layer = nn.Linear(*weight.shape)
        with torch.no_grad():
            layer.weight.copy_(weight.T)
            layer.bias.copy_(bias)
        return layer

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, statistics and text as one safetensors file; features are not kept."""
        check_is_fitted(self, "coef_")
        tensors = {"coef": self.coef_, "intercept": self.intercept_}
        if (s := self.statistics_) is not None:
            tensors |= {"counts": s.counts, "means": s.means, "scatter": s.scatter}
        about: dict[str, Any] = {"shrinkage": self.shrinkage, "alpha": self.alpha, "alphas": list(self.alphas)}
        about |= {"missing": self.missing, "alpha_": self.alpha_, "text": None}
        if self.text is not None:
            tensors["text"] = self.text.weights
            about["text"] = {"class_names": list(self.text.class_names), "scale": self.text.scale}
        write_tensors(path, tensors, "GDA classifier", about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> GDAClassifier:
        """Read what `save` wrote; `partial_fit` continues from there. Raises ValueError for another kind of file."""
        tensors, about = read_tensors(path, "GDA classifier")
        text = None
        if about["text"] is not None:
            text = TextClassifier(tensors["text"], tuple(about["text"]["class_names"]), about["text"]["scale"])
        options = {name: about[name] for name in ("shrinkage", "alpha", "missing")}
        model = cls(text, alphas=tuple(about["alphas"]), **options)
        model.statistics_ = None
        if "counts" in tensors:
            model.statistics_ = ClassStatistics(tensors["counts"], tensors["means"], tensors["scatter"])
        model.coef_, model.intercept_, model.alpha_ = tensors["coef"], tensors["intercept"], about["alpha_"]
        model.classes_, model.n_features_in_ = np.arange(model.coef_.shape[1]), model.coef_.shape[0]
        model.features_ = None
        return model

    def _blocks(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """(zero-shot logits or None, Gaussian logits), both (rows, classes)."""
        extra = x @ self.coef_.to(x) + self.intercept_.to(x)
        return (None if self.text is None else self.text.logits(x)), extra

    def _solve(self) -> None:
        """`coef_` and `intercept_` from `statistics_`."""
        assert self.statistics_ is not None
        self._set(*self._weights(self.statistics_))

    def _weights(self, statistics: ClassStatistics) -> tuple[Tensor, Tensor]:
        """(Σ⁻¹ μ for every class, μ), float64 (classes, dimension)."""
        means = self._means(statistics)
        shrinkage = self.shrinkage
        if shrinkage != "identity" and statistics.variance < 1e-12:
            warnings.warn(
                "all rows equal their class mean (one view of one image a class?), so there is no covariance: Σ = I is used; "
                "more views or images would give one",
                stacklevel=4,
            )
            shrinkage = "identity"
        covariance, _ = shared_covariance(statistics, shrinkage)
        return solve(covariance, means, pseudo=shrinkage == "none"), means

    def _means(self, statistics: ClassStatistics) -> Tensor:
        empty = torch.nonzero(statistics.counts == 0)[:, 0].tolist()
        if not empty:
            return statistics.means
        if self.missing == "error" or self.text is None:
            names = [self.text.class_names[k] if self.text is not None and self.text.class_names else k for k in empty[:10]]
            raise ValueError(f'classes {names} have no rows: add some, or use missing="text" to take the text weight as mean')
        means = statistics.means.clone()
        means[empty] = self.text.weights.T.to(means)[empty]
        return means

    def _set(self, weights: Tensor, means: Tensor) -> None:
        classes = len(means)
        self.coef_ = weights.T.float().contiguous()
        self.intercept_ = (-np.log(classes) - (weights * means).sum(1) / 2).float()
        self.classes_, self.n_features_in_ = np.arange(classes), means.shape[1]

    def _alpha_on(self, x: Tensor, labels: Tensor) -> float:
        """The first of `alphas` with the highest accuracy on (x, labels)."""
        base, extra = self._blocks(x.float())
        assert base is not None
        return float(self.alphas[int(correct_along(base, extra, self.alphas, labels).argmax())])

    def _cross_validated(self, x: Tensor, labels: Tensor, groups: Tensor) -> float:
        """The first of `alphas` with the highest accuracy over held-out images."""
        assert self.text is not None
        assert self.statistics_ is not None
        if groups.shape != labels.shape:
            raise ValueError(f"groups must name the image of each of the {len(labels)} rows, got shape {tuple(groups.shape)}")
        fold_of = stratified_folds(labels, groups, FOLDS)
        correct = torch.zeros(len(self.alphas), dtype=torch.long)
        for fold in range(FOLDS):
            out = fold_of == fold
            if not out.any():
                continue
            rest = self.statistics_.without(ClassStatistics.of(x[out], labels[out], len(self.statistics_.counts)))
            weights, means = self._weights(rest)
            held = x[out].double()
            extra = held @ weights.T - (weights * means).sum(1) / 2
            correct += correct_along(self.text.logits(held), extra, self.alphas, labels[out])
        if not int((fold_of >= 0).sum()):
            raise ValueError(
                "alpha cannot be cross-validated with one image a class: give validation=(features, labels), or alpha a number"
            )
        return float(self.alphas[int(correct.argmax())])

    def _check_options(self) -> None:
        for value, known in ((self.shrinkage, SHRINKAGES), (self.missing, MISSING)):
            if value not in known:
                raise ValueError(f"unknown option {value!r}. {did_you_mean(value, known)}")
        if isinstance(self.alpha, str) and self.alpha != "cv":
            raise ValueError(f'alpha must be a number or "cv", got {self.alpha!r}')
        if not len(self.alphas) or any(b <= a for a, b in zip(self.alphas, list(self.alphas)[1:])):
            raise ValueError(f"alphas must be ascending values, got {self.alphas}")

    def _features(self, X: ArrayLike | Tensor) -> Tensor:
        """Rows as float32 or float64; half precision is cast up. Warns when they are not unit vectors and text is."""
        x = X if isinstance(X, Tensor) else torch.as_tensor(np.asarray(X))
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        if x.ndim != 2 or not len(x):
            raise ValueError(f"features must be (rows >= 1, dimension), got {tuple(x.shape)}")
        if self.text is not None:
            self.text.check(x)
        norms = x.norm(dim=1)
        if not torch.isfinite(norms).all():
            raise ValueError(f"features of rows {torch.nonzero(~norms.isfinite())[:10, 0].tolist()} are NaN or infinite")
        if self.text is not None and ((norms - 1).abs() > 1e-2).any():
            warnings.warn(
                f"features have norms from {norms.min():.3g} to {norms.max():.3g} while text weights have 1: normalise them",
                stacklevel=4,
            )
        return x

    def _checked(self, X: ArrayLike | Tensor, y: ArrayLike | Tensor) -> tuple[Tensor, Tensor]:
        x = self._features(X)
        labels = y if isinstance(y, Tensor) else torch.as_tensor(np.asarray(y))
        if labels.shape != (len(x),) or labels.is_floating_point():
            raise ValueError(f"labels must be {len(x)} whole numbers, got {labels.dtype} of shape {tuple(labels.shape)}")
        if int(labels.min()) < 0:
            raise ValueError(f"labels must be 0..classes-1, got {int(labels.min())}")
        if self.text is not None and int(labels.max()) >= self.text.classes:
            raise ValueError(f"labels go up to {int(labels.max())}, but the text has {self.text.classes} classes")
        return x, labels.long()


def gaussian_log_densities(x: Tensor, means: Tensor, covariance: Tensor) -> tuple[Tensor, float]:
    """(-½ squared Mahalanobis distances (rows, classes), the log of the normalising constant), float64."""
    factor = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(factor, x.double().T, upper=False).T
    centres = torch.linalg.solve_triangular(factor, means.T, upper=False).T
    constant = -float(factor.diagonal().log().sum()) - x.shape[1] / 2 * float(np.log(2 * np.pi))
    return -0.5 * torch.cdist(white, centres).square(), constant


def recipe_step(
    state: VisionState, *, shrinkage: str = "ks", alpha: float = 0.0, views: int = 10
) -> dict[str, float | int | str]:
    """Fit to `views` views of each training picture; the recipe's recogniser becomes the classifier on CLIP's features.

    alpha: 0 chooses it by cross-validation over whole pictures, which needs two of each class.
    """
    from grainwise.images import from_uint8
    from grainwise.recognize.feature_bank import FeatureBank

    images, labels = from_uint8(state.train.images), state.train.labels
    bank = FeatureBank.encode(state.clip, images, labels, views=views, mean=state.mean, std=state.std, seed=state.seed)
    state.progress(1, 2, "fitting")
    model = GDAClassifier(state.text, shrinkage=shrinkage, alpha=alpha or "cv").fit(bank.x, bank.y, groups=bank.groups)
    model.save(state.folder / "gda.safetensors")
    recipe_restore(state)
    return {"pictures": len(bank), "views": views, "alpha": model.alpha_, "trained_weights": 0}


def recipe_restore(state: VisionState, **options: Any) -> None:
    """Set `state.recogniser` from the classifier that `recipe_step` left in `state.folder`."""
    from grainwise.recognize.clip_recogniser import ClipRecogniser

    state.recogniser = ClipRecogniser(state.clip, GDAClassifier.load(state.folder / "gda.safetensors").to_linear())
