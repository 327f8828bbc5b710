"""The training loop: one stage after the other, each resumable to the bit."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import signal
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

from saisa_jax import parallel
from saisa_jax.batch import HostBatch
from saisa_jax.checkpoints import CheckpointError, RunCheckpointer, checksums, copy_sidecar, save_model
from saisa_jax.command_line import UserError
from saisa_jax.config import Config, ConfigError, to_dict
from saisa_jax.data.pipeline import eval_batches, stage_rows, steps_in_stage, train_iterator
from saisa_jax.data.tokenizer import load_tokenizer
from saisa_jax.models import flops
from saisa_jax.models.lora import is_adapter, merge_adapters
from saisa_jax.training.goodput import Goodput
from saisa_jax.training.heldout import HeldOut
from saisa_jax.training.meter import Meter
from saisa_jax.training.metrics import MetricsWriter, Progress
from saisa_jax.training.optimizer import flatten, merge
from saisa_jax.training.preemption import StopSignal, run_lock
from saisa_jax.training.prepare import prepare
from saisa_jax.training.profile import Profiler
from saisa_jax.training.skipped import SkippedSteps
from saisa_jax.training.start import check_same_recipe, check_stages, model_directory, starting_params
from saisa_jax.training.state import TrainState, create_state, param_shardings
from saisa_jax.training.step import make_train_step
from saisa_jax.training.wandb_log import WandbLog, check_wandb


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message names the step and its samples."""


def run(config: Config, workdir: epath.Path) -> int:
    """Trains the configured stages that are not finished yet.

    Returns:
      0, or the number of the signal that stopped the run; started again, it goes on from there.
    """
    if jax.process_count() > 1:
        raise ConfigError(f"{jax.process_count()} processes: training runs in one process so far, on all its devices")
    workdir.mkdir(parents=True, exist_ok=True)
    with run_lock(workdir), StopSignal() as stop:
        check_same_recipe(config, workdir)
        check_wandb(config.training.wandb)
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
            stage = Stage(config, name, workdir, tokenizer)
            (workdir / "config.json").write_text(json.dumps(to_dict(config), indent=2))
            if not stage.run(stop):
                return int(signal.Signals[stop.requested or "SIGTERM"])
    return 0


class Stage:
    """One stage: everything that stands before its first step."""

    def __init__(self, config: Config, name: str, workdir: epath.Path, tokenizer: Any):
        self.clock = Goodput()
        self.config, self.name, self.tokenizer = config, name, tokenizer
        self.directory = workdir / name
        self.cache = str(self.directory)  # of the counts of its samples
        self.rows = stage_rows(config, name, tokenizer, self.cache)
        self.steps = steps_in_stage(config, name, tokenizer, self.cache)
        _, self.settings, self.model, self.mesh, self.rules, self.optimizer, self.shardings = prepare(
            config, name, self.steps
        )
        make_params, argument, self.source = starting_params(config, name, workdir, tokenizer)
        with parallel.use(self.mesh, self.rules):
            self.state = create_state(make_params, argument, self.settings.groups, self.optimizer, self.shardings)
        params = flatten(merge(self.state.trainable, self.state.frozen))
        self.parameters = sum(leaf.size for path, leaf in params.items() if not is_adapter(path))
        s = self.settings
        self.flops = flops.train_step(self.model, s.groups, s.batch_size, s.text_length, s.max_images)  # of a step
        self.last_loss: float | None = None
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
            data = train_iterator(self.config, self.name, self.tokenizer, cache=self.cache)
            closing.callback(data.close)
            self._resume(checkpointer, data)
            finished = self._train(checkpointer, data, stop)
        if finished:
            self._finish()
        return finished

    def _resume(self, checkpointer: RunCheckpointer, data: Any) -> None:
        """Restores the last committed checkpoint, if there is one."""
        if checkpointer.latest_step() is None:
            return
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
        self.losses_of_data = metadata["losses_of_data"]
        self.clock.go_on(metadata["goodput"])
        logging.info("%s goes on from step %d", self.name, int(self.state.step))

    @functools.cached_property
    def _frozen_checksums(self) -> dict[str, int]:
        return checksums(self.state.frozen)

    def _saved(self) -> dict[str, Any]:
        """What a checkpoint of the run holds: all but the frozen parameters, which it names by checksums."""
        state = self.state._asdict()
        return {name: state[name] for name in ("step", "trainable", "opt_state")}

    def _train(self, checkpointer: RunCheckpointer, data: Iterator[HostBatch], stop: StopSignal) -> bool:
        # The order of what follows matters: the metrics of a step are read after the next one was started, so that the
        # device never waits; and a step is saved only after its loss was seen to be finite, or the step skipped.
        habits, first = self.config.training, int(self.state.step)
        train_step = make_train_step(
            self.model, self.optimizer, self.shardings, self.settings.accumulation, habits.loss_chunk
        )
        self.skipped = SkippedSteps(self.directory, first)
        self.meter = Meter(self.clock, self.settings, self.steps, self.flops, self.mesh.devices.flatten().tolist())
        held_out, clock = self._held_out(), self.clock
        with (
            MetricsWriter(self.directory, habits.tensorboard, resume_step=first, wandb=self._wandb()) as writer,
            Progress(self.name, self.steps, first) as progress,
            Profiler(self.config.profile, self.directory / "profile", first) as profiler,
        ):
            clock.lose(writer.cut, first)
            log = functools.partial(self._log, writer, progress)
            waiting, step, stopping = None, first, None
            clock.started()
            for step in range(first + 1, self.steps + 1):
                with clock("data"):
                    host = next(data)
                part = "compile" if step == first + 1 else "step"
                with clock(part), jax.profiler.StepTraceAnnotation("train", step_num=step):
                    self.state, metrics = train_step(self.state, parallel.to_device(host.batch, self.mesh))
                profiler.started(step, metrics)
                if waiting:
                    log(*waiting)
                waiting = step, metrics, host._replace(batch=None)
                stopping, last = stop.requested, step == self.steps
                save = stopping or last or step % habits.checkpoint_every == 0
                evaluate = held_out and (last or (step % habits.eval_every == 0 and not stopping))
                if save or evaluate:
                    log(*waiting)
                    waiting = None
                if held_out and evaluate:
                    with clock("eval"):
                        evaluation = held_out(self.state)
                    writer.write("eval", step, **evaluation)
                if save:
                    with clock("save"):
                        checkpointer.save(step, self._saved(), data, self._metadata())
                        if stopping or last:
                            checkpointer.wait()
                if stopping:
                    break
            writer.write("goodput", step, **clock.account())
        logging.info("%s, up to step %d: %s", self.name, step, clock)
        if step < self.steps:
            logging.warning("stopped by %s after step %d; the same command goes on", stopping, step)
        return step == self.steps

    def _metadata(self) -> dict[str, Any]:
        """What a checkpoint says beside the state."""
        return {
            "frozen": self._frozen_checksums,
            "losses_of_data": self.losses_of_data,
            "goodput": self.clock.account(),
        }

    def _merged(self, params: Any) -> Any:
        """The parameters with their adapters merged into them, where the plain model's live."""
        shardings = param_shardings(self.config.model_for(self.name), self.mesh, self.rules)
        merged = functools.partial(merge_adapters, config=self.model.lora)
        return jax.jit(merged, out_shardings=shardings)(params)

    def _wandb(self) -> WandbLog | None:
        project = self.config.training.wandb
        return WandbLog(project, self.directory, to_dict(self.config)) if project and not jax.process_index() else None

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

    def _log(self, writer: MetricsWriter, progress: Progress, step: int, metrics: Any, host: HostBatch) -> None:
        with self.clock("step"):
            values = {name: float(value) for name, value in metrics.items()}
        self.meter.add(values["samples"], values["text_fill"])
        self.losses_of_data["dropped"] += len(host.dropped)
        self.losses_of_data["cut_tokens"] += host.cut_tokens
        if host.dropped:
            writer.write("dropped", step, samples=host.dropped)
        if values.pop("skipped"):
            self._not_finite(writer, step, values, host)
            return
        if step % self.config.training.log_every and step != self.steps:
            return
        values |= self.losses_of_data | self.meter.read(step)
        progress.update(step, **values)
        writer.write("train", step, **values, seconds=self.clock.seconds)
        self.last_loss = values["loss"]

    def _not_finite(self, writer: MetricsWriter, step: int, values: dict[str, float], host: HostBatch) -> None:
        """What becomes of a step that changed nothing, since its loss or gradient was not finite."""
        habits = self.config.training
        broken = ", ".join(f"{name} is {value}" for name, value in values.items() if not math.isfinite(value))
        what = f"{broken} at step {step} of {self.name}; its batch held {', '.join(host.names)}"
        advice = f"The last good checkpoint is kept; try a lower --config.{self.name}.optimizer.lr"
        writer.write("train" if habits.on_nan == "stop" else "skipped", step, **values)
        if habits.on_nan == "stop":
            raise TrainingError(f"{what}. {advice}, or --config.training.on_nan=skip")
        in_a_row = self.skipped.add(step, values, host.names)
        logging.warning("%s; it was skipped", what)
        if in_a_row > habits.max_skips:
            raise TrainingError(
                f"{what}. {in_a_row} steps in a row were not finite, more than --config.training.max_skips="
                f"{habits.max_skips}. {advice}"
            )

    def _finish(self) -> None:
        summary = {
            "stage": self.name,
            "steps": self.steps,
            "samples": self.rows.samples_before(self.steps * self.settings.batch_size),
            "wall_seconds": self.clock.seconds,
            "goodput": self.clock.account(),
            "train_flops": self.flops * self.steps,
            "parameters": self.parameters,
            "final_loss": self.last_loss,
            "alignment": self.model.alignment,
            "start": self.source,
            "seed": self.config.seed,
        }
        (self.directory / "summary.json").write_text(json.dumps(summary, indent=2))
        # Last: a stage is finished when its model is there.
        params = merge(self.state.trainable, self.state.frozen)
        if self.model.lora.rank:
            save_model(self.directory / "adapter", self.state.trainable, self.config, None, summary)
            params = self._merged(params)
        final = model_directory(self.directory.parent, self.name)
        attach = None if self.source == "random" else copy_sidecar(self.source)
        save_model(final, params, self.config, self.tokenizer, summary, attach)
