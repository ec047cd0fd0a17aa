"""Rows streamed from a data folder: each once an epoch, in an order that the seed alone decides, whoever reads it."""

import itertools
import json
import shutil
from functools import partial

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from safetensors.torch import load_file

from onerec_hf.data import (
    SplitWriter,
    change_rows,
    count_lengths,
    first_rows,
    load_splits,
    longest_list,
    mapped_split,
    stream_split,
    streams,
    target_rows,
    with_users,
)
from onerec_hf.scripts import prepare, sft
from onerec_hf.scripts.model_arguments import ModelArguments
from onerec_hf.trainers import OneRecSFTConfig

USERS = 40


@pytest.fixture
def folder(tmp_path):
    """40 users in 4 parts; user u has u + 1 events, which are his own."""
    writer = SplitWriter(tmp_path)
    for shard in range(4):
        users = np.arange(shard, USERS, 4)
        histories = [np.arange(user + 1, dtype=np.int32) + 100 * user for user in users]
        times = [np.arange(user + 1) for user in users]
        rows = {"user": np.arange(len(users), dtype=np.int32), "history": histories, "timestamp": times}
        writer.write({"train": with_users(datasets.Dataset(pa.table(rows)), users)}, shard, 4)
    writer.finish()
    return tmp_path


def take(stream, count):
    return list(itertools.islice(stream, count))


def test_every_row_once_an_epoch_in_an_order_of_its_own(folder):
    rows = take(stream_split(folder, seed=1), 2 * USERS)
    users = [int(row["user"]) for row in rows]
    assert sorted(users[:USERS]) == sorted(users[USERS:]) == list(range(USERS)) and users[:USERS] != users[USERS:]
    for row in rows:
        assert row["history"].tolist() == [100 * row["user"] + i for i in range(row["user"] + 1)]
        assert row["timestamp"].tolist() == list(range(row["length"])) and row["length"] == row["user"] + 1
    assert [int(row["user"]) for row in take(stream_split(folder, seed=1), 2 * USERS)] == users
    assert [int(row["user"]) for row in take(stream_split(folder, seed=2), 2 * USERS)] != users


@pytest.mark.parametrize("nodes", [2, 3, 4, 5])
def test_processes_share_the_rows_and_lose_none(folder, nodes):
    stream = stream_split(folder, num_nodes=nodes)
    epochs: tuple[list[int], ...] = ([], [])
    for node in range(nodes):
        own = split_dataset_by_node(stream, node, nodes)
        share = USERS // nodes if 4 % nodes == 0 else 4 * len(range(node, 10, nodes))  # 4 parts of 10 users
        users = [int(row["user"]) for row in take(own, 2 * share)]
        assert users == [int(row["user"]) for row in take(stream.shard(nodes, node), 2 * share)]  # as accelerate does
        for epoch, seen in enumerate(epochs):
            seen += users[epoch * share : (epoch + 1) * share]
    assert all(sorted(seen) == list(range(USERS)) for seen in epochs)


def test_groups_of_similar_length(folder):
    lengths = [int(row["length"]) for row in take(stream_split(folder, group_size=5), USERS)]
    groups = [lengths[i : i + 5] for i in range(0, USERS, 5)]
    assert all(max(group) - min(group) <= 16 for group in groups)  # ten of a part, every fourth length
    assert lengths != sorted(lengths) and sorted(lengths) == list(range(1, USERS + 1))


def test_rows_of_a_chunk_are_what_training_rows_are_in_one_piece(folder):
    def rows_of(users):
        return target_rows(users, 7)

    whole = rows_of(load_splits(folder)["train"])
    count = count_lengths(folder, "train", lambda lengths: int((lengths - 1).sum()))
    assert len(whole) == count == USERS * (USERS - 1) // 2
    found = {(int(r["user"]), int(r["targets"][0])): r for r in take(stream_split(folder, rows_of=rows_of), count)}
    assert len(found) == count
    for row in whole:
        own = found[row["user"], row["targets"][0]]
        assert {name: np.asarray(value).tolist() for name, value in own.items()} == row
    assert len(first_rows(folder, "train", 3)) == 3


def test_a_part_may_be_empty(folder):  # as a warehouse leaves them
    first, *others = sorted((folder / "splits" / "train").glob("part-*.parquet"))
    rows = pq.read_table(first)
    pq.write_table(rows.slice(0, 0), first)
    with pytest.raises(FileNotFoundError, match="files were moved"):
        first_rows(folder, "train")
    pq.write_table(pa.concat_tables([pq.read_table(others[-1]), rows]), others[-1])
    assert len(first_rows(folder, "train", 3)) == 3
    assert sorted(load_splits(folder)["train"]["user"]) == sorted(mapped_split(folder)["user"]) == list(range(USERS))
    for settings in ({}, {"group_size": 5}, {"rows_of": partial(target_rows, max_history=7)}):
        stream = stream_split(folder, **settings)
        count = USERS if "rows_of" not in settings else USERS * (USERS - 1) // 2
        assert {int(row["user"]) for row in take(stream, count)} == set(range("rows_of" in settings, USERS))
    assert count_lengths(folder, "train", lambda lengths: len(lengths)) == USERS


def test_no_row_at_all(tmp_path):
    writer = SplitWriter(tmp_path)
    empty = {"user": pa.array([], pa.int32()), "history": pa.array([], pa.list_(pa.int32()))}
    writer.write({"train": datasets.Dataset(pa.table(empty))}, 0, 1)
    writer.finish()
    for read in (first_rows, mapped_split):
        with pytest.raises(ValueError, match=r"the train split of .* has no rows"):
            read(tmp_path, "train")
    assert len(load_splits(tmp_path)["train"]) == 0


def test_the_longest_list_is_that_of_the_chosen_rows():
    rows = datasets.Dataset.from_dict({"targets": [[1], [1, 2, 3], [1, 2]]})
    assert longest_list(rows, "targets") == 3 and longest_list(rows.select([2, 0]), "targets") == 2
    assert longest_list(rows.select([]), "targets") == 0


def test_columns_are_read_part_by_part(folder):
    parts = list(streams.column_parts(folder, "train", ["history"]))
    assert len(parts) == 4 and all(part.column_names == ["history"] for part in parts)
    assert sum(map(len, parts)) == USERS and max(longest_list(part, "history") for part in parts) == USERS
    assert not list(streams.column_parts(folder, "train", ["targets"]))


def test_rows_on_disk_are_looked_up_and_changed_as_in_memory(folder, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setattr(streams, "CHUNK", 7)
    whole, mapped = load_splits(folder)["train"], mapped_split(folder)
    assert mapped.cache_files and not whole.cache_files
    assert mapped[:] == whole[:] and mapped.features == whole.features
    rows = change_rows(mapped, partial(target_rows, max_history=5))
    assert rows.cache_files and rows[:] == target_rows(whole, 5)[:] and len(rows) > 7 * USERS


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streams") / "data"
    rng = np.random.default_rng(0)
    log = pd.DataFrame({"user_id": rng.integers(0, 50, 900), "item_id": rng.integers(0, 40, 900)})
    log["timestamp"] = np.arange(900)
    sizes = {"collaborative_dim": 8, "codebook_size": 4, "num_levels": 3, "num_shards": 3}
    prepare.main(prepare.PrepareArguments(source=log, output=str(folder), **sizes))
    return folder


def train(data, output, model="onerec_v2", **settings):
    arguments = {"data": str(data), "streaming": True, "score": False, "max_history": 8}
    arguments["model"] = json.dumps(
        {"model_type": model, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
        | ({"context_embed_dim": 8} if model == "onerec_v2" else {"num_session_items": 1})
    )
    training = {"output_dir": str(output), "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True}
    training |= {"report_to": "none", "save_steps": 5, "logging_steps": 1, "disable_tqdm": True} | settings
    return sft.main(ModelArguments(**arguments), OneRecSFTConfig(**training))


def test_a_resumed_run_goes_on_with_the_next_row(prepared, tmp_path):
    """Over the end of an epoch: 50 users are 13 batches."""
    train(prepared, tmp_path / "one", max_steps=20)
    for step in (10, 15):
        folder = tmp_path / f"from{step}"
        shutil.copytree(tmp_path / "one" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        report = train(prepared, folder, max_steps=20, resume_from_checkpoint="true")
        assert len([entry for entry in report["log"] if "loss" in entry]) == 20
        one, two = (load_file(path / "model.safetensors") for path in (tmp_path / "one", folder))
        assert all(torch.equal(one[name], two[name]) for name in one)
    other = train(prepared, tmp_path / "other", max_steps=20, seed=7)
    assert other["log"] != report["log"]


@pytest.mark.parametrize(("model", "rows"), [("onerec_v2", 50), ("onerec", None)])
def test_epochs_become_steps(prepared, tmp_path, model, rows):
    lengths = load_splits(prepared)["train"]["length"][:]
    rows = rows or sum(length - 1 for length in lengths)
    report = train(prepared, tmp_path / model, model, num_train_epochs=1, per_device_train_batch_size=32)
    steps = [entry["step"] for entry in report["log"] if "loss" in entry]
    assert steps[-1] == -(-rows // 32)


def test_newest_impressions_are_not_streamed(prepared, tmp_path):
    arguments = ModelArguments(data=str(prepared), streaming=True, newest_impressions=True)
    with pytest.raises(ValueError, match="streaming reads users in random order, newest_impressions all events by"):
        sft.main(arguments, OneRecSFTConfig(output_dir=str(tmp_path), num_train_epochs=1, use_cpu=True))


def test_a_stream_cannot_be_rebalanced(prepared, tmp_path):
    training = OneRecSFTConfig(output_dir=str(tmp_path), train_sampling_strategy="batch_rebalance", use_cpu=True)
    with pytest.raises(ValueError, match="batch_rebalance draws from all rows, a stream from a few of them"):
        sft.main(ModelArguments(data=str(prepared), streaming=True), training)
