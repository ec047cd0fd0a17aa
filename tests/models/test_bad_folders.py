"""What a user may try to load or write by mistake: each case has a message that says what is wrong and what to do."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import datasets
import pytest
from transformers import AutoModel, AutoTokenizer

from onerec_hf import Catalogue, SemanticIdTokenizer
from onerec_hf.collators import OneRecCollator
from onerec_hf.data import load_splits
from onerec_hf.trainers import OneRecSFTConfig, OneRecSFTTrainer

from ..tiny import ARCHITECTURES, SIZES, tiny_catalogue, tiny_model


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    folder = tmp_path_factory.mktemp("complete")
    tiny_model(tiny_catalogue()).save_pretrained(folder)
    SemanticIdTokenizer(codebook_sizes=SIZES, catalogue=tiny_catalogue()).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(complete, tmp_path):
    return shutil.copytree(complete, tmp_path / "model")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


# ---- a folder that is not a model


def test_a_folder_that_is_not_a_model(tmp_path):
    with pytest.raises(ValueError, match=f"Unrecognized model in {tmp_path}.*model_type"):
        AutoModel.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="outputs/no/model"):
        AutoModel.from_pretrained("outputs/no/model")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match=r"config\.json' is not a valid JSON file"):
        AutoModel.from_pretrained(tmp_path)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModel.from_pretrained(folder)


# ---- cut-off files (of the catalogue: test_auto_classes.py)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kept", [0, 100, -1])
def test_cut_off_weights(tmp_path, architecture, kept):
    tiny_model(architecture=architecture).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(OSError, match=rf"weights of {tmp_path} cannot be read.*cut off.*force_download=True"):
        AutoModel.from_pretrained(tmp_path)


# ---- a catalogue from another tokenizer


def test_a_catalogue_from_another_tokenizer(folder):
    other = Catalogue([[1, 2]], [4, 4], item_ids=[7])
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    before = (folder / "catalogue.safetensors").read_bytes()
    tokenizer.catalogue = model.catalogue = other
    with pytest.raises(ValueError, match=r"catalogue has codebook_sizes=\[4, 4\], the tokenizer \[8, 8, 8\]"):
        tokenizer.encode_items([7])
    for thing in (tokenizer, model):
        with pytest.raises(ValueError, match=r"codebook_sizes=\[4, 4\].*different semantic IDs"):
            thing.save_pretrained(folder)
    assert (folder / "catalogue.safetensors").read_bytes() == before  # nothing lost
    other.save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"codebook_sizes=\[4, 4\].*Use the catalogue that the model was trained with"
    ):
        AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="different semantic IDs"):
        AutoTokenizer.from_pretrained(folder).encode_items([7])


def test_a_catalogue_of_the_same_sizes_but_of_another_tokenizer(folder):
    own = tiny_catalogue()
    renamed = Catalogue(own.semantic_ids, SIZES)  # the same codes, other items
    for other in (tiny_catalogue(seed=1), renamed, tiny_catalogue(64)):
        SemanticIdTokenizer(codebook_sizes=SIZES, catalogue=other).save_pretrained(folder)
        with pytest.raises(
            ValueError, match=rf"fingerprint {other.fingerprint()}, config.json says {own.fingerprint()}"
        ):
            AutoModel.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, catalogue_fingerprint=None)  # the exchange is meant
    assert model.catalogue.num_items == 64
    model.catalogue = model.catalogue.with_items([[1, 2, 3]], [7])
    model.save_pretrained(folder)
    assert AutoModel.from_pretrained(folder).catalogue.index_of([7]) == [64]
    edit_config(folder, catalogue_fingerprint=None)  # saved by a version without fingerprints
    own.save_pretrained(folder)
    assert AutoModel.from_pretrained(folder).catalogue.num_items == own.num_items


# ---- a config of a newer version


@pytest.fixture
def warnings(monkeypatch):
    from onerec_hf.models import configuration_onerec

    found = []
    monkeypatch.setattr(configuration_onerec.logger, "warning", found.append)
    return found


def test_a_field_of_a_newer_version_is_named(folder, warnings):
    AutoModel.from_pretrained(folder, attn_implementation="eager", dtype="bfloat16").config.to_dict()
    assert warnings == []  # what transformers itself puts into a config is no news
    edit_config(folder, num_wormholes=3, transformers_version="9.9.9")
    AutoModel.from_pretrained(folder)
    assert (
        len(warnings) == 1 and "['num_wormholes'] and ignores it" in warnings[0] and "Update onerec_hf" in warnings[0]
    )


def test_a_value_or_a_model_of_a_newer_version(folder):
    edit_config(folder, score_normalization="galaxy")
    with pytest.raises(Exception, match=r"(?s)score_normalization.*\('level', 'valid'\), got galaxy"):
        AutoModel.from_pretrained(folder)
    edit_config(folder, model_type="onerec_v9", auto_map={})
    with pytest.raises(ValueError, match="model type `onerec_v9`"):
        AutoModel.from_pretrained(folder)


# ---- no write permission


@pytest.fixture
def locked():
    """A folder that the test may not write to; root may write everywhere, so it becomes somebody else."""
    folder = Path(tempfile.mkdtemp())  # not `tmp_path`, which lies in a folder that only its owner may enter
    folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    yield folder
    if root:
        os.seteuid(0)
    assert list(folder.iterdir()) == []
    folder.rmdir()


def test_nothing_is_written_without_permission(locked):
    for thing in (tiny_model(tiny_catalogue()), SemanticIdTokenizer(codebook_sizes=SIZES)):
        with pytest.raises(Exception, match=rf"(?s)[Pp]ermission denied.*{locked}"):
            thing.save_pretrained(locked)
        with pytest.raises(PermissionError, match=str(locked / "new")):
            thing.save_pretrained(locked / "new")


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(FileExistsError, match=str(tmp_path / "model")):
        tiny_model(tiny_catalogue()).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_a_trainer_says_at_once_that_it_cannot_write(locked):
    tokenizer = SemanticIdTokenizer(codebook_sizes=SIZES, catalogue=tiny_catalogue())
    collator = OneRecCollator(tokenizer.encode_semantic_ids(tokenizer.catalogue.semantic_ids))
    rows = datasets.Dataset.from_dict({"user": [0, 1], "history": [[1, 2, 3], [4, 5, 6]]})
    args = OneRecSFTConfig(output_dir=str(locked), report_to="none", max_steps=1)
    with pytest.raises(PermissionError, match=f"output_dir='{locked}' cannot be written.*Nothing was trained"):
        OneRecSFTTrainer(tiny_model(tiny_catalogue()), args, data_collator=collator, train_dataset=rows)


def test_a_folder_without_splits(tmp_path):
    """What every recipe says where `prepare.py` did not run, or failed."""
    with pytest.raises(
        FileNotFoundError, match=r"mydata is no data folder: .*splits is not there. Make it with .*--output"
    ):
        load_splits(tmp_path / "mydata")
