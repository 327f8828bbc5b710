"""A run's checkpoints: exact, whole or absent, and never wrong in silence."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from saisa_jax.checkpoints import CheckpointError, DamagedError, RunCheckpointer


class Counter:
    """A data iterator that counts."""

    def __init__(self, place=0):
        self.place = place

    def get_state(self):
        return {"place": self.place}

    def set_state(self, state):
        self.place = state["place"]


def make_state(seed=0):
    """All kinds of nodes and leaves that a training state has."""
    kernel = jax.random.normal(jax.random.key(seed), (8, 16))
    trainable = {"layers": {"kernel": kernel, "bias": jnp.ones((3,), jnp.bfloat16)}}
    moments = optax.adamw(1e-3).init(trainable)
    return {
        "step": jnp.asarray(seed, jnp.int32),
        "trainable": trainable,
        "opt_state": moments,
        "empty": jnp.zeros((0, 2)),
    }


def abstract(state):
    return jax.eval_shape(lambda x: x, state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def damage(directory: Path, how: str):
    """Flips bytes in the middle of the largest file that holds anything, or cuts it in half."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "commit_success.txt"]
    file = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    if how == "cut":
        content = content[:middle]
    else:
        content[middle : middle + 4] = bytes(byte ^ 255 for byte in content[middle : middle + 4])
    file.write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Steps 1 and 2 of a run; copy it before you touch it."""
    directory = tmp_path_factory.mktemp("saved") / "run"
    with RunCheckpointer(directory, keep=2) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, make_state(step), Counter(10 * step), {"seconds": 0.1 * step})
    return directory


@pytest.fixture
def run(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


def test_round_trip(saved):
    data = Counter()
    with RunCheckpointer(saved) as checkpointer:
        assert checkpointer.steps() == [1, 2]
        state, metadata = checkpointer.restore(abstract(make_state()), data)
    assert_same(state, make_state(2))
    assert metadata == {"seconds": 0.2}
    assert data.place == 20


def test_a_step_by_number_and_without_data(saved):
    with RunCheckpointer(saved) as checkpointer:
        state, metadata = checkpointer.restore(abstract(make_state()), None, step=1)
        with pytest.raises(CheckpointError, match=r"step 7 is not in .*holds \[1, 2\]"):
            checkpointer.restore(abstract(make_state()), None, step=7)
    assert_same(state, make_state(1))
    assert metadata == {"seconds": 0.1}


def test_keeps_the_last_and_needs_no_wait(tmp_path):
    with RunCheckpointer(tmp_path / "run", keep=2) as checkpointer:
        assert checkpointer.latest_step() is None
        for step in (10, 20, 30):
            checkpointer.save(step, {"x": jnp.full(3, step)}, None, {})
        checkpointer.save(30, {"x": jnp.zeros(3, int)}, None, {})  # again: nothing happens
        checkpointer.wait()
        assert checkpointer.steps() == [20, 30]
        with pytest.raises(CheckpointError, match=r"step 25 was not saved: .*\[20, 30\]"):
            checkpointer.save(25, {"x": jnp.zeros(3, int)}, None, {})
        state, _ = checkpointer.restore({"x": jax.ShapeDtypeStruct((3,), jnp.int32)}, None)
    assert state["x"].tolist() == [30, 30, 30]


def test_donated_buffers_are_saved_as_they_were(tmp_path):
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(1_000_000)
    with RunCheckpointer(tmp_path / "run", keep=1) as checkpointer:
        checkpointer.save(1, {"x": x}, None, {})
        for _ in range(20):
            x = step(x)
        x.block_until_ready()
        state, _ = checkpointer.restore({"x": jax.ShapeDtypeStruct((1_000_000,), jnp.float32)}, None)
    assert not np.asarray(state["x"]).any()


def test_grain_iterator_goes_on_exactly(tmp_path):
    make = lambda: iter(grain.MapDataset.range(100).seed(3).shuffle().repeat().to_iter_dataset().batch(4))  # noqa: E731
    data = make()
    for _ in range(30):
        next(data)
    with RunCheckpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(30, {"x": jnp.zeros(3)}, data, {})
        expected = [next(data).tolist() for _ in range(3)]
        fresh = make()
        checkpointer.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32)}, fresh)
    assert [next(fresh).tolist() for _ in range(3)] == expected


@pytest.mark.multi_device
def test_from_one_mesh_to_another(tmp_path):
    def place(devices, spec):
        shape = (devices // 2, 2) if devices > 1 else (1, 1)
        mesh = Mesh(np.asarray(jax.devices()[:devices]).reshape(shape), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
        return NamedSharding(mesh, PartitionSpec(*spec))

    x = jax.random.normal(jax.random.key(0), (8, 16))
    there = place(8, ("a", "b"))
    with jax.set_mesh(there.mesh), RunCheckpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {"x": jax.device_put(x, there)}, None, {})
        for target in (place(8, ("b", "a")), place(4, ("b",)), place(1, ())):
            leaf = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target)
            state, _ = checkpointer.restore({"x": leaf}, None)
            assert state["x"].sharding.is_equivalent_to(target, 2)
            assert np.array_equal(np.asarray(state["x"]), x)
        state, _ = checkpointer.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}, None)
        assert state["x"].devices() == {jax.devices()[0]}


def test_another_model_is_refused_with_every_difference(saved):
    expected = abstract(make_state())
    expected["trainable"]["layers"]["kernel"] = jax.ShapeDtypeStruct((8, 17), jnp.bfloat16)
    expected["trainable"]["extra"] = jax.ShapeDtypeStruct((1,), jnp.float32)
    del expected["empty"]
    data = Counter()
    with RunCheckpointer(saved) as checkpointer, pytest.raises(CheckpointError) as caught:
        checkpointer.restore(expected, data)
    for line in (
        "trainable/extra: missing in the checkpoint",
        "empty: unexpected in the checkpoint",
        "trainable/layers/kernel: shape (8, 16) in the checkpoint, (8, 17) expected",
        "trainable/layers/kernel: dtype float32 in the checkpoint, bfloat16 expected",
    ):
        assert line in str(caught.value)
    assert not isinstance(caught.value, DamagedError)
    assert data.place == 0
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
    ("item", "how", "message"),
    [
        ("state", "flip", "damaged; other values than were saved|state of step 2 .* cannot be read"),
        ("state", "cut", "state of step 2 .* cannot be read"),
        ("meta", "flip", "meta of step 2 .* cannot be read"),
    ],
)
def test_damage_is_found_and_the_step_before_is_taken(run, caplog, item, how, message):
    damage(run / "2" / item, how)
    expected, data = abstract(make_state()), Counter()
    with RunCheckpointer(run) as checkpointer:
        with pytest.raises(DamagedError, match=message):  # asked for by number: no other will do
            checkpointer.restore(expected, data, step=2)
        assert data.place == 0
        state, metadata = checkpointer.restore(expected, data)
        assert_same(state, make_state(1))
        assert (metadata, data.place) == ({"seconds": 0.1}, 10)
        assert "FALLING BACK TO STEP 1" in caplog.text
        assert (run / "2.damaged").is_dir()
        checkpointer.save(2, make_state(2), data, {})  # the number is free again
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2]


def test_flipped_values_are_named(run):
    """Other numbers in a file that reads well, as flipped bits in an uncompressed one would be."""
    meta = run / "2" / "meta" / "metadata"
    other = json.loads((run / "1" / "meta" / "metadata").read_text())
    shutil.copy(run / "1" / "meta" / "metadata", meta)
    assert other["metadata"] == {"seconds": 0.1}
    with RunCheckpointer(run) as checkpointer, pytest.raises(DamagedError) as caught:
        checkpointer.restore(abstract(make_state()), None, step=2)
    assert str(caught.value).endswith("other values than were saved: step, trainable/layers/kernel")


def test_nothing_good_left(run):
    for step in ("1", "2"):
        damage(run / step / "meta", "cut")
    with RunCheckpointer(run) as checkpointer:
        with pytest.raises(DamagedError, match=r"meta of step 2 .*meta of step 1 .*or remove .* to restart the stage"):
            checkpointer.restore(abstract(make_state()), None)
        assert checkpointer.steps() == [1, 2]  # nothing was renamed


def test_nothing_there(tmp_path):
    with (
        RunCheckpointer(tmp_path / "run") as checkpointer,
        pytest.raises(CheckpointError, match="no finished checkpoint"),
    ):
        checkpointer.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32)}, None)
    with pytest.raises(CheckpointError, match="keep_checkpoints"):
        RunCheckpointer(tmp_path / "run", keep=0)


def test_a_checkpoint_without_a_data_position(tmp_path):
    expected = {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}
    with RunCheckpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(1, {"x": jnp.zeros(3)}, None, {})
        with pytest.raises(CheckpointError, match="holds no data position"):
            checkpointer.restore(expected, Counter())


def test_metadata_must_be_json(tmp_path):
    with RunCheckpointer(tmp_path / "run") as checkpointer:
        with pytest.raises(CheckpointError, match="JSON-ready"):
            checkpointer.save(1, {"x": jnp.zeros(3)}, None, {"x": object()})
        assert checkpointer.latest_step() is None


@contextlib.contextmanager
def full_disk(limit=1_000_000):
    """No file may grow beyond the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_save_is_loud_and_leaves_what_was(tmp_path):
    big = {"x": jax.random.normal(jax.random.key(0), (700_000,))}
    with RunCheckpointer(tmp_path / "run", keep=1) as checkpointer:
        checkpointer.save(1, big, None, {})
        checkpointer.wait()
        with full_disk():
            checkpointer.save(2, big, None, {})
            with pytest.raises(CheckpointError, match=r"step 2 was not saved in .*File too large"):
                checkpointer.wait()
        assert checkpointer.steps() == [1]
        checkpointer.restore(abstract(big), None)
        checkpointer.save(2, big, None, {})
        checkpointer.wait()
        assert checkpointer.steps() == [2]


def test_leaving_after_a_failed_save_is_loud(tmp_path):
    big = {"x": jax.random.normal(jax.random.key(0), (700_000,))}
    with full_disk():
        with (
            pytest.raises(CheckpointError, match="step 1 was not saved"),
            RunCheckpointer(tmp_path / "a") as checkpointer,
        ):
            checkpointer.save(1, big, None, {})
        with pytest.raises(KeyError), RunCheckpointer(tmp_path / "b") as checkpointer:  # the first error wins
            checkpointer.save(1, big, None, {})
            raise KeyError


KILLED = """
import sys, jax.numpy as jnp
from saisa_jax.checkpoints import RunCheckpointer
checkpointer = RunCheckpointer(sys.argv[1], keep=2)
x = jnp.zeros(3_000_000)
for step in range(1, 1000):
    checkpointer.save(step, {"x": x + step}, None, {"step": step})
    print(step, flush=True)
"""


def test_killed_in_the_middle_of_a_save(tmp_path):
    """Whatever is there after a kill is whole."""
    run = tmp_path / "run"
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", KILLED, run], stdout=subprocess.PIPE, env=environment)
    for _ in range(3):
        process.stdout.readline()
    time.sleep(0.02)
    process.kill()
    process.wait()
    with RunCheckpointer(run) as checkpointer:
        last = checkpointer.latest_step()
        assert last >= 2
        state, metadata = checkpointer.restore({"x": jax.ShapeDtypeStruct((3_000_000,), jnp.float32)}, None)
        assert metadata["step"] == last
        assert (np.asarray(state["x"]) == last).all()
        checkpointer.save(last + 1, state, None, {})
        checkpointer.wait()
        assert checkpointer.latest_step() == last + 1
    assert not [path for path in run.iterdir() if not path.name.isdigit()]
