"""What a transformers user types first, when a model is served: each call is right, or says what to call in its place."""

import datasets
import numpy as np
import pandas as pd
import pytest
from transformers import AutoModel, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from onerec_hf import SemanticIdTokenizer
from onerec_hf.data import EventFeature
from onerec_hf.hub import push_to_hub

from .test_hub import save
from .test_recommender import HISTORIES, ids, recommender_of
from .tiny import SIZES, tiny_catalogue

LIKES = {"event_features": {"is_like": EventFeature("category", 3)}}


def dict_ids(found):
    return [[item["item_id"] for item in row] for row in found]


# ---- the pipeline ------------------------------------------------------------------------------------------------------


def test_the_pipeline_of_a_hub_repository(hub, tmp_path):
    """What lies beside the model comes from the same revision."""
    for revision, num_items in (("old", 40), ("main", 65)):
        recommender = recommender_of(catalogue=tiny_catalogue(num_items))
        save(tmp_path / revision, recommender.model)
        recommender.save_pretrained(tmp_path / revision)
        SemanticIdTokenizer(codebook_sizes=SIZES, catalogue=recommender.model.catalogue).save_pretrained(
            tmp_path / revision
        )
        push_to_hub(tmp_path / revision, "org/tiny", revision=None if revision == "main" else revision)
    for revision, num_items in (("main", 65), ("old", 40), (None, 65)):
        recommend = pipeline("onerec-recommendation", model="org/tiny", revision=revision, num_beams=20)
        expected = recommender_of(catalogue=tiny_catalogue(num_items)).recommend(HISTORIES[:1], k=3)
        assert dict_ids(recommend(HISTORIES[:1], k=3)) == ids(expected)
        assert len(recommend.recommender.metadata) == num_items
    loaded = AutoModel.from_pretrained("org/tiny", revision="old")
    recommend = pipeline("onerec-recommendation", model=loaded)
    assert len(recommend.recommender.metadata) == 40


@pytest.fixture(scope="module")
def with_features(tmp_path_factory):
    """A recommender that reads a feedback column and a user feature, and its pipeline."""
    feature = {"user_features": {"age": np.arange(4)}, "user_categories": {"age": {"young": 1, "old": 3}}}
    recommender = recommender_of(event_features={"is_like": EventFeature("category", 3)}, **feature)
    folder = tmp_path_factory.mktemp("features")
    recommender.save_pretrained(folder)
    return recommender, pipeline("onerec-recommendation", model=str(folder), num_beams=20)


ROWS = [
    {"history": [1000, 1001, 1002], "is_like": [1, 0, 1], "age": "young", "name": "Ada"},
    {"history": [1063], "age": "old", "name": "Bob"},
    {"history": [], "is_like": [], "age": None, "name": "Eve"},
    {"history": [1005, 1004], "is_like": [0, 1], "age": "old", "name": "Dan", "deny": [1011]},
]


def test_rows_bring_what_the_model_reads(with_features):
    recommender, recommend = with_features
    events = {"is_like": [[1, 0, 1], [np.nan], [], [0, 1]]}
    users = {"age": ["young", "old", None, "old"]}
    expected = ids(
        recommender.recommend([r["history"] for r in ROWS], 5, events=events, users=users, deny=[[], [], [], [1011]])
    )
    assert expected != ids(recommender.recommend([r["history"] for r in ROWS], 5))
    assert dict_ids(recommend(ROWS, k=5)) == expected
    assert dict_ids(recommend(pd.DataFrame(ROWS[:1]), k=5)) == expected[:1]
    assert dict_ids([recommend(ROWS[0], k=5)]) == expected[:1]
    assert dict_ids(recommend((row for row in ROWS), k=5, batch_size=3)) == expected
    with pytest.raises(ValueError, match=r"row 0 has the columns .*'history'"):
        recommend([{"items": [1000]}])
    with pytest.raises(ValueError, match="row 1 has 1003: a row is a mapping"):
        recommend([ROWS[0], 1003])
    with pytest.raises(ValueError, match=r"\['events'\] are given in the rows and as arguments"):
        recommend(ROWS[:1], events={"is_like": [[1, 1, 1]]})
    with pytest.raises(ValueError, match="pass a list of item ids, oldest first, also for a single item"):
        recommend(1003)


def test_a_stream_is_searched_in_bounded_batches(with_features, monkeypatch):
    recommender, recommend = with_features
    read, sizes, search = [], [], recommend.recommender.recommend
    monkeypatch.setattr(
        recommend.recommender,
        "recommend",
        lambda histories, *a, **kw: sizes.append(len(histories)) or search(histories, *a, **kw),
    )

    def users():
        for i in range(150):
            read.append(i)
            yield {"history": [1000 + i % 60], "age": "old"}

    found = recommend(users(), k=2)
    assert not read  # nothing is read before somebody asks
    first = next(found)
    assert len(read) == 64
    rest = list(found)
    assert sizes == [64, 64, 22] and len(rest) == 149
    histories = [[1000 + i % 60] for i in range(150)]
    expected = ids(recommender.recommend(histories, 2, users={"age": ["old"] * 150}))
    assert dict_ids([first, *rest]) == expected
    # a data set streams as well, and what is given per user keeps to its user
    data = datasets.Dataset.from_dict({"history": histories})
    ages = {"age": ["young", "old"] * 75}
    expected = ids(recommender.recommend(histories, 2, users=ages))
    assert dict_ids(recommend(data, k=2, users=ages)) == dict_ids(
        recommend(KeyDataset(data, "history"), k=2, users=ages)
    )
    assert dict_ids(recommend(data, k=2, users=ages)) == expected
    assert dict_ids(recommend(data.to_iterable_dataset(), k=2)) == ids(recommender.recommend(histories, 2))
    sizes.clear()
    assert len(recommend(histories, k=2)) == 150 and max(sizes) == 64
    with pytest.raises(ValueError, match=r"\['users'\] are given per user for a stream whose length is not known"):
        recommend(users(), users=ages)
