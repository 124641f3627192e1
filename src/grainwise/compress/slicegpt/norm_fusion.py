"""Step 0: norms without parameters.

LayerNorm(x) = RMSN(x M) * gain + shift, where RMSN(x) = x / sqrt(sum(x^2) / D + eps) and M subtracts the mean over the D
coordinates. Gain and shift go into the linear modules that read the norm's output, M into everything that writes to the
stream. What remains, RMSN, commutes with every rotation of the stream.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from grainwise.compress.architecture import Architecture


class SlicedRMSNorm(nn.Module):
    """x / sqrt(sum(x^2) / D + eps) over the last dimension, without gain.

    original_width: D of the unsliced model. It stays the divisor when the stream is narrower: the coordinates that were
    deleted held next to no energy, so the sum is what it was.
    """

    def __init__(self, original_width: int, eps: float) -> None:
        super().__init__()
        self.original_width, self.eps = original_width, eps

    def forward(self, stream: Tensor) -> Tensor:
        """stream: (..., width), any width."""
        exact = torch.float64 if stream.dtype == torch.float64 else torch.float32
        length = torch.linalg.vector_norm(stream, dim=-1, keepdim=True, dtype=exact)
        return (stream * torch.rsqrt(length.square() / self.original_width + self.eps)).to(stream.dtype)

    def extra_repr(self) -> str:
        return f"original_width={self.original_width}, eps={self.eps}"


def norm_eps(norm: nn.Module) -> float:
    """Epsilon of a Llama-style RMSNorm or of a LayerNorm."""
    return norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon


def fused_layer(layer: nn.Module, architecture: Architecture, width: int, dtype: torch.dtype) -> nn.Module:
    """A copy of a decoder layer in `dtype` with `SlicedRMSNorm`s, whose linear modules have absorbed gain, shift and mean.

    Fed with streams of mean zero (any stream, for RMSNorm models) it computes what the source computes.
    """
    fused = copy.deepcopy(layer).to(dtype).requires_grad_(False)
    for sub in architecture.sublayers:
        norm = fused.get_submodule(sub.norm)
        for name in sub.readers:
            _absorb(norm, fused.get_submodule(name))
        if architecture.centred:
            _centre_outputs(fused.get_submodule(sub.writer))
        setattr(fused, sub.norm, SlicedRMSNorm(width, norm_eps(norm)))
    return fused


def fused_head(head: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight (vocabulary, D), bias (vocabulary,) or None) of the head with the final norm's gain and shift, float64."""
    fused = copy.deepcopy(head).double().requires_grad_(False)
    _absorb(copy.deepcopy(norm).double(), fused)
    return fused.weight, fused.bias


@torch.no_grad()
def _absorb(norm: nn.Module, reader: nn.Module) -> None:
    """reader(x * gain + shift) as one linear module of x, in place."""
    shift = getattr(norm, "bias", None)
    if shift is not None:
        moved = reader.weight @ shift
        reader.bias = nn.Parameter(moved if reader.bias is None else reader.bias + moved, requires_grad=False)
    if norm.weight is not None:
        reader.weight.mul_(norm.weight)


@torch.no_grad()
def _centre_outputs(writer: nn.Module) -> None:
    """Make the outputs of a linear module have mean zero over their coordinates, in place."""
    writer.weight.sub_(writer.weight.mean(0))  # layout (out, in): the mean over the outputs
    if writer.bias is not None:
        writer.bias.sub_(writer.bias.mean())
