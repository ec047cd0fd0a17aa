"""The pathways of OneRecV1 against literal tensors; the lifelong compression against its definitions, by brute
force.
"""

import datasets
import numpy as np
import pytest

from onerec_hf.collators import PathwayCollator
from onerec_hf.data import (
    SessionConfig,
    compress_lifelong,
    hierarchical_kmeans,
    load_interactions,
    reaches,
    session_splits,
)
from onerec_hf.data.lifelong import integer_cube_root, kmeans_step

# item i has tokens (10 + i, 20 + i)
TOKENS = np.stack([np.arange(10, 16), np.arange(20, 26)], axis=1)
AUTHOR = np.array([3, 1, 2, 1, 0, 4])
ROW = {
    "user": 1,
    "history": [0, 1, 2, 3, 4],
    "timestamp": [0, 3, 3, 10, 1033],
    "is_like": [1, 0, 1, -1, 0],
    "play_time_ms": [0, 1, 7, 5000, -1],
    "lifelong": [2, 5],
    "lifelong_timestamp": [1.5, 9.0],
    "lifelong_is_like": [1, 0],
    "targets": [5, 1],
}
NEW_USER = {name: 0 if name == "user" else [] for name in ROW} | {"targets": [3]}
FEATURES = {
    "event_features": {"timestamp": ("gap", 16), "is_like": ("category", 3)},
    "item_features": {"author": AUTHOR},
    "user_features": {"sex": np.array([1, 2]), "age": np.array([5, 6])},
}


def pathways(**change):
    return PathwayCollator(TOKENS, **{"positive": {"is_like": 1, "play_time_ms": 5000}, **FEATURES, **change})


def test_every_pathway_against_literal_tensors():
    """Side by side: two places of the short-term pathway, two of the positive one, three of the lifelong one."""
    batch = pathways(short_term_length=2, positive_length=2, lifelong_length=3)([ROW, NEW_USER])
    assert set(batch) == {"context_ids", "context_mask", "context_features", "user_features", "target_ids"}
    pad = [0, 0]
    # items 0, 2, 3 are positive, the oldest is cut
    items = [[13, 23], [14, 24], [12, 22], [13, 23], [12, 22], [15, 25], pad]
    assert batch["context_ids"].tolist() == [items, [pad] * 7]
    assert batch["context_mask"].tolist() == [[True] * 6 + [False], [False] * 7]
    # columns: author, is_like, timestamp; gaps 7 -> 1 + log2(8) = 4, 1023 -> 11, 0 -> 1, 7.5 -> 4, the first one is
    # unknown
    none = [0, 0, 0]
    features = [[1, 0, 4], [0, 1, 11], [2, 2, 1], [1, 0, 4], [2, 2, 0], [4, 1, 4], none]
    assert batch["context_features"].tolist() == [features, [none] * 7]
    assert batch["user_features"].tolist() == [[6, 2], [5, 1]]  # by name: age, sex, as user_feature_sizes
    assert batch["target_ids"].tolist() == [[[15, 25], [11, 21]], [[13, 23], [0, 0]]]


def test_lengths_are_those_of_the_config():
    batch = pathways()([ROW, NEW_USER])
    assert batch["context_ids"].shape == (2, 20 + 256 + 2000, 2)
    mask = batch["context_mask"][0]
    assert [part.sum().item() for part in mask.split([20, 256, 2000])] == [5, 3, 2]
    batch = PathwayCollator(TOKENS, short_term_length=3, positive_length=0, lifelong_length=0).context([ROW, NEW_USER])
    assert batch["context_ids"].tolist() == [[[12, 22], [13, 23], [14, 24]], [[0, 0]] * 3]


def test_the_history_itself_may_be_the_lifelong_pathway():
    row = {name: values for name, values in ROW.items() if not name.startswith("lifelong")}
    batch = pathways(lifelong="history", lifelong_length=4)([row])
    assert batch["context_ids"][0, -4:].tolist() == [[11, 21], [12, 22], [13, 23], [14, 24]]
    assert batch["context_features"][0, -4:, 2].tolist() == [3, 1, 4, 11]
    with pytest.raises(KeyError, match="no column 'lifelong'"):
        pathways()([row])


def test_errors_name_the_setting():
    with pytest.raises(ValueError, match="lifelong='both'"):
        pathways(lifelong="both")
    with pytest.raises(ValueError, match="'positive': -1"):
        pathways(positive_length=-1)
    with pytest.raises(ValueError, match="positive_length=256 but no `positive`"):
        pathways(positive=None)
    with pytest.raises(KeyError, match="no column 'is_follow'"):
        pathways(positive={"is_follow": 1})([ROW])
    with pytest.raises(ValueError, match="'is_like' has 4 values, the history 5"):
        pathways()([ROW | {"is_like": [0] * 4}])
    with pytest.raises(ValueError, match="'lifelong_is_like' has 1 values, the lifelong 2"):
        pathways()([ROW | {"lifelong_is_like": [0]}])


def test_reaches():
    columns = {"a": [0, 1, -1, np.nan], "b": [5, 0, 6, 7]}
    assert reaches(columns, {"a": 1, "b": 6}).tolist() == [False, True, True, True]
    assert reaches(columns, {"a": 1}).tolist() == [False, True, False, False]
    assert reaches(columns, {}).tolist() == [False] * 4
    with pytest.raises(ValueError, match=r"no event column \['c'\].*\['a', 'b'\]"):
        reaches(columns, {"c": 1})
    with pytest.raises(ValueError, match=r"thresholds of \['a'\] must be above 0"):
        reaches(columns, {"a": 0})


@pytest.mark.parametrize("root", [1, 2, 3, 4, 5, 6, 10, 46, 100])
def test_integer_cube_root(root):
    assert [integer_cube_root(n) for n in (root**3, root**3 + 1, (root + 1) ** 3 - 1)] == [root] * 3


def random_user(seed, n=700, num_items=400):
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(num_items, 6)).astype(np.float32)
    return rng.integers(0, num_items, n), embeddings


def test_a_step_is_lloyds_algorithm():
    items, embeddings = random_user(0, n=120, num_items=60)
    codes = kmeans_step(items, embeddings, 4, np.random.default_rng(0))
    points = embeddings[items].astype(np.float64)
    means = np.stack([points[codes == code].mean(axis=0) for code in range(4)])  # over events: views of an item count
    distance = ((points[:, None] - means) ** 2).sum(-1)
    assert (distance.argmin(axis=1) == codes).all()  # converged: every event is in the cluster with the nearest mean
    three = np.repeat([0, 100, 200], 9)[:, None] + np.arange(27)[:, None] % 9
    blobs = kmeans_step(np.arange(27), three.astype(np.float32), 27, np.random.default_rng(0))
    assert len(np.unique(blobs)) == 27  # never more clusters than asked for, and as many where points are


def test_clusters_against_the_definition(monkeypatch):
    """Every step: floor(n^(1/3)) clusters of the members of one cluster of more than M; nothing else, and until none
    is left.
    """
    items, embeddings = random_user(1)
    steps = []

    def recorded(members, item_embeddings, num_clusters, rng):
        codes = kmeans_step(members, item_embeddings, num_clusters, rng)
        steps.append((members, num_clusters, codes))
        return codes

    monkeypatch.setattr("onerec_hf.data.lifelong.kmeans_step", recorded)
    cluster = hierarchical_kmeans(items, embeddings, 20, np.random.default_rng(0))
    sizes = np.bincount(cluster)
    assert sizes.min() >= 1 and sizes.max() <= 20 and sizes.sum() == 700
    assert [len(steps[0][0]), steps[0][1]] == [700, 8] and len(steps) > 5
    large, small = [700], []
    for members, num_clusters, codes in steps:
        assert len(members) > 20 and num_clusters == max(k for k in range(1, 10) if k**3 <= len(members))
        assert codes.max() < num_clusters
        for size in np.bincount(codes):
            (large if size > 20 else small).append(size)
    assert sorted(len(step[0]) for step in steps) == sorted(large)
    assert sorted(size for size in small if size) == sorted(sizes)
    for item in np.unique(items):  # views of one video are never separated
        assert len(set(cluster[items == item])) == 1


def test_equal_events_stay_together():
    embeddings = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]], dtype=np.float32)
    items = np.array([0] * 30 + [1] * 20 + [2])
    cluster = hierarchical_kmeans(items, embeddings, 7, np.random.default_rng(0))
    assert np.bincount(cluster).tolist() in ([50, 1], [1, 50])
    with pytest.raises(ValueError, match="max_cluster_size=6: at least 7"):
        hierarchical_kmeans(items, embeddings, 6, np.random.default_rng(0))


def long_split(seed, lengths):
    rng = np.random.default_rng(seed)
    items, embeddings = random_user(seed)
    rows = {"user": list(range(len(lengths))), "history": [rng.choice(items, n).tolist() for n in lengths]}
    rows["timestamp"] = [np.sort(rng.integers(0, 10**12, n)).tolist() for n in lengths]
    rows["play_time_ms"] = [rng.integers(-1, 50, n).tolist() for n in lengths]
    rows["is_like"] = [rng.integers(-1, 2, n).tolist() for n in lengths]
    rows["targets"] = [[1]] * len(lengths)
    return datasets.Dataset.from_dict(rows), embeddings


def test_compressed_rows_against_the_definition():
    split, embeddings = long_split(2, [300, 40, 0])
    settings = {"sparse": ["is_like"], "averaged": ["timestamp", "play_time_ms"], "max_cluster_size": 15}
    rows = compress_lifelong(split, embeddings, **settings, compress_above=100, seed=3)
    assert (
        rows.column_names[: len(split.column_names)] == split.column_names
        and rows["history"][:] == split["history"][:]
    )
    row = rows[0]
    items = np.array(row["history"])
    cluster = hierarchical_kmeans(items, embeddings, 15, np.random.default_rng(3))
    found = {}
    for index in range(cluster.max() + 1):
        members = np.flatnonzero(cluster == index)
        points = embeddings[items[members]].astype(np.float64)
        distance = ((points - points.mean(axis=0)) ** 2).sum(axis=1)
        nearest = items[members[distance.argmin()]]
        latest = members[items[members] == nearest][-1]  # of several views, the last
        play = [row["play_time_ms"][i] for i in members if row["play_time_ms"][i] >= 0]
        time = np.mean([row["timestamp"][i] for i in members])
        found[time] = (nearest, row["is_like"][latest], np.mean(play) if play else -1)
    assert 20 <= len(found) < 300
    assert row["lifelong_timestamp"] == pytest.approx(sorted(found), rel=1e-12)
    expected = [found[time] for time in sorted(found)]
    assert row["lifelong"] == [item for item, _, _ in expected]
    assert row["lifelong_is_like"] == [like for _, like, _ in expected]
    assert row["lifelong_play_time_ms"] == pytest.approx([play for _, _, play in expected])
    for name in ("lifelong", "lifelong_timestamp", "lifelong_is_like"):  # short histories stay as they are
        assert rows[1][name] == rows[1]["history" if name == "lifelong" else name.removeprefix("lifelong_")]
        assert rows[2][name] == []


def test_compression_depends_on_the_seed_and_the_row_alone():
    split, embeddings = long_split(4, [200, 300])
    settings = {"averaged": ["play_time_ms"], "max_cluster_size": 15, "compress_above": 0}
    rows = compress_lifelong(split, embeddings, **settings)
    again = compress_lifelong(split.select([1, 0]), embeddings, **settings)
    assert [again[1], again[0]] == [rows[0], rows[1]]
    assert compress_lifelong(split, embeddings, **settings, seed=1)[0]["lifelong"] != rows[0]["lifelong"]
    times = rows[0]["lifelong_timestamp"]  # not averaged: the representatives' own
    assert set(times) <= set(rows[0]["timestamp"]) and times == sorted(times)


def test_compression_rejects_what_does_not_fit():
    split, embeddings = long_split(5, [50])
    settings = {"averaged": ["timestamp"], "compress_above": 0}
    with pytest.raises(KeyError, match=r"no column \['play_time_ms', 'duration_ms'\]"):
        compress_lifelong(split.remove_columns("play_time_ms"), embeddings)
    with pytest.raises(ValueError, match="name a column twice"):
        compress_lifelong(split, embeddings, sparse=["timestamp"], **settings)
    with pytest.raises(ValueError, match=r"item \d+ is beyond the 10 rows"):
        compress_lifelong(split, embeddings[:10], **settings)
    with pytest.raises(ValueError, match="NaN"):
        compress_lifelong(split, np.where(embeddings == embeddings[0, 0], np.nan, embeddings), **settings)
    with pytest.raises(ValueError, match="'play_time_ms' has 1 values, the history 50"):
        broken = split.remove_columns("play_time_ms").add_column("play_time_ms", [[1]])
        compress_lifelong(broken, embeddings, sparse=["play_time_ms"], **settings)


def test_rows_of_a_log_go_all_the_way():
    rng = np.random.default_rng(0)
    log = {"user_id": rng.integers(0, 5, 900), "item_id": rng.integers(0, 6, 900), "timestamp": np.arange(900)}
    log |= {"play_time_ms": rng.integers(0, 9999, 900), "is_like": rng.integers(0, 2, 900)}
    x = load_interactions(log, feedback=["play_time_ms", "is_like"])
    config = SessionConfig(
        max_gap=30,
        max_events=5,
        watched={"play_time_ms": 3000},
        interactions={"is_like": 1},
        min_watched=2,
        min_watch_time_ms=0,
        history="all",
        max_history=1000,
    )
    rows = session_splits(x, config)["test"]
    embeddings = rng.normal(size=(6, 4)).astype(np.float32)
    rows = compress_lifelong(
        rows,
        embeddings,
        sparse=["is_like"],
        averaged=["timestamp", "play_time_ms"],
        compress_above=50,
        max_cluster_size=40,
    )
    batch = pathways(lifelong_length=2000, user_features={"age": np.arange(5)})(list(rows.with_format("numpy")))
    short, lifelong = batch["context_mask"].split([20, batch["context_mask"].shape[1] - 20], dim=1)
    assert short.all() and (1 <= lifelong[:, -2000:].sum(1)).all() and (lifelong[:, -2000:].sum(1) <= 6).all()
    assert batch["target_ids"].shape[::2] == (5, 2)
