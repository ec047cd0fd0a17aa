"""Other items and other weights under traffic: what is served then, what is refused, and which version answers."""

import asyncio
import copy
import json
import shutil

import numpy as np
import pytest
import torch

from onerec_hf import Catalogue
from onerec_hf.recommender import Recommender
from onerec_hf.serving import save_bundle
from onerec_hf.serving.bundles import with_catalogue
from onerec_hf.serving.schemas import CatalogueBody, RecommendBody

from .served import EMBEDDINGS, application, client, codebooks, never, recommender
from .test_serving import Stuck, same

HISTORY = {"histories": [[1000, 1001, 1002]], "k": 10}
NEW = {"item_id": 7, "embedding": EMBEDDINGS[0].tolist(), "metadata": {"title": "new"}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`fewer`: without ten items; `model`: other weights, the same codebooks; `stranger`: other codebooks."""
    own, tmp_path = recommender(), tmp_path_factory.mktemp("bundles")
    save_bundle(with_catalogue(own, own.model.catalogue.without_items(range(1010, 1020))), tmp_path / "fewer")
    own.save_pretrained(tmp_path / "first")
    with torch.no_grad():
        for parameter in own.model.parameters():
            parameter.mul_(1.5)
    own.save_pretrained(tmp_path / "model")
    own.quantizer = codebooks(seed=1)
    own.save_pretrained(tmp_path / "stranger")
    return tmp_path


@pytest.fixture
def bundles(made, tmp_path):
    return shutil.copytree(made, tmp_path / "bundles")


def ids(answer):
    return [one["item_id"] for one in answer.json()["results"][0]]


def test_items_join_are_replaced_and_leave(tmp_path):
    own = recommender()
    # what `Recommender` itself makes of the same changes
    expected = with_catalogue(own, own.model.catalogue, dict(own.metadata))
    expected.add_items([7], EMBEDDINGS[:1], [{"title": "new"}])
    expected.remove_items([1005])
    with client(own, bundles=tmp_path) as http:
        answer = http.post("/catalogue", json={"items": [NEW], "remove": [1005], "name": "monday"})
        assert answer.status_code == 200 and answer.json()["num_items"] == 65
        assert answer.json()["fingerprint"] == expected.model.catalogue.fingerprint()
        everything = HISTORY | {"k": 65}
        found = http.post("/recommend", json=everything)
        assert found.json()["version"] == "monday" and 7 in ids(found) and 1005 not in ids(found)
        same(found.json()["results"], expected.recommend(**everything))
        assert http.post("/recommend", json={"histories": [[7]]}).status_code == 200
        assert "1005" in http.post("/recommend", json={"histories": [[1005]]}).json()["error"]["message"]
        # an item with new metadata alone keeps its semantic ID
        answer = http.post("/catalogue", json={"items": [{"item_id": 7, "metadata": {"title": "newer"}}]})
        assert answer.json()["fingerprint"] == expected.model.catalogue.fingerprint()
        titles = {
            one["item_id"]: one["metadata"] for one in http.post("/recommend", json=everything).json()["results"][0]
        }
        assert titles[7] == {"title": "newer"} and titles[1000] == {"title": "item 1000"}
    assert own.recommend(**everything)[0][0].metadata and len(own.model.catalogue) == 65  # the first one is as it was
    assert 7 not in own.metadata and own.model.catalogue.item_ids[5] == 1005


def test_a_replaced_item_keeps_its_popularity_and_what_the_scorers_know():
    own = recommender()
    with client(own) as http:
        item = {"item_id": 1002, "embedding": EMBEDDINGS[3].tolist(), "metadata": {"title": "cut anew"}}
        http.post("/catalogue", json={"items": [item]})
        found = http.app.state.service.versions.current.recommender
    place = int(found.model.catalogue.index_of([1002])[0])
    codes = own.quantizer.encode(torch.from_numpy(EMBEDDINGS[3:4]))[0].tolist()
    assert found.model.catalogue.semantic_ids[place].tolist() == codes
    assert found.model.catalogue.popularity[place] == 2.0 and found.metadata[1002] == {"title": "cut anew"}
    assert found.ranker.reranker.positions[place] == 2
    history = found.model.catalogue.index_of([1001]).tolist()
    scores = found.ranker.reranker._scores([history], None)["counter"][0]
    assert scores[place] == own.ranker.reranker._scores([[1]], None)["counter"][0][2] > -torch.inf


def test_an_item_that_comes_back_is_recommended_as_before(bundles):
    """Versions are made of the repository, and not of each other: the re-ranker forgets nothing."""
    own = recommender()
    save_bundle(own, bundles / "all")
    with client(own, bundles=bundles) as http:
        before = http.post("/recommend", json=HISTORY | {"k": 65}).json()["results"]
        for name in ("fewer", "all"):
            assert http.post("/catalogue", json={"bundle": name}).status_code == 200
        assert http.post("/recommend", json=HISTORY | {"k": 65}).json()["results"] == before


def test_bundles_and_models_swap_and_roll_back(bundles):
    own = recommender()
    one, other = Recommender.from_pretrained(bundles / "first", 20), Recommender.from_pretrained(bundles / "model", 20)
    fewer = own.model.catalogue.without_items(range(1010, 1020))
    expected = {
        "v1": own,
        "model": other,
        "fewer": with_catalogue(other, fewer),
        "third": with_catalogue(one, fewer),
    }
    with client(own, bundles=bundles, keep_versions=3) as http:
        swaps = [("model", {"bundle": "model"}), ("catalogue", {"bundle": "fewer"})]
        swaps += [("model", {"bundle": "first", "catalogue": "keep", "name": "third"})]
        for path, body in [(None, None), *swaps]:
            if path:
                assert http.post(f"/{path}", json=body).status_code == 200
            answer = http.post("/recommend", json=HISTORY).json()
            same(answer["results"], expected[answer["version"]].recommend(**HISTORY))
        info = http.get("/info").json()
        assert [one["name"] for one in info["versions"]] == ["model", "fewer", "third"]
        assert (info["catalogue"]["model"], info["catalogue"]["catalogue"]) == ("first", "fewer")
        refused = http.post("/model", json={"rollback_to": "v1"})  # three are kept
        assert (
            refused.status_code == 404 and "kept are ['model', 'fewer', 'third']" in refused.json()["error"]["message"]
        )
        assert http.post("/model", json={"rollback_to": "model"}).json()["name"] == "model"
        same(http.post("/recommend", json=HISTORY).json()["results"], other.recommend(**HISTORY))
        assert 'onerec_version{catalogue="model"' in http.get("/metrics").text


def test_a_change_is_a_bundle_that_a_service_can_start_with(tmp_path):
    with client(recommender(), bundles=tmp_path) as http:
        http.post("/catalogue", json={"items": [NEW], "name": "monday"})
        expected = http.post("/recommend", json=HISTORY).json()
    with client(recommender(), bundles=tmp_path, catalogue="monday") as http:
        answer = http.post("/recommend", json=HISTORY).json()
        assert answer["fingerprint"] == expected["fingerprint"] and answer["results"] == expected["results"]
        assert http.get("/info").json()["catalogue"]["catalogue"] == "monday"
        assert http.post("/catalogue", json={"remove": [1000], "name": "monday"}).status_code == 409
        (tmp_path / "v2").mkdir()  # of a service that was stopped
        assert http.post("/catalogue", json={"remove": [1000]}).json()["name"] == "v3"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["monday", "v2", "v3"]  # and no remains
    with pytest.raises(FileExistsError, match="a bundle never changes"):
        save_bundle(recommender(), tmp_path / "monday")


def damaged(bundles, name, break_it):
    folder = bundles / "bad"
    shutil.copytree(bundles / name, folder)
    break_it(folder)
    return folder


def rewrite(name, **fields):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | fields), encoding="utf-8")

    return change


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def other_items(folder):
    Catalogue(np.zeros((3, 3)), [8, 8, 8], [1, 2, 3]).save_pretrained(folder)


BAD = {
    "no bundle.json": ("catalogue", "fewer", lambda folder: (folder / "bundle.json").unlink(), "no bundle.json"),
    "bundle.json is cut": ("catalogue", "fewer", cut("bundle.json"), "Expecting"),
    "bundle.json is a list": (
        "catalogue",
        "fewer",
        lambda folder: (folder / "bundle.json").write_text("[]", encoding="utf-8"),
        "no mapping",
    ),
    "another fingerprint": ("catalogue", "fewer", rewrite("bundle.json", fingerprint="0"), "not of one bundle"),
    "other items": ("catalogue", "fewer", other_items, "not of one bundle"),
    "the catalogue is cut": ("catalogue", "fewer", cut("catalogue.safetensors"), "not a readable catalogue"),
    "no catalogue": (
        "catalogue",
        "fewer",
        lambda folder: (folder / "catalogue.safetensors").unlink(),
        "catalogue.safetensors",
    ),
    "the metadata are cut": ("catalogue", "fewer", cut("items.jsonl"), "Unterminated|Expecting"),
    "no codebooks": ("catalogue", "fewer", lambda folder: (folder / "quantizer_config.json").unlink(), "quantizer"),
    "other codebooks": ("catalogue", "fewer", lambda folder: codebooks(1).save_pretrained(folder), "codebooks"),
    "a model as a catalogue": ("catalogue", "model", lambda folder: None, "no bundle.json"),
    "a catalogue as a model": ("model", "fewer", lambda folder: None, "config.json|model_type|Unrecognized"),
    "the weights are cut": ("model", "model", cut("model.safetensors"), "safetensors|header|incomplete|Error"),
    "no weights": ("model", "model", lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "the config is cut": ("model", "model", cut("config.json"), "JSON|config"),
    "the re-ranker is cut": ("model", "model", cut("reranker.json"), "Expecting|delimiter|Unterminated"),
    "a model without items": (
        "model",
        "model",
        lambda folder: (folder / "catalogue.safetensors").unlink(),
        "holds no catalogue|catalogue.safetensors",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_bundle_is_refused_and_the_old_version_stays(bundles, name):
    path, source, break_it, message = BAD[name]
    damaged(bundles, source, break_it)
    with client(bundles=bundles) as http:
        before = http.post("/recommend", json=HISTORY).json()
        answer = http.post(f"/{path}", json={"bundle": "bad"})
        assert answer.status_code == 422 and answer.json()["error"]["code"] == "bad_bundle", answer.text
        text = answer.json()["error"]["message"]
        assert any(one in text for one in message.split("|")) and text.endswith("Version 'v1' stays."), text
        assert http.post("/recommend", json=HISTORY).json() == before
        assert f'onerec_swaps_total{{kind="{path}",outcome="refused"}} 1.0' in http.get("/metrics").text


def test_weights_that_are_not_finite_are_refused(bundles):
    own = Recommender.from_pretrained(bundles / "model")
    with torch.no_grad():
        next(own.model.parameters()).fill_(float("nan"))
    own.save_pretrained(bundles / "nan")
    with client(bundles=bundles) as http:
        answer = http.post("/model", json={"bundle": "nan"})
        assert answer.status_code == 422 and "scores are NaN" in answer.json()["error"]["message"]
        assert http.post("/recommend", json=HISTORY).json()["version"] == "v1"


def test_other_codebooks_cannot_keep_the_catalogue(bundles):
    with client(bundles=bundles) as http:
        refused = http.post("/model", json={"bundle": "stranger", "catalogue": "keep"})
        assert refused.status_code == 422 and 'Swap with "catalogue": "own"' in refused.json()["error"]["message"]
        assert http.post("/model", json={"bundle": "stranger"}).status_code == 200


CHANGES = [
    ("catalogue", {}, 422, "give one of"),
    ("catalogue", {"bundle": "fewer", "remove": [1000]}, 422, "give one of"),
    ("catalogue", {"bundle": "fewer", "rollback_to": "v1"}, 422, "give one of"),
    ("catalogue", {"bundle": "nowhere"}, 404, "there is no bundle 'nowhere'; there are ['fewer'"),
    ("catalogue", {"bundle": "../fewer"}, 422, "bundle: String should match pattern"),
    ("catalogue", {"bundle": ".fewer"}, 422, "bundle: String should match pattern"),
    ("catalogue", {"bundle": "/etc"}, 422, "bundle: String should match pattern"),
    ("catalogue", {"bundle": ""}, 422, "bundle: String should match pattern"),
    ("catalogue", {"bundle": "fewer", "name": "v1"}, 409, "there is a version or bundle 'v1'"),
    ("catalogue", {"rollback_to": "v7"}, 404, "kept are ['v1']"),
    ("catalogue", {"remove": [5]}, 422, "the first is 5"),
    ("catalogue", {"remove": list(range(1000, 1065))}, 422, "at least one item"),
    ("catalogue", {"remove": [1000, 1000]}, 422, "named twice"),
    ("catalogue", {"remove": [1000.5]}, 422, "remove.0"),
    ("catalogue", {"remove": [1000], "fingerprint": "0123"}, 409, "the change is for 0123"),
    ("catalogue", {"items": [{"item_id": 7}]}, 422, "item 7 is new and has no embedding"),
    ("catalogue", {"items": [NEW, NEW]}, 422, "named twice"),
    ("catalogue", {"items": [NEW], "remove": [7]}, 422, "named twice"),
    ("catalogue", {"items": [NEW | {"item_id": "x"}]}, 422, "the new ones text"),
    ("catalogue", {"items": [NEW | {"item_id": 2**70}]}, 422, "64 bits"),
    ("catalogue", {"items": [NEW | {"item_id": None}]}, 422, "items.0.item_id"),
    ("catalogue", {"items": [NEW | {"embedding": [0.5, 1.0]}]}, 422, "width 2"),
    ("catalogue", {"items": [NEW | {"embedding": []}]}, 422, "width 0"),
    ("catalogue", {"items": [NEW | {"embedding": ["a"]}]}, 422, "items.0.embedding.0"),
    ("catalogue", {"items": [NEW, NEW | {"item_id": 8, "embedding": [1.0]}]}, 422, "[1, 6] numbers"),
    ("catalogue", {"items": [NEW | {"metadata": {"score": 1}}]}, 422, "fields of a recommendation"),
    ("catalogue", {"items": [NEW | {"metadata": "title"}]}, 422, "items.0.metadata"),
    ("catalogue", {"items": [NEW | {"title": "x"}]}, 422, "items.0.title"),
    ("catalogue", {"remove": [1000] * 66}, 422, "at most 65 items"),
    ("model", {}, 422, "give one of"),
    ("model", {"bundle": "model", "rollback_to": "v1"}, 422, "give one of"),
    ("model", {"bundle": "nowhere"}, 404, "there is no bundle 'nowhere'"),
    ("model", {"bundle": "model", "name": "v1"}, 409, "there is a version or bundle 'v1'"),
    ("model", {"bundle": "model", "catalogue": "other"}, 422, "'own' or 'keep'"),
    ("model", {"bundle": "a b"}, 422, "bundle: String should match pattern"),
    ("model", {"rollback_to": "v7"}, 404, "kept are ['v1']"),
    ("model", {"repo": "model"}, 422, "repo"),
]


@pytest.fixture(scope="module")
def unchanged(made):
    """A service that refuses everything that is asked of it."""
    with client(bundles=made, max_changes=65) as http:
        yield http, http.post("/recommend", json=HISTORY).json()


@pytest.mark.parametrize(("path", "body", "status", "message"), CHANGES)
def test_a_bad_change(unchanged, path, body, status, message):
    http, before = unchanged
    answer = http.post(f"/{path}", json=body)
    assert answer.status_code == status and message in answer.json()["error"]["message"], answer.text
    assert http.post("/recommend", json=HISTORY).json() == before


def test_without_bundles_nothing_is_read_from_disk():
    with client() as http:
        answer = http.post("/model", json={"bundle": "model"})
        assert answer.status_code == 422 and "start it with --bundles FOLDER" in answer.json()["error"]["message"]
        assert http.post("/catalogue", json={"remove": [1000]}).json()["name"] == "v2"


def test_a_model_with_item_features_gets_no_new_items_but_may_lose_some():
    own = recommender(with_reranker=False, item_features={"kind": np.arange(65) % 3})
    with client(own) as http:
        refused = http.post("/catalogue", json={"items": [NEW]})
        assert refused.status_code == 422 and "item features ['kind']" in refused.json()["error"]["message"]
        assert http.post("/catalogue", json={"remove": [1000]}).status_code == 200
        found = http.app.state.service.versions.current.recommender
        same(http.post("/recommend", json={"histories": [[1002]]}).json()["results"], found.recommend([[1002]]))
    assert found.ranker.collator.item_features["kind"].tolist() == (np.arange(1, 65) % 3).tolist()


def test_a_request_ends_on_the_version_it_began_with(tmp_path):
    """What waits in the queue while the version changes is answered by the old one, in a search of its own."""
    own = recommender()
    service = application(own, max_rows=8).state.service
    stuck = Stuck(service)
    expected = copy.copy(own).recommend(**HISTORY)

    async def run():
        body = RecommendBody(**HISTORY)
        tasks = [asyncio.create_task(service.recommend(body, never))]
        await asyncio.to_thread(stuck.started.wait)
        tasks.append(asyncio.create_task(service.recommend(body, never)))  # waits
        await asyncio.sleep(0)
        best = expected[0][0].item_id
        await service.change_catalogue(CatalogueBody(items=[], remove=[best], name="without"))
        tasks.append(asyncio.create_task(service.recommend(body, never)))
        await asyncio.sleep(0)
        stuck.go.set()
        return best, await asyncio.gather(*tasks)

    best, found = asyncio.run(run())
    assert [version.name for version, _ in found] == ["v1", "v1", "without"]
    firsts = [[one.item_id for one in answer.lists[0]] for _, answer in found]
    assert firsts[0] == firsts[1] == [one.item_id for one in expected[0]] and best not in firsts[2]
    assert [answer.batch_rows for _, answer in found] == [1, 1, 1]


def test_one_swap_at_a_time(bundles, monkeypatch):
    from onerec_hf.serving import service as module

    service = application(bundles=bundles).state.service
    stuck = Stuck(service)
    monkeypatch.setattr(module, "rehearse", lambda found: stuck.go.wait(30))

    async def run():
        first = asyncio.create_task(service.change_catalogue(CatalogueBody(remove=[1000])))
        await asyncio.sleep(0.05)
        with pytest.raises(module.Refused, match="another version is being loaded") as refused:
            await service.change_catalogue(CatalogueBody(remove=[1001]))
        stuck.go.set()
        return refused.value.status_code, (await first).name

    assert asyncio.run(run()) == (409, "v2")
