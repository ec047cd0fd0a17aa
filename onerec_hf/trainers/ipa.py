"""Iterative Preference Alignment (OneRec, Algorithm 2, arXiv:2502.18965): next-item training plus preferences among own beams.

Built on [`OneRecSFTTrainer`], i.e. `transformers.Trainer`, not on TRL's `DPOTrainer`, because of Algorithm 2 itself: every sample
has the next-item loss and 1% have a preference besides, whereas a `DPOTrainer` trains on pairs alone. Its loss would have to be
replaced as a whole (the softmax over the whole vocabulary, chosen and rejected in two halves that encode every context twice, four
of Table 1's seven losses missing), and a dozen of its options would then do nothing. What is TRL's: the names of options and
metrics, the unwrapping for generation, the losses' definitions, which the tests compare with TRL's own code.
"""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftConfig, get_peft_model
from transformers import TrainerCallback
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import disable_dropout_in_model

from ..rewards.functions import RewardFunction
from .ipa_config import IPAConfig
from .pair_files import load_rows, save_rows
from .pair_mining import add_reference, check_pairs, completion_log_probs, context_inputs, mine_pairs, seeded
from .seed_divergence import draw_samples, seed_log_ratios
from .sft import OneRecSFTTrainer

ROW = "ipa_row"  # column that tells a batch which rows it holds
METRICS = ["ntp_loss", "preference_loss", "logps/chosen", "logps/rejected"]
METRICS += ["rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]


class IPATrainer(OneRecSFTTrainer):
    r"""
    Algorithm 2. At the start of every epoch the current model M_t, buffers such as router biases included, generates candidates for
    a share of the rows, the reward picks the best and the worst, and their log-probabilities under M_t are stored: they are the
    reference, so no second model is kept. Then the loss of a batch is its next-item loss plus lambda times the sum of its pairs'
    preference losses over its number of rows: the mean over samples of Algorithm 2.

    Pairs lie in `output_dir/pairs/iteration_000`, ... as `datasets` sets (see [`mine_pairs`]), each complete or absent. A run that
    resumes inside an iteration goes on with its pairs; one that resumes between iterations mines anew, from the same weights. What
    draws random numbers while mining, such as a reward of yours, draws the same ones again.

    Under PEFT (LoRA) the base is frozen and the reference is M_t all the same: in the first iteration the model without adapter.

    Logged per iteration: `ipa/reward_chosen`, `ipa/reward_rejected`, `ipa/reward_candidates` (the reward function's, means over
    users and, of the last, over candidates), `ipa/tied` and `ipa/few` (shares of users without a pair because of equal rewards, or
    of too few candidates), `ipa/hit_rate` (a candidate holds a true next item) and, also at the end, `ipa/kl_to_seed`.

    Logged with the loss, under TRL's names: `ntp_loss`, `preference_loss` (per pair), `logps/chosen`, `logps/rejected`, and of
    beta times the log-ratio to M_t: `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies`.

    Works on any number of processes under DDP. FSDP is not supported.

    Args:
        model: A OneRec model with a catalogue.
        args ([`IPAConfig`]).
        data_collator (`Callable`): As in SFT.
        train_dataset (`datasets.Dataset`): As in SFT.
        reward (`RewardFunction`, *optional*): See [`mine_pairs`]; for a reward model: `reward_of_model`.
        pairs (`datasets.Dataset`, *optional*): Given pairs instead of `reward`, such as logged ones: `row` (of `train_dataset`),
            `chosen` (m * L token ids), `rejected` (n * m * L). They serve every epoch, the reference is the seed model: plain DPO.
            [`load_pairs`] reads those of another run and compares its items and rows with this one's.
        peft_config (`PeftConfig`, *optional*): Trains an adapter.
        kwargs: As [`OneRecSFTTrainer`].
    """

    args: IPAConfig
    _card_method = (
        "Iterative Preference Alignment (OneRec, Algorithm 2): the next-item loss, plus a preference loss between the best and the "
        "worst of the model's own beams by a reward, against the model that generated them."
    )
    _card_settings = ("loss_type", "beta", "dpo_ratio", "num_candidates", "num_rejected", "preference_weight")
    _card_papers = ("onerec", "dpo")

    def __init__(
        self,
        model: Any,
        args: IPAConfig,
        *,
        data_collator: Callable,
        train_dataset: datasets.Dataset,
        reward: RewardFunction | None = None,
        pairs: datasets.Dataset | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs,
    ):
        if (reward is None) == (pairs is None):
            raise ValueError(
                "give exactly one of reward (pairs are mined) and pairs (they are given), and not "
                + ("neither." if reward is None else "both.")
            )
        if not isinstance(train_dataset, datasets.Dataset):
            raise TypeError(
                f"train_dataset is a {type(train_dataset).__name__}: pairs need rows that can be looked up."
            )
        model._require_catalogue()
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        if args.disable_dropout:
            disable_dropout_in_model(model)
        self.reward, self.given_pairs, self.collator = reward, pairs, data_collator
        self.rows = train_dataset
        if pairs is not None:
            check_pairs(pairs, len(train_dataset), model, args.num_rejected)
        super().__init__(
            model,
            args,
            data_collator=partial(_with_rows, data_collator),
            train_dataset=train_dataset.add_column(ROW, list(range(len(train_dataset)))),
            **kwargs,
        )
        self._num_rows = torch.tensor(1)
        self.add_callback(_IterationCallback(self))
        self._pairs: dict[str, torch.Tensor] = {}
        self._seed_samples: list[dict] | None = None
        self._sums = torch.zeros(len(METRICS), 2, dtype=torch.float64, device=self.args.device)  # sum and count

    # ---- iterations ----------------------------------------------------------------------------------------------------

    def begin_iteration(self) -> None:
        """Pairs of the iteration that starts, or, after a resume, of the one that goes on; logs what was found."""
        epoch = self.state.epoch or 0.0
        iteration, inside = int(epoch), epoch > int(epoch)
        number = 0 if self.reward is None else iteration
        name = f"iteration_{number:03d}"
        metadata = {"iteration": number, **self._settings()}
        if inside or (self.reward is None and iteration):
            self._use(self._stored(name, metadata))
            return
        with seeded(self.args.seed + iteration):
            found, logs = self._mine(iteration) if self.reward is not None else (self._with_reference(), {})
        if not found:
            raise ValueError(
                f"iteration {iteration}: none of the users drawn has a pair ({logs['ipa/tied']:.0%} have equal rewards for all "
                f"candidates, {logs['ipa/few']:.0%} too few candidates). Check the reward, or raise num_candidates or dpo_ratio."
            )
        if self.is_world_process_zero():
            save_rows(found, self._pairs_folder / name, metadata | {"logs": logs})
        self.accelerator.wait_for_everyone()
        self._use(datasets.Dataset.from_list(found))
        self.log(logs | self._kl_to_seed())

    @property
    def _pairs_folder(self) -> Path:
        return Path(self.args.output_dir) / "pairs"

    def _stored(self, name: str, metadata: dict) -> datasets.Dataset:
        """What this run, or the one that it resumes, saved as `pairs/<name>`."""
        source = self._pairs_folder
        if self.resumed_from is not None:
            source = self.resumed_from.parent / "pairs"
        rows = load_rows(source / name, metadata)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero() and source.resolve() != self._pairs_folder.resolve():
            save_rows(list(rows), self._pairs_folder / name, metadata)  # to be there when this run is resumed
        return rows

    def _settings(self) -> dict:
        names = (
            ("dpo_ratio", "num_candidates", "num_rejected", "seed") if self.reward is not None else ("num_rejected",)
        )
        of = {"num_rows": len(self.rows), "catalogue_fingerprint": self._policy().catalogue.fingerprint()}
        return of | {name: getattr(self.args, name) for name in names}

    def _use(self, pairs: datasets.Dataset) -> None:
        """The pairs as tensors, and which of them each row has."""
        columns, device = pairs.with_format("torch"), self.args.device
        shape = (len(pairs), -1, self._policy().num_items, self._policy().config.num_levels)
        chosen, rejected = (columns[name][:].view(shape) for name in ("chosen", "rejected"))
        pair_of_row = torch.full((len(self.rows),), -1)
        pair_of_row[columns["row"][:]] = torch.arange(len(pairs))
        reference = torch.cat([columns["ref_chosen_logps"][:].unsqueeze(1), columns["ref_rejected_logps"][:]], dim=1)
        found = {
            "of_row": pair_of_row,
            "token_ids": torch.cat([chosen, rejected], dim=1),
            "reference": reference.float(),
        }
        self._pairs = {name: tensor.to(device) for name, tensor in found.items()}

    def _policy(self):
        return self.accelerator.unwrap_model(self.model)

    def _draw_rows(self, count: int, stream: int) -> list[int]:
        """`count` different rows, a function of the seed and `stream`, the same in all processes."""
        # not torch's generator: from the same seed, the rows drawn would be those that an epoch of it begins with
        generator = np.random.default_rng([self.args.seed, 1 + stream])
        return sorted(generator.choice(len(self.rows), count, replace=False).tolist())

    def _mine(self, iteration: int) -> tuple[list[dict], dict[str, float]]:
        """Pairs of all processes, by row, and what is logged; every user is mined by one process."""
        args = self.args
        drawn = self._draw_rows(max(1, round(args.dpo_ratio * len(self.rows))), iteration)
        own = drawn[args.process_index :: args.world_size]
        with self._evaluating() as policy:
            pairs, sums = mine_pairs(
                policy,
                [self.rows[i] for i in own],
                own,
                self.collator,
                self.reward,
                args.num_candidates,
                args.num_rejected,
                args.mining_batch_size,
            )
        pairs = sorted(gather_object(pairs), key=lambda pair: pair["row"])
        sums = gather_object([sums])
        total = {name: sum(part[name] for part in sums) for name in sums[0]}
        names = {"tied": "tied", "few": "few", "hits": "hit_rate"}
        logs = {f"ipa/{new}": total[name] / total["users"] for name, new in names.items()} | {"ipa/pairs": len(pairs)}
        if total["rewarded"]:
            logs["ipa/reward_candidates"] = total["reward"] / total["rewarded"]
        if pairs:
            logs["ipa/reward_chosen"] = sum(pair["chosen_reward"] for pair in pairs) / len(pairs)
            rejected = [sum(pair["rejected_reward"]) / len(pair["rejected_reward"]) for pair in pairs]
            logs["ipa/reward_rejected"] = sum(rejected) / len(pairs)
        return pairs, logs

    @contextmanager
    def _evaluating(self):
        """The bare model, in evaluation mode."""
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator) as policy, self.accelerator.autocast():
            training = policy.training
            policy.eval()
            try:
                yield policy
            finally:
                policy.train(training)

    def _with_reference(self) -> list[dict]:
        with self._evaluating() as policy:
            return add_reference(policy, self.given_pairs, self.rows, self.collator, self.args.mining_batch_size)

    def _kl_to_seed(self) -> dict[str, float]:
        args, name = self.args, "seed_samples"
        if not args.kl_users:
            return {}
        mine = slice(args.process_index, None, args.world_size)
        settings = {"kl_users": args.kl_users, "num_rows": len(self.rows), "seed": args.seed}
        with self._evaluating() as policy:
            if self._seed_samples is None and self.state.global_step:
                self._seed_samples = list(self._stored(name, settings))
            elif self._seed_samples is None:
                drawn = self._draw_rows(min(args.kl_users, len(self.rows)), stream=-1)[mine]
                generator = torch.Generator(args.device).manual_seed(args.seed + args.process_index)
                samples = draw_samples(policy, self.rows, drawn, self.collator, generator, args.mining_batch_size)
                self._seed_samples = sorted(gather_object(samples), key=lambda sample: sample["row"])
                if self.is_world_process_zero():
                    save_rows(self._seed_samples, self._pairs_folder / name, settings)
            samples = self._seed_samples[mine]
            ratios = seed_log_ratios(policy, self.rows, samples, self.collator, args.mining_batch_size)
        return {"ipa/kl_to_seed": sum(gather_object([ratios.sum().item()])) / len(self._seed_samples)}

    # ---- loss ----------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As [`OneRecSFTTrainer`]'s; also counts the rows of the step, over which the preference loss is a mean."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._num_rows = self._of_all_processes(torch.tensor(sum(len(batch[ROW]) for batch in batches)), device)
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The next-item loss; in training, plus lambda times the preference losses of the batch's pairs over its rows."""
        rows = inputs.pop(ROW, None)
        result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if rows is None or not model.training:
            return result
        loss, outputs = result if return_outputs else (result, None)
        own = self._loss_items(inputs).to(loss.device)
        whole, num_rows = own, torch.tensor(len(rows))
        if num_items_in_batch is not None:  # of the whole step; DDP averages over the processes, hence the scale
            scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            whole, num_rows = num_items_in_batch / scale, self._num_rows / scale
        self._sums[METRICS.index("ntp_loss")] += torch.stack([loss.detach().double() * whole, own.double()])
        place = self._pairs["of_row"][rows]  # (B,), -1 where there is none
        users = (place >= 0).nonzero()[:, 0]
        if len(users):
            found = self._preference(model, inputs, users, place[users])
            loss = loss + self.args.preference_weight / num_rows * found.sum()
        return (loss, outputs) if return_outputs else loss

    def _preference(self, model, inputs, users, place) -> torch.Tensor:
        """Preference losses (P,) of the pairs `place` (P,), which belong to the batch's rows `users` (P,)."""
        context = {name: value[users] for name, value in context_inputs(inputs).items()}
        token_ids, reference = self._pairs["token_ids"][place], self._pairs["reference"][place]
        log_probs = completion_log_probs(model, context, token_ids)  # (P, 1 + n)
        num_tokens = token_ids[0, 0].numel()
        found = self.args.preference_loss(
            log_probs[:, 0], log_probs[:, 1:], reference[:, 0], reference[:, 1:], num_tokens
        )
        rewards = self.args.beta * (log_probs.detach() - reference)
        margins = rewards[:, :1] - rewards[:, 1:]
        self._add("preference_loss", found)
        self._add("logps/chosen", log_probs[:, 0])
        self._add("logps/rejected", log_probs[:, 1:])
        self._add("rewards/chosen", rewards[:, 0])
        self._add("rewards/rejected", rewards[:, 1:])
        self._add("rewards/margins", margins)
        self._add("rewards/accuracies", (margins > 0).float())
        return found

    # ---- logs ----------------------------------------------------------------------------------------------------------

    def _add(self, name: str, values: torch.Tensor) -> None:
        values = values.detach().double()
        self._sums[METRICS.index(name)] += torch.stack([values.sum(), values.new_tensor(values.numel())])

    def _progress(self, folder):
        return super()._progress(folder) | {"sums": self._sums.tolist()}

    def _restore_progress(self, progress, folder):
        super()._restore_progress(progress, folder)
        self._sums.copy_(torch.tensor(progress["sums"], dtype=torch.float64))

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs:
            sums = self.accelerator.reduce(self._sums, "sum").tolist()
            logs |= {name: total / count for name, (total, count) in zip(METRICS, sums) if count}
            self._sums.zero_()
        super().log(logs, *args, **kwargs)


class _IterationCallback(TrainerCallback):
    def __init__(self, trainer: IPATrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.begin_iteration()

    def on_train_end(self, args, state, control, **kwargs):
        if args.kl_users:
            self.trainer.log(self.trainer._kl_to_seed())


def _with_rows(collator: Callable, rows: list[dict]) -> dict[str, torch.Tensor]:
    """The collator's batch and, for training rows, which rows they are."""
    batch = collator(rows)
    return batch | {ROW: torch.tensor([row[ROW] for row in rows])} if ROW in rows[0] else batch


__all__ = ["IPATrainer"]
