import itertools
import json
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grainwise.decode.aded import AdaptiveDraftDecoder, MCTSDrafter, TrigramTable, recipe_restore, recipe_step
from grainwise.decode.aded.tree_search import best_paths, puct, search
from grainwise.recipe_state import RecipeState

LISTS = st.lists(st.lists(st.integers(0, 6), max_size=30), min_size=1, max_size=6).filter(lambda ls: max(map(len, ls)) >= 3)


def tokenizer(words):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(dict(zip(words, range(99))), words[0])))


def oracle(lists):
    """Context -> Counter of third tokens."""
    counts = defaultdict(Counter)
    for tokens in lists:
        for a, b, c in zip(tokens, tokens[1:], tokens[2:]):
            counts[a, b][c] += 1
    return counts


def table_of(rows, vocabulary=10):
    """A table with the given {context: {token: score}}, highest score first."""
    keys = sorted(rows)
    ordered = [sorted(rows[k].items(), key=lambda item: -item[1]) for k in keys]
    return TrigramTable(
        np.array([a << 32 | b for a, b in keys], dtype=np.int64),
        np.cumsum([0, *map(len, ordered)]),
        np.array([t for row in ordered for t, _ in row], dtype=np.int32),
        np.array([s for row in ordered for _, s in row], dtype=np.float32),
        vocabulary,
    )


def searched(table, first, second, iterations=150, depth=4, seed=0, c1=32.0, c2=8.0):
    return search(
        table.rows, first, second, iterations=iterations, depth=depth, c1=c1, c2=c2, generator=np.random.default_rng(seed)
    )


# the table


@settings(max_examples=40, deadline=None)
@given(LISTS, st.integers(1, 7))
def test_counts_equal_brute_force(lists, top_k):
    table = TrigramTable.from_token_lists(lists, vocab_size=7, top_k=top_k)
    expected = oracle(lists)
    assert len(table) == len(expected)
    for (a, b), counts in expected.items():
        total = sum(counts.values())
        best = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:top_k]
        row = table.row(a, b)
        assert list(row) == [token for token, _ in best]
        assert list(row.values()) == pytest.approx([n / total for _, n in best])
        if top_k == 7:
            assert sum(row.values()) == pytest.approx(1)
    assert table.row(6, 6) == {} or (6, 6) in expected


@settings(max_examples=40, deadline=None)
@given(LISTS, st.lists(st.lists(st.integers(0, 6), min_size=0, max_size=12), max_size=25))
def test_reinforcement_equals_a_dictionary_and_rows_stay_sorted(lists, windows):
    table = TrigramTable.from_token_lists(lists, vocab_size=7)
    expected = {k: table.row(*k) for k in itertools.product(range(7), repeat=2)}
    for window in windows:
        table.reinforce(np.array(window, dtype=np.int64), 0.25, 1.5)
        for a, b, c in zip(window, window[1:], window[2:]):
            expected[a, b][c] = min(expected[a, b].get(c, 0) + 0.25, 1.5)
    for key, row in expected.items():
        got = table.row(*key)
        assert got == pytest.approx(row)
        assert list(got.values()) == sorted(got.values(), reverse=True)


def test_k_reinforcements_add_k_increments_up_to_the_cap():
    table = table_of({(1, 2): {3: 0.5, 4: 0.25}})
    for k in range(1, 101):
        table.reinforce(np.array([1, 2, 4]), 0.04, 3.0)
        assert table.row(1, 2)[4] == pytest.approx(min(0.25 + 0.04 * k, 3.0), abs=1e-5)
    assert table.row(1, 2)[3] == 0.5
    table.reinforce(np.array([7, 8, 9]), 0.04, 3.0)
    assert table.row(7, 8) == {9: pytest.approx(0.04)}


def test_only_the_window_is_reinforced():
    drafter = MCTSDrafter(TrigramTable.empty(50), window=5)
    drafter.draft(np.arange(20), depth=3)
    assert len(drafter.table) == 3
    assert drafter.table.row(17, 18) == {19: pytest.approx(0.04)}
    assert drafter.table.row(14, 15) == {}


def test_short_texts_do_not_fail():
    drafter = MCTSDrafter(TrigramTable.empty(50))
    for text in ([4], [4, 5]):
        tree = drafter.draft(np.array(text), depth=3)
        assert tree.tokens.tolist() == text[-1:]


def test_reset_and_restore_forget_what_was_learned():
    table = table_of({(1, 2): {3: 0.5}})
    fresh = table.merged()
    table.reinforce(np.array([1, 2, 5, 1, 2]), 0.04, 3.0)
    state, learned = table.snapshot(), table.merged()
    table.reinforce(np.arange(9), 0.04, 3.0)
    table.restore(state)
    assert all(np.array_equal(a, b) for a, b in zip(table.merged(), learned))
    table.reset()
    assert all(np.array_equal(a, b) for a, b in zip(table.merged(), fresh))


@settings(max_examples=20, deadline=None)
@given(lists=LISTS, windows=st.lists(st.lists(st.integers(0, 6), max_size=12), max_size=5))
def test_saving_is_bit_exact_with_what_was_learned(tmp_path_factory, lists, windows):
    folder = tmp_path_factory.mktemp("table")
    table = TrigramTable.from_token_lists(lists, vocab_size=7, top_k=2)
    for window in windows:
        table.reinforce(np.array(window, dtype=np.int64), 0.04, 3.0)
    table.save(folder)
    again = TrigramTable.load(folder)
    for mine, theirs in zip(table.merged(), again.merged()):
        assert mine.dtype == theirs.dtype
        assert np.array_equal(mine, theirs)
    assert (again.vocab_size, again.top_k, again.tokens_seen) == (7, 2, table.tokens_seen)
    assert sorted(p.name for p in folder.iterdir()) == ["table.json", "table.safetensors"]


def test_another_tokenizer_is_refused_by_name(tmp_path):
    mine, other = tokenizer("abc"), tokenizer("abcd")
    TrigramTable.from_token_lists([[0, 1, 2]], 3, tokenizer=mine).save(tmp_path)
    TrigramTable.load(tmp_path, tokenizer=tokenizer("abc"))
    with pytest.raises(ValueError, match=r"\(3 tokens, .*not with .*\(4 tokens, "):
        TrigramTable.load(tmp_path, tokenizer=other)


def test_damaged_tables_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no readable"):
        TrigramTable.load(tmp_path / "absent")
    table_of({(1, 2): {3: 0.5}}).save(tmp_path)
    whole = (tmp_path / "table.safetensors").read_bytes()
    (tmp_path / "table.safetensors").write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="no readable"):
        TrigramTable.load(tmp_path)
    (tmp_path / "table.safetensors").write_bytes(whole)
    about = json.loads((tmp_path / "table.json").read_text())
    (tmp_path / "table.json").write_text(json.dumps(about | {"vocab_size": 3}))
    with pytest.raises(ValueError, match="outside the vocabulary of 3"):
        TrigramTable.load(tmp_path)


@pytest.mark.parametrize(
    "lists, vocabulary, top_k, message",
    [
        ([], 9, 12, "three or more"),
        ([[1, 2]], 9, 12, "three or more"),
        ([[1, 2, 9]], 9, 12, "outside the vocabulary of 9"),
        ([[1, 2, -1]], 9, 12, "outside the vocabulary"),
        ([[1, 2, 3]], 9, 0, "top_k"),
        ([[1, 2, 3]], 2**31 + 1, 12, "64-bit"),
        ([[1, 2, 3]], 0, 12, "64-bit"),
    ],
)
def test_bad_corpora_are_refused(lists, vocabulary, top_k, message):
    with pytest.raises(ValueError, match=message):
        TrigramTable.from_token_lists(lists, vocabulary, top_k)


def test_tables_cover_the_largest_vocabulary():
    top = 2**31 - 1
    table = TrigramTable.from_token_lists([[top, top, top, 0, top]], 2**31)
    assert table.row(top, top) == {0: 0.5, top: 0.5}
    assert table.row(top, 0) == {top: 1.0}


# the search

FAN = {(0, 1): {2: 0.6, 3: 0.4}, (1, 2): {4: 0.7, 5: 0.3}, (1, 3): {6: 1.0}, (3, 6): {7: 1.0}, (2, 4): {8: 1.0}}


def test_puct_is_the_formula():
    tree = searched(table_of({(0, 1): {2: 0.6, 3: 0.4}}), 0, 1, iterations=7, depth=2)
    assert len(tree.tokens) == 3
    for child in (1, 2):
        reward, visits, prior = (float(a[child]) for a in (tree.rewards, tree.visits, tree.priors))
        value = reward / visits + prior * (32 + math.log((7 + 8 + 1) / 8)) * math.sqrt(7) / (1 + visits)
        assert puct(reward, visits, prior, tree.visits[0], 32.0, 8.0) == pytest.approx(value, abs=1e-6)
        assert reward / visits == pytest.approx(1 + prior)  # of paths that end there
    assert puct(0.0, 0, 0.1, 5, 32.0, 8.0) == math.inf


@settings(max_examples=40, deadline=None)
@given(LISTS, st.integers(1, 60), st.integers(2, 5))
def test_visits_add_up(lists, iterations, depth):
    table = TrigramTable.from_token_lists(lists, vocab_size=7)
    first, second = next(tokens for tokens in lists if len(tokens) >= 3)[:2]
    tree = searched(table, first, second, iterations, depth)
    assert tree.visits[0] == iterations
    assert tree.depths.max() <= depth
    for node in np.flatnonzero(tree.child_counts):
        children = tree.visits[tree.first_children[node] :][: tree.child_counts[node]].sum()
        # a node reached first as the end of its parent's expansion ended that visit itself; every later one went on
        assert tree.visits[node] - children in ((0,) if node == 0 else (0, 1))
    parents = tree.parents[1:]
    assert (tree.visits[parents] >= tree.visits[1:]).all()


def greedy_walk(tree):
    """Tokens on the way from child to most visited child."""
    node, tokens = 0, []
    while tree.child_counts[node] and tree.visits[node]:
        children = tree.first_children[node] + np.arange(tree.child_counts[node])
        node = int(children[tree.visits[children].argmax()])
        tokens.append(int(tree.tokens[node]))
    return tokens


def test_the_most_visited_path_becomes_the_one_of_greatest_reward():
    # the likeliest first token (2) leads to poor rows, the other to certain ones: 0.6 + 0.7 + 0.2 < 0.4 + 1 + 1
    table = table_of(FAN | {(2, 4): {8: 0.2, 9: 0.1}})

    def rewards(first, second, left):
        row = table.row(first, second)
        if not left or not row:
            return [((), 0.0)]
        return [((t, *path), s + r) for t, s in row.items() for path, r in rewards(second, t, left - 1)]

    best = max(rewards(0, 1, 3), key=lambda item: item[1])[0]
    assert best == (3, 6, 7)
    assert greedy_walk(searched(table, 0, 1, iterations=12))[0] == 2  # exploration still leads
    assert greedy_walk(searched(table, 0, 1, iterations=300_000)) == [3, 6, 7]


def test_paths_are_the_most_visited_prefixes_and_one_token_more():
    table = table_of(FAN)
    tree = searched(table, 0, 1)
    paths = [[t for t in row if t >= 0] for row in best_paths(table.rows, tree, 0, paths=3).tolist()]
    assert paths[0] == [2]  # the root, prolonged by its likeliest successor
    first = int(tree.tokens[1 + tree.visits[1:3].argmax()])
    assert paths[1] == [first, next(iter(table.row(1, first)))]
    everything = best_paths(table.rows, tree, 0, paths=100)
    assert len(everything) == len(tree.tokens)
    assert everything.shape[1] <= 4


@settings(max_examples=40, deadline=None)
@given(LISTS, st.integers(1, 9), st.integers(0, 5), st.integers(1, 30))
def test_the_budget_and_the_depth_bound_the_tree(lists, budget, depth, paths):
    drafter = MCTSDrafter(TrigramTable.from_token_lists(lists, vocab_size=7), budget=budget, paths=paths)
    text = np.array(next(tokens for tokens in lists if len(tokens) >= 3))
    tree = drafter.draft(text, depth)  # TokenTree itself refuses duplicate siblings and missing parents
    assert len(tree) <= budget + 1
    assert tree.depths.max() <= min(depth, 4)
    assert tree.tokens[0] == text[-1]


def test_same_seed_same_drafts_whatever_was_drafted_before():
    rng = np.random.default_rng(0)
    lists = [rng.integers(0, 30, 4000).tolist()]

    def drafts(seed, before=0):
        drafter = MCTSDrafter(TrigramTable.from_token_lists(lists, 30), seed=seed, iterations=40, increment=0.0)
        for t in range(3, 3 + before):
            drafter.draft(np.array(lists[0][:t]), 9)
        trees = [drafter.draft(np.array(lists[0][:t]), 9) for t in range(30, 40)]
        return [t.tokens.tolist() for t in trees]

    assert drafts(0) == drafts(0, before=5)
    assert drafts(0) != drafts(1)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"iterations": 0}, "iterations"), ({"depth": 1}, "depth"), ({"paths": 0}, "paths"), ({"budget": -1}, "budget"),
        ({"window": 2}, "window"), ({"cap": 0.04}, "increment 0.04 and cap 0.04"), ({"increment": -0.1}, "increment"),
        ({"c2": 0.0}, "c2"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        MCTSDrafter(TrigramTable.empty(9), **setting)


# the decoder


@pytest.mark.parametrize("kind", ["empty", "random", "good"])
def test_greedy_output_is_that_of_plain_generate(model, prompt, kind):
    expected = model.generate(prompt, max_new_tokens=40, do_sample=False)
    lists = {"random": [np.random.default_rng(0).integers(0, 41, 500).tolist()], "good": expected.tolist(), "empty": None}[kind]
    for seed in (0, 1):
        table = TrigramTable.from_token_lists(lists, 41) if lists else TrigramTable.empty(41)
        decoder = AdaptiveDraftDecoder(table, seed=seed, iterations=50)
        got = model.generate(prompt, custom_generate=decoder, max_new_tokens=40, do_sample=False)
        assert torch.equal(got, expected)
        assert max(decoder.record.drafted) <= 64
    if kind == "good":
        assert decoder.record.tokens_per_forward > 2


def test_sampled_output_is_that_of_plain_generate_under_the_same_seed(model, prompt):
    options = {"max_new_tokens": 30, "do_sample": True, "temperature": 0.8, "top_p": 0.8}
    torch.manual_seed(0)
    expected = model.generate(prompt, **options)
    torch.manual_seed(0)
    decoder = AdaptiveDraftDecoder(TrigramTable.from_token_lists(expected.tolist(), 41))
    assert torch.equal(model.generate(prompt, custom_generate=decoder, **options), expected)
    assert decoder.record.tokens_per_forward > 1


def test_the_table_learns_verified_text_only(model, prompt):
    table = TrigramTable.from_token_lists([np.random.default_rng(0).integers(0, 41, 900).tolist()], 41)
    before = {k: table.row(*k) for k in itertools.product(range(41), repeat=2)}
    text = model.generate(prompt, custom_generate=AdaptiveDraftDecoder(table), max_new_tokens=30, do_sample=False)[0].tolist()
    verified = set(zip(text, text[1:], text[2:]))
    changed = {(*k, token) for k, row in before.items() for token, score in table.row(*k).items() if row.get(token) != score}
    assert changed
    assert changed <= verified


def test_one_token_prompts_and_foreign_tables(model):
    single = torch.tensor([[7]])
    expected = model.generate(single, max_new_tokens=9, do_sample=False)
    decoder = AdaptiveDraftDecoder(TrigramTable.empty(41))
    assert torch.equal(model.generate(single, custom_generate=decoder, max_new_tokens=9, do_sample=False), expected)
    with pytest.raises(ValueError, match="vocabulary of 42, the model scores 41"):
        model.generate(single, custom_generate=AdaptiveDraftDecoder(TrigramTable.empty(42)), max_new_tokens=2)
    with pytest.raises(ValueError, match="outside the table's vocabulary of 5"):
        model.generate(torch.tensor([[7, 8, 9]]), custom_generate=AdaptiveDraftDecoder(TrigramTable.empty(5)), max_new_tokens=2)


def test_recipe_step_leaves_a_decoder_and_a_table(model, tmp_path):
    words = [chr(97 + i % 26) * (1 + i // 26) for i in range(41)]
    rng = np.random.default_rng(0)
    rows = Dataset.from_list([{"text": " ".join(rng.choice(words, 90))} for _ in range(3)])
    words_tokenizer = tokenizer(words)
    words_tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    state = RecipeState(model=model, tokenizer=words_tokenizer, train=rows, test=rows, seed=0, folder=tmp_path)
    figures = recipe_step(state, max_new_tokens=8, iterations=20)
    assert figures["tokens_per_forward"] >= 1
    assert figures["table_contexts"] == len(TrigramTable.load(tmp_path / "table", tokenizer=words_tokenizer))
    ids = torch.tensor([[3, 4, 5]])
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(ids, custom_generate=state.decode, max_new_tokens=8, do_sample=False), expected)
    before, state.decode = state.decode, None
    recipe_restore(state, budget=9)
    assert state.decode.drafter.budget == 9
    assert all(np.array_equal(a, b) for a, b in zip(state.decode.table.snapshot()[:4], before.table._counted))
