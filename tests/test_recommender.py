"""Histories of item ids in, item ids out: filters, features, new items, files, and what a new user gets wrong."""

import datetime
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import pipeline

from onerec_hf import Catalogue
from onerec_hf.collators import OneRecCollator, PathwayCollator, SessionCollator
from onerec_hf.data import EventFeature
from onerec_hf.recommender import ItemRanker, Recommender
from onerec_hf.scripts import recommend
from onerec_hf.semantic_ids import ResidualKMeans

from .numeric import assert_close
from .processes import run_processes
from .tiny import SIZES, tiny_catalogue, tiny_model

ROOT = Path(__file__).resolve().parents[1]
HISTORIES = [[1000, 1001, 1002], [1063], []]


def tokens_of(catalogue, model):
    return catalogue.semantic_ids.numpy() + np.array(model.config.level_offsets)


def recommender_of(
    architecture="v2", catalogue=None, num_beams=20, quantizer=None, metadata=None, settings=None, **features
):
    catalogue = catalogue or tiny_catalogue()
    sizes = {"context_features": {}, "user_features": {}}
    if features:
        probe = OneRecCollator(np.zeros((catalogue.num_items, 3)), **features)
        sizes = {"context_features": probe.context_feature_sizes, "user_features": probe.user_feature_sizes}
    model = tiny_model(catalogue, architecture=architecture, **sizes, **(settings or {}))
    tokens = tokens_of(catalogue, model)
    if architecture == "v1":
        lengths = {f"{name}_length": length for name, length in model.config.pathway_lengths.items()}
        collator = PathwayCollator(tokens, positive={"is_like": 1}, lifelong="lifelong", **lengths, **features)
    else:
        collator = {"onerec": SessionCollator}.get(architecture, OneRecCollator)(tokens, 50, **features)
    metadata = metadata or {int(item): {"title": f"item {item}"} for item in catalogue.item_ids}
    return Recommender(ItemRanker(model, collator, num_beams), metadata, quantizer)


def ids(found):
    return [[item.item_id for item in row] for row in found]


def same(found, expected):
    """The same items with the same metadata; scores come from two calls, so they are equal but for rounding."""
    assert ids(found) == ids(expected)
    for row, other in zip(found, expected):
        assert [item.metadata for item in row] == [item.metadata for item in other]
        scores = (torch.tensor([item.score for item in part]) for part in (row, other))
        if row:
            assert_close(*scores)


@pytest.mark.parametrize("architecture", ["onerec", "v1", "v2"])
def test_equals_a_plain_generate(architecture):
    recommender = recommender_of(architecture)
    model, catalogue = recommender.model, recommender.model.catalogue
    found = recommender.recommend(HISTORIES, k=8)
    for history, row in zip(HISTORIES, found):
        context = recommender.ranker.collator.context(
            [
                {"user": 0, "history": catalogue.index_of(history), "is_like": np.full(len(history), np.nan)}
                | {"lifelong": catalogue.index_of(history)}
            ]
        )
        out = model.generate(
            **context, num_beams=20, num_return_sequences=20, num_session_items=1, return_dict_in_generate=True
        )
        codes = out.sequences[:, 1:] - torch.tensor(model.config.level_offsets)
        expected = [
            (int(catalogue.item_ids[item]), score)
            for items, score in zip(catalogue.items_with(codes), out.sequences_scores.tolist())
            for item in items
        ][:8]
        assert [item.item_id for item in row] == [item for item, _ in expected]
        assert [item.score for item in row] == pytest.approx([3 * score for _, score in expected], abs=1e-4)
        assert row[0].metadata == {"title": f"item {row[0].item_id}"}


def test_filters():
    recommender = recommender_of()
    everything = ids(recommender.recommend(HISTORIES, k=65))
    assert all(sorted(row) == list(range(1000, 1065)) for row in everything)
    unseen = ids(recommender.recommend(HISTORIES, k=65, exclude_seen=True))
    assert [len(row) for row in unseen] == [62, 64, 65] and not set(unseen[0]) & set(HISTORIES[0])
    assert [sorted(row) for row in ids(recommender.recommend(HISTORIES, k=9, allow=[1003, 1004]))] == [
        [1003, 1004]
    ] * 3
    each = ids(recommender.recommend(HISTORIES, k=9, allow=[[1003], [1004, 1063], []], deny=[1063]))
    assert each == [[1003], [1004], []]
    some = ids(recommender.recommend(HISTORIES, k=65, allow=[None, [1004, 1063], []], deny=[[1000], None, None]))
    assert [sorted(row) for row in some] == [list(range(1001, 1065)), [1004, 1063], []]
    assert recommender.recommend([], k=3) == []


def test_items_of_one_semantic_id_share_its_score():
    recommender = recommender_of()  # items 1060.. repeat the semantic IDs of 1000..
    row = recommender.recommend([[1002]], k=65)[0]
    score = {item.item_id: item.score for item in row}
    assert all(score[1060 + i] == score[1000 + i] for i in range(5))
    assert [item.score for item in row] == sorted(score.values(), reverse=True)


def test_features_known_and_unknown():
    features = {
        "event_features": {"play_time_ms": EventFeature("log", 8)},
        "item_features": {"author": np.arange(65) % 4},
        "user_features": {"age": np.array([0, 3])},
    }
    recommender = recommender_of(**features)
    plain = recommender.recommend(HISTORIES, k=5)
    given = recommender.recommend(
        HISTORIES, k=5, events={"play_time_ms": [[9, 99, 999], [1], []]}, users={"age": [3, 0, 3]}
    )
    assert [row[0].score for row in plain] != [row[0].score for row in given]
    assert plain[1] != given[1] and plain[2] != given[2]  # a play time, and an age
    with pytest.raises(ValueError, match=r"events has columns \['is_like'\]"):
        recommender.recommend(HISTORIES, events={"is_like": HISTORIES})
    with pytest.raises(ValueError, match=r"events\['play_time_ms'\]\[0\] has 2 values, the history 3"):
        recommender.recommend(HISTORIES, events={"play_time_ms": [[1, 2], [1], []]})
    with pytest.raises(ValueError, match=r"users\['age'\].*3 users"):
        recommender.recommend(HISTORIES, users={"age": [1]})


def test_what_is_given_per_user_stays_with_the_user(tmp_path):
    """At once, one by one and in batches of two: the same items for each user, whatever comes with the history."""
    features = {
        "event_features": {"play_time_ms": EventFeature("log", 24)},
        "user_features": {"age": np.array([0, 3])},
    }
    recommender = recommender_of(**features)
    recommender.save_pretrained(tmp_path)
    recommend = pipeline("onerec-recommendation", model=str(tmp_path), num_beams=20)
    histories, n = [[1000 + i] for i in range(5)], 5
    given = {
        "events": {"play_time_ms": [[10**i] for i in range(n)]},
        "users": {"age": [0, 1, 2, 3, 0]},
        "allow": [list(range(1000 + i, 1030 + i)) for i in range(n)],
        "deny": [[1010 + i] for i in range(n)],
    }
    whole = recommend(histories, k=3, **given)
    assert [[item["item_id"] for item in row] for row in whole] == ids(recommender.recommend(histories, k=3, **given))
    for size in (1, 2, 3):
        parts = recommend(histories, k=3, batch_size=size, **given)
        assert [[item["item_id"] for item in row] for row in parts] == [
            [item["item_id"] for item in row] for row in whole
        ]
    for name, values in given.items():
        short = {name: {key: column[:4] for key, column in values.items()} if isinstance(values, dict) else values[:4]}
        for call in (recommend, recommender.recommend):
            with pytest.raises(ValueError, match=f"{name}.* has 4 values for 5 users"):
                call(histories, k=3, **short)


def test_values_of_user_features_are_saved_with_the_repository(tmp_path):
    known = {"city": {"Wuhan": 1, "Beijing": 2}}
    features = {"user_features": {"city": np.array([1, 2, 0])}, "user_categories": known}
    recommender_of(**features).save_pretrained(tmp_path)
    recommender = Recommender.from_pretrained(tmp_path, num_beams=20)
    collator = recommender.ranker.collator
    assert collator.user_categories_of({"city": ["Beijing", "Paris", None, "Wuhan"]}, 4)["city"].tolist() == [
        2,
        0,
        0,
        1,
    ]
    scores = [
        recommender.recommend([[1000]], users={"city": [city]})[0][0].score for city in ("Beijing", "Wuhan", "Paris")
    ]
    unknown = recommender.recommend([[1000]])[0][0].score
    assert min(abs(scores[a] - scores[b]) for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-2
    assert unknown == pytest.approx(scores[2], rel=1e-5)
    numbers = recommender_of(user_features={"age": np.array([0, 3])})
    for value in (7, -1, "F", 1.5):
        with pytest.raises(
            ValueError, match=r"users\['age'\] holds .*: the categories 0 \(unknown\) to 3 are allowed"
        ):
            numbers.recommend([[1000]], users={"age": [value]})
    rows = [{"user": user, "history": [0]} for user in (1, -1, 2)]
    assert numbers.ranker.collator.context(rows)["user_features"].tolist() == [[3], [0], [0]]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\n", "\r"])
def test_any_character_of_a_title_survives(character, tmp_path):
    recommender = recommender_of(metadata={item: {"title": f"Hand{character}cream"} for item in range(1000, 1065)})
    recommender.save_pretrained(tmp_path)
    assert Recommender.from_pretrained(tmp_path).metadata == recommender.metadata


def test_metadata_that_json_can_and_cannot_hold(tmp_path):
    released = {
        "released": datetime.date(2020, 1, 2),
        "price": np.float32(1.5),
        "score_": float("nan"),
        "tags": np.array(["a"]),
    }
    recommender = recommender_of(metadata={np.int64(1000): released})
    recommender.save_pretrained(tmp_path)
    found = Recommender.from_pretrained(tmp_path).metadata
    assert found == {1000: {"released": "2020-01-02", "price": 1.5, "score_": None, "tags": ["a"]}}
    with pytest.raises(ValueError, match=r"metadata 'bytes' of item 1000 is b'x' \(bytes\), which JSON cannot hold"):
        recommender_of(metadata={1000: {"bytes": b"x"}})
    for name in ("item_id", "score"):
        with pytest.raises(ValueError, match=rf"columns \['{name}'\] are fields of a recommendation already"):
            recommender_of(metadata={1000: {name: 1}})


def test_the_search_does_not_change_the_mode_of_the_model():
    recommender = recommender_of()
    recommender.model.train()
    with pytest.raises(ValueError, match=r"in training mode, with dropout: call `model[.]eval"):
        recommender.recommend(HISTORIES)
    assert recommender.model.training


@pytest.mark.parametrize("architecture", ["onerec", "v1", "v2"])
def test_round_trip(architecture, tmp_path):
    features = {
        "event_features": {"play_time_ms": EventFeature("log", 8)},
        "item_features": {"author": np.arange(65) % 4},
    }
    recommender = recommender_of(architecture, **features)
    recommender.save_pretrained(tmp_path)
    again = Recommender.from_pretrained(tmp_path, num_beams=20)
    assert type(again.ranker.collator) is type(recommender.ranker.collator)
    same(again.recommend(HISTORIES, k=7), recommender.recommend(HISTORIES, k=7))


def test_sessions_are_served_whole(tmp_path):
    """The items, their order and the score are those of `generate`; filters and metadata are those of single items."""
    recommender = recommender_of("onerec")
    model, catalogue = recommender.model, recommender.model.catalogue
    found = recommender.recommend(HISTORIES, k=4, session=True)
    assert [len(row) for row in found] == [4, 4, 4]
    context = recommender.ranker.collator.context([{"user": 0, "history": catalogue.index_of(HISTORIES[0])}])
    plain = model.generate(**context, num_beams=20, num_return_sequences=4, return_dict_in_generate=True)
    codes = plain.sequences.view(4, 3, 4)[..., 1:] - torch.tensor(model.config.level_offsets)
    for session, own, score in zip(
        found[0], codes, plain.sequences_scores * 11
    ):  # 3 items of BOS and 3 codes, without the first
        assert catalogue.semantic_ids[catalogue.index_of(session.item_ids)].tolist() == own.tolist()
        assert session.score == pytest.approx(score.item(), rel=1e-4)
        assert session.metadata == [{"title": f"item {item}"} for item in session.item_ids]
    allowed = [1003, 1010, 1022, 1030]
    for row in recommender.recommend(HISTORIES, k=30, session=True, allow=allowed):
        assert len(row) == 24 == len({tuple(session.item_ids) for session in row})  # 4 * 3 * 2 ordered sessions
        assert all(len({*session.item_ids} & {*allowed}) == 3 for session in row)
    assert recommender.recommend(HISTORIES, session=True, allow=allowed[:2]) == [[], [], []]
    recommender.save_pretrained(tmp_path)
    piped = pipeline("onerec-recommendation", model=str(tmp_path), num_beams=20)(HISTORIES[0], k=4, session=True)
    assert [row["item_ids"] for row in piped] == [session.item_ids for session in found[0]]
    assert set(piped[0]) == {"item_ids", "score", "metadata"}
    rows = datasets.Dataset.from_dict({"history": HISTORIES})
    path = recommender.recommend_dataset(rows, tmp_path / "out", k=4, session=True)
    back = datasets.Dataset.from_parquet(str(path))
    assert back["item_ids"][:] == [[session.item_ids for session in row] for row in found]
    rows.to_parquet(tmp_path / "rows.parquet")
    arguments = {
        "repo": str(tmp_path),
        "dataset": str(tmp_path / "rows.parquet"),
        "output": str(tmp_path / "by_script"),
    }
    path = recommend.main(recommend.RecommendArguments(**arguments, k=4, num_beams=20, session=True))
    assert datasets.Dataset.from_parquet(str(path))["item_ids"][:] == back["item_ids"][:]
    with pytest.raises(ValueError, match="session=True: OneRecV2ForCausalLM writes single items"):
        recommender_of().recommend(HISTORIES, session=True)


def test_a_session_holds_the_popular_allowed_item_of_a_semantic_id():
    """Items 1060 to 1064 have the semantic IDs of 1000 to 1004."""
    recommender = recommender_of("onerec")
    for allow, expected in (([1000, 1060, 1010, 1020], {1000, 1010, 1020}), ([1060, 1010, 1020], {1060, 1010, 1020})):
        row = recommender.recommend([[1001]], k=6, session=True, allow=allow)[0]
        assert {item for session in row for item in session.item_ids} == expected


def test_new_items_join_without_training(tmp_path):
    embeddings = torch.randn(65, 6, generator=torch.Generator().manual_seed(0))
    quantizer = ResidualKMeans(3, 8, balanced=False, seed=0)
    codes = quantizer.fit(embeddings).train_codes
    catalogue = Catalogue(codes, SIZES, item_ids=range(1000, 1065))
    recommender = recommender_of(catalogue=catalogue, quantizer=quantizer)
    recommender.add_items([7, 8], embeddings[:2] + 1e-4, [{"title": "new"}, {"title": "newer"}])
    row = recommender.recommend([[1005, 7]], k=67)[0]
    found = {item.item_id: item for item in row}
    assert found[7].score == found[1000].score  # one beam, read twice
    assert len(found) == 67 and found[8].metadata == {"title": "newer"}
    recommender.save_pretrained(tmp_path)
    again = Recommender.from_pretrained(tmp_path, num_beams=20)
    same(again.recommend([[8, 7]], k=5), recommender.recommend([[8, 7]], k=5))
    with pytest.raises(ValueError, match="item_ids"):
        recommender.add_items([7], embeddings[:1].numpy())
    for odd, message in ((np.full((1, 6), np.nan), "1 of 1 rows .* hold NaN"), (np.zeros((1, 5)), "width 5")):
        with pytest.raises(ValueError, match=message):
            recommender.add_items([9], odd)
    assert recommender.model.catalogue.num_items == 67  # nothing of it stays
    with pytest.raises(ValueError, match="no codebooks"):
        recommender_of().add_items([1], np.zeros((1, 6)))


def test_a_collision_level_counts_on():
    codes = np.array([[0, 1, 0], [0, 1, 1], [2, 3, 0]])
    quantizer = ResidualKMeans(2, 8, balanced=False, seed=0)
    points = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    quantizer.fit(points)
    codes[:, :2] = quantizer.encode(points[[0, 0, 1]]).numpy()
    recommender = recommender_of(catalogue=Catalogue(codes, SIZES, item_ids=[1, 2, 3]), quantizer=quantizer)
    recommender.add_items([4, 5], points[[0, 0]].numpy())
    assert recommender.model.catalogue.semantic_ids[3:, 2].tolist() == [2, 3]
    with pytest.raises(ValueError, match="2 new items have codes whose 8 places are all taken"):
        recommender.add_items(range(10, 16), points[[0] * 6].numpy())


def test_the_pipeline_is_the_same(tmp_path):
    recommender = recommender_of()
    recommender.save_pretrained(tmp_path)
    recommend = pipeline("onerec-recommendation", model=str(tmp_path), num_beams=20)
    expected = [
        [{"item_id": item.item_id, "score": pytest.approx(item.score, abs=1e-4), **item.metadata} for item in row]
        for row in recommender.recommend(HISTORIES, k=4, exclude_seen=True)
    ]
    assert recommend(HISTORIES, k=4, exclude_seen=True) == expected
    assert recommend(HISTORIES, k=4, exclude_seen=True, batch_size=2) == expected
    assert recommend(HISTORIES[0], k=4, exclude_seen=True) == expected[0]
    assert list(recommend(iter(HISTORIES), k=4, exclude_seen=True, batch_size=2)) == expected
    with pytest.raises(KeyError, match="not in the catalogue"):
        recommend([5])


def test_what_a_new_user_gets_wrong():
    recommender = recommender_of()
    with pytest.raises(KeyError, match="1 of 2 item ids are not in the catalogue of 65 items; the first is 5"):
        recommender.recommend([[1000, 5]])
    same(recommender.recommend([[5, 1000]], unknown_items="ignore"), recommender.recommend([[1000]]))
    for k in (0, 2.5):
        with pytest.raises(ValueError, match=f"k={k}: a whole number"):
            recommender.recommend(HISTORIES, k=k)
    for flat in ([1000, 1001], ["1000", "1001"], [None]):
        with pytest.raises(ValueError, match=r"histories\[0\] is .*a list of item ids per user"):
            recommender.recommend(flat)
    with pytest.raises(ValueError, match="unknown_items='drop': allowed are 'error' and 'ignore'"):
        recommender.recommend(HISTORIES, unknown_items="drop")
    with pytest.raises(KeyError, match="the first is nan"):
        recommender.recommend([[1000, float("nan")]])
    with pytest.raises(ValueError, match="deny has 2 values for 3 users"):
        recommender.recommend(HISTORIES, deny=[[1000], [1001]])
    assert len(recommender.recommend([[1001]], k=10**6)[0]) == 65  # k larger than the catalogue
    same(recommender.recommend([[1001] * 10_000]), recommender.recommend([[1001] * 50]))  # longer than the model


@pytest.mark.parametrize("name", ["collator_config.json", "collator.safetensors", "quantizer.safetensors"])
def test_a_file_beside_the_model_is_cut_off(name, tmp_path):
    quantizer = ResidualKMeans(3, 8, balanced=False).fit(
        torch.randn(65, 6, generator=torch.Generator().manual_seed(0))
    )
    recommender_of(quantizer=quantizer, item_features={"author": np.arange(65)}).save_pretrained(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"{name}.*cannot be read.* cut off"):
        Recommender.from_pretrained(tmp_path)


def test_nothing_is_recommended_into_a_wrong_folder(tmp_path, monkeypatch):
    (tmp_path / "out").write_text("a file in the place of the folder")
    recommender = recommender_of()
    monkeypatch.setattr(recommender, "recommend", lambda *args, **kwargs: pytest.fail("it began to work"))
    rows = datasets.Dataset.from_dict({"history": [[1000]]})
    with pytest.raises(FileExistsError, match=str(tmp_path / "out")):
        recommender.recommend_dataset(rows, tmp_path / "out")
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "part-00001-of-00004.parquet").touch()
    with pytest.raises(ValueError, match=r"holds \['part-00001-of-00004.parquet'\] of an earlier run"):
        recommender.recommend_dataset(rows, tmp_path / "earlier")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "part-00001-of-00002.parquet").touch()  # of another process of this run, which started first
    (tmp_path / "other" / "part-00000-of-00002.parquet").touch()  # this process's own: of an earlier run
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"holds \['part-00000-of-00002.parquet'\] of an earlier run"):
        recommender.recommend_dataset(rows, tmp_path / "other")
    monkeypatch.undo()
    for column in ("item_ids", "scores"):
        monkeypatch.setattr(recommender, "recommend", lambda *args, **kwargs: pytest.fail("it began to work"))
        with pytest.raises(ValueError, match=rf"columns \['{column}'\], which the result is written to"):
            recommender.recommend_dataset(rows.add_column(column, [1]), tmp_path / "new")
    with pytest.raises(ValueError, match=r"column 'user' holds Value.*a list of item ids per row is needed"):
        recommender.recommend_dataset(rows.add_column("user", [1]), tmp_path / "new", column="user")


def test_fewer_rows_than_processes_and_a_second_run(tmp_path, monkeypatch):
    recommender = recommender_of()
    rows = datasets.Dataset.from_dict({"user": [7, 8], "history": [[1000], [1001]]})
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        path = recommender.recommend_dataset(rows, tmp_path, 3)
        assert path.name == f"part-{rank:05d}-of-00004.parquet"
    back = datasets.load_dataset(
        "parquet", data_files=f"{tmp_path}/*.parquet", split="train", cache_dir=tmp_path / "cache"
    )
    assert back["user"][:] == [7, 8] and back["item_ids"][:] == ids(recommender.recommend(rows["history"][:], 3))
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="of an earlier run"):
        recommender.recommend_dataset(rows, tmp_path, 3)
    recommender.recommend_dataset(rows, tmp_path, 3, overwrite=True)
    assert [part.name for part in tmp_path.glob("*.parquet")] == ["part-00000-of-00001.parquet"]


def test_features_without_a_collator_no_recommender(tmp_path):
    tiny_model(tiny_catalogue(), context_features={"author": 4}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="collator_config"):
        Recommender.from_pretrained(tmp_path)
    recommender = recommender_of(item_features={"author": np.arange(65)})
    recommender.save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match=r"'author' has shape \(65,\), there are 3 items"):
        OneRecCollator.from_pretrained(tmp_path / "one", np.zeros((3, 3)))


def _recommend_rows(rank, folder):
    rows = datasets.Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(folder / f"cache{rank}"))
    Recommender.from_pretrained(folder / "repo", 20).recommend_dataset(rows, folder / "out", 3, batch_size=2)


@pytest.mark.parametrize("world", [1, 2])
def test_every_row_of_a_dataset_once(world, tmp_path):
    recommender_of().save_pretrained(tmp_path / "repo")
    rows = datasets.Dataset.from_dict({"user": list(range(7)), "history": [[1000 + i] for i in range(7)]})
    rows.to_parquet(tmp_path / "rows.parquet")
    run_processes(_recommend_rows, tmp_path, count=world)
    parts = sorted((tmp_path / "out").iterdir())
    assert [part.name for part in parts] == [f"part-{rank:05d}-of-{world:05d}.parquet" for rank in range(world)]
    found = datasets.concatenate_datasets([datasets.Dataset.from_parquet(str(part)) for part in parts])
    assert found["user"][:] == list(range(7))
    expected = Recommender.from_pretrained(tmp_path / "repo", 20).recommend(rows["history"][:], 3)
    assert found["item_ids"][:] == ids(expected)
    assert found["scores"][0] == pytest.approx([item.score for item in expected[0]], abs=1e-4)
