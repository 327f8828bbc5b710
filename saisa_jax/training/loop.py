"""The training loop: one stage after the other, each resumable to the bit."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import signal
import time
from typing import Any

import jax
from absl import logging
from etils import epath

from saisa_jax import parallel
from saisa_jax.batch import HostBatch
from saisa_jax.checkpoints import CheckpointError, RunCheckpointer, checksums, copy_sidecar, save_model
from saisa_jax.command_line import UserError
from saisa_jax.config import Config, ConfigError, to_dict
from saisa_jax.data.pipeline import TrainIterator, eval_batches, stage_rows, steps_in_stage, train_iterator
from saisa_jax.data.sample import DataError
from saisa_jax.data.tokenizer import load_tokenizer
from saisa_jax.models import flops
from saisa_jax.models.lora import is_adapter, merge_adapters
from saisa_jax.training import processes
from saisa_jax.training.heldout import HeldOut
from saisa_jax.training.metrics import MetricsWriter, Progress
from saisa_jax.training.optimizer import flatten, merge
from saisa_jax.training.preemption import StopSignal, run_lock
from saisa_jax.training.prepare import prepare
from saisa_jax.training.skipped import SkippedSteps
from saisa_jax.training.start import check_same_recipe, check_stages, model_directory, starting_params
from saisa_jax.training.state import TrainState, create_state, param_shardings
from saisa_jax.training.step import make_train_step


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message names the step and its samples."""


def run(config: Config, workdir: epath.Path) -> int:
    """Trains the configured stages that are not finished yet.

    Returns:
      0, or the number of the signal that stopped the run; started again, it goes on from there.
    """
    processes.start(config.distributed)
    workdir.mkdir(parents=True, exist_ok=True)
    lock = run_lock(workdir) if processes.is_first() else contextlib.nullcontext(lambda: None)
    with lock as guard, StopSignal(guard) as stop:
        check_same_recipe(config, workdir)
        tokenizer = load_tokenizer(config.data.tokenizer)
        if len(tokenizer) > config.model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {len(tokenizer)} tokens and the model room for {config.model.vocab_size}: "
                f"set --config.model.vocab_size={len(tokenizer)}"
            )
        check_stages(config, tokenizer, workdir)
        for name in config.stages:
            if model_directory(workdir, name).exists():
                logging.info("%s is finished: %s", name, model_directory(workdir, name))
                continue
            if stop.requested and jax.process_count() == 1:  # several agree on it, after a step
                return int(signal.Signals[stop.requested])
            stage = Stage(config, name, workdir, tokenizer)
            if processes.is_first():
                new = workdir / ".config.json.new"
                new.write_text(json.dumps(to_dict(config), indent=2))
                new.replace(workdir / "config.json")  # whole at any moment: the next start reads it
            if not stage.run(stop):
                return int(signal.Signals[stop.requested or "SIGTERM"])
    return 0


class Stage:
    """One stage: everything that stands before its first step."""

    def __init__(self, config: Config, name: str, workdir: epath.Path, tokenizer: Any):
        self.config, self.name, self.tokenizer = config, name, tokenizer
        self.directory = workdir / name
        self.cache = str(self.directory)  # of the counts of its samples
        self.rows = stage_rows(config, name, tokenizer, self.cache)
        self.steps = steps_in_stage(config, name, tokenizer, self.cache)
        _, self.settings, self.model, self.mesh, self.rules, self.optimizer, self.shardings = prepare(
            config, name, self.steps
        )
        start = starting_params(config, name, workdir, tokenizer, self.mesh, self.rules)
        self.source, groups = start.source, self.settings.groups
        with parallel.use(self.mesh, self.rules):
            self.state = create_state(
                start.make, start.argument, groups, self.optimizer, self.shardings, donate=start.source != "random"
            )
        del start
        params = flatten(merge(self.state.trainable, self.state.frozen))
        self.parameters = sum(leaf.size for path, leaf in params.items() if not is_adapter(path))
        self.last_loss: float | None = None
        self.evaluation_due = False  # it was skipped when a signal came, since it takes its time
        self.losses_of_data = {
            "dropped": 0,
            "cut_tokens": 0,
        }  # samples, and text tokens of samples, since the first step
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
            RunCheckpointer(directory, self.config.training.keep_checkpoints) as checkpointer,
        ):
            own = parallel.own_rows(self.mesh, self.settings.batch_size)
            data = train_iterator(self.config, self.name, self.tokenizer, own=own, cache=self.cache)
            closing.callback(data.close)
            before = self._resume(checkpointer, data)
            started = time.monotonic() - before
            finished = self._train(checkpointer, data, stop, started)
            checkpointer.wait()
        if finished:
            self._finish(time.monotonic() - started)
        return finished

    def _resume(self, checkpointer: RunCheckpointer, data: Any) -> float:
        """Restores the last committed checkpoint, if there is one; returns the seconds trained before it."""
        if checkpointer.latest_step() is None:
            return 0.0
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self._saved())
        frozen, expected = self.state.frozen, self._frozen_checksums
        self.state = TrainState(None, None, frozen, None)  # never two copies in memory
        saved, metadata = checkpointer.restore(abstract, data)
        differing = [path for path in expected if metadata["frozen"].get(path) != expected[path]]
        if differing:
            raise CheckpointError(
                f"frozen parameters of {self.source} are not those that {self.directory} was trained with: "
                f"{', '.join(differing)}; bring them back, or start in another --workdir"
            )
        self.state = TrainState(frozen=frozen, **saved)
        self.losses_of_data, self.last_loss = metadata["losses_of_data"], metadata["last_loss"]
        self.evaluation_due = metadata["evaluation_due"]
        logging.info("%s goes on from step %d", self.name, int(self.state.step))
        return float(metadata["seconds"])

    @functools.cached_property
    def _frozen_checksums(self) -> dict[str, int]:
        return checksums(self.state.frozen)

    def _saved(self) -> dict[str, Any]:
        """What a checkpoint of the run holds: all but the frozen parameters, which it names by checksums."""
        state = self.state._asdict()
        return {name: state[name] for name in ("step", "trainable", "opt_state")}

    def _metadata(self, seconds: float) -> dict[str, Any]:
        """What a checkpoint says besides; `_resume` reads it."""
        return {
            "seconds": seconds,
            "frozen": self._frozen_checksums,
            "losses_of_data": self.losses_of_data,
            "last_loss": self.last_loss,
            "evaluation_due": self.evaluation_due,
        }

    def _train(self, checkpointer: RunCheckpointer, data: TrainIterator, stop: StopSignal, started: float) -> bool:
        # The order of what follows matters: the metrics of a step are read after the next one was started, so that the
        # device never waits; and a step is saved only after its loss was seen to be finite, or the step skipped.
        habits, first, batch_size = self.config.training, int(self.state.step), self.settings.batch_size
        train_step = make_train_step(
            self.model, self.optimizer, self.shardings, self.settings.accumulation, habits.loss_chunk
        )
        self.skipped = SkippedSteps(self.directory, first)
        held_out, crew = self._held_out(), processes.Crew(self.mesh)
        events = habits.tensorboard and processes.is_first()
        with (
            MetricsWriter(processes.own(self.directory), events, resume_step=first) as writer,
            Progress(self.name, self.steps, first, shown=processes.is_first()) as progress,
        ):
            log = functools.partial(self._log, writer, progress, crew, started)
            if held_out and self.evaluation_due:
                values = held_out(self.state)
                if not writer.holds("eval", first):
                    writer.write("eval", first, **values)
            waiting = None
            for step in range(first + 1, self.steps + 1):
                host, failure = self._read(data)
                told = crew.tell(bool(stop.requested), failure, host.counts, batch_size)
                self.state, metrics = train_step(self.state, parallel.to_device(host.batch, self.mesh, batch_size))
                if waiting:
                    log(*waiting)
                waiting = step, metrics, host.dropped, told
                stopping, last = crew.stopping, step == self.steps
                save = stopping or last or step % habits.checkpoint_every == 0
                evaluate = bool(held_out) and (last or step % habits.eval_every == 0)
                self.evaluation_due = evaluate and bool(stopping)
                if save or evaluate:
                    log(*waiting)
                    waiting = None
                if held_out and evaluate and not stopping:
                    writer.write("eval", step, **held_out(self.state))
                if save:
                    checkpointer.save(step, self._saved(), data, self._metadata(time.monotonic() - started))
                if stopping:  # after the last step, too: the next start has only to write the model
                    by = stop.requested or "another process"
                    logging.warning("stopped by %s after step %d; the same command goes on", by, step)
                    return False
        return True

    def _read(self, data: TrainIterator) -> tuple[HostBatch, Exception | None]:
        """The next batch; or padding, and why there is none."""
        try:
            return next(data), None
        except Exception as error:  # whatever a disk or a decoder raises: the other processes must learn of it
            return data.padding(), error

    def _merged(self, params: Any) -> Any:
        """The parameters with their adapters merged into them, where the plain model's live."""
        shardings = param_shardings(self.config.model_for(self.name), self.mesh, self.rules)
        merged = functools.partial(merge_adapters, config=self.model.lora)
        return jax.jit(merged, out_shardings=shardings)(params)

    def _held_out(self) -> HeldOut | None:
        habits = self.config.training
        if not habits.eval_every or not self.settings.validation:
            return None
        batches = eval_batches(self.config, self.name, self.tokenizer, habits.eval_batches)
        return HeldOut(
            self.model,
            self.settings,
            batches,
            self.tokenizer,
            self.mesh,
            samples=habits.eval_samples,
            loss_chunk=habits.loss_chunk,
        )

    def _log(
        self,
        writer: MetricsWriter,
        progress: Progress,
        crew: processes.Crew,
        started: float,
        step: int,
        metrics: Any,
        dropped: tuple[str, ...],
        told: Any,
    ) -> None:
        news = crew.hear(told)
        values = {name: float(value) for name, value in metrics.items()}
        self.losses_of_data["dropped"] += news.dropped
        self.losses_of_data["cut_tokens"] += news.cut_tokens
        if dropped:
            writer.write("dropped", step, samples=dropped)
        if not news.samples:
            raise DataError(f"no sample of the batch of step {step} can be used: {'; '.join(dropped[:5])}")
        if values.pop("skipped"):
            self._not_finite(writer, step, values)
            return
        if step % self.config.training.log_every and step != self.steps:
            return
        rates = progress.update(step, samples=news.samples, **values)
        writer.write("train", step, **values, **self.losses_of_data, **rates, seconds=time.monotonic() - started)
        self.last_loss = values["loss"]

    def _not_finite(self, writer: MetricsWriter, step: int, values: dict[str, float]) -> None:
        """What becomes of a step that changed nothing, since its loss or gradient was not finite."""
        habits = self.config.training
        names = self.rows.names((step - 1) * self.settings.batch_size)
        broken = ", ".join(f"{name} is {value}" for name, value in values.items() if not math.isfinite(value))
        what = f"{broken} at step {step} of {self.name}; its batch held {', '.join(names)}"
        advice = f"The last good checkpoint is kept; try a lower --config.{self.name}.optimizer.lr"
        writer.write("train" if habits.on_nan == "stop" else "skipped", step, **values)
        if habits.on_nan == "stop":
            raise TrainingError(f"{what}. {advice}, or --config.training.on_nan=skip")
        in_a_row = self.skipped.add(step, values, names)
        logging.warning("%s; it was skipped", what)
        if in_a_row > habits.max_skips:
            raise TrainingError(
                f"{what}. {in_a_row} steps in a row were not finite, more than --config.training.max_skips="
                f"{habits.max_skips}. {advice}"
            )

    def _finish(self, seconds: float) -> None:
        settings = self.settings
        per_step = flops.train_step(
            self.model, settings.groups, settings.batch_size, settings.text_length, settings.max_images
        )
        summary = {
            "stage": self.name,
            "steps": self.steps,
            "samples": self.rows.samples_before(self.steps * settings.batch_size),
            "wall_seconds": seconds,
            "train_flops": per_step * self.steps,
            "parameters": self.parameters,
            "final_loss": self.last_loss,
            "alignment": self.model.alignment,
            "start": self.source,
            "seed": self.config.seed,
        }
        if processes.is_first():
            (self.directory / "summary.json").write_text(json.dumps(summary, indent=2))
        # Last: a stage is finished when its model is there.
        params = merge(self.state.trainable, self.state.frozen)
        if self.model.lora.rank:
            save_model(self.directory / "adapter", self.state.trainable, self.config, None, summary)
            params = self._merged(params)
        final = model_directory(self.directory.parent, self.name)
        attach = None if self.source == "random" else copy_sidecar(self.source)
        save_model(final, params, self.config, self.tokenizer, summary, attach)
