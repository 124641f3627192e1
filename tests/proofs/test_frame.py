"""Proofs: the verdict is computed, records are whole, and every proof runs in its smoke form."""

import json
import math

import pytest

from grainwise import catalog
from grainwise.proofs import frame
from grainwise.proofs.frame import Proof


def proof(**changes):
    fields = {
        "system": "kasa",
        "claim": "c",
        "substrate": "s",
        "baseline": "b",
        "metric": "m",
        "higher_is_better": True,
        "margin": 0.1,
        "modules": ("grainwise.naming",),
        "run": lambda seed, smoke: {"baseline": 1.0, "ours": 2.0},
    }
    return Proof(**(fields | changes))


def rows(*pairs):
    return [{"seed": i, "baseline": b, "ours": o} for i, (b, o) in enumerate(pairs)]


@pytest.mark.parametrize(
    "pairs, higher, holds",
    [
        ([(1, 1.2), (1, 1.2)], True, True),
        ([(1, 1.2), (1, 1.2)], False, False),
        ([(1, 0.8), (1, 0.8)], False, True),
        ([(1, 2.0), (1, 0.99)], True, False),  # one seed with the wrong sign
        ([(1, 1.05), (1, 1.05)], True, False),  # below the margin
        ([(-2, -1), (-2, -1)], True, True),
    ],
)
def test_verdict(pairs, higher, holds):
    assert proof(higher_is_better=higher).verdict(rows(*pairs))["holds"] is holds


def test_conditions_count():
    good = rows((1, 2))
    assert proof(conditions=lambda r: {"x": True}).verdict(good)["holds"]
    found = proof(conditions=lambda r: {"x": r[0]["ours"] > 5}).verdict(good)
    assert found["conditions"] == {"x": False}
    assert not found["holds"]


def test_a_figure_that_is_not_finite_is_an_error():
    with pytest.raises(FloatingPointError, match="ours is nan at seed 1"):
        proof().verdict(rows((1, 2), (1, math.nan)))


def test_record_round_trip_and_staleness(monkeypatch, tmp_path):
    monkeypatch.setattr(frame, "RESULTS", tmp_path)
    result = {"system": "kasa", "smoke": False, "code": "0"}
    file = frame.record(result)
    assert frame.recorded("kasa") == result
    assert json.loads(file.read_text()) == result
    assert list(tmp_path.iterdir()) == [file]
    assert frame.stale(["kasa"]) == {"kasa": "code has changed since the recorded result"}
    frame.record(result | {"code": frame.get("kasa").code_hash()})
    assert frame.stale(["kasa"]) == {}
    assert frame.stale(["slicegpt", "medusa"]) == {"slicegpt": "no recorded result", "medusa": "no proof"}
    with pytest.raises(ValueError, match="smoke result is no proof"):
        frame.record(result | {"smoke": True})


def test_hash_follows_the_source(monkeypatch, tmp_path):
    (tmp_path / "one_module_here.py").write_text("a = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    first = frame.source_hash(["one_module_here"])
    (tmp_path / "one_module_here.py").write_text("a = 2\n")
    assert frame.source_hash(["one_module_here"]) != first
    (tmp_path / "one_module_here.py").write_text('"""Words\n\nand more words."""\n\n# a remark\na = 1\n')
    assert frame.source_hash(["one_module_here"]) == first
    with pytest.raises(ValueError, match="no module"):
        frame.source_hash(["no_such_module_here"])


def test_wrong_calls():
    with pytest.raises(ValueError, match="Did you mean 'kasa'"):
        frame.run("kassa")
    with pytest.raises(ValueError, match="at least 1"):
        frame.run("kasa", seeds=0)


def test_every_built_system_has_a_proof_and_no_record_is_older_than_its_code():
    reasons = frame.stale(c.slug for c in catalog.search(state="built"))
    assert set(reasons.values()) <= {"no recorded result"}, reasons  # a missing record shows in `prove --stale`


@pytest.mark.parametrize("slug", frame.available())
def test_smoke(slug):
    result = frame.run(slug, seeds=1, first_seed=7, smoke=True)
    assert result["system"] == slug
    assert math.isfinite(result["ours_mean"])
    assert isinstance(result["holds"], bool)
    json.dumps(result)


@pytest.mark.parametrize("slug", [s for s in frame.available() if frame.recorded(s) is not None])
def test_recorded_results_follow_from_their_rows(slug):
    result = frame.recorded(slug)
    assert len(result["per_seed"]) >= 3
    verdict = frame.get(slug).verdict(result["per_seed"])
    assert verdict["holds"] == result["holds"]
    assert verdict["ours_mean"] == pytest.approx(result["ours_mean"])
