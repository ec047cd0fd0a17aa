"""Reinforcement learning on tiny models: losses and gradients against closed forms, rollouts, rewards, logged
exposures, resume.
"""

import logging
import math
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from trl.trainer import grpo_trainer

from onerec_hf.collators import OneRecCollator
from onerec_hf.rewards import FormatReward, is_legal, reward_of_model
from onerec_hf.trainers import OneRecGRPOConfig, OneRecGRPOTrainer
from onerec_hf.trainers.grpo_rollouts import EndlessBatches, pad_logged, rollout

from ..numeric import TERMS, assert_close
from ..tiny import ARCHITECTURES, tiny_catalogue, tiny_context, tiny_model

ROOT = Path(__file__).resolve().parents[2]
USERS, G = 8, 4
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class TinyCollator:
    """Contexts that are a function of the user, and the targets of its row."""

    def __init__(self, catalogue, model):
        self.catalogue, self.offsets = catalogue, torch.tensor(model.config.level_offsets)
        self.pool = tiny_context(catalogue, model, batch=USERS, seed=7)
        self.pool["context_mask"][2, 0] = True  # nobody's history is empty

    def context(self, rows):
        users = torch.tensor([row["user"] for row in rows])
        return {name: tensor[users] for name, tensor in self.pool.items()}

    def __call__(self, rows):
        targets = torch.tensor([list(row["targets"]) for row in rows])
        return self.context(rows) | {"target_ids": self.catalogue.semantic_ids[targets].long() + self.offsets}


def users(num_targets=1):
    targets = [[(7 * user + i) % 60 for i in range(num_targets)] for user in range(USERS)]
    return datasets.Dataset.from_list([{"user": user, "targets": targets[user]} for user in range(USERS)])


def reward(completion_ids, user, **columns):
    """Different for every completion and every user."""
    return [math.sin(sum((i + 1) * token for i, token in enumerate(ids)) + u) for ids, u in zip(completion_ids, user)]


def make(folder, model=None, reward_funcs=reward, architecture="v2", rows=None, trainer=None, **settings):
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, architecture=architecture) if model is None else model
    # not SGD's default schedule: a closed form wants a constant rate
    settings = {
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 1,
        "num_generations": G,
        "per_device_train_batch_size": 2 * G,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    } | settings
    args = OneRecGRPOConfig(str(folder), **settings)
    collator = TinyCollator(catalogue, model)
    rows = users() if rows is None else rows
    return OneRecGRPOTrainer(model, reward_funcs, args, rows, data_collator=collator, **(trainer or {}))


def brute_log_probs(model, context, row):
    """log pi of the codes of one candidate (L,), by a softmax over each level's slice of the logits; `context` of one
    user.
    """
    logits = model(input_ids=row[None, :-1], **context).logits[0]
    edges = [*model.config.level_offsets, model.config.vocab_size]
    return torch.stack(
        [logits[l, edges[l] : edges[l + 1]].log_softmax(0)[row[l + 1] - edges[l]] for l in range(len(edges) - 1)]
    )


def closed_form(loss_type, pi, old, a, epsilon=0.2, delta=0.1):
    """The papers' weight on grad log pi, maximising: ECPO, GBPO, GRPO."""
    rho = pi / old
    if loss_type == "gbpo":
        return a * pi / max(old, pi if a >= 0 else 1 - pi)
    if (a > 0 and rho > 1 + epsilon) or (a < 0 and rho < 1 - epsilon):
        return 0.0
    return a * (min(rho, 1 + epsilon + delta) if loss_type == "ecpo" and a < 0 else rho)


@pytest.mark.parametrize("loss_type", ["grpo", "ecpo", "gbpo"])
def test_gradient_of_a_batch_is_the_closed_form(loss_type, tmp_path):
    """Old policies far from the new one, so that every rule of clip and bound is in the batch."""
    trainer = make(tmp_path, loss_type=loss_type, epsilon=0.2, sign_norm_steps=0)
    model, generator = trainer.model.train(), torch.Generator().manual_seed(0)
    context = trainer.collator.context([{"user": 4}, {"user": 1}])
    codes = torch.randint(8, (2, G, 3), generator=generator) + torch.tensor(model.config.level_offsets)
    rows = torch.nn.functional.pad(codes, (1, 0), value=model.config.bos_token_id)
    advantages = torch.tensor([[1.5, -1.0, 0.5, -2.0], [-0.3, 0.0, 1.0, -0.7]])
    expected, weights, cases = 0.0, [], set()
    old = torch.zeros(2, G, 3)
    for user in range(2):
        own = {name: tensor[user : user + 1] for name, tensor in context.items()}
        for g in range(G):
            log_probs, a = brute_log_probs(model, own, rows[user, g]), advantages[user, g].item()
            for level in range(3):
                pi, rho = log_probs[level].exp().item(), (0.5, 1.25, 3.0)[(g + level) % 3]
                old[user, g, level] = min(math.log(pi / rho), -1e-3)
                weight = closed_form(loss_type, pi, math.exp(old[user, g, level]), a)
                expected = expected - weight * log_probs[level] / (2 * G * 3)
                weights.append(weight)
                cases.add((a > 0, rho) if a else None)
    assert len(cases) == 7 and weights.count(0.0) >= 3 + (loss_type != "gbpo")  # both signs at three ratios, and A = 0
    inputs = {"rows": rows, "tool_mask": torch.ones(2, G, 3), "advantages": advantages, "old_per_token_logps": old}
    loss = trainer.compute_loss(model, inputs | {f"context/{name}": tensor for name, tensor in context.items()})
    parameters = list(model.parameters())
    found, wanted = (torch.autograd.grad(x, parameters) for x in (loss, expected))
    for left, right in zip(found, wanted):
        torch.testing.assert_close(left, right, rtol=2e-4, atol=2e-6)
    assert max(x.abs().max() for x in wanted) > 1e-2


@pytest.mark.parametrize("loss_type", ["ecpo", "gbpo"])
def test_one_training_step_moves_the_weights_by_the_closed_form(loss_type, tmp_path):
    """TRL's sampler, buffer, rewards and optimizer around it: theta - rate * gradient, over two micro-batches."""
    trainer = make(tmp_path, loss_type=loss_type, gradient_accumulation_steps=2, rollout="sample", sign_norm_steps=0)
    before = tiny_model(trainer.model.catalogue)
    trainer.train()
    expected = 0.0
    for chunk in trainer._buffered_inputs:
        for user in range(2):
            own = {n.split("/")[1]: chunk[n][user : user + 1] for n in chunk if n.startswith("context/")}
            number = next(
                u for u in range(USERS) if torch.equal(trainer.collator.pool["context_ids"][u], own["context_ids"][0])
            )
            rewards = torch.tensor(reward(chunk["rows"][user, :, 1:].tolist(), [number] * G))
            rewards = (
                (rewards - rewards.mean()) / rewards.std(correction=0) if len(rewards.unique()) > 1 else 0 * rewards
            )
            torch.testing.assert_close(chunk["advantages"][user], rewards, rtol=1e-4, atol=1e-5)
            for g in range(G):
                log_probs = brute_log_probs(before, own, chunk["rows"][user, g])
                for level in range(3):
                    pi = log_probs[level].exp().item()
                    weight = closed_form(loss_type, pi, pi, rewards[g].item())
                    expected = expected - weight * log_probs[level] / (4 * G * 3)
    gradients = torch.autograd.grad(expected, list(before.parameters()))
    for (name, old), new, gradient in zip(before.named_parameters(), trainer.model.parameters(), gradients):
        torch.testing.assert_close(new, old - 1e-2 * gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_rollouts_are_what_was_asked_for(tmp_path):
    trainer = make(tmp_path)
    model, catalogue = trainer.policy, trainer.policy.catalogue
    trainer.context = trainer.collator.context([{"user": 3}, {"user": 0}])
    found = {}
    for how in ("beam", "sample", "tree", "unconstrained", "unconstrained_beam"):
        trainer.args.rollout = how
        found[how] = rollout([0] * 2 * G, trainer)
        assert len(found[how]["completion_ids"]) == 2 * G and model.training is trainer.model.training
    wanted = model.generate(**trainer.context, num_beams=G, num_return_sequences=G)[:, 1:]
    assert found["beam"]["completion_ids"] == wanted.tolist()
    for how in ("beam", "tree"):
        assert len({tuple(ids) for ids in found[how]["completion_ids"][:G]}) == G
    legal = {how: is_legal(rollouts["completion_ids"], catalogue) for how, rollouts in found.items()}
    assert legal["beam"].all() and legal["sample"].all() and legal["tree"].all()
    assert not legal["unconstrained"].all() and not legal["unconstrained_beam"].all()


def test_beams_without_the_constraint_are_the_most_probable_codes_of_all(tmp_path):
    """Against the probability of every combination of codes; also where a group is larger than the first codebook."""
    group = 24
    trainer = make(tmp_path, rollout="unconstrained_beam", num_generations=group, per_device_train_batch_size=group)
    model = trainer.policy
    sizes, offsets = model.config.codebook_sizes, torch.tensor(model.config.level_offsets)
    assert sizes[0] < group
    trainer.context = trainer.collator.context([{"user": 3}])
    found = rollout([0] * group, trainer)["completion_ids"]
    every = torch.cartesian_prod(*map(torch.arange, sizes)) + offsets
    rows = torch.nn.functional.pad(every, (1, 0), value=model.config.bos_token_id)
    with torch.no_grad():
        log_probs = trainer.completion_log_probs(model, trainer.context, rows)[0].sum(1)
    of = {tuple(codes): value for codes, value in zip(every.tolist(), log_probs.tolist())}
    values = torch.tensor([of[tuple(codes)] for codes in found])
    assert len({tuple(codes) for codes in found}) == group
    # a beam search may lose a code whose prefix was among the worst, so its best are the best of all, the last may not
    assert_close(values[:4], log_probs.topk(4).values)
    assert values.min() >= log_probs.topk(4 * group).values.min()


@pytest.mark.parametrize("how", ["sample", "unconstrained"])
@pytest.mark.parametrize("cut", [{"top_k": 2}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.9}])
def test_samples_are_cut_to_the_most_probable_codes(how, cut, tmp_path):
    """Of every code: how many are more probable, and what they have together, by the policy's own probabilities."""
    group = 32
    settings = {"rollout": how, "num_generations": group, "per_device_train_batch_size": group}
    trainer = make(tmp_path, **settings, **cut)
    model, catalogue, offsets = trainer.policy, trainer.policy.catalogue, trainer.policy.config.level_offsets
    items = (catalogue.semantic_ids.long() + torch.tensor(offsets)).tolist()
    trainer.context = trainer.collator.context([{"user": 3}])
    found = rollout([0] * group, trainer)["completion_ids"]
    assert len({tuple(codes) for codes in found}) > 1
    for codes in found:
        for level, size in enumerate(model.config.codebook_sizes):
            tokens = list(range(offsets[level], offsets[level] + size))
            if how == "sample":
                tokens = sorted({item[level] for item in items if item[:level] == codes[:level]})
            rows = torch.tensor([[model.config.bos_token_id, *codes[:level], token] for token in tokens])
            rows = torch.nn.functional.pad(rows, (0, len(offsets) + 1 - rows.shape[1]), value=offsets[-1])
            for later in range(level + 1, len(offsets)):
                rows[:, later + 1] = offsets[later]
            with torch.no_grad():
                log_probs = trainer.completion_log_probs(model, trainer.context, rows)[0][:, level]
            probability = log_probs.softmax(0)
            own = probability[tokens.index(codes[level])]
            above = probability[probability > own]
            assert len(above) < cut.get("top_k", len(tokens) + 1)
            assert above.sum() < cut.get("top_p", 2.0) + 1e-5


def test_a_group_larger_than_the_catalogue_is_refused(tmp_path):
    trainer = make(tmp_path, num_generations=64, per_device_train_batch_size=64)
    with pytest.raises(ValueError, match="fewer than num_generations=64"):
        trainer.train()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture, tmp_path):
    """Rollouts, logged exposures and a supervised loss at once; the context of a group is encoded once."""
    session = 3 if architecture == "onerec" else 1
    logged = users(session).map(lambda row: {"advantage": [1.0] * len(row["targets"])})
    trainer = make(
        tmp_path,
        architecture=architecture,
        rows=users(session),
        trainer={"logged_dataset": logged, "sft_dataset": users(session)},
        reward_funcs=[reward, FormatReward(tiny_catalogue(), G, 2)],
        logged_weight=0.3,
        sft_weight=0.1,
        sign_norm_steps=1,
        max_steps=2,
    )
    contexts = []
    module = trainer.policy.model.context_processor
    module.register_forward_hook(lambda *args, **kwargs: contexts.append(1))
    encoded = []
    module.register_forward_pre_hook(lambda module, args: encoded.append(len(args[0])))
    trainer.train()
    assert set(encoded) == {2, 32}  # two users per micro-batch of 8 candidates; 32 logged and 32 supervised rows
    for log in trainer.state.log_history[:2]:
        assert (
            log["legality"] == 1
            and log["rewards/format_reward/mean"] == 1
            and log["weight/negative"] == pytest.approx(1)
        )
        assert all(0 < log[f"entropy/level_{level}"] <= math.log(8) + 1e-4 for level in (1, 2, 3))
        parts = 0.7 * log["loss/on_policy"] + 0.3 * log["loss/logged"] + 0.1 * log["loss/sft"]
        assert log["loss"] == pytest.approx(parts, abs=1e-3)
        assert ("expert_load_max" in log) == (trainer.expert_balance is not None)


def test_evaluation_generates_and_trains_nothing(tmp_path):
    settings = {"num_generations_eval": 2, "per_device_eval_batch_size": 4, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make(tmp_path, trainer={"eval_dataset": users()}, **settings)
    before = [parameter.detach().clone() for parameter in trainer.policy.parameters()]
    found = trainer.evaluate()
    assert found["eval_legality"] == 1 and 0 <= found["eval_hit_rate"] <= 1 and math.isfinite(found["eval_loss"])
    wanted = []
    for user in range(USERS):
        context = trainer.collator.context([{"user": user}])
        tokens = trainer.policy.generate(**context, num_beams=2, num_return_sequences=2)[:, 1:]
        wanted += reward(tokens.tolist(), [user] * 2)
    assert found["eval_reward"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.policy.parameters()))
    assert not (tmp_path / "README.md").exists()


def test_groups_of_an_evaluation_are_its_own(tmp_path):
    """Two candidates per user in evaluation, four in training: no group runs over two users."""
    catalogue, seen = tiny_catalogue(), []
    formats = FormatReward(catalogue, G, 1)

    def noted(completion_ids, user, num_generations, **columns):
        kept = formats(completion_ids=completion_ids, num_generations=num_generations, **columns)
        seen.append((user, num_generations, kept))
        return kept

    model = tiny_model(catalogue)
    own = OneRecCollator(catalogue.semantic_ids.numpy() + torch.tensor(model.config.level_offsets).numpy())
    own.candidates = lambda rows: {"item_ids": own.pad_targets([row["targets"] for row in rows])}
    functions = [noted, reward_of_model(Judge(), own, model)]
    rows = users().map(lambda row: {"history": [row["user"], 9]})
    settings = {"num_generations_eval": 2, "per_device_eval_batch_size": 8, "sign_norm_steps": 0}
    trainer = make(tmp_path, model, functions, rows=rows, trainer={"eval_dataset": rows}, **settings)
    found = trainer.evaluate()
    assert found["eval_legality"] == 1 and math.isfinite(found["eval_rewards/reward_model/mean"])
    trainer.train()
    assert [len(user) for user, _, _ in seen] == [8, 8, 8]  # two evaluation batches of 4 users, one of 2 users
    for number, (user, sizes, kept) in enumerate(seen):
        size = 2 if number < 2 else G
        assert sizes == [size] * 8
        for start in range(0, 8, size):
            assert len(set(user[start : start + size])) == 1
            assert [value is None for value in kept[start : start + size]].count(False) == 1


@pytest.mark.parametrize("how", ["sample", "tree"])
def test_sessions_are_sampled(how, tmp_path):
    trainer = make(tmp_path, architecture="onerec", rollout=how, rows=users(3))
    trainer.train()
    assert (
        trainer.state.log_history[0]["legality"] == 1 and trainer.state.log_history[0]["completions/mean_length"] == 9
    )


def test_unconstrained_sessions_say_why_not(tmp_path):
    with pytest.raises(ValueError, match="num_session_items=3"):
        make(tmp_path, architecture="onerec", rollout="unconstrained").train()
    with pytest.raises(ValueError, match="num_session_items=3"):
        make(tmp_path, architecture="onerec", rollout="unconstrained_beam").train()


def test_session_codes_count_and_bos_does_not(tmp_path):
    """The sum over a session of 3 items against the model's own `target_log_probs`."""
    trainer = make(tmp_path, architecture="onerec")
    trainer.train()
    chunk = trainer._buffered_inputs[0]
    rows = chunk["rows"].flatten(0, 1)
    assert rows.shape[1] == 12 and chunk["tool_mask"].sum(-1).unique().tolist() == [9]
    context = {name.split("/")[1]: tensor for name, tensor in chunk.items() if name.startswith("context/")}
    with torch.no_grad():
        found, _ = trainer.completion_log_probs(trainer.policy, context, rows)
        wanted = trainer.policy(target_ids=rows.view(-1, 3, 4)[..., 1:], **context).target_log_probs
    torch.testing.assert_close(found.view(len(rows), -1)[:, [3, 7]], torch.zeros(len(rows), 2))
    torch.testing.assert_close(found.sum(1), wanted.flatten(1).sum(1))


def test_entropy_and_norms_by_sign(tmp_path):
    trainer = make(tmp_path, sign_norm_steps=1, rollout="sample", loss_type="grpo")
    before = tiny_model(trainer.model.catalogue)
    trainer.train()
    log, chunk = trainer.state.log_history[0], trainer._buffered_inputs[0]
    entropies, losses = [], {"positive": 0.0, "negative": 0.0}
    for user in range(2):
        own = {n.split("/")[1]: chunk[n][user : user + 1] for n in chunk if n.startswith("context/")}
        for g in range(G):
            row, a = chunk["rows"][user, g], chunk["advantages"][user, g]
            level = before(input_ids=row[None, :-1], **own).logits[0, 1, 12:20].log_softmax(0)
            entropies.append(-(level.exp() * level).sum().item())
            losses["positive" if a > 0 else "negative"] -= a * brute_log_probs(before, own, row).mean() / (2 * G)
    assert log["entropy/level_2"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-4)
    for name, loss in losses.items():
        norm = torch.stack([x.norm() for x in torch.autograd.grad(loss, list(before.parameters()))]).norm()
        assert log[f"grad_norm/{name}"] == pytest.approx(norm.item(), rel=1e-3)


# ---- rewards


def test_rewards_stay_with_their_sample(tmp_path):
    """After TRL's shuffle, advantage, candidate and context of a group still belong together; a hit is the user's own
    target.
    """
    seen = []

    def record(completion_ids, user, targets, sample_log_probs, **columns):
        seen.extend(zip(user, map(tuple, completion_ids), targets, sample_log_probs))
        return [float(len(seen) - len(completion_ids) + i) for i in range(len(completion_ids))]

    record.needs_sample_log_probs = True
    settings = {"unnormalized_rewards": ["record"], "gradient_accumulation_steps": 4}
    trainer = make(tmp_path, reward_funcs=record, **settings)
    trainer.train()
    pool, groups = trainer.collator.pool["context_ids"], 0
    assert [user for user, *_ in seen[::G]] == [user for user, *_ in seen[1::G]] and len(
        {u for u, *_ in seen}
    ) == USERS
    for chunk in trainer._buffered_inputs:
        for rows, advantages, context in zip(chunk["rows"], chunk["advantages"], chunk["context/context_ids"]):
            for row, place in zip(rows, advantages.long().tolist()):
                user, completion, targets, _ = seen[place]
                assert tuple(row[1:].tolist()) == completion and torch.equal(pool[user], context)
                assert targets == users()[user]["targets"]
            groups += 1
    assert groups == USERS
    offsets, semantic_ids = torch.tensor(trainer.policy.config.level_offsets), trainer.policy.catalogue.semantic_ids
    hits = {user for user, ids, targets, _ in seen if list(ids) == (semantic_ids[targets[0]] + offsets).tolist()}
    assert trainer.state.log_history[0]["hit_rate"] == pytest.approx(len(hits) / USERS)
    before = tiny_model(trainer.model.catalogue)
    user, ids, _, score = seen[5]
    row = torch.tensor([before.config.bos_token_id, *ids])
    assert score == pytest.approx(
        brute_log_probs(before, trainer.collator.context([{"user": user}]), row).sum().item(), rel=1e-4
    )


def test_format_reward_is_added_after_the_normalisation_and_illegal_samples_without_reward_do_not_train(tmp_path):
    catalogue = tiny_catalogue()

    def only_legal(completion_ids, **columns):
        return [
            r if legal else None for r, legal in zip(range(len(completion_ids)), is_legal(completion_ids, catalogue))
        ]

    format_reward = FormatReward(catalogue, 16, 16)
    trainer = make(
        tmp_path,
        reward_funcs=[only_legal, format_reward],
        rollout="unconstrained",
        num_generations=16,
        per_device_train_batch_size=32,
        reward_weights=[1.0, 0.5],
    )
    trainer.train()
    chunk = trainer._buffered_inputs[0]
    legal = is_legal(chunk["rows"].flatten(0, 1)[:, 1:].tolist(), catalogue).view(2, 16)
    assert 0 < legal.sum() < 32
    for own, good in zip(chunk["advantages"], legal):
        assert (own[~good] == 0).all()
        if good.sum() > 1:
            assert own[good].mean() == pytest.approx(0.5, abs=1e-5)  # 0 of the normalised part, 0.5 * 1 of the format
            assert (own[good] - 0.5).square().mean() == pytest.approx(1, abs=1e-4)
    log = trainer.state.log_history[0]
    assert log["legality"] == log["rewards/format_reward/mean"] == pytest.approx(legal.float().mean().item())
    assert log["zero_advantage"] == pytest.approx((chunk["advantages"] == 0).float().mean().item())


class Judge(torch.nn.Module):
    """A P-Score: one positive number per candidate, of what is no item as well."""

    config, device = tiny_model().config, torch.device("cpu")

    def forward(self, item_ids, **context):
        return SimpleNamespace(rewards=0.5 + 0.4 * item_ids.float().sum((1, 2)).sin())


@pytest.mark.parametrize("loss_type", ["grpo", "ecpo", "gbpo"])
@pytest.mark.parametrize("with_format", [False, True])
def test_a_reward_model_compares_items_alone_with_either_sign(loss_type, with_format, tmp_path):
    """Unconstrained rollouts: an illegal one is no item 0, and a reward without negatives does not only praise."""
    # with this order of the context, a group draws several legal items
    catalogue, model = tiny_catalogue(), tiny_model(tiny_catalogue(), context_position="bias")
    own = OneRecCollator(catalogue.semantic_ids.numpy() + torch.tensor(model.config.level_offsets).numpy())
    own.candidates = lambda rows: {"item_ids": own.pad_targets([row["targets"] for row in rows])}
    score = reward_of_model(Judge(), own, model)
    rows = users().map(lambda row: {"history": [row["user"], 9]})
    functions = [score, FormatReward(catalogue, 16, 5)] if with_format else [score]
    sizes = {"num_generations": 16, "per_device_train_batch_size": 64, "rollout": "unconstrained"}
    trainer = make(tmp_path, model, functions, rows=rows, loss_type=loss_type, **sizes)
    trainer.train()
    chunk, signs = trainer._buffered_inputs[0], set()
    for group, advantages in zip(chunk["rows"], chunk["advantages"]):
        legal = is_legal(group[:, 1:].tolist(), catalogue)
        assert (advantages[~legal] == 0).all() and 0 < (~legal).sum()
        items = own.item_token_ids.tolist()
        number = [items.index(ids) for ids in group[legal, 1:].tolist()]
        scores = 0.5 + 0.4 * torch.tensor(own.item_token_ids[number]).float().sum(1).sin()
        wanted = (scores - scores.mean()) / scores.std(correction=0) if len(scores.unique()) > 1 else 0 * scores
        given = advantages[legal] - wanted  # what the format reward adds
        assert all(min(abs(x), abs(x - with_format)) < 1e-4 for x in given.tolist())
        signs |= set(wanted.sign().tolist())
    assert {1.0, -1.0} <= signs
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_a_group_without_any_reward_has_advantage_zero(tmp_path):
    """The first user's rewards are all None: neither NaN, nor a step from them."""

    def some(completion_ids, user, **columns):
        return [None if u == user[0] else r for u, r in zip(user, reward(completion_ids, user))]

    trainer = make(tmp_path, reward_funcs=some)
    trainer.train()
    advantages = trainer._buffered_inputs[0]["advantages"]
    assert (advantages == 0).all(1).tolist().count(True) == 1 and advantages.isfinite().all()
    trainer = make(tmp_path / "none", reward_funcs=lambda completion_ids, **columns: [None] * len(completion_ids))
    before = [parameter.detach().clone() for parameter in trainer.policy.parameters()]
    trainer.train()
    assert trainer.state.log_history[0]["zero_advantage"] == 1 and trainer.state.log_history[0]["loss"] == 0
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.policy.parameters()))


def test_no_warning_of_candidates_that_nobody_rewards(tmp_path, caplog):
    """TRL's own trainer would print the row and the completion in every step."""
    caplog.set_level(logging.WARNING)
    trainer = make(tmp_path, reward_funcs=lambda completion_ids, **columns: [None, *range(1, len(completion_ids))])
    trainer.train()
    assert (trainer._buffered_inputs[0]["advantages"] == 0).sum() >= 1
    assert not [record for record in caplog.records if "All reward functions" in record.getMessage()]
    grpo_trainer.logger.warning("All reward functions returned None: of another trainer")
    assert "of another trainer" in caplog.text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rewards_that_are_no_numbers_stop_the_run(value, tmp_path):
    def broken(completion_ids, **columns):
        return [0.0, value] * (len(completion_ids) // 2)

    with pytest.raises(ValueError, match=f"'broken' returned {value} for completion 1"):
        make(tmp_path, reward_funcs=broken).train()


# ---- logged exposures


def logged_rows():
    rows = [
        {"user": 0, "targets": [3, 9, 11], "advantage": [1.0, 0.0, -1.0], "log_probs": [[-1.0, -2.0, math.nan]] * 3},
        {"user": 5, "targets": [20, 21, 22], "advantage": [-1.0, -1.0, 1.0], "log_probs": [[math.nan] * 3] * 3},
    ]
    return datasets.Dataset.from_list(rows)


@pytest.mark.parametrize("loss_type", ["grpo", "ecpo", "gbpo"])
def test_logged_exposures_with_and_without_logged_probabilities(loss_type, tmp_path):
    """No rollouts; pi_old is what was logged, and the policy itself where it is NaN; advantages of 0 are left out of
    the mean.
    """
    trainer = make(
        tmp_path,
        rows=datasets.Dataset.from_dict({"user": [0]}),
        loss_type=loss_type,
        logged_weight=1.0,
        logged_batch_size=2,
        reward_funcs=None,
        trainer={"logged_dataset": logged_rows()},
        sign_norm_steps=0,
    )
    before = tiny_model(trainer.model.catalogue)
    expected, offsets = 0.0, torch.tensor(before.config.level_offsets)
    for row in logged_rows():
        context = trainer.collator.context([row])
        for item, a, logged in zip(row["targets"], row["advantage"], row["log_probs"]):
            tokens = torch.cat([torch.tensor([1]), before.catalogue.semantic_ids[item].long() + offsets])
            log_probs = brute_log_probs(before, context, tokens)
            for level in range(3):
                pi = log_probs[level].exp().item()
                old = pi if math.isnan(logged[level]) else math.exp(logged[level])
                expected = expected - (closed_form(loss_type, pi, old, a) if a else 0) * log_probs[level] / (5 * 3)
    gradients = torch.autograd.grad(expected, list(before.parameters()))
    trainer.train()
    for old, new, gradient in zip(before.parameters(), trainer.model.parameters(), gradients):
        torch.testing.assert_close(new, old - 1e-2 * gradient, rtol=1e-4, atol=1e-6)
    assert "rollout_seconds" not in trainer.state.log_history[0]


def test_rollouts_and_logged_exposures_may_have_losses_of_their_own(tmp_path):
    """Old policies far from the new one: each part is what a run with that loss alone has."""
    logged = logged_rows()
    settings = {"logged_weight": 0.5, "logged_batch_size": 2, "trainer": {"logged_dataset": logged}, "max_steps": 2}
    settings |= {"sign_norm_steps": 0, "steps_per_generation": 2, "learning_rate": 1.0}
    logs = {}
    for name, own in {
        "ecpo": {"loss_type": "ecpo"},
        "gbpo": {"loss_type": "gbpo"},
        "both": {"loss_type": "ecpo", "logged_loss_type": "gbpo"},
    }.items():
        trainer = make(tmp_path / name, **settings | {"learning_rate": 0.0}, **own)
        trainer.train()
        logs[name] = trainer.state.log_history[0]
    assert logs["both"]["loss/logged"] == pytest.approx(logs["gbpo"]["loss/logged"], abs=1e-6)
    assert logs["both"]["loss/on_policy"] == pytest.approx(logs["ecpo"]["loss/on_policy"], abs=1e-6)
    assert abs(logs["ecpo"]["loss/logged"] - logs["gbpo"]["loss/logged"]) > 1e-2


def beside(folder, batch_size, accumulate):
    """Logged exposures and supervised targets alone: users have one to three of them, some exposures without
    advantage.
    """
    rows = [
        {"user": u, "targets": [7 * u, 7 * u + 1, 7 * u + 2][: 1 + u % 3], "advantage": [1.0, 0.0, -0.5][: 1 + u % 3]}
        for u in range(USERS)
    ]
    rows = datasets.Dataset.from_list(rows)
    catalogue, model = tiny_catalogue(), tiny_model(tiny_catalogue())
    own = OneRecCollator(catalogue.semantic_ids.numpy() + torch.tensor(model.config.level_offsets).numpy())
    settings = {"logged_weight": 1.0, "logged_batch_size": batch_size, "sft_batch_size": batch_size, "sft_weight": 0.5}
    settings |= {"gradient_accumulation_steps": accumulate, "max_steps": 2, "sign_norm_steps": 0, "learning_rate": 0.1}
    trainer = make(
        folder,
        model,
        None,
        rows=datasets.Dataset.from_dict({"user": [0]}),
        trainer={
            "logged_dataset": rows.add_column("history", [[1, 2]] * USERS),
            "sft_dataset": rows.add_column("history", [[3]] * USERS),
        },
        **settings,
    )
    trainer.collator = own
    trainer.train()
    return trainer


def test_losses_beside_rollouts_are_means_over_the_step(tmp_path):
    """Rows of two micro-batches of 3 are those of one of 6; they hold different numbers of exposures and targets."""
    whole, parts = beside(tmp_path / "whole", 6, 1), beside(tmp_path / "parts", 3, 2)
    counts = [parts.loss_items(parts.collator(parts.supervised(k))).item() for k in (0, 1)]
    assert counts[0] != counts[1]
    before = tiny_model(tiny_catalogue())
    moved = max((new - old).abs().max() for new, old in zip(whole.policy.parameters(), before.parameters()))
    assert moved > 0.01
    for (name, one), other in zip(whole.policy.named_parameters(), parts.policy.parameters()):
        assert_close(other.detach(), one.detach(), terms=4 * TERMS, msg=name)
    for one, other in zip(whole.state.log_history[:2], parts.state.log_history[:2]):
        for name in ("loss/logged", "loss/sft", "bound_fraction", "loss"):
            assert other[name] == pytest.approx(one[name], abs=2e-4 if name == "loss" else 1e-5), name
        assert one["loss"] == pytest.approx(one["loss/logged"] + 0.5 * one["loss/sft"], abs=2e-4)


def test_pad_logged():
    rows = [
        {"targets": [1, 2], "advantage": [1, -1], "log_probs": [[-1, -2], [-3, -4]]},
        {"targets": [5], "advantage": [0.5]},
    ]
    advantages, logged = pad_logged(rows, (2, 2, 2))
    assert advantages.tolist() == [[1, -1], [0.5, 0]]
    assert logged[0].tolist() == [[-1, -2], [-3, -4]] and logged[1].isnan().all()
    with pytest.raises(ValueError, match="2 targets and 1 advantages"):
        pad_logged([{"targets": [1, 2], "advantage": [1]}], (1, 2, 2))
    with pytest.raises(ValueError, match="log_probs"):
        pad_logged([{"targets": [1], "advantage": [1], "log_probs": [[-1.0]]}], (1, 1, 2))


def test_endless_batches_are_a_function_of_their_number():
    rows = datasets.Dataset.from_dict({"n": range(10)})
    halves = [EndlessBatches(rows, 3, seed=1, process=p, num_processes=2) for p in (0, 1)]
    drawn = [row["n"] for k in range(10) for half in halves for row in half(k)]
    rounds = [drawn[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(numbers) == list(range(10)) for numbers in rounds) and rounds[0] != rounds[1]
    assert EndlessBatches(rows, 3, seed=1, process=1, num_processes=2)(7) == halves[1](7)


# ---- the rest of the contract


def run(folder, resume=None, **settings):
    torch.manual_seed(3)
    logged = users().map(lambda row: {"advantage": [1.0 - 2 * (row["user"] % 2)]})
    trainer = make(
        folder,
        reward_funcs=[reward, FormatReward(tiny_catalogue(), G, 2)],
        trainer={"logged_dataset": logged, "sft_dataset": users()},
        rollout="sample",
        steps_per_generation=4,
        max_steps=6,
        logged_weight=0.5,
        logged_batch_size=3,
        sft_weight=0.2,
        sft_batch_size=3,
        optim="adamw_torch",
        lr_scheduler_type="linear",
        save_strategy="steps",
        save_steps=3,
        **settings,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_killed_run_goes_on_as_if_unbroken(accumulate, tmp_path):
    """Stopped in the middle of rollouts, which are four micro-batches long: the checkpoint holds the others."""
    settings = {"gradient_accumulation_steps": accumulate}
    whole = run(tmp_path / "whole", **settings)
    broken = run(tmp_path / "broken", resume=str(tmp_path / "whole" / "checkpoint-3"), **settings)
    assert [log["step"] for log in broken.state.log_history if "loss" in log] == [1, 2, 3, 4, 5, 6]
    for left, right in zip(whole.state.log_history[:6], broken.state.log_history[:6]):
        for name in ("loss", "reward", "loss/sft", "loss/logged", "clip_fraction", "entropy/level_1", "hit_rate"):
            assert left.get(name) == right.get(name), (left["step"], name)
    assert whole.state.log_history[4]["bound_fraction"] >= 0 and "rollout_seconds" not in whole.state.log_history[5]
    for left, right in zip(whole.model.parameters(), broken.model.parameters()):
        assert torch.equal(left, right)


def test_lora_trains_adapters_alone_with_the_base_as_reference(tmp_path):
    from peft import LoraConfig

    before = tiny_model(tiny_catalogue())
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"])
    trainer = make(
        tmp_path, trainer={"peft_config": config}, beta=0.1, max_steps=3, learning_rate=1.0, sign_norm_steps=1
    )
    trainer.train()
    logs = trainer.state.log_history[:3]
    assert logs[0]["kl"] == pytest.approx(0, abs=1e-6) and logs[2]["kl"] > 1e-6 and logs[0]["grad_norm/positive"] > 0
    after = dict(trainer.policy.named_parameters())
    assert any("lora_B" in name and parameter.abs().max() > 0 for name, parameter in after.items())
    for name, parameter in before.named_parameters():
        kept = after.get(name, after.get(name.replace("_proj.", "_proj.base_layer.")))
        assert torch.equal(kept, parameter), name


def test_kl_to_the_folder_the_policy_came_from(tmp_path):
    tiny_model(tiny_catalogue()).save_pretrained(tmp_path / "sft")
    model = type(tiny_model(tiny_catalogue())).from_pretrained(tmp_path / "sft")
    trainer = make(tmp_path / "rl", model=model, beta=0.5, max_steps=2)
    trainer.train()
    first, second = trainer.state.log_history[:2]
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 1e-6


def test_a_reference_that_follows_the_policy_is_resumed(tmp_path):
    tiny_model(tiny_catalogue()).save_pretrained(tmp_path / "sft")

    def run(resume):
        model = type(tiny_model(tiny_catalogue())).from_pretrained(tmp_path / "sft")
        settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "save_strategy": "steps", "save_steps": 3}
        trainer = make(tmp_path / "rl", model=model, beta=0.5, max_steps=6, rollout="beam", **settings)
        trainer.train(resume_from_checkpoint=resume)
        return [record["kl"] for record in trainer.state.log_history if "kl" in record]

    unbroken = run(None)
    assert len(unbroken) == 6 and run(str(tmp_path / "rl" / "checkpoint-3")) == unbroken


def test_the_catalogue_is_demanded(tmp_path):
    model = tiny_model(tiny_catalogue())
    model.catalogue = None
    with pytest.raises(ValueError, match="no catalogue"):
        make(tmp_path, model=model)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss_type": "dapo"}, "allowed are grpo, ecpo, gbpo"),
        ({"rollout": "greedy"}, "allowed are beam"),
        ({"top_p": 0.9}, "top_p=0.9 with rollout='beam'"),
        ({"top_k": 5, "rollout": "tree"}, "top_k=5, top_p=1.0 with rollout='tree'"),
        ({"min_p": 0.1}, "min_p=0.1 would do nothing: candidates are semantic IDs.*Leave it out"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of=8 would do nothing: candidates are semantic IDs"),
        ({"sapo_temperature_neg": 2.0}, "sapo_temperature_neg=2.0 would do nothing: the losses are those"),
        ({"scale_rewards": "batch"}, "scale_rewards='batch' would do nothing: the losses are those of the papers"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 would do nothing: the loss is the model's own"),
        ({"do_predict": True}, "do_predict=True would do nothing"),
        ({"include_for_metrics": ["loss"]}, "include_for_metrics=.* would do nothing"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy='group_by_length' would do nothing: users come in random order",
        ),
        (
            {"rollout": "unconstrained_beam", "num_generations": 1000, "per_device_train_batch_size": 1000},
            "have 512 different codes",
        ),
        ({"per_device_train_batch_size": 6}, "multiple of num_generations=4"),
        ({"logged_weight": 1.0, "max_steps": -1}, "set max_steps"),
        ({"logged_weight": 0.5}, "logged_dataset is not given"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"logged_loss_type": "dapo", "logged_weight": 0.5}, "allowed are None, grpo, ecpo, gbpo"),
        ({"logged_loss_type": "gbpo"}, "logged_loss_type='gbpo' with logged_weight=0"),
        (
            {"unnormalized_rewards": ["p_score"]},
            r"unnormalized_rewards=\['p_score'\]: the reward functions are \['reward'\]",
        ),
    ],
)
def test_settings_that_make_no_sense(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **settings)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_data_sets_without_rows_are_no_loss(weight, tmp_path):
    for name, weights in (("logged_dataset", {"logged_weight": weight}), ("sft_dataset", {"sft_weight": weight})):
        with pytest.raises(ValueError, match=rf"{name} has no rows, but its weight is {weight}"):
            make(tmp_path, trainer={name: logged_rows().select([])}, max_steps=2, **weights)


def test_unconstrained_samples_need_a_policy_that_has_probabilities_for_them(tmp_path):
    model = tiny_model(tiny_catalogue(), score_normalization="valid")
    with pytest.raises(ValueError, match="score_normalization='level'"):
        make(tmp_path, model=model, rollout="unconstrained")
