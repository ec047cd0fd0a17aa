"""Reward models: what may influence a reward and what may not, their losses, and loading them anywhere."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError as Strict
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel

from onerec_hf import OneRecPScoreConfig, OneRecPScoreModel, OneRecSessionRewardConfig, OneRecSessionRewardModel

from ..numeric import assert_close

SIZES = [8, 8, 8]
TARGETS = ["swt", "ltr"]
FEATURES = {
    "context_features": {"play": 5, "like": 3},
    "user_features": {"age": 4},
    "item_features": {"hour": 6},
    "item_numbers": ["rate", "count"],
}
MODELS = [(OneRecSessionRewardConfig, OneRecSessionRewardModel), (OneRecPScoreConfig, OneRecPScoreModel)]
SESSION, P_SCORE = MODELS
ITEM = ("item_ids", "item_features", "item_numbers")


def tiny(config_class, model_class, **overrides):
    settings = {"codebook_sizes": SIZES, "targets": TARGETS, "hidden_size": 16, "context_embed_dim": 4, **FEATURES}
    model = model_class(config_class(**(settings | overrides))).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return model


def tokens(shape, generator):
    return torch.randint(8, (*shape, 3), generator=generator) + torch.tensor([4, 12, 20])


def inputs(batch=3, length=6, candidates=4, seed=1):
    """The second user's history is shorter, the third's is empty."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[1, length // 2 :] = False
    mask[2] = False
    return {
        "item_ids": tokens((batch, candidates), generator),
        "item_features": torch.randint(6, (batch, candidates, 1), generator=generator),
        "item_numbers": torch.randn(batch, candidates, 2, generator=generator),
        "context_ids": tokens((batch, length), generator) * mask.unsqueeze(2),
        "context_mask": mask,
        "context_features": torch.randint(3, (batch, length, 2), generator=generator) * mask.unsqueeze(2),
        "user_features": torch.randint(4, (batch, 1), generator=generator),
    }


def differ(a, b):
    assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("pair", MODELS)
@torch.no_grad()
def test_every_input_counts_and_padding_does_not(pair):
    model, batch = tiny(*pair), inputs()
    rewards = model(**batch).rewards
    assert rewards.shape == ((3,) if pair is SESSION else (3, 4)) and rewards.isfinite().all()
    change = {"ids": lambda x: (x + 1) % 8 + 4, "features": lambda x: (x + 1) % 3, "numbers": lambda x: x + 1}
    for name in ("context_ids", "context_features", "user_features", *ITEM):
        changed = batch | {name: batch[name].clone()}
        first = changed[name][0].view(-1)[:1]  # of the first user
        first.copy_(change[name.split("_")[1]](first))
        assert (model(**changed).rewards - rewards)[0].abs().max() > 1e-6, name
        assert_close(model(**changed).rewards[1:], rewards[1:])  # other users are not touched
    filler = dict(batch, context_ids=torch.where(batch["context_mask"].unsqueeze(2), batch["context_ids"], 5))
    assert_close(model(**filler).rewards, rewards)


@pytest.mark.parametrize("pair", MODELS)
@torch.no_grad()
def test_rows_of_a_user_share_the_context(pair):
    model, batch = tiny(*pair), inputs()
    many = inputs(batch=6, seed=2)
    shared = batch | {name: many[name] for name in ITEM}
    repeated = {name: value.repeat_interleave(2, 0) for name, value in batch.items()}
    repeated |= {name: many[name] for name in ITEM}
    assert_close(model(**shared).rewards, model(**repeated).rewards)
    with pytest.raises(ValueError, match="5 rows of item_ids cannot share 3 contexts"):
        model(**shared | {name: many[name][:5] for name in ITEM})


@torch.no_grad()
def test_p_score_judges_every_candidate_alone():
    model, batch = tiny(*P_SCORE), inputs()
    together = model(**batch)
    for i in range(4):
        alone = model(**dict(batch, **{name: batch[name][:, i : i + 1] for name in ITEM}))
        assert_close(alone.rewards[:, 0], together.rewards[:, i])
        assert_close(alone.logits[:, 0], together.logits[:, i])


@torch.no_grad()
def test_p_score_sees_the_behaviours_before_each_candidate_only():
    """One pass with positions equals one pass per candidate with a cut history, wherever the padding stands."""
    model, batch = tiny(*P_SCORE), inputs()
    positions = torch.tensor([[0, 1, 3, 6], [0, 1, 2, 3], [0, 0, 0, 0]])
    together = model(**batch, target_positions=positions).rewards
    for user in range(3):
        for i in range(4):
            cut = {name: value[user : user + 1] for name, value in batch.items()}
            cut |= {name: cut[name][:, i : i + 1] for name in ITEM}
            cut["context_mask"] = cut["context_mask"] & (torch.arange(6) < positions[user, i])
            assert_close(model(**cut).rewards[0, 0], together[user, i])
    right = {name: value.roll(3, 1) if name.startswith("context") else value for name, value in batch.items()}
    assert_close(model(**right).rewards[1], model(**batch).rewards[1])


@torch.no_grad()
def test_a_session_is_more_than_its_items():
    model, batch = tiny(*SESSION), inputs()
    rewards = model(**batch).logits
    order = torch.tensor([2, 0, 3, 1])
    shuffled = dict(batch, **{name: batch[name][:, order] for name in ITEM})
    assert_close(model(**shuffled).logits, rewards)  # a sum over items that attend to each other knows no order
    # padding items have no part in the sum nor in the attention
    padded = {name: torch.cat([batch[name], batch[name][:, :2]], 1) for name in ITEM}
    mask = torch.tensor([[True] * 4 + [False] * 2] * 3)
    assert_close(model(**(batch | padded), item_mask=mask).logits, rewards)
    differ(model(**(batch | padded)).logits, rewards)
    # without the self-attention the session would be a sum of independent parts
    states = []
    hook = model.towers[0].hidden.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    model(**batch)
    for part in (slice(0, 2), slice(2, 4)):
        model(**dict(batch, **{name: batch[name][:, part] for name in ITEM}))
    hook.remove()
    differ(states[0], states[1] + states[2])
    with pytest.raises(ValueError, match="a session without items"):
        model(**batch, item_mask=torch.zeros(3, 4, dtype=torch.bool))


def bce(logit, label):
    p = 1 / (1 + math.exp(-logit))
    return -(label * math.log(p) + (1 - label) * math.log(1 - p))


def test_loss_of_the_session_model():
    """Eq. 7 with weights, by hand; unknown labels have no part."""
    model, batch = tiny(*SESSION, target_weights=[1.0, 0.5], reward_weights=[2.0, 3.0]), inputs()
    labels = torch.tensor([[0.3, 1.0], [0.0, math.nan], [1.0, 0.0]])
    output = model(**batch, labels=labels)
    x = output.logits.tolist()
    swt = (bce(x[0][0], 0.3) + bce(x[1][0], 0.0) + bce(x[2][0], 1.0)) / 3
    ltr = (bce(x[0][1], 1.0) + bce(x[2][1], 0.0)) / 2
    assert output.loss.item() == pytest.approx(swt + 0.5 * ltr, rel=1e-5)
    probability = output.logits.sigmoid()
    assert_close(output.rewards, 2 * probability[:, 0] + 3 * probability[:, 1])


def test_loss_of_the_p_score():
    """Auxiliary losses of the towers plus the weighted fused loss, the same p in every term (L_P)."""
    model = tiny(*P_SCORE, target_weights=[1.0, 0.5], fused_weight=2.0)
    batch = inputs(candidates=1)
    labels = torch.tensor([[[0.3, 1.0]], [[0.0, math.nan]], [[1.0, 0.0]]])
    mask = torch.tensor([[True], [True], [False]])
    output = model(**batch, labels=labels, item_mask=mask)
    x = output.logits[:, 0].tolist()
    p = model(**batch).rewards[:, 0].logit().tolist()
    towers = (bce(x[0][0], 0.3) + bce(x[1][0], 0.0)) / 2 + 0.5 * bce(x[0][1], 1.0)
    fused = (bce(p[0], 0.3) + bce(p[1], 0.0)) / 2 + 0.5 * bce(p[0], 1.0)
    assert output.loss.item() == pytest.approx(towers + 2 * fused, rel=1e-5)
    assert output.rewards[2, 0] == 0


@pytest.mark.parametrize("pair", MODELS)
def test_no_known_label_is_no_loss_and_bad_labels_are_refused(pair):
    model, batch = tiny(*pair), inputs()
    shape = model(**batch).logits.shape
    loss = model(**batch, labels=torch.full(shape, math.nan)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())
    with pytest.raises(ValueError, match="must lie in"):
        model(**batch, labels=torch.full(shape, 1.5))
    with pytest.raises(ValueError, match="labels has shape"):
        model(**batch, labels=torch.zeros(3, 7))


@pytest.mark.parametrize("pair", MODELS)
def test_a_reward_model_can_learn(pair):
    """One code decides one label, one user feature the other; and gradients reach every parameter."""
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "context_embed_dim": 8, "initializer_range": 0.2} | FEATURES
    model = pair[1](pair[0](codebook_sizes=SIZES, targets=TARGETS, **settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for step in range(60):
        batch = inputs(batch=64, candidates=1, seed=step)
        labels = torch.stack([batch["item_ids"][:, 0, 0] < 8, batch["user_features"][:, 0] < 2], -1).float()
        labels = labels if pair is SESSION else labels.unsqueeze(1)
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:
            first = loss.item()
            # a softmax over one item has no gradient: the session attends to nothing but itself here
            still = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
            assert all("session_attention" in name for name in still), still
    logits = model(**batch).logits.reshape(64, 2)
    assert loss.item() < 0.3 * first
    assert ((logits > 0) == (labels.reshape(64, 2) > 0.5)).float().mean() > 0.95


@pytest.mark.parametrize("pair", MODELS)
@torch.no_grad()
def test_eager_and_sdpa_agree_and_half_precision_runs(pair):
    model, batch = tiny(*pair), inputs()
    rewards = model(**batch).rewards
    model.set_attn_implementation("eager")
    assert_close(model(**batch).rewards, rewards)
    half = model.bfloat16()(**batch).rewards
    assert half.isfinite().all()


WITHOUT_PACKAGE = """
import json, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "onerec_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import torch
from safetensors.torch import load_file
from transformers import AutoModel
found, batch = [], load_file(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    found.append(model(**batch).rewards.tolist())
print(json.dumps(found))
"""


def test_saved_and_loaded_with_and_without_the_package(tmp_path):
    batch, expected = inputs(), []
    save_file(batch, tmp_path / "batch.safetensors")
    folders = [tmp_path / pair[1].__name__ for pair in MODELS]
    for pair, folder in zip(MODELS, folders):
        model = tiny(*pair, target_weights=[1.0, 0.25])
        expected.append(model(**batch).rewards)
        model.save_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        assert config.targets == TARGETS and config.target_weights == [1.0, 0.25]
        loaded = AutoModel.from_pretrained(folder)
        assert type(loaded) is pair[1]
        assert_close(loaded(**batch).rewards, expected[-1])
    env = dict(os.environ, HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(tmp_path / "modules"))
    env.pop("PYTHONPATH", None)
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(tmp_path / "batch.safetensors"), *map(str, folders)]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.strip().splitlines()[-1])
    for rewards, own in zip(found, expected, strict=True):
        assert_close(torch.tensor(rewards), own)


def test_what_does_not_fit_is_named():
    with pytest.raises(Strict, match="every objective may be named once"):
        OneRecPScoreConfig(targets=["ltr", "ltr"])
    with pytest.raises(Strict, match="target_weights="):
        OneRecPScoreConfig(targets=TARGETS, target_weights=[1.0])
    with pytest.raises(Strict, match="reward_weights="):
        OneRecSessionRewardConfig(targets=TARGETS, reward_weights=[1.0])
    with pytest.raises(Strict, match="feature_embed_dims names"):
        OneRecPScoreConfig(feature_embed_dims={"colour": 4})
    model, batch = tiny(*P_SCORE), inputs()
    with pytest.raises(ValueError, match="another tokenizer"):
        model(**dict(batch, item_ids=batch["item_ids"][..., :2]))
    with pytest.raises(ValueError, match="item_features holds 0 features"):
        model(**dict(batch, item_features=None))
    with pytest.raises(ValueError, match=r"one column for each of \['count', 'rate'\]"):
        model(**dict(batch, item_numbers=None))


def test_defaults_are_the_papers_targets():
    assert OneRecSessionRewardConfig().targets == ["swt", "vtr", "wtr", "ltr"]
    assert OneRecPScoreConfig().targets == ["ctr", "lvtr", "ltr", "vtr"]
