"""The package as a whole: quick to import, registrations in either order."""

import subprocess
import sys

import pytest

import grainwise


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_no_heavy_library():
    heavy = python(
        "import sys, grainwise\n"
        "print([m for m in ('torch', 'transformers', 'peft', 'numpy', 'datasets', 'scipy') if m in sys.modules])"
    )
    assert heavy == "[]"


@pytest.mark.parametrize("first, second", [("grainwise", "peft"), ("peft", "grainwise")])
def test_peft_knows_our_methods_in_either_order(first, second):
    found = python(
        f"import {first}\nimport {second}\nfrom peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as m\nprint('KASA' in str(m))"
    )
    assert found == "True"


@pytest.mark.parametrize("first, second", [("grainwise", "transformers"), ("transformers", "grainwise")])
def test_transformers_knows_our_extensions_in_either_order(first, second):
    found = python(
        f"import {first}\nimport {second}\n"
        "from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as q\n"
        "from grainwise.compress import quantizer\n"
        "print('hyper' in AttentionInterface().valid_keys(), 'grainwise_4bit' in q)"
    )
    assert found == "True True"


def test_wrong_names():
    with pytest.raises(AttributeError, match="no attribute 'adpat'"):
        _ = grainwise.adpat
    with pytest.raises(AttributeError, match="no built system yet"):
        _ = grainwise.segment
