import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from grainwise.context.hyperattention import attention_hardness, hyper_attention
from grainwise.context.hyperattention.lsh import bucket_numbers, bucket_starts, gray_ranks, random_directions, stable_order
from grainwise.context.hyperattention.pieces import (
    PiecewiseAttention,
    Sorted,
    Whole,
    _attend_plain,
    _backward_plain,
    attend,
    attend_backward,
    merge,
)
from grainwise.context.hyperattention.plan import Budget, Planner, rectangles
from grainwise.context.hyperattention.theory import approximate_row_sums, block_members, own_block, sampled_product

exact_attention = torch.nn.functional.scaled_dot_product_attention
SMALL = {"block": 8, "samples": 8, "min_seq_len": 16, "projections": 4}


def tensors(n=64, keys=None, heads=2, key_heads=None, batch=1, dim=8, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    keys = n if keys is None else keys
    shapes = (heads, n), (key_heads or heads, keys), (key_heads or heads, keys)
    return [torch.randn(batch, h, length, dim, generator=g, dtype=torch.float64).to(dtype) for h, length in shapes]


def pair_weights(q, k, pieces):
    """How much each key counts for each query, (B, H, n, m): 1 where read exactly, more where it stands for others."""
    groups, n, m = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    weight = torch.zeros(*q.shape[:3], m, dtype=q.dtype)
    for piece in pieces:
        if isinstance(piece, Whole):
            square = torch.ones(piece.q1 - piece.q0, piece.k1 - piece.k0, dtype=q.dtype)
            weight[:, :, piece.q0 : piece.q1, piece.k0 : piece.k1] += square.tril() if piece.causal else square
            continue
        for s, columns in enumerate(piece.key_rows):
            for row in piece.query_rows[piece.bounds[s] : piece.bounds[s + 1]]:
                assert (columns // m == row // n // groups).all(), "a query reads keys of its own head"
                weight.view(-1, m)[row].index_add_(0, columns % m, piece.bias.to(q.dtype).exp())
    return weight


def dense(q, k, v, pieces, scale):
    """The same attention with all pairs written out: what the pieces must amount to."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = q @ k.transpose(-1, -2) * scale + pair_weights(q, k[:, ::groups], pieces).log()
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_short_inputs_are_exact_bit_for_bit(dtype, causal):
    q, k, v = tensors(n=48, heads=4, key_heads=2, dtype=dtype)
    out = hyper_attention(q, k, v, causal=causal, min_seq_len=48, return_lse=False)
    assert torch.equal(out, exact_attention(q, k, v, is_causal=causal, enable_gqa=True))


@pytest.mark.parametrize("samples", [1, 7, 500])
def test_a_block_of_all_keys_is_exact(samples):
    q, k, v = tensors(n=60, dtype=torch.float32)
    out, lse = hyper_attention(q, k, v, block=60, samples=samples, min_seq_len=8)
    torch.testing.assert_close(out, exact_attention(q, k, v), atol=1e-5, rtol=0)
    logits = q @ k.transpose(-1, -2) / math.sqrt(8)
    torch.testing.assert_close(lse, logits.logsumexp(-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"sinks": 3, "window": 4}])
def test_results_and_gradients_are_those_of_the_weighted_dense_attention(causal, options):
    options = options if causal else {k: v for k, v in options.items() if k != "window"}
    q, k, v = (x.requires_grad_() for x in tensors(n=70, heads=4, key_heads=2, batch=2))
    pieces = Planner(q, k, Budget(**SMALL, **options), torch.Generator().manual_seed(3), causal=causal).pieces()
    assert any(isinstance(p, Sorted) for p in pieces)
    grads = [torch.randn(q.shape, dtype=q.dtype), torch.randn(q.shape[:3], dtype=q.dtype)]
    found = PiecewiseAttention.apply(q, k, v, pieces, 0.5)
    wanted = dense(q, k, v, pieces, 0.5)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)  # the bias is float32
    both = [torch.autograd.grad(out, (q, k, v), grads) for out in (found, wanted)]
    torch.testing.assert_close(both[0], both[1], atol=1e-6, rtol=1e-6)


def test_gradients_match_finite_differences():
    q, k, v = (x.requires_grad_() for x in tensors(n=11, dim=3, heads=1))
    options = {"block": 2, "samples": 1, "min_seq_len": 3, "projections": 2}
    assert torch.autograd.gradcheck(lambda *x: hyper_attention(*x, causal=True, **options), (q, k, v), eps=1e-6, atol=1e-5)


def test_recomputation_draws_the_same_keys():
    q, k, v = (x.requires_grad_() for x in tensors())
    direct = hyper_attention(q, k, v, causal=True, seed=5, return_lse=False, **SMALL)
    again = checkpoint(
        lambda *x: hyper_attention(*x, causal=True, seed=5, return_lse=False, **SMALL), q, k, v, use_reentrant=False
    )
    assert torch.equal(direct, again)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (direct, again)), strict=True):
        assert torch.equal(a, b)


def sums_of_draws(q, k, v, draws):
    """Ratio of exp(lse) to the exact row sum, mean over rows, for each draw."""
    exact = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).exp().sum(-1)
    found = [hyper_attention(q, k, v, seed=s, block=8, samples=6, min_seq_len=8, projections=3)[1] for s in range(draws)]
    return torch.stack([(lse.exp() / exact).mean() for lse in found])


def test_row_sums_are_unbiased_and_permuting_the_keys_changes_nothing():
    q, k, v = tensors(n=40, heads=1)
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    for keys, values in ((k, v), (k[:, :, shuffled], v[:, :, shuffled])):
        ratios = sums_of_draws(q, keys, values, draws=250)
        error = ratios.std() / math.sqrt(len(ratios))
        assert error < 0.01, "too blunt to notice a missing weight (about -0.6) or block mask (about +0.2)"
        assert abs(ratios.mean() - 1) < 3 * error
    whole = [hyper_attention(q, x, y, block=40, min_seq_len=8)[0] for x, y in ((k, v), (k[:, :, shuffled], v[:, :, shuffled]))]
    torch.testing.assert_close(*whole)


@given(block=st.integers(1, 9), samples=st.integers(1, 20), core=st.integers(10, 60))
@settings(max_examples=40, deadline=None)
def test_samples_lie_outside_the_block_and_all_of_them_are_every_key_once(block, samples, core):
    samples = min(samples, core - block)
    q, k, _ = tensors(n=4, keys=core, heads=1)
    start_of = torch.arange(0, core, block).clamp(max=core - block)
    for count in (samples, core - block):
        planner = Planner(q, k, Budget(block=block, samples=count), torch.Generator().manual_seed(core), causal=False)
        ranks = planner._ranks(1, core, start_of)[0]
        for own, drawn in zip(ranks[:, :block], ranks[:, block:], strict=True):
            assert not set(own.tolist()) & set(drawn.tolist())
            assert drawn.min() >= 0
            assert drawn.max() < core
    assert torch.equal(ranks.sort(1).values, torch.arange(core).expand(len(start_of), -1))


def test_sampling_every_other_key_once_is_exact():
    q, k, v = tensors(n=50)
    planner = Planner(q, k, Budget(block=8, samples=20), torch.Generator().manual_seed(0), causal=False)
    (piece,) = planner.approximate([Whole(0, 50, 0, 50, causal=False)])
    planner.budget = Budget(block=8, samples=42)
    ranks = planner._ranks(2, 50, torch.arange(0, 50, 8).clamp(max=42))
    rows = stable_order(planner.key_buckets[0]).gather(1, ranks.flatten(1)).view(2, 7, 50)
    rows += torch.tensor([0, 50])[:, None, None]
    full = Sorted(piece.query_rows, piece.bounds, rows.flatten(0, 1), torch.zeros(50))
    torch.testing.assert_close(PiecewiseAttention.apply(q, k, v, [full], 8**-0.5)[0], exact_attention(q, k, v))


@given(n=st.sampled_from([64, 63, 33, 47]), data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_later_token_never_changes_an_earlier_output(n, data):
    t = data.draw(st.integers(1, n - 1))
    q, k, v = tensors(n=n)
    before = hyper_attention(q, k, v, causal=True, **SMALL)
    for x in (q, k, v):
        x[:, :, t] = -3 * x[:, :, t] + 1
    after = hyper_attention(q, k, v, causal=True, **SMALL)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a[:, :, :t], b[:, :, :t], atol=1e-12, rtol=0)
    assert not torch.allclose(before[0][:, :, t], after[0][:, :, t])


@given(queries=st.integers(1, 80), past=st.integers(0, 40), longest=st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_the_causal_recursion_covers_every_visible_pair_once(queries, past, longest):
    seen = torch.zeros(queries, past + queries, dtype=torch.int)
    for whole in rectangles(queries, past + queries, causal=True, longest=longest):
        square = torch.ones(whole.q1 - whole.q0, whole.k1 - whole.k0, dtype=torch.int)
        assert not whole.causal or len(square) <= longest
        seen[whole.q0 : whole.q1, whole.k0 : whole.k1] += square.tril() if whole.causal else square
    assert torch.equal(seen, torch.ones_like(seen).tril(past))


def test_a_continued_prompt_is_attended_with_its_past():
    q, k, v = tensors(n=90)
    options = SMALL | {"samples": 200}  # reads every key
    whole = hyper_attention(q, k, v, causal=True, return_lse=False, **options)
    for start in (5, 60, 85, 89):
        rest = hyper_attention(q[:, :, start:], k, v, causal=True, return_lse=False, **options)
        torch.testing.assert_close(rest, whole[:, :, start:])
    approximate = hyper_attention(q[:, :, 30:], k, v, causal=True, return_lse=False, **SMALL)
    assert 0 < (approximate - whole[:, :, 30:]).norm() / whole.norm() < 1


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("min_seq_len", [16, 200])
def test_padded_keys_count_nowhere(causal, min_seq_len):
    q, k, v = tensors(n=60, batch=3)
    real = torch.ones(3, 60, dtype=torch.bool)
    real[0, :13] = False
    real[1, 50:] = False
    k[~real[:, None].expand(-1, 2, -1)] = 1e3  # a padded key that was read would take all the attention
    options = SMALL | {"min_seq_len": min_seq_len}
    out, lse = hyper_attention(q, k, v, causal=causal, key_padding=real, seed=1, **options)
    alone, alone_lse = hyper_attention(
        q[:1, :, 13:] if causal else q[:1], k[:1, :, 13:], v[:1, :, 13:], causal=causal, seed=1, **options
    )
    torch.testing.assert_close(out[:1, :, 13:] if causal else out[:1], alone)
    torch.testing.assert_close(lse[:1, :, 13:] if causal else lse[:1], alone_lse)
    assert out.isfinite().all()
    if causal:
        assert not out[0, :, :13].any()
        assert (lse[0, :, :13] == -math.inf).all()


@pytest.mark.parametrize("n", [64, 75])
def test_sinks_and_window_are_read_exactly(n):
    q, k, _ = tensors(n=n, heads=1)
    weights = {}
    for name, extra in (("without", {}), ("with", {"sinks": 2, "window": 5})):
        pieces = Planner(q, k, Budget(**SMALL, **extra), torch.Generator().manual_seed(0), causal=True).pieces()
        weights[name] = pair_weights(q, k, pieces)[0, 0]
    near = torch.ones(n, n).tril().triu(-5).bool()
    near[:, :2] = torch.ones(n, 2).tril().bool()
    assert (weights["with"][near] == 1).all()
    assert not (weights["without"][near] == 1).all()
    assert (weights["with"].triu(1) == 0).all()
    visible = torch.arange(1, n + 1, dtype=torch.float64)
    torch.testing.assert_close(weights["with"].sum(1), visible, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("bits", range(1, 13))
def test_neighbouring_buckets_differ_in_one_bit(bits):
    ranks = gray_ranks(bits)
    assert torch.equal(ranks.sort().values, torch.arange(2**bits))
    code_at = torch.empty_like(ranks)
    code_at[ranks] = torch.arange(2**bits)
    assert all(bin(a ^ b).count("1") == 1 for a, b in zip(code_at[:-1].tolist(), code_at[1:].tolist(), strict=True))


def test_the_hash_is_angular_and_sorting_is_stable():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    directions = random_directions(6, 5, torch.Generator().manual_seed(1), x.device)
    numbers = bucket_numbers(x, directions)
    assert torch.equal(numbers, bucket_numbers(7 * x, directions)), "the length of a vector does not matter"
    order = stable_order(numbers[None])[0]
    assert torch.equal(order, torch.sort(numbers, stable=True).indices)
    starts = bucket_starts(numbers[None], 32)[0]
    assert all((numbers[order[starts[b] : starts[b + 1]]] == b).all() for b in range(32))
    assert starts[-1] == 500


@given(seed=st.integers(0, 10**6), cut=st.integers(1, 19))
@settings(max_examples=20, deadline=None)
def test_merging_two_parts_of_the_keys_is_attention_over_all(seed, cut):
    q, k, v = tensors(n=20, seed=seed)
    parts = [attend(q, k[:, :, s], v[:, :, s], scale=0.4) for s in (slice(0, cut), slice(cut, None))]
    whole = attend(q, k, v, scale=0.4)
    torch.testing.assert_close(merge(*parts[0], *parts[1]), whole, atol=1e-6, rtol=0)
    nothing = torch.zeros_like(q), torch.full(q.shape[:3], -math.inf, dtype=q.dtype)
    for merged in (merge(*nothing, *whole), merge(*whole, *nothing)):
        torch.testing.assert_close(merged, whole, atol=1e-6, rtol=0)
    empty = merge(*nothing, *nothing)
    assert torch.equal(empty[0], nothing[0])
    assert torch.equal(empty[1], nothing[1])


def test_merging_survives_logits_that_overflow():
    big, small = torch.tensor([2000.0]), torch.tensor([-2000.0])
    out, lse = merge(torch.ones(1, 3), small, torch.full((1, 3), 2.0), big)
    assert torch.equal(out, torch.full((1, 3), 2.0))
    assert lse == 2000.0


@pytest.mark.parametrize("causal", [False, True])
def test_the_plain_form_for_other_devices_agrees_with_the_cpu_kernel(causal):
    q, k, v = tensors(n=12)
    bias = None if causal else torch.randn(12)
    mask = None if bias is None else bias.double()[None, None, None]
    out, lse = attend(q, k, v, scale=0.3, causal=causal, bias=bias)
    torch.testing.assert_close(_attend_plain(q, k, v, 0.3, causal, mask), (out, lse))
    grad = torch.randn_like(out)
    fast = attend_backward(grad, (q, k, v), out, lse, scale=0.3, causal=causal, bias=bias)
    torch.testing.assert_close(_backward_plain(grad, (q, k, v), out, lse, 0.3, causal, mask), fast)


def test_heavy_clusters_are_caught_better_than_by_chance():
    g = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(32, 16, generator=g), dim=-1) * 5
    q, k = (centres[torch.randint(32, (1, 1, 256), generator=g)] + 0.05 * torch.randn(1, 1, 256, 16, generator=g) for _ in "qk")
    hardness = attention_hardness(q, k, block=16, projections=7)
    assert hardness.heavy_mass.item() > 4 * 16 / 256
    shuffled = attention_hardness(torch.randn(q.shape, generator=g), k, block=16, projections=7)
    assert shuffled.heavy_mass < hardness.heavy_mass / 2


def test_hardness_is_what_its_definition_says():
    q, k, _ = tensors(n=40, heads=2, key_heads=1, dtype=torch.float32)
    found = attention_hardness(q, k, block=8, projections=3, seed=4)
    logits = q @ k.transpose(-1, -2) / math.sqrt(8)
    weights = logits.softmax(-1)
    torch.testing.assert_close(found.alpha, 40 * weights.square().sum(2).amax(-1))
    piece = own_block(q, k, Budget(block=8, projections=3), torch.Generator().manual_seed(4))
    member = torch.stack(block_members(piece, q.shape[:3], 40, 2)).view(1, 2, 40, 40)
    assert (member.sum(-1) == 8).all()
    torch.testing.assert_close(found.heavy_mass, (weights * member).sum(-1).mean(-1))
    rest = (logits.exp() * ~member).sum(-1)
    torch.testing.assert_close(found.kappa, rest.amax(-1) / rest.amin(-1))
    with pytest.raises(ValueError, match="fit into one block"):
        attention_hardness(q, k, block=40)


def test_the_theoretical_estimator_approaches_exact_attention():
    q, k, v = tensors(n=200, dim=4, heads=1)
    q, v = q * 0.5, v + 2
    exact = exact_attention(q, k, v)
    errors = []
    for samples in (30, 3000):
        out, lse = hyper_attention(q, k, v, variant="theory", block=20, samples=samples, min_seq_len=1)
        errors.append(((out - exact).norm() / exact.norm()).item())
    assert errors[1] < 0.1 < errors[0] < 1
    wanted = (q @ k.transpose(-1, -2) / 2).logsumexp(-1)
    assert (lse - wanted).abs().max() < 0.3


def test_the_theoretical_parts_do_what_they_say():
    (q, k, v), g = (x[0, 0] for x in tensors(n=60, dim=4, heads=1)), torch.Generator().manual_seed(0)
    q = 0.3 * q
    wanted = (q @ k.T).exp() @ v
    mean = torch.stack([sampled_product(q, k, v, 20, g) for _ in range(600)]).mean(0)
    assert (mean - wanted).norm() / wanted.norm() < 0.1
    member = torch.eye(60, dtype=torch.bool)
    wild = k.clone()
    wild[7] *= 30  # one huge column, which the cap tames
    masked = ((q @ wild.T).exp() * member).sum(1)
    sums = approximate_row_sums(q, wild, masked, member, 40, torch.Generator().manual_seed(1))
    assert (sums >= masked).all()
    assert sums.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block": 0}, ValueError, "block must be an integer >= 1"),
        ({"samples": 0}, ValueError, "samples must be an integer >= 1"),
        ({"samples": 2.5}, ValueError, "samples must be an integer"),
        ({"projections": 17}, ValueError, "at most 16"),
        ({"window": 3}, ValueError, "needs causal=True"),
        ({"variant": "practicle"}, ValueError, "Did you mean 'practical'"),
        ({"variant": "theory", "causal": True}, ValueError, "neither causal"),
        ({"key_padding": torch.ones(1, 64)}, TypeError, "must be bool"),
        (
            {"key_padding": torch.ones(1, 1, 64, 64, dtype=torch.bool)},
            ValueError,
            "supports no mask, the causal mask and padding",
        ),
    ],
)
def test_wrong_options_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        hyper_attention(*tensors(), **change)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: (q.float(), k, v), TypeError, "share one floating-point type"),
        (lambda q, k, v: (q.long(), k.long(), v.long()), TypeError, "share one floating-point type"),
        (lambda q, k, v: (q, k.to("meta"), v), ValueError, "on one device"),
        (lambda q, k, v: (q[0], k[0], v[0]), ValueError, r"\(batch, heads, length, dim\)"),
        (lambda q, k, v: (q[..., :5], k, v), ValueError, "match q in batch and dim"),
        (lambda q, k, v: (q, k, v[..., :5]), ValueError, "must agree"),
        (lambda q, k, v: (q[:, :, :0], k, v), ValueError, "must not be empty"),
        (lambda q, k, v: (q[:, :1], k, v), ValueError, "multiple of the 2 key heads"),
        (lambda q, k, v: (q, k, v.index_fill(2, torch.tensor([3]), torch.nan)), ValueError, "v holds NaN"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        hyper_attention(*change(*tensors()))


def test_causal_attention_needs_a_key_for_each_query():
    q, k, v = tensors(n=10, keys=8)
    with pytest.raises(ValueError, match="10 queries and 8 keys"):
        hyper_attention(q, k, v, causal=True)
