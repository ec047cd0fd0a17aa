"""What a row of a reward model knows, by time and by user: everything before its period, and nothing after."""

import numpy as np
import pandas as pd
import pytest
from transformers.utils import logging

from onerec_hf.collators import RewardCollator
from onerec_hf.data import DataFolder
from onerec_hf.scripts import prepare
from onerec_hf.scripts.reward_arguments import RewardArguments, make_collator, period_boundaries

DAY = 100
EXPOSURES = {"max_gap": 0, "max_events": 1, "min_watched": 0, "min_watch_time_ms": 0, "min_interactions": 0}
EXPOSURES |= {"watched": None, "interactions": {}, "cut": "first", "history": "all"}


def starts(train, validation, test):
    return {"train": np.array(train), "validation": np.array(validation), "test": np.array(test)}


def arguments(data="data", **settings):
    return RewardArguments(str(data), ["is_like"], period=DAY, **settings)


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(logging.get_logger("onerec_hf.scripts.reward_arguments"), "warning", found.append)
    return found


def test_a_split_by_time_has_one_period_of_validation_and_one_of_test(warnings):
    found = period_boundaries(arguments(), starts([0, 50, 420], [460, 590], [600, 900]))
    assert found.tolist() == [100, 200, 300, 400, 460, 600]  # 400 is more than half a day before the validation
    assert not warnings
    found = period_boundaries(arguments(), starts([0, 50, 399], [440, 590], [600, 900]))
    assert found.tolist() == [100, 200, 300, 440, 600]


def test_a_split_by_user_has_periods_to_its_end(warnings):
    found = period_boundaries(arguments(), starts([0, 50, 420], [30, 390, 480], [40, 395, 510]))
    assert found.tolist() == [100, 200, 300, 400, 500]
    assert "data is split by user" in warnings[0] and "of 6 periods" in warnings[0]
    found = period_boundaries(arguments(), starts([0, 300], [310, 350], [170, 360]))  # who has no validation leaves
    assert found.tolist() == [100, 200, 300]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"period": 0}, r"period=0 cuts the log, 0 to 395, into more than 100,000 periods"),
        ({"period": 1e-3}, r"period=0.001 cuts the log, 0 to 395, into more than 100,000 periods: give the length of"),
        ({"period": 1e6, "rates": ["item"]}, r"rates=\['item'\] with period=1000000: .* nothing is past"),
    ],
)
def test_periods_of_another_unit_are_refused(settings, message):
    args = arguments()
    for name, value in settings.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=message):
        period_boundaries(args, starts([0, 50, 320], [30, 390], [40, 395]))


def test_collators_refuse_boundaries_that_are_not_in_order():
    for boundaries in ([10, 30, 20], [10, 10]):
        with pytest.raises(ValueError, match=r"boundaries=.*: each must lie after the one before it"):
            RewardCollator(np.ones((4, 2)), targets=["is_like"], session_wise=False, boundaries=boundaries)


def test_held_out_rows_know_what_was_known_when_their_period_began(tmp_path):
    """Thirty days; one user leaves on the first of them, and one with two impressions on the second."""
    rng, rows = np.random.default_rng(0), []
    for user in range(30):
        count, days = {0: (4, 1), 1: (2, 2)}.get(user, (30, 30))
        for time in np.sort(rng.choice(days * DAY, count, replace=False)):
            rows.append((user, int(rng.integers(12)), 10_000 + int(time), int(rng.integers(2))))
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "is_like"])
    log.to_parquet(tmp_path / "log.parquet")
    settings = {"collaborative_dim": 8, "codebook_size": 8, "num_levels": 2, "feedback": ["is_like"]}
    source = str(tmp_path / "log.parquet")
    prepare.main(prepare.PrepareArguments(source, str(tmp_path / "data"), sessions=EXPOSURES, **settings))
    data = DataFolder(tmp_path / "data")
    collator = make_collator(arguments(tmp_path / "data", rates=["item", "user"], warm_up=2), data, data.splits)
    train = data.splits["train"].with_format("pandas")[:]
    for name in ("validation", "test"):
        split = data.splits[name]
        batch = collator(list(split))
        for i, row in enumerate(split):
            begin = max((b for b in collator.boundaries if b <= row["session_start"]), default=-np.inf)
            known = sum(time < begin for time in row["timestamp"]) if begin > 0 else len(row["history"])
            assert batch["context_mask"][i].sum() == min(known, 30)
            assert row["session_start"] - begin < DAY or begin < 0
            count = sum(((train.user == row["user"]) & (train.session_start < begin)).tolist())
            found = batch["item_numbers"][i, 0, collator.item_number_names.index("user_count")]
            assert found == pytest.approx(np.log1p(count) / 5, abs=1e-6)
    with pytest.raises(ValueError, match=r"warm_up=2: the log has 0 boundaries .* shorter --period, .* --warm_up 0\."):
        make_collator(RewardArguments(str(tmp_path / "data"), ["is_like"], period=1e6), data, data.splits)
    read = collator(list(data.splits["test"]))["context_mask"].sum().item()
    assert read > 0.9 * sum(map(len, data.splits["test"]["history"]))
