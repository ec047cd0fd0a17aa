"""A data folder says what it is, or what is missing and which command makes it."""

import shutil

import datasets
import numpy as np
import pytest
import torch

from onerec_hf import Catalogue, SemanticIdTokenizer
from onerec_hf.data import DataFolder, SplitWriter
from onerec_hf.semantic_ids import ResidualKMeans

VECTORS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
ROWS = {"user": [0, 1], "history": [[0, 1], [2]], "timestamp": [[1.0, 2.0], [1.0]]}


@pytest.fixture
def folder(tmp_path):
    quantizer = ResidualKMeans(2, 3, seed=0)
    codes = quantizer.fit(torch.from_numpy(VECTORS)).train_codes
    catalogue = Catalogue(codes, [3, 3], [f"i{i}" for i in range(6)])
    return DataFolder.save(
        tmp_path / "data",
        splits=datasets.DatasetDict({name: datasets.Dataset.from_dict(ROWS) for name in ("train", "test")}),
        items=datasets.Dataset.from_dict({"item_id": catalogue.item_ids.tolist(), "brand": list("aabbcc")}),
        users=datasets.Dataset.from_dict({"user_id": ["u", "v"]}),
        tokenizer=SemanticIdTokenizer(codebook_sizes=[3, 3], catalogue=catalogue),
        quantizer=quantizer,
        item_embeddings=VECTORS,
        report={"before collisions": {}},
    ).path


def test_it_reads_what_was_saved(folder):
    data = DataFolder(folder)
    assert (data.num_items, data.num_users) == (6, 2)
    assert data.splits["test"][:] == ROWS and data.users["user_id"][:] == ["u", "v"]
    assert data.columns("items", ["brand"]) == {"brand": list("aabbcc")} and data.columns("items", []) == {}
    assert data.catalogue.item_ids.tolist() == data.items["item_id"][:] == [f"i{i}" for i in range(6)]
    assert (data.item_embeddings == VECTORS).all()
    assert data.quantizer.encode(torch.from_numpy(VECTORS)).shape == (6, 2)
    with pytest.raises(ValueError, match=r"items.parquet has no \['colour'\]; it has \['item_id', 'brand'\]"):
        data.columns("items", ["colour"])


def test_no_data_folder(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"no data folder: \S+splits is not there. Make it with `onerec prepare"
        ):
            DataFolder(path)


@pytest.mark.parametrize(
    "name",
    ["splits", "items.parquet", "users.parquet", "tokenizer", "item_embeddings.safetensors", "semantic_ids.json"],
)
def test_a_half_written_folder_names_what_is_missing(folder, name):
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"no complete data folder: {name}.*onerec prepare --source LOG --output"
    ):
        DataFolder(folder)


@pytest.mark.parametrize("name", ["items.parquet", "item_embeddings.safetensors", "tokenizer/catalogue.safetensors"])
def test_a_file_that_is_cut_off(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:20])
    with pytest.raises(ValueError, match=r"cannot be read .*a file is cut off. Make it with"):
        DataFolder(folder)


def test_files_of_several_runs(folder):
    datasets.Dataset.from_dict({"item_id": ["x"]}).to_parquet(str(folder / "items.parquet"))
    with pytest.raises(
        ValueError, match=r"several runs: items.parquet has 1 items, the catalogue 6, .*6. Make it with"
    ):
        DataFolder(folder)


def test_a_run_that_is_stopped_leaves_no_complete_folder(folder, monkeypatch):
    """Into the folder of an earlier run: its files must not be taken for those of the new one."""
    data = DataFolder(folder)
    monkeypatch.setattr(SplitWriter, "finish", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
    parts = {name: getattr(data, name) for name in ("splits", "items", "users", "tokenizer", "quantizer")}
    with pytest.raises(OSError, match="disk is full"):
        DataFolder.save(folder, **parts, item_embeddings=VECTORS, report={})
    with pytest.raises(FileNotFoundError, match=r"no complete data folder: semantic_ids.json is not there"):
        DataFolder(folder)


def test_another_model_and_other_users(folder, tmp_path):
    data = DataFolder(folder)
    data.check_model("mymodel", Catalogue.from_pretrained(folder / "tokenizer"))
    other = Catalogue(data.catalogue.semantic_ids.flip(0), [3, 3], data.catalogue.item_ids)
    with pytest.raises(ValueError, match=r"mymodel \(a model\) and \S+data .*: .*have other semantic IDs"):
        data.check_model("mymodel", other)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert DataFolder(copy).user_fingerprint == data.user_fingerprint
    datasets.Dataset.from_dict({"user_id": ["v", "u"]}).to_parquet(str(copy / "users.parquet"))
    assert DataFolder(copy).user_fingerprint != data.user_fingerprint
