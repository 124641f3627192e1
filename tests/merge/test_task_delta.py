"""Task vectors: exact, lazy, bounded in memory, and clear about wrong input."""

from __future__ import annotations

import gc
import json
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from grainwise.merge import tensor_store
from grainwise.merge.compeft import TernaryDelta, compress_to_file
from grainwise.merge.selection import select, survey
from grainwise.merge.task_delta import TaskDelta

Make = Callable[..., dict[str, Tensor]]


def flat(tensors: dict[str, Tensor]) -> Tensor:
    """The flattened update in sorted order of names."""
    return torch.cat([tensors[k].float().flatten() for k in sorted(tensors)])


def added(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: a[k] + b[k] for k in a}


def test_difference_and_back(update: Make) -> None:
    base, change = update(0), update(1)
    tuned = added(base, change)
    delta = TaskDelta.between(tuned, base)
    assert list(delta.layout) == sorted(base)
    for key, got in delta.items():
        assert torch.equal(got, tuned[key] - base[key])
    for applied in (delta.apply(), delta.apply(base)):
        for key in base:
            torch.testing.assert_close(applied[key], tuned[key])


@given(st.integers(0, 10_000), st.sampled_from([0.001, 0.05, 0.29, 0.5, 1.0]), st.booleans())
@settings(max_examples=30, deadline=None)
def test_selection_is_the_global_top_k_with_ties_by_position(seed: int, density: float, coarse: bool) -> None:
    """A stable sort by falling magnitude is the oracle; coarse values make the threshold cut through ties."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 70, (4,), generator=generator).tolist()
    tensors = {f"t{i}": torch.randn(n, generator=generator) * 10.0 ** (i - 2) for i, n in enumerate(sizes)}
    if coarse:
        tensors = {k: t.sign() * (t.abs() * 2).ceil().clamp(max=2) * (torch.arange(len(t)) % 3 > 0) for k, t in tensors.items()}
    values = flat(tensors).numpy()
    delta = TaskDelta.of(tensors, "zero")
    selection = select(delta, density)
    count = int(np.floor(density * values.size))
    order = np.argsort(-np.abs(values), kind="stable")[:count]
    expected = np.zeros_like(values)
    expected[order] = values[order]
    assert np.array_equal(flat(delta.sparsify(density).to_dense()).numpy(), expected)
    assert selection.count == count
    assert selection.nonzeros == np.count_nonzero(expected)
    if count:
        assert selection.mean == pytest.approx(np.abs(values[order]).astype(np.float64).mean(), rel=1e-12)


def test_top_k_is_global_and_may_empty_a_tensor() -> None:
    tensors = {"large": torch.randn(500, generator=torch.Generator().manual_seed(0)) + 3, "tiny": torch.full((500,), 1e-6)}
    kept = TaskDelta.of(tensors, "zero").sparsify(0.3).to_dense()
    assert not kept["tiny"].any()
    assert kept["large"].count_nonzero() == 300


def test_sigma_is_that_of_the_dense_update(update: Make) -> None:
    tensors = update(3)
    seen = survey(TaskDelta.of(tensors, "zero"))
    assert seen.sigma == pytest.approx(float(flat(tensors).double().std()), rel=1e-9)
    assert seen.norm == pytest.approx(float(flat(tensors).double().norm()), rel=1e-9)
    shifted = {k: t * 1e-3 + 1.0 for k, t in tensors.items()}
    assert survey(TaskDelta.of(shifted, "zero")).sigma == pytest.approx(float(flat(shifted).double().std()), rel=1e-7)


def test_keeping_everything_is_the_identity(update: Make) -> None:
    tensors = update(4)
    kept = TaskDelta.of(tensors, "zero").sparsify(1.0)
    assert all(torch.equal(t, tensors[k]) for k, t in kept.items())
    doubled = kept.scaled(2.0).apply()
    assert all(torch.equal(t, 2 * tensors[k]) for k, t in doubled.items())


def test_files_folders_and_shards_read_alike(update: Make, tmp_path: Path) -> None:
    base, tuned = update(0), added(update(0), update(1))
    save_file(tuned, tmp_path / "one.safetensors")
    folder = tmp_path / "sharded"
    folder.mkdir()
    keys = sorted(base)
    save_file({k: base[k] for k in keys[:2]}, folder / "model-1.safetensors")
    save_file({k: base[k] for k in keys[2:]}, folder / "model-2.safetensors")
    weight_map = {k: f"model-{1 if k in keys[:2] else 2}.safetensors" for k in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    delta = TaskDelta.between(tmp_path / "one.safetensors", folder)
    for key, got in delta.items():
        assert torch.equal(got, tuned[key] - base[key])
    delta.apply_to_file(tmp_path / "applied.safetensors", folder)
    applied = load_file(tmp_path / "applied.safetensors")
    for key in base:
        torch.testing.assert_close(applied[key], tuned[key])
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"shards that are not there: model-2"):
        TaskDelta.between(tuned, folder)


def test_a_saved_model_and_its_state_dict_are_the_same_base(llama: Callable, tmp_path: Path) -> None:
    """Tied weights count once, and a checkpoint has one fingerprint in memory, on disk, and in bf16 read as float32."""
    model = llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    on_disk = tensor_store.open_store(tmp_path)
    in_memory = tensor_store.open_store(model.state_dict())
    assert set(on_disk.infos) == set(in_memory.infos)
    assert in_memory.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert tensor_store.fingerprint(on_disk) == tensor_store.fingerprint(in_memory)
    assert tensor_store.fingerprint(tensor_store.open_store(model.float().state_dict())) == tensor_store.fingerprint(on_disk)


def test_a_full_update_loads_into_the_model(llama: Callable, tmp_path: Path) -> None:
    base, tuned = llama(0), llama(1)
    applied = TaskDelta.between(tuned.state_dict(), base.state_dict()).apply(base.state_dict())
    model = llama(2)
    model.load_state_dict(applied)  # strict: tied names are there as well
    for a, b in zip(model.parameters(), tuned.parameters()):
        torch.testing.assert_close(a, b)


def test_save_and_load(update: Make, tmp_path: Path) -> None:
    base, tuned = update(0), added(update(0), update(1))
    delta = TaskDelta.between({**tuned, "head": torch.ones(3)}, base, keep=["head"])
    delta.save(tmp_path / "delta.safetensors")
    loaded = TaskDelta.load(tmp_path / "delta.safetensors")
    assert loaded.base == delta.base
    assert all(torch.equal(t, delta.read(k)) for k, t in loaded.items())
    applied = loaded.apply(base)
    assert torch.equal(applied["head"], torch.ones(3))
    assert torch.equal(applied["a"], delta.apply(base)["a"])
    with pytest.raises(ValueError, match="pass them as `base`"):
        loaded.apply()
    with pytest.raises(ValueError, match="is not the base"):
        loaded.apply(update(7))
    save_file(tuned, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match=r"not written by TaskDelta\.save"):
        TaskDelta.load(tmp_path / "plain.safetensors")


def test_streamed_writing_is_readable_and_aligned(tmp_path: Path) -> None:
    tensors = {"odd": torch.arange(3, dtype=torch.uint8), "half": torch.randn(5).half(), "wide": torch.randn(2, 3)}
    tensors["é"] = torch.ones(())
    entries = [tensor_store.Entry.of(k, t) for k, t in tensors.items()]
    stream = tensor_store.Entry(
        "stream", tensor_store.TensorInfo((tensor_store.UNKNOWN_LENGTH,), torch.uint8), lambda: iter([b"ab", b"", b"cde"])
    )
    tensor_store.write_safetensors(tmp_path / "f", [*entries, stream], {"note": "x"})
    read = load_file(tmp_path / "f")
    assert bytes(read.pop("stream").numpy()) == b"abcde"
    assert all(torch.equal(read[k], t) for k, t in tensors.items())
    assert tensor_store.read_metadata(tmp_path / "f") == {"note": "x"}
    broken = tensor_store.Entry("x", tensor_store.TensorInfo((4,), torch.float32), lambda: [b"123"])
    with pytest.raises(ValueError, match="gave 3 bytes"):
        tensor_store.write_safetensors(tmp_path / "g", [broken], {})
    assert not list(tmp_path.glob("g*"))


class Counting:
    """Watches what a file store hands out: how often each tensor is read, and the most bytes alive at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reads: dict[str, set[int]] = {}  # file -> how often its tensors were read
        counts: dict[tuple[str, str], int] = {}
        self.alive = self.peak = 0
        plain = tensor_store.FileStore.read

        def read(store: tensor_store.FileStore, key: str) -> Tensor:
            tensor = plain(store, key).clone()
            counts[store.path.name, key] = counts.get((store.path.name, key), 0) + 1
            self.reads = {f: {n for (g, _), n in counts.items() if f == g} for f, _ in counts}
            self.alive += tensor.nbytes
            self.peak = max(self.peak, self.alive)
            weakref.finalize(tensor, self.gone, tensor.nbytes)
            return tensor

        monkeypatch.setattr(tensor_store.FileStore, "read", read)

    def gone(self, size: int) -> None:
        self.alive -= size


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 tensors of 1 MiB are compressed, applied and merged while at most a few of them are in memory."""
    generator = torch.Generator().manual_seed(0)
    names = [f"layer.{i:02d}.weight" for i in range(8)]
    largest = 512 * 512 * 4
    for file in ("base", "tuned"):
        tensors = {n: torch.randn(512, 512, generator=generator) for n in names}
        save_file(tensors, tmp_path / file)
        del tensors
    gc.collect()
    warm = TernaryDelta.compress({"x": torch.randn(99)}, reference="zero")  # compiles the loops before memory is watched
    warm.save(tmp_path / "warm")
    TernaryDelta.load(tmp_path / "warm").to_dense()
    counting = Counting(monkeypatch)
    tracemalloc.start()
    packed = compress_to_file(tmp_path / "tuned", tmp_path / "t.tern", reference=tmp_path / "base", density=0.1)
    reads = counting.reads
    packed.apply_to_file(tmp_path / "applied", tmp_path / "base")
    TaskDelta.between(tmp_path / "tuned", tmp_path / "base").sparsify(0.2).save(tmp_path / "sparse")
    _, array_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert reads["tuned"] == {3}  # two passes to find the threshold, one to code
    assert reads["base"] == {4}  # and one for its fingerprint
    assert counting.peak <= 2 * largest  # a tensor and its reference
    assert array_peak <= 2 * largest  # masks of one tensor, tables of counts, pieces being written
    assert counting.alive == 0
    applied = load_file(tmp_path / "applied")
    base = load_file(tmp_path / "base")
    step = packed.scale.value
    values = torch.cat([(applied[n] - base[n]).flatten() for n in names])
    assert int((values.abs() > step / 2).sum()) == int(0.1 * values.numel())


def test_peft_folder_and_model_give_the_same_update(lora: Callable, tmp_path: Path) -> None:
    model: PeftModel = lora()
    model.save_pretrained(tmp_path)
    a, b = TaskDelta.of(model), TaskDelta.of(tmp_path)
    assert list(a.layout) == list(b.layout)
    assert all(torch.equal(x, b.read(k)) for k, x in a.items())
    assert a.reference == b.reference == "zero"
    assert a.adapter_config is not None
    assert b.adapter_config is not None
    assert a.adapter_config["peft_type"] == b.adapter_config["peft_type"] == "LORA"


def test_balanced_factors_have_one_size_and_the_same_product(lora: Callable) -> None:
    model: PeftModel = lora(lora_bias=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and "layers.0" in name:
            parameter.data *= 0.01
        if "lora_B" in name and "layers.1.self_attn.v_proj" in name:
            parameter.data.zero_()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        before = model(ids).logits
        plain = TaskDelta.of(model)
        balanced = plain.balanced()
        balanced.load_into(model)
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-5)
    a, b = (balanced.read(f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight") for x in "AB")
    torch.testing.assert_close(a.square().mean(), b.square().mean())
    assert plain.sparsify(0.3).read("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight").count_nonzero() == 0
    assert balanced.sparsify(0.3).read("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight").count_nonzero() > 0
    with pytest.raises(ValueError, match="relative to 'ones'"):
        TaskDelta.of({"x": torch.ones(3)}, "ones").balanced()


def test_dora_norms_and_whole_modules_are_kept_out(lora: Callable) -> None:
    model: PeftModel = lora(use_dora=True, modules_to_save=["lm_head"])
    delta = TaskDelta.of(model)
    assert all("magnitude" not in k and "lm_head" not in k for k in delta.layout)
    assert any("magnitude" in k for k in delta.kept)
    assert any("lm_head" in k for k in delta.kept)


# Bad input


def test_mismatches_list_the_names(update: Make) -> None:
    base = update(0)
    tuned = {**base, "head": torch.ones(2)}
    with pytest.raises(ValueError, match=r"only in the first: head.*`keep`"):
        TaskDelta.between(tuned, base)
    assert "head" in TaskDelta.between(tuned, base, keep=["head"]).kept
    with pytest.raises(ValueError, match="only in the second: a"):
        TaskDelta.between({k: base[k] for k in "bcd"}, base)
    with pytest.raises(ValueError, match=r"differ in shape: a \(64,\) against \(63,\)"):
        TaskDelta.between(base, {**base, "a": torch.ones(63)})
    with pytest.raises(ValueError, match="only in the first: d"):
        TaskDelta.of(base, "zero").apply({k: base[k] for k in "abc"})


def test_unknown_reference_asks_for_one(update: Make, lora: Callable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass reference='zero'"):
        TaskDelta.of(update())
    lora().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "VERA"}))
    with pytest.raises(ValueError, match=r"adapters of type VERA.*pass reference"):
        TaskDelta.of(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_name_the_tensor(update: Make, value: float) -> None:
    tensors = update()
    tensors["b"][1, 2, 3] = value
    with pytest.raises(ValueError, match=r"tensor 'b' has NaN or infinite"):
        TernaryDelta.compress(tensors, reference="zero")


def test_quantised_weights_are_refused() -> None:
    tuned = {"q.weight": torch.randn(4, 4)}
    packed = {"q.weight": torch.zeros(8, 1, dtype=torch.uint8), "q.weight.absmax": torch.ones(1)}
    with pytest.raises(ValueError, match="holds quantised weights"):
        TaskDelta.between(tuned, packed)
    with pytest.raises(ValueError, match="holds quantised weights"):
        TaskDelta.of(packed, "zero")


def test_wrong_kinds_of_source(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="got list"):
        TaskDelta.of([1, 2])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"\['a'\] is float"):
        TaskDelta.of({"a": 1.0}, "zero")  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="no such file or folder"):
        TaskDelta.of(tmp_path / "absent")
    with pytest.raises(ValueError, match="no floating-point tensor"):
        TaskDelta.of({"a": torch.arange(3)}, "zero")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="pickle files"):
        TaskDelta.of(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"not a file of this kind")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        TaskDelta.of(tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="has its reference already"):
        TernaryDelta.compress(TaskDelta.of({"a": torch.ones(2)}, "zero"), reference="ones")
