"""OOD scores and figures: against scikit-learn and closed forms, ties and extremes included."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from grainwise.evaluate.ood import SCORERS, ood_report, ood_scores, require_disjoint, threshold_at


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8))
def test_figures_match_scikit_learn_also_with_ties(seed, levels):
    rng = np.random.default_rng(seed)
    known, unknown = rng.integers(0, levels, 40) + 1.0, rng.integers(0, levels, 25) + 0.0
    report = ood_report(known, unknown, bootstrap=0)
    truth, scores = np.r_[np.ones(40), np.zeros(25)], np.r_[known, unknown]
    assert report["AUROC"] == pytest.approx(roc_auc_score(truth, scores))
    false_rate, true_rate, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert report["FPR95"] == pytest.approx(false_rate[true_rate >= 0.95].min())
    threshold = threshold_at(known, 0.95)
    assert (known >= threshold).mean() >= 0.95
    assert report["TNR95"] == pytest.approx((unknown < threshold).mean())
    swapped = ood_report(unknown, known, bootstrap=0)
    assert report["AUROC"] + swapped["AUROC"] == pytest.approx(1)


def test_perfect_separation_and_chance():
    report = ood_report(np.arange(1, 11), -np.arange(10), bootstrap=50)
    for name, best in (("TNR95", 1), ("FPR95", 0), ("AUROC", 1), ("AUPR_IN", 1), ("AUPR_OUT", 1)):
        assert report[name] == pytest.approx(best)
    assert report["AUROC_low"] == report["AUROC_high"] == 1
    rng = np.random.default_rng(0)
    chance = ood_report(rng.random(4000), rng.random(4000), bootstrap=0)
    assert abs(chance["AUROC"] - 0.5) < 0.02
    assert abs(chance["TNR95"] - 0.05) < 0.02
    assert abs(chance["AUPR_OUT"] - 0.5) < 0.03


def test_intervals_hold_the_figure_and_shrink_with_more_data():
    rng = np.random.default_rng(1)
    widths = []
    for count in (50, 2000):
        known, unknown = rng.normal(1, 1, count), rng.normal(0, 1, count)
        report = ood_report(known, unknown, bootstrap=100)
        assert report["AUROC_low"] < report["AUROC"] < report["AUROC_high"]
        widths.append(report["AUROC_high"] - report["AUROC_low"])
    assert widths[1] < widths[0] / 3
    assert ood_report(known, unknown, bootstrap=5) == ood_report(known, unknown, bootstrap=5)


def test_scores_against_closed_forms():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.1, 0.2, 0.3]])
    p = logits.double().softmax(-1)
    np.testing.assert_allclose(ood_scores(logits, "msp"), p.amax(-1))
    np.testing.assert_allclose(ood_scores(logits, "maxlogit"), [2.0, 0.3], rtol=1e-6)
    np.testing.assert_allclose(ood_scores(logits, "energy", temperature=2.0), 2 * (logits.double() / 2).exp().sum(-1).log())
    np.testing.assert_allclose(ood_scores(logits, "odin_t"), (logits.double() / 1000).softmax(-1).amax(-1))
    np.testing.assert_allclose(ood_scores(logits, "entropy"), (p * p.log()).sum(-1))
    for name in SCORERS:
        assert ood_scores(logits, name)[0] > ood_scores(logits, name)[1]  # the sure one scores higher


def test_confident_inputs_stay_apart():
    logits = torch.tensor([[30.0, 0.0], [25.0, 0.0], [20.0, 0.0]], dtype=torch.float16)
    assert len(set(ood_scores(logits, "msp"))) == 3  # in half precision all three are 1
    assert len(logits.softmax(-1).amax(-1).unique()) == 1


def test_threshold():
    assert threshold_at(np.arange(100), 0.95) == 5
    assert threshold_at([3.0], 0.95) == 3


def test_disjointness():
    rng = np.random.default_rng(0)
    pool, test = rng.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8), rng.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    require_disjoint(pool, id_test=test, ood_test=[{"image": i} for i in rng.random((3, 4, 4))], test_classes=["wren"])
    with pytest.raises(ValueError, match="outlier 3 is image 2 of the OOD test set"):
        require_disjoint(pool, id_test=test, ood_test=[{"pixel_values": torch.from_numpy(i)} for i in (*test[:2], pool[3])])
    with pytest.raises(ValueError, match="classes wren are both"):
        require_disjoint([], outlier_classes=["wren", "car"], test_classes=["wren", "robin"])


def test_errors_teach():
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="no score 'enrgy'. Did you mean 'energy'"):
        ood_scores(logits, "enrgy")
    with pytest.raises(ValueError, match="classes >= 2"):
        ood_scores(logits[:, :1])
    with pytest.raises(ValueError, match="not all finite"):
        ood_scores(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ValueError, match="temperature must be positive"):
        ood_scores(logits, temperature=0.0)
    with pytest.raises(ValueError, match="OOD scores must be finite"):
        ood_report([1.0], [])
    with pytest.raises(ValueError, match="between 0 and 1"):
        ood_report([1.0], [0.0], tpr=1.0)
