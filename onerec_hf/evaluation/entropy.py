"""How sure a model is of each code of the next item (OneRec, arXiv:2502.18965, reports it per level: 6.00, 3.71, 0.05
nats).
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


@torch.no_grad()
def prediction_entropy(model: Any, batch: dict[str, torch.Tensor]) -> np.ndarray:
    """
    Entropy of the predicted distribution over the codes of every level, given the true codes before it.

    Args:
        model: A OneRec model; with `score_normalization="valid"` the distribution is the one over existing children.
        batch (`dict[str, torch.Tensor]`): Of a collator, for rows with `targets`. The first target of each row counts.

    Returns:
        `np.ndarray` of shape (B, L), in nats; rows without a target are left out.
    """
    config = model.config
    context = {name: batch[name].to(model.device) for name in model.context_input_names if name in batch}
    codes = batch["target_ids"][:, 0].to(model.device)  # (B, L)
    tokens = F.pad(codes, (1, 0), value=config.bos_token_id)
    was_training = model.training
    model.eval()
    hidden = model.model(tokens[:, :-1], use_cache=False, **context).last_hidden_state  # (B, L, D)
    entropies = [torch.special.entr(p.exp()).sum(-1) for p in model.level_distributions(hidden, codes)]
    model.train(was_training)
    real = codes[:, 0] != config.pad_token_id
    return torch.stack(entropies, dim=1)[real].float().cpu().numpy()
