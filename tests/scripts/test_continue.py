"""`onerec sft --continue_from`: new items, frozen codebooks, the state of the optimizer, and what is refused."""

import json
import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from onerec_hf import OneRecV2Config
from onerec_hf.data import DataFolder
from onerec_hf.recommender import Recommender
from onerec_hf.scripts import prepare, sft
from onerec_hf.simulator import ShortVideoWorld
from onerec_hf.simulator.population import DAY_MS
from onerec_hf.trainers import OneRecSFTConfig
from onerec_hf.trainers.optimizer_state import OPTIMIZER_NAME

from ..numeric import assert_close
from ..recipe_desk import RECIPES, ROOT, run

COLUMNS = {"user_id": "user_id", "item_id": "video_id", "timestamp": "time_ms"}
MODEL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "context_embed_dim": 8, "dropout": 0.0}
TRAINING = {"report_to": "none", "save_strategy": "no", "learning_rate": 3e-3, "use_cpu": True, "disable_tqdm": True}
TRAINING |= {"per_device_train_batch_size": 32, "lr_scheduler_type": "constant"}


CONFIG = OneRecV2Config(codebook_sizes=[16] * 3, hidden_size=8, num_attention_heads=1)


class Days:
    """A world of eight days, with the data folder of each day: everything until then, its last quarter held out."""

    def __init__(self, folder):
        self.folder = folder
        self.world = ShortVideoWorld(num_users=120, num_items=160, num_days=8, mean_events=60, seed=5)
        log = self.world.logs()
        self.log = log[log.long_view == 1]

    def start(self, day, share=0.0):
        return self.world.start_time_ms + (day + share) * DAY_MS

    def prepare(self, day, name=None, **settings):
        videos = self.world.items[self.world.items.upload_day < day]
        log = self.log[(self.log.time_ms < self.start(day)) & self.log.video_id.isin(videos.video_id)]
        place = self.folder / (name or f"data_{day}")
        place.mkdir()
        log.to_parquet(place / "log.parquet")
        videos.to_parquet(place / "videos.parquet")
        np.save(place / "content.npy", self.world.content_embeddings[videos.video_id])
        settings = {"columns": COLUMNS, "items": str(place / "videos.parquet"), "collaborative_dim": 0} | settings
        if "semantic_ids_from" not in settings:
            settings |= {"codebook_size": 16}
        report = prepare.main(
            prepare.PrepareArguments(
                source=str(place / "log.parquet"),
                output=str(place),
                embeddings=str(place / "content.npy"),
                validation_start=self.start(day, -0.5),
                test_start=self.start(day, -0.25),
                **settings,
            )
        )
        return place, report

    def sft(self, data, name, epochs=2, **settings):
        training = OneRecSFTConfig(output_dir=str(self.folder / name), num_train_epochs=epochs, **TRAINING)
        arguments = sft.ModelArguments(data=str(data), num_beams=20, **settings)
        return self.folder / name, sft.main(arguments, training)


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    """The first five days: their data and a model with all that has rows of items."""
    own = Days(tmp_path_factory.mktemp("days"))
    own.data, _ = own.prepare(5)
    features = {"item_vectors": True, "item_features": ["category"], "metadata": ["title"]}
    model = MODEL | {"item_head_dim": 4}
    own.model, _ = own.sft(own.data, "day_5", model=json.dumps(model), keep_optimizer=True, **features)
    own.next_data, own.next_report = own.prepare(7, semantic_ids_from=str(own.model))
    return own


def test_new_items_get_codes_and_the_others_keep_theirs(days):
    before, now = DataFolder(days.data).catalogue, DataFolder(days.next_data).catalogue
    places = before.index_of(now.item_ids, "ignore")
    new = places < 0
    assert 5 < new.sum() == days.next_report["appended items"] and days.next_report["items that left"] == 0
    assert torch.equal(now.semantic_ids[~new], before.semantic_ids[places[~new]])
    assert now.num_semantic_ids == now.num_items  # next_free: no two share one
    vectors = [DataFolder(data).item_embeddings for data in (days.data, days.next_data)]
    assert_close(torch.from_numpy(vectors[1][~new]), torch.from_numpy(vectors[0][places[~new]]))  # as they were
    nearest = DataFolder(days.next_data).quantizer.encode(
        torch.from_numpy(DataFolder(days.next_data).item_embeddings[new])
    )
    assert torch.equal(now.semantic_ids[new][:, :-1].long(), nearest[:, :-1])  # the last one alone may move


def test_a_continued_model_recommends_new_items(days):
    start = days.start(5, -0.5)
    folder, report = days.sft(
        days.next_data, "day_7", epochs=8, continue_from=str(days.model), start=start, keep_optimizer=True
    )
    drift = json.loads((folder / "metrics.json").read_text())["drift"]
    assert drift == report["drift"] and drift["items"]["appended"] == days.next_report["appended items"]
    data = DataFolder(days.next_data)
    known = set(DataFolder(days.data).catalogue.item_ids.tolist())
    # by hand: of the training events since `start`, and of the test's, those on new items
    events = days.log[(days.log.time_ms >= start) & (days.log.time_ms < days.start(7, -0.5))]
    events = events[events.video_id.isin(data.catalogue.item_ids)]
    assert drift["unseen_share"]["train"] == pytest.approx((~events.video_id.isin(known)).mean())
    assert 0 < drift["unseen_share"]["test"] < 1
    for when in ("before", "after"):
        assert 0 <= drift["next_day"][when]["recall@10"] <= 1 and drift["calibration"][when]["error"] < 0.5
    assert all(0 <= each <= 1 for each in drift["code_usage"]["distance"])

    new = [item for item in data.catalogue.item_ids.tolist() if item not in known]
    histories = [data.catalogue.item_ids[row["history"]].tolist() for row in data.splits["test"]]
    found = Recommender.from_pretrained(folder, num_beams=20).recommend(histories, k=10)
    assert {one.item_id for row in found for one in row} & set(new)
    assert all(one.metadata["title"] for row in found for one in row)


def test_training_starts_from_the_targets_of_the_new_days(days, tmp_path):
    """With a learning rate of nothing the model is the old one; `start` leaves out what was trained on before."""
    rows = sft.training_rows(DataFolder(days.next_data).splits["train"], CONFIG, 50, start=days.start(5))
    assert min(rows["session_start"]) >= days.start(5) and max(map(len, rows["history"])) > 5
    events = days.log[(days.log.time_ms >= days.start(5)) & (days.log.time_ms < days.start(7, -0.5))]
    firsts = days.log.groupby("user_id").time_ms.min()
    has_history = events.time_ms > events.user_id.map(firsts)
    known = events.video_id.isin(DataFolder(days.next_data).catalogue.item_ids)
    assert abs(len(rows) - (has_history & known).sum()) <= 2  # a user's first event may be on an item that is left out


def test_weights_of_known_items_are_kept(days):
    from onerec_hf.scripts.continued import continued

    args = sft.ModelArguments(data=str(days.next_data), continue_from=str(days.model), num_beams=20)
    old, new = Recommender.from_pretrained(days.model), continued(args, DataFolder(days.next_data))
    places = old.model.catalogue.index_of(new.model.catalogue.item_ids, "ignore")
    known = np.flatnonzero(places >= 0)
    for name in ("item_head.items.weight", "model.context_processor.embed_features.tables.1.weight"):
        skip = int("embed" in name)  # row 0 is "unknown"
        ours, theirs = new.model.state_dict()[name][skip:], old.model.state_dict()[name][skip:]
        torch.testing.assert_close(ours[known], theirs[places[known]], rtol=1e-4, atol=1e-5)
    category = dict(zip(days.world.items.video_id, days.world.items.category))
    features = [recommender.ranker.collator.item_features["category"] for recommender in (old, new)]
    meaning = {category[item]: code for item, code in zip(old.model.catalogue.item_ids, features[0])}
    expected = [meaning.get(category[item], 0) for item in new.model.catalogue.item_ids]
    assert features[1].tolist() == expected


def test_the_state_of_the_optimizer_goes_on_or_not(days):
    """Adam's count of steps tells how long a state has been trained."""
    settings = {"continue_from": str(days.model), "start": days.start(6), "score": False}
    steps = {}
    before = load_file(days.model / OPTIMIZER_NAME)["model.decoder.norm.weight::step"].item()
    for keep in (True, False):
        folder, _ = days.sft(days.next_data, f"kept_{keep}", epochs=1, keep_optimizer=keep, **settings)
        assert (folder / OPTIMIZER_NAME).is_file() == keep
        steps[keep] = folder
    rows = len(sft.training_rows(DataFolder(days.next_data).splits["train"], CONFIG, 50, start=days.start(6)))
    after = load_file(steps[True] / OPTIMIZER_NAME)["model.decoder.norm.weight::step"].item()
    assert after == before + math.ceil(rows / TRAINING["per_device_train_batch_size"])
    with pytest.raises(FileNotFoundError, match=r"no optimizer.safetensors.*--keep_optimizer"):
        days.sft(days.next_data, "none", keep_optimizer=True, **settings | {"continue_from": str(steps[False])})


def test_other_codebooks_are_refused_before_training(days):
    other, _ = days.prepare(6, name="other", seed=1)
    with pytest.raises(ValueError, match=r"codebooks .* the codes of the one mean nothing.*--semantic_ids_from"):
        days.sft(other, "refused", continue_from=str(days.model))
    assert not (days.folder / "refused").exists()


def test_what_belongs_to_the_model_is_refused(days):
    with pytest.raises(ValueError, match=r"brings its own \['model', 'item_vectors'\]"):
        days.sft(
            days.next_data, "refused", continue_from=str(days.model), model='{"hidden_size": 8}', item_vectors=True
        )
    with pytest.raises(ValueError, match="no target is so late"):
        days.sft(days.next_data, "refused", continue_from=str(days.model), start=days.start(9))
    with pytest.raises(ValueError, match=r"leave out \['codebook_size'\]"):
        days.prepare(8, name="sized", semantic_ids_from=str(days.model), codebook_size=8)
    with pytest.raises(ValueError, match="--collaborative_dim 0"):
        days.prepare(8, name="dim", semantic_ids_from=str(days.model), collaborative_dim=8)


def test_the_page_runs(days, tmp_path, monkeypatch):
    """Two days as docs/loop.md has them, from the tables that it names."""
    page = (ROOT / "docs" / "loop.md").read_text(encoding="utf-8")
    block = re.findall(r"```bash\n(.*?)```", page, re.S)[0]
    (tmp_path / "recipes").symlink_to(RECIPES)
    monkeypatch.chdir(tmp_path)
    for day in (1, 2):
        videos = days.world.items[days.world.items.upload_day < 4 + day].rename(columns={"video_id": "item_id"})
        log = days.log.rename(columns={"video_id": "item_id", "time_ms": "timestamp"})
        log = log[(log.timestamp < days.start(5 + day, -0.5)) & log.item_id.isin(videos.item_id)]
        log.to_parquet(f"day_{day}.parquet")
        videos.to_parquet(f"day_{day}_items.parquet")
        np.save(f"day_{day}.npy", days.world.content_embeddings[videos.item_id])
    for line in block.replace("\\\n", "").strip().split("\n"):
        run(line, monkeypatch)
    catalogues = [Recommender.from_pretrained(f"outputs/day_{day}").model.catalogue for day in (1, 2)]
    assert set(catalogues[0].item_ids) < set(catalogues[1].item_ids)
    drift = json.loads((tmp_path / "outputs" / "day_2" / "metrics.json").read_text())["drift"]
    assert drift["start"] == days.start(5) and set(drift["next_day"]) == {"before", "after"}
    fields = re.findall(r"^\| `(\w+)` \|", page.partition("## The production loop")[0], re.M)
    assert fields == [name for name in drift if name not in ("continued_from", "start")]
