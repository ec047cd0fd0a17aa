"""The simulated world: calibration on published rates, exact expectations, common random numbers, learnable
histories.
"""

import numpy as np
import pandas as pd
import pytest

from onerec_hf.simulator import ShortVideoWorld
from onerec_hf.simulator.titles import CATEGORIES, SUBJECTS

FEEDBACK = ["play_time_ms", "is_click", "long_view", "is_like", "is_follow", "is_forward", "is_hate", "is_comment"]


@pytest.fixture(scope="module")
def world():
    return ShortVideoWorld(num_users=500, num_items=700, mean_events=30, seed=3)


@pytest.fixture(scope="module")
def log(world):
    return world.logs()


@pytest.fixture(scope="module")
def real_size():
    """A world in which users come as rarely as in KuaiRand-Pure."""
    world = ShortVideoWorld(num_users=2000, num_items=2000, mean_events=9)
    log = world.logs()
    return log, world.expected_feedback(log["user_id"], log["video_id"], log["time_ms"])


# KuaiRand-Pure, standard policy, 2022-04-25 to 05-08 (Gao et al., CIKM 2022): measured on the real log, not on
# simulated ones
@pytest.mark.parametrize(
    "name, levels, published",
    [
        ("duration_s", [0.05, 0.25, 0.5, 0.75, 0.95], [9, 26, 71, 156, 310]),
        ("play_s", [0.05, 0.25, 0.5, 0.75, 0.95], [0, 1.5, 4.6, 22, 100]),
        ("ratio", [0.25, 0.5, 0.75, 0.9, 0.99], [0.02, 0.09, 0.55, 1.03, 2.03]),
    ],
)
def test_quantiles_are_the_published_ones(real_size, name, levels, published):
    log, _ = real_size
    values = {
        "duration_s": log["duration_ms"] / 1000,
        "play_s": log["play_time_ms"] / 1000,
        "ratio": log["play_time_ms"] / log["duration_ms"],
    }[name]
    np.testing.assert_allclose(values.quantile(levels), published, rtol=0.2, atol=0.005)


def test_rates_are_the_published_ones(real_size):
    log, expected = real_size
    rates = {"is_click": 0.44, "long_view": 0.312, "is_like": 0.0176}
    for name, rate in rates.items():
        assert expected[name].mean() == pytest.approx(rate, rel=0.1), name
    for name, rate in {"is_follow": 0.0013, "is_forward": 0.0008, "is_hate": 0.0008, "is_comment": 0.0025}.items():
        assert rate / 1.5 < expected[name].mean() < rate * 1.5, name
    bands = pd.cut(log["duration_ms"] / 1000, [0, 7, 18, 30, 60, 120, 240, np.inf], right=False)
    by_duration = log["long_view"].groupby(bands, observed=False).mean()
    np.testing.assert_allclose(by_duration, [0.47, 0.27, 0.32, 0.34, 0.35, 0.30, 0.27], rtol=0.2)
    like = log.groupby("long_view")["is_like"].mean()
    assert like[1] == pytest.approx(0.035, rel=0.25)
    assert like[0] == pytest.approx(0.009, rel=0.25)


def test_events_per_user_and_popularity_are_skewed_as_published(real_size):
    log, _ = real_size
    np.testing.assert_allclose(log.groupby("user_id").size().quantile([0.1, 0.5, 0.9, 0.99]), [2, 7, 20, 42], rtol=0.2)
    counts = log["video_id"].value_counts()
    assert counts.head(len(counts) // 10).sum() / len(log) == pytest.approx(0.60, abs=0.12)


def test_expected_feedback_is_the_mean_of_many_draws(world, log):
    durations = world.items["duration_ms"]
    edges = [
        durations.idxmin(),
        durations.idxmax(),
        (durations - 7_001).abs().idxmin(),
        (durations - 18_000).abs().idxmin(),
    ]
    likely = world.expected_feedback(log["user_id"], log["video_id"], log["time_ms"])["is_like"].argsort()
    rows = log.iloc[np.concatenate([likely[:4], likely[-12:]])]  # hardly any reactions, and enough of them to be seen
    user, item, time = (rows[name].to_numpy().copy() for name in ("user_id", "video_id", "time_ms"))
    item[:4] = edges
    num_draws = 30_000
    draws = world.sample_feedback(user, item, time, seed=np.arange(num_draws)[:, None])
    expected = world.expected_feedback(user, item, time)
    for name in FEEDBACK:
        assert draws[name].shape == (num_draws, len(item)) and expected[name].shape == (len(item),)
        unit = durations[item].to_numpy() if name == "play_time_ms" else 1
        variance = draws[name].var(axis=0) if name == "play_time_ms" else expected[name] * (1 - expected[name])
        excess = draws[name].mean(axis=0) - expected[name]
        z = (excess * np.sqrt(num_draws / variance))[num_draws * variance / unit**2 > 50]  # where a normal law holds
        assert np.abs(z).max() < 4, (name, z)
        together = (excess / unit).sum() * np.sqrt(num_draws / (variance / unit**2).sum())
        assert abs(together) < 3.5, (name, together)  # a bias shared by all triples


def test_log_is_one_table_of_ordered_requests(world, log):
    columns = ["user_id", "video_id", "time_ms", "request_id", "play_time_ms", "duration_ms", *FEEDBACK[1:]]
    assert list(log.columns) == columns
    assert all(log[name].dtype == np.int64 for name in columns[:6])
    assert all(log[name].dtype == np.int8 for name in columns[6:])
    assert log["time_ms"].is_monotonic_increasing and log["time_ms"].min() >= world.start_time_ms
    assert sorted(log["user_id"].unique()) == list(range(world.num_users))
    requests = log.groupby("request_id")
    assert requests["user_id"].nunique().max() == 1 and requests.size().max() == world.request_size
    assert requests["time_ms"].first().is_monotonic_increasing
    gap = log.groupby("user_id")["time_ms"].diff() - log.groupby("user_id")["play_time_ms"].shift()
    assert gap.min() >= 700  # a video starts after the one before it was left
    assert log.duplicated(["user_id", "video_id"]).mean() < 0.002  # only where all candidates were seen
    day = (log["time_ms"] - world.start_time_ms) // 86_400_000
    assert (world.items["upload_day"].to_numpy()[log["video_id"]] <= day).all()
    assert (world.items["upload_day"] >= 0).any()


def test_watch_flags_follow_the_published_rules(world, log):
    play, duration = log["play_time_ms"], log["duration_ms"]
    assert (duration == world.items["duration_ms"].to_numpy()[log["video_id"]]).all()
    assert (log["is_click"] == ((play > 7_000) | (play >= duration))).all()
    assert (log["long_view"] == ((play >= 18_000) | (play >= duration))).all()
    assert (play == 0).mean() == pytest.approx(0.096, abs=0.015)


def test_seeds():
    small = {"num_users": 40, "num_items": 60, "mean_events": 8, "num_days": 2}
    first, again, other = (ShortVideoWorld(**small, seed=seed) for seed in (4, 4, 5))
    log = first.logs()
    pd.testing.assert_frame_equal(again.logs(), log)
    pd.testing.assert_frame_equal(again.items, first.items)
    pd.testing.assert_frame_equal(again.users, first.users)
    np.testing.assert_array_equal(again.content_embeddings, first.content_embeddings)
    other_log = again.logs(seed=1)
    assert len(other_log) == len(log) and (other_log["video_id"] != log["video_id"]).mean() > 0.9
    assert first.items["title"].tolist() != other.items["title"].tolist()
    times = first.start_time_ms + np.arange(50)
    assert not np.array_equal(
        first.sample_feedback(5, 7, times)["play_time_ms"], other.sample_feedback(5, 7, times)["play_time_ms"]
    )


def test_draws_are_potential_outcomes(world, log):
    """The same (seed, user, video, time) has one outcome, whatever the batch; anything else has another one."""
    part = log.sample(300, random_state=0)
    triple = [part[name].to_numpy() for name in ("user_id", "video_id", "time_ms")]
    drawn = world.sample_feedback(*triple, seed=0)
    for name in FEEDBACK:
        np.testing.assert_array_equal(drawn[name], part[name])  # logs(seed=0) reads the same table
    one = world.sample_feedback(*(int(values[7]) for values in triple))
    assert all(one[name] == drawn[name][7] for name in FEEDBACK)
    user, video, time = triple
    changed = [
        world.sample_feedback(*triple, seed=1),
        world.sample_feedback(user, video, time + 1),
        world.sample_feedback(user, (video + 1) % world.num_items, time),
        world.sample_feedback((user + 1) % world.num_users, video, time),
    ]
    mean = world.expected_feedback(*triple)["long_view"]
    for other in changed:
        assert abs(np.corrcoef(drawn["long_view"] - mean, other["long_view"])[0, 1]) < 0.25  # four standard errors
        assert (drawn["play_time_ms"] == other["play_time_ms"]).mean() < 0.05


def test_expectation_broadcasts_over_all_pairs(world):
    users, videos, time = np.arange(4), np.arange(world.num_items), world.start_time_ms + 10**8
    grid = world.expected_feedback(users[:, None], videos, time)
    pairs = world.expected_feedback(np.repeat(users, len(videos)), np.tile(videos, 4), time)
    for name in FEEDBACK:
        assert grid[name].shape == (4, world.num_items)
        np.testing.assert_allclose(grid[name].ravel(), pairs[name], rtol=1e-9)
        assert (grid[name] >= 0).all() and (name == "play_time_ms" or (grid[name] <= 1).all())
    for name in ("is_like", "is_follow", "is_forward", "is_comment"):
        assert np.corrcoef(grid["is_click"].ravel(), grid[name].ravel())[0, 1] > 0.2
    assert np.corrcoef(grid["is_click"].ravel(), grid["is_hate"].ravel())[0, 1] < -0.2


def test_tastes_have_moods_and_drift(world):
    user, video = np.arange(world.num_users)[:, None], np.arange(0, world.num_items, 8)
    day = 86_400_000
    noon = world.start_time_ms + 14 * 3_600_000
    now = world.expected_feedback(user, video, noon)["long_view"]
    minutes_later = world.expected_feedback(user, video, noon + 600_000)["long_view"]
    np.testing.assert_allclose(now, minutes_later, atol=0.005)  # tastes move slowly, the mood stays
    evening = world.expected_feedback(user, video, noon + day // 4)["long_view"]
    assert 0.02 < np.abs(evening - now).mean() < 0.2  # the mood went on to the next interest
    moods = np.stack([world._mood(np.arange(world.num_users), noon + k * day // 4) for k in range(2)])
    assert (moods[0] != moods[1]).all()

    def drift(days):  # same mood on both days, so what remains is the taste
        same = world._mood(user[:, 0], noon) == world._mood(user[:, 0], noon + days * day)
        return np.abs(world.expected_feedback(user[same], video, noon + days * day)["long_view"] - now[same]).mean()

    assert drift(1) < 0.5 * drift(7) < drift(14)


def test_logging_policy_is_between_popularity_and_the_best(world, log):
    requests = log.groupby("request_id").first().sample(400, random_state=0)
    user, time = requests["user_id"].to_numpy()[:, None], requests["time_ms"].to_numpy()[:, None]
    value = world.expected_feedback(user, np.arange(world.num_items), time)["long_view"]
    popular = np.bincount(log["video_id"], minlength=world.num_items).argsort()[-5:]
    logged = world.expected_feedback(log["user_id"], log["video_id"], log["time_ms"])["long_view"].mean()
    best = np.sort(value, axis=1)[:, -5:].mean()
    assert value.mean() < value[:, popular].mean() < logged - 0.02
    assert logged + 0.15 < best


def test_history_tells_the_next_video_better_than_popularity(world, log):
    histories = [
        group.to_numpy() for _, group in log.sort_values(["user_id", "time_ms"]).groupby("user_id")["video_id"]
    ]
    histories = [history for history in histories if len(history) >= 5]
    target = np.array([history[-1] for history in histories])
    popularity = np.bincount(np.concatenate([history[:-1] for history in histories]), minlength=world.num_items)
    following = np.zeros(
        (world.num_items, world.num_items)
    )  # what comes within five places after what, nearer counts more
    for history in histories:
        for step in range(1, 6):
            np.add.at(following, (history[: -1 - step], history[step:-1]), 1 / step)
    following /= np.sqrt(popularity + 5)
    recent = np.stack([sum(following[v] / k for k, v in enumerate(history[-2:-12:-1], 1)) for history in histories])

    def recall_at_10(scores):
        scores = scores.astype(float)
        for row, history in enumerate(histories):
            scores[row, history[:-1]] = -1
        return (np.argsort(-scores, axis=1)[:, :10] == target[:, None]).any(1).mean()

    # 1.9 times; 1.5 times if the policy offered no relatives of the last long-viewed video
    assert recall_at_10(recent) > 1.6 * recall_at_10(np.tile(popularity, (len(histories), 1)))


def test_titles_and_embeddings_tell_what_a_video_is_about(world):
    items = world.items
    assert items["title"].is_unique and items["video_id"].tolist() == list(range(world.num_items))
    for title, category, tags in zip(items["title"], items["category"], items["tags"]):
        assert tags[0] == category and tags[1] in SUBJECTS[CATEGORIES.index(category)]
        assert tags[1].lower() in title.lower()
    embeddings = world.content_embeddings
    assert embeddings.shape == (world.num_items, 64) and embeddings.dtype == np.float32
    distance = ((embeddings[:, None] - embeddings[None]) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    category = items["category"].to_numpy()
    same = (category[distance.argmin(1)] == category).mean()
    assert 0.7 < same < 1.0
    assert (category[:, None] == category[None]).mean() < 0.2


@pytest.mark.parametrize("sizes", [(1, 10, 5, 1), (3, 2, 1, 7), (2, 60, 30, 50), (1, 10, 5, 60)])
def test_tiny_worlds_run(sizes):
    num_users, num_items, request_size, mean_events = sizes
    world = ShortVideoWorld(
        num_users, num_items, num_days=1, request_size=request_size, mean_events=mean_events, embedding_dim=2
    )
    log = world.logs()
    assert len(log) == world._users.num_events.sum()
    assert log.groupby("request_id")["video_id"].nunique().sum() == len(log)  # no video twice in a request
    assert np.isfinite(world.expected_feedback(0, np.arange(num_items), log["time_ms"].iloc[0])["play_time_ms"]).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_users": 0}, "`num_users` must be an integer of at least 1, got 0"),
        ({"num_items": 9}, "`num_items` must be an integer of at least 10, got 9"),
        ({"num_days": 1.5}, "`num_days` must be an integer of at least 1, got 1.5"),
        ({"request_size": True}, "`request_size` must be an integer"),
        ({"seed": -1}, "`seed` must be an integer of at least 0"),
        ({"mean_events": 0.5}, "`mean_events` is the mean impressions"),
        ({"mean_events": float("nan")}, "`mean_events` is the mean impressions"),
    ],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShortVideoWorld(**arguments)


@pytest.mark.parametrize(
    "triple, seed, message",
    [
        ((500, 0, 0), 0, "`user_id` must be 0 to 499 in this world, got 500"),
        (([0, 1], [0, -2], 0), 0, "`video_id` must be 0 to 699 in this world, got -2"),
        ((0, 0, 1.5), 0, "`time_ms` must hold integers, got dtype float64"),
        ((0, 0, 0), -1, "`seed` must be 0 or more"),
    ],
)
def test_bad_triples_are_named(world, triple, seed, message):
    with pytest.raises(ValueError, match=message):
        world.sample_feedback(*triple, seed=seed)
    if seed == 0:
        with pytest.raises(ValueError, match=message):
            world.expected_feedback(*triple)
