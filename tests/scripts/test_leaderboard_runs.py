"""The leaderboard takes no run of other data for one of these: logs and data folders that are replaced, moved, old."""

import json
import os
import shutil
from dataclasses import replace

import datasets
import pytest

from onerec_hf.scripts import leaderboard, leaderboard_runs, prepare

from ..baselines.test_baselines import cycles


def write_log(path, turned=False):
    """The same users and items; `turned`, everybody takes the items in the other order."""
    rows = [(user, item, step) for user, items in enumerate(cycles(40)) for step, item in enumerate(items)]
    lines = [f"u{user},i{(11 - item) * 5 % 12 if turned else item:02d},{step}" for user, item, step in rows]
    path.write_text("\n".join(["user_id,item_id,timestamp", *lines, ""]), encoding="utf-8")


@pytest.fixture
def arguments(tmp_path):
    write_log(tmp_path / "log.csv")
    (tmp_path / "prepare.yaml").write_text("collaborative_dim: 4\nnum_levels: 2\ncodebook_size: 4\n", encoding="utf-8")
    counters = [f"{name}: {{recipe: baseline, name: {name}}}" for name in ("popularity", "cooccurrence")]
    counters.append("both: {recipe: rerank, scorers: [cooccurrence]}")
    (tmp_path / "entries.yaml").write_text("\n".join(counters), encoding="utf-8")
    return leaderboard.LeaderboardArguments(
        source=str(tmp_path / "log.csv"),
        prepare=str(tmp_path / "prepare.yaml"),
        entries=str(tmp_path / "entries.yaml"),
        output=str(tmp_path / "board"),
        seeds=[0],
    )


@pytest.fixture
def folder(arguments, tmp_path):
    """Arguments with a data folder in place of the log."""
    prepare_folder(tmp_path)
    return replace(arguments, source=None, data=str(tmp_path / "data"))


def prepare_folder(tmp_path):
    settings = {"collaborative_dim": 4, "num_levels": 2, "codebook_size": 4}
    prepare.main(prepare.PrepareArguments(source=str(tmp_path / "log.csv"), output=str(tmp_path / "data"), **settings))


def stamps(board):
    return {path.parent.parent.name: path.stat().st_mtime_ns for path in board.glob("*/*/metrics.json")}


def lists(board):
    path = board / "popularity" / "seed0" / "predictions.parquet"
    return datasets.Dataset.from_parquet(str(path))["predictions"][:]


@pytest.fixture
def said(monkeypatch):
    found = []
    monkeypatch.setattr(leaderboard_runs.logger, "warning", found.append)
    return found


def test_a_log_that_was_replaced_is_refused_and_nothing_is_lost(arguments, tmp_path, said):
    first = leaderboard.main(arguments)["results"]
    before, board = stamps(tmp_path / "board"), tmp_path / "board"
    kept = {path: path.read_bytes() for path in [board / "leaderboard.md", *(board / "data").rglob("*.parquet")]}
    os.utime(tmp_path / "log.csv")  # a new time is no new log
    assert leaderboard.main(arguments)["results"] == first and stamps(board) == before
    write_log(tmp_path / "log.csv", turned=True)
    message = r"another source='\S+log.csv' \(log.csv has changed\)."
    with pytest.raises(
        ValueError, match=rf"{message}.*both.seed0, \S+seed0, \S+ ran on that. Nothing.*another --output"
    ):
        leaderboard.main(arguments)
    with pytest.raises(ValueError, match=rf"{message} With --run false nothing is made"):
        leaderboard.main(replace(arguments, run=False))
    assert stamps(board) == before and kept == {path: path.read_bytes() for path in kept}
    leaderboard.main(replace(arguments, output=str(tmp_path / "other")))
    old, new = lists(board), lists(tmp_path / "other")
    assert old != new
    shutil.rmtree(board)  # as it says
    leaderboard.main(arguments)
    assert lists(board) == new
    assert not said


def test_other_arguments_of_prepare_are_refused_as_well(arguments, tmp_path):
    """They made the data anew, and left the runs."""
    leaderboard.main(arguments)
    (tmp_path / "prepare.yaml").write_text("collaborative_dim: 4\nnum_levels: 3\ncodebook_size: 4\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"num_levels=2, asked is 3. .* ran on that. Nothing was started or removed"):
        leaderboard.main(arguments)
    for name in ("popularity", "cooccurrence", "both"):
        shutil.rmtree(tmp_path / "board" / name)
    leaderboard.main(arguments)  # no run is left that would be of other data
    assert json.loads((tmp_path / "board" / "prepare.json").read_text())["num_levels"] == 3


def test_a_data_folder_that_was_written_anew_is_refused(folder, tmp_path, said):
    first = leaderboard.main(folder)["results"]
    before, board = stamps(tmp_path / "board"), tmp_path / "board"
    prepare_folder(tmp_path)  # of the same log: the same
    assert leaderboard.main(folder)["results"] == first and stamps(board) == before
    write_log(tmp_path / "log.csv", turned=True)
    prepare_folder(tmp_path)
    message = r"data has changed since .*popularity.seed0, .*ran on it: .*splits has changed.*delete these folders"
    for run in (True, False):
        with pytest.raises(ValueError, match=message):
            leaderboard.main(replace(folder, run=run))
    assert stamps(board) == before
    old = lists(board)
    for name in ("popularity", "cooccurrence", "both"):
        shutil.rmtree(board / name)
    leaderboard.main(folder)
    assert lists(board) != old and not said


def test_what_is_moved_is_no_change(folder, arguments, tmp_path, said):
    first = leaderboard.main(folder)["results"]
    before = stamps(tmp_path / "board")
    shutil.copytree(tmp_path / "data", tmp_path / "elsewhere", copy_function=shutil.copy)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "board").rename(tmp_path / "moved")
    moved = replace(folder, data=str(tmp_path / "elsewhere"), output=str(tmp_path / "moved"))
    assert leaderboard.main(moved)["results"] == first and stamps(tmp_path / "moved") == before
    leaderboard.main(arguments)
    before = stamps(tmp_path / "board")
    (tmp_path / "board").rename(tmp_path / "further")
    (tmp_path / "log.csv").rename(tmp_path / "events.csv")
    moved = replace(arguments, source=str(tmp_path / "events.csv"), output=str(tmp_path / "further"))
    leaderboard.main(moved)
    assert stamps(tmp_path / "further") == before and not said


def test_a_board_of_an_earlier_version_is_read_and_it_says_so(arguments, tmp_path, said):
    first = leaderboard.main(arguments)["results"]
    board = tmp_path / "board"
    for path in board.glob("*/*/command.json"):
        words = [word.replace("DATA", str(board / "data")) for word in json.loads(path.read_text())["command"]]
        path.write_text(json.dumps([word.replace("BOARD", str(board)) for word in words]), encoding="utf-8")
    known = json.loads((board / "prepare.json").read_text(encoding="utf-8"))
    del known["contents"]
    (board / "prepare.json").write_text(json.dumps(known), encoding="utf-8")
    before = stamps(board)
    assert leaderboard.main(arguments)["results"] == first and stamps(board) == before
    assert len(said) == 2 and "prepared by an earlier version" in said[0] and "of an earlier version" in said[1]
    assert all("cannot be checked" in each for each in said)


def test_a_config_that_changed_is_another_command(folder, tmp_path):
    (tmp_path / "counter.yaml").write_text("name: cooccurrence\n", encoding="utf-8")
    entry = f"counter: {{recipe: baseline, config: {tmp_path / 'counter.yaml'}}}"
    (tmp_path / "entries.yaml").write_text(entry, encoding="utf-8")
    leaderboard.main(folder)
    before = stamps(tmp_path / "board")
    (tmp_path / "counter.yaml").write_text("# a comment\nname: cooccurrence\n", encoding="utf-8")
    leaderboard.main(folder)
    assert stamps(tmp_path / "board") == before
    (tmp_path / "counter.yaml").write_text("name: popularity\n", encoding="utf-8")
    leaderboard.main(folder)
    run = json.loads((tmp_path / "board" / "counter" / "seed0" / "metrics.json").read_text(encoding="utf-8"))
    assert stamps(tmp_path / "board") != before and run["arguments"]["name"] == "popularity"


def test_data_that_change_while_it_runs_stop_it(folder, tmp_path, monkeypatch):
    plain, begun = leaderboard_runs.Board.note_run, []

    def then_prepare(board, argv, place):
        plain(board, argv, place)
        begun.append(place)
        write_log(tmp_path / "log.csv", turned=True)
        prepare_folder(tmp_path)

    monkeypatch.setattr(leaderboard_runs.Board, "note_run", then_prepare)
    with pytest.raises(ValueError, match=r"data was changed while the leaderboard ran: .*splits has changed"):
        leaderboard.main(folder)
    assert len(begun) == 1


def test_a_run_on_other_items_is_refused(folder, tmp_path):
    """Its file says so where the command does not: one that was copied there."""
    leaderboard.main(folder)
    path = tmp_path / "board" / "popularity" / "seed0" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"item_fingerprint": "of others"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"popularity.seed0 knows other items than \S+data has, or the same ones"):
        leaderboard.main(folder)
