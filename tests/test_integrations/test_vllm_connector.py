"""The connector, with a stand-in for vLLM: what it asks for, what it writes where, and what it refuses."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

torch: Any = pytest.importorskip("torch", reason="CPU torch is not installed")

FOLDER = Path(__file__).parents[2] / "integrations" / "vllm"
KEYS = [f"{n:032x}" for n in range(1, 4)]
LAYERS, HEADS, WIDTH, BLOCK = 3, 4, 8, 4
RANK = {"number": 0}


class Base:
    """As KVConnectorBase_V1."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._vllm_config, self._metadata = vllm_config, None

    def _get_connector_metadata(self) -> Any:
        return self._metadata


@pytest.fixture
def connector(monkeypatch) -> Iterator[ModuleType]:
    base = "vllm.distributed.kv_transfer.kv_connector.v1.base"
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": "0.32.0+cpu"},
        base: {"KVConnectorBase_V1": Base, "KVConnectorMetadata": object, "KVConnectorRole": object},
        "vllm.distributed.parallel_state": {"get_tensor_model_parallel_rank": lambda: RANK["number"]},
        "vllm.logger": {"init_logger": logging.getLogger},
    }
    parents = {name.rsplit(".", n)[0] for name in contents for n in range(1, name.count(".") + 1)}
    for name in sorted(parents | set(contents)):
        module = ModuleType(name)
        vars(module).update(contents.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("saisa_jax_vllm.connector")
    for name in [name for name in sys.modules if name.partition(".")[0] == "saisa_jax_vllm"]:
        del sys.modules[name]


class Layer:
    """An attention layer whose cache is a list of slots."""

    def __init__(self, heads: int, width: int = WIDTH) -> None:
        self.num_kv_heads, self.head_size = heads, width
        self.kv_cache = torch.zeros(2, 40, heads, width)
        self.impl: Any = SimpleNamespace(do_kv_cache_update=self.write)

    def write(self, layer: Any, k: Any, v: Any, cache: Any, where: Any) -> None:
        assert layer is self and k.dtype == cache.dtype
        cache[0, where], cache[1, where] = k, v


def vllm_config(store: Path, layers: dict[str, Any], **more: Any) -> Any:
    parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1} | more
    extra = {"store": str(store)} if store else {}
    transfer = SimpleNamespace(get_from_extra_config=extra.get, kv_load_failure_policy=parallel.pop("policy", "fail"))
    return SimpleNamespace(
        kv_transfer_config=transfer,
        parallel_config=SimpleNamespace(**parallel),
        cache_config=SimpleNamespace(block_size=BLOCK),
        model_config=SimpleNamespace(dtype=torch.float32),
        compilation_config=SimpleNamespace(static_forward_context=layers),
    )


def make(connector: Any, store: Any, layers: dict[str, Any], groups: int = 1, **more: Any) -> Any:
    config = SimpleNamespace(kv_cache_groups=[0] * groups)
    return connector.SaisaConnector(vllm_config(store, layers, **more), None, config)


def decoder(heads: int = HEADS, width: int = WIDTH, count: int = LAYERS) -> dict[str, Any]:
    layers: dict[str, Any] = {f"model.layers.{n}.self_attn.attn": Layer(heads, width) for n in range(count)}
    return layers | {"model.layers.0.mlp.experts": SimpleNamespace()}


def request(runs: Any, tokens: int = 30, name: str = "one") -> Any:
    return SimpleNamespace(
        request_id=name, num_prompt_tokens=tokens, kv_transfer_params={"saisa": {"runs": runs}} if runs else None
    )


def blocks(*numbers: int) -> Any:
    return SimpleNamespace(get_block_ids=lambda: (list(numbers),))


def step(one: Any, layers: Any) -> set[int]:
    """What was planned is loaded; the blocks of failures."""
    one._metadata = one.build_connector_meta(None)
    one.start_load_kv(SimpleNamespace(no_compile_layers=layers))
    return one.get_block_ids_with_load_errors()


@pytest.fixture
def stored(tmp_path) -> dict[str, np.ndarray]:
    """Runs of 5 and 9 places."""
    rng = np.random.default_rng(0)
    held = {}
    for key, places in zip(KEYS, (5, 9), strict=False):
        arrays = {name: rng.standard_normal((LAYERS, places, HEADS, WIDTH), np.float32) for name in "kv"}
        save_file(arrays, tmp_path / f"{key}.safetensors")
        held[key] = np.stack([arrays["k"], arrays["v"]])
    return held


RUNS = [[KEYS[0], 5], [KEYS[1], 9]]


@pytest.mark.parametrize("done", [0, 4, 8])
def test_places_go_to_their_slots(done, connector, stored, tmp_path):
    layers = decoder()
    one = make(connector, tmp_path, layers)
    one.register_kv_caches(dict.fromkeys(list(layers)[:LAYERS]))
    asked = request(RUNS)
    assert one.get_num_new_matched_tokens(asked, done) == (14 - done, False)
    one.update_state_after_alloc(asked, blocks(5, 2, 9, 0), 14 - done)
    assert step(one, layers) == set()
    order = [*range(20, 24), *range(8, 12), *range(36, 40), 0, 1]
    whole = np.concatenate([stored[KEYS[0]], stored[KEYS[1]]], axis=2)
    for number, layer in enumerate(list(layers.values())[:LAYERS]):
        np.testing.assert_array_equal(layer.kv_cache[:, order[done:]].numpy(), whole[:, number, done:])
        assert not layer.kv_cache[:, order[:done]].any(), "what is shared was written again"
    assert step(one, layers) == set() and not one._planned


def test_requests_without_runs_and_with_all_places_in_the_cache(connector, stored, tmp_path):
    layers = decoder()
    one = make(connector, tmp_path, layers)
    assert one.get_num_new_matched_tokens(request(None), 0) == (0, False)
    assert one.get_num_new_matched_tokens(request(RUNS), 16) == (0, False)
    one.update_state_after_alloc(request(RUNS), blocks(1), 0)
    assert step(one, layers) == set() and not layers["model.layers.0.self_attn.attn"].kv_cache.any()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_loads_its_heads(rank, connector, stored, tmp_path, monkeypatch):
    monkeypatch.setitem(RANK, "number", rank)
    layers = decoder(HEADS // 2)
    one = make(connector, tmp_path, layers, tensor_parallel_size=2)
    one.update_state_after_alloc(request(RUNS[:1]), blocks(0, 1), 5)
    assert step(one, layers) == set()
    mine = stored[KEYS[0]][:, 1, :, 2 * rank : 2 * rank + 2]
    np.testing.assert_array_equal(layers["model.layers.1.self_attn.attn"].kv_cache[:, :5].numpy(), mine)


def test_a_failure_is_that_request_s_alone(connector, stored, tmp_path, caplog):
    layers = decoder()
    one = make(connector, tmp_path, layers)
    gone = request([[KEYS[0], 5], [KEYS[2], 3]], name="gone")
    one.update_state_after_alloc(gone, blocks(5, 2), 4)
    one.update_state_after_alloc(request(RUNS[:1]), blocks(7, 8), 5)
    assert step(one, layers) == {2}, "the blocks from the first place on that was to be loaded"
    assert "request gone: its keys and values cannot be loaded" in caplog.text and KEYS[2] in caplog.text
    assert (
        layers["model.layers.0.self_attn.attn"].kv_cache[0, 28:33].any()
        and one.get_block_ids_with_load_errors() == set()
    )
    for wrong, what in (
        (request("nonsense"), "kv_transfer_params.saisa is"),
        (request([["../../secret", 4]]), "has a run that is none"),
        (request(RUNS, tokens=14), "cannot be loaded"),  # a prompt has more places than its runs
    ):
        places, _ = one.get_num_new_matched_tokens(wrong, 0)
        assert 0 < places < wrong.num_prompt_tokens + 1, "without runs, places would be taken for text"
        one.update_state_after_alloc(wrong, blocks(*range(9)), places)
        assert step(one, layers) >= {0} and what in caplog.text


@pytest.mark.parametrize("other", [{"heads": 2}, {"width": 16}, {"count": 2}])
def test_keys_of_another_model(other, connector, stored, tmp_path, caplog):
    layers = decoder(**other)
    one = make(connector, tmp_path, layers)
    one.update_state_after_alloc(request(RUNS), blocks(0, 1, 2, 3), 14)
    assert step(one, layers) == {0, 1, 2, 3} and "the front encodes for another model" in caplog.text
    assert "[3, 5, 4, 8]" in caplog.text


def test_what_vllm_may_be_started_with(connector, tmp_path, monkeypatch, caplog):
    layers = decoder()
    for wrong, message in (
        ({"policy": "recompute"}, "kv_load_failure_policy=recompute: places of pictures cannot be computed"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2 is not served; --tensor-parallel-size is"),
        ({"groups": 2}, "a cache of 2 groups is not served"),
    ):
        with pytest.raises(connector.ConnectorError, match=message):
            make(connector, tmp_path, layers, **wrong)
    with pytest.raises(connector.ConnectorError, match="the --store of the front"):
        make(connector, "", layers)
    assert "not tested" not in caplog.text
    monkeypatch.setattr(connector.vllm, "__version__", "0.40.1")
    one = make(connector, tmp_path, layers)
    assert "vLLM 0.40.1 was not tested with this connector" in caplog.text and "vllm==0.32.0" in caplog.text
    with pytest.raises(connector.ConnectorError, match=r"vLLM 0\.40\.1 was not tested .*made in another way"):
        connector.SaisaConnector(vllm_config(tmp_path, layers), None)
    layers["model.layers.1.self_attn.attn"].impl = object()
    with pytest.raises(connector.ConnectorError, match=r"layers\.1\.self_attn\.attn has no do_kv_cache_update"):
        one.register_kv_caches(dict.fromkeys(list(layers)[:LAYERS]))
