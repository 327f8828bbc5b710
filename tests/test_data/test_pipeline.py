"""Rows, batches, their order, and resuming."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saisa_jax.batch import HostBatch
from saisa_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    SourceConfig,
    StageConfig,
    VisionConfig,
    from_config_dict,
    to_config_dict,
)
from saisa_jax.data import pipeline, sources
from saisa_jax.data.rows.collate import Example, pack_rows
from saisa_jax.data.sample import DataError, Sample, Turn
from saisa_jax.data.text.conversation import encode
from saisa_jax.data.text.tokenizer import load_tokenizer

P = 16  # visual tokens of an image of 16 pixels in patches of 4
SIZE = 16


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("easy_vqa")


@pytest.fixture(autouse=True)
def pictures(tmp_path_factory, monkeypatch):
    """A source "tiny" of ten pictures with four questions each; the picture i is of the color (i, i, i)."""
    folder = tmp_path_factory.mktemp("tiny")
    samples = []
    for i in range(10):
        array = np.full((SIZE, SIZE, 3), i, np.uint8)
        array[3:7, 2:5] = 255
        Image.fromarray(array).save(folder / f"{i}.png")
        colors = ("red", "blue", "green", "teal")
        turns = tuple(t for c in colors for t in (Turn("user", f"is it {c}?"), Turn("assistant", f"a {c} shape")))
        samples.append(Sample(f"tiny/{i}", turns, (str(folder / f"{i}.png"),), independent_turns=True))
    monkeypatch.setitem(
        sources.SOURCES._entries, "easy_vqa", lambda config: samples[:5] if config.split == "validation" else samples
    )
    return samples


def _config(batch_size: int = 4, text_length: int = 64, **data) -> Config:
    stage = StageConfig(
        sources=(SourceConfig("easy_vqa"),),
        validation=(SourceConfig("easy_vqa", split="validation"),),
        batch_size=batch_size,
        text_length=text_length,
    )
    return Config(
        model=ModelConfig(max_length=128, vision=VisionConfig(image_size=SIZE, patch_size=4)),
        data=DataConfig(**{"system_prompt": "", "prefetch": 3, "packing": False, "on_long": "raise"} | data),
        pretrain=dataclasses.replace(stage, template="plain"),
        finetune=stage,
    )


def _take(iterator, count: int) -> list[HostBatch]:
    return [next(iterator) for _ in range(count)]


def _assert_same(one: list[HostBatch], two: list[HostBatch]) -> None:
    assert [batch.sample_ids for batch in one] == [batch.sample_ids for batch in two]
    for a, b in zip(one, two, strict=True):
        for name in a.batch:
            np.testing.assert_array_equal(a.batch[name], b.batch[name], err_msg=name)


def _answers(host: HostBatch, row: int, tokenizer) -> str:
    batch = host.batch
    return tokenizer.decode(batch["targets"][row][batch["loss_weights"][row] > 0])


# --- Rows ------------------------------------------------------------------------------------------------------------


def _encoded(tokenizer, *texts: str, patches: int = P):
    return [encode((Turn("user", t), Turn("assistant", "red")), "vicuna_v1", tokenizer, patches, system_prompt="",
                   sample_id=f"row/{i}") for i, t in enumerate(texts)]  # fmt: skip


def test_left_and_right_padding_hold_the_same(tokenizer) -> None:
    encoded = _encoded(tokenizer, "<image> what is it?", "is it red?", "<image> or <image>?")
    picture = np.ones((4, 4, 3), np.uint8)
    images = [[picture], [], [picture, 2 * picture]]
    rows = [[Example(*pair)] for pair in zip(encoded, images, strict=True)]
    right = pack_rows(rows, 20, 3, 4)
    left = pack_rows(rows, 20, 3, 4, padding="left")
    for row, sample in enumerate(encoded):
        count = len(sample.tokens)
        for name in ("tokens", "targets", "loss_weights", "positions", "segment_ids"):
            np.testing.assert_array_equal(right[name][row, :count], left[name][row, -count:])
            assert not right[name][row, count:].any() and not left[name][row, :-count].any()
        np.testing.assert_array_equal(right["tokens"][row, :count], sample.tokens)
        np.testing.assert_array_equal(right["positions"][row, :count], sample.positions)
    for name in ("images", "image_positions", "image_segment_ids"):
        np.testing.assert_array_equal(right[name], left[name])
    assert right["image_segment_ids"].tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 0]]
    assert right["image_positions"].tolist() == [[3, 0, 0], [0, 0, 0], [3, 3 + P + 1, 0]]
    assert right["images"][2, :, 0, 0, 0].tolist() == [1, 2, 0]


def test_rows_of_padding(tokenizer) -> None:
    batch = pack_rows([[Example(*_encoded(tokenizer, "is it red?"), [])]], 20, 1, 4, count=3)
    assert batch["tokens"].shape == (3, 20)
    assert batch["segment_ids"].any(axis=1).tolist() == [True, False, False]


def test_images_that_are_left_out_need_no_slots(tokenizer) -> None:
    """A blind model is asked so; the text keeps its positions. Where there are slots, they have to be enough."""
    (two,) = _encoded(tokenizer, "<image> or <image>?")
    without, slots = (pack_rows([[Example(two, None)]], 20, count, 0) for count in (0, 2))
    assert without["image_segment_ids"].shape == (1, 0) and not slots["image_segment_ids"].any()
    np.testing.assert_array_equal(without["positions"], slots["positions"])
    with pytest.raises(DataError, match="2 images in a row of 1 slots"):
        pack_rows([[Example(two, None)]], 20, 1, 0)


def test_what_does_not_fit_a_row_is_an_error(tokenizer) -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    one, two = _encoded(tokenizer, "<image> what?", "<image> or <image>?")
    with pytest.raises(DataError, match=r"sample 'row/0': .* do not fit a row of 5; raise the stage's text_length"):
        pack_rows([[Example(one, [picture])]], 5, 1, 4)
    with pytest.raises(DataError, match=r"sample 'row/1': 2 images in a row of 1 slots; raise max_images"):
        pack_rows([[Example(two, [picture, picture])]], 20, 1, 4)
    with pytest.raises(DataError, match=r"sample 'row/0': 2 images for 1 image slot"):
        pack_rows([[Example(one, [picture, picture])]], 20, 2, 4)
    with pytest.raises(DataError, match=r"sample 'row/0': an image of \(4, 4, 3\) .*expected \(8, 8, 3\)"):
        pack_rows([[Example(one, [picture])]], 20, 2, 8)
    with pytest.raises(DataError, match=r"neither right nor left"):
        pack_rows([[Example(one, [picture])]], 20, 2, 8, padding="both")


# --- Batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_of_the_demo(tokenizer, monkeypatch) -> None:
    monkeypatch.undo()
    config = Config(
        model=ModelConfig(max_length=512, vision=VisionConfig(image_size=64, patch_size=8)),
        data=DataConfig(system_prompt="", packing=False),
        pretrain=StageConfig(
            sources=(SourceConfig("easy_vqa", task="caption"),),
            template="plain",
            batch_size=8,
            text_length=16,
            steps=7,
        ),
        finetune=StageConfig(sources=(SourceConfig("easy_vqa"),), batch_size=8, text_length=300, epochs=2),
    )
    assert pipeline.StageData(config, "pretrain", tokenizer).steps == 7
    assert pipeline.StageData(config, "finetune", tokenizer).steps == 2 * 3800 // 8
    for stage, text in (("pretrain", (8, 16)), ("finetune", (8, 300))):
        host = next(pipeline.StageData(config, stage, tokenizer).batches())
        batch = host.batch
        assert {name: value.shape for name, value in batch.items()} == {
            **dict.fromkeys(("tokens", "targets", "loss_weights", "positions", "segment_ids"), text),
            "images": (8, 1, 64, 64, 3), "image_positions": (8, 1), "image_segment_ids": (8, 1),
        }  # fmt: skip
        assert all(name.startswith("easy_vqa/train/") for (name,) in host.sample_ids)
        assert (batch["image_segment_ids"] == 1).all()
        assert (batch["image_positions"] == (1 if stage == "pretrain" else 3)).all()
        assert (batch["positions"].max(1) == batch["segment_ids"].sum(1) + 64 - 1).all()


def test_every_epoch_shows_every_sample_once_in_another_order(tokenizer) -> None:
    ids = [
        name
        for host in _take(pipeline.StageData(_config(), "finetune", tokenizer).batches(), 10)
        for (name,) in host.sample_ids
    ]
    epochs = [ids[start : start + 10] for start in range(0, 40, 10)]
    assert all(len(set(epoch)) == 10 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_seeds_and_stages_differ_and_repeat(tokenizer) -> None:
    def ids(seed: int, stage: str) -> list[tuple[str, ...]]:
        config = dataclasses.replace(_config(), seed=seed)
        return [host.sample_ids for host in _take(pipeline.StageData(config, stage, tokenizer).batches(), 5)]

    assert ids(0, "finetune") == ids(0, "finetune")
    assert len({str(ids(seed, stage)) for seed in (0, 1, 2) for stage in ("pretrain", "finetune")}) == 6


def test_turns_are_shuffled_and_chosen_anew_in_each_epoch(tokenizer) -> None:
    hosts = _take(pipeline.StageData(_config(10), "finetune", tokenizer).batches(), 6)
    orders = {_answers(host, host.sample_ids.index(("tiny/3",)), tokenizer) for host in hosts}
    assert len(orders) > 3
    words = Counter([*("a", "shape") * 4, "red", "blue", "green", "teal"])
    assert all(Counter(order.replace("</s>", "").split()) == words for order in orders)


@pytest.mark.parametrize("limit", [1, 3])
def test_fewer_turns(tokenizer, limit: int) -> None:
    hosts = _take(pipeline.StageData(_config(10, turns_per_sample=limit), "finetune", tokenizer).batches(), 8)
    answers = [_answers(host, row, tokenizer).replace("</s>", "").split() for host in hosts for row in range(10)]
    assert all(words.count("shape") == limit for words in answers)
    seen = Counter(word for words in answers for word in words if word not in ("a", "shape"))
    assert len(seen) == 4 and min(seen.values()) > 80 * limit / 4 / 3


def test_turns_that_depend_on_one_another_stay(tokenizer, pictures) -> None:
    pictures[:] = [dataclasses.replace(sample, independent_turns=False) for sample in pictures]
    host = next(pipeline.StageData(_config(turns_per_sample=1), "finetune", tokenizer).batches())
    assert _answers(host, 0, tokenizer) == "a red shape</s> a blue shape</s> a green shape</s> a teal shape</s>"


def test_threads_do_not_change_the_order(tokenizer) -> None:
    alone = _take(pipeline.StageData(_config(num_threads=0, augment=True), "finetune", tokenizer).batches(), 12)
    for threads in (1, 4):
        _assert_same(
            alone,
            _take(pipeline.StageData(_config(num_threads=threads, augment=True), "finetune", tokenizer).batches(), 12),
        )


def test_processes_part_each_batch_as_their_devices_hold_it(tokenizer) -> None:
    config = _config(6, augment=True, turns_per_sample=2)
    whole = _take(pipeline.StageData(config, "finetune", tokenizer).batches(), 7)
    owned = ((0, 1), (2, 3), (2, 3), (0, 4, 5))  # two processes may hold the same rows, and rows that lie apart
    shares = [_take(pipeline.StageData(config, "finetune", tokenizer).batches(own=own), 7) for own in owned]
    for own, share in zip(owned, shares, strict=True):
        for host, part in zip(whole, share, strict=True):
            assert part.sample_ids == tuple(host.sample_ids[row] for row in own)
            np.testing.assert_array_equal(part.lost, host.lost[list(own)])
            for name in host.batch:
                np.testing.assert_array_equal(part.batch[name], host.batch[name][list(own)])


def test_padding_has_the_shape_of_the_next_batch(tokenizer) -> None:
    data = pipeline.StageData(_config(), "finetune", tokenizer).batches(own=(1, 2))
    padding, host = data.padding(), next(data)
    assert {n: (x.shape, x.dtype) for n, x in padding.batch.items()} == {
        n: (x.shape, x.dtype) for n, x in host.batch.items()
    }
    assert not padding.lost.any() and not padding.batch["segment_ids"].any()


def test_impossible_rows(tokenizer) -> None:
    for own in ((), (3, 4)):
        with pytest.raises(DataError, match=r"are not among those of finetune.batch_size=4"):
            pipeline.StageData(_config(), "finetune", tokenizer).batches(own=own)


# --- Resuming --------------------------------------------------------------------------------------------------------


def test_resume_after_any_count_with_any_threads(tokenizer) -> None:
    reference = _take(
        pipeline.StageData(_config(augment=True, turns_per_sample=2), "finetune", tokenizer).batches(), 24
    )
    rng = np.random.default_rng(0)
    for before, after in ((2, 2), (0, 4), (4, 1), (1, 0)):
        count = int(rng.integers(0, 20))
        first = pipeline.StageData(
            _config(augment=True, turns_per_sample=2, num_threads=before), "finetune", tokenizer
        ).batches()
        _take(first, count)
        second = pipeline.StageData(
            _config(augment=True, turns_per_sample=2, num_threads=after), "finetune", tokenizer
        ).batches()
        second.set_state(first.get_state())
        _assert_same(reference[count : count + 4], _take(second, 4))


# --- Blind, augmented, held out --------------------------------------------------------------------------------------


def test_blind_leaves_the_slots_empty_and_the_positions_alone(tokenizer) -> None:
    seeing = _take(pipeline.StageData(_config(), "finetune", tokenizer).batches(), 3)
    for one, two in zip(
        seeing, _take(pipeline.StageData(_config(blind=True), "finetune", tokenizer).batches(), 3), strict=True
    ):
        assert not two.batch["image_segment_ids"].any() and not two.batch["images"].any()
        for name in ("tokens", "targets", "loss_weights", "positions", "segment_ids", "image_positions"):
            np.testing.assert_array_equal(one.batch[name], two.batch[name])


def test_augmented_pictures_change_from_epoch_to_epoch(tokenizer) -> None:
    hosts = _take(pipeline.StageData(_config(10, augment=True), "finetune", tokenizer).batches(), 8)
    seen = set()
    for host in hosts:
        picture = host.batch["images"][host.sample_ids.index(("tiny/3",)), 0]
        assert sorted(np.unique(picture).tolist()) == [3, 255]
        assert (picture == 255).all(-1).sum() == 12
        seen.add(picture.tobytes())
    assert len(seen) > 4
    plain = next(pipeline.StageData(_config(10), "finetune", tokenizer).batches())
    assert (plain.batch["images"][plain.sample_ids.index(("tiny/3",)), 0, 3:7, 2:5] == 255).all()


def test_eval_batches_are_always_the_same(tokenizer) -> None:
    config = _config(augment=True, turns_per_sample=2)
    batches = pipeline.StageData(config, "finetune", tokenizer).held_out(8)
    assert [len(host.batch["tokens"]) for host in batches] == [4, 4]
    assert batches[1].sample_ids[1:] == ((), (), ())
    assert not batches[1].batch["segment_ids"][1:].any()
    assert sorted(batches[0].sample_ids + batches[1].sample_ids[:1]) == [(f"tiny/{i}",) for i in range(5)]
    _assert_same(batches, pipeline.StageData(config, "finetune", tokenizer).held_out(8))
    _assert_same(batches[:1], pipeline.StageData(config, "finetune", tokenizer).held_out(1))
    assert all(
        (host.batch["images"][row, 0, 3:7, 2:5] == 255).all() for host, row in ((batches[0], 0), (batches[1], 0))
    )


def test_steps_in_stage(tokenizer) -> None:
    config = _config(4)
    assert pipeline.StageData(config, "finetune", tokenizer).steps == 2
    for change, expected in (({"epochs": 4.0}, 10), ({"epochs": 0.5}, 1), ({"steps": 77}, 77)):
        stage = dataclasses.replace(config.finetune, **change)
        assert pipeline.StageData(dataclasses.replace(config, finetune=stage), "finetune", tokenizer).steps == expected
    with pytest.raises(
        DataError, match=r"finetune.epochs=1.0 of 10 samples hold 10 rows and no batch of 16; lower finetune.batch"
    ):
        _ = pipeline.StageData(_config(16), "finetune", tokenizer).steps


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, 2])
def test_errors_come_out_of_the_threads(tokenizer, pictures, threads: int) -> None:
    config = _config(num_threads=threads)
    os.remove(pictures[7].images[0])
    with pytest.raises(DataError, match=r"sample 'tiny/7': there is no image .*7.png"):
        _take(pipeline.StageData(config, "finetune", tokenizer).batches(), 3)
    with pytest.raises(DataError, match=r"sample 'tiny/.': .* raise the stage's text_length"):
        next(pipeline.StageData(_config(text_length=40, num_threads=threads), "finetune", tokenizer).batches())


def test_too_long_with_its_images(tokenizer) -> None:
    config = _config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, max_length=64))
    with pytest.raises(DataError, match=r"sample 'tiny/.': .* positions .* exceed model.max_length=64"):
        next(pipeline.StageData(config, "finetune", tokenizer).batches())


def test_a_source_without_samples(tokenizer, monkeypatch) -> None:
    monkeypatch.setitem(sources.SOURCES._entries, "easy_vqa", lambda config: [])
    with pytest.raises(DataError, match=r"source easy_vqa:vqa holds no samples"):
        pipeline.StageData(_config(), "finetune", tokenizer).batches()


def test_turns_per_sample_is_a_flag() -> None:
    settings = to_config_dict(Config())
    assert settings.data.turns_per_sample is None
    settings.data.packing = False
    settings.data.turns_per_sample = 1
    assert from_config_dict(Config, settings).data.turns_per_sample == 1
    settings.data.turns_per_sample = 0
    with pytest.raises(ValueError, match=r"data.turns_per_sample=0 must be positive"):
        from_config_dict(Config, settings)


@pytest.mark.parametrize(("answer", "told"), [("a zebra", True), ("a red circle", False)])
def test_words_that_the_tokenizer_does_not_know_are_told_of(tokenizer, monkeypatch, caplog, answer, told) -> None:
    turns = (Turn("user", "is there a red shape?"), Turn("assistant", answer))
    monkeypatch.setitem(sources.SOURCES._entries, "easy_vqa", lambda config: [Sample("one", turns, ())] * 3)
    with caplog.at_level("WARNING", "absl"):
        _ = pipeline.StageData(_config(), "finetune", tokenizer).rows
    text = r"finetune: 7.1% of 42 text tokens .* are '<unk>'.* is data.tokenizer='easy_vqa' the model's own"
    assert bool(re.search(text, caplog.text)) == told


START = """
import dataclasses, json, resource, sys, time
from pathlib import Path
import numpy as np
from etils import epath
from saisa_jax.config import SourceConfig
from saisa_jax.data.pipeline import StageData
from saisa_jax.data.rows.counts import fingerprint
from saisa_jax.data.sources.shards import Index, Shard
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.planning.lengths import llava_finetune
from saisa_jax.testing.configs import packed_config

number, folder, config = int(sys.argv[1]), Path(sys.argv[2]), packed_config()
stage = dataclasses.replace(
    config.finetune, sources=(SourceConfig("arrayrecord", str(folder)),), steps=None, text_length=2048, max_images=8,
    batch_size=16,
)
config = dataclasses.replace(config, finetune=stage, model=dataclasses.replace(config.model, max_length=8192))
tokenizer = load_tokenizer(config.data.tokenizer)
if not folder.exists():  # an index as `data prepare` writes it, and files of the sizes that it says
    folder.mkdir()
    shards = []
    for start in range(0, number, 4096):
        shards.append(Shard(f"{start}.arrayrecord", min(4096, number - start), 8))
        (folder / shards[-1].name).write_bytes(b"no shard")
    small = llava_finetune(1_000_000, 62_500)
    tokens, images = (np.tile(count, -(-number // len(count)))[:number] for count in small)
    digests = tuple(["0" * 16] * len(shards))
    index = Index(tuple(shards), fingerprint(config, "finetune", tokenizer), {}, tokens, images, digests)
    index.write(epath.Path(folder))
    sys.exit()
memory = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
imports, began, wall = memory(), time.process_time(), time.monotonic()
data = StageData(config, "finetune", tokenizer, "unused")
steps, mark = data.steps, data.mark
batches = data.batches()
state = batches.get_state()
first = data.rows.plans.at(0)
print(json.dumps({"steps": steps, "seconds": time.process_time() - began, "wall": time.monotonic() - wall,
                  "MiB": memory() - imports, "rows": len(first.rows)}))
"""


def start_with(samples: int, folder: Path) -> dict[str, float]:
    """What everything before the first step takes with a prepared set of so many samples."""
    command = [sys.executable, "-c", START, str(samples), str(folder)]
    subprocess.run(command, check=True)
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_start_with_ten_million_samples(tmp_path) -> None:
    """CPU seconds and memory grow far slower than the samples: 100 million take under 60 and 2 GiB (docs/data.md)."""
    small, large = (start_with(samples, tmp_path / str(samples)) for samples in (1_000_000, 10_000_000))
    assert large["steps"] == pytest.approx(10 * small["steps"], rel=0.01)
    assert large["seconds"] < min(30, 4 * small["seconds"]) and large["MiB"] < 700
