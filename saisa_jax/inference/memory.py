"""How many questions are answered at once, and how many pictures stay on a device: what its memory has room for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from saisa_jax import parallel
from saisa_jax.config import ModelConfig

MOST_ROWS = 64  # of a way; more make no device faster
USABLE = 0.9  # of a device's memory; the rest is the allocator's and what the estimate does not know
COPIES = 3  # of keys and values that a program holds at once: picked or computed, placed, and the loop's own


class Room(NamedTuple):
    """What is used of a device's memory.

    Attributes:
      rows: questions that a way answers at once.
      cache_bytes: for keys and values (LLaVA: features) of pictures, on each device.
      free: bytes that a device had.
    """

    rows: int
    cache_bytes: int
    free: int


class Shape(NamedTuple):
    """The largest batch of an evaluation: text tokens, new tokens and images of a row."""

    text: int
    new: int
    images: int


def room(config: ModelConfig, mesh: Mesh | None, shape: Shape, free: int) -> Room:
    """The rows and the pictures that fit into so many free bytes a device: at least a row, at most MOST_ROWS.

    Rows get half of the memory, pictures what is left.
    """
    usable = int(USABLE * free)
    row, picture = row_bytes(config, mesh, shape), picture_bytes(config, mesh)
    rows = MOST_ROWS
    while rows > 1 and rows * (row + shape.images * picture) + encode_bytes(config, mesh, rows) > usable / 2:
        rows //= 2
    return Room(rows, max(0, usable - rows * row - encode_bytes(config, mesh, rows)), free)


def row_bytes(config: ModelConfig, mesh: Mesh | None, shape: Shape) -> int:
    """Of a row while it is answered, without the pictures that are kept. An estimate, rather too large."""
    wide, visual = _itemsize(config), shape.images * config.num_visual_tokens
    queries = shape.text + (visual if config.alignment == "llava" else 0)
    keys = 2 * _kv_heads(config, mesh) * config.head_dim * wide
    cached = keys * (config.num_cached_layers * (queries + shape.new))
    cached += 0 if config.alignment == "llava" else keys * len(config.visible_layers) * visual
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    scores = 3 * 4 * config.num_heads // tensor * queries * (shape.text + visual)  # float32: masked, exp, product
    states = queries * (6 * config.embed_dim + 3 * config.mlp_dim // tensor) * 4
    return COPIES * cached + scores + states + 3 * 4 * config.padded_vocab_size // tensor


def encode_bytes(config: ModelConfig, mesh: Mesh | None, pictures: int) -> int:
    """Of the program that encodes pictures, of which it takes at most 16 at once."""
    vision, tensor = config.vision, 1 if mesh is None else mesh.shape["tensor"]
    tokens = vision.num_patches + 1
    states = tokens * (6 * vision.embed_dim + 2 * vision.mlp_dim // tensor + 3 * config.embed_dim) * 4
    scores = 2 * 4 * max(1, vision.num_heads // tensor) * tokens**2
    pixels = 2 * 4 * 3 * vision.image_size**2
    return min(16, pictures) * (states + scores + pixels + picture_bytes(config, mesh))


def picture_bytes(config: ModelConfig, mesh: Mesh | None) -> int:
    """Of what a device keeps of a picture: its heads' keys and values; under LLaVA the features."""
    wide = _itemsize(config)
    if config.alignment == "llava":
        return config.vision.num_patches * config.vision.embed_dim * wide
    keys = len(config.visible_layers) * _kv_heads(config, mesh) * config.num_visual_tokens * config.head_dim
    return 2 * keys * wide


def attention_bytes(config: ModelConfig, mesh: Mesh | None, text: int, images: int) -> int:
    """Of the weights of all layers and heads over a prompt, twice: the program averages them."""
    tensor = 1 if mesh is None else mesh.shape["tensor"]
    visual = images * config.num_visual_tokens
    queries = text + (visual if config.alignment == "llava" else 0)
    return 2 * 4 * config.num_layers * max(1, config.num_heads // tensor) * queries * (text + visual)


def kv_heads_axis(config: ModelConfig, mesh: Mesh) -> str | None:
    """The axis of the mesh that splits key/value heads."""
    return dict(parallel.make_rules(config, mesh))["activation_kv_heads"]


def _kv_heads(config: ModelConfig, mesh: Mesh | None) -> int:
    split = mesh is not None and kv_heads_axis(config, mesh) is not None
    return config.num_kv_heads // (mesh.shape["tensor"] if mesh is not None and split else 1)


def _itemsize(config: ModelConfig) -> int:
    return 4 if config.dtype == "float32" else 2


def free_bytes(devices: Sequence[Any]) -> int:
    """Of the fullest of this process's devices; where they do not report it, its share of the host's half."""
    stats = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in of_device for of_device in stats):
        return min(of_device["bytes_limit"] - of_device.get("bytes_in_use", 0) for of_device in stats)
    return _host_bytes() // 2 // len(devices)


def _host_bytes() -> int:
    """That programs of this host can still take."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def devices_of(mesh: Mesh | None) -> list[Any]:
    """This process's devices that hold a model."""
    return [jax.local_devices()[0]] if mesh is None else list(mesh.local_devices)
