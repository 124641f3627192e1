import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from grainwise.context import KitCache


def written(entries=6, layers=2, batch=2, heads=2, dim=4):
    cache = KitCache()
    for i in range(layers):
        cache.write(torch.randn(batch, heads, entries, dim), torch.randn(batch, heads, entries, dim), i)
    return cache


def snapshot(cache):
    return [(x.keys.clone(), x.values.clone(), x.positions.clone(), x.next_position) for x in cache.layers]


def same(a, b):
    return all(
        torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) and torch.equal(x[2], y[2]) and x[3] == y[3]
        for x, y in zip(a, b, strict=True)
    )


@torch.no_grad()
def test_it_is_a_drop_in_cache(llama, ids):
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    options = {"max_new_tokens": 6, "attention_mask": mask, "do_sample": False}
    for beams in (1, 2):
        wanted = llama.generate(ids, past_key_values=DynamicCache(), num_beams=beams, **options)
        assert torch.equal(llama.generate(ids, past_key_values=KitCache(), num_beams=beams, **options), wanted)


@torch.no_grad()
def test_positions_stay_true_when_entries_are_removed(llama, ids):
    cache = KitCache()
    llama(ids, past_key_values=cache)
    kept = torch.cat([torch.arange(10), torch.arange(60, 100)])
    cache.keep(kept)
    assert torch.equal(cache.positions(1), kept)
    assert cache.get_seq_length() == 100
    found = llama(ids[:, :3], past_key_values=cache).logits
    assert torch.equal(cache.positions(), torch.cat([kept, torch.arange(100, 103)]))
    # the same by a mask over the whole context
    full = DynamicCache()
    llama(ids, past_key_values=full)
    mask = torch.zeros(2, 103, dtype=torch.long)
    mask[:, kept] = mask[:, 100:] = 1
    positions = torch.arange(100, 103).expand(2, -1)
    wanted = llama(ids[:, :3], past_key_values=full, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found, wanted)


def test_keeping_differs_per_layer_and_takes_masks():
    cache = written()
    cache.keep(torch.tensor([True, False] * 3), layer_idx=0)
    assert cache.positions(0).tolist() == [0, 2, 4]
    assert cache.positions(1).tolist() == list(range(6))
    with pytest.raises(ValueError, match=r"0\.\.2"):
        cache.keep(torch.tensor([3]), layer_idx=0)


def test_forks_share_until_written_and_never_after():
    cache = written()
    before = snapshot(cache)
    twin = cache.fork()
    assert twin.nbytes(cache) == cache.nbytes() == 2 * 2 * (2 * 2 * 6 * 4) * 4
    twin.write(torch.ones(2, 2, 1, 4), torch.ones(2, 2, 1, 4), 0)
    twin.keep(torch.tensor([1]), layer_idx=1)
    assert same(snapshot(cache), before)
    assert twin.positions(0).tolist() == list(range(7))
    assert twin.nbytes(cache) > cache.nbytes()
    cache.crop(-2)
    assert twin.layers[0].entries == 7


def change_and_fail(cache, empty, actions):
    with cache.temporary(), empty.temporary():
        empty.write(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 0)
        for action in actions:
            if action == "write":
                for i in range(2):
                    cache.write(torch.ones(2, 2, 2, 4), torch.ones(2, 2, 2, 4), i)
            elif action == "keep":
                cache.keep(torch.arange(cache.layers[0].entries) % 2 == 0)
            elif action == "crop" and all(x.entries for x in cache.layers):
                cache.crop(-1)
            elif action == "reset":
                cache.reset()
            elif action == "select":
                cache.batch_repeat_interleave(2)
                cache.batch_select_indices(torch.tensor([0, 1]))
            elif action == "jump":
                cache.continue_at(cache.get_seq_length() + 1000)
        raise RuntimeError("inside")


@given(actions=st.lists(st.sampled_from(["write", "keep", "crop", "reset", "select", "jump"]), max_size=5))
@settings(max_examples=30, deadline=None)
def test_whatever_is_done_temporarily_is_undone(actions):
    cache = written()
    before, empty = snapshot(cache), KitCache()
    with pytest.raises(RuntimeError, match="inside"):
        change_and_fail(cache, empty, actions)
    assert same(snapshot(cache), before)
    assert len(empty) == 0


def test_entries_can_be_written_at_given_positions():
    cache = written(entries=3, layers=1)
    more = torch.ones(2, 2, 2, 4)
    cache.write(more, more, 0, positions=torch.tensor([0, 9]))
    assert cache.positions().tolist() == [0, 1, 2, 0, 9]
    assert cache.get_seq_length() == 10
    cache.continue_at(50)
    assert cache.get_seq_length() == 50
    with pytest.raises(ValueError, match="holds an entry at position 9"):
        cache.continue_at(9)
    with pytest.raises(ValueError, match=r"positions must be \(2,\)"):
        cache.write(more, more, 0, positions=torch.tensor([0]))


def test_cropping_and_resetting_take_positions_along():
    cache = written()
    cache.crop(-2)
    assert cache.positions().tolist() == [0, 1, 2, 3]
    assert cache.get_seq_length() == 4
    assert cache.get_mask_sizes(3, 0) == (7, 0)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0


@torch.no_grad()
def test_a_hook_computes_attention_from_the_entries(llama, ids):
    seen = []

    def newest(query, keys, values, *, layer, mask, scale):
        """Exact over the newest half of the entries once decoding."""
        seen.append((query.shape[2], layer.entries, layer.next_position, mask is None))
        groups = query.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
        if query.shape[2] == 1:
            keys, values = (x[:, :, layer.entries // 2 :] for x in (keys, values))
        causal = query.shape[2] > 1
        return torch.nn.functional.scaled_dot_product_attention(query, keys, values, is_causal=causal, scale=scale)

    llama.set_attn_implementation("cache_kit")
    plain = llama(ids, past_key_values=KitCache()).logits
    cache = KitCache(attend=newest)
    torch.testing.assert_close(llama(ids, past_key_values=cache).logits, plain)
    assert seen == [(100, 100, 100, True)] * 3
    step = llama(ids[:, :1], past_key_values=cache.fork()).logits
    cut = cache.fork()
    cut.keep(torch.arange(50, 100))
    for layer in cut.layers:
        layer.attend = None
    torch.testing.assert_close(llama(ids[:, :1], past_key_values=cut).logits, step)
    with pytest.raises(ValueError, match="must return the shape of its query"):
        llama(ids[:, :1], past_key_values=KitCache(attend=lambda q, k, v, **_: v[:, :, :, :2]))
