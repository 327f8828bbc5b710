"""Any resolution against transformers' LLaVA-NeXT: a tiny one with random weights, from the picture to the logits.

Its class merges tiles row by row, with `image_newline`; here, as in LLaVA's own program with
`mm_patch_merge_type=flat`, views stand one behind the other. So the one function that merges is replaced; pixels, the
number of views, encoder, connector and decoder are theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from saisa_jax.convert.read import import_model
from saisa_jax.data.rows.collate import Example, pack_rows
from saisa_jax.data.text.conversation import Encoded
from saisa_jax.data.views import prepare_views
from saisa_jax.models.saisa import Saisa

torch = pytest.importorskip("torch", reason="CPU torch is not installed")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

SIZE, P, IMAGE = 28, 4, 149
GRIDS = ((SIZE, 2 * SIZE), (2 * SIZE, SIZE), (2 * SIZE, 2 * SIZE))
PICTURES = [(90, 31), (50, 64)]  # 3 and 5 views
BEFORE, BETWEEN, AFTER = [1, 5, 9], [12, 13], [7, 30, 31, 32]


def make_pair(tmp_path: Path) -> tuple[Any, Any]:
    """Their LLaVA-NeXT, and the same weights as LLaVA's, which are read."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        image_size=SIZE, patch_size=14, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64
    )
    text = transformers.LlamaConfig(
        vocab_size=150, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    same: dict[str, Any] = {"vision_config": vision, "text_config": text, "image_token_index": IMAGE}
    theirs = transformers.LlavaNextForConditionalGeneration(
        transformers.LlavaNextConfig(**same, image_grid_pinpoints=[list(grid) for grid in GRIDS])
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    plain = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**same))
    plain.load_state_dict({key: x for key, x in theirs.state_dict().items() if "image_newline" not in key})
    plain.save_pretrained(tmp_path)
    return theirs, import_model(tmp_path)


def flat(image_features: Any, *_: Any, **__: Any) -> Any:
    """As LLaVA's `mm_patch_merge_type=flat`."""
    merged = [views.flatten(0, 1) for views in image_features]
    return merged, torch.tensor([len(tokens) for tokens in merged])


def test_logits(tmp_path: Path, close: Callable[..., None]) -> None:
    theirs, imported = make_pair(tmp_path)
    vision = dataclasses.replace(imported.config.vision, image_mode="anyres", image_grids=GRIDS)
    ours = dataclasses.replace(imported.config, dtype="float32", vision=vision)
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (h, w, 3), np.uint8)) for w, h in PICTURES]
    views = [prepare_views(image, vision) for image in images]
    assert [len(each) for each in views] == [3, 5]

    processor = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_grid_pinpoints=[list(grid) for grid in GRIDS],
    )
    theirs.model.pack_image_features = flat
    ids = [*BEFORE, *[IMAGE] * 3 * P, *BETWEEN, *[IMAGE] * 5 * P, *AFTER]
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor([ids]), **processor(images, return_tensors="pt")).logits[0].numpy()

    places = np.flatnonzero(np.array(ids) != IMAGE).astype(np.int32)
    tokens = np.array(ids, np.int32)[places]
    starts = np.concatenate([3 + P * np.arange(3), 5 + P * np.arange(3, 8)]).astype(np.int32)
    nothing = np.zeros(len(tokens), np.float32)
    encoded = Encoded("s", tokens, tokens, nothing, places, starts, len(ids), (3, 5))
    batch = pack_rows([[Example(encoded, list(np.concatenate(views)))]], len(tokens), 8, SIZE)
    logits, _ = jax.jit(Saisa(ours).apply)({"params": imported.params}, batch)
    close(np.asarray(logits)[0, :, : ours.vocab_size], expected[places], atol=1e-4)
