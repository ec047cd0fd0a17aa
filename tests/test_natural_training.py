"""What a user of transformers and TRL types first, with a trainer: it trains, or says what to do instead."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, EarlyStoppingCallback, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from onerec_hf import SemanticIdTokenizer
from onerec_hf.collators import OneRecCollator, SessionCollator
from onerec_hf.data import Interactions, leave_last_out
from onerec_hf.trainers import (
    IPAConfig,
    IPATrainer,
    OneRecGRPOConfig,
    OneRecGRPOTrainer,
    OneRecSFTConfig,
    OneRecSFTTrainer,
)

from .numeric import assert_close
from .tiny import tiny_catalogue, tiny_context, tiny_model


def item_tokens(model):
    return model.catalogue.semantic_ids.numpy() + torch.tensor(model.config.level_offsets).numpy()


def histories(num_users=6, length=7, num_items=65):
    """Rows as of `leave_last_out`, without a column `length`."""
    generator = torch.Generator().manual_seed(3)
    items = torch.randint(num_items, (num_users, length), generator=generator).tolist()
    return datasets.Dataset.from_dict({"user": range(num_users), "history": items})


def with_targets(num_users=6):
    rows = histories(num_users)
    return rows.add_column("targets", [[(7 * user) % 65] for user in range(num_users)])


def steps(folder, kind=TrainingArguments, **more):
    return kind(output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, **more)


@pytest.fixture
def saved(tmp_path):
    """A folder that holds a model without features."""
    folder = tmp_path / "tiny-onerec"
    tiny_model(tiny_catalogue()).save_pretrained(folder)
    return folder


# ---- our trainers


def test_sft_takes_a_folder_and_rows_alone(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = OneRecSFTTrainer(str(saved), train_dataset=histories())
    assert type(trainer.data_collator) is OneRecCollator and type(trainer.args) is OneRecSFTConfig
    assert trainer.args.output_dir == "tiny-onerec-SFT"
    assert trainer.processing_class.codebook_sizes == [8, 8, 8]
    assert trainer.args.train_sampling_strategy == "random"
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert batch["target_ids"].shape == (1, 6, 3)


def test_rows_without_lengths_cannot_be_rebalanced(saved, tmp_path):
    args = OneRecSFTConfig(str(tmp_path), train_sampling_strategy="batch_rebalance")
    with pytest.raises(ValueError, match="reads the lengths of histories from the column 'length'; the training rows"):
        OneRecSFTTrainer(saved, args, train_dataset=histories())


def test_sft_takes_a_path_and_plain_training_arguments(saved, tmp_path):
    args = steps(tmp_path / "out", learning_rate=0.01, eval_strategy="steps", eval_steps=1)
    trainer = OneRecSFTTrainer(saved, args, train_dataset=histories(), eval_dataset=with_targets())
    before = trainer.policy.lm_head.weight.detach().clone()
    trainer.train()
    assert trainer.args.learning_rate == 0.01 and trainer.args.max_steps == 2
    assert trainer.args.remove_unused_columns is False and trainer.args.label_names == ["target_ids"]
    assert trainer.state.global_step == 2 and not torch.equal(before, trainer.policy.lm_head.weight)
    assert "eval_loss" in trainer.state.log_history[-2] | trainer.state.log_history[-1]


def test_ipa_and_rl_take_a_folder_or_an_adapter_and_no_arguments(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = AutoModel.from_pretrained(saved)
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained("adapter")
    for model in (saved, "adapter"):
        ipa = IPATrainer(model, train_dataset=histories(), reward=Recorded())
        rl = OneRecGRPOTrainer(model, Recorded(), train_dataset=histories())
        for trainer, kind, end in ((ipa, IPAConfig, "IPA"), (rl, OneRecGRPOConfig, "GRPO")):
            assert type(trainer.args) is kind and trainer.args.output_dir == f"{Path(model).name}-{end}"
            assert type(trainer.collator) is OneRecCollator
            trained = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad]
            assert trained and (model == saved or all("lora" in name for name in trained))


def test_arguments_that_are_of_another_trainer_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match=r"num_generations.*OneRecSFTConfig does not have"):
        OneRecSFTTrainer(saved, steps(tmp_path, OneRecGRPOConfig, num_generations=2), train_dataset=histories())
    with pytest.raises(TypeError, match="args is a dict: give a OneRecSFTConfig"):
        OneRecSFTTrainer(saved, {"max_steps": 2}, train_dataset=histories())


def test_sft_in_trls_order_of_arguments(tmp_path):
    model = tiny_model(tiny_catalogue())
    collator = OneRecCollator(item_tokens(model), max_history=3)
    trainer = OneRecSFTTrainer(model, steps(tmp_path, OneRecSFTConfig), collator, histories())
    assert trainer.data_collator is collator and trainer.train_dataset.num_rows == 6


def test_sft_reads_the_collator_of_the_folder(saved, tmp_path):
    model = tiny_model(tiny_catalogue())
    OneRecCollator(item_tokens(model), max_history=3).save_pretrained(saved)
    trainer = OneRecSFTTrainer(saved, steps(tmp_path / "out"), train_dataset=histories())
    assert trainer.data_collator.max_history == 3


def test_sft_trains_an_adapter_of_a_folder_and_goes_on_with_it(saved, tmp_path):
    lora = LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    first = OneRecSFTTrainer(saved, steps(tmp_path / "adapter"), train_dataset=histories(), peft_config=lora)
    first.train()
    first.save_model()
    second = OneRecSFTTrainer(tmp_path / "adapter", steps(tmp_path / "out"), train_dataset=histories())
    assert any(weight.requires_grad for name, weight in second.model.named_parameters() if "lora" in name)
    context = tiny_context(second.policy.catalogue, second.policy)
    with torch.no_grad():
        found, expected = (t.policy.eval()(**context, target_ids=context["context_ids"][:1, :1].expand(3, 1, 3)).loss
                           for t in (second, first))  # fmt: skip
    assert_close(found, expected, terms=100)


def test_the_collator_of_the_systems(tmp_path):
    model = tiny_model(tiny_catalogue(), architecture="onerec")
    trainer = OneRecSFTTrainer(model, steps(tmp_path), train_dataset=with_targets())
    assert type(trainer.data_collator) is SessionCollator
    model = tiny_model(tiny_catalogue(), architecture="v1")
    with pytest.raises(
        ValueError, match=r"no collator_config.json, and the model reads a pathway of positive feedback"
    ):
        OneRecSFTTrainer(model, steps(tmp_path), train_dataset=with_targets())


@pytest.mark.parametrize("features", [{"context_features": {"play_time_ms": 4}}, {"user_features": {"age": 5}}])
def test_a_model_with_features_needs_its_collator(tmp_path, features):
    model = tiny_model(tiny_catalogue(), **features)
    with pytest.raises(ValueError, match=r"no collator_config.json, and the model reads the features.*data_collator="):
        OneRecSFTTrainer(model, steps(tmp_path), train_dataset=histories())


def test_wrong_models_and_tokenizers_are_refused(tmp_path):
    with pytest.raises(TypeError, match="model is a Linear: a OneRec model is needed"):
        OneRecSFTTrainer(torch.nn.Linear(2, 2), steps(tmp_path), train_dataset=histories())
    with pytest.raises(ValueError, match=r"has no catalogue.*set `model.catalogue`"):
        OneRecSFTTrainer(tiny_model(), steps(tmp_path), train_dataset=histories())
    other = SemanticIdTokenizer(codebook_sizes=[4, 4, 4])
    with pytest.raises(ValueError, match=r"processing_class has codebook_sizes=\[4, 4, 4\], the model \[8, 8, 8\]"):
        OneRecSFTTrainer(
            tiny_model(tiny_catalogue()), steps(tmp_path), train_dataset=histories(), processing_class=other
        )


def test_a_line_says_the_size_before_the_first_step(tmp_path, caplog):
    model = tiny_model(tiny_catalogue())
    OneRecSFTTrainer(model, steps(tmp_path), train_dataset=histories()).train()
    total = f"{model.num_parameters():,}"
    assert f"Training {total} parameters, {total} of them trainable, on 6 examples in 2 steps." in caplog.text


def test_rl_with_a_reference_of_a_model_that_was_never_saved(tmp_path):
    args = steps(tmp_path, OneRecGRPOConfig, num_generations=2, beta=0.1)
    with pytest.raises(ValueError, match=r"beta=0.1.*never saved.*save_pretrained\(folder\)"):
        OneRecGRPOTrainer(tiny_model(tiny_catalogue()), lambda **columns: [], args, histories())


# ---- one reward function for IPA and RL


class Recorded:
    """A reward function with the documented signature, that keeps what it was given."""

    __name__ = "recorded"

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, completion_ids, item_ids, user, **columns):
        self.calls.append((prompts, completions, completion_ids, item_ids, user))
        return [None if ids is None else float(ids[0] % 7) for ids in item_ids]


def test_one_reward_function_serves_ipa_and_rl(saved, tmp_path):
    reward, catalogue = Recorded(), tiny_catalogue()
    args = steps(tmp_path / "ipa", IPAConfig, num_candidates=4, dpo_ratio=1.0, kl_users=0)
    IPATrainer(saved, args, train_dataset=histories(), reward=reward).train()
    ipa = list(reward.calls)
    args = steps(tmp_path / "rl", OneRecGRPOConfig, num_generations=2)
    OneRecGRPOTrainer(saved, reward, args, histories()).train()
    rl = reward.calls[len(ipa) :]
    assert ipa and rl
    tokenizer = SemanticIdTokenizer(codebook_sizes=[8, 8, 8], catalogue=catalogue)
    for prompts, completions, completion_ids, item_ids, user in ipa + rl:
        assert prompts == user  # in these rows, user 3 is row 3
        known = tokenizer.decode_items([ids[:3] for ids in completion_ids])
        assert item_ids == [[same[0]] for same in known]
        assert completions == tokenizer.batch_decode(completion_ids, skip_special_tokens=True)


@pytest.mark.parametrize("trainer", ["ipa", "rl"])
def test_rows_with_a_column_of_the_reward_functions_name_are_refused(saved, tmp_path, trainer):
    rows = histories().add_column("item_ids", [1] * 6)
    with pytest.raises(ValueError, match=r"the rows have a column 'item_ids'.*rename"):
        if trainer == "ipa":
            IPATrainer(saved, steps(tmp_path / "out", IPAConfig), train_dataset=rows, reward=Recorded())
        else:
            OneRecGRPOTrainer(saved, Recorded(), steps(tmp_path / "out", OneRecGRPOConfig, num_generations=2), rows)


# ---- transformers' and TRL's own trainers


def test_plain_trainer_stops_early_by_its_evaluation_loss(tmp_path):
    model = tiny_model(tiny_catalogue())
    args = TrainingArguments(
        str(tmp_path), max_steps=9, eval_strategy="steps", eval_steps=1, save_steps=1, report_to=[], use_cpu=True,
        remove_unused_columns=False, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        learning_rate=10.0, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(
        model, args, OneRecCollator(item_tokens(model)), histories(), with_targets(),
        callbacks=[EarlyStoppingCallback(2)],
    )  # fmt: skip
    batch = trainer.data_collator(with_targets().to_list())
    with torch.no_grad():
        expected = model(**batch).loss
    assert_close(torch.tensor(trainer.evaluate()["eval_loss"]), expected, terms=1000)
    trainer.train()
    assert trainer.state.global_step < 9  # such a step makes it worse
    assert trainer.state.best_metric == min(
        log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log
    )


def test_plain_trainer_with_labels_has_an_evaluation_loss(tmp_path):
    model = tiny_model(tiny_catalogue())
    context = tiny_context(model.catalogue, model)
    codes = torch.from_numpy(item_tokens(model))[:3]
    rows = torch.nn.functional.pad(codes, (1, 0), value=model.config.bos_token_id)
    labels = rows.masked_fill(rows == model.config.bos_token_id, -100)
    batch = {**context, "input_ids": rows, "labels": labels}
    data = datasets.Dataset.from_dict({name: value.tolist() for name, value in batch.items()})
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, remove_unused_columns=False)
    with torch.no_grad():
        expected = model(**batch).loss
    assert_close(torch.tensor(Trainer(model, args, eval_dataset=data).evaluate()["eval_loss"]), expected, terms=100)


def test_trls_own_trainers_are_refused_before_they_train(saved, tmp_path):
    model = tiny_model(tiny_catalogue())
    data = datasets.Dataset.from_dict({"input_ids": [[1, 4, 12, 20]] * 4, "labels": [[-100, 4, 12, 20]] * 4})
    args = SFTConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    tokenizer = SemanticIdTokenizer(codebook_sizes=[8, 8, 8])
    for peft in (None, LoraConfig(target_modules=["q_proj"])):
        with pytest.raises(ValueError, match="Use `OneRecSFTTrainer` instead of SFTTrainer"):
            SFTTrainer(model, args, OneRecCollator(item_tokens(model)), data, processing_class=tokenizer,
                       peft_config=peft)  # fmt: skip
    pairs = datasets.Dataset.from_dict({"prompt": ["<|sid_begin|>"], "chosen": ["<s_a_1>"], "rejected": ["<s_a_2>"]})
    args = DPOConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="`IPATrainer` instead of DPOTrainer"):
        DPOTrainer(str(saved), args=args, train_dataset=pairs, processing_class=tokenizer)


def test_return_loss_says_whether_there_is_a_loss():
    model = tiny_model(tiny_catalogue())
    context = tiny_context(model.catalogue, model)
    target = torch.from_numpy(item_tokens(model))[:3].unsqueeze(1)
    found, silent = model(**context, target_ids=target), model(**context, target_ids=target, return_loss=False)
    assert found.loss is not None and silent.loss is None
    assert_close(silent.target_log_probs, found.target_log_probs, terms=100)


# ---- the model's own arguments


@pytest.mark.parametrize("architecture", ["onerec", "v1", "v2"])
def test_padding_is_masked_where_there_is_no_mask(architecture):
    model = tiny_model(tiny_catalogue(), architecture=architecture)
    context = tiny_context(model.catalogue, model)
    target = torch.from_numpy(item_tokens(model))[:3].unsqueeze(1).expand(-1, model.num_session_items, -1)
    with torch.no_grad():
        expected = model(**context, target_ids=target).target_log_probs
        found = model(context_ids=context["context_ids"], target_ids=target).target_log_probs
        seen = torch.ones_like(context["context_mask"])
        other = model(context_ids=context["context_ids"], context_mask=seen, target_ids=target).target_log_probs
    assert_close(found, expected, terms=100)
    assert (other - expected).abs().max() > 1e-3


def test_attention_mask_is_no_mask_of_the_history():
    model = tiny_model(tiny_catalogue())
    context = tiny_context(model.catalogue, model)
    codes = torch.from_numpy(item_tokens(model))[:3]
    rows = torch.nn.functional.pad(codes, (1, 0), value=1)
    wrong = {"context_ids": context["context_ids"], "attention_mask": context["context_mask"]}
    with pytest.raises(ValueError, match="The mask of the history is context_mask"):
        model(**wrong, input_ids=rows)
    with pytest.raises(ValueError, match="The mask of the history is context_mask"):
        model(**wrong, target_ids=codes.unsqueeze(1))


def test_attentions_come_back_with_targets():
    model = tiny_model(tiny_catalogue())
    context = tiny_context(model.catalogue, model)
    targets = torch.from_numpy(item_tokens(model))[:3].unsqueeze(1)
    with pytest.raises(ValueError, match=r"set_attn_implementation\('eager'\)"):
        model(**context, target_ids=targets, output_attentions=True)
    model.set_attn_implementation("eager")
    found = model(**context, target_ids=targets, output_attentions=True)
    assert len(found.attentions) == len(found.cross_attentions) == 4
    assert_close(found.attentions[0].sum(-1), torch.ones(3, 4, 3), terms=3)


def test_leave_last_out_goes_straight_into_the_trainer(saved, tmp_path):
    """Logs, splits, trainer: nothing else."""
    generator = torch.Generator().manual_seed(0)
    users = torch.arange(8).repeat_interleave(6)
    items = torch.randint(65, (48,), generator=generator)
    ids = np.arange(1000, 1065)
    log = Interactions(users.numpy(), items.numpy(), np.arange(48), np.arange(8), ids)
    splits = leave_last_out(log)
    rows = splits["train"].remove_columns([name for name in splits["train"].column_names if name == "length"])
    trainer = OneRecSFTTrainer(saved, steps(tmp_path / "out"), train_dataset=rows, eval_dataset=splits["validation"])
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
