"""Rewards: duration-aware shaping against plain Python, and reward functions that belong to their sample."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from trl.trainer import grpo_trainer

from onerec_hf import Catalogue
from onerec_hf.rewards import (
    FormatReward,
    HitReward,
    IndustrialReward,
    ModelReward,
    completion_leaves,
    duration_aware_advantages,
    duration_buckets,
    finite_or_none,
    is_legal,
    play_time_percentiles,
    select_for_format,
)

# 2 levels of 4 codes: tokens 4..7 and 8..11; items 0 and 2 share a semantic ID
CATALOGUE = Catalogue([[0, 0], [1, 3], [0, 0], [3, 2]], [4, 4])
ITEM = [[4, 8], [5, 11], [4, 8], [7, 10]]
BOS = 1


# ---- duration-aware shaping


def test_buckets_are_powers_of_the_base():
    assert duration_buckets(torch.tensor([0.0, 1, 1.9, 2, 3.9, 4, 7.9, 8])).tolist() == [-20, 0, 0, 1, 1, 2, 2, 3]
    # log(1000) / log(10) is 2.9999999999999996 in floating point; eps keeps exact powers in the upper bucket
    assert duration_buckets(torch.tensor([9, 10, 999, 1000, 10**6]), base=10).tolist() == [0, 1, 2, 3, 6]


def shaping_in_python(plays, durations, past, base, eps, min_history, count_self):
    """Percentile of every exposure of every user, as the paper writes it."""

    def bucket(d):
        return math.floor(math.log(d + eps) / math.log(base))

    result = []
    for user_plays, user_durations, user_past in zip(plays, durations, past):
        row = []
        for play, duration in zip(user_plays, user_durations):
            own = [p for d, p in user_past if bucket(d) == bucket(duration)]
            if len(own) < min_history:
                row.append(math.nan)
                continue
            own += [play] if count_self else []
            row.append(sum(p <= play for p in own) / len(own))
        result.append(row)
    return result


@pytest.mark.parametrize("base, min_history, count_self", [(2.0, 1, False), (1.5, 3, False), (3.0, 0, True)])
def test_percentiles_equal_plain_python(base, min_history, count_self):
    rng = random.Random(0)

    def duration():
        return rng.choice([3, 5, 8, 8, 16, 27, 81, 120])

    past = [[(duration(), rng.randint(0, 9)) for _ in range(size)] for size in (30, 7, 0)]  # long, short, empty
    durations = [[duration() for _ in range(12)] for _ in past]
    plays = [[rng.randint(0, 9) for _ in range(12)] for _ in past]
    expected = shaping_in_python(plays, durations, past, base, 1e-6, min_history, count_self)
    padded = torch.full((3, 30, 2), -7)  # whatever stands in padding is not read
    mask = torch.zeros(3, 30, dtype=torch.bool)
    for i, events in enumerate(past):
        padded[i, : len(events)] = torch.tensor(events).view(-1, 2)
        mask[i, : len(events)] = True
    found = play_time_percentiles(
        torch.tensor(plays),
        torch.tensor(durations),
        padded[..., 1],
        padded[..., 0],
        mask,
        base=base,
        min_history=min_history,
        count_self=count_self,
    )
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0, equal_nan=True)
    assert 0 < found.isnan().sum() < 36 or count_self


def test_every_exposure_can_see_its_own_past():
    play, duration = torch.tensor([[5, 5]]), torch.tensor([[10, 10]])
    past_play, past_duration = torch.tensor([[1, 9]]), torch.tensor([[10, 10]])
    seen = torch.tensor([[[True, False], [True, True]]])
    assert play_time_percentiles(play, duration, past_play, past_duration, seen).tolist() == [[1.0, 0.5]]


def test_an_empty_bucket_gives_no_verdict_unless_the_exposure_counts_itself():
    one = torch.tensor([[5]])
    far = torch.tensor([[1000]])
    assert play_time_percentiles(one, one, one, far).isnan().all()
    assert play_time_percentiles(one, one, one, far, min_history=0, count_self=True).item() == 1.0
    with pytest.raises(ValueError, match="min_history=0"):
        play_time_percentiles(one, one, one, far, min_history=0)


def test_top_quartile_dislike_and_the_rest():
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    dislike = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1]])
    assert duration_aware_advantages(q, dislike).tolist() == [[-1, 0, 0, 0], [0, 0, 1, -1]]
    # no verdict is no reward, a dislike counts without one; padding has no part in anything
    q = torch.tensor([[0.1, math.nan, 0.3, 0.4], [0.5, math.nan, 99.0, 0.8]])
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[1, 2] = False
    dislike = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0]])
    assert duration_aware_advantages(q, dislike, mask=mask).tolist() == [[0, -1, 0, 0], [0, 0, 0, 1]]
    assert duration_aware_advantages(torch.tensor([math.nan, math.nan]), torch.tensor([0, 1])).tolist() == [0, -1]


def test_ties_at_the_top():
    q = torch.tensor([0.5, 1.0, 1.0, 1.0])
    nobody = torch.zeros(4)
    assert duration_aware_advantages(q, nobody).tolist() == [0, 0, 0, 0]
    assert duration_aware_advantages(q, nobody, ties="inclusive").tolist() == [0, 1, 1, 1]
    with pytest.raises(ValueError, match="ties='midrank'"):
        duration_aware_advantages(q, nobody, ties="midrank")


@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_impossible_durations_are_refused(bad):
    with pytest.raises(ValueError, match="negative or NaN"):
        duration_buckets(torch.tensor([1.0, bad]))
    with pytest.raises(ValueError, match=r"base=1\.0"):
        duration_buckets(torch.tensor([1.0]), base=1.0)


# ---- legality


def test_what_completions_spell():
    completions = [
        ITEM[1],
        [BOS, *ITEM[0], BOS, *ITEM[3], 2],  # a session
        [4, 11],  # two codes that no item joins
        [8, 4],  # codes on each other's level
        [5],  # half an item
        [],
        [*ITEM[1], 2, 0],  # an item, end and padding
        [*ITEM[1], 4, 9],  # a session whose second item does not exist
    ]
    legal = [True, True, False, False, False, False, True, False]
    assert is_legal(completions, CATALOGUE).tolist() == legal
    leaves, owner = completion_leaves(completions, CATALOGUE)
    spelled = {i: leaves[owner == i].tolist() for i in range(len(completions))}
    assert spelled == {0: [1], 1: [0, 2], 2: [-1], 3: [-1], 4: [-1], 5: [-1], 6: [1], 7: [1, -1]}


def test_format_reward_looks_at_k_random_samples():
    legal, illegal = ITEM[1], [4, 11]
    groups = ([legal] * 4 + [illegal] * 4) * 200
    reward = FormatReward(CATALOGUE, num_generations=8, num_samples=3, seed=1)
    found = reward(prompts=[""] * 1600, completions=[""] * 1600, completion_ids=groups, other=[0] * 1600)
    table = [found[i : i + 8] for i in range(0, 1600, 8)]
    assert all(sum(value is not None for value in row) == 3 for row in table)
    assert all(value in (None, 1.0) for row in table for value in row[:4])
    assert all(value in (None, 0.0) for row in table for value in row[4:])
    # every place is looked at in 3 of 8 groups
    share = torch.tensor([[value is not None for value in row] for row in table]).float().mean(0)
    assert (share - 3 / 8).abs().max() < 4 * math.sqrt(3 / 8 * 5 / 8 / 200)
    again = FormatReward(CATALOGUE, num_generations=8, num_samples=3, seed=1)
    assert again(completion_ids=groups) == found


def test_format_reward_on_the_most_probable():
    reward = FormatReward(CATALOGUE, num_generations=3, num_samples=1, selection="top")
    completions = [ITEM[1], [4, 11], ITEM[3], ITEM[1], [4, 11], ITEM[3]]
    log_probs = [-3.0, -1.0, -2.0, -1.0, -2.0, -3.0]
    assert reward(completion_ids=completions, sample_log_probs=log_probs) == [None, 0.0, None, 1.0, None, None]
    with pytest.raises(ValueError, match="sample_log_probs"):
        reward(completion_ids=completions)
    with pytest.raises(ValueError, match="4 completions are no whole groups"):
        reward(completion_ids=completions[:4])
    with pytest.raises(ValueError, match="num_samples=4"):
        select_for_format(2, 3, 4)


# ---- bound to the sample


def test_equal_histories_with_different_targets_keep_their_own_reward():
    """A peer looked rewards up by the text of the history, where equal histories overwrite each other."""
    columns = {
        "prompts": ["same history"] * 4,
        "completions": [""] * 4,
        "completion_ids": [ITEM[1], ITEM[3], ITEM[1], ITEM[3]],
        "history": [[0, 3]] * 4,
        "target_ids": [ITEM[1], ITEM[1], ITEM[3], ITEM[3]],
    }
    assert HitReward()(**columns) == [1.0, 0.0, 0.0, 1.0]
    columns["target_ids"] = [[ITEM[1], ITEM[3]], [], [ITEM[3]], [ITEM[1]]]  # several targets, or none
    assert HitReward()(**columns) == [1.0, 0.0, 0.0, 0.0]
    assert HitReward()(completion_ids=[[BOS, *ITEM[1], 2]], target_ids=[ITEM[1]]) == [1.0]
    with pytest.raises(ValueError, match="no column 'target_ids'; they have"):
        HitReward()(completion_ids=[ITEM[1]], history=[[0]])


def test_model_reward_sees_each_sample_once_with_its_own_columns():
    calls = []

    def collate(rows):
        calls.append(len(rows))
        return {
            "bias": torch.tensor([row["bias"] for row in rows]),
            "ids": torch.tensor([row["completion_ids"] for row in rows]),
        }

    reward = ModelReward(lambda bias, ids: bias[:, None] + ids[..., 1], collate, batch_size=2)
    ids = [ITEM[0], ITEM[1], ITEM[3], ITEM[0], ITEM[1], ITEM[1]]
    columns = {"user": [7, 7, 8, 8, 7, 7], "bias": [0.5, 0.5, 100.0, 100.0, 0.25, 0.25], "trainer_state": None}
    assert reward(completion_ids=ids, **columns) == [8.5, 11.5, 110.0, 108.0, 11.25, 11.25]
    assert calls == [2, 1]
    # samples of other sizes: one row for each completion where nothing larger divides all of them
    columns |= {"user": [7, 8, 8, 8, 7, 7], "bias": [0.5, 100.0, 100.0, 100.0, 0.25, 0.25]}
    assert reward(completion_ids=ids, **columns) == [8.5, 111.0, 110.0, 108.0, 11.25, 11.25]
    assert calls == [2, 1, 2, 2, 2]
    # two samples of one user are two: any column tells them apart, and the probabilities of the completions do not
    columns |= {
        "user": [7] * 6,
        "bias": [0.5] * 2 + [100.0] * 2 + [0.25] * 2,
        "sample_log_probs": [-1.0, -2, -3, -4, -5, -6],
    }
    columns["item_ids"] = [[1], None, [2], [3], [4], [5]]  # what a trainer says of each completion
    columns["history"] = [np.array(items) for items in ([1], [1], [1, 2], [1, 2], [1, 3], [1, 3])]
    assert reward(completion_ids=ids, **columns) == [8.5, 11.5, 110.0, 108.0, 11.25, 11.25]
    assert calls == [2, 1, 2, 2, 2, 2, 1]


def test_a_hit_in_a_session_and_what_is_no_item():
    session, broken = [BOS, *ITEM[0], BOS, *ITEM[3], 2], [BOS, *ITEM[3], BOS, 4, 11]
    columns = {"completion_ids": [session, session, broken, ITEM[3][:1], []], "target_ids": [[ITEM[3]]] * 5}
    columns["target_ids"][1] = [ITEM[1]]
    assert HitReward()(**columns) == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert HitReward(catalogue=CATALOGUE)(**columns) == [1.0, 0.0, None, None, None]
    assert HitReward()(completion_ids=[[], [0, 0]], target_ids=[[], []]) == [0.0, 0.0]  # nothing is no hit on nothing


def test_model_reward_refuses_nan():
    reward = ModelReward(lambda ids: torch.tensor([[1.0, math.nan]]), lambda rows: {"ids": rows})
    with pytest.raises(ValueError, match="returned nan for completion 1"):
        reward(completion_ids=[ITEM[0], ITEM[1]], user=[0, 0])
    infinite = ModelReward(lambda ids: torch.tensor([[-math.inf, 1.0]]), lambda rows: {"ids": rows})
    with pytest.raises(ValueError, match="returned -inf for completion 0"):
        infinite(completion_ids=[ITEM[0], ITEM[1]], user=[0, 0])
    assert reward(completion_ids=[], user=[]) == []


def test_a_reward_model_has_no_say_on_what_is_no_item():
    """Whatever it returns there, which is not even looked at."""
    scores = torch.tensor([[0.5, 0.9], [math.nan, 0.25], [math.inf, 0.9]])
    completions = [ITEM[1], [4, 11], [5], ITEM[3], [], [BOS, *ITEM[1], BOS, 4, 9]]
    reward = ModelReward(lambda ids: scores, lambda rows: {"ids": rows}, catalogue=CATALOGUE)
    assert reward(completion_ids=completions, user=[0, 0, 1, 1, 2, 2]) == [0.5, None, None, 0.25, None, None]
    completions[2] = ITEM[0]
    with pytest.raises(ValueError, match="returned nan for completion 2"):
        reward(completion_ids=completions, user=[0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor(-math.inf)])
def test_rewards_that_are_no_numbers_are_refused(value):
    reward = FormatReward(CATALOGUE, num_generations=1, num_samples=1)
    assert finite_or_none(reward)(completion_ids=[ITEM[1]]) == [1.0]
    assert finite_or_none(reward).__name__ == "format_reward" and not finite_or_none(reward).needs_sample_log_probs
    with pytest.raises(ValueError, match=r"'mine' returned .* for completion 2: rewards must be finite, or None"):
        finite_or_none(constant([1.0, None, value], "mine"))(completion_ids=[[], [], []])

    async def later(completion_ids, **columns):
        return [math.nan]

    module = torch.nn.Linear(1, 1)
    assert [finite_or_none(f) for f in (later, module, "org/reward")] == [later, module, "org/reward"]


def constant(values, name="constant"):
    def function(completion_ids, **columns):
        return list(values)

    function.__name__ = name
    return function


def test_industrial_reward_above_the_quota():
    tagged = torch.tensor([False, True, False, False])  # the item [1, 3]
    completions = [ITEM[1], ITEM[0], [BOS, *ITEM[0], BOS, *ITEM[1]], [4, 11]]
    rewards = constant([1.0, 2.0, 4.0, 8.0])
    above = IndustrialReward(rewards, CATALOGUE, tagged, quota=0.49, factor=0.25)
    assert above(completion_ids=completions) == [0.25, 2.0, 1.0, 8.0]
    # two of the three completions that are items: what is no item is no content, so it does not dilute the class
    at_quota = IndustrialReward(rewards, CATALOGUE, tagged, quota=2 / 3, factor=0.25)
    assert at_quota(completion_ids=completions) == [1.0, 2.0, 4.0, 8.0]
    assert above(completion_ids=[[4, 11]] * 4) == [1.0, 2.0, 4.0, 8.0]
    with pytest.raises(ValueError, match="1 rewards are negative"):
        IndustrialReward(constant([-1.0, 0, 0, 0]), CATALOGUE, tagged, 0.1, 0.5)(completion_ids=completions)


def test_trl_takes_the_functions():
    """TRL names the rewards, repeats the columns and reads None as "does not apply"."""
    trainer = object.__new__(grpo_trainer.GRPOTrainer)
    functions = [HitReward(), FormatReward(CATALOGUE, num_generations=2, num_samples=1)]
    names = [grpo_trainer.get_callable_name(function) for function in functions]
    assert names == ["hit_reward", "format_reward"]
    trainer.reward_funcs, trainer.reward_func_names = functions, names
    trainer.reward_processing_classes, trainer.environments = [None, None], None
    trainer.state = SimpleNamespace(global_step=0)
    trainer.accelerator, trainer.args = Accelerator(), SimpleNamespace(report_to=[])
    trainer._current_train_step_time = 0.0
    inputs = [{"prompt": "", "target_ids": ITEM[1]}, {"prompt": "", "target_ids": ITEM[1]}]
    rewards = trainer._calculate_rewards(inputs, ["", ""], ["", ""], [ITEM[1], ITEM[3]])
    assert rewards[:, 0].tolist() == [1.0, 0.0]
    assert rewards[:, 1].isnan().sum() == 1
