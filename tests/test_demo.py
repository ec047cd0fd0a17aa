"""The demo: what it shows is what the recommender says, and the page runs a person's steps."""

import math
import re

import gradio_client
import pytest
import torch

from onerec_hf.collators import OneRecCollator
from onerec_hf.demo import ExampleUser, answer, beam_tree, make_demo, reasons, results_table, search_titles
from onerec_hf.item_ranker import ItemRanker
from onerec_hf.recommender import Recommender
from onerec_hf.scripts.demo import DemoArguments, build, world_of

from .tiny import tiny_catalogue, tiny_model


def recommender(seed: int = 0, **catalogue) -> Recommender:
    items = tiny_catalogue(**catalogue)
    model = tiny_model(items, seed=seed)
    tokens = (items.semantic_ids + torch.tensor(model.config.level_offsets)).numpy()
    kinds = ("cats & dogs", "<b>cars</b>")
    rows = {i: {"title": f"Video {i}", "category": kinds[i % 2]} for i in items.item_ids.tolist()}
    return Recommender(ItemRanker(model, OneRecCollator(tokens), 50), rows)


def test_titles_are_found_by_every_word():
    one = recommender()
    assert search_titles(one, "1007") == [("Video 1007 (<b>cars</b>)", 1007)]
    assert [item for _, item in search_titles(one, "DOGS video 1010")] == [1010]
    assert search_titles(one, "cars 1010") == [] and len(search_titles(one, "")) == 50
    one.metadata = {}
    assert search_titles(one, "1064") == [("1064", 1064)]


def test_the_tree_holds_every_item_and_adds_up():
    one = recommender()
    found = one.recommend([[1000, 1001]], 65)[0]
    tree = beam_tree(one, found)
    assert sorted(re.findall(r"Video (\d+)", tree)) == sorted(str(row.item_id) for row in found)
    codes = one.model.catalogue.semantic_ids[one.model.catalogue.index_of([row.item_id for row in found])]
    distinct = {tuple(path): math.exp(row.score) for path, row in zip(codes.tolist(), found)}
    expected = {}
    for path, share in distinct.items():
        expected[path[0]] = expected.get(path[0], 0) + share
    shown = re.findall(r'level 1: (\d+)</code> <span class="share">([\d.]+)%', tree)
    assert {int(code): share for code, share in shown} == {c: f"{100 * s:.1f}" for c, s in expected.items()}
    shares = [float(share) for _, share in shown]
    assert shares == sorted(shares, reverse=True)


def test_the_table_says_rank_reason_and_truth_and_escapes_titles():
    one = recommender()
    one.metadata[1003]["title"] = "<script>"
    history = [1003, 1001]
    found = one.recommend([history], 5)[0]
    table = results_table(one, history, found, [1.0, 2.0, 3.0, 4.0, 5.5])
    assert "<script>" not in table and "15.5 s" in table and table.count("<tr>") == 6
    for row in found[:3]:
        best = max(one.explain(history, row.item_id), key=lambda part: part.contribution)
        why = reasons(one, history, row.item_id, 1)
        assert (why == "") == (best.contribution <= 0)
        assert not why or why.endswith(f"(+{best.contribution:.2f})")
    assert "No item is left" in results_table(one, history, [], None)


def test_filters_reach_the_search():
    one = recommender()
    table, _ = answer(one, [1000, 1001], 20, exclude_seen=True, category="cats & dogs")
    shown = {int(item) for item in re.findall(r"<td>Video (\d+)", table)}
    assert len(shown) == 20 and all(item % 2 == 0 for item in shown) and 1000 not in shown


def test_wrong_recommenders_are_named():
    with pytest.raises(ValueError, match="0 recommenders: one, or two"):
        make_demo({})
    with pytest.raises(ValueError, match="recommend different items"):
        make_demo({"a": recommender(), "b": recommender(num_items=60)})


@pytest.mark.parametrize("text", ["{num_users: 5}", '{"users": 5}', "[1]"])
def test_a_wrong_world_is_named(text):
    with pytest.raises(ValueError, match="It is JSON of ShortVideoWorld's arguments"):
        world_of(text)
    with pytest.raises(ValueError, match="--world without --data"):
        build(DemoArguments("nowhere", world="{}"))


@pytest.mark.slow
def test_a_persons_steps():
    """Pick a user, see both models' lists and the truth; add a title, and see it in the history."""
    users = [ExampleUser("user 7, 2 items", [1000, 1001], 7)]
    page = make_demo(
        {"a": recommender(), "b": recommender(1)}, users, lambda user, items: [user + i % 10 for i in items]
    )
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        client = gradio_client.Client(address, verbose=False)
        assert "Empty" in client.predict(None, 5, True, "", api_name="/show")[0]
        client.predict("1004", api_name="/search")
        client.predict(1004, api_name="/add")
        shown = client.predict(0, 5, True, "", api_name="/show")
        assert "Video 1004" in shown[0]
        expected = recommender().recommend([[1004]], 5, exclude_seen=True)[0]
        assert [int(i) for i in re.findall(r"<td>Video (\d+)", shown[1])] == [row.item_id for row in expected]
        assert f"{7 + expected[0].item_id % 10:.1f} s" in shown[1]
        assert shown[1] != shown[3] and "level 1" in shown[2] and "level 1" in shown[4]
    finally:
        page.close()
