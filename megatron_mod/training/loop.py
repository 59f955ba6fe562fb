"""Trains what was added to a frozen model, or all of a model."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megatron_mod import verbosity
from megatron_mod.checkpoint.folders import writing
from megatron_mod.config.schema import Config
from megatron_mod.conversion.restore import load_model
from megatron_mod.conversion.routers import KEY
from megatron_mod.data.dataset import write_rejects
from megatron_mod.model.lora import seed_dropout
from megatron_mod.model.trainable import Trainable, count_changed, frozen_digests
from megatron_mod.monitoring.environment import record_start
from megatron_mod.parallel import device, topology
from megatron_mod.parallel.agree import largest, on_first_rank
from megatron_mod.routing.capacity import CapacityController
from megatron_mod.routing.config import AUTO, ROUTER, RoutingConfig
from megatron_mod.routing.costs import UnitCosts
from megatron_mod.routing.scheme import Place
from megatron_mod.training.average import ParameterAverage
from megatron_mod.training.borders import (
    TOKENS,
    move,
    serve,
    settle,
    settle_each,
    shifts,
    spent_share,
)
from megatron_mod.training.checkpoint import RunState, write_json
from megatron_mod.training.ending import next_steps, summary
from megatron_mod.training.faults import FaultCounter, not_finite
from megatron_mod.training.frozen_prefix import with_states
from megatron_mod.training.metrics import CHECKPOINT, VALIDATION, Metrics, Validation
from megatron_mod.training.optimizer import build_optimizer, own_rates, wrap_ddp
from megatron_mod.training.plan import DTYPES, Plan, description, make_loader
from megatron_mod.training.resume import RunCheckpoints
from megatron_mod.training.run_folder import SUMMARY, RunFolder
from megatron_mod.training.signals import EXIT_INTERVAL, StopRequest, stopped
from megatron_mod.training.start import start
from megatron_mod.training.step import StepResult, run_schedule


def train(config: Config, plan: Plan) -> dict:
    """Run the training, or go on with it where an earlier job stopped.

    Returns the summary, which is also ``summary.json`` of the run.
    """
    folder = RunFolder(config.checkpoint)
    with (
        verbosity.at(config.logging.level),
        folder.held(),
        device.deterministic(config.train.deterministic),
    ):
        seed_dropout(plan.lora, seed=config.train.seed, groups=topology.process_groups())
        run = RunCheckpoints(config, folder, plan)
        training = Training(config, plan, run)
        with training.state.metrics:
            found = training.to_the_end()
        on_first_rank(lambda: write_json(folder.path / SUMMARY, found))
        topology.print_once(next_steps(config, steps=plan.steps))
    return found


def drawn_budget(budgets: tuple[float, float], *, seed: int, step: int) -> float:
    """The share of work that a step is trained for, of routers that serve a range of them: a
    function of these numbers alone. Half of all lie in the lowest quarter, where there is most to
    learn."""
    low, high = budgets
    return low + (high - low) * random.Random(f"{seed} {step}").random() ** 2


class Training:
    """A run in this rank's memory: the model, what changes it, and the steps."""

    def __init__(self, config: Config, plan: Plan, run: RunCheckpoints) -> None:
        """Build everything, and go on from the run's newest checkpoint; called by all ranks."""
        plan = with_states(config, plan, base_fingerprint=run.base_fingerprint)
        self.config, self.plan, self.run = config, plan, run
        self.model = load_model(
            plan.base,
            plan.routing,
            plan.topology,
            implementation=plan.implementation,
            dtype=DTYPES[config.model.dtype],
            trained=config.train.parts,
            computed=plan.computed,
            recompute=config.train.recompute,
            fp8=config.model.fp8,
            lora=plan.lora,
            filled=plan.goes_on is None,  # otherwise the checkpoint holds it all
        )
        trainable = Trainable(self.model)
        text = description(config, plan, parameters=trainable.count())
        topology.print_once(text)
        distributed = config.parallel.use_distributed_optimizer
        self.chunks = wrap_ddp(self.model, use_distributed_optimizer=distributed)
        rank = self.model.groups.dp.rank()
        self.data = make_loader(config, plan, plan.train, data_rank=rank)
        if plan.validation:
            self.validation = make_loader(config, plan, plan.validation, data_rank=rank)
        self.routers_train = "routers" in config.train.parts
        self.moves_borders = self.routers_train and plan.routing.bias and not plan.routing.is_exact
        optimizer, scheduler = build_optimizer(self.chunks, config, steps=plan.steps)
        self.state = RunState(
            trainable,
            optimizer,
            scheduler,
            CapacityController(self._held_to(), device=device.device(), workload=plan.workload),
            ParameterAverage(trainable.parameters),
            Metrics(config, plan, self.model),
            FaultCounter(most_in_a_row=config.train.max_skipped_steps),
        )
        step = run.resume(self.state)
        if step is None:
            start(self.model, config, plan, self.data)
        self.start = step or 0
        self.settled: list[float] = []  # capacities, once the last borders are set
        if step is None or step < plan.steps:
            record_start(config, after=self.start)
        self.frozen = frozen_digests(self.model)
        rejects = run.folder.path / "rejects.jsonl"
        with writing(rejects):
            on_first_rank(lambda: write_rejects(rejects, plan.train, plan.validation))
        self.stop = StopRequest()
        self.state.metrics.ending = lambda: self.stop.asked

    def _held_to(self) -> RoutingConfig:
        """What capacity is held to: of routers that stay as they are nothing pulls at it."""
        if self.routers_train:
            return self.plan.routing
        return replace(self.plan.routing, capacity_loss_weight=AUTO)

    def to_the_end(self) -> dict:
        """Take the steps that are left, validating and saving in between; returns the summary.

        Raises:
            Stopped: a signal or a limit asked for it; what was reached is saved.
            ValueError: training has diverged, or a checkpoint cannot be written.
        """
        done, steps = self.start, self.plan.steps
        if done and not self.state.metrics.has_validation(done):
            self._leave_if(self._validate_if_due(done), done)
        # From here on: a job that began too late for anything else still gets on.
        self.stop.minutes = self.config.train.exit_duration
        for step in range(done + 1, steps + 1):
            topology.at(f"step {step}")
            asked = self.take(step)
            if step > (1 - self.config.optimizer.average_fraction) * steps:
                self.state.average.update()
            if step == steps:
                self._settle()
            asked = asked or self._validate_if_due(step) or self._asked_at(step)
            self._leave_if(self._save_if_due(step, asked), step)
        if steps == 0:
            self.run.save(0, self.state, capacity=self._reached())
        changed = count_changed(self.frozen, frozen_digests(self.model))
        return summary(self.config, self.plan, self.state, changed=changed)

    def take(self, step: int) -> int:
        """One step, counted from 1; returns what asked some rank to stop meanwhile, or 0."""
        config, state = self.config, self.state
        with state.metrics.part("data"):
            batch = self.data.step(step - 1)
        work = self._serve(step)
        state.controller.start_step((step - 1) / self.plan.steps, work)
        groups = state.optimizer.param_groups
        share = groups[0]["lr"] / groups[0]["max_lr"] if groups else 0.0  # the same in all groups
        rates = {"learning_rate": share * config.optimizer.lr}
        rates |= {f"{name}_learning_rate": share * lr for name, lr in own_rates(config).items()}
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        check = config.router.check_decisions_interval
        with state.metrics.part("forward_backward"):
            result = run_schedule(
                self.chunks,
                self.model,
                batch,
                self.plan.routing,
                controller=state.controller,
                loss=self.plan.loss,
                check_decisions=bool(check) and step % check == 0,
                lot=self._lot(step),
                note_units=self.moves_borders,
            )
        exact = list(state.controller.capacities.values())
        asked_for = torch.tensor(exact, dtype=torch.float64) if exact else result.capacity
        state.metrics.operations.add(batch, asked_for)
        wrong, asked = largest(not_finite(result.loss, self.model), self.stop.asked)
        sources = partial(self.data.sources, step - 1)
        skipped = state.faults.skips(step, finite=not wrong, loss=result.loss, samples=sources)
        with state.metrics.part("optimizer"):
            grad_norm = 0.0 if skipped else self._update(step)
        state.scheduler.step(increment=1)
        state.metrics.add_tokens(batch.num_tokens, positions=batch.num_positions)
        if skipped:
            state.metrics.log_skipped(step, samples=sources())
            return int(asked)
        if step in (1, self.plan.steps) or step % config.logging.interval == 0:
            self._log(step, result, rates, grad_norm)
        state.metrics.advance(step)
        state.controller.end_step(result.capacity, result.pull, result.num_units)
        return int(asked)

    def _update(self, step: int) -> float:
        """Take the optimizer's step, and set the borders for the next to what the routers that it
        made would have kept of this one's units; returns the gradient norm."""
        routing = self.plan.routing
        norm = self.state.optimizer.step()[1]
        if self.moves_borders:
            target = self.state.controller.target_at(step / self.plan.steps, self._serve(step + 1))
            move(self.model, routing, shifts(self.model, routing, target, costs=self._costs))
        return norm

    @torch.no_grad()
    def _settle(self) -> None:
        """Set the biases of what is exported so that the last steps' samples, with real skipping,
        are kept to the target."""
        if not self.moves_borders:
            return
        topology.at("setting the borders on data")
        if self.plan.routing.budgets:
            self._settle_each()
            return
        batches = self.data.until(reversed(range(self.plan.steps)), tokens=TOKENS)
        with self.state.average.applied():
            settled = settle(
                self.chunks,
                self.model,
                batches,
                self.plan.routing,
                shares=self.state.controller.final_target,
                costs=self._costs,
            )
        self.settled = settled.capacity.tolist()
        routing = self.plan.routing
        for place, shift in zip(routing.places, settled.moved, strict=True):
            mean = self._averaged(place, "bias")
            if mean is not None:  # after the block it is not the model's own
                mean += shift

    def _settle_each(self) -> None:
        """Set borders at evenly spaced budgets of the range, and leave the routers at its least."""
        routing, state = self.plan.routing, self.state
        batches = self.data.until(reversed(range(self.plan.steps)), tokens=TOKENS)
        with state.average.applied():
            found = settle_each(
                self.chunks,
                self.model,
                batches,
                routing,
                share_of=state.controller.target_of,
                costs=self._costs,
            )
        self.settled = found.capacity.tolist()
        routers = self.model.routers()
        for place, borders in zip(routing.places, found.moved, strict=True):
            if place in routers:
                routers[place].borders.data.copy_(borders)
            mean = self._averaged(place, "borders")
            if mean is not None:
                mean.copy_(borders)

    def _averaged(self, place: Place, name: str) -> Tensor | None:
        """The mean of a router's parameter over the last steps, where it is averaged and here."""
        router = self.plan.routing.name_of(ROUTER, place.target)
        return self.state.average.mean.get(KEY.format(place.layer, f"{router}.{name}"))

    def _lot(self, step: int) -> int:
        """Of a step, a function of it and the seed alone; 0 is that of evaluation."""
        if self.plan.routing.selection != "random":
            return 0
        return random.Random(f"{self.config.train.seed} lot {step}").getrandbits(32) + 1

    def _serve(self, step: int) -> float | None:
        """Tell the routers the budget that a step draws, where they serve a range of them: a
        function of seed and step alone. Returns it."""
        if self.plan.routing.budgets is None:
            return None
        work = drawn_budget(self.plan.routing.budgets, seed=self.config.train.seed, step=step)
        serve(self.model, self.plan.routing, work)
        return work

    @property
    def _costs(self) -> UnitCosts | None:
        """What units cost that the budget is of; ``None``: all the same."""
        return None if self.plan.routing.work is None else self.plan.workload.costs

    def _work(self, kept: Tensor, valid: Tensor) -> float:
        """The share of the dense model's operations, when units of these sizes are kept."""
        workload = self.plan.workload
        return workload.work(float(spent_share(workload.costs, kept, valid)))

    def _log(
        self, step: int, result: StepResult, rates: Mapping[str, float], grad_norm: float
    ) -> None:
        penalty = float(self.state.controller.penalty(result.capacity))
        targets = self.state.controller.target
        target = float(targets.mean()) if len(targets) else 1.0
        routing = self.plan.routing
        is_work = routing.work is not None
        beside = {}
        if self.model.config.moe_aux_loss_coeff and "base" in self.config.train.parts:
            beside["load_balancing_loss"] = float(result.load_balancing)
            penalty += float(result.balance_loss)
        if routing.causal:
            beside |= {
                "causal_loss": float(result.causal_loss.sum()),
                "causal_agreement": float(result.agreement.mean()),
            }
            if routing.causal == "auxiliary_loss":  # a predictor's is its own
                penalty += routing.causal_weight * beside["causal_loss"]
        self.state.metrics.log(
            step,
            loss=float(result.loss) + penalty,
            task_loss=float(result.task_loss),
            capacity=result.capacity.tolist(),
            **rates,
            grad_norm=float(grad_norm),
            data_position=step * self.config.train.global_batch_size,
            penalty=penalty,
            **beside,
            capacity_target=None if is_work else target,
            work=self._work(result.kept, result.valid),
            work_target=self.plan.workload.work(target) if is_work else None,
        )

    def _validate_if_due(self, step: int) -> int:
        """Validate after some steps and the last; what asked the ranks to stop in it, or 0."""
        interval, last = self.config.train.validation_interval, step == self.plan.steps
        if not interval or not (last or step % interval == 0):
            return 0
        topology.at(f"the validation after step {step}")
        routing, causal = self.plan.routing, None
        with self.state.metrics.apart(VALIDATION), self.state.average.applied(when=last):
            measured = self._validate()
            if routing.is_exact and not isinstance(measured, int):
                causal = self._validate(causal=True)
        for found in (measured, causal):
            if isinstance(found, int):
                return found
        self.state.metrics.log_validation(step, measured, causal=causal)
        return 0

    @torch.no_grad()
    def _validate(self, *, causal: bool = False) -> Validation | int:
        """A pass over the validation data with real skipping, ``causal`` by the causal rule of an
        exact selection; or what the ranks broke off for."""
        routing = self.plan.routing
        self.model.eval()
        loss, labels = 0.0, 0
        kept = valid = agreed = torch.zeros((), device=device.device())
        for batch in self.validation.passes():
            if asked := self.stop.agreed():
                return asked
            result = run_schedule(
                self.chunks, self.model, batch, routing, controller=None, causal=causal
            )
            loss = loss + result.task_loss * batch.num_labels
            kept, valid = kept + result.kept, valid + result.valid
            agreed = agreed + result.agreement * result.num_units
            labels += batch.num_labels
        self.model.train()
        units = valid[:, 0].clamp(min=1)
        return Validation(
            loss=float(loss / labels),
            capacity=(kept[:, 0] / units).tolist(),
            work=self._work(kept, valid),
            agreement=float((agreed / units).mean()) if routing.is_exact else None,
        )

    def _asked_at(self, step: int) -> int:
        """``EXIT_INTERVAL`` where the job stops after this step, or 0."""
        interval, last = self.config.train.exit_interval, step == self.plan.steps
        return EXIT_INTERVAL if interval and not last and step % interval == 0 else 0

    def _save_if_due(self, step: int, asked: int) -> int:
        """Save after some steps, the last, and where the ranks are ``asked`` to stop; what asks
        them now, or 0."""
        interval, last = self.config.checkpoint.interval, step == self.plan.steps
        if not (asked or last or (interval and step % interval == 0)):
            return 0
        topology.at(f"the checkpoint of step {step}")
        with self.state.metrics.apart(CHECKPOINT):
            self.run.save(step, self.state, capacity=self._reached(), leaving=bool(asked))
        return asked or (0 if last else self.stop.agreed())

    def _reached(self) -> list[float] | None:
        """The capacity of each place where training finds it; ``None``: the settings say it."""
        if self.plan.routing.work is None:
            return None
        return self.settled or self.state.controller.previous.tolist()

    def _leave_if(self, asked: int, step: int) -> None:
        if asked:
            train, steps = self.config.train, self.plan.steps
            raise stopped(asked, train, step=step, steps=steps, run=self.run.folder.path)
