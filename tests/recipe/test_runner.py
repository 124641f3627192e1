"""Recipes end to end on the smallest model: outputs that others load, resume after a kill, nothing lost on a full disk."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from grainwise.recipe import parse
from grainwise.recipe.runner import run_recipe

RECIPE = """
model: zoo/llama-nano
data: {train: pydoc, test: pydoc, train_limit: 40, test_limit: 20}
steps:
  - select:   {system: kmq, fraction: 0.5, k: 4}
  - compress: {system: qlora}
  - adapt:    {system: kasa, r: 2, steps: 6, batch_size: 2, length: 64}
  - merge:    {system: compeft, density: 0.5, alpha: 1.0}
  - decode:   {system: aded, max_new_tokens: 16}
measure_tokens: 512
measure_length: 64
seed: 3
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return out, run_recipe(parse(RECIPE), out)


def test_metrics(finished):
    out, metrics = finished
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert [s["system"] for s in metrics["steps"]] == ["kmq", "qlora", "kasa", "compeft", "aded"]
    for step in metrics["steps"]:
        assert {"name", "system", "seconds", "before", "after"} <= set(step)
        assert {"perplexity", "bytes", "peak_memory", "tokens_per_second"} <= set(step["after"])
    select, compress, adapt = metrics["steps"][:3]
    assert select["after"]["train_text"] < 0.8 * select["before"]["train_text"]
    assert compress["after"]["bytes"] < compress["before"]["bytes"]
    assert adapt["after"]["perplexity"] != adapt["before"]["perplexity"]
    assert metrics["environment"]["versions"]["torch"] == torch.__version__


def test_the_report_is_self_contained(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.count("<svg") >= 3
    assert "http://" not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "https://" not in page
    for step in finished[1]["steps"]:
        assert step["name"] in page


def test_outputs_load_with_plain_libraries(finished):
    code = (
        "import grainwise, torch, sys, json\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from peft import PeftModel, PeftConfig\n"
        "adapter = sys.argv[1] + '/adapter'\n"
        "base = PeftConfig.from_pretrained(adapter).base_model_name_or_path\n"
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)\n"
        "ids = AutoTokenizer.from_pretrained(base)('Return the', return_tensors='pt').input_ids\n"
        "print(bool(torch.isfinite(model(ids).logits).all()), type(model.get_base_model()).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(finished[0])], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "LlamaForCausalLM"], done.stderr


def test_running_again_does_nothing(finished):
    out, metrics = finished
    before = (out / "report.html").stat().st_mtime_ns
    assert run_recipe(parse(RECIPE), out) == metrics
    assert (out / "report.html").stat().st_mtime_ns == before


def test_another_recipe_does_not_overwrite(finished, tmp_path):
    with pytest.raises(ValueError, match="another recipe"):
        run_recipe(parse(RECIPE.replace("r: 2", "r: 3")), finished[0])
    (tmp_path / "letter.txt").write_text("keep me")
    with pytest.raises(ValueError, match="is not empty and holds no recipe run"):
        run_recipe(parse(RECIPE), tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "keep me"


def start(folder: Path, *, preexec=None) -> subprocess.Popen:
    (folder / "r.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "grainwise.cli", "run", "r.yaml", "--out", "out"]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=preexec)


def test_a_killed_run_goes_on_where_it_was(finished, tmp_path):
    """Killed in the middle of a step: finished steps are kept, the half-written one is not read, results are the same."""
    process = start(tmp_path)
    steps = tmp_path / "out" / "steps"
    deadline = time.monotonic() + 300
    while not list(steps.glob("03-*.partial")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    partial = list(steps.glob("*.partial"))
    assert [p.name for p in partial] == ["03-adapt-kasa.partial"]
    (partial[0] / "adapter").mkdir(exist_ok=True)
    (partial[0] / "adapter" / "adapter_config.json").write_text("{ half")
    kept = {f: f.stat().st_mtime_ns for f in steps.glob("0[12]-*/step.json")}
    assert len(kept) == 2

    metrics = run_recipe(parse(RECIPE, name="r"), tmp_path / "out")
    assert {f: f.stat().st_mtime_ns for f in kept} == kept
    assert not list((tmp_path / "out").rglob("*.partial"))
    for ours, whole in zip(metrics["steps"], finished[1]["steps"], strict=True):
        assert ours["after"]["perplexity"] == pytest.approx(whole["after"]["perplexity"], rel=1e-3)
        assert ours["after"]["bytes"] == whole["after"]["bytes"]


def test_a_full_disk_is_reported_and_loses_nothing(finished, tmp_path):
    """No file may grow beyond 100 kB: saving the model fails; the steps before it stay, and the run can go on later."""
    process = start(tmp_path, preexec=lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
                                               resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))))  # fmt: skip
    errors = process.communicate()[1]
    assert process.returncode == 1, errors
    assert "error:" in errors
    assert "Traceback" not in errors
    steps = tmp_path / "out" / "steps"
    assert (steps / "01-select-kmq" / "step.json").is_file()
    assert not (steps / "02-compress-qlora").exists()
    assert not (tmp_path / "out" / "metrics.json").exists()
    assert len(run_recipe(parse(RECIPE, name="r"), tmp_path / "out")["steps"]) == 5


def test_too_little_data_is_an_error(tmp_path):
    (tmp_path / "few.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(40)))
    text = RECIPE.replace(
        "train: pydoc, test: pydoc, train_limit: 40, test_limit: 20", f"train: {tmp_path}/few.jsonl, test: pydoc"
    )
    with pytest.raises(ValueError, match="fewer than|too few|more text"):
        run_recipe(parse(text), tmp_path / "out")


def test_a_corrupt_model_is_named(tmp_path):
    from grainwise import zoo

    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(zoo.path("llama-nano")).iterdir():
        (folder / file.name).write_bytes(file.read_bytes()[: 2000 if file.suffix == ".safetensors" else None])
    (tmp_path / "r.yaml").write_text(RECIPE.replace("zoo/llama-nano", str(folder)))
    command = [sys.executable, "-m", "grainwise.cli", "run", "r.yaml", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "model" in done.stderr
