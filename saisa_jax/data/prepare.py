"""`python -m saisa_jax data prepare`: samples of any source as ArrayRecord shards that are checked and counted.

    python -m saisa_jax data prepare --config=RECIPE[:argument] [--config.a.b=value ...] --stage=finetune --output=DIR

Every image is opened and decoded, every sample is encoded with the stage's template and tokenizer. What cannot be used
is listed in DIR/report.jsonl with its id and the reason, and left out. Files are those that `shards.py` describes.

A shard holds a fixed run of the source's samples, so that it is the same whenever it is made. A finished one has an
account (shard-....json) beside it, and a second start makes only those without one. The accounts become the index
when all shards are there.

With --features the records hold what the frozen vision encoder of --config.init_from makes of the images, in the
recipe's dtype, and no images. Every run that keeps this encoder frozen can train on them
(--config.data.features=True), and none of them computes the encoder again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from saisa_jax import buckets
from saisa_jax.config import Config, to_dict
from saisa_jax.data.features import FeatureSpec, check_sources
from saisa_jax.data.records import Encode, Prepared, with_features, with_files
from saisa_jax.data.rows.counts import fingerprint
from saisa_jax.data.rows.order import Concatenated
from saisa_jax.data.sample import DataError, ImageSource, StoredImage
from saisa_jax.data.sources import open_source, warn_of_text_alone
from saisa_jax.data.sources.shards import COUNTS, INDEX, Index, Shard, encode_record, write_shard
from saisa_jax.data.text.encoder import Encoder, warn_of_unknown_words
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.data.workers import worker_pool

PLAN, REPORT = "plan.json", "report.jsonl"
SAMPLES_PER_SHARD = 4096
SPLITS = {"train": "sources", "validation": "validation"}  # and the field of a stage that lists them
LEFT_OUT = "left_out"
Read = Callable[[range], Iterable[Prepared | DataError]]  # of the samples' numbers


@dataclass(frozen=True)
class Job:
    """What is prepared, as every process needs it."""

    to: str
    config: Config
    stage: str
    samples: Concatenated
    shards: int
    image_size: int | None
    features: FeatureSpec | None = None  # what the records hold in place of images

    def shard_name(self, number: int) -> str:
        return f"shard-{number:05d}-of-{self.shards:05d}.arrayrecord"

    def account(self, number: int) -> epath.Path:
        """Marks a shard as complete, and says what it holds."""
        return buckets.place(self.to) / f"shard-{number:05d}-of-{self.shards:05d}.json"

    def encoder(self) -> Encoder:
        return Encoder(self.config, self.stage, load_tokenizer(self.config.data.tokenizer))

    def with_files(self, encoder: Encoder) -> Read:
        return functools.partial(with_files, self.samples, encoder, self.config.model.vision, self.image_size)

    def bounds(self, number: int) -> range:
        """The samples of a shard."""
        size = len(self.samples)
        return range(number * size // self.shards, (number + 1) * size // self.shards)

    def mark(self, number: int) -> str:
        """A hash of what a shard is made of: what its samples say, and the size and time of their pictures' files."""
        mark = hashlib.sha256()
        for index in self.bounds(number):
            try:
                sample = self.samples[index]
                said = (sample.id, sample.system, sample.independent_turns, sample.turns)
                content: Any = (said, [_image_version(image) for image in sample.images])
            except DataError as error:
                content = str(error)
            mark.update(repr(content).encode("utf-8", "surrogatepass"))
        return mark.hexdigest()[:16]


def prepare(
    job: Job, plan: dict[str, Any], workers: int, console: Console, encode: Callable[[], Encode] | None = None
) -> Index:
    """Makes the shards that are not there yet, then report and index.

    Args:
      workers: processes that make a shard each; with features: threads that read.
      encode: makes the encoder of `job.features`.

    Raises:
      DataError: the directory holds something else, no sample can be used, or the recipe is invalid.
      KeyboardInterrupt: stopped; finished shards stay, and the same call resumes.
    """
    directory = buckets.place(job.to)
    if (directory / INDEX).exists():
        index = Index.read(directory)
        _check_plan(index.plan, plan, directory)
        if _is_current(job, index, plan):
            return index
        console.print(
            f"{directory}: its data has changed since it was prepared: all is made anew",
            highlight=False,
            soft_wrap=True,
        )
        _clear(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / PLAN).exists():
        found = json.loads((directory / PLAN).read_text())
        _check_plan(found, plan, directory)
        if found["samples"] != plan["samples"]:
            seen = f"{found['samples']:,} samples then, {plan['samples']:,} now"
            console.print(
                f"{directory}: its data has changed ({seen}): all is made anew", highlight=False, soft_wrap=True
            )
            _clear(directory)
    buckets.write_text(directory / PLAN, json.dumps(plan))
    done = [number for number in range(job.shards) if job.account(number).exists()]
    stale = [number for number in done if json.loads(job.account(number).read_text()).get("mark") != job.mark(number)]
    if stale:
        seen = f"{len(stale)} of {len(done)} finished shards hold other data than there is now: they are made anew"
        console.print(f"{directory}: {seen}", highlight=False, soft_wrap=True)
    for number in stale:
        job.account(number).unlink()
    missing = [number for number in range(job.shards) if not job.account(number).exists()]
    if len(missing) < job.shards:
        console.print(f"{job.shards - len(missing)} of {job.shards} shards are there", highlight=False)
    columns = (TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(job.samples))
        progress.advance(task, len(job.samples) - sum(len(job.bounds(number)) for number in missing))
        tick = lambda: progress.advance(task)  # noqa: E731
        if encode is not None and missing:
            vision, encoder, vision_encoder = job.config.model.vision, job.encoder(), encode()
            with ThreadPoolExecutor(max(1, workers)) as readers:
                read = functools.partial(with_features, job.samples, encoder, vision, vision_encoder, readers)
                for number in missing:
                    _make_shard(job, number, read, tick)
        elif workers < 2 or len(missing) < 2:
            read = job.with_files(job.encoder())
            for number in missing:
                _make_shard(job, number, read, tick)
        else:
            _in_workers(job, missing, min(workers, len(missing)), lambda count: progress.advance(task, count))
    return _finish(job, plan, directory)


def _check_plan(found: Any, plan: dict[str, Any], directory: epath.Path) -> None:
    """Refuses a directory that was prepared with other settings; data that has changed is not one of them."""
    found = found if isinstance(found, dict) else {}
    same_samples = found.get("samples") == plan["samples"]
    compared = [name for name in plan if name not in ("samples", *(() if same_samples else ("shards",)))]
    names = [name for name in compared if found.get(name) != plan[name]]
    if names:
        seen = "; ".join(f"{name}: {str(found.get(name))[:100]} there, {str(plan[name])[:100]} here" for name in names)
        raise DataError(f"{directory} was prepared otherwise ({seen}); choose another --output, or delete it")


def _is_current(job: Job, index: Index, plan: dict[str, Any]) -> bool:
    """Whether a finished set holds what the source holds now. One of before there were marks does not say so."""
    marks = index.plan.get("marks")
    return index.plan.get("samples") == plan["samples"] and marks == [job.mark(n) for n in range(job.shards)]


def _clear(directory: epath.Path) -> None:
    """Takes a set away, the index first, so that none is ever half old."""
    (directory / INDEX).unlink(missing_ok=True)
    for path in buckets.children(directory):
        if path.name in (PLAN, REPORT, COUNTS) or path.name.startswith("shard-"):
            path.unlink()


def _finish(job: Job, plan: dict[str, Any], directory: epath.Path) -> Index:
    """Writes report and index, the index last."""
    accounts, counts = [], {"tokens": [], "images": []}
    for number in range(job.shards):
        accounts.append(json.loads(job.account(number).read_text()))
        for name in counts:
            counts[name].append(np.array(accounts[-1].pop(name), np.int32))
    tokens, images = map(np.concatenate, counts.values())
    report = [line for account in accounts for line in account[LEFT_OUT]]
    buckets.write_text(directory / REPORT, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in report))
    kept = [account for account in accounts if account["shard"]["samples"]]
    if not kept:
        raise DataError(f"none of {len(job.samples)} samples can be used; {directory / REPORT} says why")
    plan = plan | {"marks": [account["mark"] for account in accounts]}
    # Finished shards of an earlier version, with which this one went on, do not say what they hold.
    contents = tuple(account["content"] for account in kept) if all("content" in each for each in kept) else ()
    shards = tuple(Shard(**account["shard"]) for account in kept)
    index = Index(shards, plan["fingerprint"], plan, tokens, images, contents)
    index.write(directory)
    for number, account in enumerate(accounts):
        job.account(number).unlink()
        if not account["shard"]["samples"]:
            (directory / job.shard_name(number)).unlink()
    (directory / PLAN).unlink()
    return index


# --- Shards ----------------------------------------------------------------------------------------------------------


def _make_shard(job: Job, number: int, read: Read, tick: Callable[[], object]) -> None:
    """Makes one shard and its account of what `read` makes of its samples; calls `tick` after each."""
    account: dict[str, Any] = {"tokens": [], "images": [], LEFT_OUT: [], "mark": job.mark(number)}

    def records() -> Iterator[bytes]:
        for sample in read(job.bounds(number)):
            if isinstance(sample, DataError):
                if not sample.sample_id:  # the recipe is wrong, not the sample
                    raise sample
                account[LEFT_OUT].append({"id": sample.sample_id, "reason": sample.reason})
            else:
                account["tokens"].append(len(sample.encoded.tokens))
                account["images"].append(len(sample.encoded.image_positions))
                yield encode_record(sample.sample, sample.images)
            tick()

    path = buckets.place(job.to) / job.shard_name(number)
    size, account["content"] = write_shard(path, records())
    account["shard"] = dataclasses.asdict(Shard(path.name, len(account["tokens"]), size))
    buckets.write_text(job.account(number), json.dumps(account))


def _image_version(image: ImageSource) -> Any:
    """Changes when a picture is replaced, and not when its folder is moved."""
    if isinstance(image, bytes | np.ndarray):
        return hashlib.sha256(image if isinstance(image, bytes) else image.tobytes()).hexdigest()
    if isinstance(image, StoredImage):
        return os.path.basename(image.name), getattr(image, "version", None)
    try:
        stat = os.stat(image)
    except (OSError, ValueError):
        return "missing"
    return os.path.basename(os.fspath(image)), stat.st_size, stat.st_mtime_ns


# --- Processes -------------------------------------------------------------------------------------------------------


def _in_workers(job: Job, numbers: Sequence[int], workers: int, advance: Callable[[int], object]) -> None:
    """Makes shards in worker processes; when stopped, they end after their current sample."""
    counter, seen = multiprocessing.get_context("spawn").Value("q", 0), 0
    try:
        with worker_pool(workers, _start_worker, job, counter) as pool:
            pending = {pool.submit(_work, number) for number in numbers}
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
                advance(counter.value - seen)
                seen = counter.value
                for future in done:
                    future.result()
    except BrokenProcessPool as error:
        raise DataError("a worker was killed (out of memory?); start again with fewer --workers") from error


class _Stopped(Exception):
    """The main process asked the workers to stop."""


_worker: dict[str, Any] = {}  # what a worker process was started with


def _start_worker(stop: Any, job: Job, counter: Any) -> None:
    _worker.update(job=job, stop=stop, counter=counter, read=job.with_files(job.encoder()))


def _work(number: int) -> None:
    stop, counter = _worker["stop"], _worker["counter"]

    def tick() -> None:
        with counter.get_lock():
            counter.value += 1
        if stop.is_set():
            raise _Stopped

    if not stop.is_set():
        _make_shard(_worker["job"], number, _worker["read"], tick)


def make_job(
    config: Config,
    to: str,
    *,
    stage: str = "finetune",
    split: str = "train",
    source: int | None = None,
    shards: int | None = None,
    image_size: int | None = None,
    features: FeatureSpec | None = None,
) -> tuple[Job, dict[str, Any]]:
    """The job, and the plan that is stored in its directory: the same plan makes the same files."""
    settings = config.stage(stage)
    name = f"{stage}.{SPLITS[split]}"
    listed = getattr(settings, SPLITS[split])
    if source is not None:
        if not 0 <= source < len(listed):
            raise DataError(f"--source={source} is not one of {name}, which lists {len(listed)}")
        listed = listed[source : source + 1]
    if not listed:
        raise DataError(f"{name} is empty: name what to prepare")
    if len({each.weight for each in listed}) > 1:
        raise DataError(
            f"{name} have different weights, which training applies: prepare them one by one with "
            "--source=0, --source=1, ... and give each set its weight"
        )
    if image_size is not None and config.model.vision.grids:
        raise DataError(
            f"--image_size={image_size} makes images smaller, and model.vision.image_mode=anyres chooses a grid by "
            "their own size: leave --image_size out"
        )
    opened = [open_source(each) for each in listed]
    check_sources(opened, listed, features=False)
    warn_of_text_alone(opened, listed)
    samples = Concatenated(opened)
    shards = shards or -(-len(samples) // SAMPLES_PER_SHARD)
    if not 0 < shards <= len(samples):
        raise DataError(f"--shards={shards} of {len(samples)} samples")
    job = Job(to, config, stage, samples, shards, image_size, features)
    encoder = job.encoder()
    warn_of_unknown_words(opened, encoder)
    plan = {
        # A field that is as it was before there was one is left out, so that older sets are still recognised.
        "sources": [
            {name: value for name, value in to_dict(each).items() if name != "allow_absolute" or value}
            for each in listed
        ],
        "samples": len(samples),
        "stage": stage,
        "fingerprint": fingerprint(config, stage, encoder.tokenizer),
        "shards": shards,
        "image_size": image_size,
        "image_mode": config.model.vision.image_mode if image_size else None,
    }
    if features is not None:
        plan["features"] = features.for_plan()
    return job, json.loads(json.dumps(plan))
