"""The Triton kernel in Triton's interpreter, which must be chosen before Triton is imported: hence a process of its own."""

import os
import subprocess
import sys

import pytest
import torch

from grainwise.kernels import hyper_blocks

COMPARISON = """
import torch
from grainwise.kernels import hyper_blocks as hb

hb.TILE = hb.KEY_STEP = 16  # several tiles and key steps on tiny tensors
g = torch.Generator().manual_seed(0)
for dim, counts, biased, causal in ((16, (20, 0, 5), True, False), (12, (1, 33), False, False), (16, (18, 18), False, True)):
    bounds = torch.tensor([0, *counts]).cumsum(0)
    q, k, v = (torch.randn(n, dim, generator=g) for n in (sum(counts), 50, 50))
    rows = torch.randint(50, (len(counts), 21), generator=g)
    bias = torch.randn(21, generator=g) if biased else None
    found = hb.segment_attention(q, k, v, bounds, rows, bias, scale=0.3, causal=causal)
    wanted = hb.segment_attention_reference(q, k, v, bounds, rows, bias, scale=0.3, causal=causal)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
q, k, v = torch.randn(2, 4, 19, 16, generator=g), torch.randn(2, 2, 19, 16, generator=g), torch.randn(2, 2, 19, 16, generator=g)
out, _ = hb.whole_attention(q, k, v, scale=0.25, causal=True)
wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.25, enable_gqa=True)
torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
print("agreed")
"""


@pytest.mark.skipif(not hyper_blocks.available(), reason="Triton is not installed")
def test_the_kernel_agrees_with_its_reference():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", COMPARISON], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "agreed", done.stderr[-3000:]


def test_the_reference_agrees_with_the_pieces_that_call_it():
    from grainwise.context.hyperattention.pieces import attend

    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, 8, generator=g) for n in (7, 20, 20))
    rows, bias = torch.randint(20, (2, 6), generator=g), torch.randn(6, generator=g)
    out, lse = hyper_blocks.segment_attention_reference(q, k, v, torch.tensor([0, 3, 7]), rows, bias, scale=0.4)
    for s, part in enumerate((slice(0, 3), slice(3, 7))):
        wanted = attend(q[part][None, None], k[rows[s]][None, None], v[rows[s]][None, None], scale=0.4, bias=bias)
        torch.testing.assert_close((out[part], lse[part]), (wanted[0][0, 0], wanted[1][0, 0]))


def test_without_triton_the_kernel_says_what_to_use(monkeypatch):
    monkeypatch.setattr(hyper_blocks, "triton", None)
    assert not hyper_blocks.available()
    x = torch.zeros(1, 4)
    with pytest.raises(ImportError, match="segment_attention_reference"):
        hyper_blocks.segment_attention(x, x, x, torch.tensor([0, 1]), torch.zeros(1, 1, dtype=torch.long), None, scale=1.0)
