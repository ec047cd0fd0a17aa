"""Event features: no training starts with what would become a wrong category in silence; in which unit times are."""

import datasets
import numpy as np
import pytest

from onerec_hf.data import EventFeature, SessionConfig, check_event_features, load_interactions, session_splits
from onerec_hf.data.time_units import time_unit

TODAY = 1_700_000_000  # seconds
OFF = {"watched": None, "interactions": {}, "min_watched": 0, "min_watch_time_ms": 0, "min_interactions": 0}


def test_fractions_are_no_categories():
    feature = EventFeature("category", 9)
    with pytest.raises(
        ValueError, match=r"'rating' of kind 'category' takes whole numbers, got 4.5, .* category of 4"
    ):
        feature.check([4.0, 4.5], "rating")
    assert feature.encode([4.0, -0.5, np.nan, np.inf]).tolist() == [5, 0, 0, 8]
    assert EventFeature("log", 9).encode([0.5]).tolist() == EventFeature("gap", 9).encode([0.5, 1]).tolist()[1:] == [1]


@pytest.mark.parametrize(("size", "unit"), [(1, "seconds"), (1_000_000, "microseconds"), (10**9, "nanoseconds")])
def test_the_hour_needs_milliseconds(size, unit):
    times = (TODAY + np.arange(3) * 3600) * size
    with pytest.raises(ValueError, match=rf"kind 'hour' takes milliseconds since 1970, got {times[-1]}, .* in {unit}"):
        EventFeature("hour", 25).check(times)
    with pytest.raises(ValueError, match=rf"'t' of kind 'hour' takes milliseconds since 1970, got {times[-1]}"):
        EventFeature("hour", 25).check([-1, np.nan, np.inf, 0, *times.tolist()], "t")  # unknown ones
    hours = (times // size * 1000).tolist()
    assert EventFeature("hour", 25).encode(hours).tolist() == [23, 24, 1]


def test_models_of_earlier_versions_encode_what_no_training_takes(caplog):
    for _ in range(2):
        assert EventFeature("category", 9).encode([4.0, 4.5, np.nan], "half_stars").tolist() == [5, 5, 0]
        assert EventFeature("hour", 25).encode([TODAY, TODAY + 3_600_000], "seconds").tolist() == [17, 18]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all("refused when a training starts" in message for message in said)
    assert "'half_stars' of kind 'category' got fractions, which are rounded down" in said[0]
    assert "'seconds' of kind 'hour' got times that are no milliseconds since 1970" in said[1]
    with pytest.raises(ValueError, match="'half_stars' of kind 'category' takes numbers"):
        EventFeature("category", 9).encode(["a"], "half_stars")


def test_units_of_times():
    for unit, size in {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}.items():
        assert time_unit(np.array([TODAY * size, 0, -1, np.nan, np.inf])) == unit
    for times in ([], [0, 1, 2], [5, TODAY], [TODAY, TODAY * 1000], [86_400_000, 1_000_000]):
        assert time_unit(np.array(times)) is None


def test_a_split_is_checked_before_training():
    rows = datasets.Dataset.from_dict({"history": [[0, 1], [1]], "rating": [[1, 2], [3]], "t": [[1, 2], [TODAY]]})
    features = {"rating": EventFeature("category", 9), "t": EventFeature("gap", 9), "absent": EventFeature("hour", 9)}
    check_event_features(features, rows)
    for column in ("rating", "target_rating", "lifelong_rating"):
        wrong = rows.remove_columns("rating").add_column(column, [[1.0, 2.0], [2.5]])
        with pytest.raises(ValueError, match=f"'{column}' of kind 'category' takes whole numbers, got 2.5"):
            check_event_features(features, wrong)
    with pytest.raises(ValueError, match="event feature 'rating' of kind 'log' takes numbers"):
        text = rows.remove_columns("rating").add_column("rating", [["a", "b"], ["c"]])
        check_event_features({"rating": EventFeature("log", 9)}, text)


@pytest.mark.parametrize(
    ("size", "max_gap", "said"),
    [
        (1, 1_800_000, "max_gap=1.8e+06 is 1.8e+06 seconds, as the timestamps are seconds: it is in the unit of the"),
        (1000, 1800, "max_gap=1800 is 1.8 seconds, as the timestamps are milliseconds"),
        (10**6, 1_800_000, "max_gap=1.8e+06 is 1.8 seconds, as the timestamps are microseconds"),
        (1, 1800, None),
        (1000, 1_800_000, None),
        (1000, 0, None),  # every event is a session
    ],
)
def test_a_gap_in_another_unit_than_the_times_is_said(size, max_gap, said, caplog):
    times = TODAY + np.arange(0, 90_000_000, 10_000_000)
    log = {"user_id": [1] * 9, "item_id": range(9), "timestamp": times * size}
    session_splits(load_interactions(log), SessionConfig(max_gap=max_gap, **OFF))
    warned = [record.getMessage() for record in caplog.records if "max_gap" in record.getMessage()]
    assert len(warned) == (said is not None) and all(said in message for message in warned)
