"""What a transformers user types first, when a model is served: each call is right, or says what to call in its
place.
"""

import copy
import itertools
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from onerec_hf import SemanticIdTokenizer
from onerec_hf.data import EventFeature
from onerec_hf.explanation import plot_explanation
from onerec_hf.hub import push_to_hub
from onerec_hf.recommender import ItemRanker, Recommender

from .hub.test_hub import save
from .numeric import assert_close
from .processes import CONTEXT
from .test_recommender import HISTORIES, ids, recommender_of, same
from .tiny import SIZES, tiny_catalogue, tiny_model


def dict_ids(found):
    return [[item["item_id"] for item in row] for row in found]


# ---- the pipeline


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


def test_a_data_set_brings_what_the_model_reads(with_features, tmp_path, caplog):
    recommender, recommend = with_features
    rows = [{"is_like": None} | {name: value for name, value in row.items() if name != "deny"} for row in ROWS]
    table = pa.Table.from_pylist(rows).rename_columns({"history": "past"})
    path = recommender.recommend_dataset(datasets.Dataset(table), tmp_path / "out", 5, column="past", batch_size=3)
    found = pq.read_table(path)
    assert found["item_ids"].to_pylist() == dict_ids(recommend(rows, k=5)) and found["name"].to_pylist()[0] == "Ada"
    assert not [record for record in caplog.records if "the data set has no such columns" in record.message]
    fewer = datasets.Dataset(table.select(["past", "is_like"]))
    path = recommender.recommend_dataset(fewer, tmp_path / "less", 5, column="past")
    assert "The model reads ['age'] beside the ids, the data set has no such columns" in caplog.text
    less = [{name: row[name] for name in ("history", "is_like")} for row in rows]
    assert pq.read_table(path)["item_ids"].to_pylist() == dict_ids(recommend(less, k=5))


@pytest.mark.parametrize("other", [1, "yes", ["yes"], [[1]]])
def test_a_column_of_another_kind_is_not_read(other, with_features, tmp_path, caplog):
    """A text, or one number per row, that happens to have the name of what the model reads."""
    recommender, _ = with_features
    rows = datasets.Dataset.from_list([{"history": [1000], "age": "old", "is_like": other}])
    path = recommender.recommend_dataset(rows, tmp_path, 5)
    expected = recommender.recommend([[1000]], 5, users={"age": ["old"]})
    assert pq.read_table(path)["item_ids"].to_pylist() == ids(expected)
    assert "The model reads ['is_like'] beside the ids" in caplog.text


def test_events_that_are_not_those_of_the_history(with_features, tmp_path, monkeypatch):
    recommender, _ = with_features
    monkeypatch.setattr(type(recommender), "recommend", lambda *_, **__: pytest.fail("the long work has begun"))
    rows = [{"history": [1000], "is_like": [1], "age": "old"}, {"history": [1001], "is_like": [0, 1], "age": "old"}]
    with pytest.raises(ValueError, match=r"row 1 has 2 values of 'is_like' and 1 items in 'history'.*leave"):
        recommender.recommend_dataset(datasets.Dataset.from_list(rows), tmp_path, 5)


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


# ---- the tokenizer


@pytest.fixture(scope="module")
def tok():
    return SemanticIdTokenizer(codebook_sizes=SIZES, catalogue=tiny_catalogue())


def test_histories_through_the_tokenizer_are_the_context_of_the_collator(tok):
    recommender = recommender_of()
    histories = [[1000, 1001, 1002], [1063], []]
    batch = tok(items=histories, padding=True, return_tensors="pt")
    rows = [{"user": 0, "history": [item - 1000 for item in history]} for history in histories]
    expected = recommender.ranker.collator.context(rows)
    assert set(batch) == {"context_ids", "context_mask"} and batch["context_mask"].dtype == torch.bool
    assert torch.equal(batch["context_ids"], expected["context_ids"])
    assert torch.equal(batch["context_mask"], expected["context_mask"])
    found = recommender.model.recommend_items(4, **batch).items
    assert (found + 1000).tolist() == ids(recommender.recommend(histories, 4))
    newest = tok(items=histories, padding=True, truncation=True, max_length=2, return_tensors="np")
    assert newest["context_ids"].shape == (3, 2, 3)
    assert (newest["context_ids"][0] == tok.encode_items([1001, 1002])).all()
    assert tok(items=histories, padding="max_length", max_length=5, return_tensors="pt")["context_mask"].shape == (
        3,
        5,
    )
    single = tok(items=[1000, 1001])
    assert single["context_ids"] == tok.encode_items([1000, 1001]).tolist() and single["context_mask"] == [True, True]
    assert [len(row) for row in tok(items=histories)["context_ids"]] == [3, 1, 0]
    assert tok(items=[1000], return_tensors="pt")["context_ids"].shape == (1, 1, 3)


def test_the_tokenizer_names_the_right_call(tok):
    assert tok("<s_a_1><s_b_2><s_c_3>")["input_ids"] == [4 + 1, 12 + 2, 20 + 3]
    assert tok([""])["input_ids"] == [[]]
    for wrong in (["1", "2"], "1", [1000, 1001], ["", "1000"]):
        with pytest.raises(ValueError, match=r"is no text of semantic IDs.*tokenizer\(items=.*padding=True"):
            tok(wrong)
    with pytest.raises(ValueError, match="histories of 1 to 2 items are no tensor: pass padding=True"):
        tok(items=[[1000, 1001], [1002]], return_tensors="pt")
    with pytest.raises(ValueError, match="say to how many items, max_length"):
        tok(items=[[1000, 1001]], truncation=True)
    with pytest.raises(ValueError, match="return_tensors='tf': allowed are 'pt', 'np' and None"):
        tok(items=[[1000]], return_tensors="tf")
    with pytest.raises(ValueError, match="text and items are given"):
        tok("<s_a_1>", items=[[1000]])
    with pytest.raises(KeyError, match="the first is 5"):
        tok(items=[[5]], padding=True)
    with pytest.raises(ValueError, match=r"the lists hold 1 to 2 item ids.*tokenizer\(items="):
        tok.encode_items([[1000, 1001], [1002]])


@pytest.mark.parametrize("architecture", ["v2", "onerec"])
def test_what_generate_returns_is_decoded_as_it_is(tok, architecture):
    model = tiny_model(tiny_catalogue(), architecture=architecture)
    context = tok(items=[[1000, 1001, 1002], [1063]], padding=True, return_tensors="pt")
    found = model.generate(**context, num_beams=4, num_return_sequences=2)
    expected = tok.decode_items(found.reshape(-1, 4)[:, 1:])
    assert len(expected) == 4 * model.num_session_items and all(expected)
    assert tok.decode_items(found) == expected
    both = model.generate(**context, num_beams=4, num_return_sequences=2, return_dict_in_generate=True)
    assert tok.decode_items(both) == expected
    fewer = model.generate(**context, num_beams=4, num_return_sequences=4, num_session_items=1, allowed_items=[1007])
    assert tok.decode_items(fewer) == [[1007], [], [], []] * 2  # rows of pad tokens where there is no item
    codes = tok.decode_semantic_ids(tok.encode_items([1000, 1001]))
    with pytest.raises(ValueError, match=r"are codes and no token ids.*encode_semantic_ids\(codes\)"):
        tok.decode_items(codes)
    with pytest.raises(
        ValueError, match=r"expected integers of shape \(items, 3\), or what `generate` returns, 4 columns"
    ):
        tok.decode_items(found[:, :2])


# ---- item ids where a mask is expected


def test_item_ids_stand_for_a_mask(tok):
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    context = tok(items=[[1000, 1001], [1063]], padding=True, return_tensors="pt")
    mask = torch.zeros(1, 65, dtype=torch.bool)
    mask[0, [5, 6, 7]] = True
    expected = model.recommend_items(3, **context, allowed_items=mask).items
    assert sorted(expected[0].tolist()) == [5, 6, 7]
    generated = model.generate(**context, num_beams=3, num_return_sequences=3, allowed_items=mask)
    for own in ([1005, 1006, 1007], (1007, 1006, 1005), torch.tensor([1005, 1006, 1007]), np.array([1005, 1006, 1007]),
                [[1005, 1006, 1007]] * 2, mask.numpy()):  # fmt: skip
        assert torch.equal(model.recommend_items(3, **context, allowed_items=own).items, expected)
        assert torch.equal(
            model.generate(**context, num_beams=3, num_return_sequences=3, allowed_items=own), generated
        )
    per_user = model.recommend_items(1, **context, allowed_items=[[1005], [1006]]).items
    assert per_user.tolist() == [[5], [6]]
    shared = catalogue.node_masks(mask)
    assert torch.equal(model.generate(**context, num_beams=3, num_return_sequences=3, allowed_items=shared), generated)
    with pytest.raises(
        ValueError, match=r"what `catalogue.node_masks` made of a mask: here the mask itself is needed"
    ):
        model.recommend_items(3, **context, allowed_items=shared)
    with pytest.raises(KeyError, match="the first is 5"):
        model.recommend_items(3, **context, allowed_items=[5, 6, 7])
    with pytest.raises(ValueError, match=r"a mask is boolean, `mask.bool\(\)`"):
        model.generate(**context, num_beams=3, allowed_items=mask.long())


# ---- the recommender


@pytest.mark.parametrize("architecture", ["v2", "onerec", "v1"])
def test_items_leave(architecture, tmp_path):
    recommender = recommender_of(architecture, num_beams=65)
    before = recommender.recommend(HISTORIES, k=65)
    gone = [before[0][0].item_id, before[1][0].item_id, 1040]
    expected = [[item for item in row if item.item_id not in gone] for row in before]
    recommender.remove_items(gone)
    assert recommender.model.catalogue.num_items == 65 - len(set(gone)) == len(recommender.metadata)
    same(recommender.recommend(HISTORIES, k=65), expected)
    recommender.save_pretrained(tmp_path)
    same(Recommender.from_pretrained(tmp_path, num_beams=65).recommend(HISTORIES, k=65), expected)
    with pytest.raises(KeyError, match="the first is 1040"):
        recommender.recommend([[1040]])
    with pytest.raises(KeyError, match="1 of 1 item ids are not in the catalogue"):
        recommender.remove_items([1040])
    with pytest.raises(ValueError, match="at least one item"):
        recommender.remove_items(recommender.model.catalogue.item_ids)


def test_items_leave_with_their_features():
    kinds = np.arange(65) % 7
    recommender = recommender_of(item_features={"kind": kinds}, num_beams=65)
    expected = [[item for item in row if item.item_id != 1003] for row in recommender.recommend([[1004, 1010]], k=65)]
    recommender.remove_items([1003])
    same(recommender.recommend([[1004, 1010]], k=65), expected)
    assert recommender.model.catalogue.without_items([1000]).item_ids.tolist() == [1001, 1002, *range(1004, 1065)]


@pytest.mark.parametrize("architecture", ["v2", "onerec", "v1"])
def test_an_explanation_is_the_score_without_each_item(architecture):
    recommender = recommender_of(architecture, num_beams=65)
    history = [1000, 1005, 1002, 1005]

    def score(items):
        return recommender.recommend([items], k=1, allow=[1033])[0][0].score

    found = recommender.explain(history, 1033)
    assert [part.item_id for part in found] == history and found[1].metadata == {"title": "item 1005"}
    expected = [score(history) - score(history[:j] + history[j + 1 :]) for j in range(4)]
    assert_close(torch.tensor([part.contribution for part in found]), torch.tensor(expected))
    assert max(map(abs, expected)) > 1e-3
    assert list(pd.DataFrame(found).columns) == ["item_id", "contribution", "metadata", "attention"]
    if architecture == "v1":  # its encoder mixes items, and has positions that are none
        assert [part.attention for part in found] == [None] * 4
        return
    tokenizer = SemanticIdTokenizer(codebook_sizes=SIZES, catalogue=recommender.model.catalogue)
    context = tokenizer(items=[history], padding=True, return_tensors="pt")
    assert recommender.model.config._attn_implementation == "sdpa"  # other threads recommend with it
    model = copy.deepcopy(recommender.model)
    model.set_attn_implementation("eager")
    target = recommender.ranker.collator.pad_targets([[33]])
    weights = model(**context, target_ids=target, output_attentions=True).cross_attentions
    shares = torch.stack([layer.mean((0, 1, 2)) for layer in weights]).mean(0)
    per_item = shares[1:].view(4, -1).sum(1)
    assert_close(torch.tensor([part.attention for part in found]), per_item)
    assert 0 < per_item.sum() < 1


def test_an_explanation_is_drawn(tmp_path):
    recommender = recommender_of()
    recommender.metadata[1005] = {"title": "$5 and more"}
    found = recommender.explain([1000, 1005, 1002], 1033)
    figure = plot_explanation(found, tmp_path / "why.png")
    assert (tmp_path / "why.png").read_bytes()[:4] == b"\x89PNG"
    added, attention = figure.axes
    assert [bar.get_width() for bar in added.patches] == [part.contribution for part in found]
    assert [bar.get_width() for bar in attention.patches] == [part.attention for part in found]
    assert [tick.get_text() for tick in added.get_yticklabels()] == ["item 1000", r"\$5 and more", "item 1002"]
    assert added.yaxis_inverted()  # oldest on top
    assert len(plot_explanation([part._replace(attention=None) for part in found], label="none").axes) == 1
    with pytest.raises(ValueError, match="nothing to plot"):
        plot_explanation([])


def test_the_names_of_generate_name_ours(tmp_path):
    recommender = recommender_of()
    recommender.save_pretrained(tmp_path)
    recommend = pipeline("onerec-recommendation", model=str(tmp_path))
    for call in (lambda **given: recommender.recommend([[1000]], **given), lambda **given: recommend([1000], **given)):
        with pytest.raises(TypeError, match=r"no argument 'allowed_items': write allow=\[...\], item ids that alone"):
            call(allowed_items=[1005, 1006, 1007])
        with pytest.raises(TypeError, match="no argument 'top_k': write k"):
            call(top_k=5)
        with pytest.raises(TypeError, match="no argument 'alow': write one of k, allow"):
            call(alow=[1005])
        with pytest.raises(ValueError, match="allow=1005: a list of item ids, also for one item"):
            call(allow=1005)
        with pytest.raises(KeyError, match="the first is 5"):
            call(allow=[5, 6, 7])
    context = {"context_ids": torch.from_numpy(recommender.ranker.collator.item_token_ids[None, :1])}
    for wrong in (1005, "1005"):
        with pytest.raises(ValueError, match="a list of item ids, also for one item, or a bool mask"):
            recommender.model.generate(**context, allowed_items=wrong)


def test_an_explanation_reads_what_the_model_reads(with_features):
    recommender, _ = with_features
    given = {"events": {"is_like": [[1, 0, 1]]}, "users": {"age": ["old"]}}
    whole = recommender.recommend([[1000, 1001, 1002]], k=1, allow=[1033], **given)[0][0].score
    given["events"] = {"is_like": [[1, 1]]}
    without = recommender.recommend([[1000, 1002]], k=1, allow=[1033], **given)[0][0].score
    found = recommender.explain([1000, 1001, 1002], 1033, events={"is_like": [1, 0, 1]}, users={"age": "old"})
    assert found[1].contribution == pytest.approx(whole - without, abs=1e-4)
    # what is older than the model's window is not read, and does not move into it
    long = [1000 + i for i in range(60)]
    assert [part.item_id for part in recommender.explain(long, 1033)] == long[-50:]
    with pytest.raises(ValueError, match=r"events\['is_like'\] has 2 values, the history has 3 items"):
        recommender.explain([1000, 1001, 1002], 1033, events={"is_like": [1, 0]})
    with pytest.raises(ValueError, match="the history has 0 items: at least one"):
        recommender.explain([], 1033)
    with pytest.raises(KeyError, match="the first is 5"):
        recommender.explain([1000], 5)


def test_a_recommender_goes_to_the_hub_and_back(hub, tmp_path):
    recommender = recommender_of()
    recommender.push_to_hub("org/served", commit_message="First")
    assert [message for _, message, _ in hub.repos["org/served"].commits] == ["First"]
    back = Recommender.from_pretrained("org/served", num_beams=20)
    same(back.recommend(HISTORIES, k=5), recommender.recommend(HISTORIES, k=5))
    assert b"Not written down" in hub.repos["org/served"].branches["main"]["README.md"]
    SemanticIdTokenizer.from_pretrained("org/served").encode_items([1000])
    # the card beside a loaded model goes along
    save(tmp_path, recommender.model, title="Kept")
    recommender.save_beside(tmp_path)
    Recommender.from_pretrained(tmp_path).push_to_hub("org/again")
    assert b"# Kept" in hub.repos["org/again"].branches["main"]["README.md"]


def test_threads_copies_and_pickles_recommend_the_same(with_features):
    recommender, _ = with_features
    asked = [[[1000 + (7 * i + j) % 65 for j in range(1 + i % 9)]] for i in range(48)]
    ages = [{"age": [("young", "old", None)[i % 3]]} for i in range(48)]

    def one(served, i):
        return served.recommend(asked[i], 5, exclude_seen=True, users=ages[i])[0]

    alone = [one(recommender, i) for i in range(48)]
    fresh = pickle.loads(pickle.dumps(recommender))  # its look-up of ids is built by whichever thread comes first
    fresh.model.catalogue._sorted_item_ids = None
    with ThreadPoolExecutor(8) as pool:
        same(list(pool.map(lambda i: one(fresh, i), range(48))), alone)
    copied = copy.deepcopy(recommender)
    copied.remove_items([1000])
    assert len(recommender.model.catalogue) == 65
    same([one(recommender, i) for i in range(3)], alone[:3])


# ---- an adapter that is switched, and processes
# ------------------------------------------------------------------------


def test_an_adapter_is_switched_while_it_serves(tmp_path):
    """Each call is of the adapter that is on: nothing of an earlier one is remembered, and copies have their own."""
    recommender = recommender_of()
    plain = recommender.recommend(HISTORIES, k=5)
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(recommender.model, config, adapter_name="news")
    model.add_adapter("films", config)
    served = Recommender(ItemRanker(model.eval(), recommender.ranker.collator, 20), recommender.metadata)
    found = {}
    for name in ("news", "films", "news"):
        model.set_adapter(name)
        assert not model.training
        if name in found:
            same(served.recommend(HISTORIES, k=5), found[name])
        found[name] = served.recommend(HISTORIES, k=5)
    scores = [[one.score for one in rows[0]] for rows in (plain, found["news"], found["films"])]
    assert all(abs(a[0] - b[0]) > 1e-3 for a, b in itertools.combinations(scores, 2))
    with model.disable_adapter():
        same(served.recommend(HISTORIES, k=5), plain)
    same(served.recommend(HISTORIES, k=5), found["news"])
    assert len(served.explain([1000, 1001], 1033)) == 2
    for other in (copy.deepcopy(served), pickle.loads(pickle.dumps(served))):
        other.model.set_adapter("films")
        same(other.recommend(HISTORIES, k=5), found["films"])
    same(served.recommend(HISTORIES, k=5), found["news"])
    model.save_pretrained(tmp_path)  # the adapters; each in a folder of its own
    assert (tmp_path / "films" / "adapter_config.json").is_file()


def test_an_explanation_beside_other_threads(with_features):
    """It looks at the attention in a copy: the model that others recommend with keeps its own."""
    recommender, _ = with_features
    expected = recommender.recommend(HISTORIES, k=5)
    reasons = recommender.explain([1000, 1001], 1033)
    with ThreadPoolExecutor(8) as pool:
        explained = [pool.submit(recommender.explain, [1000, 1001], 1033) for _ in range(12)]
        found = [pool.submit(recommender.recommend, HISTORIES, 5) for _ in range(24)]
        for future in found:
            same(future.result(), expected)
    assert recommender.model.config._attn_implementation == "sdpa"
    for future in explained:
        values = [[part.contribution, part.attention] for part in future.result()]
        assert_close(torch.tensor(values), torch.tensor([[part.contribution, part.attention] for part in reasons]))


@pytest.mark.parametrize("context", [multiprocessing.get_context("fork"), CONTEXT], ids=["fork", "fresh"])
def test_processes_recommend_the_same(with_features, context):
    """As a server with several workers does: it loads, then forks; or sends the recommender to fresh processes."""
    recommender, _ = with_features
    expected = recommender.recommend(HISTORIES, 5, exclude_seen=True)
    with ProcessPoolExecutor(2, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = [pool.submit(recommender.recommend, HISTORIES, 5, exclude_seen=True) for _ in range(4)]
        for future in found:
            same(future.result(timeout=180), expected)
