"""The dry run: an estimate for every step, from counted work."""

from grainwise.recipe import embedded, parse
from grainwise.recipe.plan import estimate, measured_flops

TEXT = """
model: zoo/llama-nano
data: {{train: pydoc, test: pydoc}}
steps:
  - adapt: {{system: kasa, steps: {steps}}}
"""


def test_every_step_has_time_and_memory():
    plan = embedded()
    estimates = estimate(plan)
    assert [e.name for e in estimates] == [s.name for s in plan.steps]
    assert all(0 < e.seconds < 600 and 1e8 < e.memory < 4e9 and e.why for e in estimates)


def test_more_steps_take_longer(monkeypatch):
    monkeypatch.setattr("grainwise.recipe.plan.measured_flops", lambda: 1e10)
    few, many = (estimate(parse(TEXT.format(steps=n)))[0].seconds for n in (10, 1000))
    assert many > few
    assert measured_flops(0.01) > 1e8
