"""Policy losses: their gradients against the closed forms of the papers, over every case of (pi, pi_old, A)."""

import itertools
import math

import pytest
import torch

from onerec_hf.trainers.policy_losses import (
    behaviour_log_probs,
    ecpo_loss,
    ecpo_old_log_probs,
    gbpo_loss,
    gbpo_old_log_probs,
    group_advantages,
    grpo_loss,
    log_complement,
    policy_loss,
    policy_loss_metrics,
)

EPSILON, DELTA = 0.2, 0.1
TABLE = list(
    itertools.product(
        (1e-6, 1e-3, 0.05, 0.3, 0.5, 0.7, 0.95), (0.3, 0.79, 0.9, 1.0, 1.1, 1.25, 1.35, 3.0), (-2.0, -1.0, 1.0, 0.5)
    )
)  # (pi, rho = pi / pi_old, A): below, inside, between the two bounds of, and above the clip range
TABLE = [(pi, pi / rho, advantage) for pi, rho, advantage in TABLE if pi / rho < 1]


def weight(loss_function, pi, pi_old, advantage):
    """-d loss / d log pi: the factor in front of grad log pi."""
    log_probs = torch.tensor([pi], dtype=torch.float64).log().requires_grad_()
    old = torch.tensor([pi_old], dtype=torch.float64).log()
    loss = loss_function(log_probs, old, torch.tensor([advantage], dtype=torch.float64))
    assert loss.requires_grad
    loss.sum().backward()
    return -log_probs.grad.item()


def grpo_weight(pi, pi_old, advantage):
    rho = pi / pi_old
    if (advantage > 0 and rho > 1 + EPSILON) or (advantage < 0 and rho < 1 - EPSILON):
        return 0.0
    return rho * advantage


def ecpo_weight(pi, pi_old, advantage):
    rho = pi / pi_old
    if advantage < 0 and rho > 1 + EPSILON + DELTA:
        return (1 + EPSILON + DELTA) * advantage
    return grpo_weight(pi, pi_old, advantage)


def gbpo_weight(pi, pi_old, advantage):
    return advantage * pi / max(pi_old, pi if advantage >= 0 else 1 - pi)


@pytest.mark.parametrize(
    "loss_function, closed_form", [(grpo_loss, grpo_weight), (ecpo_loss, ecpo_weight), (gbpo_loss, gbpo_weight)]
)
def test_gradient_is_the_closed_form(loss_function, closed_form):
    for case in TABLE:
        assert weight(loss_function, *case) == pytest.approx(closed_form(*case), rel=1e-9, abs=1e-15), case


def test_every_case_is_in_the_table():
    cases = set()
    for pi, pi_old, a in TABLE:
        rho = pi / pi_old
        cases.add((a > 0, "low" if rho < 0.8 else "in" if rho <= 1.2 else "between" if rho <= 1.3 else "high"))
    assert len(cases) == 8
    assert {pi_old > 1 - pi for pi, pi_old, a in TABLE if a < 0} == {True, False}


def test_on_policy_ecpo_is_reinforce():
    log_probs = torch.tensor([[-0.1, -2.0], [-7.0, -0.7]], requires_grad=True)
    advantages = torch.tensor([[1.5], [-0.5]])
    ecpo = ecpo_loss(log_probs, log_probs.detach(), advantages).sum()
    reinforce = -(advantages * log_probs).sum()
    torch.testing.assert_close(
        torch.autograd.grad(ecpo, log_probs)[0], torch.autograd.grad(reinforce, log_probs)[0], rtol=1e-6, atol=0
    )


def test_gbpo_negative_on_policy_is_bounded_and_vanishes_where_grpo_does_not():
    previous = 1.0
    for pi in (0.999, 0.7, 0.3, 1e-2, 1e-4, 1e-8):
        gbpo, grpo = (-weight(loss, pi, pi, -1.0) for loss in (gbpo_loss, grpo_loss))
        assert 0 < gbpo <= previous and gbpo <= 1
        assert grpo == pytest.approx(1)
        previous = gbpo
        # in the probability itself, and so in theta: GRPO explodes, GBPO stays under binary cross-entropy
        assert grpo / pi == pytest.approx(1 / pi) and gbpo / pi <= 1 / (1 - pi) + 1e-9
    assert previous == pytest.approx(1e-8, rel=1e-6)
    assert [round(-weight(gbpo_loss, pi, pi, -1.0), 4) for pi in (1e-4, 0.3, 0.7)] == [1e-4, 0.4286, 1.0]


def test_gbpo_never_exceeds_binary_cross_entropy():
    for pi, pi_old, advantage in TABLE:
        bound = 1 / pi if advantage > 0 else 1 / (1 - pi)
        found = abs(weight(gbpo_loss, pi, pi_old, advantage)) / pi
        assert found <= abs(advantage) * bound * (1 + 1e-12), (pi, pi_old, advantage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gbpo_at_the_ends_of_the_scale(dtype):
    """pi = 1, pi one rounding error from 1, pi below the smallest float: finite losses and gradients."""
    log_probs = torch.tensor([0.0, -1e-7, -1e-12, -50.0, -1e4], dtype=dtype, requires_grad=True)
    for advantage in (1.0, -1.0):
        advantages = torch.full_like(log_probs, advantage)
        loss = gbpo_loss(log_probs, log_probs.detach(), advantages)
        (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
        assert loss.isfinite().all() and gradient.isfinite().all()
        assert (gradient.abs() <= 1 + 1e-6).all()
    assert gradient[-1] == 0 and gradient[0] == pytest.approx(1)


def test_log_complement_keeps_its_digits():
    """Against exact values: log(1 - e^x) = log(-x) + x/2 near 0, = -e^x far from it."""
    values = torch.tensor([-1e-12, -1e-6, -0.5, -0.6931, -0.6932, -1.0, -30.0])
    exact = torch.tensor(
        [math.log(1e-12), math.log(1e-6), *(math.log1p(-math.exp(x)) for x in (-0.5, -0.6931, -0.6932, -1, -30))]
    )
    torch.testing.assert_close(log_complement(values), exact, rtol=2e-6, atol=0)
    assert log_complement(torch.tensor([0.0, 1e-7])).tolist() == [-math.inf, -math.inf]  # a rounding error above log 1


def test_old_log_probs_carry_no_gradient():
    log_probs = torch.tensor([-1.0], requires_grad=True)
    old = torch.tensor([-2.0])
    assert not ecpo_old_log_probs(log_probs, old).requires_grad
    assert not gbpo_old_log_probs(log_probs, old, torch.tensor([-1.0])).requires_grad
    assert not behaviour_log_probs(log_probs, old).requires_grad


def test_exposures_of_another_pipeline_have_ratio_one():
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    old = behaviour_log_probs(log_probs, torch.tensor([-3.0, math.nan]))
    assert old.tolist() == [-3.0, -2.0]


def test_group_advantages():
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.1, 0.1, 0.1, 0.1]])
    found = group_advantages(rewards)
    expected = [(r - 2.5) / math.sqrt(1.25) for r in (1, 2, 3, 4)]
    torch.testing.assert_close(found[0], torch.tensor(expected))
    assert found[1].tolist() == [0, 0, 0, 0]
    # seven times 0.1: the float mean is not 0.1, so a test for std == 0 alone would give +-1
    seven = torch.full((1, 7), 0.1)
    assert seven.std(1, correction=0).item() != 0
    assert group_advantages(seven).tolist() == [[0] * 7]


def test_samples_without_reward_have_no_part_in_their_group():
    found = group_advantages(torch.tensor([[1.0, math.nan, 3.0], [math.nan, 5.0, math.nan], [math.nan] * 3]))
    assert found.tolist() == [[-1, 0, 1], [0, 0, 0], [0, 0, 0]]


def test_metrics_of_a_rule():
    """Three codes, ratios 0.5, 1.25 and 3, by hand; the fourth has an advantage of 0, the fifth is masked."""
    pi = torch.tensor([0.3, 0.3, 0.3, 0.3, 0.3])
    log_probs, old = pi.log(), (pi / torch.tensor([0.5, 1.25, 3.0, 3.0, 3.0])).clamp(max=0.999).log()
    mask, wanted = torch.tensor([1, 1, 1, 1, 0]), {}
    wanted["grpo"] = {"bound_fraction": 0, "clip_fraction": 2 / 3, "weight/positive": 0.0, "weight/negative": 3.0}
    wanted["ecpo"] = {"bound_fraction": 1 / 3, "clip_fraction": 2 / 3, "weight/positive": 0.0, "weight/negative": 1.3}
    wanted["gbpo"] = {"bound_fraction": 1, "weight/positive": 1.0, "weight/negative": 0.3 / 0.7}
    advantages = torch.tensor([-2.0, 0.5, -1.0, 0.0, 1.0])
    for loss_type, numbers in wanted.items():
        found = policy_loss_metrics(log_probs, old, advantages, mask, loss_type)
        assert {name: pytest.approx(value.item(), abs=1e-5) for name, value in found.items()} == numbers, loss_type
        assert policy_loss(log_probs, old, advantages, loss_type).shape == (5,)
    none = policy_loss_metrics(log_probs, old, torch.ones(5), mask, "gbpo")
    assert math.isnan(none["weight/negative"])


def test_delta_must_be_positive():
    with pytest.raises(ValueError, match="delta=0"):
        ecpo_old_log_probs(torch.zeros(1), torch.zeros(1), delta=0.0)
