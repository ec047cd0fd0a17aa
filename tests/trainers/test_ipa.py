"""Iterative Preference Alignment: pairs against brute force, a step against the formula, iterations, resuming, bad
input.
"""

import itertools
import json
import math
import re
from dataclasses import fields, replace
from functools import partial

import datasets
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from trl import DPOTrainer

from onerec_hf import Catalogue, OneRecV2ForCausalLM
from onerec_hf.collators import OneRecCollator, PathwayCollator, SessionCollator
from onerec_hf.trainers import IPAConfig, IPATrainer, OneRecSFTConfig
from onerec_hf.trainers.pair_files import load_pairs, load_rows, save_rows
from onerec_hf.trainers.pair_mining import choose_pairs, completion_log_probs, context_inputs, mine_pairs
from onerec_hf.trainers.seed_divergence import sample_candidates, seed_log_ratios

from ..processes import run_processes
from ..tiny import ARCHITECTURES, SIZES, tiny_catalogue, tiny_model

ITEMS = {"onerec": 5, "v1": 30, "v2": 30, "v2_moe": 30}  # of the catalogue; 5 items make 60 ordered sessions of 3


def world(architecture: str, num_rows: int = 8, seed: int = 0, **overrides):
    """A model, its collator and rows: V2 learns from whole histories, the others from rows with targets."""
    catalogue = tiny_catalogue(ITEMS[architecture], num_collisions=0)
    model = tiny_model(catalogue, seed, architecture, **overrides)
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randint, ITEMS[architecture], generator=generator)
    rows = [{"user": i, "history": draw((4,)).tolist()} for i in range(num_rows)]
    if not architecture.startswith("v2"):
        for row in rows:
            row["targets"] = torch.randperm(ITEMS[architecture], generator=generator)[:3].tolist()
            row["is_like"] = [1, 0, 1, 1]
    pathways = partial(
        PathwayCollator,
        positive={"is_like": 1},
        short_term_length=2,
        positive_length=3,
        lifelong_length=4,
        lifelong="history",
    )
    kind = {"onerec": SessionCollator, "v1": pathways}.get(architecture, OneRecCollator)
    token_ids = catalogue.semantic_ids.numpy() + torch.tensor(model.config.level_offsets).numpy()
    return model, kind(token_ids), datasets.Dataset.from_list(rows)


def config(folder, **settings):
    settings = {
        "dpo_ratio": 1.0,
        "num_candidates": 60,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "num_train_epochs": 1,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "kl_users": 4,
    } | settings
    return IPAConfig(str(folder), **settings)


def token_reward(completion_ids, **columns):
    """A fixed number for every completion: different for every one, the same for every user."""
    return [math.sin(sum((place + 1) * token**2 for place, token in enumerate(ids))) for ids in completion_ids]


def all_candidates(model) -> torch.Tensor:
    """Token ids (candidates, m, L) of every item, or of every ordered session of different items."""
    codes = model.catalogue.semantic_ids.long() + torch.tensor(model.config.level_offsets)
    choices = itertools.permutations(range(len(codes)), model.num_session_items)
    return torch.stack([codes[list(choice)] for choice in choices])


def row_log_prob(model, context, candidate) -> torch.Tensor:
    """log M(S|H) of one candidate (m, L) for one user, by the plain causal call with labels."""
    tokens = F.pad(candidate, (1, 0), value=model.config.bos_token_id).flatten().unsqueeze(0)
    labels = tokens.clone()
    labels[:, :: model.config.num_levels + 1] = -100
    return model(input_ids=tokens, labels=labels, **context).target_log_probs.sum()


def one_user(collator, row) -> dict:
    return context_inputs(collator([row]))


# ---- mining


def test_best_and_worst_by_hand():
    nan = math.nan
    rewards = torch.tensor([[2.0, 3, 1], [5, 5, 5], [nan, 1, nan], [4, 4, 2], [nan, 7, 6], [2, 2, 3]])
    chosen, rejected, tied, few = choose_pairs(rewards)
    assert tied.tolist() == [False, True, False, False, False, False]
    assert few.tolist() == [False, False, True, False, False, False]
    keep = [0, 3, 4, 5]
    # of equally good ones the more probable: position 0 of user 3's best, position 0 of user 5's worst
    assert chosen[keep].tolist() == [1, 0, 1, 2] and rejected[keep, 0].tolist() == [2, 2, 2, 0]
    assert choose_pairs(torch.tensor([[0.1, 0.1 + 5e-8], [0.1, 0.1001]], dtype=torch.float64))[2].tolist() == [
        True,
        False,
    ]
    chosen, rejected, tied, few = choose_pairs(torch.tensor([[3.0, 1, 2, 0], [1, 1, 1, 0], [nan, nan, 1, 0]]), 2)
    assert chosen[0] == 0 and rejected[0].tolist() == [3, 1]
    assert tied.tolist() == [False, True, False] and few.tolist() == [False, False, True]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mined_pairs_equal_brute_force(architecture):
    model, collator, rows = world(architecture, num_rows=5)
    pairs, sums = mine_pairs(model, list(rows), [10, 11, 12, 13, 14], collator, token_reward, 60, batch_size=2)
    assert [pair["row"] for pair in pairs] == [10, 11, 12, 13, 14]
    candidates = all_candidates(model)
    flat = F.pad(candidates, (1, 0), value=model.config.bos_token_id).flatten(1)[:, 1:].tolist()
    rewards = torch.tensor(token_reward(flat), dtype=torch.float64)
    for pair, row in zip(pairs, rows):
        assert pair["chosen"] == candidates[rewards.argmax()].flatten().tolist()
        assert pair["rejected"] == candidates[rewards.argmin()].flatten().tolist()
        assert pair["chosen_reward"] == rewards.max() and pair["rejected_reward"] == [rewards.min()]
        with torch.no_grad():
            expected = [
                row_log_prob(model, one_user(collator, row), candidates[i])
                for i in (rewards.argmax(), rewards.argmin())
            ]
        assert pair["ref_chosen_logps"] == pytest.approx(expected[0].item(), abs=1e-4)
        assert pair["ref_rejected_logps"] == [pytest.approx(expected[1].item(), abs=1e-4)]
    assert sums["users"] == sums["hits"] == 5  # the whole catalogue is among the candidates
    assert sums["reward"] / 5 == pytest.approx(rewards.mean().item())


def test_narrow_search_takes_the_best_of_its_beams_and_misses():
    model, collator, rows = world("v2", num_rows=6, seed=1)
    pairs, sums = mine_pairs(model, list(rows), list(range(6)), collator, token_reward, 3)
    hits = 0
    for pair, row in zip(pairs, rows):
        beams = model.generate(**one_user(collator, row), num_beams=3, num_return_sequences=3)[:, 1:].tolist()
        rewards = token_reward(beams)
        assert pair["chosen"] == beams[rewards.index(max(rewards))]
        assert pair["rejected"] == beams[rewards.index(min(rewards))]
        # a training row's last item is what comes next; the items before it are no hits
        hits += collator.item_token_ids[row["history"][-1]].tolist() in beams
    assert sums["hits"] == hits and 0 < hits < 6


def test_ties_and_silent_candidates_are_counted_and_left_out():
    model, collator, rows = world("v2", num_rows=4)

    def reward(completion_ids, user, **columns):
        value = {0: lambda i: 1.0, 1: lambda i: None, 2: lambda i: i if i < 2 else None, 3: float}
        return [value[u](i % 60) for i, u in enumerate(user)]

    pairs, sums = mine_pairs(model, list(rows), [0, 1, 2, 3], collator, reward, 60)
    assert [pair["row"] for pair in pairs] == [2, 3]
    assert pairs[0]["chosen_reward"] == 1 and pairs[0]["rejected_reward"] == [0]
    assert pairs[1]["chosen_reward"] == 29  # candidates 30 to 59 are dead beams
    assert sums["tied"] == 1 and sums["few"] == 1


def test_rewards_that_are_no_numbers_are_refused():
    model, collator, rows = world("v2", num_rows=2)
    mine = partial(mine_pairs, model, list(rows), [7, 8], collator, num_candidates=3)
    with pytest.raises(ValueError, match="returned nan for candidate 1 of row 8"):
        mine(reward=lambda completion_ids, **columns: [0.0, 1.0, 2.0, 0.0, math.nan, math.inf])
    with pytest.raises(ValueError, match="returned 2 values for 6 candidates"):
        mine(reward=lambda completion_ids, **columns: [0.0, 1.0])


# ---- loss


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_of_a_batch_is_the_formula(architecture, tmp_path):
    model, collator, rows = world(architecture)
    args = config(tmp_path, dpo_ratio=0.5, beta=0.3, preference_weight=0.7)
    trainer = IPATrainer(model, args, data_collator=collator, train_dataset=rows, reward=token_reward)
    trainer.begin_iteration()
    with torch.no_grad():  # so that the policy is no longer the reference
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    model.train()
    loss = trainer.compute_loss(model, dict(batch))
    pairs = datasets.load_from_disk(str(tmp_path / "pairs" / "iteration_000"))
    assert len(pairs) == 4  # half of the 8 rows
    expected = model(**collator(list(rows))).loss
    for pair in pairs:
        context = one_user(collator, rows[pair["row"]])
        chosen, rejected = (
            torch.tensor(pair[name]).view(model.num_session_items, 3) for name in ("chosen", "rejected")
        )
        gain = row_log_prob(model, context, chosen) - pair["ref_chosen_logps"]
        loss_of = row_log_prob(model, context, rejected) - pair["ref_rejected_logps"][0]
        expected = expected + 0.7 * -F.logsigmoid(0.3 * (gain - loss_of)) / 8
    torch.testing.assert_close(loss, expected)
    assert abs(loss - model(**collator(list(rows))).loss) > 0.01


def test_loss_types_by_hand():
    chosen, rejected = torch.tensor([-1.0]), torch.tensor([[-2.0]])
    reference = torch.tensor([-1.5]), torch.tensor([[-1.8]])  # D = 0.5 + 0.2 = 0.7

    def log_sigmoid(x):
        return -math.log1p(math.exp(-x))

    smooth = 0.9 * log_sigmoid(0.07) + 0.1 * log_sigmoid(-0.07)
    robust = (0.9 * log_sigmoid(0.07) - 0.1 * log_sigmoid(-0.07)) / 0.8
    expected = {
        "dpo": -log_sigmoid(0.07),
        "ipo": (0.7 / 3 - 5) ** 2,
        "cdpo": -smooth,
        "rdpo": -robust,
        "cpo": -log_sigmoid(0.1) + 1 / 3,
        "simpo": -log_sigmoid(2.5 / 3 - 1.375),
        "sdpo": -log_sigmoid(0.7),
    }
    for loss_type, value in expected.items():
        found = IPAConfig("unused", loss_type=loss_type).preference_loss(chosen, rejected, *reference, num_tokens=3)
        assert found.tolist() == [pytest.approx(value, rel=1e-5)], loss_type
    several = IPAConfig("unused", loss_type="sdpo", num_rejected=2)
    found = several.preference_loss(chosen, torch.tensor([[-2.0, -3]]), reference[0], torch.tensor([[-1.8, -2.5]]), 3)
    total = math.exp(-0.7) + math.exp(-1.0)  # D = 0.7 and 0.5 + 0.5
    assert found.tolist() == [pytest.approx(-log_sigmoid(-math.log(total)), rel=1e-5)]


@pytest.mark.parametrize("loss_type", ["ipo", "cdpo", "rdpo", "cpo", "simpo", "sdpo"])
def test_training_widens_the_margin(loss_type, tmp_path):
    model, collator, rows = world("v2")
    args = config(
        tmp_path,
        loss_type=loss_type,
        num_rejected=2 if loss_type == "sdpo" else 1,
        num_train_epochs=3,
        preference_weight=5,
    )
    seed = tiny_model(model.catalogue, 0, "v2")
    IPATrainer(model, args, data_collator=collator, train_dataset=rows, reward=token_reward).train()
    pairs = datasets.load_from_disk(str(tmp_path / "pairs" / "iteration_000"))
    context = context_inputs(collator([rows[i] for i in pairs["row"]]))
    token_ids = torch.cat([torch.tensor(pairs[name]).view(8, -1, 1, 3) for name in ("chosen", "rejected")], dim=1)
    with torch.no_grad():
        before, after = (completion_log_probs(m.eval(), context, token_ids) for m in (seed, model))
    moved = after - before
    assert bool((moved[:, 0] > moved[:, -1] + 0.05).all())


# ---- iterations


def test_the_generator_of_an_iteration_is_its_reference_router_biases_included(tmp_path):
    model, collator, rows = world("v2_moe", router_bias_update_rate=0.3)
    # an odd number of steps per epoch, so that no bias can be back at 0
    args = config(tmp_path, num_train_epochs=3, save_strategy="epoch", num_candidates=5, per_device_train_batch_size=3)
    trainer = IPATrainer(model, args, data_collator=collator, train_dataset=rows, reward=token_reward)
    trainer.train()
    snapshots = [
        tiny_model(model.catalogue, 0, "v2_moe"),
        *(OneRecV2ForCausalLM.from_pretrained(tmp_path / f"checkpoint-{n}") for n in (3, 6)),
    ]
    biases = [b for name, b in snapshots[1].named_buffers() if "e_score_correction_bias" in name]
    assert max(bias.abs().max() for bias in biases) > 0.2
    for iteration, snapshot in enumerate(snapshots):
        expected, _ = mine_pairs(snapshot.eval(), list(rows), list(range(8)), collator, token_reward, 5)
        found = datasets.load_from_disk(str(tmp_path / "pairs" / f"iteration_{iteration:03d}"))
        assert found["chosen"] == [pair["chosen"] for pair in expected]
        assert found["rejected"] == [pair["rejected"] for pair in expected]
        reference = torch.tensor([pair["ref_chosen_logps"] for pair in expected])
        torch.testing.assert_close(torch.tensor(found["ref_chosen_logps"]), reference, atol=1e-5, rtol=1e-5)


def test_what_is_logged(tmp_path):
    model, collator, rows = world("v2")
    args = config(tmp_path, num_train_epochs=2, preference_weight=5, num_candidates=10)
    trainer = IPATrainer(model, args, data_collator=collator, train_dataset=rows, reward=token_reward)
    trainer.train()
    log = trainer.state.log_history
    mined = [record for record in log if "ipa/pairs" in record]
    assert len(mined) == 2 and mined[0]["ipa/pairs"] == 8 and mined[0]["ipa/tied"] == mined[0]["ipa/few"] == 0
    pairs = load_rows(tmp_path / "pairs" / "iteration_000", {"num_candidates": 10, "num_rows": 8})
    assert mined[0]["ipa/reward_chosen"] == pytest.approx(sum(pairs["chosen_reward"]) / 8)
    assert mined[0]["ipa/reward_rejected"] == pytest.approx(sum(r[0] for r in pairs["rejected_reward"]) / 8)
    assert 0 < mined[0]["ipa/hit_rate"] < 1
    divergence = [record["ipa/kl_to_seed"] for record in log if "ipa/kl_to_seed" in record]
    assert len(divergence) == 3 and abs(divergence[0]) < 1e-5 < abs(divergence[1])
    first = next(record for record in log if "loss" in record)
    assert first["loss"] == pytest.approx(first["ntp_loss"] + 5 * first["preference_loss"], abs=2e-4)
    assert first["preference_loss"] == pytest.approx(math.log(2), abs=1e-5)
    last = [record for record in log if "loss" in record][1]
    assert last["rewards/margins"] == pytest.approx(last["rewards/chosen"] - last["rewards/rejected"], abs=1e-6)
    assert last["rewards/margins"] > 0.05
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "Iterative Preference Alignment (OneRec, Algorithm 2)" in card and "2502.18965" in card


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("step", [3, 2])  # inside the second iteration, and at its start
def test_resume_equals_unbroken(step, tmp_path):
    def trainer(folder, **settings):
        model, collator, rows = world("v2_moe")
        args = config(folder, num_train_epochs=2, save_strategy="steps", save_steps=1, num_candidates=10, **settings)
        return IPATrainer(model, args, data_collator=collator, train_dataset=rows, reward=token_reward)

    unbroken = trainer(tmp_path)
    unbroken.train()
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    expected = weights(unbroken.model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(again.model).items())
    kl = [next(r for r in reversed(t.state.log_history) if "ipa/kl_to_seed" in r) for t in (unbroken, again)]
    assert kl[0]["ipa/kl_to_seed"] == kl[1]["ipa/kl_to_seed"]
    if step == 3:
        with pytest.raises(ValueError, match="num_rejected=1, now 2"):
            trainer(tmp_path, loss_type="sdpo", num_rejected=2).train(
                resume_from_checkpoint=str(tmp_path / "checkpoint-3")
            )
        (tmp_path / "pairs" / "iteration_001").rename(tmp_path / "pairs" / "gone")
        with pytest.raises(ValueError, match="continues inside an iteration, but its pairs are not"):
            trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_an_interrupted_iteration_leaves_nothing_and_starts_again(tmp_path):
    calls = []

    def breaks(completion_ids, **columns):
        calls.append(len(completion_ids))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return token_reward(completion_ids)

    model, collator, rows = world("v2")
    args = config(tmp_path, mining_batch_size=3, num_candidates=4)
    with pytest.raises(KeyboardInterrupt):
        IPATrainer(model, args, data_collator=collator, train_dataset=rows, reward=breaks).train()
    assert calls == [12, 12] and not list((tmp_path).glob("pairs/*"))
    IPATrainer(model, args, data_collator=collator, train_dataset=rows, reward=breaks).train()
    assert sorted(path.name for path in (tmp_path / "pairs").iterdir()) == ["iteration_000", "seed_samples"]


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    folder = tmp_path / "pairs" / "iteration_000"
    save_rows([{"row": 1, "rejected": [0.5]}], folder, {"seed": 1})
    with pytest.raises(TypeError, match="JSON"):  # breaks off between the rows and the metadata
        save_rows([{"row": 2, "rejected": [0.5]}], folder, {"seed": object()})
    assert load_rows(folder, {"seed": 1})["row"][:] == [1]
    save_rows([{"row": 2, "rejected": [0.5]}], folder, {"seed": 2})
    assert load_rows(folder, {"seed": 2})["row"][:] == [2]
    assert [path.name for path in folder.parent.iterdir()] == ["iteration_000"]


@pytest.mark.parametrize(
    "architecture,overrides",
    [("v2", {}), ("v2", {"score_normalization": "valid", "context_position": "bias"}), ("onerec", {})],
)
def test_samples_follow_the_models_distribution(architecture, overrides):
    """The estimate of KL(seed || M) from samples, against the sum over everything that can be generated."""
    sizes = [3, 2]
    catalogue = Catalogue([[0, 0], [0, 1], [2, 1]], sizes)
    sessions = {"num_session_items": 2} if architecture == "onerec" else {}
    models = [
        tiny_model(catalogue, seed, architecture, codebook_sizes=sizes, **overrides, **sessions) for seed in (0, 1)
    ]
    collator = SessionCollator((catalogue.semantic_ids + torch.tensor([4, 7])).numpy())
    rows = [{"user": 0, "history": [0, 2, 1], "targets": [1]}]
    codes = itertools.product(range(3), range(2))
    if overrides:
        codes = [tuple(ids) for ids in catalogue.semantic_ids.tolist()]
    items = torch.tensor(list(codes)) + torch.tensor([4, 7])
    every = torch.stack(
        [items[list(c)] for c in itertools.product(range(len(items)), repeat=models[0].num_session_items)]
    )
    context = one_user(collator, rows[0])
    with torch.no_grad():
        seed, other = (completion_log_probs(model, context, every.unsqueeze(0))[0] for model in models)
    assert seed.exp().sum() == pytest.approx(1, abs=1e-4)
    exact = (seed.exp() * (seed - other)).sum().item()
    drawn = sample_candidates(models[0], context, 3000, torch.Generator().manual_seed(0))[0]
    share = (drawn.unsqueeze(1) == every).flatten(2).all(2).float().mean(0)
    torch.testing.assert_close(share, seed.exp(), atol=0.03, rtol=0)
    with torch.no_grad():
        log_prob = completion_log_probs(models[0], context, drawn.unsqueeze(0))[0]
    samples = [
        {"row": 0, "token_ids": ids, "log_prob": p} for ids, p in zip(drawn.flatten(1).tolist(), log_prob.tolist())
    ]
    estimate = seed_log_ratios(models[1], rows, samples, collator, batch_size=3000).mean().item()
    assert estimate == pytest.approx(exact, rel=0.15) and exact > 0.05


@pytest.mark.parametrize("seed", [0, 1])
def test_pairs_are_spread_over_an_epoch(seed, tmp_path):
    """Torch's permutations of one seed are the same: the rows with a pair once were the first 16 of the epoch."""
    model, collator, rows = world("v2", num_rows=64)
    seen = []

    def noted(batch):
        seen.extend(row["user"] for row in batch)
        return collator(batch)

    noted.context = collator.context
    settings = config(tmp_path, dpo_ratio=0.25, num_candidates=4, kl_users=0, seed=seed)
    IPATrainer(model, settings, data_collator=noted, train_dataset=rows, reward=token_reward).train()
    drawn = set(datasets.load_from_disk(str(tmp_path / "pairs" / "iteration_000"))["row"])
    assert len(drawn) == 16 and sorted(seen[-64:]) == list(range(64))
    assert len(drawn.intersection(seen[-64:-48])) <= 9


def train_and_save(folder, batch_size):
    """Few pairs, so that in some steps one process has a pair and the other has none."""
    model, collator, rows = world("v2_moe", num_rows=16)
    settings = {
        "per_device_train_batch_size": batch_size,
        "dpo_ratio": 0.25,
        "num_candidates": 8,
        "mining_batch_size": 1,
        "optim": "sgd",  # Adam would make whole steps of the rounding of gradients that are zero
    }
    trainer = IPATrainer(
        model,
        config(folder, num_train_epochs=2, **settings),
        data_collator=collator,
        train_dataset=rows,
        reward=token_reward,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        log = [record for record in trainer.state.log_history if "loss" in record]
        (folder / "log.json").write_text(
            json.dumps([[r.get("preference_loss"), r.get("rewards/margins")] for r in log])
        )
        save_file(weights(model), folder / "model.safetensors")


def one_of_two_processes(rank, folder):
    train_and_save(folder, batch_size=2)


def test_two_processes_equal_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run_processes(one_of_two_processes, tmp_path / "two")
    train_and_save(tmp_path / "one", batch_size=4)
    for iteration in ("iteration_000", "iteration_001"):
        one, two = (datasets.load_from_disk(str(tmp_path / name / "pairs" / iteration)) for name in ("one", "two"))
        assert one["row"][:] == two["row"][:] and one["chosen"][:] == two["chosen"][:]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
    one, two = (json.loads((tmp_path / name / "log.json").read_text()) for name in ("one", "two"))
    assert two == [[value if value is None else pytest.approx(value, abs=1e-4) for value in step] for step in one]
    assert sum(step[0] is not None for step in one) > 2


# ---- given pairs


def test_given_pairs_serve_every_epoch_with_the_seed_as_reference(tmp_path):
    model, collator, rows = world("v2")
    tokens = collator.item_token_ids
    pairs = [{"row": i, "chosen": tokens[i].tolist(), "rejected": tokens[i + 1].tolist()} for i in (6, 2)]
    seed = tiny_model(model.catalogue, 0, "v2")
    args = config(tmp_path, num_train_epochs=2, save_strategy="steps", save_steps=3)
    make = partial(IPATrainer, args=args, data_collator=collator, train_dataset=rows)
    trainer = make(model, pairs=datasets.Dataset.from_list(pairs))
    trainer.train()
    found = datasets.load_from_disk(str(tmp_path / "pairs" / "iteration_000"))
    assert found["row"][:] == [6, 2] and not (tmp_path / "pairs" / "iteration_001").exists()
    for pair in found:
        expected = row_log_prob(seed, one_user(collator, rows[pair["row"]]), torch.tensor([pair["chosen"]]))
        assert pair["ref_chosen_logps"] == pytest.approx(expected.item(), abs=1e-4)
    torch.testing.assert_close(trainer._pairs["reference"][:, 0], torch.tensor(found["ref_chosen_logps"]))
    again = make(world("v2")[0], pairs=datasets.Dataset.from_list(pairs))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(tensor, weights(trainer.model)[name]) for name, tensor in weights(again.model).items())


def test_a_reference_model_is_the_reference_of_given_pairs(tmp_path):
    """TRL's `ref_model`; left out, it is the policy before its first step."""
    model, collator, rows = world("v2")
    tokens, other = collator.item_token_ids, tiny_model(model.catalogue, 1, "v2")
    pairs = datasets.Dataset.from_list([{"row": 3, "chosen": tokens[6].tolist(), "rejected": tokens[7].tolist()}])
    make = partial(IPATrainer, model, data_collator=collator, train_dataset=rows, ref_model=other)
    trainer = make(config(tmp_path, max_steps=1), pairs=pairs)
    trainer.train()
    (found,) = datasets.load_from_disk(str(tmp_path / "pairs" / "iteration_000"))
    for name in ("chosen", "rejected"):
        expected = row_log_prob(
            tiny_model(model.catalogue, 1, "v2"), one_user(collator, rows[3]), torch.tensor([found[name]])
        )
        assert torch.tensor(found[f"ref_{name}_logps"]).sum().item() == pytest.approx(expected.item(), abs=1e-4)
    assert trainer.ref_model is None  # let go
    with pytest.raises(ValueError, match="ref_model with reward: in Algorithm 2 the reference is"):
        make(config(tmp_path / "mined"), reward=token_reward)


def test_bad_pairs(tmp_path):
    model, collator, rows = world("v2")
    one, two = collator.item_token_ids[:2].tolist()
    good = {"row": 1, "chosen": one, "rejected": two}
    nobody = next([4, 12, code] for code in range(20, 28) if [4, 12, code] not in collator.item_token_ids.tolist())

    def trainer(*pairs, **settings):
        table = datasets.Dataset.from_list(list(pairs))
        args = config(tmp_path, **settings)
        return IPATrainer(model, args, data_collator=collator, train_dataset=rows, pairs=table)

    trainer(good)
    for match, pairs in {
        "1 of 2 pairs have chosen equal to rejected": [good, good | {"row": 2, "rejected": one}],
        "none twice": [good, good],
        "of the 8 rows": [good | {"row": 8}],
        r"has \[2\] token ids": [good | {"chosen": one[:2]}],
        "from another tokenizer": [good | {"chosen": one[::-1]}],
        "no \\['rejected'\\]": [{"row": 1, "chosen": one}],
        "1 of 2 pairs hold codes that no item of Catalogue": [good, {"row": 2, "chosen": one, "rejected": nobody}],
    }.items():
        with pytest.raises(ValueError, match=match):
            trainer(*pairs)
    with pytest.raises(ValueError, match=r"`rejected` has \[3\] token ids in some pairs: expected 6"):
        trainer(good, loss_type="sdpo", num_rejected=2)


def test_pairs_of_another_run_are_compared_with_this_one(tmp_path):
    model, collator, rows = world("v2")
    args = config(tmp_path, max_steps=1)
    IPATrainer(model, args, data_collator=collator, train_dataset=rows, reward=token_reward).train()
    mined, catalogue = tmp_path / "pairs" / "iteration_000", model.catalogue
    assert json.loads((mined / "pairs.json").read_text())["catalogue_fingerprint"] == catalogue.fingerprint()
    assert len(load_pairs(mined, 8, catalogue)) == 8
    moved = Catalogue(catalogue.semantic_ids.flip(0), SIZES, catalogue.item_ids)
    renamed = Catalogue(catalogue.semantic_ids, SIZES)
    for other in (moved, renamed):
        with pytest.raises(ValueError, match=rf"catalogue_fingerprint='{catalogue.fingerprint()}', here '"):
            load_pairs(mined, 8, other)
    with pytest.raises(ValueError, match="num_rows=8, here 9"):
        load_pairs(mined, 9, catalogue)
    token_ids = collator.item_token_ids[:2].tolist()
    own = datasets.Dataset.from_list([{"row": 1, "chosen": token_ids[0], "rejected": token_ids[1]}])
    own.save_to_disk(str(tmp_path / "own"))
    warned = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onerec_hf.trainers.pair_files.logger.warning", warned.append)
        assert load_pairs(tmp_path / "own", 8, catalogue)["row"][:] == [1] and load_pairs(mined, 8, catalogue)
    assert len(warned) == 1 and "`row` counts the 8 training rows" in warned[0]


# ---- bad input


def test_no_pair_at_all_is_an_error(tmp_path):
    model, collator, rows = world("v2")
    make = partial(IPATrainer, args=config(tmp_path), data_collator=collator, train_dataset=rows)
    with pytest.raises(ValueError, match="iteration 0: none of the users drawn has a pair"):
        make(model, reward=lambda completion_ids, **columns: [0.5] * len(completion_ids)).train()
    model.catalogue = Catalogue(model.catalogue.semantic_ids[:1], SIZES)
    with pytest.raises(ValueError, match="100% too few candidates"):
        make(model, reward=token_reward).train()
    assert not list(tmp_path.glob("pairs/*"))


@pytest.mark.parametrize(
    "settings,match",
    [
        ({"num_candidates": 1}, "num_candidates=1"),
        ({"dpo_ratio": 0.0}, "dpo_ratio=0.0"),
        ({"loss_type": "kto"}, "loss_type='kto': allowed are"),
        ({"num_rejected": 3}, "loss_type='sdpo'"),
        ({"loss_type": "sdpo", "num_rejected": 3, "num_candidates": 3}, "num_rejected \\+ 1 = 4"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        IPAConfig("unused", **settings)


def test_bad_arguments(tmp_path):
    model, collator, rows = world("v2")
    make = partial(IPATrainer, model, config(tmp_path), data_collator=collator)
    with pytest.raises(ValueError, match="exactly one of reward"):
        make(train_dataset=rows)
    with pytest.raises(TypeError, match="train_dataset is a IterableDataset"):
        make(train_dataset=rows.to_iterable_dataset(), reward=token_reward)
    model.catalogue = None
    with pytest.raises(ValueError, match="has no catalogue"):
        make(train_dataset=rows, reward=token_reward)


def test_fsdp_is_refused_at_the_start(tmp_path, monkeypatch):
    model, collator, rows = world("v2")
    make = partial(IPATrainer, model, data_collator=collator, train_dataset=rows, reward=token_reward)
    sharded = config(tmp_path)
    sharded.fsdp = True
    with pytest.raises(ValueError, match=r"IPATrainer does not work under FSDP: .*Train data-parallel"):
        make(sharded)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # as `accelerate launch` says it
    args = config(tmp_path)
    with pytest.raises(ValueError, match="IPATrainer does not work under FSDP"):
        make(args)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert make(args).ref_model is None


@pytest.mark.parametrize(
    "settings, why",
    [
        ({"sync_ref_model": True}, "log-probabilities are stored"),
        ({"precompute_ref_log_probs": False}, "log-probabilities are stored"),
        ({"precompute_ref_batch_size": 8}, "mining_batch_size"),
        ({"f_divergence_type": "forward_kl"}, "Table 1"),
        ({"loss_weights": [1.0]}, "Table 1"),
        ({"max_length": 8}, "rows are tokens already"),
        ({"pad_to_multiple_of": 8}, "rows are tokens already"),
        ({"router_aux_loss_coef": 0.1}, "balanced without a loss"),
    ],
)
def test_fields_of_dpo_that_nothing_reads_are_refused(settings, why, tmp_path):
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=f"{name}={re.escape(repr(value))} would do nothing: .*{why}.*Leave it out"):
        config(tmp_path, **settings)


@pytest.mark.parametrize("kind", [IPAConfig, OneRecSFTConfig])
def test_arguments_of_a_run_make_the_arguments_of_another(kind, tmp_path):
    args = kind(str(tmp_path), use_cpu=True)
    again = replace(args, seed=7)
    for entry in fields(args):
        if entry.name != "seed":
            assert getattr(again, entry.name) == getattr(args, entry.name), entry.name


# ---- LoRA


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_without_target_modules(architecture):
    adapted = {
        name.split(".lora_A")[0].rsplit(".", 1)[-1]
        for name, _ in get_peft_model(world(architecture)[0], LoraConfig()).named_parameters()
        if "lora_A" in name
    }
    expected = {"q_proj", "k_proj", "v_proj", "o_proj"} | ({"item_proj"} if architecture.startswith("v2") else set())
    assert adapted == expected


def test_an_adapter_that_came_with_the_model_goes_on_and_gets_no_copy(tmp_path):
    """TRL would keep a copy of it as the reference."""
    model, collator, rows = world("v2")
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
    start = weights(adapted)
    args = config(tmp_path, num_candidates=6, max_steps=1)
    trainer = IPATrainer(adapted, args, data_collator=collator, train_dataset=rows, reward=token_reward)
    assert isinstance(trainer, DPOTrainer) and list(trainer.model.peft_config) == ["default"]
    assert weights(trainer.model).keys() == start.keys()
    trainer.train()
    moved = {name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, start[name])}
    assert moved and all("lora_" in name for name in moved)
    found = datasets.load_from_disk(str(tmp_path / "pairs" / "iteration_000"))[0]
    before = get_peft_model(world("v2")[0], LoraConfig(r=2, task_type="CAUSAL_LM"))
    before.load_state_dict(start)
    token_ids = torch.tensor(found["chosen"]).view(1, 1, 1, 3)
    with torch.no_grad():
        expected = completion_log_probs(before.eval(), one_user(collator, rows[found["row"]]), token_ids)
    assert found["ref_chosen_logps"] == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("architecture", ["onerec", "v2_moe"])
def test_lora(architecture, tmp_path):
    model, collator, rows = world(architecture)
    before = weights(model)
    args = config(tmp_path, num_train_epochs=2, num_candidates=10, learning_rate=3e-2)
    lora = LoraConfig(r=4, task_type="CAUSAL_LM")
    trainer = IPATrainer(
        model, args, data_collator=collator, train_dataset=rows, reward=token_reward, peft_config=lora
    )
    trainer.train()
    policy = trainer.model.eval()
    pairs = [datasets.load_from_disk(str(tmp_path / "pairs" / f"iteration_{i:03d}")) for i in (0, 1)]
    context = context_inputs(collator([rows[i] for i in pairs[0]["row"]]))
    shape = (8, 1, model.num_session_items, 3)
    with torch.no_grad():
        with policy.disable_adapter():  # the frozen base is the reference of the first iteration
            first = completion_log_probs(policy, context, torch.tensor(pairs[0]["chosen"]).view(shape))[:, 0]
            second = completion_log_probs(policy, context, torch.tensor(pairs[1]["chosen"]).view(shape))[:, 0]
        torch.testing.assert_close(first, torch.tensor(pairs[0]["ref_chosen_logps"]))
        assert (second - torch.tensor(pairs[1]["ref_chosen_logps"])).abs().max() > 0.01  # ... and M_1 of the next
        tokens = torch.tensor(pairs[0]["chosen"]).view(shape)
        adapter = completion_log_probs(policy, context, tokens)
        assert (adapter[:, 0] - first).abs().max() > 0.05
        merged = policy.merge_and_unload()
        torch.testing.assert_close(completion_log_probs(merged, context, tokens), adapter, atol=1e-4, rtol=1e-4)
    frozen = [name for name in before if "_proj" not in name or "expert" in name]
    assert frozen and all(torch.equal(before[name], merged.state_dict()[name]) for name in frozen)
