"""Re-ranking: candidates and features against plain loops, fitted weights, files, serving, and what is refused."""

import json
import shutil

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import pipeline

from onerec_hf.baselines import CoOccurrence, SASRec
from onerec_hf.data import DataFolder, load_splits
from onerec_hf.models import RecommendedItems
from onerec_hf.recommender import Recommender
from onerec_hf.reranker import Reranker
from onerec_hf.semantic_ids import ResidualKMeans

from .numeric import assert_close
from .rewards.test_reward_model import reward_of
from .test_recommender import HISTORIES, ids, recommender_of, same
from .tiny import tiny_catalogue

LOGS = [[0, 1, 2, 3], [3, 1, 2, 9], [10, 11, 12, 1], [2, 9, 30]]
BEAM = RecommendedItems(
    torch.tensor([[5, 9, 7], [40, 2, -1]]), torch.tensor([[-1.0, -2.0, -4.0], [-0.5, -3.0, -torch.inf]])
)


def scorers():
    torch.manual_seed(0)
    return {"counter": CoOccurrence(65).fit(LOGS), "sasrec": SASRec(65, hidden_size=8, max_length=6)}


def weights(**own):
    names = Reranker(scorers()).features
    return {kind: dict.fromkeys(names, 0.0) | own for kind in ("kept", "masked")}


@pytest.mark.parametrize("masked", [False, True])
def test_candidates_and_features_as_plain_loops_make_them(masked):
    catalogue, histories = tiny_catalogue(), [[1, 2], []]
    catalogue.popularity = np.arange(65.0)
    allowed = torch.ones(2, 65, dtype=torch.bool)
    allowed[0, [1, 2]] = False
    reranker = Reranker(scorers(), num_candidates=2)
    items, features = reranker.candidates(BEAM, histories, catalogue, allowed if masked else None)
    for row in range(2):
        every = {name: scorer.score_items({"history": histories})[row] for name, scorer in reranker.scorers.items()}
        beam = {int(i): float(s) for i, s in zip(BEAM.items[row], BEAM.scores[row]) if i >= 0}
        wanted = dict.fromkeys(beam)
        for own in every.values():
            free = [i for i in range(65) if own[i] > -torch.inf and (allowed[row, i] or not masked)]
            wanted |= dict.fromkeys(sorted(free, key=lambda i: -own[i])[:2])
        found = [i for i in items[row].tolist() if i >= 0]
        assert sorted(found) == sorted(wanted) and found[: len(beam)] == list(beam)
        parts = {
            i: [beam.get(i, min(beam.values())), *(max(float(own[i]), -20) for own in every.values())] for i in found
        }
        highest = [max(column) for column in zip(*parts.values())]
        for item, numbers in zip(found, features[row]):
            assert_close(numbers[:3], torch.tensor(parts[item]))
            shares = [np.exp(part - top) for part, top in zip(parts[item], highest)]
            assert_close(numbers[3:6], torch.tensor(shares, dtype=torch.float))
            absent, popularity, seen = numbers[6:].tolist()
            assert popularity == pytest.approx(np.log1p(item)) and absent == (item not in beam)
            assert seen == (item in histories[row])


def test_without_a_search_the_scorers_alone_propose_and_judge():
    """The same numbers as with one, for the items that they propose."""
    catalogue, histories = tiny_catalogue(), [[1, 2], [3]]
    whole, alone = Reranker(scorers(), num_candidates=3), Reranker(scorers(), num_candidates=3, search=False)
    assert alone.features == tuple(name for name in whole.features if "codes" not in name and "beam" not in name)
    items, features = alone.candidates(None, histories, catalogue)
    with_search, its_features = whole.candidates(BEAM, histories, catalogue)
    columns = [whole.features.index(name) for name in alone.parts]
    for row in range(2):
        places = {int(item): place for place, item in enumerate(with_search[row]) if item >= 0}
        own = [int(item) for item in items[row] if item >= 0]
        every = [scorer.score_items({"history": histories})[row].topk(3) for scorer in alone.scorers.values()]
        assert set(own) == {int(i) for best in every for i, s in zip(best.indices, best.values) if s > -torch.inf}
        assert_close(features[row, : len(own), :2], its_features[row][[places[item] for item in own]][:, columns])
    with pytest.raises(ValueError, match="this re-ranker has search=False"):
        alone.candidates(BEAM, histories, catalogue)
    with pytest.raises(ValueError, match="found=None, and this re-ranker has search=True"):
        whole.candidates(None, histories, catalogue)
    with pytest.raises(ValueError, match="there must be scorers"):
        Reranker({}, search=False)


def test_scorers_say_log_probabilities():
    """Of the counter, log shares by hand: after item 1, item 2 was seen twice next to it, as often as any other."""
    counter = CoOccurrence(65, window=1, backward_weight=0.0).fit(LOGS)
    found = counter.score_items({"history": [[1], []]})
    # M[1, 2] = 2 and nothing else follows item 1
    assert found[0, 2] == 0.0 and torch.isinf(found[0]).sum() == 64 and torch.isinf(found[1]).all()
    sasrec = scorers()["sasrec"].score_items({"history": [[1, 2], [], [7]]})
    assert_close(sasrec[[0, 2]].exp().sum(1), torch.ones(2))
    assert torch.isinf(sasrec[1]).all()  # it needs an item


def test_fitted_weights_are_the_best():
    """Choices drawn from known weights: the fit finds them, and no neighbour has a higher likelihood."""
    generator = torch.Generator().manual_seed(0)
    items = torch.arange(20).repeat(4000, 1)
    items[:, 15:] = -1  # some users have fewer
    features = torch.randn(4000, 20, 9, generator=generator)
    features[..., 8] = 3.0  # says nothing
    true = torch.tensor([0.8, -0.5, 0.3, 0.0, 1.5, 0.2, 0.0, -1.0, 0.0])
    choice = (features @ true).masked_fill(items < 0, -torch.inf).softmax(1).multinomial(1, generator=generator)
    reranker = Reranker(scorers())
    found = reranker.fit(items, features, [[int(i), 64] for i in choice], "kept")  # 64 is no candidate
    estimate = torch.tensor([found[name] for name in reranker.features])
    assert (estimate - true).abs().max() < 0.1  # its standard error is about 1 / sqrt(4,000 x .9)

    def likelihood(own):
        return (features @ own).masked_fill(items < 0, -torch.inf).log_softmax(1).gather(1, choice).mean()

    for i in range(8):
        for step in (-0.05, 0.05):
            moved = estimate.clone()
            moved[i] += step
            assert likelihood(moved) < likelihood(estimate)
    with pytest.raises(ValueError, match="no target of the 2 users is among their candidates"):
        reranker.fit(items[:2], features[:2], [[64], [63]], "kept")


def test_ranks_by_the_sum_and_fills_with_none():
    reranker = Reranker(scorers(), weights(popularity=2.0, seen=-100.0))
    items, features = torch.tensor([[4, 8, 6], [3, -1, -1]]), torch.zeros(2, 3, 9)
    features[0, :, 7], features[0, 1, 8] = torch.tensor([1.0, 9.0, 5.0]), 1.0
    found = reranker.rank(items, features, 4, "kept")
    assert found.items.tolist() == [[6, 4, 8, -1], [3, -1, -1, -1]]
    assert found.scores[0, :3].tolist() == [10.0, 2.0, -82.0] and found.scores[1, 1] == -torch.inf
    with pytest.raises(ValueError, match="no weights 'masked' yet"):
        Reranker(scorers(), {"kept": weights()["kept"]}).rank(items, features, 1, "masked")


def test_a_served_recommender_uses_it_and_can_do_without(tmp_path):
    recommender = recommender_of()
    alone = recommender.recommend(HISTORIES, k=5)
    recommender.ranker.reranker = Reranker(scorers(), weights(**{"codes": 1.0, "not in the beam": -50.0}))
    same(recommender.recommend(HISTORIES, k=5), alone)  # the codes alone decide, and what the beam lacks comes last
    recommender.ranker.reranker = Reranker(scorers(), weights(sasrec=1.0), num_candidates=60)
    found = recommender.recommend(HISTORIES[:2], k=5, exclude_seen=True)
    histories = [[0, 1, 2], [63]]
    expected = scorers()["sasrec"].recommend({"history": histories}, 5, exclude_seen=True)
    assert ids(found) == (1000 + expected).tolist()
    same(recommender.recommend(HISTORIES, k=5, rerank=False), alone)
    only = recommender.recommend(HISTORIES[:1], k=9, allow=[1003, 1004, 1050])
    assert sorted(ids(only)[0]) == [1003, 1004, 1050]
    recommender.save_pretrained(tmp_path)
    loaded = Recommender.from_pretrained(tmp_path, num_beams=20)
    same(loaded.recommend(HISTORIES[:2], k=5, exclude_seen=True), found)
    rows = {"user": [0, 1], "history": histories}
    assert np.array_equal(loaded.ranker.recommend(rows, 5, exclude_seen=True), expected)


def test_items_come_and_go():
    """Scorers know the items they were trained on, wherever these stand in the catalogue now."""
    recommender = recommender_of()
    recommender.ranker.reranker = Reranker(scorers(), weights(sasrec=1.0), num_candidates=60)
    before = recommender.recommend([[1001, 1002]], k=65)[0]
    recommender.remove_items([1000, 1005])
    after = recommender.recommend([[1001, 1002]], k=65)[0]
    assert [item.item_id for item in after] == [i.item_id for i in before if i.item_id not in (1000, 1005)]
    recommender.ranker.reranker.follow(np.arange(63), 2)
    assert recommender.ranker.reranker.positions.tolist()[-3:] == [64, -1, -1]


def test_the_repository_travels_with_its_scorers(tmp_path, hub):
    recommender = recommender_of()
    recommender.ranker.reranker = Reranker(scorers(), weights(counter=1.0))
    recommender.push_to_hub("org/reranked")
    served = Recommender.from_pretrained("org/reranked", num_beams=20)
    same(served.recommend(HISTORIES, k=3), recommender.recommend(HISTORIES, k=3))


def test_an_item_scorer_ranks_what_the_search_found():
    recommender = recommender_of()
    asked = []

    def smallest_id(histories, items):
        asked.append((histories, [len(own) for own in items]))
        return [[-item for item in own] for own in items]

    found = recommender.recommend(HISTORIES, k=3, item_scorer=smallest_id, num_candidates=7, deny=[1000])
    searched = recommender.recommend(HISTORIES, k=7, deny=[1000])
    assert ids(found) == [sorted(row)[:3] for row in ids(searched)]
    assert found[0][0].score == -found[0][0].item_id
    assert asked == [(HISTORIES, [7, 7, 7])]
    with pytest.raises(ValueError, match="num_candidates=2 with k=3: it needs at least as many as come back"):
        recommender.recommend(HISTORIES, k=3, item_scorer=smallest_id, num_candidates=2)
    with pytest.raises(ValueError, match="num_candidates=9 with k=3: it needs an item_scorer"):
        recommender.recommend(HISTORIES, k=3, num_candidates=9)
    with pytest.raises(ValueError, match=r"returned \[2, 2, 2\] numbers, asked about \[20, 20, 20\]"):
        recommender.recommend(HISTORIES, k=3, item_scorer=lambda histories, items: [[1, 2]] * 3)
    with pytest.raises(ValueError, match=r"item_scorer returned NaN"):
        recommender.recommend(HISTORIES, k=3, item_scorer=lambda h, items: [[np.nan] * len(own) for own in items])
    context = recommender.ranker.collator.context([{"user": 0, "history": [3]}])
    with pytest.raises(ValueError, match=r"item_scorer returned \(1, 2\): a tensor of shape \(1, 20\)"):
        recommender.model.recommend_items(3, num_beams=20, item_scorer=lambda i, s: s[:, :2], **context)


def test_a_reward_model_selects_items_and_sessions():
    """The best of K by the reward: what the Technical Report serves with, and what a loop over all K finds."""
    recommender, reward = recommender_of(), reward_of()
    found = recommender.recommend(HISTORIES, k=2, item_scorer=reward, num_candidates=8)
    for history, row, searched in zip(HISTORIES, found, ids(recommender.recommend(HISTORIES, k=8))):
        values = dict(zip(searched, reward.score([history], [searched])[0]))
        assert [item.item_id for item in row] == sorted(values, key=values.get, reverse=True)[:2]
        assert_close(torch.tensor([i.score for i in row]), torch.tensor([values[i.item_id] for i in row]))
    sessions, judge = recommender_of("onerec"), reward_of(session_wise=True)
    chosen = sessions.recommend(HISTORIES, k=1, session=True, item_scorer=judge, num_candidates=6)
    for history, (best,), searched in zip(HISTORIES, chosen, sessions.recommend(HISTORIES, k=6, session=True)):
        values = {tuple(found.item_ids): judge.score([history], [found.item_ids])[0] for found in searched}
        assert tuple(best.item_ids) == max(values, key=values.get)
    with pytest.raises(ValueError, match="one number for each item of each user is needed"):
        recommender.recommend(HISTORIES, k=2, item_scorer=judge)


def test_the_pipeline_and_the_command_take_an_item_scorer(tmp_path):
    from onerec_hf.scripts import recommend

    recommender, reward = recommender_of(), reward_of()
    recommender.save_pretrained(tmp_path / "model")
    reward.save_pretrained(tmp_path / "reward")
    expected = ids(recommender.recommend(HISTORIES, k=2, item_scorer=reward, num_candidates=8))
    served = pipeline("onerec-recommendation", model=str(tmp_path / "model"), num_beams=20)
    found = served(HISTORIES, k=2, item_scorer=reward, num_candidates=8)
    assert [[item["item_id"] for item in row] for row in found] == expected
    datasets.Dataset.from_dict({"history": HISTORIES}).to_parquet(str(tmp_path / "rows.parquet"))
    places = {
        "repo": str(tmp_path / "model"),
        "dataset": str(tmp_path / "rows.parquet"),
        "output": str(tmp_path / "out"),
    }
    path = recommend.main(
        recommend.RecommendArguments(**places, k=2, num_beams=20, reward=str(tmp_path / "reward"), num_candidates=8)
    )
    assert datasets.Dataset.from_parquet(str(path))["item_ids"][:] == expected


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data folder, a model and two scorers: what `prepare`, `sft` and `baseline` leave."""
    from onerec_hf.scripts import baseline, prepare, sft
    from onerec_hf.trainers import OneRecSFTConfig

    folder, rng = tmp_path_factory.mktemp("rerank"), np.random.default_rng(0)
    rows = [(user, int((user + step * (1 + rng.integers(2))) % 30), step) for user in range(40) for step in range(6)]
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    sizes = {"collaborative_dim": 8, "codebook_size": 8, "num_levels": 2}
    prepare.main(prepare.PrepareArguments(source=log, output=str(folder / "data"), **sizes))
    model = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    arguments = sft.ModelArguments(str(folder / "data"), model=json.dumps(model | {"context_embed_dim": 4}))
    sft.main(arguments, OneRecSFTConfig(str(folder / "model"), max_steps=4, report_to="none"))
    fits = {"cooccurrence": {}, "sasrec": {"num_epochs": 1}, "popularity": {}}
    for name, fit in fits.items():
        settings = {"fit": json.dumps(fit), "model": '{"hidden_size": 8}' if name == "sasrec" else "{}"}
        baseline.main(baseline.BaselineArguments(name, str(folder / "data"), str(folder / name), **settings))
    return folder


def test_the_command_fits_on_validation_and_saves_with_the_model(trained, tmp_path):
    from onerec_hf.scripts import rerank, score

    shutil.copytree(trained / "model", tmp_path / "model")
    before = json.loads((tmp_path / "model" / "metrics.json").read_text(encoding="utf-8"))
    settings = {"model": str(tmp_path / "model"), "data": str(trained / "data"), "num_beams": 20}
    settings["scorers"] = [str(trained / name) for name in ("cooccurrence", "sasrec")]
    report = rerank.main(rerank.RerankArguments(**settings))
    assert report["search_alone"]["test"] == before["test"]
    fitted = report["reranker"]["kept"]
    assert set(fitted["weights"]) >= {"codes", "cooccurrence", "sasrec, of the best"}
    parts = {"all", "without codes", "without cooccurrence", "without sasrec"}
    assert set(fitted["recall@10 of half of the users"]) == parts
    # the report is of what is served from the folder
    served = Recommender.from_pretrained(tmp_path / "model", num_beams=20)
    test = load_splits(trained / "data")["test"]
    names = served.model.catalogue.item_ids
    found = served.recommend([names[history].tolist() for history in test["history"]], k=10)
    hits = [names[own[0]] in [item.item_id for item in row] for own, row in zip(test["targets"], found)]
    assert report["test"]["recall@10"] == pytest.approx(np.mean(hits))
    again = rerank.main(rerank.RerankArguments(**settings))  # the search alone stays what it was
    assert again["search_alone"] == report["search_alone"]
    scored = score.main(score.ScoreArguments(settings["model"], settings["data"], num_beams=20))
    assert scored["test"] == pytest.approx(report["test"])  # of what is served
    few = rerank.main(rerank.RerankArguments(**settings, test_users=5))  # both are of the same users
    assert few["search_alone"]["test"]["num_users"] == few["test"]["num_users"] == 5
    model_files = {path.name for path in (trained / "model").iterdir()}
    settings |= {"model": str(trained / "model"), "output": str(tmp_path / "copy")}
    assert rerank.main(rerank.RerankArguments(**settings))["test"] == pytest.approx(report["test"])
    assert (tmp_path / "copy" / "reranker.json").is_file()  # and the model's folder is as it was
    assert {path.name for path in (trained / "model").iterdir()} == model_files
    with pytest.raises(ValueError, match=r"nothing to re-rank with: .* has no item head and reads no item vectors"):
        rerank.main(rerank.RerankArguments(**settings | {"scorers": []}))
    with pytest.raises(ValueError, match=r"popularity holds no baseline that can score items"):
        rerank.main(rerank.RerankArguments(**settings | {"scorers": [str(trained / "popularity")]}))


def test_a_model_is_reranked_by_the_item_vectors_that_it_reads(trained, tmp_path):
    """As by the baseline of the same vectors, which needs a folder of its own."""
    from onerec_hf.scripts import baseline, rerank, sft
    from onerec_hf.trainers import OneRecSFTConfig

    data, folder = str(trained / "data"), tmp_path / "model"
    model = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    arguments = sft.ModelArguments(data, model=json.dumps(model | {"context_embed_dim": 4}), item_vectors=True)
    sft.main(arguments, OneRecSFTConfig(str(folder), max_steps=4, report_to="none"))
    settings = {"model": str(folder), "data": data, "num_beams": 20}
    own = rerank.main(rerank.RerankArguments(**settings, output=str(tmp_path / "own")))
    assert set(own["reranker"]["kept"]["recall@10 of half of the users"]) == {
        "all",
        "without codes",
        "without item vectors",
    }
    assert not (tmp_path / "own" / "scorers").exists()
    baseline.main(baseline.BaselineArguments("embeddingknn", data, str(tmp_path / "neighbours")))
    settings |= {"scorers": [str(tmp_path / "neighbours")], "output": str(tmp_path / "given")}
    given = rerank.main(rerank.RerankArguments(**settings))  # these are the same neighbours: once is enough
    assert "item vectors" not in given["reranker"]["kept"]["weights"]
    assert own["test"]["recall@10"] == pytest.approx(given["test"]["recall@10"], abs=0.03)  # one user of 40
    served = [Recommender.from_pretrained(tmp_path / name, num_beams=20) for name in ("own", "given")]
    histories = [[item, item + 1] for item in served[0].model.catalogue.item_ids[:20].tolist()]
    parts = [each.ranker.reranker._scores([[3, 4], [7]], None) for each in served]
    torch.testing.assert_close(parts[0]["item vectors"], parts[1]["neighbours"], rtol=1e-4, atol=1e-4)
    served[0].save_pretrained(tmp_path / "saved")
    again = Recommender.from_pretrained(tmp_path / "saved", num_beams=20)
    assert again.recommend(histories, k=5) == served[0].recommend(histories, k=5)
    with pytest.raises(ValueError, match=r"has the item vectors of its model as a scorer, and got no model: pass"):
        Reranker.from_pretrained(tmp_path / "saved")
    other = Recommender.from_pretrained(trained / "model").model
    with pytest.raises(ValueError, match=r"got a OneRecV2ForCausalLM that reads no item vectors"):
        Reranker.from_pretrained(tmp_path / "saved", other)
    settings |= {"scorers": [str(trained / "cooccurrence")], "item_vectors": False}
    without = rerank.main(rerank.RerankArguments(**settings))
    assert "item vectors" not in without["reranker"]["kept"]["weights"]


def test_the_command_combines_scorers_without_a_model(trained, tmp_path):
    from onerec_hf.scripts import rerank

    settings = {"data": str(trained / "data"), "output": str(tmp_path / "ensemble")}
    names = ["cooccurrence", "sasrec"]
    report = rerank.main(rerank.RerankArguments(**settings, scorers=[str(trained / name) for name in names]))
    assert set(report["reranker"]["kept"]["recall@10 of half of the users"]) == {
        "all",
        "without cooccurrence",
        "without sasrec",
    }
    # one user by hand: the sum of the weighted features orders the candidates
    test = load_splits(trained / "data")["test"]
    kinds = (CoOccurrence, SASRec)
    known = {name: kind.from_pretrained(trained / name / "model") for name, kind in zip(names, kinds)}
    weights = {kind: report["reranker"][kind]["weights"] for kind in ("kept", "masked")}
    reranker, catalogue = Reranker(known, weights, search=False), DataFolder(trained / "data").catalogue
    lists = datasets.Dataset.from_parquet(str(tmp_path / "ensemble" / "predictions.parquet"))
    ranked = reranker(None, test["history"][:3], catalogue, 10, "kept").items.tolist()
    assert [row[:10] for row in lists["predictions"][:3]] == ranked
    masked = datasets.Dataset.from_parquet(str(tmp_path / "ensemble" / "predictions_exclude_seen.parquet"))
    for history, row in zip(test["history"], masked["predictions"]):
        assert not set(history) & set(row)
    with pytest.raises(ValueError, match="without a model, give scorers and an output"):
        rerank.main(rerank.RerankArguments(**settings))


def test_scorers_are_of_the_same_items_in_the_same_order(trained, tmp_path):
    """A baseline knows items by number: of another folder with as many items, it would rank others."""
    from onerec_hf.scripts import baseline, prepare, rerank

    rows = [(user, int((user + step) % 30), step) for user in range(40) for step in range(6)]
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    items, turned = pd.DataFrame({"item_id": range(30)}), tmp_path / "turned"
    sizes = {"collaborative_dim": 8, "codebook_size": 8, "num_levels": 2}
    prepare.main(prepare.PrepareArguments(source=log, items=items.iloc[::-1], output=str(turned), **sizes))
    ids = [list(DataFolder(folder).items["item_id"]) for folder in (trained / "data", turned)]
    assert sorted(ids[0]) == sorted(ids[1]) and ids[0] != ids[1]
    baseline.main(baseline.BaselineArguments("cooccurrence", str(turned), str(tmp_path / "counter")))
    settings = {"data": str(trained / "data"), "output": str(tmp_path / "out")}
    scorers = [str(trained / "sasrec"), str(tmp_path / "counter")]
    with pytest.raises(
        ValueError, match=r"counter knows 30 items, \S+data has as many, and they are others, or the same"
    ):
        rerank.main(rerank.RerankArguments(**settings, scorers=scorers))
    assert not (tmp_path / "out").exists()
    # of an earlier version, nothing but the number is known
    old = shutil.copytree(trained / "cooccurrence", tmp_path / "old")
    report = json.loads((old / "metrics.json").read_text(encoding="utf-8"))
    del report["item_fingerprint"]
    (old / "metrics.json").write_text(json.dumps(report), encoding="utf-8")
    settings |= {"scorers": [str(old), str(trained / "sasrec")], "fit_users": 4, "test_users": 4}
    said = said_by("baseline", lambda: rerank.main(rerank.RerankArguments(**settings)))
    assert len(said) == 1 and f"{old}: nothing there says of which items" in said[0] and "cannot be checked" in said[0]
    assert not said_by("baseline", lambda: rerank.main(rerank.RerankArguments(**settings | {"scorers": scorers[:1]})))


def said_by(script, call):
    """What a script of the package warns of."""
    import logging

    said, logger = [], logging.getLogger(f"onerec_hf.scripts.{script}")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    try:
        call()
    finally:
        logger.removeHandler(handler)
    return said


def test_what_a_reranker_refuses(tmp_path):
    with pytest.raises(TypeError, match=r"the scorers \['mine'\] have no `score_items"):
        Reranker({"mine": object()})
    with pytest.raises(ValueError, match=r"weights\['kept'\] has \['sasrec'\], the features are"):
        Reranker(scorers(), {"kept": {"sasrec": 1.0}})
    with pytest.raises(ValueError, match="num_candidates=0: at least 1"):
        Reranker(scorers(), num_candidates=0)

    class Mine(CoOccurrence):
        pass

    with pytest.raises(ValueError, match=r"the scorers \['mine'\] are no baselines of this package"):
        Reranker({"mine": Mine(65).fit(LOGS)}).save_pretrained(tmp_path)


def test_a_model_that_is_trained_anew_has_no_old_reranker(trained, tmp_path):
    """Neither in the folder that is trained over, nor where a policy with a re-ranker is aligned."""
    from onerec_hf.data import DataFolder
    from onerec_hf.scripts import ending, model_arguments

    shutil.copytree(trained / "model", tmp_path / "model")
    reranker = Reranker({"counter": CoOccurrence(30).fit(LOGS[:1])})
    for kind in ("kept", "masked"):
        reranker.weights[kind] = dict.fromkeys(reranker.features, 1.0)
    reranker.save_pretrained(tmp_path / "model")
    data = DataFolder(trained / "data")
    assert Recommender.from_pretrained(tmp_path / "model").ranker.reranker is not None
    assert model_arguments.load_policy(str(tmp_path / "model"), data, 20).ranker.reranker is None
    ending.remove_earlier_results(tmp_path / "model")
    assert not (tmp_path / "model" / "reranker.json").exists()
    assert not list((tmp_path / "model" / "scorers").glob("*/*"))


def test_nothing_of_an_earlier_recommender_stays(tmp_path):
    """Its re-ranker, metadata and codebooks would be taken for those of the model that is saved there now."""
    first, second = (recommender_of("v2", num_beams=20) for _ in range(2))
    values = torch.rand(65) + 0.5
    names = Reranker(scorers(), item_values=values).features
    fitted = {kind: dict.fromkeys(names, 1.0) for kind in ("kept", "masked")}
    first.ranker.reranker = Reranker(scorers(), fitted, item_values=values)
    second.metadata = {}
    first.metadata = {1000: {"title": "one"}}
    first.quantizer = ResidualKMeans(1, 2, num_iterations=1, balanced=False).fit(torch.randn(9, 3))
    first.save_pretrained(tmp_path)
    again = Recommender.from_pretrained(tmp_path)
    assert again.ranker.reranker is not None and again.metadata and again.quantizer is not None
    second.save_pretrained(tmp_path)
    again = Recommender.from_pretrained(tmp_path)
    assert again.ranker.reranker is None and again.metadata == {} and again.quantizer is None
    left = {path.name for path in tmp_path.iterdir()}
    assert not left & {"reranker.json", "scorers", "item_values.safetensors", "items.jsonl", "quantizer.safetensors"}
