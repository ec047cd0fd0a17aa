"""Mixture of experts: the router's rules on literal numbers, experts against a plain loop, loss-free balancing."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from onerec_hf import balance_experts
from onerec_hf.models.moe import Experts, Router, SparseMoE

from ..numeric import assert_close
from ..processes import run_processes
from ..tiny import tiny_catalogue, tiny_context, tiny_model


def moe_config(**overrides):
    config = {
        "hidden_size": 6,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "num_shared_experts": 0,
        "moe_intermediate_size": 4,
    }
    config |= {"router_scoring": "softmax", "normalize_gates": False, "_experts_implementation": "eager"}
    return SimpleNamespace(**config | overrides)


def router_of(weight, **overrides):
    router = Router(moe_config(hidden_size=1, num_experts=len(weight), **overrides))
    with torch.no_grad():
        router.weight.copy_(torch.tensor(weight).unsqueeze(1))
    return router


def test_softmax_gates_are_not_renormalised():
    """OneRec eq. 2: g = softmax over all experts, kept for the top two."""
    _, gates, experts = router_of([0.0, 1.0, 2.0])(torch.ones(1, 1))
    probabilities = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    assert dict(zip(experts[0].tolist(), gates[0].tolist())) == pytest.approx(
        {2: probabilities[2].item(), 1: probabilities[1].item()}
    )


def test_sigmoid_gates_sum_to_one_and_the_bias_only_chooses():
    router = router_of([0.0, 1.0, 2.0], router_scoring="sigmoid", normalize_gates=True)
    router.e_score_correction_bias.copy_(torch.tensor([9.0, 0.0, 0.0]))
    _, gates, experts = router(torch.ones(1, 1))
    first, third = torch.sigmoid(torch.tensor([0.0, 2.0])).tolist()
    assert dict(zip(experts[0].tolist(), gates[0].tolist())) == pytest.approx(
        {0: first / (first + third), 2: third / (first + third)}
    )


def plain_moe(moe, hidden_states):
    """Every token through every one of its experts, one at a time."""
    _, gates, experts = moe.gate(hidden_states)
    rows = []
    for state, own_gates, own_experts in zip(hidden_states, gates, experts):
        row = torch.zeros_like(state)
        for gate, expert in zip(own_gates, own_experts):
            g, up = (moe.experts.gate_up_proj[expert] @ state).chunk(2)
            row = row + gate * (moe.experts.down_proj[expert] @ (torch.nn.functional.silu(g) * up))
        rows.append(row if moe.shared_experts is None else row + moe.shared_experts(state))
    return torch.stack(rows)


@pytest.mark.parametrize("architecture", ["onerec", "v1", "v2_moe"])
def test_padding_does_not_count(architecture):
    """Three users with two targets, one and one: the decoder's tokens are BOS and the codes but the last."""
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, architecture=architecture).train()
    context = tiny_context(catalogue, model)
    items = torch.tensor([[1, 2], [3, 0], [4, 0]])
    targets = catalogue.semantic_ids[items].long() + torch.tensor(model.config.level_offsets)
    targets[1:, 1] = model.config.pad_token_id
    model(target_ids=targets, **context).loss.backward()
    tokens = 7 + 4 + 4 if architecture == "onerec" else 4 * 3  # inside a session the last code is a token, too
    load = model.model.decoder.layers[-1].mlp.gate.load
    assert load.sum() == model.config.num_experts_per_tok * tokens
    if architecture == "v1":  # encoder_moe: the queries and the static slot are there for everyone
        seen = model.encode_context(**context).mask.sum()
        assert (
            model.model.context_processor.layers[-1].mlp.gate.load.sum() == 2 * model.config.num_experts_per_tok * seen
        )


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_equal_a_plain_loop(implementation, shared):
    torch.manual_seed(0)
    # grouped_mm wants rows of 16 bytes
    moe = SparseMoE(moe_config(hidden_size=8, _experts_implementation=implementation, num_shared_experts=shared))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    states = torch.randn(7, 8, requires_grad=True)
    expected = plain_moe(moe, states)
    found = moe(states.view(1, 7, 8)).view(7, 8)
    assert_close(found, expected)
    weight = torch.randn(7, 8)
    ours = torch.autograd.grad((found * weight).sum(), [states, *moe.parameters()], retain_graph=True)
    plain = torch.autograd.grad((expected * weight).sum(), [states, *moe.parameters()])
    for one, other in zip(ours, plain):
        assert_close(one, other)


def test_an_expert_without_tokens():
    experts = Experts(moe_config())
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    index = torch.zeros(3, 2, dtype=torch.long)
    assert experts(torch.randn(3, 6), index, torch.zeros(3, 2)).abs().sum() == 0


def test_one_step_of_balancing():
    router = router_of([0.0, 1.0, 2.0, 3.0])  # 8 tokens all go to experts 3 and 2
    router.train()
    router(torch.ones(8, 1))
    report = balance_experts(torch.nn.ModuleDict({"gate": router}), rate=0.01)
    assert router.e_score_correction_bias.tolist() == pytest.approx([0.01, 0.01, -0.01, -0.01])
    assert report == {"gate": 2.0}  # 8 tokens on a mean of 4
    assert balance_experts(torch.nn.ModuleDict({"gate": router}), rate=0.01) == {}  # counted once


def test_balancing_evens_out_the_load():
    torch.manual_seed(0)
    router = router_of([0.0] * 4, router_scoring="sigmoid")
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[0.1], [0.2], [0.3], [0.4]]))
    tokens, first, last = torch.rand(256, 1) + 0.5, None, None
    for _ in range(200):
        router.train()(tokens)
        last = balance_experts(torch.nn.ModuleDict({"gate": router}), rate=0.002)["gate"]
        first = first or last
    assert first == 2.0 and last < 1.3


def test_no_counting_without_training():
    router = router_of([0.0, 1.0, 2.0])
    router.eval()(torch.ones(4, 1))
    with torch.no_grad():
        router.train()(torch.ones(4, 1))  # generation inside a training loop
    assert router.load is None


def loaded(checkpointing=None, accumulate=1):
    """Biases after one step of the tiny MoE model."""
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, architecture="v2_moe").train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    context = tiny_context(catalogue, model, batch=4)
    targets = (catalogue.semantic_ids[:4] + torch.tensor(model.config.level_offsets)).view(4, 1, 3)
    for part in torch.arange(4).chunk(accumulate):
        model(target_ids=targets[part], **{name: tensor[part] for name, tensor in context.items()}).loss.backward()
    report = balance_experts(model, 0.5)
    return torch.stack([layer.mlp.gate.e_score_correction_bias for layer in model.model.decoder.layers[2:]]), report


def test_checkpointing_and_accumulation_count_the_same():
    expected, report = loaded()
    assert expected.abs().sum() > 0 and set(report) == {"model.decoder.layers.2.mlp", "model.decoder.layers.3.mlp"}
    for other, other_report in (loaded(checkpointing=False), loaded(checkpointing=True), loaded(accumulate=2)):
        assert torch.equal(other, expected) and other_report == pytest.approx(report)


def _train_on_one_rank(rank, path):
    torch.distributed.init_process_group("gloo")
    catalogue = tiny_catalogue()
    model = DistributedDataParallel(tiny_model(catalogue, architecture="v2_moe").train())
    own = model.module
    context = tiny_context(catalogue, own, batch=4)
    targets = (catalogue.semantic_ids[:4] + torch.tensor(own.config.level_offsets)).view(4, 1, 3)
    part = slice(2 * rank, 2 * rank + 2)
    model(target_ids=targets[part], **{name: tensor[part] for name, tensor in context.items()}).loss.backward()
    balance_experts(model, 0.5)
    bias = torch.stack([layer.mlp.gate.e_score_correction_bias for layer in own.model.decoder.layers[2:]])
    torch.save(bias, f"{path}/{rank}.pt")


def test_two_processes_count_together(tmp_path):
    run_processes(_train_on_one_rank, str(tmp_path))
    expected, _ = loaded()
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), expected)


def test_a_copy_keeps_its_own_bias():
    """IPA and RL copy the policy as reference; a parameter sync must not forget the buffer."""
    router = router_of([0.0, 1.0, 2.0])
    router.e_score_correction_bias += 1
    assert torch.equal(copy.deepcopy(router).e_score_correction_bias, torch.ones(3))
