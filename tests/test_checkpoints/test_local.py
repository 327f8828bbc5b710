"""Checkpoints on a host's own disk: newer than the run's they are taken, and in doubt they are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from saisa_jax.checkpoints import CheckpointError, LocalCheckpoints, RunCheckpointer


class Counter:
    def __init__(self, place: int = 0):
        self.place = place

    def get_state(self):
        return {"place": self.place}

    def set_state(self, state):
        self.place = state["place"]


def make_state(seed: int = 0, axes: tuple[str | None, ...] = ("data", None)):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(seed), (8, 12)).astype(jnp.bfloat16)
    state = {"params": {"x": x, "none": jnp.zeros((0, 4))}, "step": jnp.int32(seed)}
    of = lambda leaf: NamedSharding(mesh, PartitionSpec(*axes) if leaf.ndim == 2 else PartitionSpec())  # noqa: E731
    return jax.device_put(state, jax.tree.map(of, state))


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def restored(directory: Path, like, local: bool = True):
    """The step, by its seed, and the place in the data that a start finds."""
    data = Counter()
    tier = LocalCheckpoints(directory / "disk", epath.Path(directory / "stage")) if local else None
    with RunCheckpointer(directory / "stage" / "checkpoints", local=tier) as checkpointer:
        state, metadata = checkpointer.restore(abstract(like), data)
    assert metadata == {"seed": int(state["step"])}
    expected = make_state(int(state["step"]))
    for one, two in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))
    return int(state["step"]), data.place


@pytest.fixture
def run(tmp_path) -> Path:
    """Step 2 of a run, and 3, 4 and 5 on the host's disk."""
    tier = LocalCheckpoints(tmp_path / "disk", epath.Path(tmp_path / "stage"))
    with RunCheckpointer(tmp_path / "stage" / "checkpoints", local=tier) as checkpointer:
        assert tier.newest(None) is None
        checkpointer.save(2, make_state(2), Counter(20), {"seed": 2})
        for step in (3, 4, 5):
            tier.save(step, make_state(step), Counter(10 * step), {"seed": step})
    return tmp_path


pytestmark = pytest.mark.multi_device


def test_the_newest_is_taken(run) -> None:
    assert restored(run, make_state()) == (5, 50)
    assert restored(run, make_state(), local=False) == (2, 20)
    assert sorted(path.parent.parent.name for path in run.rglob("account.json")) == ["4", "5"]
    with RunCheckpointer(run / "stage" / "checkpoints") as checkpointer:
        checkpointer.save(6, make_state(6), Counter(60), {"seed": 6})
    assert restored(run, make_state()) == (6, 60)


def test_what_is_not_whole_or_not_this_run_s_is_not_taken(run) -> None:
    (newest,) = run.glob("disk/*/5/process-00000")
    (newest / "account.json").unlink()  # it was killed while it wrote
    assert restored(run, make_state()) == (4, 40)
    assert restored(run, make_state(axes=(None, "data"))) == (2, 20)  # parts that this process did not hold
    (older,) = run.glob("disk/*/4/process-00000")
    content = bytearray((older / "arrays.bin").read_bytes())
    content[7] ^= 1
    (older / "arrays.bin").write_bytes(content)
    assert restored(run, make_state()) == (2, 20)
    (older / "arrays.bin").unlink()
    assert restored(run, make_state()) == (2, 20)
    (run / "stage" / "local_run").write_text("7")  # another run, which a workdir of this name holds now
    assert restored(run, make_state()) == (2, 20)


def test_a_run_that_went_on_from_before_them_replaces_them(run) -> None:
    tier = LocalCheckpoints(run / "disk", epath.Path(run / "stage"))
    tier.save(3, make_state(3), Counter(30), {"seed": 3})
    tier.wait()
    assert tier.newest(None) == 3 and restored(run, make_state()) == (3, 30)
    shutil.rmtree(run / "stage" / "checkpoints")
    with pytest.raises(
        CheckpointError, match=r"there is no finished checkpoint in .*, and what is in .* cannot be used"
    ):
        restored(run, make_state(axes=(None, "data")))


def test_steps_that_not_all_hosts_hold(run, monkeypatch) -> None:
    tier = LocalCheckpoints(run / "disk", epath.Path(run / "stage"))
    gather = lambda others: lambda own: np.stack([own, others])  # noqa: E731
    for others, expected in (((4, 5), 5), ((3, 4), 4), ((4, -1), 4), ((-1, -1), None), ((2, 3), None)):
        monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", gather(np.array(others)))
        assert tier.newest(2) == expected
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", lambda own: np.array([True, False]))
    assert tier.restore(5, abstract(make_state()), None) is None  # the other one cannot read its parts


def test_a_disk_that_is_full_stops_nothing(run, monkeypatch, caplog) -> None:
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    tier = LocalCheckpoints(run / "disk", epath.Path(run / "stage"))
    monkeypatch.setattr("os.fsync", full)
    tier.save(7, make_state(7), None, {})
    tier.wait()
    assert "the local checkpoint of step 7 was not written: [Errno 28] No space left" in caplog.text
    assert tier.newest(None) == 5
    tier.remove()
    assert tier.newest(None) is None and not list(run.rglob("account.json"))
    assert json.loads((run / "stage" / "local_run").read_text()) >= 0
