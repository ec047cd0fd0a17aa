"""Loss-free balancing of experts during training (DeepSeek-V3, arXiv:2412.19437; OneRec-V2, section 2.2.3)."""

from typing import Any

from transformers import TrainerCallback

from ..models import balance_experts


class ExpertBalanceCallback(TrainerCallback):
    r"""
    Updates the router biases after every optimizer step, and keeps the loads for the log.

    Works under gradient accumulation and DDP: the loads of all micro-batches and of all processes count. Under PEFT the biases stay
    as they are, because an adapter file does not hold them.

    Args:
        rate (`float`): gamma; the model's `config.router_bias_update_rate`.
    """

    def __init__(self, rate: float):
        self.rate = rate
        self.since_last_log: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs) -> None:
        rate = 0.0 if hasattr(model, "peft_config") else self.rate
        if violations := balance_experts(model, rate):
            self.since_last_log.append(violations)

    def logs(self) -> dict[str, float]:
        """Mean over the steps since the last call of the largest load over the mean load: the worst block's, and every block's."""
        steps, self.since_last_log = self.since_last_log, []
        if not steps:
            return {}
        blocks = {name.removeprefix("module."): sum(s[name] for s in steps) / len(steps) for name in steps[0]}
        return {"expert_load_max": max(blocks.values())} | {f"expert_load/{name}": v for name, v in blocks.items()}


__all__ = ["ExpertBalanceCallback"]
