"""Iterative Preference Alignment (OneRec, Algorithm 2, arXiv:2502.18965): next-item training plus preferences among
own beams.

TRL's `DPOTrainer` gives the trainer its arguments, PEFT, metrics and reference. Algorithm 2 needs what it has not:
every sample has the next-item loss and 1% have a preference besides, the pairs come from the model itself, and
probabilities are normalised within a level. So rows keep their shape, and the loss is ours; the tests compare it with
TRL's own code.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback
from trl import DPOTrainer
from trl.models import unwrap_model_for_generation

from ..rewards.functions import RewardFunction
from ..rewards.spelled import check_columns
from .given import complete
from .ipa_config import IPAConfig
from .next_item import NextItemTrainer, under_fsdp
from .pair_files import PairFiles
from .pair_mining import (
    add_reference,
    check_pairs,
    completion_log_probs,
    context_inputs,
    mine_pairs,
    mining_logs,
    seeded,
)
from .seed_divergence import draw_samples, seed_log_ratios

ROW = "ipa_row"  # column that tells a batch which rows it holds


class IPATrainer(NextItemTrainer, DPOTrainer):
    r"""
    Algorithm 2. At the start of every epoch the current model M_t, buffers such as router biases included, generates
    candidates for a share of the rows, the reward picks the best and the worst, and their log-probabilities under M_t
    are stored: they are the reference, so no second model is kept. Then the loss of a batch is its next-item loss plus
    lambda times the sum of its pairs' preference losses over its number of rows: the mean over samples of Algorithm 2.

    Pairs lie in `output_dir/pairs/iteration_000`, ... as `datasets` sets (see [`mine_pairs`]), each complete or
    absent. A run that resumes inside an iteration goes on with its pairs; one that resumes between iterations mines
    anew, from the same weights. What draws random numbers while mining, such as a reward of yours, draws the same ones
    again.

    Under PEFT (LoRA) the base is frozen and the reference is M_t all the same: in the first iteration the model
    without adapter.

    Logged per iteration: `ipa/reward_chosen`, `ipa/reward_rejected`, `ipa/reward_candidates` (the reward function's,
    means over users and, of the last, over candidates), `ipa/tied` and `ipa/few` (shares of users without a pair
    because of equal rewards, or of too few candidates), `ipa/hit_rate` (a candidate holds a true next item) and, also
    at the end, `ipa/kl_to_seed`.

    Logged with the loss, under TRL's names: `ntp_loss`, `preference_loss` (per pair), `logps/chosen`,
    `logps/rejected`, and of beta times the log-ratio to M_t: `rewards/chosen`, `rewards/rejected`, `rewards/margins`,
    `rewards/accuracies`.

    Works on any number of processes under DDP. FSDP is refused.

    Args:
        model: A OneRec model with a catalogue, a PEFT model around one, or the folder or repository of either.
        args ([`IPAConfig`], *optional*), data_collator (`Callable`, *optional*): As in SFT.
        train_dataset (`datasets.Dataset`): As in SFT.
        reward (`RewardFunction`, *optional*): See [`mine_pairs`]; for a reward model: `reward_of_model`.
        pairs (`datasets.Dataset`, *optional*): Given pairs instead of `reward`, such as logged ones: `row` (of
            `train_dataset`), `chosen` (m * L token ids), `rejected` (n * m * L). They serve every epoch: plain DPO.
            [`load_pairs`] reads those of another run and compares its items and rows with this one's.
        ref_model (*optional*): With `pairs`, the model whose log-probabilities are the reference; by default the
            policy before its first step, as in TRL. It is asked once and then let go. Refused with `reward`, where it
            is M_t.
        kwargs: As [`OneRecSFTTrainer`]'s, `peft_config` included.
    """

    args: IPAConfig
    _tag_names = ["onerec", "dpo"]
    _card_method = (
        "Iterative Preference Alignment (OneRec, Algorithm 2): the next-item loss, plus a preference loss between the "
        "best and the worst of the model's own beams by a reward, against the model that generated them."
    )
    _card_settings = ("loss_type", "beta", "dpo_ratio", "num_candidates", "num_rejected", "preference_weight")
    _card_papers = ("onerec", "dpo")

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Callable | None = None,
        train_dataset: datasets.Dataset | None = None,
        *,
        processing_class: Any = None,
        reward: RewardFunction | None = None,
        pairs: datasets.Dataset | None = None,
        ref_model: Any = None,
        **kwargs,
    ):
        if (reward is None) == (pairs is None):
            raise ValueError(
                "give exactly one of reward (pairs are mined) and pairs (they are given), and not "
                + ("neither." if reward is None else "both.")
            )
        if reward is not None and ref_model is not None:
            raise ValueError(
                "ref_model with reward: in Algorithm 2 the reference is the model that generated an iteration's "
                "pairs. Leave it out, or give pairs."
            )
        if not isinstance(train_dataset, datasets.Dataset):
            raise TypeError(
                f"train_dataset is a {type(train_dataset).__name__}: pairs need rows that can be looked up."
            )
        model, args, data_collator, processing_class = complete(
            IPAConfig, "IPA", model, args, data_collator, processing_class, kwargs.pop("quantization_config", None)
        )
        if under_fsdp(args):
            raise ValueError(
                "IPATrainer does not work under FSDP: pairs are generated and scored with whole weights, and a "
                "process that has no pair in a batch runs one forward pass less, for which sharded weights would wait "
                "forever. Train data-parallel (no fsdp, `accelerate launch --multi_gpu`), or an adapter (peft_config)."
            )
        self.reward, self.given_pairs, self.collator = reward, pairs, data_collator
        self.rows = train_dataset
        check_columns(train_dataset.column_names if reward is not None else ())
        super().__init__(
            model,
            args,
            ref_model=ref_model,
            processing_class=processing_class,
            data_collator=partial(_with_rows, data_collator),
            train_dataset=train_dataset.add_column(ROW, list(range(len(train_dataset)))),
            **kwargs,
        )
        self.policy._require_catalogue()
        if pairs is not None:
            check_pairs(pairs, len(train_dataset), self.policy, args.num_rejected)
        wrapped: Any = self.model
        if "ref" in getattr(wrapped, "peft_config", {}):
            wrapped.delete_adapter("ref")  # TRL's copy of an adapter that came with the model: the reference is stored
        self.add_callback(_IterationCallback(self))
        self.files = PairFiles(self)
        self._pairs: dict[str, torch.Tensor] = {}
        self._num_rows = torch.tensor(1)
        self._seed_samples: list[dict] | None = None

    # ---- Algorithm 2
    #
    # for t = 1, ..., T:                                                    an epoch; its start is `begin_iteration`
    #     for r_DPO of the samples:                                         `_mine`
    #         generate N candidates with M_t by beam search; reward them; the best is S_w, the worst S_l
    #     for each sample: L = L_NTP + lambda L_DPO(S_w, S_l; M_t) where it has a pair, else L_NTP; a step of M_{t+1}
    #                                                                       `compute_loss`, `_preference`

    def begin_iteration(self) -> None:
        """Pairs of the iteration that starts, or, after a resume, of the one that goes on; logs what was found."""
        epoch = self.state.epoch or 0.0
        iteration, inside = int(epoch), epoch > int(epoch)
        if inside or (self.reward is None and iteration):
            self._use(self.files.read_pairs(iteration))
            return
        with seeded(self.args.seed + iteration):
            found, logs = self._mine(iteration) if self.reward is not None else (self._with_reference(), {})
        if not found:
            raise ValueError(
                f"iteration {iteration}: none of the users drawn has a pair ({logs['ipa/tied']:.0%} have equal "
                f"rewards for all candidates, {logs['ipa/few']:.0%} too few candidates). Check the reward, or raise "
                "num_candidates or dpo_ratio."
            )
        self.files.write_pairs(iteration, found, logs)
        self._use(datasets.Dataset.from_list(found))
        self.log(logs | self._kl_to_seed())

    def _mine(self, iteration: int) -> tuple[list[dict], dict[str, float]]:
        """Pairs of all processes, by row, and what is logged; every user is mined by one process."""
        args = self.args
        drawn = self._draw_rows(max(1, round(args.dpo_ratio * len(self.rows))), iteration)
        own = drawn[args.process_index :: args.world_size]
        candidates = (args.num_candidates, args.num_rejected, args.mining_batch_size)
        with self._generating() as policy:
            users = [self.rows[i] for i in own]
            pairs, sums = mine_pairs(policy, users, own, self.collator, self.reward, *candidates)
        pairs = sorted(gather_object(pairs), key=lambda pair: pair["row"])
        return pairs, mining_logs(pairs, gather_object([sums]))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The next-item loss; in training, plus lambda times the preference losses of the batch's pairs over its
        rows.
        """
        rows = inputs.pop(ROW, None)
        result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if rows is None or not model.training:
            return result
        loss, outputs = result if return_outputs else (result, None)
        own = self.loss_items(inputs).to(loss.device)
        whole, num_rows = own, torch.tensor(len(rows))
        if num_items_in_batch is not None:  # of the whole step; DDP averages over the processes, hence the shares
            whole, num_rows = num_items_in_batch / self.gradient_shares, self._num_rows / self.gradient_shares
        self.record({"ntp_loss": loss.detach().double() * whole / own.clamp(min=1)}, own)
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
        chosen, rejected, num_tokens = log_probs[:, 0], log_probs[:, 1:], token_ids[0, 0].numel()
        found = self.args.preference_loss(chosen, rejected, reference[:, 0], reference[:, 1:], num_tokens)
        rewards = self.args.beta * (log_probs.detach() - reference)
        margins = rewards[:, :1] - rewards[:, 1:]
        sides = {"logps/chosen": chosen, "rewards/chosen": rewards[:, 0], "preference_loss": found}
        self.record({name: values.double().mean() for name, values in sides.items()}, len(found))
        sides = {"logps/rejected": rejected, "rewards/rejected": rewards[:, 1:], "rewards/margins": margins}
        sides["rewards/accuracies"] = (margins > 0).float()
        self.record({name: values.double().mean() for name, values in sides.items()}, margins.numel())
        return found

    # ---- what it takes

    def _use(self, pairs: datasets.Dataset) -> None:
        """The pairs as tensors, and which of them each row has."""
        self.ref_model = None  # its log-probabilities are among the pairs
        columns, device = pairs.with_format("torch"), self.args.device
        shape = (len(pairs), -1, self.policy.num_session_items, self.policy.config.num_levels)
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

    def _draw_rows(self, count: int, stream: int) -> list[int]:
        """`count` different rows, a function of the seed and `stream`, the same in all processes."""
        # not torch's generator: from the same seed, the rows drawn would be those that an epoch of it begins with
        generator = np.random.default_rng([self.args.seed, 1 + stream])
        return sorted(generator.choice(len(self.rows), count, replace=False).tolist())

    @contextmanager
    def _generating(self) -> Iterator[Any]:
        """The policy, adapters inside, in evaluation mode."""
        with unwrap_model_for_generation(self.model_wrapped, self.accelerator), self.accelerator.autocast():
            policy = self.policy
            training = policy.training
            policy.eval()
            try:
                yield policy
            finally:
                policy.train(training)

    def _with_reference(self) -> list[dict]:
        """The given pairs with the log-probabilities of `ref_model`, or of the policy where there is none."""
        with self._generating() as policy:
            reference = policy if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model).eval()
            return add_reference(reference, self.given_pairs, self.rows, self.collator, self.args.mining_batch_size)

    def _kl_to_seed(self) -> dict[str, float]:
        args = self.args
        if not args.kl_users:
            return {}
        mine = slice(args.process_index, None, args.world_size)
        with self._generating() as policy:
            if self._seed_samples is None and self.state.global_step:
                self._seed_samples = self.files.read_seed_samples()
            elif self._seed_samples is None:
                drawn = self._draw_rows(min(args.kl_users, len(self.rows)), stream=-1)
                generator = torch.Generator(args.device).manual_seed(args.seed)
                # all by every process: shares of them would be other samples for every number of processes
                self._seed_samples = draw_samples(
                    policy, self.rows, drawn, self.collator, generator, args.mining_batch_size
                )
                self.files.write_seed_samples(self._seed_samples)
            samples = self._seed_samples[mine]
            ratios = seed_log_ratios(policy, self.rows, samples, self.collator, args.mining_batch_size)
        return {"ipa/kl_to_seed": sum(gather_object([ratios.sum().item()])) / len(self._seed_samples)}

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As [`OneRecSFTTrainer`]'s; also counts the rows of the step, over which the preference loss is a mean."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            self._num_rows = self.of_all_processes(torch.tensor(sum(len(batch[ROW]) for batch in batches)), device)
        return batches, num_items

    # TRL would make text of the rows, and ask a reference about each of them before training

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def _precompute_ref_logps(self, dataset, *args, **kwargs):
        return dataset


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
