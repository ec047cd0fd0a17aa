"""The papers' formulas once more, in plain NumPy and without the package, against what the package computes.

Each reference is written from the paper (docs/paper_index.md names the place), one number after the other where that
is clearest. A formula that changes in the package fails here, whatever its own tests say.
"""

import math

import numpy as np
import pytest
import torch

from onerec_hf import OneRecSessionRewardConfig, OneRecSessionRewardModel
from onerec_hf.item_embeddings.item_alignment import item_contrastive_loss
from onerec_hf.models.moe import Router, balance_experts
from onerec_hf.rewards import duration_aware_advantages, duration_buckets, play_time_percentiles
from onerec_hf.semantic_ids import ResidualKMeans
from onerec_hf.trainers import preference_losses
from onerec_hf.trainers.policy_losses import ecpo_loss, gbpo_loss, group_advantages

from .tiny import SIZES, tiny_catalogue, tiny_context, tiny_model


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def close(found, expected, rel=2e-4):
    found = found.detach().double().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    np.testing.assert_allclose(found, expected, rtol=rel, atol=rel * max(1e-6, np.abs(expected).max()))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, dtype=np.float64)))


def tensor(x):
    return torch.tensor(np.asarray(x), dtype=torch.float32)


# ---- models


@pytest.mark.parametrize(("architecture", "items"), [("v2", 1), ("v1", 1), ("onerec", 3)])
@torch.no_grad()
def test_next_token_loss(architecture, items):
    """L_NTP (OneRec 3.2, TR 2.3): sum over the codes of -log softmax within the level; L_Gen (V2 2.3.1): their mean
    over L.
    """
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, architecture=architecture)
    context = tiny_context(catalogue, model)
    codes = catalogue.semantic_ids[torch.randint(65, (3, items), generator=torch.Generator().manual_seed(2))]
    offsets = 4 + np.cumsum([0, *SIZES[:-1]])
    targets = codes + torch.tensor(offsets)
    rows = torch.cat([torch.full((3, items, 1), model.config.bos_token_id), targets], dim=2).flatten(1)
    hidden = model.model(input_ids=rows, **context).last_hidden_state.double().numpy()
    weight = model.lm_head.weight.double().numpy()
    losses = np.zeros((3, items, 3))
    for row in range(3):
        for item in range(items):
            for level, size in enumerate(SIZES):
                logits = weight[offsets[level] : offsets[level] + size] @ hidden[row, 4 * item + level]
                losses[row, item, level] = -np.log(softmax(logits)[codes[row, item, level]])
    expected = losses.mean() if architecture == "v2" else losses.sum() / 3
    close(model(target_ids=targets, **context).loss, expected)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_router(scoring, rng):
    """OneRec eq. 2: softmax scores as they are. DeepSeek-V3: sigmoid scores over their sum; the bias chooses and does
    not weigh.
    """
    settings = {"num_experts": 6, "num_experts_per_tok": 2, "hidden_size": 5, "router_scoring": scoring}
    router = Router(type("Config", (), settings | {"normalize_gates": scoring == "sigmoid"}))
    weight, tokens = rng.normal(size=(6, 5)), rng.normal(size=(40, 5))
    bias = rng.normal(size=6) * 0.3
    with torch.no_grad():
        router.weight.copy_(tensor(weight))
        router.e_score_correction_bias.copy_(tensor(bias))
    _, gates, experts = router(tensor(tokens))
    load = np.zeros(6)
    for token in range(40):
        logits = weight @ tokens[token]
        scores = softmax(logits) if scoring == "softmax" else sigmoid(logits)
        chosen = sorted(range(6), key=lambda e: -(scores[e] + bias[e]))[:2]
        load[chosen] += 1
        divisor = scores[chosen].sum() if scoring == "sigmoid" else 1
        expected = {e: scores[e] / divisor for e in chosen}
        found = dict(zip(experts[token].tolist(), gates[token].tolist()))
        assert found == pytest.approx(expected, rel=1e-4)
    balance_experts(router, rate=0.01)
    update = [0.01 if n < load.mean() else -0.01 if n > load.mean() else 0 for n in load]
    close(router.e_score_correction_bias, bias + update)
    assert np.std(load) > 0


@torch.no_grad()
def test_session_reward(rng):
    """OneRec eq. 6: h_f = SelfAttention(h), r = sigmoid(MLP(Sum(h_f))); eq. 7: the sum of the cross-entropies."""
    targets = ["swt", "vtr"]
    config = OneRecSessionRewardConfig(codebook_sizes=SIZES, targets=targets, hidden_size=16, context_embed_dim=4)
    model = OneRecSessionRewardModel(config).eval()
    for parameter in model.parameters():
        parameter.copy_(0.25 * tensor(rng.normal(size=parameter.shape)))
    ids = torch.randint(8, (2, 9, 3), generator=torch.Generator().manual_seed(1)) + torch.tensor([4, 12, 20])
    inputs = {"item_ids": ids[:, :4], "context_ids": ids[:, 4:]}
    labels = np.array([[0.3, 1.0], [0.0, 0.6]])
    found = model(**inputs, labels=tensor(labels))
    # eq. 5 names target attention and no formula: its output is taken as given
    h = model.items(ids[:, :4], None, None, *model.items.encode_context(ids[:, 4:]))[0].double().numpy()
    own = {name: parameter.double().numpy() for name, parameter in model.named_parameters()}
    logits = np.zeros((2, 2))
    for row in range(2):
        q, k, v = (h[row] @ own[f"session_attention.{name}_proj.weight"].T for name in "qkv")
        heads = []
        for head in range(4):
            part = slice(4 * head, 4 * head + 4)
            heads.append(softmax(q[:, part] @ k[:, part].T / math.sqrt(4)) @ v[:, part])
        h_f = np.concatenate(heads, axis=1) @ own["session_attention.o_proj.weight"].T
        for x in range(2):
            hidden = own[f"towers.{x}.hidden.weight"] @ h_f.sum(0) + own[f"towers.{x}.hidden.bias"]
            hidden = hidden * sigmoid(hidden)
            logits[row, x] = own[f"towers.{x}.score.weight"][0] @ hidden + own[f"towers.{x}.score.bias"][0]
    r = sigmoid(logits)
    close(found.logits, logits)
    close(found.rewards, r.sum(1))
    close(found.loss, -(labels * np.log(r) + (1 - labels) * np.log(1 - r)).mean(0).sum())


# ---- semantic IDs and item embeddings


def test_residual_quantisation(rng):
    """s_l = argmin_k |r_l - c_k|^2, r_{l+1} = r_l - c_{s_l} (OneRec 3.1, TR 2.1.2)."""
    items = rng.normal(size=(50, 4))
    quantizer = ResidualKMeans(3, 4, num_iterations=2, num_full_iterations=1).fit(tensor(items))
    codebooks = quantizer.codebooks.double().numpy()
    for item, codes in zip(items, quantizer.encode(tensor(items)).tolist()):
        residual = item
        for level in range(3):
            expected = int(((residual - codebooks[level]) ** 2).sum(1).argmin())
            assert codes[level] == expected
            residual = residual - codebooks[level][expected]


def test_item_contrastive_loss(rng):
    """L_I2I (TR 2.1.1): -(1/B) sum_i log(exp(s_ii / tau) / sum_j exp(s_ij / tau)), s the cosine."""
    a, b, total = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), 0.0
    for i in range(5):
        s = [a[i] @ b[j] / np.linalg.norm(a[i]) / np.linalg.norm(b[j]) / 0.2 for j in range(5)]
        total -= s[i] - math.log(sum(math.exp(x) for x in s))
    close(item_contrastive_loss(tensor(a), tensor(b), 0.2), total / 5)


# ---- preferences


def test_preference_losses(rng):
    """OneRec's Table 1, each as in its own paper (ours divides IPO and CPO by tokens unless told not to)."""
    w, l, rw, rl = -20 * rng.random((4, 30))
    d = (w - rw) - (l - rl)
    n, beta, e = 15, 0.3, 0.2

    def log_sigmoid(x):
        return np.log(sigmoid(x))

    expected = {
        "dpo": -log_sigmoid(beta * d),
        "ipo": (d - 1 / (2 * beta)) ** 2,
        "cdpo": -(1 - e) * log_sigmoid(beta * d) - e * log_sigmoid(-beta * d),
        "rdpo": (-(1 - e) * log_sigmoid(beta * d) + e * log_sigmoid(-beta * d)) / (1 - 2 * e),
        "cpo": -log_sigmoid(beta * (w - l)) - w,
        "simpo": -log_sigmoid(beta * w / n - beta * l / n - 0.5),
        "sdpo": -log_sigmoid(-np.log(np.exp(beta * ((l - rl) - (w - rw))) + np.exp(beta * ((l - 1 - rl) - (w - rw))))),
    }
    four, pair = [tensor(x) for x in (w, l, rw, rl)], [tensor(x) for x in (w, l)]
    two = np.stack([l, l - 1], axis=1), np.stack([rl, rl], axis=1)
    found = {
        "dpo": preference_losses.dpo_loss(*four, beta=beta),
        "ipo": preference_losses.ipo_loss(*four, num_tokens=n, tau=beta, length_normalized=False),
        "cdpo": preference_losses.cdpo_loss(*four, beta=beta, label_smoothing=e),
        "rdpo": preference_losses.rdpo_loss(*four, beta=beta, label_smoothing=e),
        "cpo": preference_losses.cpo_loss(*pair, num_tokens=n, beta=beta, length_normalized=False),
        "simpo": preference_losses.simpo_loss(*pair, num_tokens=n, beta=beta, gamma=0.5),
        "sdpo": preference_losses.sdpo_loss(four[0], tensor(two[0]), four[2], tensor(two[1]), beta=beta),
    }
    for name, loss in expected.items():
        close(found[name], loss)


# ---- reinforcement


def cases():
    """(pi, pi_old, A) on both sides of every bound."""
    values = [
        (p, q, a) for p in (0.01, 0.3, 0.5, 0.8, 0.97) for q in (0.02, 0.31, 0.6, 0.95) for a in (-1.5, -0.5, 0.7, 2)
    ]
    return np.array(values).T


def test_ecpo():
    """pi'_old = max(sg(pi) / (1 + eps + delta), pi_old); min(rho A, clip(rho, 1 - eps, 1 + eps) A) (TR, ECPO), and its
    gradient.
    """
    pi, old, a = cases()
    eps, delta = 0.2, 0.1
    loss, gradient = np.zeros(len(pi)), np.zeros(len(pi))
    for i in range(len(pi)):
        rho = pi[i] / max(pi[i] / (1 + eps + delta), old[i])
        clipped = min(max(rho, 1 - eps), 1 + eps)
        loss[i] = -min(rho * a[i], clipped * a[i])
        gradient[i] = (
            -rho * a[i] if rho * a[i] <= clipped * a[i] else 0.0
        )  # d rho / d log pi = rho, the denominator being fixed
    check_loss_and_gradient(ecpo_loss, loss, gradient, pi, old, a, epsilon=eps, delta=delta)
    assert (gradient == 0).any() and np.isclose(np.abs(gradient / a).max(), 1.3)


def test_gbpo():
    """pi'_old = max(pi_old, sg(pi)) for A >= 0, max(pi_old, 1 - sg(pi)) for A < 0; -pi / pi'_old A without a clip (V2,
    GBPO).
    """
    pi, old, a = cases()
    ratio = np.array([p / (max(q, p) if x >= 0 else max(q, 1 - p)) for p, q, x in zip(pi, old, a)])
    check_loss_and_gradient(gbpo_loss, -ratio * a, -ratio * a, pi, old, a)


def check_loss_and_gradient(function, loss, gradient, pi, old, a, **settings):
    log_pi = tensor(np.log(pi)).requires_grad_()
    found = function(log_pi, tensor(np.log(old)), tensor(a), **settings)
    close(found, loss)
    close(torch.autograd.grad(found.sum(), log_pi)[0], gradient)


def test_advantages_of_a_group(rng):
    """A_i = (r_i - mean(r)) / std(r) (TR, ECPO)."""
    rewards = rng.random((3, 8))
    close(
        group_advantages(tensor(rewards)), [[(r - row.mean()) / row.std() for r in row] for row in rewards], rel=1e-3
    )


def test_duration_aware_advantages(rng):
    """F(d), q_i, tau_B and A_i of V2's duration-aware reward shaping, user by user and event by event."""
    duration, play = rng.uniform(5, 100, (4, 6)), rng.uniform(0, 90, (4, 6))
    past_duration, past_play = rng.uniform(5, 100, (4, 60)), rng.uniform(0, 90, (4, 60))
    disliked = rng.random((4, 6)) < 0.2

    def bucket(d):
        return math.floor(math.log(d + 1e-6, 2))

    q = np.full((4, 6), np.nan)
    for user in range(4):
        for i in range(6):
            same = [p for d, p in zip(past_duration[user], past_play[user]) if bucket(d) == bucket(duration[user, i])]
            if same:
                q[user, i] = sum(p <= play[user, i] for p in same) / len(same)
    known = np.sort(q[~np.isnan(q)])
    place = 0.75 * (len(known) - 1)  # the 75th percentile, interpolated
    tau = known[math.floor(place)] + (place % 1) * (known[math.ceil(place)] - known[math.floor(place)])
    expected = np.where(disliked, -1, np.where(q > tau, 1, 0))
    assert set(expected.flat) == {-1, 0, 1}
    times = [torch.tensor(x) for x in (play, duration, past_play, past_duration)]
    found = play_time_percentiles(*times)
    close(torch.nan_to_num(found, nan=-1), np.nan_to_num(q, nan=-1))
    assert duration_buckets(times[1]).tolist() == [[bucket(d) for d in row] for row in duration]
    assert duration_aware_advantages(found, torch.tensor(disliked)).tolist() == expected.tolist()
