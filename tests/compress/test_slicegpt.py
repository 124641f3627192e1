"""SliceGPT: rotations change nothing, slicing is an exact projection, and the result is an ordinary model."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from grainwise.compress.architecture import architecture_of
from grainwise.compress.slicegpt import (
    SlicedLlamaForCausalLM,
    SliceGPTConfig,
    compress,
    recipe_step,
    recovery_config,
    register,
    rotate_model,
    slice_model,
)
from grainwise.compress.slicegpt.norm_fusion import SlicedRMSNorm, fused_layer, norm_eps
from grainwise.compress.slicegpt.rotation import oriented, principal_axes, random_rotation
from grainwise.compress.slicegpt.slicing import kept_width, slice_with_bases
from grainwise.compress.structural import calibration_batches
from grainwise.training import batches_of, train_lm

D, KEPT, VOCABULARY = 32, 24, 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MAKERS = {
    "llama": lambda **k: LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=40, num_key_value_heads=2, **k)),
    "llama with biases": lambda **k: LlamaForCausalLM(
        LlamaConfig(**SHAPE, intermediate_size=40, attention_bias=True, mlp_bias=True, head_dim=4, rms_norm_eps=1e-3, **k)
    ),
    "mistral": lambda **k: MistralForCausalLM(
        MistralConfig(**SHAPE, intermediate_size=40, num_key_value_heads=2, sliding_window=None, **k)
    ),
    "qwen2": lambda **k: Qwen2ForCausalLM(Qwen2Config(**SHAPE, intermediate_size=40, num_key_value_heads=4, **k)),
    "opt": lambda **k: OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=40, **k)),
    "opt without biases": lambda **k: OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=40, enable_bias=False, **k)),
}


def make(name: str, seed: int = 0, **config) -> torch.nn.Module:
    """A random model with norm gains, shifts and biases that are not ones and zeros."""
    torch.manual_seed(seed)
    model = MAKERS[name](**config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(6.0)
    return model


def tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


CALIBRATION, HELD_OUT = tokens(1, 8, 16), tokens(2, 2, 12)


def batches(ids: torch.Tensor = CALIBRATION):
    return calibration_batches(ids, vocabulary=VOCABULARY, longest=64)


def sliced_quietly(model, calibration=CALIBRATION, **settings):
    """Widths of tiny models are unaligned; the warning about it has a test of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return slice_model(model, calibration, **{"sparsity": 0.25, "round_to": 8} | settings)


class Recorder:
    """Chooses principal axes, and keeps the moments and bases for the tests."""

    def __init__(self) -> None:
        self.moments, self.bases = [], []

    def __call__(self, moment: torch.Tensor, width: int) -> torch.Tensor:
        self.moments.append(moment)
        self.bases.append(principal_axes(moment)[1])
        return self.bases[-1]


# 1. Fusion


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_fused_layers_compute_the_same_without_norm_parameters(name):
    model = make(name)
    architecture = architecture_of(model)
    layer = architecture.layers_of(model)[0]
    fused = fused_layer(layer, architecture, D, torch.float64)
    stream = torch.randn(3, 5, D, dtype=torch.float64) + 1.5
    centred = stream - stream.mean(-1, keepdim=True) if architecture.centred else stream
    feed_forward = architecture.sublayers[1]
    wanted = feed_forward.branch(layer, layer.get_submodule(feed_forward.norm)(stream.float()), {})
    found = feed_forward.branch(fused, fused.get_submodule(feed_forward.norm)(centred), {}).float()
    if architecture.centred:
        assert found.mean(-1).abs().max() < 1e-6  # what it writes has mean zero
        wanted = wanted - wanted.mean(-1, keepdim=True)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert not any("norm" in n for n, _ in fused.named_parameters())
    assert any("norm" in n for n, _ in layer.named_parameters())  # the source is left alone


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_fusion_alone_keeps_the_logits(name, tied):
    model = make(name, tie_word_embeddings=tied)
    fused = slice_with_bases(model, batches(), lambda moment, width: torch.eye(D, dtype=torch.float64), width=D)
    logits = model(HELD_OUT).logits
    assert logits.std() > 0.1
    torch.testing.assert_close(fused(HELD_OUT).logits, logits, atol=1e-4, rtol=1e-4)


# 2. Rotation


@pytest.mark.parametrize("name", MAKERS)
@torch.no_grad()
def test_rotation_alone_keeps_the_logits(name):
    model = make(name)
    rotated = rotate_model(model, CALIBRATION)
    torch.testing.assert_close(rotated(HELD_OUT).logits, model(HELD_OUT).logits, atol=1e-4, rtol=1e-4)
    shortcut = rotated.get_submodule(architecture_of(rotated).layers)[0].attn_shortcut.weight
    assert (shortcut - torch.eye(D)).abs().max() > 0.1  # it did rotate


@torch.no_grad()
def test_rotation_in_double_precision_is_exact_to_1e_9():
    model = make("opt").double()  # LayerNorm works in float64; Llama's own norm rounds to float32
    torch.testing.assert_close(rotate_model(model, CALIBRATION)(HELD_OUT).logits, model(HELD_OUT).logits, atol=1e-9, rtol=0)


# 2b. The oracle: slicing is a projection of the stream at every norm input


@torch.no_grad()
def projected_logits(model, ids, projectors):
    """The source model with its stream projected before every sub-layer, branch and skip path alike."""
    architecture = architecture_of(model)
    layers, inputs = architecture.layers_of(model), []
    handle = layers[0].register_forward_pre_hook(lambda m, a, k: inputs.append((a[0], k)), with_kwargs=True)
    model(ids, use_cache=False)
    handle.remove()
    stream, context = inputs[0]
    pairs = [(layer, sub) for layer in layers for sub in architecture.sublayers]

    def projected(stream, projector):
        return (stream - stream.mean(-1, keepdim=True) if architecture.centred else stream) @ projector

    for (layer, sub), projector in zip(pairs, projectors):
        stream = projected(stream, projector)
        stream = stream + sub.branch(layer, layer.get_submodule(sub.norm)(stream), context)
    final = projected(stream, projectors[-1]) if len(projectors) > len(pairs) else stream
    return model.lm_head(model.get_submodule(architecture.final_norm)(final))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("slice_head", [False, True])
@torch.no_grad()
def test_sliced_model_is_the_projected_source(name, slice_head):
    model, recorder = make(name), Recorder()
    sliced = slice_with_bases(model, batches(), recorder, width=KEPT, slice_head=slice_head)
    projectors = [(q[:, :KEPT] @ q[:, :KEPT].T).float() for q in recorder.bases]
    wanted = projected_logits(model, HELD_OUT, projectors if slice_head else projectors[:-1])
    found = sliced(HELD_OUT).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (found - model(HELD_OUT).logits).abs().max() > 1e-2  # and it did lose something


# 3., 5., 6. Bases


@torch.no_grad()
def test_bases_are_orthogonal_and_sorted():
    recorder = Recorder()
    slice_with_bases(make("llama"), batches(), recorder, width=KEPT)
    assert len(recorder.bases) == 5
    for moment, basis in zip(recorder.moments, recorder.bases):
        assert (basis.T @ basis - torch.eye(D, dtype=torch.float64)).abs().max() < 1e-10
        values = principal_axes(moment)[0]
        assert (values.diff() <= 0).all()
        torch.testing.assert_close(basis.T @ moment @ basis, values.diag(), atol=1e-8, rtol=1e-8)


@given(seed=st.integers(0, 10_000), width=st.integers(1, 7))
@settings(max_examples=20, deadline=None)
def test_principal_axes_keep_the_most_energy(seed, width):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(20, 8, dtype=torch.float64, generator=generator) @ torch.randn(
        8, 8, dtype=torch.float64, generator=generator
    )
    values, axes = principal_axes(rows.T @ rows)

    def error(basis):
        kept = basis[:, :width]
        return (rows - rows @ kept @ kept.T).square().sum()

    torch.testing.assert_close(error(axes), values[width:].sum(), atol=1e-8, rtol=1e-8)
    mixed = oriented(axes, width, "random", generator)
    torch.testing.assert_close(error(mixed), error(axes), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(mixed.T @ mixed, torch.eye(8, dtype=torch.float64), atol=1e-10, rtol=0)
    assert error(random_rotation(8, generator)) >= error(axes) - 1e-9


@torch.no_grad()
def test_orientations_are_the_same_function():
    model = make("llama")
    one, other = (sliced_quietly(model, orientation=o) for o in ("random", "pca"))
    torch.testing.assert_close(one(HELD_OUT).logits, other(HELD_OUT).logits, atol=1e-4, rtol=1e-4)
    spread = [m.model.embed_tokens.weight.square().mean(0) for m in (one, other)]
    assert spread[0].std() < 0.5 * spread[1].std()  # random orientation evens the energy out
    again = sliced_quietly(model, orientation="random")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters()))
    reseeded = sliced_quietly(model, orientation="random", seed=1)
    assert not torch.equal(one.lm_head.weight, reseeded.lm_head.weight)


# 4. Low-rank oracle


@pytest.mark.parametrize("name", ["llama", "opt"])
@torch.no_grad()
def test_slicing_a_stream_of_low_rank_is_lossless(name):
    model = make(name, tie_word_embeddings=False)
    architecture = architecture_of(model)
    basis = random_rotation(D, torch.Generator().manual_seed(3))[:, : KEPT - 2]  # centring may add a dimension
    projector = (basis @ basis.T).float()
    for table in architecture.embeddings:
        weight = model.get_submodule(table).weight
        weight.copy_(weight @ projector)
    for layer in architecture.layers_of(model):
        for sub in architecture.sublayers:
            writer = layer.get_submodule(sub.writer)
            writer.weight.copy_(projector @ writer.weight)
            if writer.bias is not None:
                writer.bias.copy_(projector @ writer.bias)
    sliced = sliced_quietly(model, slice_head=True)
    assert sliced.slicing_report().widths == (KEPT,) * 5
    torch.testing.assert_close(sliced(HELD_OUT).logits, model(HELD_OUT).logits, atol=1e-4, rtol=1e-4)


def test_interleaving_sees_the_sliced_signals():
    """The second basis must come from the stream of the sliced first sub-layer, not from the dense model's."""
    model, sliced, dense = make("llama"), Recorder(), Recorder()
    slice_with_bases(model, batches(), sliced, width=KEPT)
    slice_with_bases(model, batches(), dense, width=D)
    torch.testing.assert_close(sliced.moments[0], dense.moments[0])
    assert (sliced.moments[2] - dense.moments[2]).abs().max() > 1e-2 * dense.moments[2].abs().max()


def test_norm_divides_by_the_original_width():
    stream = torch.randn(4, 6)
    wide = torch.cat([stream, torch.zeros(4, 2)], -1)
    norm = SlicedRMSNorm(8, 1e-5)
    torch.testing.assert_close(norm(stream), norm(wide)[:, :6])
    torch.testing.assert_close(norm(wide), torch.nn.functional.rms_norm(wide, (8,), eps=1e-5))
    assert norm_eps(torch.nn.LayerNorm(8, eps=1e-3)) == 1e-3
    assert norm(stream.bfloat16()).dtype == torch.bfloat16


# 7. Sizes


@pytest.mark.filterwarnings("ignore:the sliced width")
@torch.no_grad()
def test_parameters_are_the_formula_and_no_width_is_left():
    model = make("llama", tie_word_embeddings=False)
    sliced, report = compress(model, SliceGPTConfig(sparsity=0.25, round_to=8), CALIBRATION)
    inner, layers, heads, keys = 40, 2, D, D // 2
    block = KEPT * (2 * heads + 2 * keys) + 3 * KEPT * inner + 2 * KEPT * KEPT
    last = (D - KEPT) * (KEPT + inner)  # the last feed-forward writes the full width
    assert report.after.parameters == layers * block + last + VOCABULARY * (KEPT + D)
    assert report.after.flops_per_token == 2 * (layers * block + last + VOCABULARY * D)
    assert report.before.parameters == sum(p.numel() for p in model.parameters())
    assert report.widths == (KEPT,) * 4 + (D,)
    inside = ("self_attn", "lm_head", "layers.1.mlp.down_proj", "layers.1.mlp_shortcut")
    assert not [n for n, p in sliced.named_parameters() if D in p.shape and not any(i in n for i in inside)]


@pytest.mark.parametrize(
    "sparsity, round_to, width", [(0.0, 32, 1000), (0.25, 32, 736), (0.3, 10, 700), (0.3, 1, 700), (0.2, 64, 768)]
)
@pytest.mark.filterwarnings("ignore:the sliced width")
def test_kept_width_rounds_down(sparsity, round_to, width):
    assert kept_width(LlamaConfig(hidden_size=1000, num_attention_heads=10), sparsity, round_to) == width


def test_unaligned_widths_and_too_little_text_warn():
    with pytest.warns(UserWarning, match=r"width 24 is no multiple of 32.*round_to=32"):
        slice_model(make("llama"), CALIBRATION, sparsity=0.25, round_to=8)
    with pytest.warns(UserWarning, match="5 calibration tokens cannot determine 32 principal axes"):
        rotate_model(make("llama"), tokens(1, 1, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept_width(LlamaConfig(hidden_size=256, num_attention_heads=4), 0.25, 32)


# 8. Padding, saving, generating


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_padding_does_not_move_the_bases(name, side):
    model, alone, together = make(name), Recorder(), Recorder()
    rows = [tokens(n, n) for n in (9, 14, 20, 20)]
    slice_with_bases(model, [b for r in rows for b in batches(r[None])], alone, width=KEPT)
    ids, mask = torch.full((4, 20), 7), torch.zeros(4, 20, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(20 - len(row), None) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    slice_with_bases(model, [{"input_ids": ids, "attention_mask": mask}], together, width=KEPT)
    for one, other in zip(alone.moments, together.moments):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_saves_reloads_and_generates(name, dtype, tmp_path):
    register()
    register()
    sliced = sliced_quietly(make(name).to(dtype))
    sliced.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert AutoConfig.from_pretrained(tmp_path).slicing["widths"] == [KEPT] * 4 + [D]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(sliced)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(loaded(HELD_OUT).logits, sliced(HELD_OUT).logits)
    assert loaded.slicing_report() == sliced.slicing_report()
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    if dtype == torch.float32:
        cached = loaded.generate(HELD_OUT, **settings)
        assert torch.equal(cached, sliced.generate(HELD_OUT, use_cache=False, **settings))
    states = loaded(HELD_OUT, output_hidden_states=True).hidden_states
    assert [s.shape[-1] for s in states] == [KEPT, KEPT, D]


@torch.no_grad()
def test_bfloat16_stays_close_to_the_source():
    model = make("llama")
    sliced = rotate_model(model.to(torch.bfloat16), CALIBRATION)
    exact = model.float()(HELD_OUT).logits
    assert (sliced(HELD_OUT).logits - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_source_is_left_alone_and_modes_are_kept():
    model = make("opt").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sliced = sliced_quietly(model)
    assert sliced.training
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    sliced.gradient_checkpointing_enable()
    loss = sliced(input_ids=HELD_OUT, labels=HELD_OUT, use_cache=False).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in sliced.parameters())


# Recovery, recipe


def test_recovery_with_lora(tmp_path):
    from peft import PeftModel, get_peft_model

    blocks = tokens(4, 1, 16).repeat(8, 1)
    sliced = sliced_quietly(make("llama"))
    sliced.save_pretrained(tmp_path / "sliced")
    tuned = get_peft_model(sliced, recovery_config(sliced, r=4))
    names = {n.split(".lora_A")[0].rpartition(".")[2] for n, _ in tuned.named_parameters() if "lora_A" in n}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    record = train_lm(tuned, batches_of(blocks, 4, 30, seed=0), steps=30, lr=1e-2)
    assert record.losses[-1] < 0.8 * record.losses[0]
    tuned.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "sliced"), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(HELD_OUT).logits, tuned(HELD_OUT).logits)
    merged = again.merge_and_unload()
    assert isinstance(merged, SlicedLlamaForCausalLM)
    assert recovery_config(sliced_quietly(make("opt"))).target_modules >= {"out_proj", "fc1", "fc2"}


def test_recipe_step_slices_the_state(tmp_path):
    from grainwise.recipe_state import RecipeState

    state = RecipeState(make("llama"), None, None, None, seed=3, folder=tmp_path)
    state.train_blocks = lambda length: tokens(5, 40, length)
    done = []
    state.progress = lambda *step: done.append(step[:2])
    with pytest.warns(UserWarning, match="no multiple"):
        figures = recipe_step(state, sparsity=0.25, round_to=8, calibration_blocks=4, length=16)
    assert isinstance(state.model, SlicedLlamaForCausalLM)
    assert done == [(1, 2), (2, 2)]
    assert (figures["width_before"], figures["width_after"]) == (D, KEPT)
    assert figures["parameters_after"] == sum(p.numel() for p in state.model.parameters())
    assert 0.5 < figures["flops_ratio"] < 1.0


def test_card_declares_the_options_of_the_step():
    import inspect
    import tomllib
    from importlib.resources import files

    card = tomllib.loads((files("grainwise.catalog") / "compress.toml").read_text())["slicegpt"]["step"]
    options = {n: p.default for n, p in inspect.signature(recipe_step).parameters.items() if n != "state"}
    assert card["kind"] == "compress"
    assert {n: o["default"] for n, o in card["options"].items()} == options


# Bad input


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sparsity": 1.0}, "sparsity must be"),
        ({"sparsity": -0.1}, "sparsity must be"),
        ({"sparsity": float("nan")}, "sparsity must be"),
        ({"round_to": 0}, "round_to must be"),
        ({"orientation": "randon"}, "Did you mean 'random'"),
        ({"sparsity": 0.25, "round_to": 32}, "leaves 0 of 32 coordinates"),
        ({"sparsity": 0.9, "round_to": 1}, "fewer than the 8 of one attention head"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        slice_model(make("llama"), CALIBRATION, **settings)


def test_models_it_cannot_slice_are_refused_by_name():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match="no architecture map for model type 'gpt2'"):
        slice_model(gpt2, CALIBRATION)
    with pytest.raises(ValueError, match=r"opt-350m.*word_embed_proj_dim 16"):
        slice_model(MAKERS["opt"](word_embed_proj_dim=16), CALIBRATION)
    with pytest.raises(ValueError, match="do_layer_norm_before=False"):
        slice_model(MAKERS["opt"](do_layer_norm_before=False), CALIBRATION)
    with pytest.raises(ValueError, match="already sliced"):
        slice_model(sliced_quietly(make("llama")), CALIBRATION)
    windowed = MistralForCausalLM(MistralConfig(**SHAPE, intermediate_size=40, sliding_window=8))
    with pytest.raises(ValueError, match="sliding window of 8 tokens"):
        slice_model(windowed, CALIBRATION)
    with pytest.raises(ValueError, match="needs calibration data"):
        rotate_model(make("llama"), None)
    flash = make("llama")
    flash.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        rotate_model(flash, CALIBRATION)


def test_a_sliced_config_without_widths_is_refused():
    from grainwise.compress.slicegpt import SlicedLlamaConfig

    with pytest.raises(ValueError, match=r"`slicing` with 5 widths.*slice_model"):
        SlicedLlamaForCausalLM(SlicedLlamaConfig(**SHAPE, intermediate_size=40))


@torch.no_grad()
def test_activations_that_are_not_finite_name_the_layer():
    model = make("llama")
    model.model.layers[1].self_attn.o_proj.weight[0, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="after the attention of layer 1"):
        sliced_quietly(model)
