"""`onerec recommend --by_file`: a file for each file, once each, and a run that goes on where it was stopped."""

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
