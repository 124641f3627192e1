from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from grainwise.decode import TokenTree, greedy, shared_sample, tree_rejection, typical

V = 4
TARGET = torch.tensor(np.random.default_rng(0).dirichlet(np.ones(V), size=V + 1), dtype=torch.float64)  # row: last token
ROOT = V  # the token before the first emitted one
SIGNIFICANT = 1e-3


class Run:
    """The target is a Markov chain; emitted tokens are collected until `limit`."""

    def __init__(self, tree, limit=2):
        self.tree, self.limit, self.tokens = tree, limit, []

    def scores(self, node):
        return TARGET[int(self.tree.tokens[node])].log()[None]

    def emit(self, token):
        self.tokens.append(token)
        return len(self.tokens) < self.limit


def emitted(accept, tree, generator):
    """The first two tokens: of one verification, then of plain sampling if it stopped early."""
    run = Run(tree)
    accept(tree, run.scores, run.emit, generator=generator)
    while len(run.tokens) < 2:
        run.tokens.append(int(torch.multinomial(TARGET[run.tokens[-1]], 1, generator=generator)))
    return tuple(run.tokens)


def p_value(samples):
    """Chi-square test of two-token samples against the chain's law."""
    law = TARGET[ROOT][:, None] * TARGET[:V]
    counts = Counter(samples)
    observed = np.array([counts[(a, b)] for a in range(V) for b in range(V)])
    return chisquare(observed, law.flatten().numpy() * len(samples)).pvalue


POINT_TREE = TokenTree(np.array([ROOT, 0, 1, 2, 0, 3, 1]), np.array([-1, 0, 0, 1, 1, 1, 2]))


def per_path_sample(tree, scores, emit, generator):
    """The published variant: an independent draw for each path, the longest agreeing path wins."""
    best: list[int] = []
    for row in tree.retrieve_table.tolist():
        nodes = [n for n in row if n >= 0]
        run = []
        for at, node in enumerate(nodes):
            token = int(torch.multinomial(scores(node).softmax(-1), 1, generator=generator))
            run.append(token)
            if at + 1 == len(nodes) or token != int(tree.tokens[nodes[at + 1]]):
                break
        best = max(best, run, key=len)
    for token in best:
        if not emit(token):
            break
    return []


def test_shared_sample_keeps_the_law():
    generator = torch.Generator().manual_seed(1)
    assert p_value([emitted(shared_sample, POINT_TREE, generator) for _ in range(3000)]) > SIGNIFICANT


def test_one_draw_for_each_path_distorts_the_law():
    generator = torch.Generator().manual_seed(1)
    assert p_value([emitted(per_path_sample, POINT_TREE, generator) for _ in range(1500)]) < SIGNIFICANT


def drawn_tree(rng, draft):
    """Two children of the root and two of the first child, drawn without replacement."""
    top = rng.choice(V, size=2, replace=False, p=draft[0])
    below = rng.choice(V, size=2, replace=False, p=draft[1])
    tokens = np.concatenate([[ROOT], top, below])
    proposals = torch.zeros(5, V, dtype=torch.float64)
    proposals[0], proposals[1] = torch.from_numpy(draft[0]), torch.from_numpy(draft[1])
    return TokenTree(tokens, np.array([-1, 0, 0, 1, 1]), proposals)


def test_tree_rejection_keeps_the_law():
    rng, generator = np.random.default_rng(2), torch.Generator().manual_seed(2)
    draft = rng.dirichlet(np.ones(V), size=2)
    samples = [emitted(tree_rejection, drawn_tree(rng, draft), generator) for _ in range(1500)]
    assert p_value(samples) > SIGNIFICANT


def test_tree_rejection_accepts_the_first_child_when_draft_equals_target():
    rng, generator = np.random.default_rng(3), torch.Generator().manual_seed(3)
    for _ in range(50):
        tree = drawn_tree(rng, TARGET[[ROOT, 0]].numpy())
        run = Run(tree, limit=5)
        assert tree_rejection(tree, run.scores, run.emit, generator)[1] == 1


def test_tree_rejection_wants_proposals_that_cover_the_drafts():
    run = Run(POINT_TREE)
    with pytest.raises(ValueError, match="proposals"):
        tree_rejection(POINT_TREE, run.scores, run.emit)
    uncovered = TokenTree(np.array([ROOT, 2]), np.array([-1, 0]), torch.tensor([[0.5, 0.5, 0, 0], [0.25] * 4]))
    with pytest.raises(ValueError, match="no probability"):
        tree_rejection(uncovered, run.scores, run.emit)


def test_greedy_follows_the_argmax():
    chain = TARGET.argmax(dim=-1)
    first = int(chain[ROOT])
    second = int(chain[first])
    tree = TokenTree(np.array([ROOT, (first + 1) % V, first, second]), np.array([-1, 0, 0, 2]))
    run = Run(tree, limit=9)
    assert greedy(tree, run.scores, run.emit) == [0, 2, 3]
    assert run.tokens == [first, second, int(chain[second])]


def test_emission_can_stop_inside_a_path():
    first = int(TARGET[ROOT].argmax())
    tree = TokenTree(np.array([ROOT, first]), np.array([-1, 0]))
    run = Run(tree, limit=1)
    assert greedy(tree, run.scores, run.emit) == [0]
    assert run.tokens == [first]


def test_typical_with_a_vanishing_threshold_accepts_the_likeliest_longest_path():
    run = Run(POINT_TREE, limit=9)
    kept = typical(POINT_TREE, run.scores, run.emit, epsilon=1e-12, delta=1e-12)
    deepest = [n for n in range(len(POINT_TREE)) if POINT_TREE.depths[n] == 2]

    def chance(node):
        path = POINT_TREE.tokens[POINT_TREE.path(node)]
        return float(TARGET[path[0], path[1]] * TARGET[path[1], path[2]])

    assert kept == POINT_TREE.path(max(deepest, key=chance))
    assert run.tokens[:-1] == POINT_TREE.tokens[kept[1:]].tolist()
    assert run.tokens[-1] == int(TARGET[run.tokens[-2]].argmax())


def test_typical_with_a_certain_target_accepts_its_token_only():
    certain = torch.full((1, V), -1e9, dtype=torch.float64)
    certain[0, 1] = 0
    tokens: list[int] = []
    assert typical(POINT_TREE, lambda node: certain, lambda t: tokens.append(t) or True) == [0, 2, 6]
    assert tokens == [1, 1, 1]


def test_typical_never_asks_for_more_than_epsilon():
    flat = torch.zeros(1, V, dtype=torch.float64)  # entropy ln 4: delta * exp(-H) = delta / 4
    count = []
    typical(POINT_TREE, lambda node: flat, lambda t: count.append(t) or True, epsilon=0.2, delta=100.0)
    assert len(count) == 3  # 1/4 > min(0.2, 25)
    count.clear()
    typical(POINT_TREE, lambda node: flat, lambda t: count.append(t) or True, epsilon=0.3, delta=100.0)
    assert len(count) == 1
    with pytest.raises(ValueError, match="positive"):
        typical(POINT_TREE, lambda node: flat, lambda t: True, epsilon=0.0)
