"""Checksums see every changed bit and nothing else; accounts list every difference."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from saisa_jax.checkpoints.checksums import account, checksums, damaged, describe, differences, flatten, seal, unseal

MASK = 2**32 - 1


def reference(x: np.ndarray) -> int:
    """The definition, in Python integers."""

    def mix(value: int) -> int:
        value = (value ^ (value >> 16)) * 0x85EBCA6B & MASK
        value = (value ^ (value >> 13)) * 0xC2B2AE35 & MASK
        return value ^ (value >> 16)

    width = x.dtype.itemsize
    bits = [int.from_bytes(element.tobytes(), "little") for element in x.reshape(-1).view(f"V{width}")]
    return sum(mix(bit + mix(index + 0x9E3779B9 & MASK) & MASK) for index, bit in enumerate(bits)) & MASK


def example(dtype: str, shape: tuple[int, ...] = (4, 8)) -> np.ndarray:
    values = np.random.default_rng(0).normal(size=shape) * 50
    return np.asarray(jnp.asarray(values > 0 if dtype == "bool" else np.abs(values), dtype))


@pytest.fixture(params=["on the host", "by programs"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where small leaves are summed; large ones always are by programs."""
    if request.param == "by programs":
        monkeypatch.setattr(sys.modules[checksums.__module__], "HOST_BYTES", -1)
    return request.param


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool"])
def test_is_what_it_is_said_to_be(dtype, place):
    x = example(dtype)
    assert checksums({"x": jnp.asarray(x)}) == {"x": reference(x)} == checksums({"x": x})


@pytest.mark.parametrize("shape", [(), (1,), (3,), (0, 3), (2, 3, 5)])
def test_any_shape(shape, place):
    x = example("float32", shape)
    assert checksums([x]) == {"0": reference(x)}


def test_sees_one_bit_a_swap_and_a_move():
    x = np.zeros((64, 64), np.float32)
    x[0, 0], x[0, 1], x[32, 0] = 1.0, 2.0, 4.0
    sums = {checksums([x])["0"]}
    for _ in range(3):
        changed = x.copy()
        changed.view(np.uint32)[5, 5] ^= 1 << 22
        sums.add(checksums([changed])["0"])
        for a, b in (((0, 0), (0, 1)), ((0, 0), (32, 0)), ((1, 0), (0, 0))):  # powers of two apart, low bits all zero
            swapped = x.copy()
            swapped[a], swapped[b] = x[b], x[a]
            sums.add(checksums([swapped])["0"])
    assert len(sums) == 5


def test_bits_not_values():
    nans = np.array([0x7FC00000, 0x7FC00001, 0xFFC00000], np.uint32).view(np.float32)
    assert (
        len({checksums([x])["0"] for x in (*nans.reshape(3, 1), np.zeros(1, np.float32), -np.zeros(1, np.float32))})
        == 5
    )


def test_refuses_what_it_cannot_hold():
    with pytest.raises(TypeError, match=r"a/b is ndarray of dtype int64"):
        checksums({"a": {"b": np.arange(3)}})
    with pytest.raises(TypeError, match=r"a is float of dtype None"):
        checksums({"a": 1.0})


@pytest.mark.multi_device
def test_is_the_same_on_every_mesh(place):
    tree = {
        "w": example("float32", (8, 8, 4)),
        "v": example("bfloat16", (8,)),
        "n": np.int32(7),
        "z": example("int8", (0, 8)),
    }
    expected = checksums(tree)
    for sizes, spec in (((8, 1), ("a",)), ((2, 4), ("a", "b")), ((4, 2), (("a", "b"),)), ((2, 4), ())):
        mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(sizes), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
        place = lambda x: NamedSharding(mesh, PartitionSpec(*spec[: x.ndim]))  # noqa: B023, E731
        placed = {name: jax.device_put(x, place(x) if x.size else place(np.int32(0))) for name, x in tree.items()}
        assert checksums(placed) == expected
        with jax.set_mesh(mesh):  # also of arrays that live elsewhere
            assert checksums(placed) == expected
            assert checksums(jax.device_put(tree, SingleDeviceSharding(jax.devices()[3]))) == expected


def test_differences_lists_all():
    stored = describe({"a": np.zeros((2, 3), np.float32), "b": np.zeros(1, np.int8), "old": np.zeros(1, np.int8)})
    wanted = describe(
        {"a": jax.ShapeDtypeStruct((3, 2), jnp.bfloat16), "b": np.zeros(1, np.int8), "new": np.zeros(1, bool)}
    )
    assert differences(stored, wanted) == [
        "new: missing in the checkpoint",
        "old: unexpected in the checkpoint",
        "a: shape (2, 3) in the checkpoint, (3, 2) expected",
        "a: dtype float32 in the checkpoint, bfloat16 expected",
    ]
    assert len(differences(stored, wanted, dtypes=False)) == 3


def test_damaged_names_paths():
    tree = {"a": {"b": np.zeros(3, np.float32), "c": np.ones(3, np.float32)}}
    stored = account(tree)
    assert damaged(tree, stored) == []
    tree["a"]["c"][1] = 2
    assert damaged(tree, stored) == ["a/c"]


def test_paths_of_all_kinds_of_nodes():
    tree = {"a": (1, [2, None]), "b": jax.tree_util.Partial(print, 3)}
    assert list(flatten(tree)) == ["a/0", "a/1/0", "b/0/0"]


def test_sealed_documents():
    document = seal({"x": 0.1, "y": (1, 2)})
    assert unseal(document) == {"x": 0.1, "y": [1, 2]}
    with pytest.raises(ValueError, match="does not fit"):
        unseal({**document, "x": 0.2})
    for other in ([], {"x": 1}):
        with pytest.raises(ValueError, match="no checksum"):
            unseal(other)


def test_large_leaves_are_summed_in_pieces(monkeypatch):
    tree = {"a": jnp.arange(7 * 5 * 3, dtype=jnp.bfloat16).reshape(7, 5, 3), "b": np.arange(11, dtype=np.float32)}
    whole = checksums(tree)
    monkeypatch.setattr(sys.modules[checksums.__module__], "HOST_BYTES", -1)
    for size in (1, 64, 100):
        monkeypatch.setattr(sys.modules[checksums.__module__], "PIECE_BYTES", size)
        assert checksums(tree) == whole


def test_a_small_model_compiles_nothing():
    tree = {str(size): jnp.zeros((size, 3), jnp.bfloat16) for size in range(1, 9)}
    compiled = []
    note = lambda event, seconds, **said: compiled.append(said) if event.endswith("compile_duration") else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        checksums(tree)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not compiled
