"""Vision recipes end to end on a tiny random CLIP: figures, report, outputs that others load, resuming, folders of pictures."""

import base64
import importlib
import inspect
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from grainwise.recipe import parse
from grainwise.recipe.runner import run_recipe
from grainwise.world import World
from grainwise.zoo.vision.contrastive import build, caption_tokenizer
from grainwise.zoo.vision.saving import image_processor, save_folder
from grainwise.zoo.vision.specs import VisionSpec

RECIPE = """
task: vision
model: {model}
data:
  world: {{seed: 7, genera: 3, species_per_genus: 3}}
  shots: 3
  test: 3
  outliers: 12
steps:
  - recognize: {{system: gda, views: 2}}
  - recognize: {{system: glsim, epochs: 1, batch_size: 12}}
  - recognize: {{system: mixoe, epochs: 1, batch_size: 12}}
  - explain:   {{system: smdl, pictures: 2, grid: 3, per_region: 2}}
seed: 1
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a random CLIPModel of one layer, its processor and its tokenizer."""
    from transformers import CLIPProcessor

    folder = tmp_path_factory.mktemp("zoo") / "clip"
    tokenizer = caption_tokenizer(World(seed=1, genera=4, species_per_genus=2))
    clip = build(VisionSpec("tiny", pictures=0, hidden_size=64, layers=1), len(tokenizer))
    save_folder(clip, folder, CLIPProcessor(image_processor("CLIPImageProcessor"), tokenizer))
    return folder


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return out, run_recipe(parse(RECIPE.format(model=model)), out)


def test_metrics(finished):
    out, metrics = finished
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert [s["system"] for s in metrics["steps"]] == ["gda", "glsim", "mixoe", "smdl"]
    for step in metrics["steps"]:
        after = step["after"]
        assert set(after) == {"accuracy", "ood_near", "ood_far", "images_per_second", "bytes", "peak_memory"}
        assert all(0 <= after[name] <= 1 for name in ("accuracy", "ood_near", "ood_far"))
    gda, glsim, _, smdl = metrics["steps"]
    assert glsim["after"]["bytes"] != gda["after"]["bytes"]
    assert {k: v for k, v in smdl["after"].items() if k != "peak_memory"} == {
        k: v for k, v in smdl["before"].items() if k != "peak_memory"
    }
    assert 0 < glsim["figures"]["crop_share_of_picture"] <= 1
    assert smdl["figures"]["regions"] == 5


def test_figures_come_from_the_kept_answers(finished):
    from sklearn.metrics import roc_auc_score

    out, metrics = finished
    answers = load_file(out / "steps" / "03-recognize-mixoe" / "answers.safetensors")
    after = metrics["steps"][2]["after"]
    classes, test = answers["test"].shape[1], 3
    truth = torch.arange(classes).repeat_interleave(test)  # test pictures are in the order of the classes
    assert after["accuracy"] == pytest.approx(float((answers["test"].argmax(1) == truth).float().mean()), abs=1e-4)
    sure = {name: logits.double().softmax(1).amax(1).numpy() for name, logits in answers.items()}
    known = np.r_[np.ones(len(sure["test"])), np.zeros(len(sure["far"]))]
    assert after["ood_far"] == pytest.approx(roc_auc_score(known, np.r_[sure["test"], sure["far"]]), abs=1e-4)


def test_the_report_is_one_page_of_pictures(finished):
    page = (finished[0] / "report.html").read_text()
    assert len(page) < 3e6
    assert "https://" not in page
    assert "http://" not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    for title in ("The task", "What the steps change", "Which mistakes are left", "What GLSim looks at", "Known or unknown?"):
        assert f"<h2>{title}</h2>" in page
    sources = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    assert len(sources) >= 20
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source))).verify()


def test_the_classifier_loads_with_plain_libraries(finished):
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    out = finished[0]
    loaded = AutoModelForImageClassification.from_pretrained(out / "model")
    assert type(loaded).__name__ == "GLSimForImageClassification"
    pixels = AutoImageProcessor.from_pretrained(out / "model")(np.zeros((64, 64, 3), np.uint8), return_tensors="pt")
    assert loaded.eval()(**pixels).logits.shape == (1, len(loaded.config.id2label))
    assert all(" " in name for name in loaded.config.id2label.values())  # species have two names


def test_an_interrupted_run_loses_nothing_and_ends_the_same(model, finished, tmp_path, monkeypatch):
    from grainwise.recognize import mixoe

    def interrupted(state, **options):
        (state.folder / "classifier").mkdir()
        (state.folder / "classifier" / "config.json").write_text("{ half")
        raise KeyboardInterrupt

    plan, out = parse(RECIPE.format(model=model)), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(mixoe, "recipe_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(plan, out)
    kept = {f: f.stat().st_mtime_ns for f in (out / "steps").glob("*/step.json")}
    assert [f.parent.name for f in sorted(kept)] == ["01-recognize-gda", "02-recognize-glsim"]
    metrics = run_recipe(plan, out)
    assert {f: f.stat().st_mtime_ns for f in kept} == kept
    assert not list(out.rglob("*.partial"))
    for ours, whole in zip(metrics["steps"], finished[1]["steps"], strict=True):
        for name in ("accuracy", "ood_near", "ood_far", "bytes"):
            assert ours["after"][name] == pytest.approx(whole["after"][name], abs=1e-4)


def write_folder(root, world, species, first):
    """Some pictures of the species as `<root>/<name>/<number>.png`, 70 pixels wide and 60 high."""
    for index in species:
        folder = root / world.species[index].name.replace(" ", "_")
        folder.mkdir(parents=True)
        drawn = world.draw(np.full(3, index), first + np.arange(3), size=60).images
        for number, image in enumerate(drawn):
            Image.fromarray(np.pad(image, ((0, 0), (5, 5), (0, 0)))).save(folder / f"{number}.png")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, world = tmp_path_factory.mktemp("pictures"), World(seed=3, genera=3, species_per_genus=2)
    write_folder(root / "train", world, [0, 1, 2], 0)
    write_folder(root / "test", world, [0, 2], 100)
    write_folder(root / "far", world, [4, 5], 0)
    return root


FOLDERS = """
task: vision
model: {model}
data: {{train: {root}/train, test: {root}/test, far: {root}/far{more}}}
steps:
  - {steps}
measure: [accuracy, ood_far, bytes]
"""


def test_folders_of_pictures(model, folders, tmp_path):
    text = FOLDERS.format(model=model, root=folders, more="", steps="recognize: {system: gda, views: 2}")
    metrics = run_recipe(parse(text), tmp_path / "out")
    assert set(metrics["steps"][0]["after"]) == {"accuracy", "ood_far", "bytes"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "a sibling instead" not in page  # folders say nothing of families
    assert "6 pictures of quite other things" in page


def test_pictures_that_do_not_fit_are_refused(model, folders, tmp_path):
    swapped = FOLDERS.format(model=model, root=folders, more="", steps="recognize: {system: gda}")
    swapped = swapped.replace(f"train: {folders}/train, test: {folders}/test", f"train: {folders}/test, test: {folders}/train")
    with pytest.raises(ValueError, match=r"data.test has classes that data.train lacks: \w+"):
        run_recipe(parse(swapped), tmp_path / "a")
    same = FOLDERS.format(model=model, root=folders, more=f", outliers: {folders}/far", steps="recognize: {system: mixoe}")
    with pytest.raises(ValueError, match="outlier 0 is image 0 of the OOD test set"):
        run_recipe(parse(same), tmp_path / "b")
    (tmp_path / "train" / "one").mkdir(parents=True)
    (tmp_path / "train" / "one" / "broken.png").write_bytes(b"not a picture")
    broken = FOLDERS.format(model=model, root=folders, more="", steps="recognize: {system: gda}")
    with pytest.raises(ValueError, match="one class|broken.png"):
        run_recipe(
            parse(
                broken.replace(f"{folders}/train", str(tmp_path / "train")).replace(f"{folders}/test", str(tmp_path / "train"))
            ),
            tmp_path / "c",
        )


def test_a_corrupt_model_is_named(model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes()[: 2000 if file.suffix == ".safetensors" else None])
    with pytest.raises(ValueError, match="the weights of the model in .* cannot be read"):
        run_recipe(parse(RECIPE.format(model=folder)), tmp_path / "out")


def test_the_plan_is_estimated(model, monkeypatch):
    from grainwise.recipe.plan import estimate

    monkeypatch.setattr("grainwise.recipe.plan.measured_flops", lambda **_: 1e9)
    text = RECIPE.format(model=model)
    estimates = estimate(parse(text))
    assert [e.name for e in estimates] == ["recognize-gda", "recognize-glsim", "recognize-mixoe", "explain-smdl"]
    assert all(e.seconds > 0 and 1e8 < e.memory < 4e9 and e.why for e in estimates)
    longer = estimate(parse(text.replace("glsim, epochs: 1", "glsim, epochs: 100")))
    assert longer[1].seconds > estimates[1].seconds
    assert longer[2].seconds == estimates[2].seconds


def test_the_recipe_of_the_repository_is_valid(model):
    from pathlib import Path

    text = (Path(__file__).parents[2] / "recipes" / "vision.yaml").read_text()
    plan = parse(text.replace("zoo/clip-mini", str(model)))
    assert [step.kind for step in plan.steps].count("explain") == 1
    assert {"gda", "glsim", "mixoe", "smdl"} == {step.card.slug for step in plan.steps}


def test_support_needs_more_pictures_than_are_kept_aside(model, tmp_path):
    text = RECIPE.format(model=model).split("steps:")[0] + "steps:\n  - recognize: {system: caps_adapter, validation: "
    with pytest.raises(ValueError, match="validation=3 leaves a class without support: it has 3 training pictures"):
        run_recipe(parse(text + "3}\n"), tmp_path / "a")
    metrics = run_recipe(parse(text + "1}\n"), tmp_path / "b")
    assert metrics["steps"][0]["figures"]["support"] == 12
    (tmp_path / "b" / "metrics.json").unlink()
    again = run_recipe(parse(text + "1}\n"), tmp_path / "b")  # restores the adapter and writes the report anew
    assert again["steps"] == metrics["steps"]


@pytest.mark.parametrize("slug", ["gda", "caps_adapter", "glsim", "mixoe", "smdl"])
def test_cards_offer_what_the_steps_take(slug):
    from grainwise.catalog import card

    step = card(slug).step
    parameters = inspect.signature(importlib.import_module(card(slug).module).recipe_step).parameters
    assert {n: p.default for n, p in parameters.items() if n != "state"} == {n: o.default for n, o in step.options.items()}
