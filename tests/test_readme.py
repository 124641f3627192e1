"""What the README shows works as it stands."""

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from grainwise.recipe import embedded, parse

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)


def of(language):
    return [body for kind, body in BLOCKS if kind == language]


@pytest.mark.parametrize("code", of("python"))
def test_python_runs(code, tmp_path):
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_recipe_is_the_embedded_one():
    (text,) = of("yaml")
    assert parse(text).fingerprint == embedded().fingerprint


def test_commands_exist():
    lines = [shlex.split(line.split("#")[0]) for body in of("bash") for line in body.splitlines() if line.strip()]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for words in lines:
        if words[0] == "make":
            assert words[1] in targets
        else:
            assert words[0] == "grainwise"
            named = itertools.takewhile(lambda word: not word.startswith("--"), words[1:])  # the command and its arguments
            command = [str(Path(sys.executable).with_name("grainwise")), *named, "--help"]
            help_text = subprocess.run(command, capture_output=True, text=True).stdout
            for option in (w for w in words if w.startswith("--")):
                assert option in help_text


def test_linked_files_are_there():
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXT):
        assert (ROOT / target).exists(), target
