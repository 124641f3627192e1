import numpy as np

from grainwise.evaluate.probes import knn_probe, linear_probe


def test_probes_read_separable_features():
    rng = np.random.default_rng(0)
    y = np.arange(90) % 3
    x = np.eye(3)[y] * 3 + 0.3 * rng.standard_normal((90, 3))
    assert linear_probe(x[:60], y[:60], x[60:], y[60:]) == 1.0
    assert knn_probe(x[:60], y[:60], x[60:], y[60:], k=5) == 1.0
