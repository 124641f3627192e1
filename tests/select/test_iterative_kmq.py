from __future__ import annotations

import itertools
import json
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from grainwise.select import KMQ, IterativeKMQ, LengthScorer, LikelihoodScorer
from grainwise.select.iterative_kmq import cluster_scores, fine_tune, greedy_answers, updated_weights


def test_the_update_is_equation_six():
    weights = updated_weights(np.array([0.5, 0.3, 0.2]), np.array([1.0, 2.0, 1.0]), update="ratio")
    np.testing.assert_allclose(weights, np.array([0.5, 0.6, 0.2]) / 1.3)


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(-3, 3)), min_size=2, max_size=9), st.sampled_from(["softmax", "clip"]))
def test_weights_sum_to_one_and_are_not_negative(pairs, update):
    previous, scores = np.array(pairs).T
    previous = previous / previous.sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = updated_weights(previous, scores, update=update)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()


@pytest.mark.parametrize("update", ["softmax", "ratio", "clip"])
def test_the_same_score_everywhere_leaves_the_weights_and_warns(update):
    previous = np.array([0.7, 0.2, 0.1])
    with pytest.warns(UserWarning, match="score 2: the weights cannot change"):
        assert updated_weights(previous, np.full(3, 2.0), update=update).tolist() == previous.tolist()


@pytest.mark.parametrize("update, decay", [("ratio", 1 / 4), ("clip", 1 / 4), ("softmax", np.exp(-3.0))])
def test_an_always_worse_cluster_decays_geometrically(update, decay):
    weights = [np.array([0.5, 0.5])]
    for _ in range(4):
        weights.append(updated_weights(weights[-1], np.array([4.0, 1.0]), update=update))
    ratios = [w[1] / w[0] for w in weights]
    np.testing.assert_allclose([b / a for a, b in itertools.pairwise(ratios)], decay)


def test_the_softmax_has_a_temperature_and_may_forget_the_past():
    previous, scores = np.array([0.9, 0.1]), np.array([0.0, 1.0])
    expected = previous * np.exp(scores / 0.5)
    np.testing.assert_allclose(updated_weights(previous, scores, temperature=0.5), expected / expected.sum())
    forgetful = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(updated_weights(previous, scores, update="softmax_only"), forgetful)


def test_clusters_without_a_score_count_with_the_mean():
    weights = updated_weights(np.full(3, 1 / 3), np.array([1.0, 3.0, np.nan]), update="ratio")
    np.testing.assert_allclose(weights, np.array([1, 3, 2]) / 6)
    with pytest.raises(ValueError, match="score at least one row"):
        updated_weights(np.ones(2) / 2, np.full(2, np.nan))


def test_negative_scores_are_refused_by_the_ratio_and_clipped_otherwise():
    previous, scores = np.full(3, 1 / 3), np.array([-1.0, 1.0, 3.0])
    with pytest.raises(ValueError, match=r'clusters \[0\] have negative scores.*use "softmax" or "clip"'):
        updated_weights(previous, scores, update="ratio")
    np.testing.assert_allclose(updated_weights(previous, scores, update="clip"), [0, 0.25, 0.75])
    with pytest.warns(UserWarning, match="no cluster has a positive score"):
        assert updated_weights(previous, scores - 5, update="clip").tolist() == previous.tolist()


def test_a_cluster_score_is_the_mean_over_scored_rows():
    scores = cluster_scores(np.array([1.0, 3.0, 5.0]), np.array([0, 0, 2]), 3)
    assert scores[[0, 2]].tolist() == [2.0, 5.0]
    assert np.isnan(scores[1])


class Scripted:
    """Rewards by the answer itself: its number."""

    def score(self, prompts, responses):
        return np.array([float(r) for r in responses])


@pytest.fixture
def rounds(blobs):
    """A run on six blobs where the reference answers of blob 0, the largest, are no better than the model's own."""
    vectors, labels = blobs
    rows = Dataset.from_dict({"prompt": [str(b) for b in labels], "response": [str(0 if b == 0 else b + 10) for b in labels]})
    seen = []

    def train(model, drawn):
        seen.append(list(zip(drawn["prompt"], drawn["response"])))
        return model

    def run(budget=62, seed=0, count=3, **options):
        seen.clear()
        selector = IterativeKMQ(KMQ(6, random_state=1), rounds=count, **options).fit(vectors)
        return selector.run(
            object(), rows, budget=budget, scorer=Scripted(), train=train, generate=lambda m, p: ["0"] * len(p), seed=seed
        )

    return run, seen, labels


def test_rounds_spend_exactly_the_budget_and_no_row_twice(rounds):
    run, seen, _ = rounds
    result = run()
    chosen = result.selection
    assert len(chosen) == len(np.unique(chosen.indices)) == 62
    assert np.bincount(chosen.details["round"]).tolist() == [21, 20, 21]
    assert [len(rows) for rows in seen] == [21, 41, 62]
    assert seen[1][:21] == seen[0]
    assert result.history.counts.sum(1).tolist() == [21, 20, 21]
    assert chosen.indices.tolist() == run().selection.indices.tolist()
    assert chosen.indices.tolist() != run(seed=1).selection.indices.tolist()


def test_the_cluster_with_nothing_to_learn_fades_and_is_flagged(rounds):
    run, _, labels = rounds
    result = run(update="clip")
    history = result.history
    blob_of = {c: labels[result.selection.indices[result.selection.details["cluster"] == c][0]] for c in range(6)}
    faded = next(c for c, blob in blob_of.items() if blob == 0)
    assert history.weights.shape == (4, 6)
    np.testing.assert_allclose(history.weights[0], 1 / 6)
    np.testing.assert_allclose(history.weights.sum(1), 1)
    assert history.counts[0].min() >= 3
    assert history.counts[1:, faded].tolist() == [0, 0]
    assert history.flagged_clusters(0.2 / 6) == [faded]
    assert history.scores[0, faded] == 0
    np.testing.assert_allclose(result.selection.weights[:21], 1 / 6)


def test_a_full_cluster_passes_its_rest_on(rounds):
    run, _, _ = rounds
    result = run(budget=240)
    assert sorted(result.selection.indices.tolist()) == list(range(240))


def test_a_history_is_written_as_a_report(rounds, tmp_path):
    history = rounds[0]().history
    history.save(tmp_path / "history.json")
    report = json.loads((tmp_path / "history.json").read_text())
    np.testing.assert_allclose(report["weights"], history.weights)
    assert np.array(report["counts"]).sum() == 62


def test_impossible_runs_are_refused(rounds, blobs):
    run, _, _ = rounds
    with pytest.raises(ValueError, match=r"241 rows, but the pool has only 240"):
        run(budget=241)
    with pytest.raises(ValueError, match=r"5 rows for 6 clusters"):
        run(budget=5)
    with pytest.raises(ValueError, match=r"unknown update 'softmx'. Did you mean 'softmax'"):
        run(update="softmx")
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        run(count=0)
    fitted = IterativeKMQ(KMQ(6)).fit(blobs[0])
    with pytest.raises(ValueError, match=r"240 rows, the data set 1"):
        fitted.run(object(), Dataset.from_dict({"prompt": ["a"], "response": ["b"]}), budget=12, scorer=LengthScorer())


def test_parameters_reach_the_inner_selector():
    selector = IterativeKMQ(KMQ(6), rounds=2)
    assert selector.get_params()["clusters__k"] == 6
    assert selector.set_params(clusters__k=4).clusters.k == 4


def test_greedy_answers_equal_generation_one_by_one(tiny_llama, characters):
    tiny_llama.generation_config.eos_token_id = characters.eos_token_id
    prompts = ["a", "some longer prompt", "mid one"]
    answers = greedy_answers(tiny_llama, characters, prompts, max_new_tokens=6, batch_size=2)
    for prompt, answer in zip(prompts, answers):
        ids = characters(f"{prompt}\n", return_tensors="pt")["input_ids"]
        output = tiny_llama.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=2)
        assert answer == characters.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_default_training_leaves_the_base_model_alone(tiny_llama, characters, blobs):
    rows = Dataset.from_dict({"prompt": [f"q {i % 5}" for i in range(24)], "response": [f"a {i % 5}" for i in range(24)]})
    before = {k: v.clone() for k, v in tiny_llama.state_dict().items()}
    selector = IterativeKMQ(KMQ(3), rounds=2).fit(blobs[0][:24])
    reward = LikelihoodScorer(tiny_llama, characters, scale="log")
    tiny_llama.generation_config.max_length = 12
    with pytest.raises(ValueError, match="give the tokenizer"):
        selector.run(tiny_llama, rows, budget=8, scorer=reward)
    result = selector.run(tiny_llama, rows, budget=8, scorer=reward, tokenizer=characters, generate=lambda m, p: ["a"] * len(p))
    assert all(torch.equal(before[k], v) for k, v in tiny_llama.state_dict().items())
    assert any(not torch.equal(before[k], v) for k, v in result.model.state_dict().items())
    assert len(result.selection) == 8


def test_fine_tuning_learns_the_responses(tiny_llama, characters):
    rows = Dataset.from_dict({"prompt": ["left", "right"], "response": ["ab", "cd"]})
    fine_tune(tiny_llama, characters, rows, epochs=60, batch_size=2, lr=3e-3)
    assert greedy_answers(tiny_llama, characters, rows["prompt"], max_new_tokens=4) == ["ab", "cd"]
