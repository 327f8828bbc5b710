"""A workdir holds one recipe: what of it may change between two starts of a run, and what may not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from saisa_jax import buckets
from saisa_jax.checkpoints import is_model, local_model, read_account
from saisa_jax.config import STAGES, Config, ConfigError, from_saved, to_dict
from saisa_jax.training.optimizer import flatten
from saisa_jax.training.start import names_step

# Sections and fields that do not decide which numbers a run computes, or only in the last bits.
FREE = (
    "name", "stages", "training", "mesh", "distributed", "profile", "evaluation", "allow_random_init",
    "data.num_workers", "data.num_threads", "data.prefetch", "data.on_error", "data.max_drop", "data.cache_bytes",
    "data.shuffle_block_size",  # the checkpoint says it where it matters
    "model.remat_policy", "model.attention_impl",
)  # fmt: skip
CONTENTS = ("init_from", "distill.teacher", "data.tokenizer")  # they may lie elsewhere (`check_same_contents`)
FREE_OF_STAGE = ("accumulation",)  # micro-batches of the same batch
_CONTENTS_FILE = "contents.json"
_PROBE = "<image>\nA  b c1234,\té 猫 🙂 \x00"  # what tokenizers of one vocabulary disagree about
FREE_OF_SOURCE = ("path", "images", "allow_absolute")  # the checkpoint says what they held (`StageData.mark`)


def check_same_recipe(config: Config, workdir: epath.Path) -> None:
    """Compares a configuration with the one that the workdir's run was started with last, and logs what may change.

    What the run was started without, by an earlier version, is taken as its default. Free are logging, saving,
    evaluation, the mesh, threads, what becomes of bad samples, micro-batches, `remat_policy` and `attention_impl`;
    where sources, the tokenizer and the model to start from lie; a validation split where there was none; more steps or
    epochs under a constant rate without warm-up, until the stage is finished; and everything of a stage that has not
    begun.

    Raises:
      ConfigError: every other setting that differs, with both values.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        before = from_saved(json.loads(path.read_text()))
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{path}, the configuration of the run in {workdir}, cannot be read: {error}") from error
    began = [stage for stage in STAGES if _began(workdir, stage)]
    stored, now = _fields(before), _fields(config)
    changed, refused = [], []
    for key in sorted(stored.keys() | now.keys()):
        if stored.get(key) != now.get(key):
            line = f"{key}={stored.get(key)}, now {now.get(key)}"
            (changed if _may_change(key, before, config, workdir, began) else refused).append(line)
    if refused:
        raise ConfigError(
            f"{workdir} holds a run of another recipe: {'; '.join(refused)}. Set it back, or choose another --workdir"
            + _advice(refused)
        )
    if changed:
        logging.info("%s goes on with other settings: %s", workdir, "; ".join(changed))


def check_same_contents(config: Config, workdir: epath.Path, tokenizer: Any) -> None:
    """Compares the model that a run starts from, its teacher and its tokenizer with those that it began with, wherever
    they lie.

    Raises:
      ConfigError: they are others. (A model that is not there any more is missed where it is needed.)
    """
    models = {"init_from": config.init_from, "distill.teacher": config.distill.teacher}
    now = {key: _model_mark(model) for key, model in models.items()}
    now["data.tokenizer"] = _tokenizer_mark(config, tokenizer)
    path = workdir / _CONTENTS_FILE
    began = any(_began(workdir, stage) for stage in STAGES)
    if not path.exists() or not began:
        if jax.process_index() == 0:
            buckets.write_text(path, json.dumps(now, indent=2))
        return
    before = json.loads(path.read_text())
    values = {**models, "data.tokenizer": config.data.tokenizer}
    for key in CONTENTS:
        then = before.get(key)  # earlier versions knew no teachers
        if None not in (then, now[key]) and then != now[key]:
            raise ConfigError(
                f"--config.{key}={values[key]} holds something else than when the run in {workdir} began: {now[key]}, "
                f"then {then}. Bring that back (where it lies does not matter), or choose another --workdir"
            )


def _model_mark(source: str) -> str | None:
    """A hash of a finished model's account of its arrays; of a step of a run its name, None if it is not there."""
    if not source or names_step(source):
        return source or "random"
    return _hash(read_account(source)[0]["leaves"]) if is_model(source) else None


def _tokenizer_mark(config: Config, tokenizer: Any) -> str:
    """A hash of what a tokenizer does, which an update of its library does not change."""
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    template = tokenizer.chat_template if "tokenizer" in (config.pretrain.template, config.finetune.template) else None
    return _hash([sorted(tokenizer.get_vocab().items()), tokenizer(_PROBE)["input_ids"], ends, template])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _began(workdir: epath.Path, stage: str) -> bool:
    """Whether a checkpoint or a model of a stage is there."""
    checkpoints = workdir / stage / "checkpoints"
    saved = any(path.name.isdigit() for path in buckets.children(checkpoints))
    return saved or is_model(local_model(workdir, stage))


def _may_change(key: str, before: Config, now: Config, workdir: epath.Path, began: list[str]) -> bool:
    if any(key == free or key.startswith(f"{free}.") for free in FREE):
        return True
    if key in CONTENTS:
        return (workdir / _CONTENTS_FILE).exists()
    if key == "model.projector.sharing":  # has to be stage 2's, and is not read otherwise
        return "finetune" not in began
    stage, _, field = key.partition(".")
    if stage not in STAGES:
        return False
    if stage not in began or field in FREE_OF_STAGE:
        return True
    old, new = before.stage(stage), now.stage(stage)
    if field == "validation":
        return not old.validation
    if field == "sources":
        return _contents(old.sources) == _contents(new.sources)
    if field in ("steps", "epochs") and not local_model(workdir, stage).exists():
        # Any other schedule of more steps is another one from its first step on.
        endless = new.optimizer.schedule == "constant" and not new.optimizer.warmup_fraction
        if (old.steps is None) != (new.steps is None):
            return False
        more = new.epochs >= old.epochs if new.steps is None else new.steps >= (old.steps or 0)
        return endless and more
    return False


def _contents(sources: tuple[Any, ...]) -> list[dict[str, Any]]:
    fields: list[dict[str, Any]] = [to_dict(source) for source in sources]
    return [{name: value for name, value in each.items() if name not in FREE_OF_SOURCE} for each in fields]


def _fields(config: Config) -> dict[str, str]:
    """{"finetune.optimizer.lr": "0.001"}; lists are one field."""
    raw: Mapping[str, Any] = to_dict(config)
    return {path.replace("/", "."): json.dumps(value) for path, value in flatten(raw).items()}


def _advice(refused: list[str]) -> str:
    longer = [line for line in refused if line.split("=")[0].endswith((".steps", ".epochs"))]
    return (
        ". (A schedule that falls, or a warm-up, of more steps is another one from its first step on; to train longer, "
        "start another --workdir from this one's model with --config.init_from)"
        if longer
        else ""
    )
