"""`onerec recommend --by_file`: a file for each file, once each, and a run that goes on where it was stopped."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from onerec_hf.scripts import recommend
from onerec_hf.scripts.recommend import RecommendArguments

from ..test_recommender import recommender_of

HISTORIES = [[[1000, 1001], []], [[1002], [1063], [1003]], [[1004]], []]


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repo")
    recommender_of().save_pretrained(folder)
    return folder


@pytest.fixture
def arguments(repo, tmp_path):
    for i, histories in enumerate(HISTORIES):
        rows = {"history": histories, "user": [10 * i + j for j in range(len(histories))]}
        features = {"history": datasets.List(datasets.Value("int64")), "user": datasets.Value("int64")}
        path = tmp_path / "shards" / f"day={i % 2}" / f"{i}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(str(path))
    places = {"dataset": str(tmp_path / "shards"), "output": str(tmp_path / "out")}
    return RecommendArguments(repo=str(repo), k=3, num_beams=20, by_file=True, **places)


def written(folder):
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.parquet"))}


def test_each_file_becomes_one_and_a_stopped_run_goes_on(arguments, tmp_path, monkeypatch):
    plain, calls = recommend.recommend_rows, []

    def stopped(recommender, rows, *args, **kwargs):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(recommender, rows, *args, **kwargs)

    monkeypatch.setattr(recommend, "recommend_rows", stopped)
    with pytest.raises(KeyboardInterrupt):
        recommend.main(arguments)
    out = tmp_path / "out"
    first = {name: path.stat().st_mtime_ns for name, path in written(out).items()}
    assert list(first) == ["day=0/0.parquet", "day=0/2.parquet"]
    (out / "day=1").mkdir()
    (out / "day=1" / "1.partial").write_bytes(b"of the run that was stopped")
    recommend.main(arguments)
    done = written(out)
    assert list(done) == ["day=0/0.parquet", "day=0/2.parquet", "day=1/1.parquet", "day=1/3.parquet"]
    assert {name: done[name].stat().st_mtime_ns for name in first} == first and len(calls) == 5
    assert not list(out.rglob("*.partial"))
    own = recommender_of()
    for i, name in enumerate(["day=0/0", "day=1/1", "day=0/2"]):
        rows = datasets.Dataset.from_parquet(str(out / f"{name}.parquet"))
        expected = own.recommend(HISTORIES[i], 3)
        assert rows["item_ids"][:] == [[one.item_id for one in row] for row in expected]
        assert rows["user"][:] == [10 * i + j for j in range(len(HISTORIES[i]))]


def test_processes_share_the_files(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = []
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        found.append([path.name for path in recommend.main_by_file(arguments)])
    assert found == [["1.parquet"], ["0.parquet", "3.parquet"], ["2.parquet"]]
    assert recommend.main_by_file(arguments) == []


def test_another_run_is_not_mixed_in(arguments, tmp_path):
    recommend.main(arguments)
    arguments.batch_size = 1  # changes nothing that is written
    recommend.main(arguments)
    arguments.k = 4
    with pytest.raises(ValueError, match="was begun with k=3, this is 4: go on with the same arguments"):
        recommend.main(arguments)
    arguments.dataset = str(tmp_path / "out" / "run.json")
    with pytest.raises(ValueError, match="a folder of parquet files is needed"):
        recommend.main(arguments)


def change_weights(repo):
    """As a training into the same folder."""
    from onerec_hf.recommender import Recommender

    trained = Recommender.from_pretrained(repo)
    for weights in trained.model.parameters():
        weights.data.neg_()
    trained.save_pretrained(repo)


def items_of(folder):
    return {name: recommend.read_rows(path)["item_ids"][:] for name, path in written(folder).items()}


def test_files_of_another_model_are_not_taken_for_this_one_s(arguments, tmp_path):
    arguments.repo = str(shutil.copytree(arguments.repo, tmp_path / "model"))
    out = Path(recommend.main(arguments))
    before = items_of(out)
    for path in (out / "day=1").iterdir():
        path.unlink()
    # the card and the metrics come later, and other folders and times are no other model
    (tmp_path / "model" / "README.md").write_text("a card", encoding="utf-8")
    (tmp_path / "model" / "metrics.json").write_text("{}", encoding="utf-8")
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(tmp_path / "copy", tmp_path / "model")
    out.rename(tmp_path / "moved")
    arguments.output = str(tmp_path / "moved")
    assert [path.name for path in recommend.main_by_file(arguments)] == ["1.parquet", "3.parquet"]

    change_weights(arguments.repo)
    with pytest.raises(
        ValueError, match=r"another model than repo='\S+model' is now: model.safetensors has changed.*--overwrite true"
    ):
        recommend.main(arguments)
    assert items_of(tmp_path / "moved") == before
    arguments.overwrite = True
    assert len(recommend.main_by_file(arguments)) == 4
    arguments.overwrite = False
    assert recommend.main_by_file(arguments) == []
    other = items_of(tmp_path / "moved")
    assert other.keys() == before.keys() and other != before


def test_a_file_that_changed_is_not_taken_as_done(arguments, tmp_path):
    out, place = Path(recommend.main(arguments)), tmp_path / "shards" / "day=0" / "2.parquet"
    before = items_of(out)
    os.utime(place)  # as a copy has it: no change
    assert recommend.main_by_file(arguments) == []
    rows = datasets.Dataset.from_parquet(str(place))
    rows.map(lambda row: {"history": [1063]}).to_parquet(str(place))
    with pytest.raises(ValueError, match=r"shards/day=0/2.parquet: changed since .*out has their .*--overwrite true"):
        recommend.main(arguments)
    assert items_of(out) == before
    (out / "day=0" / "2.parquet").unlink()  # as it says: then this one alone
    assert [path.name for path in recommend.main_by_file(arguments)] == ["2.parquet"]
    assert items_of(out)["day=0/2.parquet"] != before["day=0/2.parquet"]
    # new files are what such a folder gets; those that left it stay until everything is made anew
    rows.to_parquet(str(tmp_path / "shards" / "day=0" / "4.parquet"))
    place.unlink()
    assert [path.name for path in recommend.main_by_file(arguments)] == ["4.parquet"]
    assert "day=0/2.parquet" in written(out)
    arguments.overwrite = True
    recommend.main(arguments)
    assert list(written(out)) == ["day=0/0.parquet", "day=0/4.parquet", "day=1/1.parquet", "day=1/3.parquet"]


def test_an_overwriting_run_that_was_stopped_leaves_no_old_file(arguments, monkeypatch):
    """Also where one of its processes had not begun."""
    arguments.repo = str(shutil.copytree(arguments.repo, Path(arguments.output).parent / "model"))
    recommend.main(arguments)
    change_weights(arguments.repo)
    monkeypatch.setenv("WORLD_SIZE", "2")
    recommend.main(replace(arguments, overwrite=True))
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match=r"day=0/2.parquet, \S+day=1/3.parquet: changed .* a model that was replaced"):
        recommend.main(arguments)


def test_a_run_of_an_earlier_version_goes_on_and_says_so(arguments, tmp_path, monkeypatch):
    out = Path(recommend.main(arguments))
    settings = json.loads((out / "run.json").read_text(encoding="utf-8"))
    settings = {name: value for name, value in settings.items() if not name.endswith("_files")}
    (out / "run.json").write_text(json.dumps(settings), encoding="utf-8")
    for note in out.rglob(".*.made_of.json"):
        note.unlink()
    said = []
    monkeypatch.setattr(recommend.logger, "warning", said.append)
    assert recommend.main_by_file(arguments) == []
    assert len(said) == 1 and "4 files of an earlier version" in said[0] and "cannot be checked" in said[0]


def test_what_tells_large_files_apart(tmp_path):
    from onerec_hf.scripts import prepare_work

    path, size = tmp_path / "large", (prepare_work.BLOCKS + 3) * prepare_work.BLOCK + 5
    with path.open("wb") as file:
        file.truncate(size)
    first = prepare_work.content_of(path)
    for place in (0, 32 * (size - prepare_work.BLOCK) // 63, size - 1):  # the ends, and one of the places between
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        assert prepare_work.content_of(path) != first
        first = prepare_work.content_of(path)
    assert prepare_work.changed_files({"a": "1", "b": "1", "c": "1"}, {"a": "1", "b": "2", "d": "1"}) == (
        "b has changed; c is not there any more; d is new"
    )
