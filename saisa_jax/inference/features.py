"""The frozen vision encoder alone: what `data prepare --features` writes in place of images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from saisa_jax.batch import Slot
from saisa_jax.checkpoints import load_model, read_account
from saisa_jax.config import Config, ConfigError, to_dict
from saisa_jax.data.features import FeatureSpec
from saisa_jax.models.encoders import ENCODERS


def feature_spec(config: Config, source: str) -> FeatureSpec:
    """What a run makes of its images, if it starts from the finished model `source`.

    Raises:
      ConfigError: the model holds no encoder.
      CheckpointError, DamagedError: as `read_account`.
    """
    leaves = read_account(source)[0]["leaves"]
    checksums = {path: leaf["checksum"] for path, leaf in sorted(leaves.items()) if path.startswith("vision/")}
    if not checksums:
        raise ConfigError(f"{source} holds no vision encoder: name a model that does with --config.init_from")
    vision = dataclasses.replace(config.model.vision, precomputed=True)
    # A field that is as it was before there was one is left out, so that older sets are still recognised.
    said = {name: value for name, value in to_dict(vision).items() if name != "image_grids" or value}
    mark = json.dumps([said, checksums], sort_keys=True).encode()
    (patches, width), dtype = dataclasses.replace(config.model, vision=vision).image_slot
    return FeatureSpec(hashlib.sha256(mark).hexdigest()[:16], (patches, width), dtype.name)


class FeatureEncoder:
    """The encoder of a finished model, on all devices of this process.

    Args:
      config: the run's.
      source: the finished model; no more of it is read than its encoder.
      batch_size: images that are encoded at once, rounded up to a multiple of the devices.
    """

    def __init__(self, config: Config, source: str, batch_size: int) -> None:
        model, self.spec = config.model, feature_spec(config, source)
        mesh = Mesh(np.asarray(jax.local_devices()), ("data",))
        self.batch_size = -(-batch_size // mesh.size) * mesh.size
        self._rows = NamedSharding(mesh, PartitionSpec("data"))
        dtypes = jnp.dtype(model.dtype), jnp.dtype(model.param_dtype)
        encoder = ENCODERS[model.vision.kind](model.vision, *dtypes, model.scan_layers, "none")
        self._image = Slot.of(model.vision.image_size)
        one = jax.ShapeDtypeStruct((1, *self._image.shape), self._image.dtype)
        params = meta.unbox(jax.eval_shape(encoder.init, jax.random.key(0), one)["params"])
        place = NamedSharding(mesh, PartitionSpec())
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params)
        self._params = load_model(source, abstract={"vision": wanted}, partial=True)[0]["vision"]
        self._encode = jax.jit(lambda params, images: encoder.apply({"params": params}, images)[0])

    def __call__(self, images: Sequence[UInt8[np.ndarray, "height width 3"]]) -> Float[Array, "I P C"]:
        """Features of at most `batch_size` images, and of padding up to that number; it does not wait for them."""
        padded = np.zeros((self.batch_size, *self._image.shape), self._image.dtype)
        padded[: len(images)] = np.stack(images)
        return self._encode(self._params, jax.device_put(padded, self._rows))
