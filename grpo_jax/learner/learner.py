"""One step's arithmetic on the trainer's devices, and the objects that it needs.

Host batches and rewards enter, a new train state and metrics leave. In order:

1. old and reference log-probabilities, where the rewards hold a KL penalty and so need them first
   (docs/decisions/0006);
2. rewards to advantages;
3. mini-batches, packed and placed on the devices; the log-probabilities that are still missing;
4. the updates;
5. the coefficient of the KL and the reference, where they change.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax.algorithm import Algorithm
from grpo_jax.algorithm.advantages import estimate_advantages
from grpo_jax.algorithm.corrections import leaves_out
from grpo_jax.algorithm.kl import kl_of_tokens
from grpo_jax.algorithm.loss import grpo_loss, merge_updates, tokens_clipped, tokens_that_weigh
from grpo_jax.config import Config
from grpo_jax.learner import make_optimizer
from grpo_jax.learner.batching import (
    add_advantages,
    add_loss_weights,
    add_token_ages,
    keep_completions,
    make_sft_batch,
    split_minibatches,
    take_rows,
)
from grpo_jax.learner.compiling import compile_ahead
from grpo_jax.learner.forward import abstract_micro_batches, make_forward_step, score_rows, to_micro_batches
from grpo_jax.learner.offload import device_bytes
from grpo_jax.learner.optimizer import read_leaf
from grpo_jax.learner.packing import Places, micro_batch_shape, rows_of_tokens
from grpo_jax.learner.reference import Reference
from grpo_jax.learner.update import make_update_step
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.logprobs import num_words
from grpo_jax.model.lora import abstract_frozen, join, split
from grpo_jax.model.sharding import fetch, num_batch_shards
from grpo_jax.model.transformer import largest_activations
from grpo_jax.types import (
    Metrics,
    Params,
    ScoredBatch,
    StepResult,
    Timer,
    TokenUse,
    TokenValues,
    TrainBatch,
    TrainState,
)


class Learner:
    """The policy's optimizer, the jitted steps, and the reference. The train state travels beside it."""

    def __init__(
        self,
        config: Config,
        algorithm: Algorithm,
        model: ModelConfig,
        mesh: Mesh,
        *,
        num_steps: int,
        timer: Timer,
    ):
        """Args: num_steps: GRPO steps of the whole run, for the schedule of the learning rate."""
        self.model, self.mesh = model, mesh
        self.optimizer = make_optimizer(config.optim, model, mesh, num_steps * config.updates_per_step)
        self.reference = Reference(config.algorithm, model, mesh)
        self.frozen = abstract_frozen(model, mesh)
        """The parameters that are not trained, which policy and reference share; shapes until `init` or `hold`."""
        self._config, self._algorithm, self._timer = config, algorithm, timer
        self._shape = micro_batch_shape(config, config.completions_per_update, num_batch_shards(mesh))
        self._forward = make_forward_step(
            model, mesh, temperature=config.rollout.temperature, chunk_tokens=config.actor.logits_chunk_tokens
        )
        loss = functools.partial(grpo_loss, algorithm=algorithm)
        weigh = functools.partial(tokens_that_weigh, section=config.algorithm)
        clipped = functools.partial(tokens_clipped, algorithm=algorithm)
        self._clipped = jax.jit(functools.update_wrapper(clipped, tokens_clipped))
        self._update = make_update_step(
            model,
            mesh,
            self.optimizer,
            self._forward,
            loss,
            optim=config.optim,
            weigh=weigh if leaves_out(config.algorithm) else None,
        )

    def init(self, params: Params) -> TrainState:
        """A train state at step 0; the reference is a copy of it. Args: all, as `Optimizer.init_state` does."""
        frozen, trained = split(params)
        self.hold(frozen)
        state = self.optimizer.init_state(trained)
        if self._config.uses_reference:
            self.reference.copy_from(state.params)
        return state

    def hold(self, frozen: Params) -> None:
        """Takes the parameters that are not trained: arrays, or functions that read them."""
        self.frozen = jax.tree.map(read_leaf, frozen)

    def params(self, state: TrainState) -> Params:
        """The policy's parameters as the devices hold them: for engines and the reference."""
        return join(self.frozen, state.params)

    def masters(self, state: TrainState) -> Params:
        """The policy's trained parameters as the optimizer changes them, perhaps on the host: for folders."""
        return self.optimizer.masters(state)

    def score(self, params: Params, batch: TrainBatch) -> np.ndarray:
        """Log-probabilities of a host batch, [B, T] float32, on the host and 0 outside the completions."""
        return score_rows(self._forward, params, batch, self._shape, self.mesh)

    def learn(
        self, state: TrainState, batch: TrainBatch, rollouts: ScoredBatch, step: int
    ) -> tuple[TrainState, StepResult]:
        """All that is computed of the rollouts of step number `step`, counted from 0.

        Args:    batch: the rollouts as `make_train_batch` lays them out, advantages 0.
        Returns: the new train state, and what the step leaves for the reports.
        """
        batch = self.with_penalty_logprobs(batch, state)
        batch, penalty = self.with_advantages(batch, rollouts.rewards.rewards)
        batch = self.with_loss_terms(batch, rollouts)
        state, updates, use, tokens = self._run_updates(state, batch, step)
        metrics = merge_updates(updates, self._config.algorithm) | penalty
        metrics |= self.move_reference(state.params, metrics, step + 1)
        return state, StepResult(rollouts, use, updates, metrics, tokens)

    def with_penalty_logprobs(self, batch: TrainBatch, state: TrainState) -> TrainBatch:
        """Adds the old and the reference log-probabilities where the rewards hold a KL penalty."""
        if self._config.algorithm.kl_in != "reward":
            return batch
        old: Any = batch.sampler_logprobs
        if self._config.needs_old_logprobs:
            with self._timer("old_log_prob"):
                old = self.score(self._computed(state.params), batch)
        with self._timer("ref"):
            ref: Any = self.score(join(self.frozen, self.reference.on_device()), batch)
        return dataclasses.replace(batch, old_logprobs=old, ref_logprobs=ref)

    def with_advantages(self, batch: TrainBatch, rewards: np.ndarray) -> tuple[TrainBatch, Metrics]:
        """Adds the advantages, after taking the KL penalty off the rewards where configured; and its metric.

        Args: rewards: [P, G] float32.
        """
        mask, penalties, metrics = np.asarray(batch.completion_mask), None, {}
        if self._config.algorithm.kl_in == "reward":
            old: Any = batch.old_logprobs
            kl = np.asarray(kl_of_tokens(old, batch.ref_logprobs, batch.completion_mask, self._algorithm.kl))
            penalties = np.float32(self.reference.kl_coef) * kl
            metrics["kl/reward_penalty"] = float((kl.sum(axis=1) / mask.sum(axis=1)).mean())
        advantages = estimate_advantages(rewards, mask, penalties, self._algorithm.estimator)
        return add_advantages(batch, advantages), metrics

    def with_loss_terms(self, batch: TrainBatch, rollouts: ScoredBatch) -> TrainBatch:
        """Takes truncated completions out of the loss, and adds the KL's coefficient, where configured."""
        if self._config.algorithm.mask_truncated:
            completions = [c for group in rollouts.groups for c in group.completions]
            batch = keep_completions(batch, np.array([c.finish_reason != "length" for c in completions]))
        return self._with_kl_coef(batch)

    def _with_kl_coef(self, batch: TrainBatch) -> TrainBatch:
        if not self.reference.is_adaptive or self._config.algorithm.kl_in != "loss":
            return batch
        # On every token: the scalar has to follow its rows wherever they are placed or packed.
        coef: Any = np.full(batch.tokens.shape, self.reference.kl_coef, np.float32)
        return dataclasses.replace(batch, kl_coef=coef)

    def _computed(self, trained: Params) -> Params:
        """All parameters, in the dtype of the computation."""
        return join(self.frozen, self._update.to_compute_dtype(trained))

    def move_reference(self, trained: Params, metrics: Metrics, steps_done: int) -> Metrics:
        """Adapts the KL's coefficient and refreshes the reference, where configured; returns their metrics."""
        reference = self.reference
        changed: Metrics = {}
        if reference.is_adaptive:
            changed["kl/coef"] = reference.kl_coef
            kl = metrics["kl/reward_penalty"] if "kl/reward_penalty" in metrics else metrics["kl/mean"]
            reference.adapt(kl, self._config.completions_per_step)
        if reference.is_refreshed:
            changed["kl/is_refreshed"] = int(reference.refresh(trained, steps_done))
        return changed

    # ---- updates ----

    def _missing_logprobs(self, batch: TrainBatch) -> list[tuple[str, str]]:
        """(phase, field) of the log-probabilities that have to be computed before the updates.

        With one update a step, old and current log-probabilities are the same; the sampler's came with the
        completions.
        """
        missing = []
        if self._config.needs_old_logprobs and batch.old_logprobs is None:
            missing.append(("old_log_prob", "old_logprobs"))
        if self._config.uses_reference and batch.ref_logprobs is None:
            missing.append(("ref", "ref_logprobs"))
        return missing

    def _run_updates(
        self, state: TrainState, batch: TrainBatch, step: int
    ) -> tuple[TrainState, list[Metrics], TokenUse, TokenValues | None]:
        """One optimizer step a mini-batch, `num_epochs` times over the same mini-batches.

        All work is dispatched first and then awaited in order, so that the devices stay busy and the timers see
        each phase.
        """
        actor, seed = self._config.actor, (self._config.trainer.seed, step)
        missing = self._missing_logprobs(batch)
        rows = split_minibatches(len(batch.tokens), actor.num_minibatches, seed=seed)
        laid_out = [self._place(take_rows(batch, of_minibatch)) for of_minibatch in rows]
        placed = [micro_batches for micro_batches, _ in laid_out]
        for phase, field in missing:
            with self._timer(phase):
                placed = self._add_logprobs(field, state, placed)
        is_kept = self._config.saves_rollouts(step + 1)
        metrics, weighing, scored = [], [], []
        with self._timer("update_actor"):
            for _ in range(actor.num_epochs):
                for minibatch in placed:
                    state, update_metrics, marks, logprobs = self._update.accounted(
                        state, minibatch, self.frozen
                    )
                    scored.append(logprobs if is_kept else [])
                    metrics.append(update_metrics)
                    weighing.append(marks)
        for phase, field in missing:
            with self._timer(phase):
                jax.block_until_ready([getattr(micro, field) for minibatch in placed for micro in minibatch])
        with self._timer("update_actor"):
            metrics, weighing = fetch((metrics, weighing[: len(rows)]))  # the same in every epoch
        places = [of_minibatch for _, of_minibatch in laid_out]
        use, values = _token_use(batch, rows, places, weighing), None
        if is_kept:
            with self._timer("token_values"):
                values = self._token_values(batch, rows, places, placed, scored, weighing)
        return state, metrics, use, values

    def _token_values(
        self,
        batch: TrainBatch,
        rows: Sequence[np.ndarray],
        places: Sequence[Places],
        placed: Sequence[Sequence[TrainBatch]],
        scored: Sequence[Sequence[jax.Array]],
        weighing: Sequence[Sequence[np.ndarray]],
    ) -> TokenValues:
        """Args: scored: the log-probabilities that each update differentiated; others: as `_token_use`."""
        first, last = scored[: len(rows)], scored[-len(rows) :]
        old = [
            [
                at if micro.old_logprobs is None else micro.old_logprobs
                for micro, at in zip(*pair, strict=True)
            ]
            for pair in zip(placed, first, strict=True)
        ]
        on_devices = {
            "trainer_logprobs": first if self._config.algorithm.old_logprobs == "sampler" else old,
            "old_logprobs": old,
            "logprobs": last,
            "is_clipped": [list(map(self._clipped, *pair)) for pair in zip(last, placed, strict=True)],
        }
        if placed[0][0].ref_logprobs is not None:
            on_devices["ref_logprobs"] = [[micro.ref_logprobs for micro in each] for each in placed]
        fetched = fetch(on_devices)
        if weighing[0]:
            fetched["weighs"] = weighing
        whole = functools.partial(rows_of_tokens, rows=rows, places=places, shape=batch.tokens.shape)
        known: dict[str, Any] = {"ref_logprobs": None, "weighs": np.asarray(batch.completion_mask) > 0}
        known |= {name: whole(values) for name, values in fetched.items()}
        return TokenValues(advantages=np.asarray(batch.advantages), **known)

    def _place(self, minibatch: TrainBatch) -> tuple[list[TrainBatch], Places]:
        """The micro-batches of a mini-batch, on the devices, and where its rows went."""
        return to_micro_batches(self._with_loss_weights(minibatch), self._shape, self.mesh)

    def _with_loss_weights(self, minibatch: TrainBatch) -> TrainBatch:
        algorithm = self._config.algorithm
        if algorithm.old_logprobs == "sampler":
            minibatch = dataclasses.replace(minibatch, old_logprobs=minibatch.sampler_logprobs)
        return add_loss_weights(minibatch, algorithm.loss_agg, self._config.loss_norm)

    def _add_logprobs(
        self, field: str, state: TrainState, placed: Sequence[Sequence[TrainBatch]]
    ) -> list[list[TrainBatch]]:
        """Puts the policy's or the reference's log-probabilities into a field of every micro-batch."""
        # Nothing outside this function holds these parameters: they must not stay in memory during the updates.
        is_old = field == "old_logprobs"
        params = self._computed(state.params) if is_old else join(self.frozen, self.reference.on_device())
        score = lambda micro: dataclasses.replace(micro, **{field: self._forward.score(params, micro)})
        return [[score(micro) for micro in minibatch] for minibatch in placed]

    # ---- before the first step ----

    def overflowing_layer(self, state: TrainState, batch: TrainBatch) -> int | None:
        """The first layer, counted from 0, whose results are beyond the range of the dtype; None: all are within.

        Args: batch: of the host; as many of its rows are looked at as a micro-batch has.
        """
        micro = to_micro_batches(batch, self._shape, self.mesh)[0][0]
        look = jax.jit(largest_activations, static_argnames="config")
        largest = look(
            self._computed(state.params), self.model, micro.tokens, micro.positions, micro.segment_ids
        )
        beyond = np.flatnonzero(~np.isfinite(fetch(largest)))
        return int(beyond[0]) if len(beyond) else None

    def compile(self) -> dict[str, int]:
        """Compiles all programs of a step from shapes alone: nothing is computed, no parameters are needed.

        Devices of a mesh that is only described need not be there, within `jax.sharding.use_abstract_mesh` of it.

        Returns: phase -> bytes in use on one device while its largest program runs. Phases whose programs are many
            and small are left out.
        """
        example: Any = self._with_kl_coef(make_sft_batch([([0], [0])], pad_id=0))
        if self._config.algorithm.kl_in == "reward":
            zeros = np.zeros(example.tokens.shape, np.float32)
            example = dataclasses.replace(example, old_logprobs=zeros, ref_logprobs=zeros)
        if self._config.knows_drawable:
            shape = (*example.tokens.shape, num_words(self.model.vocab_size))
            example = dataclasses.replace(example, drawable=np.zeros(shape, np.uint32))
        missing = self._missing_logprobs(example)
        example = self._with_loss_weights(add_token_ages(example, [], 0))
        [micro] = abstract_micro_batches(example, self._shape, self.mesh)
        state = self.optimizer.abstract_state()
        trained = self._update.compile_params(state.params)
        params = join(self.frozen, trained)
        sizes = {}
        if missing:
            ((logprobs, _), _), sizes["score"] = self._forward.compile(params, micro)
            micro = dataclasses.replace(micro, **{field: logprobs for _, field in missing})
        sizes |= self._update.compile(self.optimizer, params, micro)
        if self._config.logging.save_rollouts:
            compile_ahead(self._clipped, micro.advantages, micro)
        # A program's own size holds its arguments: parameters and sums; the optimizer's, the whole state and sums.
        reference = device_bytes(self.reference.abstract()) if self._config.uses_reference else 0
        copy = 0 if trained is state.params else device_bytes(trained)
        held = device_bytes(state if copy else state.opt_state)
        waiting = copy + device_bytes(self.frozen) + reference
        beside = {"score": held + reference, "update": held + reference, "optimizer": waiting}
        return {phase: size + beside[phase] for phase, size in sizes.items()}


def _token_use(
    batch: TrainBatch,
    rows: Sequence[np.ndarray],
    places: Sequence[Places],
    weighing: Sequence[Sequence[np.ndarray]],
) -> TokenUse:
    """Puts together what each mini-batch made of its rows.

    Args:
        rows: of each mini-batch, as from `split_minibatches`; places: where they went.
        weighing: as from `UpdateStep.accounted`, on the host.
    """
    minibatch, num_tokens = np.zeros((2, len(batch.tokens)), np.int64)
    lengths = np.asarray(batch.completion_mask).sum(axis=1)
    for number, (of_minibatch, at, marks) in enumerate(zip(rows, places, weighing, strict=True)):
        minibatch[of_minibatch] = number
        if marks:
            unpacked = at.unpack(np.concatenate(marks), batch.tokens.shape[1])
            num_tokens[of_minibatch] = unpacked.sum(axis=1)
        else:
            num_tokens[of_minibatch] = lengths[of_minibatch]
    return TokenUse(minibatch, num_tokens)
