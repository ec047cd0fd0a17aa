"""Up to the Hub and down again, against a server on 127.0.0.1."""

import json
import os
import shutil
import subprocess
import sys

import datasets
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from onerec_hf import SemanticIdTokenizer
from onerec_hf.collators import OneRecCollator
from onerec_hf.hub import model_card, push_to_hub, repository_files
from onerec_hf.trainers import OneRecSFTConfig, OneRecSFTTrainer

from ..tiny import SIZES, tiny_catalogue, tiny_model

CONTEXT = [[1000, 1001, 1002, 1003], [1060, 1059, 1058, 1057]]


def save(folder, model=None, **card):
    """A complete repository: model (or adapter), tokenizer, catalogue, code and card."""
    model = tiny_model(tiny_catalogue()) if model is None else model
    model.save_pretrained(folder)
    SemanticIdTokenizer(codebook_sizes=SIZES, catalogue=tiny_catalogue()).save_pretrained(folder)
    texts = {"title": "Tiny", "repo": str(folder), "data": "None.", "training": "None."}
    model_card(model.config, **texts | card).save(folder / "README.md")
    return folder


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    return save(tmp_path_factory.mktemp("complete"))


@pytest.fixture
def folder(complete, tmp_path):
    return shutil.copytree(complete, tmp_path / "model")


# ---- up


def test_one_commit_with_everything_and_nothing_else(hub, folder):
    (folder / "checkpoint-10").mkdir()
    for name in (
        "predictions.parquet",
        "optimizer.pt",
        "training_args.bin",
        "trainer_state.json",
        "checkpoint-10/config.json",
    ):
        (folder / name).write_bytes(b"{}")
    (folder / "training_curve.png").write_bytes(b"\x89PNG")
    for name in ("quantizer_config.json", "quantizer.safetensors"):
        shutil.copy(folder / ("config.json" if name.endswith("json") else "model.safetensors"), folder / name)
    commit = push_to_hub(folder, "org/onerec-1b", private=True, commit_message="First")
    repository = hub.repos["org/onerec-1b"]
    assert repository.private and [message for _, message, _ in repository.commits] == ["First"]
    code = "configuration_onerec configuration_onerec_v2 modeling_onerec_v2 modeling_semantic_id "
    code += "generation_semantic_id beam_search catalogue prefix_index modeling_attention modeling_layers moe "
    code += "catalogue_generate captured_search tokenization_semantic_id item_ids input_checks parallel"
    assert set(repository.branches["main"]) == {
        *(f"{name}.py" for name in code.split()),
        *("config.json", "model.safetensors", "generation_config.json", "catalogue.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "quantizer_config.json", "quantizer.safetensors"),
        *("README.md", "training_curve.png"),
    }
    assert commit.commit_url.startswith(f"{hub.url}/org/onerec-1b/commit/")
    pushed, local = repository.branches["main"]["README.md"].decode(), (folder / "README.md").read_text()
    changed = [line for line, old in zip(pushed.splitlines(), local.splitlines(), strict=True) if line != old]
    assert changed == ['repo = "org/onerec-1b"']  # the snippet loads what was pushed


def test_branch_and_pull_request(hub, folder):
    push_to_hub(folder, "org/tiny")
    assert not hub.repos["org/tiny"].private
    before = dict(hub.repos["org/tiny"].branches["main"])
    (folder / "LICENSE").write_text("Apache-2.0")
    push_to_hub(folder, "org/tiny", revision="next")
    commit = push_to_hub(folder, "org/tiny", create_pr=True)
    branches = hub.repos["org/tiny"].branches
    assert branches["main"] == before and set(branches) == {"main", "next", "refs/pr/1"}
    assert "LICENSE" in branches["next"] and "LICENSE" in branches["refs/pr/1"]
    assert commit.pr_url == f"{hub.url}/org/tiny/discussions/1"
    with pytest.raises(ValueError, match="pull request against main"):
        push_to_hub(folder, "org/tiny", create_pr=True, revision="next")


@pytest.mark.parametrize(
    "where, problem, advice",
    [
        ("repos/create|preupload", 401, "hf auth login"),
        ("repos/create|preupload", 403, "pass one that may"),
        ("preupload", 404, "check the name"),
        ("preupload", 500, "run the same call again"),
        ("commit", 500, "run the same call again"),
        ("commit", 412, "in between"),
        ("PUT /blobs", "hang up", "run the same call again"),
        ("commit", "hang up", "run the same call again"),
    ],
)
def test_a_failed_upload_leaves_nothing_half_written(hub, folder, where, problem, advice):
    push_to_hub(folder, "org/tiny")
    before = dict(hub.repos["org/tiny"].branches["main"])
    local = {path.name: path.read_bytes() for path in folder.iterdir()}
    tiny_model(tiny_catalogue(), seed=7).save_pretrained(folder)
    local["model.safetensors"] = (folder / "model.safetensors").read_bytes()
    hub.fail = {where: problem}
    with pytest.raises(OSError, match=f"(?s)org/tiny.*{advice}.*half-written"):
        push_to_hub(folder, "org/tiny")
    assert hub.repos["org/tiny"].branches == {"main": before} and len(hub.repos["org/tiny"].commits) == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == local
    hub.fail = {}
    push_to_hub(folder, "org/tiny")  # the same call again
    assert hub.repos["org/tiny"].branches["main"]["model.safetensors"] == local["model.safetensors"]


@pytest.mark.parametrize("options", [{}, {"revision": "next"}, {"create_pr": True}])
@pytest.mark.parametrize("where, problem", [("commit", 500), ("preupload", "hang up"), ("PUT /blobs", "hang up")])
def test_a_repository_made_for_nothing_stays_and_says_so(hub, folder, where, problem, options):
    """Removed it is never: it may hold by then what somebody else has pushed."""
    hub.fail = {where: problem}
    with pytest.raises(OSError, match=r"(?s)could not upload.*org/tiny was made by this call and is empty"):
        push_to_hub(folder, "org/tiny", **options)
    assert list(hub.repos) == ["org/tiny"] and not [line for line in hub.log if line.startswith("DELETE")]
    hub.fail = {}
    push_to_hub(folder, "org/tiny", **options)
    assert len(hub.repos["org/tiny"].commits) == 1


def test_what_was_there_or_has_arrived_is_told_apart(hub, folder):
    hub.fail = {"commit": 500, "tree": 500}  # nobody can say what is there
    with pytest.raises(OSError, match=r"(?s)org/tiny was made by this call: .*hf repos delete org/tiny"):
        push_to_hub(folder, "org/tiny")
    assert not hub.repos["org/tiny"].branches["main"]
    hub.fail = {"commit": 500}
    with pytest.raises(OSError, match=r"org/tiny is half-written; \S+ is untouched.$"):  # it was there before
        push_to_hub(folder, "org/tiny")
    assert "org/tiny" in hub.repos
    hub.fail = {"commit": "lose the answer"}
    with pytest.raises(OSError, match="the answer was lost, not the commit"):
        push_to_hub(folder, "org/other")
    assert "model.safetensors" in hub.repos["org/other"].branches["main"]


def test_a_wrong_token_and_a_wrong_name(hub, folder):
    with pytest.raises(OSError, match=r"(?s)could not create the repository on org/tiny.*hf auth login"):
        push_to_hub(folder, "org/tiny", token="hf_wrong")
    with pytest.raises(ValueError, match="'a/b/c' is no name of a repository"):
        push_to_hub(folder, "a/b/c")
    assert hub.repos == {}


# ---- what is refused before the first byte


@pytest.mark.parametrize(
    "name, advice",
    [
        ("README.md", "onerec publish"),
        ("model.safetensors", "model.save_pretrained"),
        ("generation_config.json", "model.save_pretrained"),
        ("tokenizer.json", "tokenizer.save_pretrained"),
        ("catalogue.safetensors", "model.catalogue"),
        ("beam_search.py", "copies the code"),  # imported by the modelling file, not named by auto_map
        ("tokenization_semantic_id.py", "copies the code"),
    ],
)
def test_an_incomplete_folder_is_refused(hub, folder, name, advice):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"(?s)not ready for the Hub.*{name}.*{advice}"):
        push_to_hub(folder, "org/tiny")
    assert hub.log == []


def test_everything_that_is_wrong_is_named_at_once(folder):
    (folder / "README.md").unlink()
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        repository_files(folder)
    assert str(error.value).count("\n- ") == 3
    assert "model.safetensors cannot be read" in str(error.value) and "auto_map in config.json" in str(error.value)


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("config.json", b'{"model_type": "onerec_v2", ', "config.json cannot be read"),
        ("tokenizer.json", b"[]", "holds a list, no mapping"),
        ("collator_config.json", b"{}", "names no collator_class"),
        ("items.jsonl", b'{"item_id": 1}\n{"item_id": 2, "title"\n', "items.jsonl cannot be read .line 2"),
        ("items.jsonl", b'{"item_id": 1}\n{"title": "a"}\n', "line 2 has no item_id"),
        ("items.jsonl", '{"item_id": 1, "title": "é"}'.encode("latin-1"), "items.jsonl cannot be read .'utf-8'"),
        ("README.md", b"---\nlicense: [\n---\n# Tiny\n", "README.md cannot be read .its metadata"),
        ("modeling_layers.py", b"import torch\nclass Layer(", "modeling_layers.py cannot be read"),
        ("training_curve.png", b"", "training_curve.png cannot be read"),
        ("quantizer_config.json", b"{}", "quantizer.safetensors: quantizer_config.json is there without it"),
        (
            "collator_config.json",
            b'{"collator_class": "C", "tables": ["item_features/author"]}',
            "collator.safetensors: ",
        ),
    ],
)
def test_every_file_is_read_before_it_goes_up(hub, folder, name, content, reason):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)not ready for the Hub.*{reason}"):
        push_to_hub(folder, "org/tiny")
    assert hub.log == []


def test_a_title_with_a_line_separator_goes_up(folder):
    (folder / "items.jsonl").write_text('{"item_id": 1, "title": "a\u2028b\x85c"}\n', encoding="utf-8")
    assert "items.jsonl" in repository_files(folder)


def test_shards_are_counted(folder):
    model = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))
    assert len(shards) > 1 and set(shards) < set(repository_files(folder))
    (folder / shards[0]).unlink()
    with pytest.raises(ValueError, match=shards[0]):
        repository_files(folder)


def test_no_folder_and_no_model(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        repository_files(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no model.*checkpoints"):
        repository_files(tmp_path)


# ---- trainers


def test_a_trainer_writes_our_card_and_pushes_itself(hub, tmp_path):
    tokenizer = SemanticIdTokenizer(codebook_sizes=SIZES, catalogue=tiny_catalogue())
    collator = OneRecCollator(tokenizer.encode_semantic_ids(tokenizer.catalogue.semantic_ids))
    rows = {"user": list(range(8)), "history": [[u, u + 1, u + 2] for u in range(8)], "length": [3] * 8}
    model = AutoModel.from_pretrained(save(tmp_path / "base"))
    model.config._name_or_path = "org/base"  # as if it came from the Hub
    trainer = OneRecSFTTrainer(
        model,
        OneRecSFTConfig(
            output_dir=str(tmp_path / "run"), hub_model_id="org/run", max_steps=2, logging_steps=1, report_to="none"
        ),
        data_collator=collator,
        train_dataset=datasets.Dataset.from_dict(rows),
        eval_dataset=datasets.Dataset.from_dict(rows | {"targets": [[u + 3] for u in range(8)]}),
        processing_class=tokenizer,
        generation_metrics=lambda model: {"recall@10": 0.25},
    )
    trainer.train()
    trainer.evaluate()
    commit = trainer.push_to_hub(private=True, tags="tiny")
    repository = hub.repos["org/run"]
    assert repository.private and len(repository.commits) == 1 and commit.repo_url.repo_id == "org/run"
    files = repository.branches["main"]
    assert {"model.safetensors", "catalogue.safetensors", "tokenizer.json", "beam_search.py"} < set(files)
    assert not [name for name in files if name.endswith(".bin")]
    for name in ("training_curve.png", "prediction_entropy.png"):
        assert files[name][:4] == b"\x89PNG" and f"({name})" in files["README.md"].decode()
    card = ModelCard(files["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation, card.data.license) == (
        "org/base",
        "finetune",
        "apache-2.0",
    )
    assert "tiny" in card.data.tags and "onerec" in card.data.tags
    assert [(r.metric_name, r.metric_value, r.dataset_split) for r in card.data.eval_results] == [
        ("recall@10", 0.25, "validation")
    ]
    for words in (
        "| steps | 2 (2 epochs) |",
        "| rows per step | 8 |",
        "8 training rows, 8 validation rows",
        'repo = "org/run"',
    ):
        assert words in card.content
    assert "time machine" not in card.content and "quick start" not in card.content.lower()


# ---- adapters


def adapter_of(base, folder, **card):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return save(folder, model, **card), model


def test_an_adapter_of_a_model_that_only_lies_here_is_refused(complete, tmp_path):
    folder, _ = adapter_of(AutoModel.from_pretrained(complete), tmp_path / "adapter", adapter=True)
    with pytest.raises(ValueError, match="push the base model"):
        repository_files(folder)


# ---- down: a process that does not have the package

DOWN = """
import json, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "onerec_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import torch
from transformers import AutoModel, AutoTokenizer
results = {}
for repo, options in json.loads(sys.argv[1]):
    model = AutoModel.from_pretrained(repo, trust_remote_code=True, **options)
    tokenizer = AutoTokenizer.from_pretrained(repo, trust_remote_code=True, **options)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    context = torch.tensor(tokenizer.encode_items(json.loads(sys.argv[2])))
    found = model.generate(context_ids=context, num_beams=20, num_return_sequences=10)
    results[repo + options.get("revision", "")] = found.tolist()
try:
    AutoModel.from_pretrained("org/absent", trust_remote_code=True)
except OSError as error:
    results["absent"] = str(error)
exec(sys.argv[3])
print(json.dumps(results))
"""


def expected(model):
    tokenizer = SemanticIdTokenizer(codebook_sizes=SIZES, catalogue=tiny_catalogue())
    context = torch.tensor(tokenizer.encode_items(CONTEXT))
    return model.generate(context_ids=context, num_beams=20, num_return_sequences=10).tolist()


@pytest.mark.parametrize("problem", [401, 403, 404, 500, "hang up"])
def test_a_failed_download_says_so_and_leaves_nothing_half_written(hub, folder, tmp_path, problem):
    push_to_hub(folder, "org/tiny")
    hub.fail = {r"GET .*/resolve/.*\.safetensors": problem}
    with pytest.raises(
        OSError, match=r"connection error when trying to load org/tiny|Can't load the model for 'org/tiny'"
    ):
        AutoModel.from_pretrained("org/tiny")
    hub.fail = {}
    model, ours = AutoModel.from_pretrained("org/tiny"), AutoModel.from_pretrained(folder)
    assert all(torch.equal(weight, ours.state_dict()[name]) for name, weight in model.state_dict().items())
    assert model.catalogue.fingerprint() == ours.catalogue.fingerprint()


def test_the_whole_way_up_and_down(hub, folder, tmp_path):
    old, new = AutoModel.from_pretrained(folder), tiny_model(tiny_catalogue(), seed=7)
    push_to_hub(folder, "org/onerec-1b", revision="old")
    push_to_hub(save(tmp_path / "new", new), "org/onerec-1b")
    # transformers' own way, in two commits, gives a repository that loads as well
    theirs = tiny_model(tiny_catalogue(), seed=8, architecture="onerec")
    theirs.push_to_hub("org/theirs")
    SemanticIdTokenizer(codebook_sizes=SIZES, catalogue=tiny_catalogue()).push_to_hub("org/theirs")
    adapter, adapted = adapter_of(AutoModel.from_pretrained("org/onerec-1b"), tmp_path / "adapter", adapter=True)
    push_to_hub(adapter, "org/adapter")
    wanted = [("org/onerec-1b", {}), ("org/onerec-1b", {"revision": "old"}), ("org/theirs", {}), ("org/adapter", {})]
    snippet = hub.repos["org/onerec-1b"].branches["main"]["README.md"].decode().split("```python")[1].split("```")[0]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", DOWN, json.dumps(wanted), json.dumps(CONTEXT), snippet],
        env=environment | hub.environment(tmp_path / "home"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    printed, results = result.stdout.strip().splitlines()[-2:]
    results = json.loads(results)
    assert results["org/onerec-1b"] == expected(new)
    assert results["org/onerec-1bold"] == expected(old) != expected(new)
    assert results["org/theirs"] == expected(theirs)
    assert results["org/adapter"] == expected(adapted.eval()) != expected(new)
    assert "org/absent is not a local folder and is not a valid model identifier" in results["absent"]
    assert len(json.loads(printed)) == 10  # the snippet of the card, as printed
    assert ModelCard.load("org/onerec-1b").data.library_name == "transformers"
