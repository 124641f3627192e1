"""Out-of-distribution detection: scores from logits, and how well they tell known inputs from unknown ones.

Every score is larger for inputs that look known, so in-distribution (ID) is the positive class everywhere. Scorers: `msp`, the
largest softmax probability (arXiv 1610.02136); `maxlogit` (arXiv 1911.11132); `energy`, T logsumexp(z / T) (arXiv 2010.03759);
`odin_t`, the largest probability at a high temperature (the temperature part of arXiv 1706.02690); `entropy`, negative.
`ood_report` gives TNR and FPR at a true positive rate of 95%, AUROC and both AUPRs, with bootstrap intervals.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from grainwise.naming import did_you_mean

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

    Floats = NDArray[np.float64]

ODIN_TEMPERATURE = 1000.0


def _msp(logits: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).softmax(-1).amax(-1)


def _maxlogit(logits: Tensor, temperature: float) -> Tensor:
    return logits.amax(-1)


def _energy(logits: Tensor, temperature: float) -> Tensor:
    return temperature * (logits / temperature).logsumexp(-1)


def _entropy(logits: Tensor, temperature: float) -> Tensor:
    logs = (logits / temperature).log_softmax(-1)
    return (logs.exp() * logs).sum(-1)


SCORERS: dict[str, tuple[Callable[[Tensor, float], Tensor], float]] = {  # name -> score, default temperature
    "msp": (_msp, 1.0),
    "maxlogit": (_maxlogit, 1.0),
    "energy": (_energy, 1.0),
    "odin_t": (_msp, ODIN_TEMPERATURE),
    "entropy": (_entropy, 1.0),
}


def ood_scores(logits: Tensor, score: str = "msp", *, temperature: float | None = None) -> Floats:
    """float64 (count,): how known each input looks, larger is more; logits: (count, classes).

    Computed in float64: near a probability of 1, half precision has no values left between confident inputs. temperature:
    None takes the scorer's own. Raises ValueError for an unknown score, one class, or logits that are not finite.
    """
    if score not in SCORERS:
        raise ValueError(f"no score {score!r}. {did_you_mean(score, SCORERS)}")
    logits = torch.as_tensor(logits)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"scores need logits (count, classes >= 2), got {tuple(logits.shape)}")
    function, default = SCORERS[score]
    temperature = default if temperature is None else temperature
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logits = logits.detach().cpu().double()
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the logits are not all finite: check the model and its inputs")
    return function(logits, temperature).numpy()


def ood_report(
    id_scores: ArrayLike,
    ood_scores: ArrayLike,
    *,
    tpr: float = 0.95,
    bootstrap: int = 200,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, float]:
    """How well scores separate ID from OOD inputs; (n,) and (m,), larger meaning more known.

    Returns TNR95 and FPR95 (at the true positive rate `tpr`), AUROC, AUPR_IN (ID positive), AUPR_OUT (OOD positive, by
    the negated score), and `<name>_low`, `<name>_high`: percentile intervals of `bootstrap` resamples (0: none). Chance
    is 0.05, 0.95, 0.5 and, for the AUPRs, the share of the positive class.
    """
    known, unknown = _scores(id_scores, "ID"), _scores(ood_scores, "OOD")
    if not 0 < tpr < 1 or not 0 < confidence < 1:
        raise ValueError(f"tpr and confidence must lie between 0 and 1, got {tpr} and {confidence}")
    report = _figures(known, unknown, tpr)
    rng = np.random.default_rng(seed)
    draws = [_figures(rng.choice(known, len(known)), rng.choice(unknown, len(unknown)), tpr) for _ in range(bootstrap)]
    if draws:
        tails = [50 * (1 - confidence), 50 * (1 + confidence)]
        for name in list(report):
            low, high = np.percentile([d[name] for d in draws], tails)
            report |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return report


def threshold_at(id_scores: ArrayLike, tpr: float = 0.95) -> float:
    """The largest threshold that at least a share `tpr` of known inputs reaches (score >= threshold)."""
    known = np.sort(_scores(id_scores, "ID"))[::-1]
    return float(known[int(np.ceil(tpr * len(known))) - 1])


def _figures(known: Floats, unknown: Floats, tpr: float) -> dict[str, float]:
    truth = np.concatenate([np.ones(len(known)), np.zeros(len(unknown))])
    scores = np.concatenate([known, unknown])
    false_rate, true_rate, _ = roc_curve(truth, scores, drop_intermediate=False)
    missed = float(false_rate[np.argmax(true_rate >= tpr)])
    return {
        "TNR95": 1 - missed,
        "FPR95": missed,
        "AUROC": float(roc_auc_score(truth, scores)),
        "AUPR_IN": float(average_precision_score(truth, scores)),
        "AUPR_OUT": float(average_precision_score(1 - truth, -scores)),
    }


def _scores(values: ArrayLike, which: str) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError(f"{which} scores must be finite numbers (count >= 1,), got shape {array.shape}")
    return array


def require_disjoint(
    outliers: Iterable[Any],
    *,
    id_test: Iterable[Any] = (),
    ood_test: Iterable[Any] = (),
    outlier_classes: Sequence[str] = (),
    test_classes: Sequence[str] = (),
) -> None:
    """Raise ValueError if an auxiliary outlier occurs in a test set, by the bytes of its image or by its class name.

    outliers, id_test, ood_test: images (arrays, tensors) or items with `pixel_values` or `image`. Without this check the
    training would see what the test calls unseen.
    """
    shared = sorted(set(outlier_classes) & set(test_classes))
    if shared:
        raise ValueError(
            f"classes {', '.join(shared[:5])} are both auxiliary outliers and test classes: remove them from the pool"
        )
    seen = {_digest(item): i for i, item in enumerate(outliers)}
    for name, items in (("ID", id_test), ("OOD", ood_test)):
        for i, item in enumerate(items):
            digest = _digest(item)
            if digest in seen:
                raise ValueError(f"outlier {seen[digest]} is image {i} of the {name} test set: remove it from the pool")


def _digest(item: Any) -> bytes:
    if isinstance(item, dict):
        item = next(item[key] for key in ("pixel_values", "image") if key in item)
    array = np.ascontiguousarray(np.asarray(item))
    return hashlib.blake2b(array.tobytes(), digest_size=16, key=str((array.dtype.str, array.shape)).encode()[:64]).digest()
