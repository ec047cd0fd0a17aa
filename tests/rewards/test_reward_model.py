"""A saved reward model by itself: no data folder, the same numbers as in training, a reward function for TRL."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from onerec_hf import OneRecPScoreConfig, OneRecPScoreModel, OneRecSessionRewardConfig, OneRecSessionRewardModel
from onerec_hf.collators import OneRecCollator, RewardCollator
from onerec_hf.data import EventFeature
from onerec_hf.rewards import RewardModel, reward_of_model

from ..numeric import assert_close
from ..tiny import SIZES, tiny_catalogue, tiny_model

CATALOGUE = tiny_catalogue()
USERS, PERIODS = 5, 3


def reward_of(session_wise=False):
    """Every kind of feature and number that a reward model can read."""
    rng = np.random.default_rng(0)
    collator = RewardCollator(
        CATALOGUE.semantic_ids.numpy() + np.array([4, 12, 20]),
        max_history=10,
        targets=["is_like", "long_view"],
        session_wise=session_wise,
        event_features={"play_time_ms": EventFeature("log", 8)},
        item_features={"author": rng.integers(0, 4, 65)},
        user_features={"age": rng.integers(0, 4, USERS)},
        candidate_features={"tag": rng.integers(0, 6, 65)},
        request_features={"hour": EventFeature("category", 25)},
        boundaries=[100.0, 200.0],
        item_numbers={"item_rate": rng.normal(size=(PERIODS, 65)).astype(np.float32)},
        user_numbers={"user_rate": rng.normal(size=(PERIODS, USERS)).astype(np.float32)},
    )
    kind, model = (
        (OneRecSessionRewardConfig, OneRecSessionRewardModel)
        if session_wise
        else (OneRecPScoreConfig, OneRecPScoreModel)
    )
    torch.manual_seed(0)
    config = kind(
        codebook_sizes=SIZES,
        hidden_size=16,
        context_embed_dim=8,
        initializer_range=0.3,
        targets=list(collator.targets),
        context_features=collator.context_feature_sizes,
        user_features=collator.user_feature_sizes,
        item_features=collator.item_feature_sizes,
        item_numbers=collator.item_number_names,
        catalogue_fingerprint=CATALOGUE.fingerprint(),
    )
    return RewardModel(model(config).eval(), collator, CATALOGUE, batch_size=2)


def training_rows():
    return [
        {
            "user": user,
            "history": np.arange(user, user + 4),
            "timestamp": np.array([50.0, 90.0, 150.0, 180.0]),
            "play_time_ms": np.array([10.0, 1e4, 300.0, 5.0]),
            "targets": [20 + user, 40],
            "target_hour": [7, 7],
            "session_start": start,
        }
        for user, start in enumerate((60.0, 160.0, 250.0))
    ]


@pytest.mark.parametrize("session_wise", [False, True])
def test_what_is_loaded_judges_as_what_was_saved(session_wise, tmp_path):
    saved = reward_of(session_wise)
    saved.save_pretrained(tmp_path)
    loaded = RewardModel.from_pretrained(tmp_path)
    rows = training_rows()
    for name, tensor in (saved.collator.context(rows) | saved.collator.candidates(rows)).items():
        again = (loaded.collator.context(rows) | loaded.collator.candidates(rows))[name]
        assert torch.equal(again, tensor), name
    completions = (CATALOGUE.semantic_ids[[3, 9, 30, 31, 32, 33]].long() + torch.tensor([4, 12, 20])).tolist()
    columns = {name: [row[name] for row in rows for _ in range(2)] for name in rows[0]}
    first, second = (model(completion_ids=completions, **columns) for model in (saved, loaded))
    assert_close(torch.tensor(first), torch.tensor(second))
    assert len({round(value, 4) for value in first}) == 6
    policy = tiny_model(CATALOGUE)
    by_hand = reward_of_model(saved.model, saved.collator, policy)(completion_ids=completions, **columns)
    assert_close(torch.tensor(by_hand), torch.tensor(first))


def test_items_are_scored_for_histories_of_users_that_nobody_knows():
    """Every number by hand: now is the last period, all of the history is known, rates are those of the mean user."""
    reward = reward_of()
    histories, items = [[1000, 1001], [], [1005]], [[1020, 1040], [1003], [1009, 1010, 1011]]
    events = {"play_time_ms": [[10.0, 1e4], [], [300.0]]}
    given = {"events": events, "users": {"age": [1, 3, 2]}, "requests": {"hour": [7, 8, 9]}}
    found = reward.score(histories, items, **given)
    assert [len(row) for row in found] == [2, 1, 3]
    collator = reward.collator
    for i, (history, own) in enumerate(zip(histories, items)):
        row = {"user": 0, "history": CATALOGUE.index_of(history), "play_time_ms": np.array(events["play_time_ms"][i])}
        index = CATALOGUE.index_of(own)
        context = OneRecCollator.context(_plain(collator), [row])
        context["user_features"] = torch.tensor([[given["users"]["age"][i]]])
        tag, hour = collator.candidate_features["tag"][index], np.full(len(own), given["requests"]["hour"][i])
        hour = collator.request_features["hour"].encode(hour)
        of_items, of_users = collator.numbers
        rate = np.full(len(own), of_users["user_rate"][2].mean())
        with torch.no_grad():
            expected = reward.model(
                item_ids=collator.pad_targets([index]),
                item_features=torch.from_numpy(np.stack([hour, tag], axis=1)[None]),
                item_numbers=torch.from_numpy(np.stack([of_items["item_rate"][2, index], rate], 1)[None]).float(),
                **context,
            ).rewards[0]
        assert_close(torch.tensor(found[i]), expected)
    unknown = reward.score(histories, items)
    assert all(abs(a - b) > 1e-4 for row, other in zip(found, unknown) for a, b in zip(row, other))
    assert len(reward_of(session_wise=True).score(histories, items)) == 3  # one number per session


def _plain(collator):
    own = OneRecCollator(
        collator.item_token_ids, 10, event_features=collator.event_features, item_features=collator.item_features
    )
    return own


@pytest.mark.parametrize(
    "change, message",
    [
        ({"items": [[1020]]}, "items: one list with at least one item id for each of the 2 users"),
        ({"items": [[1020], []]}, "items: one list with at least one item id for each of the 2 users"),
        ({"items": [[1020], "1021"]}, "items: one list with at least one item id for each of the 2 users"),
        ({"items": [[1020], [7]]}, "1 of 1 item ids are not in the catalogue"),
        ({"events": {"likes": [[1], [1]]}}, r"events has columns \['likes'\]; the model takes \['play_time_ms'\]"),
        ({"events": {"play_time_ms": [[1, 2]]}}, "for 2 users: pass one value or list per user"),
        ({"requests": {"tab": [1, 1]}}, r"requests has \['tab'\]; the model takes \['hour'\]"),
        ({"requests": {"hour": [1]}}, r"requests\['hour'\] has 1 values for 2 users"),
        ({"users": {"age": [7, 1]}}, r"users\['age'\] holds"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"histories": [[1000], [1001]], "items": [[1020], [1021]]} | change
    with pytest.raises((KeyError, ValueError), match=message):
        reward_of().score(**arguments)


def test_folders_that_are_no_reward_model(tmp_path):
    reward = reward_of()
    reward.save_pretrained(tmp_path)
    tables = load_file(tmp_path / "collator.safetensors")
    save_file({n: v for n, v in tables.items() if "rate" not in n}, tmp_path / "collator.safetensors")
    with pytest.raises(
        ValueError, match=r"collator.safetensors lacks \['item_numbers/item_rate', 'user_numbers/user_rate'\]"
    ):
        RewardModel.from_pretrained(tmp_path)
    OneRecCollator(reward.collator.item_token_ids).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds the OneRecCollator of a model that recommends"):
        RewardModel.from_pretrained(tmp_path)
    reward.save_pretrained(tmp_path)
    tiny_catalogue(40).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not fit the catalogue: item feature"):
        RewardModel.from_pretrained(tmp_path)
    (tmp_path / "catalogue.safetensors").unlink()
    with pytest.raises(OSError, match=r"catalogue\.safetensors"):
        RewardModel.from_pretrained(tmp_path)


def test_a_policy_of_other_items_is_refused():
    reward = reward_of()
    reward.check_policy(tiny_model(CATALOGUE))
    with pytest.raises(ValueError, match="do not know the same items"):
        reward.check_policy(tiny_model(tiny_catalogue(40)))
    with pytest.raises(ValueError, match="the same codes mean other items"):
        RewardModel(reward.model, reward.collator, tiny_catalogue(40))
