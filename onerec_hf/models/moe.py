"""Feed-forwards: dense, and the sparse mixture of experts with router, SwiGLU experts, shared experts, loss-free
balancing.

OneRec eq. 2 (arXiv:2502.18965); OneRec Technical Report, section 2.3 (arXiv:2506.13695); OneRec-V2, section 2.2.2
(arXiv:2508.20900). Balancing: DeepSeek-V3, section 2.1.2 (arXiv:2412.19437). Legend: S tokens, D width, E experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations import use_experts_implementation


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), or, without a gate, down(silu(up(x)))."""

    def __init__(self, hidden_size: int, intermediate_size: int, gated: bool):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False) if gated else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(hidden_states)
        return self.down_proj(F.silu(up) if self.gate_proj is None else F.silu(self.gate_proj(hidden_states)) * up)


class Router(nn.Module):
    """
    Chooses `num_experts_per_tok` experts for every token.

    The bias, which balances the load, helps to choose and does not weigh. It is saved with the model and stays
    float32.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.top_k, self.normalize, self.scoring = (
            config.num_experts_per_tok,
            config.normalize_gates,
            config.router_scoring,
        )
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts))
        self.e_score_correction_bias: torch.Tensor
        # tokens per expert since the last update; no buffer, which DDP would overwrite with those of the first process
        self.load: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, real: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """(S, D) -> logits (S, E), gates (S, top_k), experts (S, top_k). Tokens that are not `real` (S,) are not
        counted.
        """
        logits = F.linear(hidden_states.float(), self.weight.float())
        scores = logits.softmax(-1) if self.scoring == "softmax" else logits.sigmoid()
        experts = torch.topk(scores + self.e_score_correction_bias, self.top_k, dim=-1, sorted=False).indices
        gates = scores.gather(1, experts)
        if self.normalize:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        if self.training and torch.is_grad_enabled():
            self._count(experts, real)
        return logits, gates.to(hidden_states.dtype), experts

    @torch.no_grad()
    def _count(self, experts, real):
        # With non-reentrant checkpointing the recomputation counts every token again: the shares, which are all that
        # is used, stay.
        if self.load is None or self.load.device != experts.device:
            self.load = torch.zeros(len(self.weight), device=experts.device)
        ones = torch.ones_like(experts, dtype=torch.float32)
        counted = ones if real is None else ones * real.unsqueeze(1)
        self.load.scatter_add_(0, experts.flatten(), counted.flatten())


@use_experts_implementation
class Experts(nn.Module):
    """SwiGLU experts as two stacks of matrices; `config._experts_implementation` can replace the loop by grouped
    products.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.num_experts = config.num_experts
        width = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, config.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, width))
        self.act_fn = nn.SiLU()

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """sum over the chosen experts of gate * expert(x), (S, D) -> (S, D), as a plain loop over experts."""
        result = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, place = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            output = F.linear(self.act_fn(gate) * up, self.down_proj[expert]) * top_k_weights[token, place, None]
            result.index_add_(0, token, output.to(result.dtype))
        return result


class SparseMoE(nn.Module):
    """Routed experts, plus the shared ones that see every token."""

    def __init__(self, config: Any):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        width = config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = FeedForward(config.hidden_size, width, gated=True) if width else None

    def forward(self, hidden_states: torch.Tensor, real: torch.Tensor | None = None) -> torch.Tensor:
        flat = hidden_states.flatten(0, -2)  # (S, D)
        _, gates, experts = self.gate(flat, None if real is None else real.flatten())
        output = self.experts(flat, experts, gates).view_as(hidden_states)
        return output if self.shared_experts is None else output + self.shared_experts(hidden_states)


@torch.no_grad()
def balance_experts(model: nn.Module, rate: float) -> dict[str, float]:
    """
    One step of loss-free balancing: experts above the mean load get a smaller bias, those below it a larger one, by
    `rate`.

    Call it once per optimizer step. Loads are summed over the processes of the default group where one is initialised,
    so every process makes the same update; they start again at zero.

    Args:
        model: Any module that contains mixtures of experts.
        rate (`float`): gamma; 0 leaves the biases alone and only reports.

    Returns:
        Per mixture block, by module name: the largest load over the mean load (1 is perfect balance). Blocks that no
        token has passed since the last call are left out.
    """
    routers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Router) and module.load is not None
    }
    if not routers:
        return {}
    loads = torch.stack([router.load for router in routers.values()])  # (blocks, E)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(loads)
    mean = loads.mean(1, keepdim=True)
    for router, load, average in zip(routers.values(), loads, mean):
        router.e_score_correction_bias += rate * torch.sign(average - load)
        router.load = None
    violation = (loads.amax(1) / mean[:, 0]).tolist()
    return dict(zip((name.removesuffix(".gate") for name in routers), violation))


__all__ = ["Experts", "FeedForward", "Router", "SparseMoE", "balance_experts"]
