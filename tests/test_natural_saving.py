"""Every way of saving a model leaves a folder that `Recommender` and `AutoTokenizer` load, or is refused."""

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments

from onerec_hf import SemanticIdTokenizer
from onerec_hf.collators import OneRecCollator
from onerec_hf.recommender import Recommender
from onerec_hf.trainers import OneRecSFTConfig, OneRecSFTTrainer

from .numeric import assert_close
from .tiny import SIZES, tiny_catalogue, tiny_model

HISTORIES = [[1003, 1014], [1020]]


def rows():
    items = np.random.default_rng(0).integers(0, 65, (6, 7))
    return datasets.Dataset.from_dict({"user": range(6), "history": items.tolist()})


def item_tokens(model):
    return model.catalogue.semantic_ids.numpy() + np.array(model.config.level_offsets)


def arguments(folder, kind=TrainingArguments, **more):
    settings = {"max_steps": 1, "report_to": [], "use_cpu": True, "remove_unused_columns": False} | more
    return kind(output_dir=str(folder), **settings)


def check_served(repo, model, **hub_kwargs):
    """`Recommender` and `AutoTokenizer` of a repository give what the model in memory gives."""
    recommender = Recommender.from_pretrained(repo, **hub_kwargs)
    found = recommender.recommend(HISTORIES, k=5)
    tokens = item_tokens(model)
    batch = OneRecCollator(tokens).context([{"user": 0, "history": [i - 1000 for i in ids]} for ids in HISTORIES])
    expected = model.eval().recommend_items(5, **batch)
    ids = model.catalogue.item_ids[expected.items.numpy()].tolist()
    assert [[item.item_id for item in row] for row in found] == ids
    scores = torch.tensor([[item.score for item in row] for row in found])
    assert_close(scores, expected.scores, terms=1000)
    tokenizer = AutoTokenizer.from_pretrained(repo, **hub_kwargs)
    assert tokenizer.codebook_sizes == SIZES
    assert tokenizer.encode_items([1003]).tolist() == tokens[[3]].tolist()
    return recommender


def test_the_model_alone(tmp_path):
    model = tiny_model(tiny_catalogue())
    model.save_pretrained(tmp_path)
    check_served(tmp_path, model).save_pretrained(tmp_path / "again")
    check_served(tmp_path / "again", model)


def test_a_folder_without_a_tokenizer_has_the_tokenizer_of_its_model(tmp_path):
    model = tiny_model(tiny_catalogue())
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    check_served(tmp_path, model)


def test_a_tokenizer_of_another_model_in_the_same_folder_is_replaced(tmp_path):
    SemanticIdTokenizer(codebook_sizes=[4, 4]).save_pretrained(tmp_path)
    model = tiny_model(tiny_catalogue())
    model.save_pretrained(tmp_path)
    check_served(tmp_path, model)


def test_no_tokenizer_without_codebook_sizes(tmp_path):
    with pytest.raises(ValueError, match="codebook_sizes is missing"):
        SemanticIdTokenizer()
    with pytest.raises(ValueError, match="codebook_sizes is missing"):
        SemanticIdTokenizer.from_pretrained(tmp_path)


def test_plain_trainer(tmp_path):
    model = tiny_model(tiny_catalogue())
    trainer = Trainer(model, arguments(tmp_path, save_steps=1), OneRecCollator(item_tokens(model)), rows())
    trainer.train()
    trainer.save_model(tmp_path / "final")
    for folder in (tmp_path / "checkpoint-1", tmp_path / "final"):
        check_served(folder, model)


def test_sft_trainer_saves_its_collator_with_every_checkpoint(tmp_path):
    model = tiny_model(tiny_catalogue())
    collator = OneRecCollator(item_tokens(model), max_history=3)
    trainer = OneRecSFTTrainer(model, arguments(tmp_path, OneRecSFTConfig, save_steps=1), collator, rows())
    trainer.train()
    trainer.save_model(tmp_path / "final")
    for folder in (tmp_path / "checkpoint-1", tmp_path / "final"):
        assert check_served(folder, model).ranker.collator.max_history == 3


@pytest.mark.parametrize("by", ["our trainer", "plain trainer", "peft"])
def test_an_adapter_is_loaded_with_its_base(tmp_path, by):
    base, out = tmp_path / "base", tmp_path / "adapter"
    tiny_model(tiny_catalogue()).save_pretrained(base)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    if by == "our trainer":
        trainer = OneRecSFTTrainer(base, arguments(out), train_dataset=rows(), peft_config=lora)
        trainer.train()
        trainer.save_model()
        model = trainer.model
    else:
        model = get_peft_model(AutoModel.from_pretrained(base), lora)
        if by == "peft":
            model.save_pretrained(out)
            AutoTokenizer.from_pretrained(base).save_pretrained(out)
        else:
            tokenizer = AutoTokenizer.from_pretrained(base)
            collator = OneRecCollator(item_tokens(model.get_base_model()))
            Trainer(model, arguments(out), collator, rows(), processing_class=tokenizer).save_model()
    check_served(out, model.get_base_model())
    plain = Recommender.from_pretrained(base).recommend(HISTORIES, k=5)
    adapted = Recommender.from_pretrained(out).recommend(HISTORIES, k=5)
    assert max(abs(a.score - b.score) for x, y in zip(plain, adapted) for a, b in zip(x, y)) > 1e-3


def test_an_adapter_of_a_base_that_lies_nowhere_says_so(tmp_path, caplog):
    lora = LoraConfig(r=2, task_type="CAUSAL_LM")
    model = tiny_model(tiny_catalogue())
    trainer = OneRecSFTTrainer(model, arguments(tmp_path), train_dataset=rows(), peft_config=lora)
    trainer.save_model()
    assert "its base lies nowhere" in caplog.text


def test_a_model_with_features_and_no_collator_is_refused(tmp_path):
    tiny_model(tiny_catalogue(), context_features={"author": 4}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no collator_config.json, and the model reads the features \['author'\]"):
        Recommender.from_pretrained(tmp_path)


def test_push_of_model_and_tokenizer(hub, tmp_path):
    model = tiny_model(tiny_catalogue())
    model.push_to_hub("org/model")
    check_served("org/model", model)
    SemanticIdTokenizer(codebook_sizes=SIZES, catalogue=model.catalogue).push_to_hub("org/model")
    assert len(hub.repos["org/model"].commits) > 1
    check_served("org/model", model, cache_dir=str(tmp_path / "again"))


def test_save_with_push(hub, tmp_path):
    model = tiny_model(tiny_catalogue())
    model.save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id="org/pushed")
    check_served(tmp_path / "folder", model)
    check_served("org/pushed", model)
