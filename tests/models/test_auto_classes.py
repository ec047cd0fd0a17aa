"""Save, load, generate: through the Auto classes, with the package and in a process that does not have it."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from onerec_hf import Catalogue, OneRecV2ForCausalLM, SemanticIdTokenizer

from ..tiny import ARCHITECTURES, SIZES, tiny_catalogue, tiny_context, tiny_model

HISTORIES = [list(range(1000, 1009)), list(range(1060, 1051, -1))]  # nine items: the pathways of the tiny OneRecV1

WITHOUT_PACKAGE = """
import json, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "onerec_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
histories, results = json.loads(sys.argv[1]), []
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    context = torch.tensor(tokenizer.encode_items(histories))
    for auto in (AutoModel, AutoModelForCausalLM):
        model = auto.from_pretrained(folder, trust_remote_code=True)
        out = model.generate(context_ids=context, num_beams=20, num_return_sequences=10)
        assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    results.append([out.tolist(), tokenizer.decode_items(out.view(-1, 4)[:, 1:])])
print(json.dumps(results))
"""


def save(folder, architecture="v2"):
    """A repository with a tiny model, its tokenizer and its catalogue."""
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, architecture=architecture)
    SemanticIdTokenizer(codebook_sizes=SIZES, catalogue=catalogue).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path)


def test_same_items_without_the_package(tmp_path):
    folders = [save(tmp_path / name, name) for name in ARCHITECTURES]
    env = dict(os.environ, HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(tmp_path / "modules"))
    env.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", WITHOUT_PACKAGE, json.dumps(HISTORIES), *map(str, folders)]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for folder, (sequences, items) in zip(folders, json.loads(result.stdout.strip().splitlines()[-1]), strict=True):
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
        context = torch.tensor(tokenizer.encode_items(HISTORIES))
        expected = model.generate(context_ids=context, num_beams=20, num_return_sequences=10)
        assert sequences == expected.tolist()
        assert items == tokenizer.decode_items(expected.view(-1, 4)[:, 1:])
        assert all(items)


def test_no_pickle_and_a_safe_catalogue(folder):
    assert {path.suffix for path in folder.iterdir() if path.is_file()} <= {".safetensors", ".json", ".py"}
    assert (folder / "catalogue.safetensors").is_file()


def test_save_load_save_is_identical(folder, tmp_path):
    again = tmp_path / "again"
    model = AutoModel.from_pretrained(folder)
    model.save_pretrained(again)
    AutoTokenizer.from_pretrained(folder).save_pretrained(again)
    for name in ("model.safetensors", "catalogue.safetensors", "config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name


def test_every_auto_class(folder):
    assert AutoConfig.from_pretrained(folder).model_type == "onerec_v2"
    for auto in (AutoModel, AutoModelForCausalLM):
        model = auto.from_pretrained(folder)
        assert isinstance(model, OneRecV2ForCausalLM)
        assert isinstance(model.catalogue, Catalogue)
        assert model.generation_config.max_new_tokens == 3
    assert isinstance(AutoTokenizer.from_pretrained(folder), SemanticIdTokenizer)


def test_half_precision_and_loading_info(folder):
    model, info = OneRecV2ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not info["missing_keys"] and not info["unexpected_keys"]
    context = tiny_context(model.catalogue, model)
    assert model.generate(**context, num_beams=8, num_return_sequences=8).shape == (24, 4)


def test_a_model_without_catalogue_says_so(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no catalogue"):
        model.generate(context_ids=torch.zeros(1, 2, 3, dtype=torch.long))
    assert model.generate(context_ids=torch.tensor([[[4, 12, 20]] * 2]), constrained=False).shape == (1, 4)


def test_a_catalogue_of_other_codebooks_is_refused(folder):
    Catalogue([[1, 2]], [4, 4]).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"codebook_sizes=\[4, 4\].*\[8, 8, 8\]"):
        AutoModel.from_pretrained(folder)


def test_a_cut_off_catalogue_is_refused(folder):
    path = folder / "catalogue.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable catalogue"):
        AutoModel.from_pretrained(folder)
