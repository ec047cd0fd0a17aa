"""The fit of loss over size in `experiments/scaling.py`."""

import numpy as np
import pytest

from experiments.scaling import fit, law


def test_the_fit_finds_the_law_that_made_the_losses():
    weights = np.geomspace(1e4, 1e7, 6)
    rows = [
        {"mixture": False, "weights": size, "loss": loss} for size, loss in zip(weights, law(weights, 5.0, 0.3, 0.4))
    ]
    rows.append({"mixture": True, "weights": 1e5, "loss": 99.0})  # dense models alone are fitted
    found = fit(rows)
    assert [found["E"], found["A"], found["alpha"]] == pytest.approx([5.0, 0.3, 0.4], rel=1e-3)
    assert law(1e5, found["E"], found["A"], found["alpha"]) == pytest.approx(5.3, rel=1e-3)
    assert found["rms"] < 1e-4
