"""Preference losses: TRL's own code on equal log-probabilities is the oracle; cDPO and S-DPO, which TRL lacks, by
hand.
"""

import math
import warnings
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from trl.trainer.dpo_trainer import DPOTrainer

from onerec_hf.trainers.ipa_config import IPAConfig
from onerec_hf.trainers.preference_losses import (
    cdpo_loss,
    cpo_loss,
    dpo_loss,
    ipo_loss,
    rdpo_loss,
    sdpo_loss,
    simpo_loss,
)

B, TOKENS = 5, 15
GENERATOR = torch.Generator().manual_seed(0)
# (chosen, rejected, ref_chosen, ref_rejected) of every token
PER_TOKEN = -2 * torch.rand(4, B, TOKENS, generator=GENERATOR)
SUMS = PER_TOKEN.sum(2)


def trl_dpo(loss_types, loss_weights=(1.0,), beta=0.1, label_smoothing=0.0) -> float:
    """The scalar that TRL's DPOTrainer computes from our log-probabilities, behind one BOS token."""
    log_probs = torch.cat([PER_TOKEN[0], PER_TOKEN[1]])
    outputs = MagicMock(log_probs=log_probs)
    outputs.entropy = outputs.mean_logits = torch.zeros(2 * B, TOKENS)
    outputs.is_top1 = torch.zeros(2 * B, TOKENS, dtype=torch.bool)
    trainer = MagicMock(
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=list(loss_types),
        loss_weights=list(loss_weights),
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer.accelerator.device = torch.device("cpu")
    trainer.accelerator.gather_for_metrics = lambda x: x
    mask = torch.ones(2 * B, 1 + TOKENS, dtype=torch.long)
    mask[:, 0] = 0
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    inputs |= {"ref_chosen_logps": SUMS[2], "ref_rejected_logps": SUMS[3]}
    return DPOTrainer._compute_loss(trainer, lambda **kwargs: outputs, inputs, return_outputs=False)


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_ipo_and_rdpo_equal_trl(beta):
    torch.testing.assert_close(dpo_loss(*SUMS, beta=beta).mean(), trl_dpo(["sigmoid"], beta=beta))
    torch.testing.assert_close(ipo_loss(*SUMS, num_tokens=TOKENS, tau=beta).mean(), trl_dpo(["ipo"], beta=beta))
    ours = rdpo_loss(*SUMS, beta=beta, label_smoothing=0.2).mean()
    torch.testing.assert_close(ours, trl_dpo(["robust"], beta=beta, label_smoothing=0.2))


def test_cdpo_equals_a_mixture_of_trl_losses():
    """(1 - e) L(D) + e L(-D) = 2 (1 - e) sigmoid - (1 - 2e) robust."""
    e = 0.1
    mixture = trl_dpo(["sigmoid", "robust"], [2 * (1 - e), -(1 - 2 * e)], beta=0.5, label_smoothing=e)
    torch.testing.assert_close(cdpo_loss(*SUMS, beta=0.5, label_smoothing=e).mean(), mixture)


def trl_cpo(chosen, rejected, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "experimental"
        from trl.experimental.cpo import CPOTrainer
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    trainer = SimpleNamespace(alpha=0.0, label_smoothing=0.0, accelerator=accelerator, **settings)
    return CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]


def test_cpo_and_simpo_equal_trl():
    chosen, rejected = SUMS[:2]
    ours = cpo_loss(chosen, rejected, TOKENS, beta=0.3, alpha=0.0)
    torch.testing.assert_close(ours, trl_cpo(chosen, rejected, loss_type="sigmoid", beta=0.3))
    # alpha weighs the winner's mean cross-entropy per token, over the batch TRL's `nll_loss`
    nll = -PER_TOKEN[0].mean()
    torch.testing.assert_close(cpo_loss(chosen, rejected, TOKENS, beta=0.3, alpha=2.0).mean(), ours.mean() + 2.0 * nll)
    expected = trl_cpo(chosen / TOKENS, rejected / TOKENS, loss_type="simpo", beta=2.5, simpo_gamma=1.375)
    torch.testing.assert_close(simpo_loss(chosen, rejected, TOKENS), expected)


def test_by_hand():
    """log-ratios: winner +1, loser -1, so D = 2."""
    one = torch.tensor([-3.0]), torch.tensor([-6.0]), torch.tensor([-4.0]), torch.tensor([-5.0])
    right, wrong = math.log1p(math.exp(-1)), math.log1p(math.exp(1))  # L(D) = 0.313262, L(-D) = 1.313262
    assert dpo_loss(*one, beta=0.5).item() == pytest.approx(right)
    assert cdpo_loss(*one, beta=0.5, label_smoothing=0.25).item() == pytest.approx(0.75 * right + 0.25 * wrong)
    assert 0.75 * right + 0.25 * wrong == pytest.approx(0.563262, abs=1e-6)
    assert ipo_loss(*one, num_tokens=1, tau=0.5).item() == pytest.approx(1.0)  # (2 - 1)^2


def test_sdpo_by_hand():
    """Winner's log-ratio 1; losers' -1, 0 and 1: sum_l exp(l - w) = e^-2 + e^-1 + 1, loss = log(1 + that)."""
    chosen, ref_chosen = torch.tensor([-3.0]), torch.tensor([-4.0])
    rejected = torch.tensor([[-6.0, -5.0, -4.0]])
    ref_rejected = torch.full((1, 3), -5.0)
    expected = math.log(1 + math.exp(-2) + math.exp(-1) + 1)
    assert sdpo_loss(chosen, rejected, ref_chosen, ref_rejected).item() == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(0.917576, abs=1e-6)
    for beta in (0.1, 1.0):
        single = sdpo_loss(SUMS[0], SUMS[1][:, None], SUMS[2], SUMS[3][:, None], beta=beta)
        torch.testing.assert_close(single, dpo_loss(*SUMS, beta=beta))


def test_extreme_margins_stay_finite():
    far = torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4]), torch.zeros(2), torch.zeros(2)
    far = [x.clone().requires_grad_() for x in far]
    rejected = [far[1][:, None].expand(-1, 3), far[3][:, None].expand(-1, 3)]
    losses = [
        dpo_loss(*far),
        cdpo_loss(*far),
        rdpo_loss(*far),
        sdpo_loss(far[0], rejected[0], far[2], rejected[1]),
        simpo_loss(far[0], far[1], 15),
        cpo_loss(far[0], far[1], 15),
    ]
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss.sum(), far[0])
        assert loss.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("loss", [cdpo_loss, rdpo_loss])
def test_smoothing_of_a_half_says_nothing(loss):
    with pytest.raises(ValueError, match=r"label_smoothing=0\.5"):
        loss(*SUMS, label_smoothing=0.5)


def test_forms_of_the_papers_do_not_divide_by_tokens():
    """IPO, eq. 17: (2 - 1)^2; CPO: log(1 + e^-(.5 * 3)) + 2 * 3. Per token of three: (2/3 - 1)^2 and 2 * 1."""
    one = torch.tensor([-3.0]), torch.tensor([-6.0]), torch.tensor([-4.0]), torch.tensor([-5.0])
    prefer = math.log1p(math.exp(-1.5))
    for normalized, ipo, nll in ((False, 1.0, 6.0), (True, 1 / 9, 2.0)):
        loss = ipo_loss(*one, num_tokens=3, tau=0.5, length_normalized=normalized)
        assert loss.item() == pytest.approx(ipo, rel=1e-5)
        loss = cpo_loss(*one[:2], num_tokens=3, beta=0.5, alpha=2.0, length_normalized=normalized)
        assert loss.item() == pytest.approx(prefer + nll, rel=1e-5)


def test_the_config_passes_the_form_on():
    for kind, loss in (("ipo", ipo_loss), ("cpo", cpo_loss)):
        config = IPAConfig(output_dir="unused", loss_type=kind, length_normalized=False, use_cpu=True)
        found = config.preference_loss(SUMS[0], SUMS[1][:, None], SUMS[2], SUMS[3][:, None], TOKENS)
        sums = SUMS if kind == "ipo" else SUMS[:2]
        torch.testing.assert_close(found, loss(*sums, num_tokens=TOKENS, length_normalized=False))
    with pytest.raises(ValueError, match="length_normalized"):
        IPAConfig(output_dir="unused", length_normalized=False, use_cpu=True)
