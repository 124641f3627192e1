from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.covariance import ledoit_wolf, oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.nn.functional import normalize

from grainwise.recognize.class_statistics import ClassStatistics
from grainwise.recognize.gda import GDAClassifier
from grainwise.recognize.shared_covariance import new_class_precision, shared_covariance, solve
from grainwise.recognize.text_classifier import TextClassifier

D, K = 12, 4


def task(seed=0, per_class=30, unit=True, dtype=torch.float64):
    """Correlated features around class means; text weights near the means."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=g, dtype=dtype) / 4
    means = torch.randn(K, D, generator=g, dtype=dtype)
    y = torch.arange(K).repeat_interleave(per_class)
    x = means[y] + torch.randn(len(y), D, generator=g, dtype=dtype) @ mix
    order = torch.randperm(len(y), generator=g)
    text = normalize(means + 0.5 * torch.randn(K, D, generator=g, dtype=dtype), dim=1).T.float()
    return (normalize(x, dim=1) if unit else x)[order], y[order], TextClassifier(text.contiguous(), tuple("abcd"))


def test_without_shrinkage_it_is_linear_discriminant_analysis():
    x, y, _ = task(per_class=200, unit=False)
    ours = GDAClassifier(shrinkage="none").fit(x, y)
    peer = LinearDiscriminantAnalysis(solver="lsqr", priors=np.full(K, 1 / K)).fit(x.numpy(), y.numpy())
    assert (ours.predict(x) == peer.predict(x.numpy())).all()
    one, two = ours.predict_logits(x).numpy(), peer.decision_function(x.numpy())
    np.testing.assert_allclose(one - one[:, :1], two - two[:, :1], rtol=1e-3, atol=1e-3)


def test_alpha_zero_is_zero_shot_and_a_large_alpha_the_gaussian_model():
    x, y, text = task()
    zero = GDAClassifier(text, alpha=0.0).fit(x, y)
    assert torch.equal(zero.predict_logits(x), text.logits(x.float()))
    pure = GDAClassifier(alpha=1.0).fit(x, y)
    assert (GDAClassifier(text, alpha=1e9).fit(x, y).predict(x) == pure.predict(x)).all()


def test_a_linear_map_of_the_features_changes_nothing_without_shrinkage():
    x, y, _ = task(per_class=60, unit=False)
    g = torch.Generator().manual_seed(5)
    change = torch.randn(D, D, generator=g, dtype=x.dtype) + 3 * torch.eye(D)
    change[:, 0] *= 20
    for shrinkage, same in (("none", True), ("identity", False)):
        before = GDAClassifier(shrinkage=shrinkage).fit(x, y).predict(x)
        after = GDAClassifier(shrinkage=shrinkage).fit(x @ change, y).predict(x @ change)
        assert bool((before == after).all()) is same


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 119), max_size=4, unique=True), st.sampled_from([torch.float32, torch.float64]))
def test_partial_fits_in_any_split_equal_one_fit(cuts, dtype):
    x, y, text = task(dtype=dtype)
    whole = GDAClassifier(text, alpha=1.0).fit(x, y)
    parts = GDAClassifier(text, alpha=1.0)
    for rows, labels in reversed(list(zip(x.tensor_split(sorted(cuts)), y.tensor_split(sorted(cuts))))):
        parts.partial_fit(rows, labels)
    scale = whole.coef_.abs().max()
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5  # products in float32, then an ill-conditioned system
    torch.testing.assert_close(parts.coef_ / scale, whole.coef_ / scale, atol=tolerance, rtol=0)
    torch.testing.assert_close(parts.statistics_.means, whole.statistics_.means, atol=1e-6, rtol=0)
    torch.testing.assert_close(parts.statistics_.scatter, whole.statistics_.scatter, atol=1e-6, rtol=1e-6)


def test_parts_can_be_taken_out_again():
    x, y, _ = task()
    left = ClassStatistics.of(x, y, K).without(ClassStatistics.of(x[:20], y[:20], K))
    direct = ClassStatistics.of(x[20:], y[20:], K)
    torch.testing.assert_close(left.scatter, direct.scatter)
    torch.testing.assert_close(left.means, direct.means)


@pytest.mark.parametrize("per_class", [2, 100])
def test_the_precision_is_the_formula_and_positive_definite_also_for_few_rows(per_class):
    x, y, _ = task(per_class=per_class)
    found, _ = shared_covariance(ClassStatistics.of(x, y, K), "ks")
    centred = x.numpy() - np.stack([x[y == k].mean(0) for k in range(K)])[y]
    rows = len(x)
    sample = centred.T @ centred / (rows - 1)
    precision = D * np.linalg.inv((rows - 1) * sample + np.trace(sample) * np.eye(D))
    np.testing.assert_allclose(solve(found, torch.eye(D, dtype=torch.float64)).numpy(), precision, rtol=1e-8, atol=1e-8)
    assert float(torch.linalg.eigvalsh(found).min()) > 0
    torch.testing.assert_close(found, found.T)


def test_the_other_estimates_are_the_known_ones():
    x, y, _ = task()
    statistics = ClassStatistics.of(x, y, K)
    centred = (x - statistics.means[y]).numpy()
    for name, peer in (("ledoit_wolf", ledoit_wolf), ("oas", oas)):
        ours, _ = shared_covariance(statistics, name)
        np.testing.assert_allclose(ours.numpy(), peer(centred, assume_centered=True)[0], rtol=1e-6)
    sparse = np.linalg.inv(shared_covariance(statistics, "glasso")[0].numpy())
    assert (np.abs(sparse) < 1e-9 * np.abs(sparse).max()).any()  # its precision has zeros
    with pytest.raises(ValueError, match="reads all rows at once"):
        shared_covariance(statistics.merged(statistics), "ledoit_wolf")


def test_the_pseudo_inverse_ignores_directions_without_variance():
    rows = torch.randn(3, 4, dtype=torch.float64)
    covariance = torch.diag(torch.tensor([2.0, 1.0, 0.5, 0.0], dtype=torch.float64))
    expected = rows @ torch.diag(torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(solve(covariance, rows, pseudo=True), expected)


def test_rotating_features_and_text_leaves_the_logits():
    x, y, text = task()
    turn = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3), dtype=x.dtype))[0]
    turned = TextClassifier((text.weights.T.double() @ turn).T.float())
    before = GDAClassifier(text, alpha=1.0).fit(x, y).predict_logits(x)
    after = GDAClassifier(turned, alpha=1.0).fit(x @ turn, y).predict_logits(x @ turn)
    torch.testing.assert_close(before, after, atol=1e-4, rtol=1e-5)


def test_one_linear_layer_does_it_all():
    x, y, text = task()
    model = GDAClassifier(text, alpha=0.1).fit(x, y)
    with torch.no_grad():
        torch.testing.assert_close(model.to_linear()(x.float()), model.predict_logits(x), atol=1e-4, rtol=1e-5)


def test_expectation_maximisation_never_loses_likelihood():
    x, _, text = task(per_class=100)
    model = GDAClassifier(text, shrinkage="none", alpha=1.0).fit_unsupervised(x, iters=15)
    rises = np.diff(model.log_likelihoods_)
    assert len(rises) == 14
    assert (rises > -1e-9).all()
    assert rises[0] > 1e-4


def test_one_hot_shares_are_labels():
    x, y, _ = task()
    soft = ClassStatistics.soft(x, torch.nn.functional.one_hot(y, K))
    hard = ClassStatistics.of(x, y, K)
    torch.testing.assert_close(soft.means, hard.means)
    torch.testing.assert_close(soft.scatter, hard.scatter)
    torch.testing.assert_close(soft.counts, hard.counts)


def test_unlabelled_rows_help_and_alpha_follows_the_options():
    x, y, text = task(seed=4, per_class=100)
    zero = float((text.logits(x.float()).argmax(1) == y).float().mean())
    model = GDAClassifier(text).fit_unsupervised(x, iters=10)
    assert model.score(x, y) > zero
    assert model.alpha_ == len(x) / D
    assert GDAClassifier(text, alpha=0.5).fit_unsupervised(x).alpha_ == 0.5
    assert GDAClassifier(text).fit_unsupervised(x, validation=(x, y)).alpha_ in GDAClassifier().alphas


def test_new_classes_from_everything_and_no_text_get_the_global_mean():
    x, y, text = task()
    new = GDAClassifier(text, alpha=1.0).fit(x, y).extend(text, k=len(x), text_copies=0)
    precision = new_class_precision((x[None] - text.weights.T.double()[:, None]).double())
    expected = (precision @ x.mean(0)).float()
    torch.testing.assert_close(new.coef_.T, expected.expand(K, D), atol=1e-4, rtol=1e-4)


def test_the_precision_of_new_classes_is_the_formula():
    spread = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.zeros(D, D, dtype=torch.float64)
    for v in spread:
        c = v.T @ v / 4
        expected += D * torch.linalg.inv(4 * c + c.trace() * torch.eye(D)) / 3
    torch.testing.assert_close(new_class_precision(spread), expected)


def test_the_mean_of_a_new_class_counts_copies_of_its_text():
    x, y, text = task()
    new = GDAClassifier(text, alpha=1.0).fit(x, y).extend(text, k=10, text_copies=6)
    weight = text.weights[:, 0].double()
    near = x[(x @ weight).topk(10).indices]
    mean = (near.sum(0) + 6 * weight) / 16
    precision = new_class_precision(torch.stack([x[(x @ w).topk(10).indices] - w for w in text.weights.T.double()]))
    torch.testing.assert_close(new.coef_[:, 0], (precision @ mean).float(), atol=1e-4, rtol=1e-4)


def test_saving_reloading_and_going_on(tmp_path):
    x, y, text = task()
    first = GDAClassifier(text, alpha="cv").fit(x[:80], y[:80])
    first.save(tmp_path / "gda.safetensors")
    again = GDAClassifier.load(tmp_path / "gda.safetensors")
    assert torch.equal(again.predict_logits(x), first.predict_logits(x))
    assert again.alpha_ == first.alpha_
    whole = GDAClassifier(text, alpha=first.alpha_).fit(x, y)
    again.partial_fit(x[80:], y[80:])
    torch.testing.assert_close(again.coef_, whole.coef_, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="give features="):
        again.extend(text)
    new = again.extend(text, features=x)
    new.save(tmp_path / "new.safetensors")
    assert torch.equal(GDAClassifier.load(tmp_path / "new.safetensors").predict_logits(x), new.predict_logits(x))
    with pytest.raises(ValueError, match="made by extend"):
        new.partial_fit(x, y)


def test_alpha_is_chosen_on_what_is_held_out():
    x, y, text = task(seed=1)
    validated = GDAClassifier(text).fit(x[:60], y[:60], validation=(x[60:], y[60:]))
    scores = [GDAClassifier(text, alpha=a).fit(x[:60], y[:60]).score(x[60:], y[60:]) for a in validated.alphas]
    assert validated.alpha_ == validated.alphas[int(np.argmax(scores))]
    random = torch.randint(K, (len(y),), generator=torch.Generator().manual_seed(0))
    x_views, y_views = x.repeat_interleave(3, 0), random.repeat_interleave(3)
    honest = GDAClassifier(text).fit(x_views, y_views, groups=torch.arange(len(x)).repeat_interleave(3))
    leaking = GDAClassifier(text, shrinkage="none").fit(x_views, y_views)
    assert honest.alpha_ <= leaking.alpha_


def test_long_tailed_data_keep_a_uniform_prior():
    x, y, text = task(per_class=100)
    kept = torch.cat([torch.nonzero(y == k)[: [100, 30, 10, 3][k], 0] for k in range(K)])
    model = GDAClassifier(text, alpha=1.0).fit(x[kept], y[kept])
    weights, means = model.coef_.T.double(), model.statistics_.means
    torch.testing.assert_close(model.intercept_.double(), -np.log(K) - (weights * means).sum(1) / 2, rtol=1e-4, atol=1e-4)


def test_half_precision_is_cast_up_and_arrays_are_taken():
    x, y, text = task()
    model = GDAClassifier(text, alpha=1.0).fit(x.half().numpy(), y.numpy())
    assert model.statistics_.scatter.dtype == torch.float64
    assert model.predict(x.half()).dtype == np.int64
    assert clone(model).get_params()["alpha"] == 1.0


def test_without_spread_the_identity_is_used_and_said():
    x, _, text = task()
    with pytest.warns(UserWarning, match=r"Σ = I is used"):
        model = GDAClassifier(text, alpha=1.0).fit(x[:K], torch.arange(K))
    torch.testing.assert_close(model.coef_.T, x[:K].float())
    with pytest.warns(UserWarning, match=r"Σ = I is used"):
        GDAClassifier(text, alpha=1.0).fit(x[:1].expand(8, D), torch.arange(8) % K)


def test_classes_without_rows_are_named_or_take_their_text():
    x, y, text = task()
    some = y != 2
    with pytest.raises(ValueError, match=r"classes \['c'\] have no rows.*missing=\"text\""):
        GDAClassifier(text, alpha=1.0).fit(x[some], y[some])
    model = GDAClassifier(text, alpha=1.0, missing="text").fit(x[some], y[some])
    assert model.score(x[~some], y[~some]) > 0.5


def test_bad_input_is_named():
    x, y, text = task()
    with pytest.raises(ValueError, match="labels go up to 4, but the text has 4"):
        GDAClassifier(text).fit(x, y + 1)
    with pytest.raises(ValueError, match="0..classes-1, got -1"):
        GDAClassifier(text).fit(x, y - 1)
    with pytest.raises(ValueError, match="whole numbers"):
        GDAClassifier(text).fit(x, y.double())
    with pytest.raises(ValueError, match="need \\(rows, 12\\)"):
        GDAClassifier(text).fit(x[:, :5], y)
    with pytest.warns(UserWarning, match="normalise them"):
        GDAClassifier(text, alpha=1.0).fit(3 * x, y)
    broken = x.clone()
    broken[7, 0] = torch.nan
    with pytest.raises(ValueError, match=r"rows \[7\] are NaN"):
        GDAClassifier(text).fit(broken, y)
    with pytest.raises(ValueError, match="one image a class"):
        GDAClassifier(text).fit(torch.cat([x[:8], x[:8]]), torch.arange(16) % 4, groups=torch.arange(16) % 4)
    with pytest.raises(ValueError, match="groups must name"):
        GDAClassifier(text).fit(x, y, groups=torch.arange(3))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"shrinkage": "kss"}, "Did you mean 'ks'"),
        ({"missing": "txt"}, "Did you mean 'text'"),
        ({"alpha": "auto"}, 'a number or "cv"'),
        ({"alphas": (1.0, 0.1)}, "ascending"),
    ],
)
def test_unknown_options_are_refused(options, words):
    x, y, text = task()
    with pytest.raises(ValueError, match=words):
        GDAClassifier(text, **options).fit(x, y)


def test_streams_and_unlabelled_rows_need_what_they_need():
    x, y, text = task()
    with pytest.raises(ValueError, match="cannot choose alpha from a stream"):
        GDAClassifier(text).partial_fit(x, y)
    with pytest.raises(ValueError, match="needs classes="):
        GDAClassifier().partial_fit(x, y)
    with pytest.raises(ValueError, match="there are 2 classes"):
        GDAClassifier().partial_fit(x, y, classes=2)
    with pytest.raises(ValueError, match="give text="):
        GDAClassifier().fit_unsupervised(x)
    with pytest.raises(ValueError, match="at least 1"):
        GDAClassifier(text).fit_unsupervised(x, iters=0)
    model = GDAClassifier(text, alpha=1.0).fit(x, y)
    with pytest.raises(ValueError, match="k must lie in 2..120"):
        model.extend(text, k=500)
    with pytest.raises(ValueError, match="dimension 3"):
        model.extend(TextClassifier(torch.eye(3)))
