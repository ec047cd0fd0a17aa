"""Reward models as reward functions: the candidates they see are the items that were generated, judged beside their
own user.
"""

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
from onerec_hf.collators import OneRecCollator
from onerec_hf.data import EventFeature
from onerec_hf.rewards import CandidateCollator, reward_of_model
from onerec_hf.trainers import pair_mining
from onerec_hf.trainers.pair_mining import mine_pairs

from ..tiny import SIZES, tiny_catalogue
from ..trainers.test_ipa import world


class Candidates(OneRecCollator):
    """A reward model's collator; the hour of the request and the item's parity are features of every candidate."""

    item_feature_sizes = {"hour": 24, "parity": 3}
    request_features = {"hour": EventFeature("category", 24)}

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
    read, context_of = [], own.context
    own.context = lambda requests: read.append(len(requests)) or context_of(requests)
    mined, _ = mine_pairs(policy, rows, [0, 1, 2], collator, reward_of_model(judge, own, policy, batch_size=2), 60)
    assert len(mined) == 3 and read == [2, 1]  # a context is read once for all 60 candidates
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
    reward = reward_of_model(Judge(), own, policy, catalogue=policy.catalogue)
    codes = shared.semantic_ids[:3].long() + torch.tensor(policy.config.level_offsets)
    completions = [*codes.tolist(), [0, 0, 0]]
    found = reward(completion_ids=completions, user=[0] * 4, history=[[0, 1, 2]] * 4)
    assert seen[0].tolist() == [2, 2, 1, 1]  # items 3, 1, 2, and 0 in place of none
    assert found[3] is None and None not in found[:3]  # it is not scored as item 0


def test_candidates_that_are_no_items_are_never_chosen_or_rejected(monkeypatch):
    """A search that leaves the catalogue; the reward model would like its illegal candidates best and least."""
    policy, collator, rows = world("v2", num_rows=2)
    legal, offset = collator.item_token_ids[:3], torch.tensor(policy.config.level_offsets)
    taken = {tuple(ids) for ids in collator.item_token_ids.tolist()}
    free = [ids for ids in (torch.cartesian_prod(*[torch.arange(8)] * 3) + offset).tolist() if tuple(ids) not in taken]
    found = torch.tensor([free[-1], *legal.tolist(), free[0]])
    found = torch.nn.functional.pad(found, (1, 0), value=policy.config.bos_token_id)
    monkeypatch.setattr(
        pair_mining,
        "generate_candidates",
        lambda *_: (found[None, :, None, 1:].expand(2, 5, 1, 3), torch.ones(2, 5) > 0),
    )

    class Judge(torch.nn.Module):
        config, device = policy.config, torch.device("cpu")

        def forward(self, item_ids, item_features, **context):
            return SimpleNamespace(rewards=torch.tensor([9.0, 2.0, 3.0, 1.0, -9.0]).repeat(2))

    reward = reward_of_model(Judge(), Candidates(collator.item_token_ids), policy)
    pairs, sums = mine_pairs(policy, list(rows), [0, 1], collator, reward, 5)
    assert [(pair["chosen_reward"], pair["rejected_reward"]) for pair in pairs] == [(3.0, [1.0])] * 2
    assert pairs[0]["chosen"] == legal[1].tolist() and pairs[0]["rejected"] == legal[2].tolist()
    assert sums["reward"] == 2 * 2.0 and sums["rewarded"] == 2


def test_a_reward_model_of_another_catalogue_is_refused():
    policy, collator, _ = world("v2")
    own, judge = Candidates(collator.item_token_ids), reward_model(False)
    reward_of_model(judge, own, policy, catalogue=policy.catalogue)
    moved = Catalogue(policy.catalogue.semantic_ids.flip(0), SIZES, policy.catalogue.item_ids)
    renamed = Catalogue(policy.catalogue.semantic_ids, SIZES)
    for other in (moved, renamed, tiny_catalogue(20)):
        with pytest.raises(ValueError, match="the same codes mean other items"):
            reward_of_model(judge, own, policy, catalogue=other)
        judge.config.catalogue_fingerprint = other.fingerprint()  # as recipes/reward.py leaves it
        with pytest.raises(ValueError, match="the same codes mean other items"):
            reward_of_model(judge, own, policy)
        judge.config.catalogue_fingerprint = policy.catalogue.fingerprint()
        reward_of_model(judge, own, policy)
    judge.config.codebook_sizes = [8, 8, 9]
    with pytest.raises(ValueError, match="was trained with other semantic IDs"):
        reward_of_model(judge, own, policy)


def test_a_training_row_becomes_the_request_it_was_generated_for():
    policy, collator, _ = world("v2")
    contexts, judged = [], []

    class Spy(Candidates):
        def context(self, rows):
            contexts.extend(rows)
            return super().context(rows)

        def candidates(self, rows):
            judged.extend(rows)
            return super().candidates(rows)

    row = {"user": 3, "history": [4, 5, 6], "timestamp": [10, 20, 30], "is_like": np.array([0, 1, 0]), "length": 3}
    row |= {
        "hour": [7, 8, 9],
        "friends": [1, 2, 3],
        "embedding": np.zeros(3),
        "target_ids": [5, 6, 7],
    }  # three by chance
    spy = Spy(collator.item_token_ids, event_features={"is_like": EventFeature("category", 3)})
    collate = CandidateCollator(spy, policy.catalogue)
    collate([row | {"completion_ids": [collator.item_token_ids[7].tolist()] * 2}])
    seen = contexts[0]
    assert seen["history"] == [4, 5] and seen["timestamp"] == [10, 20] and seen["session_start"] == 30
    assert seen["is_like"].tolist() == [0, 1] and seen["target_is_like"].tolist() == [0] and "targets" not in seen
    assert seen["hour"] == [7, 8] and judged[1]["target_hour"] == [9] and judged[1]["targets"] == [7]
    for row_seen in (seen, judged[0]):  # what the collator does not name stays as it is
        assert row_seen["friends"] == [1, 2, 3] and row_seen["target_ids"] == [5, 6, 7]
        assert len(row_seen["embedding"]) == 3 and "target_friends" not in row_seen
    with pytest.raises(ValueError, match=r"columns \{'hour': 2\} do not run parallel to the history of 3 items"):
        collate([row | {"hour": [1, 2], "completion_ids": [[4, 12, 20]]}])
