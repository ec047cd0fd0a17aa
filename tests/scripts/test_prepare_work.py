"""`onerec prepare` that is stopped anywhere goes on with the same command; its files are those of an unbroken run."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest

from onerec_hf import item_embeddings
from onerec_hf.data import LeaveLastOut, log_shards
from onerec_hf.scripts import prepare
from onerec_hf.scripts.prepare_work import WORK, work_folder
from onerec_hf.semantic_ids import residual

from ..data.test_shards import OFF, random_log, write

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"collaborative_dim": 8, "codebook_size": 4, "num_levels": 3, "num_shards": 4, "feedback": ["is_click"]}
# of the users, one in four is in a shard: none is empty
CORE = {"k_core": 3, "num_shards": 3}
LIFELONG = {
    "sessions": json.dumps({"max_gap": 0, "max_events": 1, "history": "all", "interactions": {}, **OFF}),
    "lifelong": '{"averaged": ["timestamp"], "sparse": ["is_click"], "compress_above": 5, "max_cluster_size": 7}',
    "num_shards": 2,
}


class Stopped(Exception):
    """Nothing of ours expects it."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(random_log(0, events=1500), tmp_path_factory.mktemp("log") / "log")


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory):
    """The files of runs that nobody stopped, by their settings; each is made once."""
    made = {}

    def files_of(**settings):
        name = json.dumps(settings)
        if name not in made:
            run(source, output := tmp_path_factory.mktemp("unbroken"), **settings)
            made[name] = files(output)
        return made[name]

    return files_of


def run(source, output, **settings):
    return prepare.main(prepare.PrepareArguments(source=source, output=str(output), **SIZES | settings))


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stop(monkeypatch, owner, name, call, half_written=False):
    """The call-th call of a function of `owner` stops the run; `half_written`: behind the first half of its file."""
    function, calls = getattr(owner, name), []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) < call:
            return function(*args, **kwargs)
        if half_written:
            function(*args, **kwargs)
            place = next(each for each in args if isinstance(each, (Path, str)) or hasattr(each, "fileno"))
            if hasattr(place, "fileno"):
                place.truncate(place.tell() // 2)
            else:
                os.truncate(place, os.path.getsize(place) // 2)
        raise Stopped(name)

    monkeypatch.setattr(owner, name, stopping)


def count(monkeypatch, owner, name):
    function, calls = getattr(owner, name), []

    def counting(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counting)
    return calls


CUT, ALL_SORTED = "the log, cut into 4 shards (0 sorted)", "the log, cut into 4 shards (4 sorted)"
SPLIT = f"{ALL_SORTED}, the splits of 4"
EMBEDDED = f"{SPLIT}, collaborative embeddings"
NOTHING = "nothing, because nothing was finished"
PARQUET, NUMPY, TENSORS = ((pyarrow.parquet, "write_table"), (np, "save"), (residual, "save_file"))
# where a run is stopped: the owner and the name of a function, at which call, whether it leaves half a file;
# what the next run takes over; how many cuts, sorted shards, split shards, embeddings, levels it makes
STOPS = {
    "reading": (log_shards.LogColumns, "convert", 2, False, NOTHING, (1, 4, 4, 1, 3)),
    "indexing": (log_shards._Cutting, "_index", 2, False, NOTHING, (1, 4, 4, 1, 3)),
    "half a cut": (log_shards._Cutting, "_cut", 1, False, NOTHING, (1, 4, 4, 1, 3)),
    "half an index": (log_shards.pyarrow.feather, "write_feather", 2, True, NOTHING, (1, 4, 4, 1, 3)),
    "behind the cut": (log_shards, "sort_events", 1, False, CUT, (0, 4, 4, 1, 3)),
    "half a sorted shard": (*PARQUET, 3, True, CUT.replace("0 s", "2 s"), (0, 2, 4, 1, 3)),
    "half a history": (*PARQUET, 5, True, ALL_SORTED, (0, 0, 4, 1, 3)),
    "half a split": (*PARQUET, 15, True, SPLIT.replace("of 4", "of 2"), (0, 0, 2, 1, 3)),
    "co-occurrence": (item_embeddings.embeddings, "_leading_vectors", 1, False, SPLIT, (0, 0, 0, 1, 3)),
    "half an embedding": (*NUMPY, 1, True, SPLIT, (0, 0, 0, 1, 3)),
    "half a level": (*TENSORS, 2, True, f"{EMBEDDED}, 1 levels of codebooks", (0, 0, 0, 0, 2)),
    "collisions": (prepare, "resolve_collisions", 1, False, f"{EMBEDDED}, 3 levels of codebooks", (0, 0, 0, 0, 0)),
    "the splits in place": (prepare.logs.data_folder, "save_file", 1, False, EMBEDDED, (0, 0, 0, 0, 0)),
    "everything in place": (prepare, "plot_codebook_usage", 1, False, EMBEDDED, (0, 0, 0, 0, 0)),
}


@pytest.mark.parametrize("name", STOPS)
def test_a_stopped_run_goes_on_where_it_was(name, source, unbroken, tmp_path, monkeypatch, capsys):
    owner, function, call, half, taken, expected = STOPS[name]
    with monkeypatch.context() as stopping, pytest.raises(Stopped):
        stop(stopping, owner, function, call, half)
        run(source, tmp_path)
    told = f"stopped: {tmp_path / WORK} keeps what is finished" in capsys.readouterr().out
    assert told == (taken != NOTHING)
    made = [
        count(monkeypatch, *place)
        for place in (
            (log_shards._Cutting, "_cut"),
            (log_shards, "sort_events"),
            (LeaveLastOut, "rows"),
            (item_embeddings.embeddings, "_leading_vectors"),
            (residual, "train_codebook"),
        )
    ]
    run(source, tmp_path)
    assert f"goes on with a stopped run ({tmp_path / WORK}): takes over {taken}" in capsys.readouterr().out
    assert tuple(map(len, made)) == expected
    assert files(tmp_path) == unbroken()  # the work folder and the lock are gone, too


def stop_and_go_on(source, output, place, monkeypatch, **settings):
    with monkeypatch.context() as stopping, pytest.raises(Stopped):
        stop(stopping, *place)
        run(source, output, **settings)
    run(source, output, **settings)


@pytest.mark.parametrize("call", [2, 5, 8, 12])  # sorting, the k-core twice, and the splits
def test_a_k_core(call, source, unbroken, tmp_path, monkeypatch):
    stop_and_go_on(source, tmp_path, (*PARQUET, call, True), monkeypatch, **CORE)
    assert files(tmp_path) == unbroken(**CORE)


@pytest.mark.parametrize("call", [5, 11, 13, 16])  # two shards of the splits, then six parts that are compressed
def test_lifelong_histories(call, source, unbroken, tmp_path, monkeypatch):
    stop_and_go_on(source, tmp_path, (*PARQUET, call, True), monkeypatch, **LIFELONG)
    assert files(tmp_path) == unbroken(**LIFELONG)


def test_lifelong_histories_in_their_place(source, unbroken, tmp_path, monkeypatch):
    compressed = count(monkeypatch, prepare.logs, "compress_lifelong")
    stop_and_go_on(source, tmp_path, (prepare, "plot_codebook_usage", 1), monkeypatch, **LIFELONG)
    assert len(compressed) == 6
    assert files(tmp_path) == unbroken(**LIFELONG)


@pytest.mark.parametrize("place", [(prepare.RQVAE, "save_pretrained", 1), (prepare, "resolve_collisions", 1)])
def test_rqvae(place, source, unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.RQVAE.__init__, "__defaults__", (3, 4, 4, (8,), 0.25, 3, 64, 1e-3, True, 0))
    fitted = count(monkeypatch, prepare.RQVAE, "fit")
    stop_and_go_on(source, tmp_path, place, monkeypatch, quantizer="rqvae")
    assert len(fitted) == (2 if place[1] == "save_pretrained" else 1)
    assert files(tmp_path) == unbroken(quantizer="rqvae")


@pytest.mark.parametrize(
    "settings",
    [
        {"validation_start": 30, "test_start": 45},
        {"sessions": json.dumps({"max_gap": 3, "interactions": {}, "max_history": 9, **OFF}), "codebook_size": 5},
        {"watched": {"is_click": 1}},
    ],
)
def test_what_was_counted_is_said_of_all_shards(settings, source, unbroken, tmp_path, monkeypatch, caplog):
    """The log has times and events twice, items without a title, and users with few events, in all shards."""
    items = {"item_id": np.arange(38), "title": [f"title {i}" for i in range(38)], "user_id": np.arange(38)}
    pyarrow.parquet.write_table(pyarrow.table(items), tmp_path / "items.parquet")
    settings |= {"items": str(tmp_path / "items.parquet"), "load_options": '{"drop_unknown": true}'}
    said = []
    for output in ("unbroken", "stopped"):
        if output == "stopped":
            with monkeypatch.context() as stopping, pytest.raises(Stopped):
                stop(stopping, *PARQUET, 15)
                run(source, tmp_path / output, **settings)
        caplog.clear()
        run(source, tmp_path / output, **settings)
        said.append([record.getMessage() for record in caplog.records if record.levelno == logging.WARNING])
    assert said[0] == said[1] and any("dropped events: " in message for message in said[0])
    assert files(tmp_path / "unbroken") == files(tmp_path / "stopped")


def stopped(source, output, monkeypatch, **settings):
    """Two shards have their splits."""
    with monkeypatch.context() as stopping, pytest.raises(Stopped):
        stop(stopping, *PARQUET, 15)
        run(source, output, **settings)
    assert (output / WORK).is_dir()


def test_other_arguments_begin_anew(source, unbroken, tmp_path, monkeypatch, capsys):
    stopped(source, tmp_path, monkeypatch)
    cut = count(monkeypatch, log_shards._Cutting, "_cut")
    run(source, tmp_path, codebook_size=5, seed=1)
    assert (
        f"{tmp_path / WORK} is of a stopped run that was another one: codebook_size was 4, is 5; seed was 0, is 1. It "
        "is deleted, and everything is made anew." in capsys.readouterr().out
    )
    assert len(cut) == 1
    assert files(tmp_path) == unbroken(codebook_size=5, seed=1)


@pytest.mark.parametrize("change", ["other rows", "only the time", "another file", "the items"])
def test_a_changed_source_begins_anew(change, tmp_path, monkeypatch, capsys):
    source = write(random_log(0, events=1500), tmp_path / "log")
    items = tmp_path / "items.parquet"
    random_log(0)[["item_id"]].drop_duplicates().to_parquet(items)
    settings = {"items": str(items), "load_options": '{"drop_unknown": true}'}
    stopped(source, tmp_path / "data", monkeypatch, **settings)
    one = tmp_path / "log" / ("3.parquet" if change == "another file" else "1.parquet")
    one = items if change == "the items" else one
    if change == "only the time":  # of the last change: a file of the same size may have other rows
        os.utime(one, ns=(0, one.stat().st_mtime_ns + 10**9))
    else:
        (random_log(5)[["item_id"]].drop_duplicates() if one == items else random_log(5)).to_parquet(one, index=False)
    capsys.readouterr()
    run(source, tmp_path / "data", **settings)
    said = capsys.readouterr().out
    assert f"stopped run that was another one: {one.resolve()} was" in said and "everything is made anew" in said
    run(source, tmp_path / "fresh", **settings)
    assert files(tmp_path / "data") == files(tmp_path / "fresh")


def test_a_killed_run(source, unbroken, tmp_path, capsys):
    """SIGKILL, in the splits of the third shard: nothing is closed, no lock is given back."""
    code = f"""
import os, signal
import pyarrow.parquet
from onerec_hf.scripts import prepare
write, calls = pyarrow.parquet.write_table, []
def killing(table, path, **settings):
    write(table, path, **settings)
    calls.append(1)
    if len(calls) == 15:
        os.truncate(path, 100)
        os.kill(os.getpid(), signal.SIGKILL)
pyarrow.parquet.write_table = killing
prepare.main(prepare.PrepareArguments({source!r}, {str(tmp_path)!r}, **{SIZES!r}))
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == -signal.SIGKILL, found.stderr
    run(source, tmp_path)
    assert f"takes over {SPLIT.replace('of 4', 'of 2')}\n" in capsys.readouterr().out
    assert files(tmp_path) == unbroken()


def test_a_second_run_into_the_same_output_is_refused(source, unbroken, tmp_path):
    arguments = prepare.PrepareArguments(source=source, output=str(tmp_path), **SIZES)
    with work_folder(arguments, tmp_path) as folder:
        with pytest.raises(RuntimeError, match=r"another run of onerec prepare is writing there .* Wait for"):
            prepare.main(arguments)
        assert folder.is_dir()  # the second one has left it alone
    prepare.main(arguments)
    assert files(tmp_path) == unbroken()


def test_what_cannot_be_gone_on_with_leaves_nothing(source, tmp_path, monkeypatch, capsys):
    """A log of one shard, and one in memory, of which the next run could not say that it is the same."""
    for settings in ({"source": source, "num_shards": 1}, {"source": random_log(0)}):
        with monkeypatch.context() as stopping, pytest.raises(Stopped):
            stop(stopping, prepare, "plot_codebook_usage", 1)
            run(**{"output": tmp_path} | settings)
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert WORK not in capsys.readouterr().out


def test_work_that_is_half_deleted_is_nobodys(source, unbroken, tmp_path, monkeypatch):
    """A run was killed while it deleted its work folder: `made_of.json` goes first."""
    stopped(source, tmp_path, monkeypatch)
    removed = []
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: removed.append(files(Path(path))))
    with pytest.raises(FileExistsError):  # nothing was removed here
        run(source, tmp_path, seed=1)
    assert removed and "made_of.json" not in removed[0] and "splits.json" in removed[0]
    monkeypatch.undo()
    run(source, tmp_path)
    assert files(tmp_path) == unbroken()


def test_other_code_begins_anew(source, unbroken, tmp_path, monkeypatch, capsys):
    stopped(source, tmp_path, monkeypatch)
    monkeypatch.setattr("onerec_hf.scripts.prepare_work._code", lambda: "other")
    run(source, tmp_path)
    assert "stopped run that was another one: code of onerec_hf was" in capsys.readouterr().out
    assert files(tmp_path) == unbroken()


def test_a_log_that_cannot_be_read_leaves_nothing_to_go_on_from(tmp_path, capsys):
    """Neither the message nor a half-filled database."""
    log = pd.DataFrame({"user_id": [1, 1, None, 2], "item_id": [1, 2, 3, 4], "timestamp": [1, 2, 3, 4]})
    log.to_parquet(tmp_path / "log.parquet")
    with pytest.raises(ValueError, match="user_id"):
        prepare.main(
            prepare.PrepareArguments(str(tmp_path / "log.parquet"), output=str(tmp_path / "data"), num_shards=2)
        )
    assert "keeps what is finished" not in capsys.readouterr().out
    assert not list(tmp_path.rglob("log.duckdb*"))
