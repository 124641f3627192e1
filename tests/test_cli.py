"""The command, through its real entry point."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("grainwise")


def grainwise(*arguments, status=0, cwd=None):
    done = subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if status == 0 else done.stderr


def test_help_names_the_commands():
    text = grainwise("--help")
    for name in ("run", "systems", "prove", "bench", "zoo"):
        assert name in text


def test_light_commands_load_no_torch():
    for arguments in (["--help"], ["systems"], ["systems", "kasa"]):
        code = (
            f"import sys; sys.argv = ['grainwise', *{arguments!r}]\nfrom grainwise.cli import main\n"
            "try:\n    main()\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0, arguments


def test_systems_as_json():
    found = json.loads(grainwise("systems", "--json"))
    assert len(found) == 100
    assert set(found[0]) == {"slug", "name", "title", "room", "extension_point", "state", "claim", "proof"}
    built = json.loads(grainwise("systems", "--state", "built", "--json"))
    assert {"kasa", "compeft", "qlora", "slicegpt", "kmq", "aded", "hyperattention"} <= {c["slug"] for c in built}
    assert all(c["proof"] is None or c["proof"]["system"] == c["slug"] for c in built)
    assert sum(c["proof"] is not None for c in built) >= 5


def test_systems_for_people():
    assert "4 systems" in grainwise("systems", "--room", "decode")
    card = grainwise("systems", "kasa")
    assert "arXiv 2412.06071" in card
    assert "recipe step: adapt" in card
    assert "import" in card.split("recipe step")[1]
    assert "usage, once built" in grainwise("systems", "medusa")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["systems", "slicgpt"], "'slicegpt'"),
        (["systems", "--room", "adpat"], "'adapt'"),
        (["prove", "kassa"], "'kasa'"),
        (["prove", "medusa"], "no proof for 'medusa'"),
        (["prove"], "name a system"),
        (["zoo", "train", "llama-maxi"], "'llama-mini'"),
        (["zoo", "check", "llama-maxi"], "'llama-mini'"),
        (["run", "no.yaml"], "cannot read the recipe no.yaml"),
    ],
)
def test_errors_are_one_clear_line(arguments, message, tmp_path):
    text = grainwise(*arguments, status=1, cwd=tmp_path)
    assert message in text
    assert text.startswith("error:")
    assert len(text.strip().splitlines()) == 1


def test_prove_smoke_prints_one_json_object():
    result = json.loads(grainwise("prove", "qlora", "--smoke", "--seeds", "1", "--json"))
    assert {"system", "claim", "per_seed", "holds", "code", "versions", "device", "margin"} <= set(result)
    assert result["smoke"] is True


def test_prove_stale_lists_slug_and_reason():
    lines = grainwise("prove", "--stale").splitlines()
    assert all(line.endswith(": no recorded result") for line in lines), lines


def test_dry_run_plans_and_writes_nothing(tmp_path):
    text = grainwise("run", "--dry-run", cwd=tmp_path)
    assert "plan of embedded" in text
    assert "in all about" in text
    assert not list(tmp_path.iterdir())
    recipes = Path(__file__).parents[1] / "recipes"
    for recipe in sorted(recipes.glob("*.yaml")):
        if "shared/" not in recipe.read_text():
            assert "in all about" in grainwise("run", recipe, "--dry-run", cwd=tmp_path)


def test_bench_without_benchmarks_says_where_they_are(tmp_path):
    assert "no benchmark for 'kazza'" in grainwise("bench", "kazza", status=1, cwd=tmp_path)


def test_zoo_list():
    text = grainwise("zoo", "list")
    assert "zoo/llama-mini: " in text
    assert "bits_per_byte" in text
