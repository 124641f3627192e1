"""Slicing a model: one walk through the calibration text finds the bases and writes the sliced weights.

Notation: H is the residual stream (tokens, D) before a sub-layer, Q its basis (D, D), w the width that is kept. With the
first w columns of Q called K, slicing a sub-layer means that it reads H K K^T, on the branch and on the skip path alike.
So the walk keeps H in the original basis, replaces it by H K K^T, adds the sub-layer's branch, and takes the principal axes
of the outcome as the next basis: later bases see the signals of layers that are already sliced.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grainwise.compress.architecture import Architecture, SubLayer, architecture_of
from grainwise.compress.block_walker import BlockWalker
from grainwise.compress.slicegpt.configuration import SlicedLlamaConfig, SlicedOPTConfig
from grainwise.compress.slicegpt.modeling import SlicedLlamaForCausalLM, SlicedOPTForCausalLM, SlicingReport
from grainwise.compress.slicegpt.norm_fusion import fused_head, fused_layer
from grainwise.compress.slicegpt.rotation import ORIENTATIONS, oriented, principal_axes
from grainwise.compress.structural import Batch, StructuralConfig, calibration_batches, compress, model_size
from grainwise.naming import did_you_mean
from grainwise.training import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grainwise.recipe_state import RecipeState

ALIGNMENT = 32  # widths that are no multiple of it are slow on the matrix units of CPUs and GPUs in half precision
Chooser = Callable[[Tensor, int], Tensor]  # (second moment (D, D), width to keep) -> orthogonal Q (D, D), float64


@dataclass(frozen=True)
class SliceGPTConfig(StructuralConfig):
    """Settings of SliceGPT.

    sparsity: share of the residual width to delete, in [0, 1); 0 only rotates. It is no share of the parameters: the
        report counts those. round_to: kept widths are rounded down to a multiple of it (0.25 of 1024 gives 768).
    orientation: `random` re-mixes the kept coordinates, `pca` leaves them in the order of their energy.
    slice_head: also narrow what the language-model head reads. seed: of the random orientation.
    """

    sparsity: float = 0.25
    round_to: int = 32
    orientation: str = "random"
    slice_head: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity must be at least 0 and below 1, got {self.sparsity}")
        if self.round_to < 1:
            raise ValueError(f"round_to must be at least 1, got {self.round_to}")
        if self.orientation not in ORIENTATIONS:
            raise ValueError(f"unknown orientation {self.orientation!r}. {did_you_mean(self.orientation, ORIENTATIONS)}")

    def apply(
        self, model: PreTrainedModel, calibration: Any, progress: Progress | None
    ) -> tuple[PreTrainedModel, SlicingReport]:
        """A sliced copy of `model` (itself unchanged) and its report; call it through `compress`."""
        _check(model)
        width = kept_width(model.config, self.sparsity, self.round_to)
        batches = calibration_batches(
            calibration, vocabulary=model.config.vocab_size, longest=model.config.max_position_embeddings
        )
        generator = torch.Generator().manual_seed(self.seed)

        def choose(moment: Tensor, kept: int) -> Tensor:
            return oriented(principal_axes(moment)[1], kept, self.orientation, generator)

        sliced = slice_with_bases(model, batches, choose, width=width, slice_head=self.slice_head, progress=progress)
        sliced.config.slicing |= {k: v for k, v in asdict(self).items() if k != "seed"}
        return sliced, sliced.slicing_report()


def slice_model(
    model: PreTrainedModel,
    calibration: Any,
    *,
    sparsity: float = 0.25,
    round_to: int = 32,
    orientation: str = "random",
    slice_head: bool = False,
    seed: int = 0,
) -> SlicedLlamaForCausalLM | SlicedOPTForCausalLM:
    """`compress(model, SliceGPTConfig(...), calibration)` without the report (ask the result's `slicing_report()`)."""
    config = SliceGPTConfig(sparsity, round_to, orientation, slice_head, seed)
    return compress(model, config, calibration)[0]


def rotate_model(
    model: PreTrainedModel, calibration: Any, *, orientation: str = "random", seed: int = 0
) -> SlicedLlamaForCausalLM | SlicedOPTForCausalLM:
    """Only rotate: the same function with every sub-layer in its own basis, nothing deleted."""
    return slice_model(model, calibration, sparsity=0.0, orientation=orientation, seed=seed)


def kept_width(config: Any, sparsity: float, round_to: int) -> int:
    """The residual width to keep. Warns when it is unaligned; raises ValueError when it is too small to work with."""
    full = config.hidden_size
    if sparsity == 0.0:
        return full
    width = math.floor((1.0 - sparsity) * full + 1e-9) // round_to * round_to  # 1e-9: 0.7 * 10 is 6.999... in binary
    head = getattr(config, "head_dim", None) or full // config.num_attention_heads
    if width < max(1, head):
        raise ValueError(
            f"sparsity {sparsity} with round_to {round_to} leaves {width} of {full} coordinates, fewer than the "
            f"{head} of one attention head: lower the sparsity or round_to"
        )
    if width % ALIGNMENT:
        warnings.warn(
            f"the sliced width {width} is no multiple of {ALIGNMENT}: half-precision matrix products may run slower than "
            f"before slicing; use round_to={ALIGNMENT}",
            stacklevel=2,
        )
    return width


def _check(model: PreTrainedModel) -> None:
    kind = model.config.model_type
    if kind in (SlicedLlamaConfig.model_type, SlicedOPTConfig.model_type):
        raise ValueError("the model is already sliced: slice the original model at the level you want")
    architecture_of(model)
    window = getattr(model.config, "sliding_window", None)
    if window is not None and window < model.config.max_position_embeddings:
        raise ValueError(
            f"the model attends through a sliding window of {window} tokens, which the sliced model cannot: if your texts "
            "are shorter than that, load it with from_pretrained(..., sliding_window=None)"
        )
    attention = model.config._attn_implementation
    if "flash" in str(attention):
        raise ValueError(f"calibration runs in float32, which {attention} cannot: load with attn_implementation='sdpa'")


def slice_with_bases(
    model: PreTrainedModel,
    batches: list[Batch],
    choose: Chooser,
    *,
    width: int,
    slice_head: bool = False,
    progress: Progress | None = None,
) -> Any:
    """Slice every signal to `width` in the bases that `choose` gives for their second moments, in order of the stream.

    The last signal, which the head reads, keeps the full width unless `slice_head`.
    """
    architecture = architecture_of(model)
    layers, full = architecture.layers_of(model), model.config.hidden_size
    widths = [width] * (2 * len(layers)) + [width if slice_head else full]
    walker = BlockWalker(model, batches, dtype=torch.promote_types(model.dtype, torch.float32))
    if walker.tokens < full:
        warnings.warn(
            f"{walker.tokens} calibration tokens cannot determine {full} principal axes: give more text", stacklevel=2
        )
    if architecture.centred:
        walker.update(lambda stream, _: stream - stream.mean(-1, keepdim=True), "the embeddings")
    sliced = _empty_like(model, widths)
    writer = _Writer(sliced, architecture)
    basis = choose(walker.second_moment(), widths[0])
    writer.embeddings(model, basis[:, : widths[0]])
    signal = 0
    for index, layer in enumerate(layers):
        fused = fused_layer(layer, architecture, full, walker.streams[0].dtype)
        for sub in architecture.sublayers:
            kept = basis[:, : widths[signal]]
            walker.update(_sliced_step(fused, sub, kept), f"the {sub.kind} of layer {index}")
            signal += 1
            basis = choose(walker.second_moment(), widths[signal])
            writer.sublayer(index, fused, sub, kept, basis[:, : widths[signal]])
        if progress is not None:
            progress(index + 1, len(layers), "layers sliced")
    writer.head(model, basis[:, : widths[-1]])
    writer.finish()
    return sliced


def _sliced_step(layer: nn.Module, sub: SubLayer, kept: Tensor) -> Callable[[Tensor, Any], Tensor]:
    """H -> H K K^T + branch(H K K^T), with K the kept columns of the basis."""
    norm = layer.get_submodule(sub.norm)
    projector = (kept @ kept.T).to(next(layer.parameters()).dtype)

    def step(stream: Tensor, context: Any) -> Tensor:
        stream = stream @ projector
        return stream + sub.branch(layer, norm(stream), context)

    return step


class _Writer:
    """Writes the parameters of the sliced model, each exactly once. Products are taken in float64."""

    def __init__(self, sliced: nn.Module, architecture: Architecture) -> None:
        self.architecture = architecture
        self.skips = {s.kind: s.skip for s in architecture_of(sliced).sublayers}
        self.missing = dict(sliced.named_parameters())

    @torch.no_grad()
    def put(self, name: str, value: Tensor) -> None:
        target = self.missing.pop(name)
        if target.shape != value.shape:
            raise RuntimeError(f"{name} has shape {tuple(target.shape)}, its sliced weight {tuple(value.shape)}")
        target.copy_(value)

    def linear(self, name: str, weight: Tensor, bias: Tensor | None) -> None:
        """A linear module; where the sliced model has a bias and the source none, it is zero."""
        self.put(f"{name}.weight", weight)
        if f"{name}.bias" in self.missing:
            self.put(f"{name}.bias", weight.new_zeros(len(weight)) if bias is None else bias)
        elif bias is not None:
            raise RuntimeError(f"{name} of the sliced model has no place for a bias")

    def embeddings(self, model: nn.Module, kept: Tensor) -> None:
        for name in self.architecture.embeddings:
            table = model.get_submodule(name).weight.double()
            if self.architecture.centred:
                table = table - table.mean(-1, keepdim=True)
            self.put(f"{name}.weight", table @ kept)

    def sublayer(self, index: int, fused: nn.Module, sub: SubLayer, kept: Tensor, following: Tensor) -> None:
        """Readers W K, writer K'^T W, shortcut K^T K' (K' are the kept columns of the next basis)."""
        prefix = f"{self.architecture.layers}.{index}"
        for name in sub.readers:
            reader = fused.get_submodule(name)
            self.linear(f"{prefix}.{name}", reader.weight.double() @ kept, reader.bias)
        writer = fused.get_submodule(sub.writer)
        bias = None if writer.bias is None else following.T @ writer.bias.double()
        self.linear(f"{prefix}.{sub.writer}", following.T @ writer.weight.double(), bias)
        self.put(f"{prefix}.{self.skips[sub.kind]}.weight", following.T @ kept)  # layout (out, in)

    def head(self, model: nn.Module, kept: Tensor) -> None:
        norm = model.get_submodule(self.architecture.final_norm)
        weight, bias = fused_head(model.get_submodule(self.architecture.head), norm)
        self.linear(self.architecture.head, weight @ kept, bias)

    def finish(self) -> None:
        if self.missing:
            raise RuntimeError(f"parameters of the sliced model were not written: {sorted(self.missing)}")


def _empty_like(model: PreTrainedModel, widths: list[int]) -> Any:
    """The sliced model with unset parameters, on the source's device and in its dtype."""
    source = model.config
    slicing = {"original_hidden_size": source.hidden_size, "widths": widths, "source": asdict(model_size(model))}
    opt = source.model_type == "opt"
    kind: type = SlicedOPTForCausalLM if opt else SlicedLlamaForCausalLM
    with torch.device("meta"):
        sliced = kind(_opt_config(source, slicing) if opt else _llama_config(model, slicing))
    sliced = sliced.to(model.dtype).to_empty(device=model.device)
    if not opt:  # its buffers are computed, not stored; computed anew, they are those of the reloaded model
        sliced.model.rotary_emb = type(sliced.model.rotary_emb)(config=sliced.config).to(model.device)
    sliced.generation_config = copy.deepcopy(model.generation_config)
    sliced.set_attn_implementation(source._attn_implementation)
    return sliced.train(model.training)


def _shared_fields(source: Any, target: type, without: set[str]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(target)} - without - {"transformers_version", "architectures"}
    return {n: getattr(source, n) for n in names if hasattr(source, n)}


def _opt_config(source: Any, slicing: dict[str, Any]) -> SlicedOPTConfig:
    """OPT's config; readers always have a bias, as they take up the norms' shifts."""
    fields = _shared_fields(source, SlicedOPTConfig, {"enable_bias", "tie_word_embeddings"})
    return SlicedOPTConfig(**fields, enable_bias=True, tie_word_embeddings=False, slicing=slicing)


def _llama_config(model: PreTrainedModel, slicing: dict[str, Any]) -> SlicedLlamaConfig:
    """Llama's config for any model of its class; Qwen2 differs by biases that its config does not mention."""
    first = model.model.layers[0]
    return SlicedLlamaConfig(
        **_shared_fields(model.config, SlicedLlamaConfig, {"attention_bias", "mlp_bias", "tie_word_embeddings", "head_dim"}),
        attention_bias=first.self_attn.q_proj.bias is not None,
        mlp_bias=first.mlp.up_proj.bias is not None,
        head_dim=first.self_attn.head_dim,
        tie_word_embeddings=False,
        slicing=slicing,
    )


def recipe_step(
    state: RecipeState,
    *,
    sparsity: float = 0.25,
    round_to: int = 32,
    orientation: str = "random",
    slice_head: bool = False,
    calibration_blocks: int = 32,
    length: int = 256,
) -> dict[str, float | int | str]:
    """Slice the recipe's model on blocks of its training text."""
    config = SliceGPTConfig(sparsity, round_to, orientation, slice_head, state.seed)
    calibration = state.train_blocks(length)[:calibration_blocks]
    state.model, report = compress(state.model, config, calibration, progress=state.progress)  # type: ignore[arg-type]
    return {**report.figures(), "width_before": report.original_width, "width_after": report.widths[0]}
