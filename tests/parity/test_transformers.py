"""Tiny random models of every family against transformers' own PyTorch modules, through saved checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saisa_jax import presets
from saisa_jax.batch import Batch, empty_batch
from saisa_jax.config import ModelConfig, RopeScalingConfig
from saisa_jax.convert.configs import config_from_hf, decoder_to_hf
from saisa_jax.convert.import_checkpoint import resized
from saisa_jax.convert.layouts import layout_for
from saisa_jax.convert.read import import_model, import_params
from saisa_jax.convert.rows import ConvertError
from saisa_jax.convert.write import export_params
from saisa_jax.models.encoders.convnext import ConvNext
from saisa_jax.models.encoders.vit import VisionEncoder
from saisa_jax.models.layers import rotary_frequencies
from saisa_jax.models.saisa import Saisa

torch = pytest.importorskip("torch", reason="CPU torch is not installed")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

RANGE = 0.1  # of the random weights
PROMPT = 600  # tokens: long enough that a wrong rotation or window shows
SMALL = {
    "vocab_size": 150, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": RANGE, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {  # of a first context so short that some frequencies are kept, some divided, some in between
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_theta": 5e5}),
    "llama-wide-heads": ("Llama", {"head_dim": 20, "rms_norm_eps": 1e-5}),
    "llama3": ("Llama", {"head_dim": 20, "rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "llama-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rope_theta": 1e5}),
    "mistral": ("Mistral", {"sliding_window": 100}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"rope_theta": 1e6, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "head_dim": 20}),
    "qwen3": ("Qwen3", {"head_dim": 20, "rope_theta": 1e6, "tie_word_embeddings": True}),
}
PIXELS = 56
TOWER = {
    "image_size": PIXELS, "patch_size": 14, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 64,
}  # fmt: skip


def randomized(model: Any) -> Any:
    """Biases, norms and tables that start as zeros and ones get values that show when they are mixed up."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * RANGE)
    return model.eval()


def saved(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


def text_only(config: ModelConfig) -> ModelConfig:
    """A tiny tower, which a row without image slots never calls."""
    vision = dataclasses.replace(config.vision, image_size=14, embed_dim=8, num_heads=2, num_layers=1, mlp_dim=8)
    return dataclasses.replace(config, vision=vision, dtype="float32")


def logits_of(config: ModelConfig, params: Any, batch: Batch) -> np.ndarray:
    """[T, W] of the only row, without the padding of the vocabulary."""
    logits, _ = jax.jit(lambda p, b: Saisa(config).apply({"params": p}, b))(params, batch)
    return np.asarray(logits)[0, :, : config.vocab_size]


@pytest.mark.parametrize("family", DECODERS)
def test_decoder(family: str, tmp_path: Path, close: Callable[..., None]) -> None:
    name, options = DECODERS[family]
    torch.manual_seed(0)
    theirs = randomized(getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(
        **SMALL, **options)))  # fmt: skip
    tokens = np.random.default_rng(0).integers(3, SMALL["vocab_size"], PROMPT)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens[None])).logits[0].numpy()
    config = text_only(config_from_hf(saved(theirs, tmp_path / "theirs")))
    params = import_params(tmp_path / "theirs", config).params
    batch = empty_batch(1, PROMPT, 0, config.vision.image_size)
    batch["tokens"][0], batch["positions"][0], batch["segment_ids"][0] = tokens, np.arange(PROMPT), 1
    close(logits_of(config, params, batch), expected, atol=1e-4)

    # What we write, their class reads.
    export_params(params, config, "hf-llm", tmp_path / "ours")
    theirs.config.save_pretrained(tmp_path / "ours")
    again, loading = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_every_preset_has_as_many_parameters_as_its_class() -> None:
    """Of transformers, made without memory from what an export of the preset would say."""
    for name in presets.LLMS:
        config = presets.make(name, "clip-vit-l-336")
        fields = decoder_to_hf(config)
        with torch.device("meta"):
            theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**fields))
        rows = layout_for(config, "hf-llm").rows
        assert sum(p.numel() for p in theirs.parameters()) == sum(math.prod(r.theirs) * len(r.keys) for r in rows), name


@pytest.mark.parametrize("family", ["llama", "llama3", "llama-linear"])
def test_rotary_frequencies_to_the_bit(family: str, tmp_path: Path) -> None:
    _, options = DECODERS[family]
    theirs = transformers.LlamaConfig(**SMALL, **options)
    theirs.save_pretrained(tmp_path)
    expected = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs).inv_freq.numpy()
    config = config_from_hf(tmp_path, layout="hf-llm")
    np.testing.assert_array_equal(rotary_frequencies(config), expected)
    if family == "llama3":
        plain = rotary_frequencies(dataclasses.replace(config, rope_scaling=RopeScalingConfig()))
        share = expected / plain
        assert (share == 1).any() and (share == 1 / 8).any() and ((share > 1 / 8) & (share < 1)).any()


def encoder(family: str) -> Any:
    if family == "clip":
        return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER))
    if family == "clip-gelu":
        return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER, hidden_act="gelu"))
    if family == "siglip":
        return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER))
    if family == "siglip-remainder":  # 61 // 14 patches a side: as many as of 56, as 384 // 14 of so400m
        return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**(TOWER | {"image_size": 61})))
    if family == "convnext":
        sizes = {"hidden_sizes": [24, 32, 40], "depths": [2, 1, 3], "num_stages": 3, "image_size": 64}
        return transformers.ConvNextModel(transformers.ConvNextConfig(**sizes))
    small = {key: value for key, value in TOWER.items() if key != "intermediate_size"}
    if family == "dinov2_with_registers":
        config = transformers.Dinov2WithRegistersConfig(**small, mlp_ratio=2, num_register_tokens=3)
        return transformers.Dinov2WithRegistersModel(config)
    return transformers.Dinov2Model(transformers.Dinov2Config(**small, mlp_ratio=2))


def pictures(config: ModelConfig, count: int) -> tuple[np.ndarray, Any]:
    """Images as we take them, uint8, and as torch does."""
    size = config.vision.image_size
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    mean, std = np.float32(config.vision.image_mean), np.float32(config.vision.image_std)
    return images, torch.tensor(((images / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("select_layer", [-1, -2])
@pytest.mark.parametrize(
    "family", ["clip", "clip-gelu", "siglip", "siglip-remainder", "dinov2", "dinov2_with_registers"]
)
def test_encoder(family: str, select_layer: int, tmp_path: Path, close: Callable[..., None]) -> None:
    torch.manual_seed(0)
    theirs = randomized(encoder(family))
    config = config_from_hf(saved(theirs, tmp_path), select_layer=select_layer)
    images, pixels = pictures(config, 2)
    with torch.no_grad():
        states = theirs(pixels, output_hidden_states=True).hidden_states
    first = int(config.vision.class_token) + config.vision.num_registers
    params = import_params(tmp_path, config).params["vision"]
    features, hidden = VisionEncoder(config.vision).apply({"params": params}, jnp.asarray(images), capture=True)
    close(features, states[select_layer][:, first:].numpy(), atol=1e-4, what="features")
    used = config.vision.num_used_layers + 1
    close(hidden, torch.stack(states[:used]).numpy(), atol=1e-4, what="hidden states")


@pytest.mark.parametrize("image_size", [64, 75])
@pytest.mark.parametrize("select_layer", [-1, -2])
def test_convnext(select_layer: int, image_size: int, tmp_path: Path, close: Callable[..., None]) -> None:
    torch.manual_seed(0)
    theirs = randomized(encoder("convnext"))
    config = config_from_hf(saved(theirs, tmp_path), select_layer=select_layer)
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=image_size))
    images, pixels = pictures(config, 2)
    with torch.no_grad():
        out = theirs(pixels, output_hidden_states=True)
    states = [state.permute(0, 2, 3, 1).numpy() for state in out.hidden_states]
    np.testing.assert_array_equal(states[-1], out.last_hidden_state.permute(0, 2, 3, 1))
    params = import_params(tmp_path, config).params["vision"]
    features, maps = ConvNext(config.vision).apply({"params": params}, jnp.asarray(images), capture=True)
    expected = states[select_layer].reshape(2, config.vision.num_patches, config.vision.embed_dim)
    close(features, expected, atol=1e-4, what="features")
    assert len(maps) == config.vision.num_used_layers + 1
    for ours, state in zip(maps, states, strict=False):
        close(ours, state, atol=1e-4, what="hidden states")


@pytest.mark.parametrize("size", [42, 84])
@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2", "dinov2_with_registers"])
def test_encoder_on_images_of_another_size(family: str, size: int, tmp_path: Path, close: Callable[..., None]) -> None:
    """Positions are resampled as theirs are: smaller and larger pictures than the table was made for."""
    torch.manual_seed(0)
    theirs = randomized(encoder(family))
    config = config_from_hf(saved(theirs, tmp_path), select_layer=-1)
    config = dataclasses.replace(config, vision=resized(config.vision, size))
    images, pixels = pictures(config, 1)
    always = {} if "dinov2" in family else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = theirs(pixels, output_hidden_states=True, **always).hidden_states[-1]
    params = import_params(tmp_path, config).params["vision"]
    features, _ = VisionEncoder(config.vision).apply({"params": params}, jnp.asarray(images))
    assert features.shape[1] == (size // 14) ** 2 != config.vision.positions_per_side**2
    close(features, expected[:, -config.vision.num_patches :].numpy(), atol=1e-4, what="features")


OLD_PREFIX = {  # of the keys that transformers 4 wrote, or that the class with a head writes
    "clip": "vision_model.", "siglip": "vision_model.", "dinov2": "dinov2.", "convnext": "convnext.",
    "dinov2_with_registers": "dinov2_with_registers.",
}  # fmt: skip


@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("family", OLD_PREFIX)
def test_encoder_comes_back_bit_for_bit_from_either_spelling(family: str, prefixed: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = randomized(encoder(family))
    config = config_from_hf(saved(theirs, tmp_path / "theirs"), select_layer=-1)
    if family != "convnext":  # whose last norm is the classifier's
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, post_norm=True))
    written = load_file(tmp_path / "theirs" / "model.safetensors")
    if prefixed:
        written = {OLD_PREFIX[family] + key.removeprefix(OLD_PREFIX[family]): value for key, value in written.items()}
        save_file(written, tmp_path / "theirs" / "model.safetensors")
    imported = import_params(tmp_path / "theirs", config)
    export_params(imported.params, config, "hf-vision", tmp_path / "ours", parts=("vision",))
    exported = load_file(tmp_path / "ours" / "model.safetensors")
    canonical = layout_for(config, "hf-vision").canonical
    unread = {canonical(key) for key in imported.ignored}
    expected = {canonical(key): value for key, value in written.items() if canonical(key) not in unread}
    assert exported.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(exported[key], value, err_msg=key)
    # What we write, their class reads, but for what we never keep.
    theirs.config.save_pretrained(tmp_path / "ours")
    again, loading = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert {canonical(key) for key in loading["missing_keys"]} <= unread
    state = again.state_dict()
    for key, value in theirs.state_dict().items():
        assert key in loading["missing_keys"] or torch.equal(state[key], value), key


@pytest.mark.parametrize("family", ["siglip", "siglip-remainder", "dinov2", "dinov2_with_registers"])
def test_encoder_with_its_final_norm(family: str, tmp_path: Path, close: Callable[..., None]) -> None:
    torch.manual_seed(0)
    theirs = randomized(encoder(family))
    config = config_from_hf(saved(theirs, tmp_path), select_layer=-1)
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, post_norm=True))
    images, pixels = pictures(config, 1)
    with torch.no_grad():
        expected = theirs(pixels).last_hidden_state
    params = import_params(tmp_path, config).params["vision"]
    features, _ = VisionEncoder(config.vision).apply({"params": params}, jnp.asarray(images))
    close(features, expected[:, -config.vision.num_patches :].numpy(), atol=1e-4, what="features")


def test_a_whole_siglip2_is_read_as_its_encoder(tmp_path: Path, close: Callable[..., None]) -> None:
    """As the hub has those of one resolution: with the model of texts, under `vision_model.`; NaFlex is refused."""
    torch.manual_seed(0)
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    both = transformers.SiglipConfig(text_config=text | {"vocab_size": 256}, vision_config=TOWER)
    theirs = randomized(transformers.SiglipModel(both))
    config = config_from_hf(saved(theirs, tmp_path))
    assert config.vision.family == "siglip" and config.vision.select_layer == -2
    images, pixels = pictures(config, 1)
    with torch.no_grad():
        expected = theirs.vision_model(pixels, output_hidden_states=True).hidden_states[-2]
    imported = import_params(tmp_path, config)
    assert any(key.startswith("text_model.") for key in imported.ignored)
    features, _ = VisionEncoder(config.vision).apply({"params": imported.params["vision"]}, jnp.asarray(images))
    close(features, expected.numpy(), atol=1e-4, what="features")
    naflex = transformers.Siglip2Config().to_dict()
    with pytest.raises(ConvertError, match=r"'siglip2_vision_model' .*NaFlex.*; take a SigLIP2 of one resolution"):
        config_from_hf(tmp_path, layout="hf-vision", raw=naflex)


@pytest.mark.parametrize(("tower", "family"), [("clip", "llama"), ("siglip", "qwen3")])
def test_llava(tower: str, family: str, tmp_path: Path, close: Callable[..., None]) -> None:
    """The whole baseline: a picture between text, in the layout that transformers 5 saves."""
    torch.manual_seed(0)
    vision = encoder(tower).config
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=getattr(transformers, f"{DECODERS[family][0]}Config")(**SMALL, **DECODERS[family][1]),
        image_token_index=149,
        vision_feature_select_strategy="default" if tower == "clip" else "full",
    )
    theirs = randomized(transformers.LlavaForConditionalGeneration(config))
    saved(theirs, tmp_path)
    imported = import_model(tmp_path)
    ours = dataclasses.replace(imported.config, dtype="float32")
    patches = ours.vision.num_patches
    before, after = [1, 5, 9], [7, 30, 31, 32]
    images, pixels = pictures(ours, 1)
    ids = torch.tensor([before + [149] * patches + after])
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=pixels).logits[0].numpy()
    batch = empty_batch(1, len(before + after), 1, ours.vision.image_size)
    batch["tokens"][0] = before + after
    batch["positions"][0] = places = np.array([0, 1, 2, *(patches + np.arange(3, 7))])
    batch["segment_ids"][0], batch["images"][0] = 1, images
    batch["image_positions"][0], batch["image_segment_ids"][0] = len(before), 1
    close(logits_of(ours, imported.params, batch), expected[places], atol=1e-4)
