"""How well frozen features tell classes apart: a linear classifier, and the nearest neighbours."""

from __future__ import annotations

import numpy as np


def linear_probe(train: np.ndarray, train_y: np.ndarray, test: np.ndarray, test_y: np.ndarray) -> float:
    """Test accuracy of logistic regression on standardised features (rows, width)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
    return float(model.fit(train, train_y).score(test, test_y))


def knn_probe(train: np.ndarray, train_y: np.ndarray, test: np.ndarray, test_y: np.ndarray, *, k: int = 20) -> float:
    """Test accuracy of the k nearest neighbours by cosine, each weighted by its closeness."""
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(min(k, len(train)), metric="cosine", weights="distance").fit(train, train_y)
    return float(model.score(test, test_y))
