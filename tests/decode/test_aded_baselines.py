"""The drafters that ADED's proof compares with, and its replay: a weak baseline would make a strong claim."""

import numpy as np
import torch

from grainwise.decode import TreeDecoder
from grainwise.decode.aded import TrigramTable
from grainwise.proofs.aded import BeamDrafter, PromptLookupDrafter, replay


def spelled(tree):
    return [tuple(tree.tokens[tree.path(node)[1:]].tolist()) for node in range(1, len(tree))]


def test_lookup_copies_what_followed_the_longest_match_latest_first():
    text = np.array([1, 2, 7, 8, 1, 2, 9, 5, 2, 6, 1, 2])
    tree = PromptLookupDrafter(length=2).draft(text, depth=9)
    assert spelled(tree) == [(9,), (7,), (6,), (9, 5), (7, 8), (6, 1)]  # after "1 2" twice, then after "2"
    assert spelled(PromptLookupDrafter(length=3, copies=1).draft(text, depth=9)) == [(9,), (9, 5), (9, 5, 2)]
    assert spelled(PromptLookupDrafter(length=3, budget=4).draft(text, depth=2)) == [(9,), (7,), (9, 5), (7, 8)]
    for short in ([3], [3, 4], [1, 2, 3]):
        assert len(PromptLookupDrafter().draft(np.array(short), depth=9)) == 1


def test_beam_takes_the_likeliest_prefixes():
    lists = [np.random.default_rng(0).integers(0, 5, 300).tolist()]
    table = TrigramTable.from_token_lists(lists, 5)

    def prefixes(first, second, left):
        for token, score in table.row(first, second).items() if left else ():
            yield (token,), score
            yield from (((token, *path), score * s) for path, s in prefixes(second, token, left - 1))

    everything = sorted((p for _, p in prefixes(1, 2, 3)), reverse=True)
    tree = BeamDrafter(table, depth=3, budget=20).draft(np.array([0, 1, 2]), depth=9)
    chances = dict(prefixes(1, 2, 3))
    assert sorted((chances[p] for p in spelled(tree)), reverse=True) == everything[:20]


def test_a_replay_counts_what_real_decoding_emits(model, prompt):
    text = model.generate(prompt, max_new_tokens=40, do_sample=False)
    decoder = TreeDecoder(PromptLookupDrafter())
    real = model.generate(prompt, max_new_tokens=40, do_sample=False, custom_generate=decoder)
    assert torch.equal(real, text)
    assert decoder.record.emitted == replay(PromptLookupDrafter(), text[0].numpy(), prompt.shape[1])
