"""The training loop: one stage after the other, each resumable to the bit."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging
from etils import epath

from saisa_jax import buckets, flops, parallel
from saisa_jax.checkpoints import (
    CheckpointError,
    LocalCheckpoints,
    RunCheckpointer,
    checksums,
    committed_steps,
    copy_sidecar,
    is_model,
    local_model,
    save_model,
)
from saisa_jax.config import STAGES, Config, ConfigError, to_dict
from saisa_jax.data.pipeline import StageData, TrainIterator
from saisa_jax.data.rows.counting import CountingStopped
from saisa_jax.data.rows.mark import same_content
from saisa_jax.data.sample import DataError
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.errors import UserError
from saisa_jax.evaluation.runner import Interrupted
from saisa_jax.models.lora import is_adapter, merge_adapters
from saisa_jax.training import processes
from saisa_jax.training.distill import check_teacher, load_own
from saisa_jax.training.heldout import HeldOut
from saisa_jax.training.model_of_step import save_start
from saisa_jax.training.optimizer import flatten, merge
from saisa_jax.training.preemption import StopSignal, run_lock
from saisa_jax.training.recipe import check_same_contents, check_same_recipe
from saisa_jax.training.ridge import FitStopped, save_fit
from saisa_jax.training.setup import compiled_meanwhile, setup_stage
from saisa_jax.training.start import check_projectors, check_stages, frozen_params, start_source, starting_params
from saisa_jax.training.state import (
    TrainState,
    abstract_saved,
    check_frozen,
    create_state,
    fixed_part,
    param_shardings,
    saved_part,
)
from saisa_jax.training.step import make_train_step
from saisa_jax.training.tasks import HeldOutTasks, check_tasks, evaluates_tasks
from saisa_jax.training.telemetry.goodput import Goodput
from saisa_jax.training.telemetry.journal import Journal
from saisa_jax.training.telemetry.profile import Profiler
from saisa_jax.training.telemetry.wandb import check_wandb
from saisa_jax.training.watchdog import Watchdog


def run(config: Config, workdir: epath.Path) -> int:
    """Trains the configured stages that are not finished yet.

    Returns:
      0, or the number of the signal that stopped the run; started again, it resumes from there.
    """
    processes.start(config.distributed)
    workdir = buckets.place(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    lock = run_lock(workdir) if processes.is_first() else contextlib.nullcontext()
    with lock as guard, StopSignal(guard) as stop, parallel.broadcasting():
        check_same_recipe(config, workdir)
        check_projectors(config, workdir)
        check_teacher(config)
        save_start(config, workdir)
        check_wandb(config.training.wandb)
        check_tasks(config)
        tokenizer = load_tokenizer(config.data.tokenizer)
        check_same_contents(config, workdir, tokenizer)
        if len(tokenizer) > config.model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {len(tokenizer)} tokens and the model room for {config.model.vocab_size}: "
                f"set --config.model.vocab_size={len(tokenizer)}"
            )
        try:
            stopped = lambda: stop.requested is not None  # noqa: E731
            data = check_stages(config, tokenizer, workdir, stopped)
            save_fit(config, workdir, tokenizer, data, stopped)
        except (CountingStopped, FitStopped):
            return int(signal.Signals[stop.requested or "SIGTERM"])
        for name in config.stages:
            if is_model(local_model(workdir, name)):
                logging.info("%s is finished: %s", name, local_model(workdir, name))
                continue
            if stop.requested and jax.process_count() == 1:  # several agree on it, after a step
                return int(signal.Signals[stop.requested])
            stage = StageTrainer(config, name, workdir, tokenizer, data[name])
            if processes.is_first():
                buckets.write_text(workdir / "config.json", json.dumps(to_dict(config), indent=2))
            if not stage.run(stop):
                return int(signal.Signals[stop.requested or "SIGTERM"])
    logging.info("finished: %s", local_model(workdir, config.stages[-1]))
    return 0


class TrainingError(UserError, RuntimeError):
    """Training cannot continue; the message names the step and its samples."""


class Evaluation(NamedTuple):
    """What is measured at the end of a stage, and every so many steps (0: at the end alone)."""

    every: int
    run: Callable[[int], Mapping[str, Any]]  # of a step


class StageTrainer:
    """Trains one stage. When it is made, everything is there that stands before the first step."""

    def __init__(self, config: Config, name: str, workdir: epath.Path, tokenizer: Any, data: StageData):
        self.clock = Goodput()
        self.config, self.name, self.tokenizer = config, name, tokenizer
        self.directory = workdir / name
        self.data, self.rows, self.steps = data, data.rows, data.steps
        setup = setup_stage(config, name, self.steps)
        _, self.settings, self.model, self.mesh, self.rules, self.optimizer, self.shardings, self.teacher = setup
        disk, s, chunk = config.training.local_checkpoints, self.settings, config.training.loss_chunk
        self.train_step = make_train_step(
            self.model, self.optimizer, self.shardings, s.accumulation, chunk, self.teacher
        )
        abstract = setup.abstract_state(), setup.abstract_batch()
        with parallel.use(self.mesh, self.rules):
            self.traced = self.train_step.trace(*abstract)
        self.compiled = compiled_meanwhile(self.traced, setup)
        self.local = LocalCheckpoints(disk, self.directory) if disk else None
        self.source = start_source(config, name, workdir)
        saved = committed_steps(self.directory / "checkpoints") or (self.local and self.local.newest(None) is not None)
        self.resumes = bool(saved)
        self.state = abstract[0]  # a checkpoint fills it, but for what is frozen
        frozen = frozen_params(self.source, self.state.frozen) if self.resumes else None
        if frozen is not None:
            self.state = self.state._replace(frozen=frozen)
        else:
            start = starting_params(config, name, workdir, tokenizer, self.mesh, self.rules)
            donate = self.source != "random"
            with parallel.use(self.mesh, self.rules):
                self.state = create_state(start.make, start.argument, s.groups, self.optimizer, self.shardings, donate)
        if self.teacher is not None:
            self.state = self.state._replace(teacher=load_own(config, abstract[0].teacher, tokenizer))
        params = flatten(merge(self.state.trainable, self.state.frozen))
        self.parameters = sum(leaf.size for path, leaf in params.items() if not is_adapter(path))
        self.step_shape = s.groups, s.batch_size, s.text_length, s.max_images
        self.flops = flops.train_step(self.model, *self.step_shape, self.teacher)  # of a step
        self.journal = Journal(config, name, self.directory, self.steps, self.clock)
        self.data_mark = data.mark  # as the data are now: a file may be rewritten while the run reads it
        self.evaluation_due = False  # it was put off or stopped when a signal came, since it takes its time
        logging.info("%s: %s", name, self.rows.describe(self.steps))

    def run(self, stop: StopSignal) -> bool:
        """Trains until the last step, and leaves a finished model; or until a signal, and leaves a checkpoint.

        Returns:
          Whether the stage is finished.
        """
        directory = self.directory / "checkpoints"
        with (
            parallel.use(self.mesh, self.rules),
            contextlib.ExitStack() as closing,
            RunCheckpointer(directory, self.config.training.keep_checkpoints, local=self.local) as checkpointer,
        ):
            own = parallel.own_rows(self.mesh, self.settings.batch_size)
            data = self.data.batches(own)
            closing.callback(data.close)
            with processes.exit_on_lost_process():
                if not self.resumes:
                    random = f"random weights (seed {self.config.seed})"
                    logging.info("%s starts from %s", self.name, random if self.source == "random" else self.source)
                else:
                    self._resume(checkpointer, data)
                try:
                    finished = self._train(checkpointer, data, stop)
                except TrainingError as error:
                    raise TrainingError(f"{error}. {self._what_next(checkpointer)}") from error
        if finished:
            self._finish()
            if self.local is not None:
                self.local.remove()
        return finished

    def _resume(self, checkpointer: RunCheckpointer, data: Any) -> None:
        """Restores the last committed checkpoint."""
        abstract, expected = abstract_saved(self.state), self._frozen_checksums
        fixed = {"frozen": self.state.frozen, "teacher": self.state.teacher}
        self.state = TrainState(None, None, opt_state=None, **fixed)  # never two copies in memory
        saved, metadata = checkpointer.restore(abstract, data)
        source = f"{self.source} and {self.config.distill.teacher}" if self.teacher else self.source
        check_frozen(metadata["frozen"], expected, source, str(self.directory))
        self.state = TrainState(**fixed, **saved)
        self._check_same_data(metadata.get("data"))  # versions before there was a mark wrote none
        self.journal.remembered |= metadata["journal"]
        self.evaluation_due = metadata["evaluation_due"]
        self.clock.go_on(metadata["goodput"])
        logging.info("%s resumes from step %d", self.name, self._step)

    def _check_same_data(self, saved: Mapping[str, Any] | None) -> None:
        """Raises DataError where the data are not those that the checkpoint's position is one in."""
        now = self.data_mark
        if saved is None or saved == now:
            return
        same_sizes = saved["samples"] == now["samples"]
        if same_sizes and saved["counts"] == now["counts"] and same_content(saved["content"], now["content"]):
            logging.warning(
                "%s: the checkpoint's mark of the data cannot be compared in full with that of the sources now: their "
                "sizes are the same. The next checkpoint holds the new mark",
                self.name,
            )
            return
        then, there = (f"{sum(mark['samples']):,} samples" for mark in (saved, now))
        if not same_sizes:
            change = f"{then}, now {there}"
        elif not same_content(saved["content"], now["content"]):
            change = f"{then} of content {', '.join(saved['content'])}, now as many of {', '.join(now['content'])}"
        else:
            change = f"{then} whose lengths hash to {saved['counts']}, now {now['counts']}: other samples can be used"
        raise DataError(
            f"the data of {self.name} have changed since the checkpoint in {self.directory}: {change}. Bring them back "
            f"(where they lie does not matter), or start in another --workdir"
        )

    @functools.cached_property
    def _frozen_checksums(self) -> dict[str, int]:
        return checksums(fixed_part(self.state))

    def _metadata(self) -> dict[str, Any]:
        """What a checkpoint says beside the state; `_resume` reads it."""
        return {
            "data": self.data_mark,
            "frozen": self._frozen_checksums,
            "journal": self.journal.remembered,
            "evaluation_due": self.evaluation_due,
            "goodput": self.clock.account(),
        }

    def _train(self, checkpointer: RunCheckpointer, data: TrainIterator, stop: StopSignal) -> bool:
        # The order of what follows matters: the results of a step are read after the next one was started, so that the
        # device never waits; and a step is saved only after its loss was seen to be finite, or the step skipped.
        options, batch_size, first, clock = self.config.training, self.settings.batch_size, self._step, self.clock
        evaluations, sync = self._evaluations(stop), processes.ProcessSync(self.mesh)
        alarm = processes.Alarm(options.checkpoint_every_minutes)
        with (
            self.journal.open(first, self._work(), self.mesh.devices.flatten().tolist()),
            Profiler(self.config.profile, self.directory / "profile", first) as profiler,
            Watchdog(options.watchdog) as watchdog,
            self._saved_before_error(checkpointer, data, first),
        ):
            clock.started()
            if self.evaluation_due:
                self._evaluate(self._due(evaluations, first), first, sync)
            waiting, step = None, first
            for step in () if sync.stopping else range(first + 1, self.steps + 1):
                try:
                    with clock("data"):
                        host = sync.read(data)
                except processes.UnreadError:
                    if waiting:
                        self._settle(sync, *waiting)
                    raise
                part = "compile" if step == first + 1 else "step"
                with clock(part), jax.profiler.StepTraceAnnotation("train", step_num=step):
                    if part == "compile" and self.compiled is not None:
                        self.compiled.result()
                    batch = parallel.to_device(host.batch, self.mesh, batch_size)
                    self.state, metrics = self.train_step(self.state, batch)
                sent = sync.send(bool(stop.requested), host.lost, batch_size, alarm.rings())
                profiler.started(step, metrics)
                if waiting:
                    self._settle(sync, *waiting)
                waiting = step, metrics, host.dropped, sent
                stopping, last, over = sync.stopping, step == self.steps, self._dropped_too_many() != ""
                save = stopping or last or over or sync.saving or step % options.checkpoint_every == 0
                locally = self.local is not None and step % options.local_checkpoint_every == 0 and not save
                due = self._due(evaluations, step)
                self.evaluation_due = bool(due) and stopping
                if save or locally or due:
                    self._settle(sync, *waiting)
                    waiting, over = None, self._dropped_too_many() != ""
                if due and not stopping:
                    self._evaluate(due, step, sync)
                    watchdog.beat(f"the evaluation at step {step}")
                    stopping = sync.stopping
                if save or stopping:
                    with clock("save"):
                        self.journal.upload()
                        checkpointer.save(step, saved_part(self.state), data, self._metadata())
                        if stopping or last or over:
                            checkpointer.wait()
                    sync.saving = False
                    alarm.wind()
                if locally and self.local is not None:
                    with clock("save"):
                        self.journal.upload()
                        self.local.save(step, saved_part(self.state), data, self._metadata())
                if over:
                    raise DataError(self._dropped_too_many())
                if stopping:
                    break
                watchdog.beat(f"step {step}")
            self.journal.close(step)
        if sync.stopping:  # after the last step, too: the next start has only to write the model
            by = stop.requested or "another process"
            logging.warning("stopped by %s after step %d; the same command resumes", by, step)
        return not sync.stopping

    def _work(self) -> flops.StepFlops:
        """FLOPs of a step."""
        return flops.of_step(self.model, *self.step_shape, self.traced.jaxpr.jaxpr, self.teacher)

    @contextlib.contextmanager
    def _saved_before_error(self, checkpointer: RunCheckpointer, data: TrainIterator, first: int) -> Iterator[None]:
        """What was trained is kept when the data of a step cannot be read; a failure to save is only logged."""
        self._settled = first
        try:
            yield
        except processes.UnreadError as error:
            step = self._settled
            if step > first:
                self._go_back(data, step)
                try:
                    with self.clock("save"):
                        self.journal.upload()
                        checkpointer.save(step, saved_part(self.state), data, self._metadata())
                        checkpointer.wait()
                    logging.warning("%s: the data of step %d cannot be read; %d is saved", self.name, step + 1, step)
                except CheckpointError as failure:
                    logging.error("%s", failure)
            raise error.reason from error

    def _go_back(self, data: TrainIterator, step: int) -> None:
        """Sets the step counter and the position in the data back to a step; those since have changed nothing else."""
        data.set_state({"next_row": step * self.settings.batch_size})
        back = jax.jit(lambda now: now - now + step, out_shardings=self.shardings.step)
        self.state = self.state._replace(step=back(self.state.step))

    def _dropped_too_many(self) -> str:
        """Says so when more samples could not be used than `data.max_drop` of all that the stage reads; else ""."""
        number, limit = self.journal.remembered["unusable"], self.config.data.max_drop
        total = self.rows.plans.samples_about(self.steps * self.settings.batch_size) if number else 0
        if number <= limit * total:
            return ""
        return (
            f"{number:,} samples could not be used, more than --config.data.max_drop={limit} of the {total:,} that "
            f"{self.name} reads; metrics.jsonl names them (kind dropped). Mend them, or raise it: the run goes on"
        )

    def _settle(
        self, sync: processes.ProcessSync, step: int, metrics: Mapping[str, Any], dropped: tuple[str, ...], sent: Any
    ) -> None:
        """Reads a step's results, when the next one has been started, and decides what becomes of the run.

        Args:
          sync: of the run.
          step: that the rest is of.
          metrics: of `make_train_step`.
          dropped: samples of this process's rows that could not be used, and why.
          sent: of `sync.send`.

        Raises:
          TrainingError: the loss or the gradient is not finite, and that is to stop the run.
          DataError: no sample of the step could be used.
          UnreadError: a process could not read its part of the data.
        """
        with self.clock("step"):
            lost = sync.receive(sent)
            values = {name: float(value) for name, value in metrics.items()}
        self._settled = step
        self.journal.count(step, values, lost, dropped)
        if not values["tokens"]:
            raise DataError(f"no sample of the batch of step {step} can be used: {'; '.join(dropped[:5])}")
        if values.pop("skipped"):
            self._not_finite(step, values)
        else:
            self.journal.trained(step, values)

    def _not_finite(self, step: int, values: Mapping[str, float]) -> None:
        """What becomes of a step that changed nothing, since its loss or gradient was not finite.

        Raises:
          TrainingError: it is to stop the run, or one too many was skipped.
        """
        options = self.config.training
        names = self.rows.names((step - 1) * self.settings.batch_size)
        broken = ", ".join(f"{name} is {value}" for name, value in values.items() if not math.isfinite(value))
        what = f"{broken} at step {step} of {self.name}; its batch held {', '.join(names)}"
        if math.isfinite(values.get("cross_entropy", math.nan)) and not math.isfinite(values["kl"]):
            what += f". What --config.distill.teacher={self.config.distill.teacher} predicts there is not finite"
        if options.on_nan == "stop":
            self.journal.failed(step, values)
            raise TrainingError(what)
        in_a_row = self.journal.skipped(step, values, names)
        logging.warning("%s; it was skipped", what)
        if in_a_row > options.max_skips:
            raise TrainingError(
                f"{what}. {in_a_row} steps in a row were not finite, more than --config.training.max_skips="
                f"{options.max_skips}"
            )

    def _what_next(self, checkpointer: RunCheckpointer) -> str:
        """How to go on when training cannot continue: commands, with this run's numbers in them."""
        try:
            checkpointer.wait()
        except CheckpointError as failure:
            logging.error("%s", failure)
        steps, workdir = checkpointer.steps(), self.directory.parent
        step = max(steps, default=None)
        free = next(number for number in itertools.count(2) if not epath.Path(f"{workdir}-{number}").exists())
        flags = [f"--workdir={workdir}-{free}", f"--config.{self.name}.optimizer.lr={self.settings.optimizer.lr / 2:g}"]
        said = f"No step of {self.name} was saved before"
        if step is not None:
            older = f" (as is step {steps[-2]}, if that one went astray already)" if len(steps) > 1 else ""
            said = f"Step {step} is the last good one and saved{older}"
            flags.append(f"--config.init_from={workdir}/{self.name}@{step}")
        elif self.source != "random":
            flags.append(f"--config.init_from={self.source}")
        if self.name != STAGES[0] and (step is not None or self.source != "random"):
            flags.append(f"--config.stages={self.name}")
        told = [said, f"With half the rate {'from there' if step else 'from the start'}: the same command with "
                f"{' '.join(flags)}"]  # fmt: skip
        if self.config.training.on_nan == "stop":
            told.append("To leave such steps out instead: the same command with --config.training.on_nan=skip")
        if step is not None:
            export = f"--from={self.directory / 'checkpoints' / str(step)} --to=MODEL"
            told.append(f"A model of that step: python -m saisa_jax checkpoint export {export}")
        return ". ".join(told)

    @property
    def _step(self) -> int:
        return int(self.state.step)

    def _evaluations(self, stop: StopSignal) -> list[Evaluation]:
        options, evaluations = self.config.training, []
        if held_out := self._held_out():
            evaluations.append(Evaluation(options.eval_every, lambda step: held_out(self.state)))
        if evaluates_tasks(self.config, self.name):
            tasks = HeldOutTasks(self.config, self.name, self.tokenizer, self.mesh, self.directory)
            stops = lambda: stop.requested is not None  # noqa: E731
            answer = lambda step: tasks(self._plain_params(), step, stops)  # noqa: E731
            evaluations.append(Evaluation(options.eval_tasks_every, answer))
        return evaluations

    def _due(self, evaluations: Sequence[Evaluation], step: int) -> list[Evaluation]:
        return [x for x in evaluations if step == self.steps or (x.every and step % x.every == 0)]

    def _evaluate(self, due: Sequence[Evaluation], step: int, sync: processes.ProcessSync) -> None:
        """Measures what is due; where a signal stops that, all processes stop, and the next start goes on with it."""
        values: dict[str, Any] = {}
        with self.clock("eval"):
            try:
                for evaluation in due:
                    values |= evaluation.run(step)
            except Interrupted as interrupted:
                if interrupted.__cause__ is not None:  # a second Ctrl-C
                    raise
                logging.warning("%s", interrupted)
                self.evaluation_due = sync.stopping = True
                return
        if values:
            self.journal.evaluated(step, values)

    def _plain_params(self) -> Any:
        """The parameters of the model without adapters: what the stage would leave now."""
        params = merge(self.state.trainable, self.state.frozen)
        return self._merged(params) if self.model.lora.rank else params

    def _merged(self, params: Any) -> Any:
        """The parameters with their adapters merged into them, where the plain model's live."""
        shardings = param_shardings(self.config.model_for(self.name), self.mesh, self.rules)
        merged = functools.partial(merge_adapters, config=self.model.lora)
        return jax.jit(merged, out_shardings=shardings)(params)

    def _held_out(self) -> HeldOut | None:
        options = self.config.training
        if not options.eval_every or not self.settings.validation:
            return None
        batches = self.data.held_out(options.eval_batches)
        return HeldOut(
            self.model,
            self.settings,
            batches,
            self.tokenizer,
            self.mesh,
            samples=options.eval_samples,
            loss_chunk=options.loss_chunk,
        )

    def _finish(self) -> None:
        dropped = self.journal.remembered["dropped"]
        if dropped:
            logging.warning("%s: %s samples were dropped; metrics.jsonl names them", self.name, f"{dropped:,}")
        values = {
            "stage": self.name,
            "steps": self.steps,
            "samples": self.rows.plans.samples_before(self.steps * self.settings.batch_size) - dropped,
            "dropped": dropped,
            "left_out": self.rows.left_out,
            "train_flops": self.flops * self.steps,
            "parameters": self.parameters,
            "alignment": self.model.alignment,
            "remat_policy": self.model.remat_policy,
            "attention_impl": self.model.attention_impl,
            "start": self.source,
            "seed": self.config.seed,
        }
        summary = self.journal.summarize(values)
        # Last: a stage is finished when its model is there.
        if self.model.lora.rank:
            save_model(self.directory / "adapter", self.state.trainable, self.config, None, summary)
        final = local_model(self.directory.parent, self.name)
        attach = None
        if is_model(self.source):
            attach = copy_sidecar(self.source)
        elif self.source != "random":
            logging.warning("%s is no longer there: %s has nothing of its sidecar", self.source, final)
        save_model(final, self._plain_params(), self.config, self.tokenizer, summary, attach)
