"""Cross-entropy of a full softmax over the catalogue, a few rows at a time so that the logits never leave the cache.

Plain `cross_entropy(hidden @ weight.T)` writes and reads the (M, N) logits from memory several times, which takes most
of the training time of a small sequential recommender on a CPU. The gradient of the logits is known in closed form,
`softmax(logits) - onehot(target)`, so forward computes it in the same pass (as Liger Kernel does, arXiv:2410.10989).
Measured on one CPU thread with M = 1,024, N = 12,101, D = 64: 112 ms against 295 ms, forward and backward.

Shapes: **M** positions that have a target, **N** items, **D** width.
"""

from typing import Any

import torch


class FullSoftmaxLoss(torch.autograd.Function):
    """`FullSoftmaxLoss.apply(hidden, weight, targets)`: sum over positions of -log softmax(hidden @ weight.T)[target].

    Args:
        hidden (`torch.Tensor` of shape `(M, D)`, float32): one vector per position.
        weight (`torch.Tensor` of shape `(N, D)`, float32): one vector per item.
        targets (`torch.LongTensor` of shape `(M,)`): item indices.

    Returns:
        `torch.Tensor`: a scalar in nats, the same as `cross_entropy(hidden @ weight.T, targets, reduction="sum")`.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows = max(1, 2**20 // len(weight))  # 4 MiB of logits
        loss = hidden.new_zeros(())
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), rows):
            h, target = hidden[start : start + rows], targets[start : start + rows]
            logits = h @ weight.T
            target_logits = logits.gather(1, target[:, None])
            maximum = logits.amax(1, keepdim=True)
            exp = logits.sub_(maximum).exp_()  # in place: (rows, N) is the only large tensor
            total = exp.sum(1, keepdim=True)
            loss += (total.log() + maximum - target_logits).sum()
            hidden_grad[start : start + rows] = exp @ weight / total - weight[target]
            weight_grad.addmm_(exp.T, h / total)
        weight_grad.index_add_(0, targets, hidden, alpha=-1)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * grad, weight_grad * grad, None
