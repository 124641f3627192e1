"""QLoRA (Dettmers et al., NeurIPS 2023, arXiv 2305.14314): adapters on a base held in 4-bit NormalFloat.

Every linear layer of the blocks keeps its frozen weight as 4-bit codes with doubly quantised scales (`grainwise.compress.nf4`)
and multiplies by it through `grainwise.kernels.nf4_matmul`; gradients pass through to the input and reach LoRA matrices in
full precision. On disk the base has the layout of bitsandbytes, so that either side reads the other's file.

Departures: the code book is the one of the authors' code, not the paper's midpoint formula; the fused bf16 product rounds
levels, not weights (see the kernels); `PagedOptimizer` pages by explicit buckets instead of the driver's unified memory, so
that it works without CUDA.

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=NF4Config())
    model = get_peft_model(model, LoraConfig(r=64, lora_alpha=16, target_modules="all-linear"))

The rest of the paper's recipe: `grainwise.data.CompletionCollator` (loss on the response only), `Trainer` with
`train_sampling_strategy="group_by_length"`, a constant rate of 2e-4 after 3% warm-up and gradients clipped at 0.3, and
`prepare_training` and `ensure_pad_token` below. Its evaluation: `grainwise.evaluate.answer_letters` and `.pairwise_judge`.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grainwise.compress import nf4
from grainwise.compress.paged_optimizer import PagedOptimizer
from grainwise.compress.quantizer import (
    LinearQuantConfig,
    QuantizedLinear,
    dequantize_model,
    quantization_method,
    quantize_model,
)
from grainwise.kernels import nf4_matmul
from grainwise.naming import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from grainwise.recipe_state import RecipeState

__all__ = [
    "NF4Config", "NF4Linear", "PagedOptimizer", "bits_per_param", "dequantize_model", "ensure_pad_token",
    "prepare_training", "quantize_model", "relabel_folder",
]  # fmt: skip

METHOD = "grainwise_4bit"
COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FP16_WARNING = "float16 compute is unstable: about one in five 7B runs failed in the authors' notes. Prefer bfloat16"


class NF4Linear(QuantizedLinear):
    """y = x W^T + b with W in 4-bit blocks. x: (..., in) of any float type; y has x's type, computed in `compute_dtype`.

    weight: uint8 (ceil(out * in / 2), 1). W gets no gradient, x an ordinary one; W is decoded again in the backward pass.
    """

    PARTS = (
        "absmax", "nested_absmax", "quant_map", "nested_quant_map",
        *(f"quant_state.bitsandbytes__{kind}" for kind in nf4.FORMATS),
    )  # fmt: skip
    CONSTANTS = ("levels", "absmax", "nested_absmax", "nested_map", "offset")

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, *, config: NF4Config, device: Any = None
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.kind, self.block, self.double = config.bits, config.block, config.double_quant
        self.compute_dtype = COMPUTE[config.compute_dtype]
        self.stored_dtype = torch.float32
        size = -(-in_features * out_features // 2)
        self.weight = nn.Parameter(torch.empty(size, 1, dtype=torch.uint8, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, device=device), requires_grad=False) if bias else None
        for name in self.CONSTANTS:
            self.register_buffer(name, None)

    @classmethod
    def empty(cls, linear: nn.Linear, config: NF4Config) -> NF4Linear:
        layer = cls(linear.in_features, linear.out_features, config=config, device=linear.weight.device)
        layer.bias = linear.bias
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: NF4Config | None = None, name: str = "the weight") -> NF4Linear:
        """Quantise an ordinary linear layer. Raises TypeError or ValueError for weights that cannot be (see `nf4.check`)."""
        layer = cls.empty(linear, config or NF4Config())
        layer.fill(linear.weight.data, name)
        return layer.train(linear.training)

    def fill(self, weight: Tensor, name: str = "the weight") -> None:
        if weight.is_meta:
            raise ValueError(f"{name} has no data (it is on the meta device): load the weights first")
        self.stored_dtype = weight.dtype
        self._take(nf4.quantize(weight, self.kind, block=self.block, double=self.double, name=name))

    def fill_stored(self, packed: Tensor, parts: Mapping[str, Tensor]) -> None:
        matrix, kind, dtype = nf4.from_state(packed, parts)
        if matrix.shape != (self.out_features, self.in_features):
            raise ValueError(f"the stored matrix is {matrix.shape}, this layer needs {(self.out_features, self.in_features)}")
        self.kind, self.block, self.double, self.stored_dtype = kind, matrix.block, matrix.nested, dtype
        self._take(matrix)

    def _take(self, matrix: nf4.BlockMatrix) -> None:
        self.weight = nn.Parameter(matrix.packed, requires_grad=False)
        device = matrix.packed.device
        self.absmax, self.nested_absmax, self.offset = matrix.absmax, matrix.nested_absmax, matrix.offset
        self.levels = _shared(matrix.levels, nf4.levels(self.kind).to(device))
        self.nested_map = None if matrix.nested_map is None else _shared(matrix.nested_map, nf4.dynamic_map().to(device))

    @property
    def matrix(self) -> nf4.BlockMatrix:
        """The weight as the kernels read it. Raises ValueError while the layer is empty."""
        held = self._buffers  # not the attributes: this runs at every product
        if held["absmax"] is None:
            raise ValueError("this 4-bit layer holds no weights yet: load a checkpoint or use from_linear")
        return nf4.BlockMatrix(
            self._parameters["weight"], held["levels"], held["absmax"], (self.out_features, self.in_features), self.block,
            held["nested_absmax"], held["nested_map"], held["offset"],
        )  # fmt: skip

    def stored_tensors(self) -> dict[str, Tensor]:
        if self.absmax is None:
            return {}
        tensors = nf4.state_tensors(self.matrix, self.kind, self.stored_dtype)
        return {key: value.clone() if value is self.levels else value for key, value in tensors.items()}

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out, in) in `dtype`, by default the compute type."""
        return nf4_matmul.dequantize(self.matrix, dtype or self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"the input has {x.shape[-1]} features, this layer takes {self.in_features}")
        cast = x.to(self.compute_dtype)
        tracked = cast.requires_grad and torch.is_grad_enabled()
        y = _Multiply.apply(cast, self.matrix) if tracked else nf4_matmul.matmul(cast, self.matrix)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        scales = "double" if self.double else "float32"
        return f"in={self.in_features}, out={self.out_features}, {self.kind}, block={self.block}, scales={scales}"


def _shared(found: Tensor, standard: Tensor) -> Tensor:
    """One tensor for all layers where the table in a file is the standard one; otherwise the file's."""
    return standard if torch.equal(found, standard) else found


class _Multiply(torch.autograd.Function):
    """x W^T that keeps nothing but the packed weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: nf4.BlockMatrix) -> Tensor:
        ctx.matrix = matrix
        return nf4_matmul.matmul(x, matrix)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:
        return (nf4_matmul.matmul_transposed(dy, ctx.matrix) if ctx.needs_input_grad[0] else None), None


@quantization_method(METHOD)
class NF4Config(LinearQuantConfig):
    """4-bit blocks for the linear layers of a model.

    bits: "nf4", "fp4" or "int4". double_quant: 8-bit scales. block: weights per scale, a power of two from 32 to 4096.
    compute_dtype: type of the products, "bfloat16", "float32" or "float16" (or the torch type).
    Raises ValueError for a value outside these.
    """

    layer = NF4Linear

    def __init__(
        self,
        bits: str = "nf4",
        *,
        double_quant: bool = True,
        block: int = 64,
        compute_dtype: str | torch.dtype = "bfloat16",
        **options: Any,
    ) -> None:
        if bits not in nf4.FORMATS:
            raise ValueError(f"unknown 4-bit format {bits!r}. {did_you_mean(str(bits), nf4.FORMATS)}")
        if block not in nf4.BLOCKS:
            raise ValueError(f"block must be a power of two from 32 to 4096, got {block}")
        name = str(compute_dtype).removeprefix("torch.")
        if name not in COMPUTE:
            raise ValueError(f"compute_dtype must be one of {', '.join(COMPUTE)}, got {compute_dtype!r}")
        if name == "float16":
            warnings.warn(FP16_WARNING, stacklevel=2)
        self.bits, self.double_quant, self.block, self.compute_dtype = bits, double_quant, block, name
        super().__init__(**options)


def nf4_layers(model: nn.Module) -> list[tuple[str, NF4Linear]]:
    """(name, layer) of the 4-bit layers. Raises ValueError if there is none."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, NF4Linear)]
    if not found:
        raise ValueError("the model has no 4-bit layer: quantise it first (quantize_model, or NF4Config on loading)")
    return found


def bits_per_param(model: nn.Module) -> float:
    """Measured bits per weight over the 4-bit layers of a model: 4.127 with double quantisation and block 64, 4.5 without."""
    matrices = [layer.matrix for _, layer in nf4_layers(model)]
    return sum(nf4.bits_per_weight(m) * m.numel for m in matrices) / sum(m.numel for m in matrices)


def prepare_training(model: PreTrainedModel, *, gradient_checkpointing: bool = True) -> PreTrainedModel:
    """Freeze the base, keep norms in float32, and (by default) trade time for memory by gradient checkpointing.

    The output head keeps its type; what the float32 norm before it gives is cast to that.
    """
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and not name.endswith("bias"):
            parameter.data = parameter.data.float()
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda module, args: (args[0].to(module.weight.dtype), *args[1:]))
    if gradient_checkpointing:
        model.config.use_cache = False
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def ensure_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token: str = "<|pad|>") -> int:
    """Give a tokenizer without a padding token one, grow the embeddings, and set the new rows to the mean of the old ones.

    Returns the number of new rows (0 if there was a padding token).
    """
    if tokenizer.pad_token is not None:
        return 0
    tokenizer.add_special_tokens({"pad_token": token})
    before = model.get_input_embeddings().weight.shape[0]
    new = max(0, len(tokenizer) - before)
    if new:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            if embedding is not None:
                rows = embedding.weight.data
                rows[before:] = rows[:before].mean(dim=0, keepdim=True)
    model.config.pad_token_id = tokenizer.pad_token_id
    return new


def relabel_folder(folder: str | Path, owner: str) -> None:
    """Rewrite `quantization_config` in a saved folder's config.json so that `owner` ("bitsandbytes" or "grainwise") loads it.

    The weight files stay as they are: both sides use one layout. Raises ValueError for an unknown owner, for a folder of
    another method, and for int4, which bitsandbytes does not have.
    """
    file = Path(folder) / "config.json"
    whole = json.loads(file.read_text())
    old = whole.get("quantization_config") or {}
    if old.get("quant_method") == METHOD:
        config = NF4Config(**old)
    elif old.get("quant_method") == "bitsandbytes" and old.get("load_in_4bit"):
        config = NF4Config(
            old["bnb_4bit_quant_type"],
            double_quant=old["bnb_4bit_use_double_quant"],
            compute_dtype=old["bnb_4bit_compute_dtype"],
            skip=old.get("llm_int8_skip_modules"),
        )
    else:
        raise ValueError(f"{file} describes no 4-bit model (quant_method = {old.get('quant_method')!r})")
    if owner == "grainwise":
        whole["quantization_config"] = config.to_dict()
    elif owner == "bitsandbytes" and config.bits != "int4":
        whole["quantization_config"] = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": config.bits,
            "bnb_4bit_use_double_quant": config.double_quant,
            "bnb_4bit_compute_dtype": config.compute_dtype,
            "llm_int8_skip_modules": config.skip,
        }
    else:
        raise ValueError(f"owner must be bitsandbytes (not for int4) or grainwise, got {owner!r} for {config.bits}")
    temporary = file.with_suffix(".partial")
    temporary.write_text(json.dumps(whole, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, file)


def recipe_step(
    state: RecipeState, *, bits: str = "nf4", double_quant: bool = True, block: int = 64, compute_dtype: str = "bfloat16"
) -> dict[str, float | int | str]:
    """Hold the linear layers of `state.model` in 4 bits, in place; the head and the embeddings stay as they are."""
    before = _bytes(state.model)
    config = NF4Config(bits, double_quant=double_quant, block=block, compute_dtype=compute_dtype)
    state.model = quantize_model(state.model, config, progress=state.progress)
    return {
        "bytes_before": before,
        "bytes_after": _bytes(state.model),
        "bits_per_parameter": round(bits_per_param(state.model), 4),
        "layers": len(nf4_layers(state.model)),
        "kernel": nf4_matmul.kernel_in_use(nf4_layers(state.model)[0][1].matrix),
    }


def _bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, shared storage counted once."""
    tensors = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())
