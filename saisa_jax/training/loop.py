"""The training loop: one stage after the other, each resumable to the bit."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

from saisa_jax import parallel
from saisa_jax.batch import HostBatch
from saisa_jax.checkpoints import CheckpointError, RunCheckpointer, checksums, save_model
from saisa_jax.config import Config, ConfigError, to_dict
from saisa_jax.data.pipeline import eval_batches, steps_in_stage, train_iterator
from saisa_jax.data.sample import DataError
from saisa_jax.data.tokenizer import load_tokenizer
from saisa_jax.models import flops
from saisa_jax.training.heldout import HeldOut
from saisa_jax.training.metrics import MetricsWriter, Progress
from saisa_jax.training.optimizer import make_optimizer, make_schedule, merge, split
from saisa_jax.training.preemption import RunLockedError, StopSignal, run_lock
from saisa_jax.training.start import model_directory, starting_params
from saisa_jax.training.state import TrainState, create_state, state_shardings
from saisa_jax.training.step import make_train_step


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and its samples."""


USER_ERRORS = (ConfigError, DataError, CheckpointError, RunLockedError, TrainingError)


def run(config: Config, workdir: epath.Path) -> int:
    """Trains the configured stages that are not finished yet.

    Returns:
      0, or the number of the signal that stopped the run; started again, it goes on from there.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with run_lock(workdir), StopSignal() as stop:
        tokenizer = load_tokenizer(config.data.tokenizer)
        if len(tokenizer) > config.model.vocab_size:
            raise ConfigError(
                f"the tokenizer has {len(tokenizer)} tokens and the model room for {config.model.vocab_size}: "
                f"set --config.model.vocab_size={len(tokenizer)}"
            )
        (workdir / "config.json").write_text(json.dumps(to_dict(config), indent=2))
        for stage in config.stages:
            if model_directory(workdir, stage).exists():
                logging.info("%s is finished: %s", stage, model_directory(workdir, stage))
                continue
            Stage(config, stage, workdir, tokenizer).run(stop)
            if stop.requested:
                return int(signal.Signals[stop.requested])
    return 0


class Stage:
    """One stage: everything that stands before its first step."""

    def __init__(self, config: Config, name: str, workdir: epath.Path, tokenizer: Any):
        self.config, self.name, self.tokenizer = config, name, tokenizer
        self.directory = workdir / name
        self.settings, self.model = config.stage(name), config.model_for(name)
        self.steps = steps_in_stage(config, name)
        self.mesh = parallel.make_mesh(config.mesh)
        self.rules = parallel.make_rules(self.model, self.mesh)
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        if self.settings.batch_size % ways:
            raise ConfigError(
                f"{name}.batch_size={self.settings.batch_size} does not divide by mesh data x fsdp = {ways}: "
                f"set --config.{name}.batch_size to {self.settings.batch_size // ways * ways + ways}"
            )
        with parallel.use(self.mesh, self.rules):
            make_params, self.source = starting_params(config, name, workdir)
            abstract = jax.eval_shape(make_params)
            trainable, _ = jax.eval_shape(lambda p: split(p, self.settings.groups), _unbox(abstract))
            self.optimizer = make_optimizer(self.settings.optimizer, self.settings.groups, trainable, self.steps)
            self.schedule = make_schedule(self.settings.optimizer, self.steps)
            _, self.shardings = state_shardings(self.model, self.settings.groups, self.optimizer, self.mesh, self.rules)
            self.state = create_state(make_params, self.settings.groups, self.optimizer, self.shardings)
        self._last_loss: float | None = None
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves((self.state.trainable, self.state.frozen)))

    def run(self, stop: StopSignal) -> None:
        """Trains to the last step, or until a signal, and leaves a finished model or a checkpoint."""
        keep, directory = self.config.training.keep_checkpoints, self.directory / "checkpoints"
        with parallel.use(self.mesh, self.rules), RunCheckpointer(directory, keep) as checkpointer:
            data = train_iterator(
                self.config,
                self.name,
                self.tokenizer,
                shard_index=jax.process_index(),
                shard_count=jax.process_count(),
            )
            seconds = self._resume(checkpointer, data)
            self._train(checkpointer, data, stop, seconds)

    def _resume(self, checkpointer: RunCheckpointer, data: Any) -> float:
        """Restores the last committed checkpoint, if there is one; returns the seconds trained before it."""
        if checkpointer.latest_step() is None:
            return 0.0
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self._saved())
        saved, metadata = checkpointer.restore(abstract, data)
        changed = {k: (metadata["order"].get(k), v) for k, v in self._order().items() if metadata["order"].get(k) != v}
        if changed:
            raise CheckpointError(
                f"{self.directory} was trained with another order of data: "
                + ", ".join(f"{self.name} {name}={old}, now {new}" for name, (old, new) in changed.items())
                + "; set it back, or start in another --workdir"
            )
        if metadata["frozen"] != checksums(self.state.frozen):
            raise CheckpointError(
                f"the frozen parameters of {self.source} are not those that {self.directory} was trained with; "
                "restore them, or start in another --workdir"
            )
        self.state = TrainState(frozen=self.state.frozen, **saved)
        logging.info("%s goes on from step %d", self.name, int(self.state.step))
        return float(metadata["seconds"])

    def _saved(self) -> dict[str, Any]:
        """What a checkpoint of the run holds: all but the frozen parameters, which it names by checksums."""
        state = self.state._asdict()
        return {name: state[name] for name in ("step", "trainable", "opt_state")}

    def _save(self, checkpointer: RunCheckpointer, step: int, data: Any, seconds: float) -> None:
        metadata = {"seconds": seconds, "frozen": checksums(self.state.frozen), "order": self._order()}
        checkpointer.save(step, self._saved(), data, metadata)

    def _order(self) -> dict[str, Any]:
        """What the data's position, a number of batches, counts in; another value would give it another meaning."""
        settings, data = self.settings, self.config.data
        return {
            "batch_size": settings.batch_size,
            "source": f"{settings.source}/{settings.task}",
            "seed": self.config.seed,
            "turns_per_sample": data.turns_per_sample,
            "augment": data.augment,
            "processes": jax.process_count(),
            "steps": self.steps,  # the schedule's length
        }

    def _train(self, checkpointer: RunCheckpointer, data: Iterator[HostBatch], stop: StopSignal, before: float) -> None:
        # The order of what follows matters: data before the step, metrics of a step after the next one was started,
        # and a checkpoint only of a step whose loss was finite.
        habits, first = self.config.training, int(self.state.step)
        train_step = make_train_step(self.model, self.optimizer, self.shardings)
        held_out = HeldOut(
            self.model, self.settings, self._held_out_batches(), self.tokenizer, self.mesh, habits.eval_samples
        )
        started = time.monotonic() - before
        with (
            MetricsWriter(self.directory, habits.tensorboard, resume_step=first) as writer,
            Progress(self.name, self.steps, first) as progress,
        ):
            waiting = None
            for step in range(first + 1, self.steps + 1):
                host = next(data)
                self.state, metrics = train_step(self.state, parallel.to_device(host.batch, self.mesh))
                if waiting:
                    self._log(writer, progress, *waiting)
                waiting = step, metrics, host.sample_ids, started
                last = step == self.steps or stop.requested
                evaluate = habits.eval_every and (step % habits.eval_every == 0 or step == self.steps)
                if last or evaluate or step % habits.checkpoint_every == 0:
                    self._log(writer, progress, *waiting)
                    waiting = None
                if evaluate and not stop.requested:
                    writer.write("eval", step, **held_out(self.state))
                if last or step % habits.checkpoint_every == 0:
                    self._save(checkpointer, step, data, time.monotonic() - started)
                if stop.requested:
                    checkpointer.wait()
                    logging.warning("stopped by %s after step %d; the same command goes on", stop.requested, step)
                    return
            checkpointer.wait()
        self._finish(time.monotonic() - started)

    def _held_out_batches(self) -> list[HostBatch]:
        habits = self.config.training
        if not habits.eval_every:
            return []
        return eval_batches(self.config, self.name, self.tokenizer, "validation", habits.eval_batches)

    def _log(
        self, writer: MetricsWriter, progress: Progress, step: int, metrics: Any, samples: Any, started: float
    ) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        if not math.isfinite(values["loss"]):
            writer.write("train", step, **values)
            raise TrainingError(
                f"the loss is {values['loss']} at step {step} of {self.name}; its batch held {', '.join(samples)}. The "
                f"last good checkpoint is kept; try a lower --config.{self.name}.optimizer.lr"
            )
        if step % self.config.training.log_every and step != self.steps:
            return
        values["lr"] = float(jax.numpy.asarray(self.schedule(step - 1)))
        rates = progress.update(step, samples=self.settings.batch_size, **values)
        writer.write("train", step, **values, **rates, seconds=time.monotonic() - started)
        self._last_loss = values["loss"]

    def _finish(self, seconds: float) -> None:
        data, settings = self.config.data, self.settings
        per_step = flops.train_step(
            self.model, settings.groups, settings.batch_size, settings.text_length, data.max_images
        )
        summary = {
            "stage": self.name,
            "steps": self.steps,
            "samples": self.steps * settings.batch_size,
            "wall_seconds": seconds,
            "train_flops": per_step * self.steps,
            "parameters": self.parameters,
            "final_loss": self._last_loss,
            "alignment": self.model.alignment,
            "start": self.source,
            "seed": self.config.seed,
        }
        params = merge(self.state.trainable, self.state.frozen)
        save_model(model_directory(self.directory.parent, self.name), params, self.config, self.tokenizer, summary)
        (self.directory / "summary.json").write_text(json.dumps(summary, indent=2))


def _unbox(tree: Any) -> Any:
    from flax.core import meta

    return meta.unbox(tree)
