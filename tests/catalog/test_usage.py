"""The usage snippet of every built system runs as it stands, in a fresh process and an empty folder."""

import os
import subprocess
import sys

import pytest

from grainwise import catalog


@pytest.mark.parametrize("card", catalog.search(state="built"), ids=lambda c: c.slug)
def test_usage_runs(card, tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", card.usage], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{card.usage}\n{done.stderr[-3000:]}"
