"""SliceGPT against the dense model: prefill and single-token time, bytes, and how much aligned widths matter.

The model is `zoo/llama-mini` inflated to four times its width, so that matrix products dominate as they do in real models.
The sliced models have the shapes that `slice_model` gives and random weights: what slicing costs in quality is the proof's
business, and time does not depend on it.
"""

import copy
import dataclasses
import warnings

import torch
from torch.nn.utils import prune
from transformers import PreTrainedModel

from grainwise import zoo
from grainwise.bench import Benchmark, Setting, Timing, alternate
from grainwise.compress.architecture import architecture_of
from grainwise.compress.slicegpt.configuration import SlicedLlamaConfig
from grainwise.compress.slicegpt.modeling import SlicedLlamaForCausalLM
from grainwise.compress.slicegpt.slicing import kept_width
from grainwise.compress.structural import model_size

LEVELS = (0.20, 0.25, 0.30)
PREFILL = 512  # tokens
WIDTHS = (704, 708, 712, 720, 736, 768)  # for the products by width: multiples of 32 and others


def run(runs: int) -> Benchmark:
    small, _ = zoo.load("llama-mini")
    ids = torch.randint(0, small.config.vocab_size, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    dense = zoo.inflate(small, width=4)
    models = {f"{s:.0%}": _sliced(dense, s, 32) for s in LEVELS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the width is no multiple of 32: that is what this one shows
        models["30% unaligned"] = _sliced(dense, 0.30, 4)
    settings, spread = [], {}
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            candidates = {"dense": dense.to(dtype), "masked": _masked(dense)} | {n: m.to(dtype) for n, m in models.items()}
            for tokens, what in ((PREFILL, f"{PREFILL} tokens"), (1, "1 token")):
                times = alternate({n: _forward(m, ids[:, :tokens]) for n, m in candidates.items()}, runs=runs)
                kind = f"{str(dtype).removeprefix('torch.')}, {what}"
                settings += [_setting(f"{n}, {kind}", times, n, dense, models[n]) for n in models]
                spread |= {f"{n}, {kind}": round(t.spread, 3) for n, t in times.items()}
        products = {
            f"{str(d).removeprefix('torch.')} x {w}": _product(w, d) for d in (torch.float32, torch.bfloat16) for w in WIDTHS
        }
        alignment = {n: round(1e3 * t.median, 3) for n, t in alternate(products, runs=2 * runs).items()}
    settings[0].extra = dict(settings[0].extra) | {"ms of one product (512 x 2816) (2816 x width)": alignment}
    note = "masked: the dense model with a quarter of every matrix's rows set to zero by torch.nn.utils.prune"
    return Benchmark(system="slicegpt", unit="ms", settings=settings, runs=runs, spread=spread, note=note)


def _sliced(dense: PreTrainedModel, sparsity: float, round_to: int) -> SlicedLlamaForCausalLM:
    full, source = dense.config.hidden_size, dense.config.to_dict() | {"tie_word_embeddings": False}
    width = kept_width(dense.config, sparsity, round_to)
    widths = [width] * (2 * dense.config.num_hidden_layers) + [full]
    slicing = {"original_hidden_size": full, "widths": widths, "source": dataclasses.asdict(model_size(dense))}
    names = {field.name for field in dataclasses.fields(SlicedLlamaConfig)} - {
        "slicing",
        "transformers_version",
        "architectures",
    }
    fields = {name: value for name, value in source.items() if name in names}
    return SlicedLlamaForCausalLM(SlicedLlamaConfig(**fields, slicing=slicing)).eval()


def _setting(name: str, times: dict[str, Timing], level: str, dense: torch.nn.Module, sliced: torch.nn.Module) -> Setting:
    before, after = model_size(dense), model_size(sliced)
    return Setting(
        name=name,
        ours=1e3 * times[level].median,
        naive=1e3 * times["dense"].median,
        peers={"masked": 1e3 * times["masked"].median},
        limit={
            "what": "speed-up at equal efficiency: by products for many tokens, by weights read (as many) for one",
            "figure": round(before.flops_per_token / after.flops_per_token, 3),
        },
        extra={
            "width": sliced.slicing_report().widths[0],
            "flops_ratio": round(after.flops_per_token / before.flops_per_token, 3),
            "bytes_ratio": round(after.bytes / before.bytes, 3),
            "bytes": after.bytes,
            "dense_bytes": before.bytes,
        },
    )


def _forward(model: torch.nn.Module, ids: torch.Tensor):
    return lambda: model(ids, use_cache=False)


def _product(width: int, dtype: torch.dtype):
    left, weight = torch.randn(512, 2816, dtype=dtype), torch.randn(width, 2816, dtype=dtype)
    return lambda: torch.nn.functional.linear(left, weight)


def _masked(model: torch.nn.Module) -> torch.nn.Module:
    """What pruning by masks leaves: the same shapes, a quarter of the rows zero."""
    masked = copy.deepcopy(model)
    architecture = architecture_of(masked)
    for layer in architecture.layers_of(masked):
        for sub in architecture.sublayers:
            for name in (*sub.readers, sub.writer):
                module = layer.get_submodule(name)
                prune.ln_structured(module, "weight", amount=0.25, n=2, dim=0)
                prune.remove(module, "weight")
    return masked
