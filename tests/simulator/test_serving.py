"""Serving a simulated world: common random numbers, next-day logs, who leaves when; totals and intervals of an A/B
test.
"""

import numpy as np
import pandas as pd
import pytest

from onerec_hf.evaluation import bootstrap_lift
from onerec_hf.simulator import ShortVideoWorld, simulate_visits, user_totals
from onerec_hf.simulator.serving import EVENT_COLUMNS


@pytest.fixture(scope="module")
def world():
    return ShortVideoWorld(num_users=60, num_items=80, mean_events=10, num_days=4, seed=3)


def fixed_list(rows, seen, k, shift=0):
    """Unseen videos from the user's number on."""
    lists = []
    for row, own in zip(rows, seen):
        order = (np.arange(80) + row["user_id"] + shift) % 80
        lists.append(order[~np.isin(order, own)][:k])
    return np.array([np.pad(found, (0, k - len(found)), constant_values=-1) for found in lists])


def test_serving_is_a_function_of_the_seed_and_shares_its_luck(world):
    history = world.logs(0)
    one = simulate_visits(world, fixed_list, history, num_days=3, max_views=6, seed=5)
    again = simulate_visits(world, fixed_list, history, num_days=3, max_views=6, seed=5)
    pd.testing.assert_frame_equal(one, again)

    def odd_users_get_others(rows, seen, k):
        return np.where(
            [[row["user_id"] % 2] for row in rows], fixed_list(rows, seen, k, shift=40), fixed_list(rows, seen, k)
        )

    other = simulate_visits(world, odd_users_get_others, history, num_days=3, max_views=6, seed=5)
    even = [log[log.user_id % 2 == 0].drop(columns="request_id").reset_index(drop=True) for log in (one, other)]
    pd.testing.assert_frame_equal(*even)  # where the lists agree everything does
    visits = [set(zip(log.user_id, log.day)) for log in (one, other)]
    assert visits[0] == visits[1]  # who comes does not depend on what is shown
    drawn = world.sample_feedback(one.user_id.to_numpy(), one.video_id.to_numpy(), one.time_ms.to_numpy(), 5)
    for name, values in drawn.items():
        assert (one[name] == values).all()
    assert len(simulate_visits(world, fixed_list, history, num_days=3, max_views=6, seed=6)) != len(one)


def test_users_go_down_their_list_until_they_leave(world):
    calls = []

    def record(rows, seen, k):
        calls.append(fixed_list(rows, seen, k))
        return calls[-1]

    log = simulate_visits(world, record, world.logs(0), num_days=4, max_views=6, seed=1)
    first = world.start_time_ms + world.num_days * 86_400_000
    length = []
    for (_, day), own in log.groupby(["user_id", "day"]):
        assert own.position.tolist() == list(range(len(own))) and own.request_id.nunique() == 1
        assert own.video_id.tolist() in [found[: len(own)].tolist() for found in calls[day]]
        assert ((own.time_ms - first) // 86_400_000 == day).all()
        length.append(len(own))
    assert log.duplicated(["user_id", "video_id"]).sum() == 0
    assert max(length) <= 6 and len(set(length)) > 3
    came = len(length) / (4 * 60)
    assert abs(came - 0.7) < 0.1
    # who has just had a long view stays more often
    last = log.groupby("request_id").tail(1)
    inner = log.drop(last.index)
    assert last[last.position < 5].long_view.mean() < inner.long_view.mean()


def test_who_had_more_long_views_than_usual_comes_back_more_often(world):
    """The same lists and random numbers; only `return_slope` differs, and moves each user by their own last visit."""
    history = world.logs(0)
    came = {}
    for slope in (-500.0, 0.0, 500.0):
        log = simulate_visits(world, fixed_list, history, num_days=2, max_views=6, return_slope=slope, seed=4)
        came[slope] = [set(log.user_id[log.day == day]) for day in (0, 1)]
        first = log[log.day == 0].groupby("user_id").long_view.mean()
    assert came[-500.0][0] == came[0.0][0] == came[500.0][0]  # before the first visit everybody is as usual
    fond = set(first.index[first > history.long_view.mean() + 0.05])
    bored = set(first.index[first < history.long_view.mean() - 0.05])
    others = set(range(60)) - set(first.index)
    assert fond and bored
    assert fond <= came[500.0][1] and not bored & came[500.0][1]
    assert bored <= came[-500.0][1] and not fond & came[-500.0][1]
    assert others & came[500.0][1] == others & came[0.0][1] == others & came[-500.0][1]


def test_the_next_day_knows_the_day_before_and_nothing_else(world):
    history, seen_rows, seen_videos = world.logs(0), [], []

    def record(rows, seen, k):
        seen_rows.append({row["user_id"]: {name: list(row[name]) for name in EVENT_COLUMNS} for row in rows})
        seen_videos.append({row["user_id"]: set(own.tolist()) for row, own in zip(rows, seen)})
        return fixed_list(rows, seen, k)

    log = simulate_visits(world, record, history, num_days=3, max_views=5, seed=2)
    for day, (rows, videos) in enumerate(zip(seen_rows, seen_videos)):
        known = pd.concat([history, log[log.day < day]])
        for user, row in rows.items():
            own = known[known.user_id == user]
            watched = own[own.long_view == 1].sort_values("time_ms", kind="stable")
            assert row["video_id"] == watched.video_id.tolist() and row["time_ms"] == watched.time_ms.tolist()
            assert row["play_time_ms"] == watched.play_time_ms.tolist()
            assert videos[user] == set(own.video_id)


def test_log_probabilities_stay_with_their_video(world):
    def with_log_probs(rows, seen, k):
        found = fixed_list(rows, seen, k)
        return found, np.stack([-found - 1.0, -10.0 * found - 1], axis=2)

    log = simulate_visits(world, with_log_probs, world.logs(0), num_days=2, max_views=5)
    assert (log.log_prob_1 == -log.video_id - 1).all() and (log.log_prob_2 == -10 * log.video_id - 1).all()


def test_totals_against_plain_python(world):
    log = simulate_visits(world, fixed_list, world.logs(0), num_days=3, max_views=6)
    users, cold = np.arange(60), np.arange(80) % 7 == 0
    clusters = np.arange(80) % 3
    totals = user_totals(log, users, world.content_embeddings, cold, clusters)
    for user in (0, 7, 33):
        own = log[log.user_id == user]
        assert totals["watch_time"][user] == pytest.approx(own.play_time_ms.sum() / 1000)
        assert totals["app_stay_time"][user] == pytest.approx(own.play_time_ms.sum() / 1000 + 0.7 * len(own))
        assert totals["views"][user] == len(own) and totals["likes"][user] == own.is_like.sum()
        assert totals["cold_start_views"][user] == cold[own.video_id].sum()
        assert totals["comments"][user] == own.is_comment.sum() and totals["lifetime"][user] == own.day.nunique()
        spread, density = [], []
        for _, day in own.groupby("day"):
            x = world.content_embeddings[day.video_id].astype(np.float64)
            x /= np.linalg.norm(x, axis=1, keepdims=True)
            pairs = [1 - x[i] @ x[j] for i in range(len(x)) for j in range(i)]
            spread += [np.mean(pairs)] if pairs else []
            groups = clusters[day.video_id]
            same = [groups[i] == groups[j] for i in range(len(x)) for j in range(i)]
            density += [np.mean(same)] if same else []
        assert totals["cluster_density"][user] == pytest.approx(np.mean(density) if density else 0)
        assert totals["diversity"][user] == pytest.approx(np.mean(spread) if spread else 0, abs=1e-5)


def test_bootstrap_lift():
    rng = np.random.default_rng(0)
    control = rng.exponential(size=500)
    assert bootstrap_lift(control, control) == (0, 0, 0)
    assert bootstrap_lift(control, 1.1 * control) == pytest.approx((0.1, 0.1, 0.1))
    treatment = control + rng.normal(0.05, 0.5, size=500)
    found = bootstrap_lift(control, treatment)
    # delta method: the ratio's variance is that of (treatment - ratio * control) / mean(control), over the users
    ratio = treatment.sum() / control.sum()
    sigma = (treatment - ratio * control).std() / control.mean() / np.sqrt(500)
    assert found.value == pytest.approx(ratio - 1)
    assert (found.high - found.low) / (2 * 1.96 * sigma) == pytest.approx(1, abs=0.1)
    shown = rng.integers(1, 9, size=500).astype(float)
    assert bootstrap_lift(control, 2 * control, per=(shown, 2 * shown)) == pytest.approx((0, 0, 0))
    share = bootstrap_lift(control, treatment, per=(shown, np.ones(500)))
    assert share.value == pytest.approx(treatment.mean() / (control.sum() / shown.sum()) - 1)
    assert share.low < share.value < share.high
    with pytest.raises(ValueError, match="same users"):
        bootstrap_lift(control, control[:-1])
    with pytest.raises(ValueError, match="sums to 0"):
        bootstrap_lift(np.zeros(3), np.ones(3))
