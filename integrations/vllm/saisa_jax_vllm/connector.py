"""The KV connector: runs of places (`runs.py`) from the store into the paged cache of an unmodified vLLM.

    vllm serve DECODER --kv-transfer-config '{"kv_connector": "SaisaConnector", "kv_role": "kv_consumer",
      "kv_connector_module_path": "saisa_jax_vllm.connector", "kv_connector_extra_config": {"store": "DIR"}}'

vLLM takes the places of runs for computed ones, allocates their blocks, and shares these between requests like any
others: `cache_salt`, which the front sends, is a hash of the pictures and keeps them apart. What is in a shared block
is not loaded again. Each process of a tensor-parallel engine loads its own heads.

Keys, rotated, and values are stored as [layers, places, heads, width]; how a cache is laid out is the business of
vLLM's own `do_kv_cache_update`, which its layers call as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import vllm
from safetensors import safe_open
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from saisa_jax_vllm.runs import Part, Run, RunsError, from_params, kv_heads_of, length, parts_from, slots
from saisa_jax_vllm.store import path_of

TESTED = "0.32.0"  # of vLLM, which calls the interface of connectors experimental
UNREADABLE = "0" * 32  # a key that no file has

logger = init_logger(f"vllm.{__name__}")


class ConnectorError(ValueError):
    """vLLM is started in a way that this connector does not serve."""


@dataclass
class Load:
    """What is to be put into the blocks of a request."""

    request: str
    parts: list[Part]
    blocks: list[int]


@dataclass
class Loads(KVConnectorMetadata):
    """Of one step, from the scheduler to the workers."""

    loads: list[Load] = field(default_factory=list)


class SaisaConnector(KVConnectorBase_V1):
    """Both sides of it: vLLM makes one in the scheduler's process, and one in each worker's.

    Raises:
      ConnectorError: vLLM is another one, or its configuration is not served.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        if kv_cache_config is None:
            raise ConnectorError(_untested("its connectors are made in another way"))
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer, parallel = vllm_config.kv_transfer_config, vllm_config.parallel_config
        self._store = transfer.get_from_extra_config("store", "")
        if not self._store:
            raise ConnectorError('kv_connector_extra_config is {"store": DIR}, the --store of the front')
        if transfer.kv_load_failure_policy != "fail":
            raise ConnectorError(
                f"kv_load_failure_policy={transfer.kv_load_failure_policy}: places of pictures cannot be computed from "
                "their tokens; leave it out, or set it to fail"
            )
        for name in ("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size"):
            if getattr(parallel, name, 1) != 1:
                raise ConnectorError(f"{name}={getattr(parallel, name)} is not served; --tensor-parallel-size is")
        if (groups := len(kv_cache_config.kv_cache_groups)) != 1:
            raise ConnectorError(f"a cache of {groups} groups is not served: all layers have to attend alike")
        if vllm.__version__.split("+")[0] != TESTED:
            logger.warning(_untested("answers may be wrong without an error; the front compares some at its start"))
        self._block_size = vllm_config.cache_config.block_size
        self._dtype = vllm_config.model_config.dtype
        self._ranks = parallel.tensor_parallel_size
        self._planned: list[Load] = []
        self._failed: set[int] = set()

    # --- in the scheduler ---------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Places that need no computing beyond those that are in the cache already."""
        return max(0, length(_runs(request)) - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plans the load; also of a request that comes back after it had to give its blocks away."""
        if num_external_tokens > 0:
            runs = _runs(request)
            parts = list(parts_from(runs, length(runs) - num_external_tokens))
            self._planned.append(Load(request.request_id, parts, list(blocks.get_block_ids()[0])))

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """What was planned for this step."""
        del scheduler_output
        planned, self._planned = self._planned, []
        return Loads(planned)

    # --- in a worker --------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Looks, before anybody asks, whether the layers can be written to."""
        layers = self._vllm_config.compilation_config.static_forward_context
        for name in kv_caches:
            if not hasattr(getattr(layers.get(name), "impl", None), "do_kv_cache_update"):
                raise ConnectorError(_untested(f"{name} has no do_kv_cache_update"))

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads what this step needs; a request whose load fails is answered with an error by vLLM."""
        del kwargs
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads)
        for load in metadata.loads:
            try:
                for part in load.parts:
                    self._load(part, load.blocks, forward_context.no_compile_layers)
            except Exception as error:  # whatever it is: the other requests of this step go on
                logger.error("request %s: its keys and values cannot be loaded: %s", load.request, error)
                self._failed.update(load.blocks[load.parts[0].place // self._block_size :])

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that hold nothing of use since the last call."""
        failed, self._failed = self._failed, set()
        return failed

    def _load(self, part: Part, blocks: list[int], layers: dict[str, Any]) -> None:
        count = part.last - part.first
        where = torch.tensor(slots(blocks, self._block_size, part.place, count), dtype=torch.int64)
        path = path_of(self._store, part.key)
        with safe_open(path, framework="pt") as file:
            keys, values = file.get_slice("k"), file.get_slice("v")
            stored, places = keys.get_shape(), slice(part.first, part.last)
            numbered = dict(_numbered(layers))
            for number, layer in numbered.items():
                heads, width = kv_heads_of(_rank(self._ranks), self._ranks, stored[2]), layer.head_size
                if len(numbered) != stored[0] or len(heads) != layer.num_kv_heads or stored[3] != width:
                    raise ConnectorError(
                        f"{path.name} holds [layers, places, heads, width] = {stored}, and this process has "
                        f"{len(numbered)} layers, {layer.num_kv_heads} heads of {width}: the front encodes for another "
                        "model"
                    )
                k, v = (
                    held[number, places, heads.start : heads.stop].to(layer.kv_cache.device, self._dtype)
                    for held in (keys, values)
                )
                layer.impl.do_kv_cache_update(layer, k, v, layer.kv_cache, where.to(layer.kv_cache.device))

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All layers are loaded before the first one runs."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""


def _runs(request: Any) -> tuple[Run, ...]:
    """Of a request; of one whose parameters cannot be read, or say more places than it has, a run that fails to load.

    An error would end vLLM, and without runs it would take the places of pictures for text.
    """
    try:
        runs = from_params(request.kv_transfer_params)
    except RunsError as error:
        logger.error("request %s: %s", request.request_id, error)
        runs = (Run(UNREADABLE, request.num_prompt_tokens),)
    if length(runs) >= request.num_prompt_tokens:
        return (Run(UNREADABLE, request.num_prompt_tokens - 1),) if request.num_prompt_tokens > 1 else ()
    return runs


def _numbered(layers: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """Attention layers with their numbers in the model."""
    for name, layer in layers.items():
        found = re.search(r"\blayers\.(\d+)\.", name)
        if found and getattr(layer, "kv_cache", None) is not None:
            yield int(found[1]), layer


def _rank(ranks: int) -> int:
    return get_tensor_model_parallel_rank() if ranks > 1 else 0


def _untested(what: str) -> str:
    return (
        f"vLLM {vllm.__version__} was not tested with this connector, {TESTED} was ({what}): pip install vllm=={TESTED}"
    )
