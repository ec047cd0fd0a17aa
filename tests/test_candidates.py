"""Reward models as reward functions: the candidates they see are the items that were generated, judged beside their own user."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from onerec_hf import (
    Catalogue,
    OneRecPScoreConfig,
    OneRecPScoreModel,
    OneRecSessionRewardConfig,
    OneRecSessionRewardModel,
)
from onerec_hf.data import OneRecCollator
from onerec_hf.rewards import CandidateCollator, reward_of_model
from onerec_hf.trainers.pair_mining import mine_pairs

from .test_ipa import world
from .tiny import SIZES, tiny_catalogue


class Candidates(OneRecCollator):
    """A reward model's collator; the hour of the request and the item's parity are features of every candidate."""

    item_feature_sizes = {"hour": 24, "parity": 3}

    def candidates(self, rows):
        hour = [row.get("target_hour", [0] * len(row["targets"])) for row in rows]
        features = [np.stack([h, np.asarray(row["targets"]) % 2 + 1], axis=1) for h, row in zip(hour, rows)]
        return {
            "item_ids": self.pad_targets([row["targets"] for row in rows]),
            "item_features": torch.from_numpy(np.stack(features)).long(),
        }


def reward_model(session: bool):
    torch.manual_seed(0)
    kind, model = (
        (OneRecSessionRewardConfig, OneRecSessionRewardModel) if session else (OneRecPScoreConfig, OneRecPScoreModel)
    )
    sizes = {"hidden_size": 16, "context_embed_dim": 8, "initializer_range": 0.3}
    return model(kind(codebook_sizes=SIZES, item_features=Candidates.item_feature_sizes, **sizes))


@pytest.mark.parametrize("architecture,session", [("onerec", True), ("onerec", False), ("v2", False)])
def test_rewards_are_those_of_the_model_one_candidate_at_a_time(architecture, session):
    policy, collator, rows = world(architecture, num_rows=3)
    judge = reward_model(session)
    own = Candidates(collator.item_token_ids)
    if architecture == "onerec":
        rows = [row | {"target_hour": [row["user"] + 5] * 3} for row in rows]
    else:  # no targets: the hour of the last event, which comes next
        rows = [row | {"hour": [1, 2, 3, row["user"] + 5]} for row in rows]
    mined, _ = mine_pairs(policy, rows, [0, 1, 2], collator, reward_of_model(judge, own, policy, 60, batch_size=2), 60)
    assert len(mined) == 3
    tokens = {tuple(ids): item for item, ids in enumerate(collator.item_token_ids.tolist())}
    for pair, row in zip(mined, rows):
        context = own.context([row | {"history": row["history"] if "targets" in row else row["history"][:-1]}])
        for name, reward in (("chosen", pair["chosen_reward"]), ("rejected", pair["rejected_reward"][0])):
            items = [tokens[tuple(ids)] for ids in np.reshape(pair[name], (-1, 3)).tolist()]
            features = torch.tensor([[[row["user"] + 5, item % 2 + 1] for item in items]])
            with torch.no_grad():
                found = judge(item_ids=own.pad_targets([items]), item_features=features, **context)
            assert reward == pytest.approx(found.rewards.mean().item(), abs=1e-5)


def test_dead_beams_and_shared_semantic_ids():
    policy, collator, _ = world("v2")
    shared = tiny_catalogue(4, num_collisions=1)
    policy.catalogue = Catalogue(shared.semantic_ids, SIZES, popularity=[1, 1, 1, 9])  # item 3 is item 0, more popular
    seen = []

    class Judge(torch.nn.Module):
        config, device = policy.config, torch.device("cpu")

        def forward(self, item_ids, item_features, **context):
            seen.append(item_features[:, 0, 1])
            return SimpleNamespace(rewards=item_ids[:, 0].sum(1).float())

    own = Candidates(collator.item_token_ids)
    reward = reward_of_model(Judge(), own, policy, 4, catalogue=policy.catalogue)
    codes = shared.semantic_ids[:3].long() + torch.tensor(policy.config.level_offsets)
    completions = [*codes.tolist(), [0, 0, 0]]
    assert len(reward(completion_ids=completions, user=[0] * 4, history=[[0, 1, 2]] * 4)) == 4
    assert seen[0].tolist() == [2, 2, 1, 1]  # items 3, 1, 2, and 0 in place of none


def test_a_reward_model_of_another_catalogue_is_refused():
    policy, collator, _ = world("v2")
    own, judge = Candidates(collator.item_token_ids), reward_model(False)
    reward_of_model(judge, own, policy, 4, catalogue=policy.catalogue)
    moved = Catalogue(policy.catalogue.semantic_ids.flip(0), SIZES, policy.catalogue.item_ids)
    renamed = Catalogue(policy.catalogue.semantic_ids, SIZES)
    for other in (moved, renamed, tiny_catalogue(20)):
        with pytest.raises(ValueError, match="the same codes mean other items"):
            reward_of_model(judge, own, policy, 4, catalogue=other)
        judge.config.catalogue_fingerprint = other.fingerprint()  # as recipes/reward.py leaves it
        with pytest.raises(ValueError, match="the same codes mean other items"):
            reward_of_model(judge, own, policy, 4)
        judge.config.catalogue_fingerprint = policy.catalogue.fingerprint()
        reward_of_model(judge, own, policy, 4)
    judge.config.codebook_sizes = [8, 8, 9]
    with pytest.raises(ValueError, match="was trained with other semantic IDs"):
        reward_of_model(judge, own, policy, 4)


def test_a_training_row_becomes_the_request_it_was_generated_for():
    policy, collator, _ = world("v2")
    seen = []

    class Spy(Candidates):
        def context(self, rows):
            seen.extend(rows)
            return super().context(rows)

    row = {"user": 3, "history": [4, 5, 6], "timestamp": [10, 20, 30], "is_like": np.array([0, 1, 0]), "length": 3}
    collate = CandidateCollator(Spy(collator.item_token_ids), policy.catalogue)
    collate([row | {"completion_ids": [collator.item_token_ids[7].tolist()] * 3}])
    assert seen[0]["history"] == [4, 5] and seen[0]["timestamp"] == [10, 20] and seen[0]["session_start"] == 30
    assert (
        seen[0]["target_is_like"].tolist() == [0] and seen[0]["target_timestamp"] == [30] and "targets" not in seen[0]
    )
