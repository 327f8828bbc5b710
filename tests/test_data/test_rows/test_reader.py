"""Plans of rows, mixtures, packed rows and their resumption, samples that cannot be used."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from saisa_jax.batch import HostBatch
from saisa_jax.config import Config, ConfigError, DataConfig, ModelConfig, SourceConfig, StageConfig, VisionConfig
from saisa_jax.data import pipeline, sources
from saisa_jax.data.rows import counting, counts
from saisa_jax.data.rows.order import Order
from saisa_jax.data.rows.packing import group, pack
from saisa_jax.data.rows.plans import RowPlans
from saisa_jax.data.sample import DataError, Sample, Turn
from saisa_jax.data.text.tokenizer import load_tokenizer

P, SIZE = 4, 8  # visual tokens of an image of 8 pixels in patches of 4
WORDS = ["red", "blue", "green", "teal", "circle", "what", "is", "the", "color", "of"]


def picture(color: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((SIZE, SIZE, 3), color, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def make_samples(count: int, seed: int = 0) -> list[Sample]:
    """Conversations of one to three turns of random length with no, one or two images; sample i's are of color i."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        words = lambda: " ".join(rng.choice(WORDS, rng.integers(1, 6)))  # noqa: E731
        images = i % 3
        turns = [Turn("user" if n % 2 == 0 else "assistant", words()) for n in range(2 * int(rng.integers(1, 4)))]
        turns[0] = Turn("user", "<image> " * images + turns[0].text)
        samples.append(Sample(f"s/{i}", tuple(turns), (picture(i),) * images))
    return samples


class Named:
    """Sources of a test, by the `task` of their configuration; a class of a module, so that workers can have it."""

    table: dict[str, list[Sample]]

    def __init__(self) -> None:
        self.table = {}

    def __call__(self, config: SourceConfig) -> list[Sample]:
        return self.table[config.task]


@pytest.fixture(autouse=True)
def table(monkeypatch) -> dict[str, list[Sample]]:
    named = Named()
    named.table["vqa"] = make_samples(40)
    monkeypatch.setitem(sources.SOURCES._entries, "easy_vqa", named)
    return named.table


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("easy_vqa")


def make_config(
    batch_size: int = 3, text_length: int = 100, max_images: int = 4, epochs: float = 1.0, **data
) -> Config:
    mixture = data.pop("sources", (SourceConfig("easy_vqa"),))
    stage = StageConfig(
        sources=mixture, batch_size=batch_size, text_length=text_length, max_images=max_images, epochs=epochs
    )
    return Config(
        model=ModelConfig(max_length=200, vision=VisionConfig(image_size=SIZE, patch_size=4)),
        data=DataConfig(**{"system_prompt": "", "prefetch": 2, "num_threads": 0} | data),
        pretrain=stage,
        finetune=stage,
    )


def iterator(config: Config, tokenizer, **shard) -> pipeline.TrainIterator:
    return pipeline.StageData(config, "finetune", tokenizer).batches(**shard)


def epoch_rows(config: Config, tokenizer) -> int:
    return pipeline.StageData(config, "finetune", tokenizer).rows.plans.rows_in(1)


def take(batches, count: int) -> list[HostBatch]:
    return [next(batches) for _ in range(count)]


def assert_same(one: list[HostBatch], two: list[HostBatch]) -> None:
    assert [host[1:3] for host in one] == [host[1:3] for host in two]
    np.testing.assert_array_equal([host.lost for host in one], [host.lost for host in two])
    for a, b in zip(one, two, strict=True):
        for name in a.batch:
            assert a.batch[name].tobytes() == b.batch[name].tobytes(), name


# --- Plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_holds_every_sample_once_and_nothing_overflows() -> None:
    rng = np.random.default_rng(0)
    tokens, images = rng.integers(1, 300, 2000).astype(np.int32), rng.integers(0, 3, 2000).astype(np.int32)
    plan = pack(tokens, images, 512, 4, [1], window=500)
    assert sorted(plan.places.tolist()) == list(range(2000))
    for row in range(len(plan)):
        assert tokens[plan[row]].sum() <= 512 and images[plan[row]].sum() <= 4
        assert (np.diff(plan[row]) > 0).all() and np.ptp(plan[row]) < 500  # in the epoch's order, of one window
    least = max(tokens.sum() / 512, images.sum() / 4)
    assert len(plan) < 1.05 * least + 4  # one row of each window may be nearly empty
    again = pack(tokens, images, 512, 4, [1], window=500)
    np.testing.assert_array_equal(plan.places, again.places)
    assert pack(tokens, images, 512, 4, [2], window=500).places.tolist() != plan.places.tolist()
    assert len(pack(tokens[:0], images[:0], 512, 4, [1])) == 0


def test_groups_are_of_like_length_and_one_kind() -> None:
    rng = np.random.default_rng(0)
    tokens, images = rng.integers(1, 300, 403).astype(np.int32), rng.integers(0, 2, 403).astype(np.int32)
    batches = group(tokens, images, 10, [0]).reshape(-1, 10)
    assert len(batches) == 40 and len(set(batches.ravel())) == 400
    assert sum(len(set(images[batch])) > 1 for batch in batches) <= 1
    assert np.mean([np.ptp(tokens[batch]) for batch in batches]) < 30


def test_an_epoch_takes_of_each_source_what_its_weight_says() -> None:
    order = Order((10, 8), (1.0, 0.5), seed=3)
    first, second = order(0), order(1)
    assert len(first) == order.size(0) == 14
    assert sorted(n for n in first if n < 10) == sorted(n for n in second if n < 10) == list(range(10))
    halves = [[n for n in epoch if n >= 10] for epoch in (first, second)]
    assert sorted(halves[0] + halves[1]) == list(range(10, 18))  # the other half
    assert first.tolist() != second.tolist()
    assert Counter(Order((4,), (2.5,), 0)(0).tolist()).most_common() and Order((4,), (2.5,), 0).size(0) == 10
    assert max(Counter(Order((4,), (2.5,), 0)(0).tolist()).values()) == 3
    assert Order((3, 5), (0.0, 1.0), 0)(7).min() == 3
    # Weights that no binary fraction holds still come out even.
    assert sum(Order((1000,), (0.1,), 0).size(epoch) for epoch in range(10)) == 1000


def test_an_epoch_of_one_block_is_in_the_order_of_earlier_versions() -> None:
    """Runs that were begun with them go on to the bit."""
    rng = lambda *key: np.random.default_rng([3, *key])  # noqa: E731
    second_half = rng(2, 0, 1).permutation(8)[4:] + 10
    numbers = np.concatenate([rng(1, 1, 1).permutation(10), second_half])
    expected = numbers[rng(1).permutation(14)]
    assert Order((10, 8), (1.0, 0.5), 3)(1).tolist() == expected.tolist()
    tokens, images = np.arange(18, dtype=np.int32) % 5 + 20, np.arange(18, dtype=np.int32) % 3
    plans = RowPlans(Config(), Order((10, 8), (1.0, 0.5), 3), (tokens, images), 100, 4, 2)
    packed = pack(tokens[expected], images[expected], 100, 4, [3, 2, 1])
    assert plans.at(plans.rows_in(1)).rows.places.tolist() == packed.places.tolist()


def test_an_epoch_of_several_blocks() -> None:
    """Each sample once, every block with its share of every source, and with few of the files of a large one."""
    ends = np.arange(10, 401, 10)  # files of 10 samples
    order = Order((400, 30), (1.0, 2.0), 0, 100, (ends, None))
    blocks = [[order(epoch, block) for block in range(order.blocks(epoch))] for epoch in (0, 1)]
    assert [len(block) for block in blocks[0]] == [92] * 5 == [order.size(0, block) for block in range(5)]
    for epoch in (0, 1):
        assert Counter(np.concatenate(blocks[epoch]).tolist()) == {n: 1 if n < 400 else 2 for n in range(430)}
        for number, block in enumerate(blocks[epoch]):
            assert (block >= 400).sum() == 12 and order.before(epoch, number) == 92 * number
            assert len(set(block[block < 400] // 10)) == 8  # 80 samples
            assert (np.diff(block) != 1).mean() > 0.9
    assert blocks[0][0].tolist() != blocks[1][0].tolist()


def test_an_epoch_of_several_blocks_is_reckoned() -> None:
    rng = np.random.default_rng(0)
    tokens, images = rng.integers(1, 300, 30000).astype(np.int32), rng.integers(0, 3, 30000).astype(np.int32)
    tokens[::100] = 0  # cannot be used
    plans = RowPlans(Config(), Order((30000,), (1.0,), 0, 8192), (tokens, images), 512, 4, 2)
    rows = plans.rows_in(1)
    stop = 0
    for _ in range(plans.order.blocks(0)):
        stop = plans.at(stop).stop
    assert plans.at(stop).start[:2] == (1, 0) and abs(rows / stop - 1) < 0.01
    assert plans.samples_before(stop) == 29700 and abs(plans.samples_about(stop) - 29700) < 300


def test_weights_that_sum_to_nothing() -> None:
    with pytest.raises(ConfigError, match=r"sources: weights \[0.0, 0.0\] sum to nothing"):
        StageConfig(sources=(SourceConfig("easy_vqa", weight=0.0),) * 2)
    with pytest.raises(ConfigError, match=r"weight=-1.0"):
        SourceConfig("easy_vqa", weight=-1.0)


# --- Packed rows -----------------------------------------------------------------------------------------------------


def test_packed_rows_hold_what_single_rows_hold(tokenizer) -> None:
    packed = take(iterator(make_config(), tokenizer), 6)
    assert max(len(ids) for host in packed for ids in host.sample_ids) > 2
    single = {
        host.sample_ids[0][0]: host.batch for host in take(iterator(make_config(1, 100, packing=False), tokenizer), 40)
    }
    seen = set()
    for host in packed:
        for row, ids in enumerate(host.sample_ids):
            batch = {name: value[row] for name, value in host.batch.items()}
            assert set(batch["segment_ids"]) - {0} == set(range(1, len(ids) + 1))
            for segment, name in enumerate(ids, start=1):
                alone = {key: value[0] for key, value in single[name].items()}
                for keys, mask in ((("tokens", "targets", "loss_weights", "positions"), "segment_ids"),
                                   (("images", "image_positions"), "image_segment_ids")):  # fmt: skip
                    for key in keys:
                        np.testing.assert_array_equal(batch[key][batch[mask] == segment], alone[key][alone[mask] == 1])
                seen.add(name)
    assert len(seen) > 20


def test_packed_epochs(tokenizer) -> None:
    config = make_config(epochs=2.0)
    rows = pipeline.StageData(config, "finetune", tokenizer).rows
    ids = [
        [name for row in range(rows.plans.rows_in(e), rows.plans.rows_in(e + 1)) for name in rows[row].sample_ids]
        for e in (0, 1)
    ]
    assert sorted(ids[0]) == sorted(ids[1]) == sorted(f"s/{i}" for i in range(40)) and ids[0] != ids[1]
    assert pipeline.StageData(config, "finetune", tokenizer).steps == rows.plans.rows_in(2) // 3
    assert (
        rows.plans.samples_before(rows.plans.rows_in(1)) == 40
        and rows.plans.samples_before(rows.plans.rows_in(2) - 1) < 80
    )
    assert rows.plans.rows_in(0.5) == rows.plans.rows_in(1) // 2


def test_turns_chosen_anew_cannot_be_packed() -> None:
    with pytest.raises(ConfigError, match=r"data.turns_per_sample .* data.packing=False"):
        DataConfig(turns_per_sample=1)
    with pytest.raises(ConfigError, match=r"group_by_length=True needs data.packing=False"):
        DataConfig(group_by_length=True)


def test_grouped_batches_are_as_short_as_they_can_be(tokenizer) -> None:
    config = make_config(4, 128, 4, packing=False, group_by_length=True)
    shapes = set()
    for host in take(iterator(config, tokenizer), 30):
        length, slots = host.batch["tokens"].shape[1], host.batch["images"].shape[1]
        shapes.add((length, slots))
        longest = (host.batch["segment_ids"] > 0).sum(1).max()
        assert longest <= length and (length == 16 or longest > length // 2)
        assert slots == (4 if host.batch["image_segment_ids"].any() else 0)
        assert all(len(ids) == 1 for ids in host.sample_ids)
    assert len(shapes) > 2
    shards = [take(iterator(config, tokenizer, own=own), 10) for own in ((0, 1), (2, 3))]
    assert all(a.batch["tokens"].shape == b.batch["tokens"].shape for a, b in zip(*shards, strict=True))


# --- Resuming --------------------------------------------------------------------------------------------------------


MIXTURE = (SourceConfig("easy_vqa"), SourceConfig("easy_vqa", task="other", weight=0.7))


def test_resume_after_any_number_of_batches(tokenizer, table) -> None:
    table["other"] = make_samples(25, seed=1)
    config = make_config(sources=MIXTURE, augment=True)
    reference = take(iterator(config, tokenizer), 54)
    rng = np.random.default_rng(0)
    for stop in rng.choice(51, 50, replace=False):
        first = iterator(config, tokenizer)
        first.set_state({"next_row": 3 * max(0, int(stop) - 1)})
        take(first, min(int(stop), 1))  # in the middle of being read
        threads = int(rng.integers(0, 4))
        second = iterator(make_config(sources=MIXTURE, augment=True, num_threads=threads), tokenizer)
        second.set_state(first.get_state())
        assert_same(reference[stop : stop + 2], take(second, 2))
        second.close()
    with pytest.raises(DataError, match=r"row 7 is not the start of a batch of 3"):
        second.set_state({"next_row": 7})


@pytest.mark.parametrize("kind", [{}, {"packing": False}, {"packing": False, "group_by_length": True}])
def test_resume_in_any_block(tokenizer, monkeypatch, kind) -> None:
    """Nothing of the blocks before is planned."""
    config = make_config(**kind, shuffle_block_size=9)
    reference = iterator(config, tokenizer)
    hosts, states = [], [reference.get_state()]
    for _ in range(30):
        hosts.append(next(reference))
        states.append(json.loads(json.dumps(reference.get_state())))
    assert max(state["block"][0] for state in states) >= 1 and max(state["block"][1] for state in states) == 4
    planned = []
    make = RowPlans._make
    monkeypatch.setattr(RowPlans, "_make", lambda *key: planned.append(key[1:]) or make(*key))
    for stop in (1, 11, 29):
        data = pipeline.StageData(config, "finetune", tokenizer)
        resumed, _ = data.batches(), planned.clear()
        resumed.set_state(states[stop])
        assert_same(hosts[stop : stop + 1], take(resumed, 1))
        resumed.close()
        assert min(planned) >= tuple(states[stop]["block"][:2])


def test_another_size_of_blocks_is_another_order(tokenizer, tmp_path) -> None:
    marks = [
        pipeline.StageData(make_config(shuffle_block_size=size), "finetune", tokenizer, str(tmp_path)).mark
        for size in (9, 20, 40, 2**20)
    ]
    assert marks[0] != marks[1] and marks[2] == marks[3] and "shuffle_block_size" not in marks[3]


def test_resume_with_other_workers_and_hosts(tokenizer) -> None:
    """One worker process, then two, then none; one host, then two."""
    make = lambda workers: make_config(4, sources=(SourceConfig("easy_vqa", task="vqa"),), num_workers=workers)  # noqa: E731
    reference = take(iterator(make(0), tokenizer), 6)
    state = {"next_row": 0}
    for workers, start in ((1, 0), (2, 2), (0, 4)):
        batches = iterator(make(workers), tokenizer)
        batches.set_state(state)
        assert_same(reference[start : start + 2], take(batches, 2))
        state = batches.get_state()
        batches.close()
    halves = [iterator(make(0), tokenizer, own=own) for own in ((0, 1), (2, 3))]
    for half in halves:
        half.set_state({"next_row": 8})
    for whole, one, two in zip(reference[2:4], take(halves[0], 2), take(halves[1], 2), strict=True):
        assert whole.sample_ids == one.sample_ids + two.sample_ids
        for name, value in whole.batch.items():
            np.testing.assert_array_equal(value, np.concatenate([one.batch[name], two.batch[name]]))


def test_counts_are_kept_from_one_start_to_the_next(tokenizer, tmp_path, monkeypatch) -> None:
    reference = pipeline.StageData(make_config(), "finetune", tokenizer, str(tmp_path)).rows
    monkeypatch.setattr(counting, "count", None)  # may not be called
    again = pipeline.StageData(make_config(), "finetune", tokenizer, str(tmp_path)).rows
    assert again.plans.at(0).rows.places.tolist() == reference.plans.at(0).rows.places.tolist()
    other = dataclasses.replace(make_config(), data=dataclasses.replace(make_config().data, system_prompt="be kind"))
    assert counts.fingerprint(other, "finetune", tokenizer) != counts.fingerprint(make_config(), "finetune", tokenizer)


# --- What cannot be used ---------------------------------------------------------------------------------------------


def broken(table) -> None:
    """Sample 4's image is cut, sample 7 has an empty answer, sample 9 two turns of a role."""
    samples = table["vqa"]
    samples[4] = dataclasses.replace(samples[4], images=(samples[4].images[0][:40],))
    samples[7] = dataclasses.replace(samples[7], turns=(Turn("user", "what?"), Turn("assistant", " ")))
    samples[9] = dataclasses.replace(samples[9], turns=(Turn("user", "what?"), Turn("user", "is")))


@pytest.mark.parametrize("packing", [True, False])
def test_dropped_samples_leave_empty_segments(tokenizer, table, packing: bool) -> None:
    broken(table)
    config = make_config(4, packing=packing, on_error="drop", max_drop=0.1)
    rows = pipeline.StageData(config, "finetune", tokenizer).rows
    hosts = take(iterator(config, tokenizer), rows.plans.rows_in(1) // 4)
    dropped = [reason for host in hosts for reason in host.dropped]
    known = ["s/4"] if packing else ["s/4", "s/7", "s/9"]  # packed: the others are not in the plan
    for name in known:
        assert sum(name in reason for reason in dropped) == 1
        ((host, row, segment),) = [
            (host, row, ids.index(name) + 1)
            for host in hosts for row, ids in enumerate(host.sample_ids) if name in ids
        ]  # fmt: skip
        assert not (host.batch["segment_ids"][row] == segment).any()
        assert not (host.batch["image_segment_ids"][row] == segment).any()
    assert sum(host.num_samples for host in hosts) == sum(len(ids) for h in hosts for ids in h.sample_ids) - len(known)
    if packing:
        assert not {"s/7", "s/9"} & {name for host in hosts for ids in host.sample_ids for name in ids}


@pytest.mark.parametrize("packing", [True, False])
def test_or_are_an_error(tokenizer, table, packing: bool) -> None:
    broken(table)
    config = make_config(4, packing=packing)
    with pytest.raises(DataError, match=r"sample 's/(4|7|9)'"):
        take(iterator(config, tokenizer), 10)


@pytest.mark.parametrize("packing", [True, False])
def test_long_samples(tokenizer, table, packing: bool) -> None:
    long = " ".join(["red"] * 150)
    table["vqa"][5] = Sample("s/5", (Turn("user", "what?"), Turn("assistant", long)), ())
    config = make_config(4, packing=packing)
    hosts = take(
        iterator(config, tokenizer), pipeline.StageData(config, "finetune", tokenizer).rows.plans.rows_in(1) // 4
    )
    assert sum(host.cut_tokens for host in hosts) > 50
    with pytest.raises(DataError, match=r"sample 's/5': .* raise the stage's text_length"):
        take(iterator(make_config(4, packing=packing, on_long="raise"), tokenizer), 10)
    config = make_config(4, packing=packing, on_long="drop")
    hosts = take(
        iterator(config, tokenizer), pipeline.StageData(config, "finetune", tokenizer).rows.plans.rows_in(1) // 4
    )
    assert not any(host.cut_tokens for host in hosts)
    assert sum("s/5" in reason for host in hosts for reason in host.dropped) == (0 if packing else 1)


def test_more_images_than_slots(tokenizer) -> None:
    with pytest.raises(DataError, match=r"2 images in a row of 1 slots; raise finetune.max_images"):
        iterator(make_config(max_images=1), tokenizer)
    rows = pipeline.StageData(make_config(max_images=1, on_error="drop", max_drop=0.5), "finetune", tokenizer).rows
    assert len(rows.plans.at(0).rows.places) == 27


def test_all_that_cannot_be_used_is_told_at_the_start(tokenizer, table, tmp_path, caplog) -> None:
    """Missing pictures and answers beyond the row, before anything is read: their number, and the first ten."""
    samples = table["vqa"]
    for i in range(12):
        samples[i] = dataclasses.replace(samples[i], images=(str(tmp_path / f"{i}.png"),) * len(samples[i].images))
    bad = sum(bool(sample.images) for sample in samples[:12])
    Image.new("RGB", (4, 4)).save(tmp_path / "1.gif")
    long = " ".join(["red"] * 150)
    samples[20] = Sample("s/20", (Turn("user", long), Turn("assistant", "red")), ())
    with pytest.raises(
        DataError, match=rf"{bad + 1} of 40 samples cannot be used: .*config.data.on_error=drop"
    ) as error:
        iterator(make_config(), tokenizer)
    assert "there is no image" in str(error.value) and "1.gif' is there" in str(error.value)
    assert str(error.value).count("sample '") == min(10, bad + 1)
    drop = {"on_error": "drop", "num_threads": 0}
    with pytest.raises(DataError, match=rf"{bad + 1} of 40 samples .* more than --config.data.max_drop=0.01"):
        iterator(make_config(**drop), tokenizer)
    with caplog.at_level("WARNING", "absl"):
        rows = pipeline.StageData(make_config(**drop, max_drop=0.9), "finetune", tokenizer).rows
    assert rows.left_out == bad + 1 and f"{bad + 1} of 40 samples cannot be used" in caplog.text


def test_counts_that_were_kept_know_what_cannot_be_used(tokenizer, table, tmp_path) -> None:
    """Left out with on_error=drop, told of again with raise, and counted again when it was mended."""
    good = table["vqa"][9]
    broken(table)
    make = lambda policy: pipeline.StageData(  # noqa: E731
        make_config(on_error=policy, max_drop=0.1), "finetune", tokenizer, str(tmp_path)
    )
    assert make("drop").rows.left_out == make("drop").rows.left_out == 2
    with pytest.raises(DataError, match=r"'s/9'"):
        _ = make("raise").rows
    table["vqa"][9] = good
    assert make("raise").rows.left_out == 1


def test_a_mark_knows_content_and_not_places(tokenizer, table, tmp_path) -> None:
    records = [
        {"id": str(i), "conversations": [{"from": "human", "value": "is it?"}, {"from": "gpt", "value": "red"}]}
        for i in range(4)
    ]
    marks = []
    for name, answer in (("a", "red"), ("b", "red"), ("c", "blue")):
        records[2]["conversations"][1]["value"] = answer
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
        source = SourceConfig("llava", path=str(tmp_path / f"{name}.json"))
        marks.append(pipeline.StageData(make_config(sources=(source,)), "finetune", tokenizer).mark)
    assert marks[0] == marks[1] and marks[0]["samples"] == [4]
    assert marks[0]["content"] != marks[2]["content"] and marks[0]["counts"] == marks[2]["counts"]
    one = pipeline.StageData(make_config(), "finetune", tokenizer).mark
    table["vqa"][0] = dataclasses.replace(table["vqa"][0], turns=(Turn("user", "is"), Turn("assistant", "red")))
    assert pipeline.StageData(make_config(), "finetune", tokenizer).mark["content"] != one["content"]
