"""Runs a benchmark on a finished model: every question by free generation, scored, written down.

    OUTPUT/evaluation/TASK.jsonl            one question a line, in the benchmark's order
    OUTPUT/evaluation/TASK.json             the accuracies, with intervals, and what an answer costs
    OUTPUT/evaluation/TASK.partial.jsonl    while it runs, and after a run that was stopped: a line that says what is
                                            answered with what, and the answers so far, in any order

The first two appear when all is answered, `TASK.json` last; it is never there without the predictions it is of. A
question that is too long, or whose picture cannot be read, is a line with an `error` and without a score; such are
counted, and no accuracy is of them.
Stopped or killed, the same evaluation goes on, also with another batch size, on another mesh or another number of
processes. With the same ones the batches are the same as well, so that the answers are those of an undisturbed one to
the bit.

Under several processes all of them read the questions and answer; process 0 alone scores and writes, and nothing is
read from what it writes by the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

import saisa_jax
from saisa_jax import buckets, flops, parallel
from saisa_jax.checkpoints import checksums
from saisa_jax.config import DistributedConfig, MeshConfig, to_dict
from saisa_jax.data.images import image_name
from saisa_jax.data.sample import USER, DataError, Turn
from saisa_jax.data.text.conversation import Encoded
from saisa_jax.evaluation import scoring
from saisa_jax.evaluation.progress import Progress
from saisa_jax.evaluation.settings import FREE, Settings
from saisa_jax.evaluation.tasks import TASKS, Item, Task, TaskData
from saisa_jax.inference import memory
from saisa_jax.inference.batches import Prompt, make_prompt, plan_batches
from saisa_jax.inference.generate import GREEDY, bucket
from saisa_jax.inference.model import Conversation, VisionLanguageModel


class Interrupted(RuntimeError):
    """The evaluation was stopped; the message says where the answers so far are."""


def evaluate(
    model: VisionLanguageModel,
    name: str,
    settings: Settings,
    output: epath.Path,
    checkpoint: str,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Answers a benchmark's questions and writes `NAME.jsonl` and `NAME.json` into `output/evaluation`.

    Every process of the model's mesh calls it.

    Args:
      model: the model.
      name: of a registered task.
      settings: batch size, limits, where the data lie.
      output: a directory; made if it is not there. A former evaluation in it is replaced when this one is complete.
      checkpoint: where the model lies; goes into the record.
      stop: whether this process was asked to stop; all of them stop together, after a batch.

    Returns:
      what is in `NAME.json`; None in processes other than the first.

    Raises:
      UnknownNameError, ConfigError: no such task, or one that has nothing to ask.
      DataError: data that cannot be read, or pictures that are not there; the message names the flag that fixes it.
      OtherProcessError: one of these, in another process.
      Interrupted: Ctrl-C, or whatever else raised KeyboardInterrupt; or `stop`. The next run goes on.
    """
    task = TASKS[name].under(settings.prompts)
    data = settings.place(name, model.config, model.stage)
    items = parallel.together(lambda: read_items(task, data, settings.limit))
    started = time.monotonic()
    header = {"of": _identity(model, name, items, settings)}
    parallel.agree(zlib.crc32(json.dumps(header).encode()), f"questions, settings or versions of {name}")
    first = jax.process_index() == 0
    folder = output / "evaluation"
    partial = folder / f"{name}.partial.jsonl"
    rows = parallel.together(lambda: _begin(partial, header) if first else {})
    before = parallel.from_first(np.asarray([item.id in rows for item in items]))
    try:
        with buckets.appending(partial) if first else contextlib.nullcontext() as append:
            for batch in _answers(model, name, task, items, settings, before, rows.copy(), stop):
                if append:
                    rows |= {row["id"]: row for row in batch}
                    append("".join(json.dumps(row) + "\n" for row in batch))
    except KeyboardInterrupt as error:
        raise Interrupted(_stopped(rows, items, name, partial)) from error
    if parallel.from_first(np.asarray(len(rows) < len(items))):
        raise Interrupted(_stopped(rows, items, name, partial))

    def finish() -> dict[str, Any] | None:
        if not first:
            return None
        predictions = task.rescore([rows[item.id] for item in items])
        record = scoring.summary(name, task, predictions, data)
        record |= _costs(model, predictions) | {"seconds": time.monotonic() - started}
        record |= {"settings": dataclasses.asdict(settings), "complete": settings.limit is None}
        record |= {"decoding": _decoding(model, settings)}
        record |= _origin(model, checkpoint)
        scoring.commit(folder, name, predictions, record, task.files(predictions, data))
        partial.unlink()
        return record

    return parallel.together(finish)


def _begin(partial: epath.Path, header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{id: prediction} that a stopped run of the same evaluation has left; the file holds these alone then."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    rows = _answered_before(partial, header)
    buckets.write_text(partial, "".join(json.dumps(row) + "\n" for row in (header, *rows.values())))
    return rows


def _stopped(rows: Mapping[str, Any], items: Sequence[Item], name: str, partial: epath.Path) -> str:
    if jax.process_index() > 0:
        return f"stopped; process 0 has the answers to {name} so far"
    return (
        f"stopped after {len(rows)} of {len(items)} questions of {name}. The answers so far are in {partial}; the same "
        "command goes on"
    )


# --- the questions ---------------------------------------------------------------------------------------------------


def read_items(task: Task, data: TaskData, limit: int | None = None, *, pictures: bool = True) -> list[Item]:
    """The questions to ask; DataError if some cannot be, because they or (`pictures`) their pictures are not there."""
    found = list(islice(task.items(data), limit))
    items = [item for item in found if isinstance(item, Item)]
    reasons = [(item.sample_id, item.reason) for item in found if isinstance(item, DataError)]
    for item, gone in _missing(items) if pictures else ():
        reasons.append((item.id, f"there is no image {gone}"))
    if reasons:
        raise DataError(
            f"{len(reasons)} of {len(found)} questions of {data.task} cannot be asked: {scoring.some(reasons)}. "
            "--data=FILE with --images=FOLDER says where questions and pictures lie"
        )
    if not items:
        raise DataError(f"{data.task} has no questions{f' in --data={data.data}' if data.data else ''}")
    if len({item.id for item in items}) < len(items):
        raise DataError(f"{data.task} has two questions of one id: {_repeated(items)!r}")
    return items


def _missing(items: Sequence[Item]) -> Iterator[tuple[Item, str]]:
    """Items with a picture that is named and not there. Each is looked for once, a bucket asked for many at a time."""
    named = [[os.fspath(x) for x in item.images if isinstance(x, str | os.PathLike)] for item in items]
    different = list({path: None for some in named for path in some})
    with ThreadPoolExecutor(16) as asking:
        there = dict(zip(different, asking.map(lambda path: epath.Path(path).exists(), different), strict=True))
    for item, paths in zip(items, named, strict=True):
        if gone := [path for path in paths if not there[path]]:
            yield item, gone[0]


def _repeated(items: Sequence[Item]) -> str:
    seen: set[str] = set()
    return next(item.id for item in items if item.id in seen or seen.add(item.id))


def _identity(model: VisionLanguageModel, name: str, items: Sequence[Item], settings: Settings) -> dict[str, Any]:
    """What all answers of one evaluation have in common."""
    config = to_dict(dataclasses.replace(model.config, mesh=MeshConfig(), distributed=DistributedConfig()))
    identity = {"config": config, "stage": model.stage, "params": checksums(model.params)}
    asked = [(item.id, item.question, item.answers, [image_name(image) for image in item.images]) for item in items]
    how = {field: value for field, value in dataclasses.asdict(settings).items() if field not in FREE}
    return {
        "task": name,
        "settings": how,
        "model": zlib.crc32(json.dumps(identity, sort_keys=True).encode()),
        "questions": zlib.crc32(json.dumps(asked).encode()),
        "version": saisa_jax.__version__,
    }


def _answered_before(partial: epath.Path, header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{id: prediction} that a stopped run of the same evaluation has left."""
    if not partial.exists():
        return {}
    first, *lines = partial.read_text().splitlines(keepends=True) or [""]
    if first.rstrip() != json.dumps(header):
        logging.warning("%s is of another model, other questions or other settings, and is written anew", partial)
        return {}
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may have cut the last one short
    logging.warning("%d questions were answered before; the evaluation goes on", len(rows))
    return {row["id"]: row for row in rows}


# --- the answers -----------------------------------------------------------------------------------------------------


def _answers(
    model: VisionLanguageModel,
    name: str,
    task: Task,
    items: Sequence[Item],
    settings: Settings,
    before: np.ndarray,
    rows: Mapping[str, dict[str, Any]],
    stop: Callable[[], bool],
) -> Iterator[list[dict[str, Any]]]:
    """Predictions of a batch after the other; in processes other than the first, of nothing.

    Args:
      before: [items] whether an item was answered by an earlier start.
      rows: those predictions; in the first process.
    """
    first = jax.process_index() == 0
    prompts = _prompts(model, items, settings.max_new_tokens)
    asked = [n for n, prompt in enumerate(prompts) if isinstance(prompt, Prompt)]
    if first and (unasked := set(range(len(items))) - set(asked)):
        yield [_prediction(model, task, items[n], prompts[n], None) for n in sorted(unasked)]
    items, prompts, before = [items[n] for n in asked], [prompts[n] for n in asked], before[asked]
    size, cache_bytes, told = _sizes(model, prompts, settings)
    batches = _left(prompts, before, size, model.row_ways)
    again = {n for batch in batches for n in batch}
    done = [rows[item.id] for n, item in enumerate(items) if n not in again and first]
    bar = Progress(name, len(items), before=(len(done), _sum(done))) if first else contextlib.nullcontext()
    with bar as progress:
        if progress and batches:
            progress.say(told)
        answers = model.answer_batches(prompts, batches, settings.max_new_tokens, cache_bytes, stop)
        for batch, outputs in zip(batches, answers, strict=False):  # fewer, if it was stopped
            if progress is None:
                continue
            predicted = [
                _prediction(model, task, items[n], _said(model, output), prompts[n].encoded)
                for n, output in zip(batch, outputs, strict=True)
                if n is not None
            ]
            yield predicted
            progress.update(len(predicted), _sum(predicted))


def _sizes(model: VisionLanguageModel, prompts: Sequence[Prompt], settings: Settings) -> tuple[int, int, str]:
    """Questions of a batch, bytes for pictures on a device, and both in words; the same in all processes."""
    shape = memory.Shape(
        bucket(max((len(prompt.encoded.tokens) for prompt in prompts), default=1)),
        bucket(settings.max_new_tokens),
        max((len(prompt.keys) for prompt in prompts), default=0),
    )
    free = parallel.least(memory.free_bytes(memory.devices_of(model.mesh)))
    room = memory.room(model.model_config, model.mesh, shape, free)
    rows, pictures = settings.batch_size or room.rows * model.row_ways, settings.image_cache_bytes
    pictures = room.cache_bytes if pictures is None else pictures
    return (
        rows,
        pictures,
        (
            f"batches of {min(rows, len(prompts))} questions{' (given)' if settings.batch_size else ''}, up to "
            f"{pictures / 2**30:.2g} GiB of pictures on a device{' (given)' if settings.image_cache_bytes else ''}; "
            f"{free / 2**30:.3g} GiB are free (--batch_size, --image_cache_bytes)"
        ),
    )


def plan(
    model: VisionLanguageModel, items: Sequence[Item], settings: Settings
) -> tuple[list[Prompt], list[list[int | None]], int, str]:
    """Prompts of the items that can be asked, all their batches, bytes for pictures, and the two sizes in words."""
    prompts = [prompt for prompt in _prompts(model, items, settings.max_new_tokens) if isinstance(prompt, Prompt)]
    size, cache_bytes, told = _sizes(model, prompts, settings)
    return prompts, _left(prompts, np.zeros(len(prompts), bool), size, model.row_ways), cache_bytes, told


def _prompts(model: VisionLanguageModel, items: Sequence[Item], max_new_tokens: int) -> list[Any]:
    """A Prompt for each item, or the DataError that says why it cannot be asked."""
    encoded: dict[Any, Any] = {}
    prompts = []
    for item in items:
        try:
            key = (item.question, tuple(model.views_of(item.images, item.id)), item.before, item.system)
        except DataError as error:
            prompts.append(error)
            continue
        if key not in encoded:
            turns = (*item.before, Turn(USER, item.question))
            try:
                encoded[key] = make_prompt(
                    model, Conversation(turns, item.images, item.system, item.id), max_new_tokens
                )
            except DataError as error:
                encoded[key] = error
        prompt = encoded[key]
        prompts.append(Prompt(prompt.encoded, item.images) if isinstance(prompt, Prompt) else prompt)
    return prompts


def _left(prompts: Sequence[Prompt], before: np.ndarray, batch_size: int, ways: int) -> list[list[int | None]]:
    """Batches of the prompts that are not answered `before`.

    They are batches of the whole plan, if an earlier start has followed it. Else (it had another size, or other ways)
    they are planned anew.
    """

    def plan(numbers: Sequence[int]) -> list[list[int | None]]:
        size = -(-min(batch_size, len(prompts)) // ways) * ways
        batches = plan_batches([prompts[n] for n in numbers], size, ways) if numbers else []
        return [[None if n is None else numbers[n] for n in batch] for batch in batches]

    left = [batch for batch in plan(range(len(prompts))) if not all(n is None or before[n] for n in batch)]
    twice = sum(bool(before[n]) for batch in left for n in batch if n is not None)
    # A kill in the middle of a write leaves a part of one batch.
    return left if twice < batch_size else plan(np.flatnonzero(~before).tolist())


def _said(model: VisionLanguageModel, output: Any) -> Any:
    return output if isinstance(output, DataError) else model.text(output)


def _sum(rows: Sequence[dict[str, Any]]) -> float:
    return sum(row["score"] or 0.0 for row in rows)


def _prediction(
    model: VisionLanguageModel, task: Task, item: Item, output: Any, prompt: Encoded | None
) -> dict[str, Any]:
    """The line of a question. `output`: what the model says, or the DataError that says why it was not asked."""
    tokens = [] if prompt is None else prompt.tokens.tolist()
    asked = {"prompt": model.tokenizer.decode(tokens, skip_special_tokens=False), "prompt_tokens": len(tokens)}
    if prompt is not None and model.model_config.vision.grids:
        asked["image_slots"] = len(prompt.image_positions)
    row = scoring.question(item, asked)
    return row | scoring.answered(task, item, output)


# --- the record ------------------------------------------------------------------------------------------------------


def _costs(model: VisionLanguageModel, predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """FLOPs of reading the mean question, with as many image slots as the largest has. Those of a blind run are empty,
    and computed all the same."""
    predictions = [row for row in predictions if "error" not in row]
    tokens = statistics.fmean(row["prompt_tokens"] for row in predictions)
    images = max(row.get("image_slots", len(row["images"])) for row in predictions)
    flops_of = {
        name: flops.prefill(model.model_config, round(tokens), images, convention=name).total
        for name in flops.CONVENTIONS
    }
    return {"prompt_tokens": tokens, "images_per_question": images, "prefill_flops": flops_of}


def _origin(model: VisionLanguageModel, checkpoint: str) -> dict[str, Any]:
    packages = ("jax", "jaxlib", "flax", "numpy")
    return {
        "checkpoint": checkpoint,
        "stage": model.stage,
        "model": {
            "name": model.config.name,
            "alignment": model.model_config.alignment,
            "blind": model.config.data.blind,
        }
        | dict(model.metadata),
        "device": jax.devices()[0].device_kind,
        "mesh": dict(model.mesh.shape) if model.mesh else None,
        "processes": jax.process_count(),
        "versions": {"python": platform.python_version(), "saisa_jax": saisa_jax.__version__}
        | {name: version(name) for name in packages},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _decoding(model: VisionLanguageModel, settings: Settings) -> dict[str, Any]:
    """How answers were chosen, and what stood around the questions."""
    system = model.config.data.system_prompt
    return {
        "method": "greedy",
        "temperature": GREEDY.temperature,
        "top_p": GREEDY.top_p,
        "max_new_tokens": settings.max_new_tokens,
        "template": model.stage_config.template,
        "system_prompt": system,
        "dtype": model.model_config.dtype,
    }
