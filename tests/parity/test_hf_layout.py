"""An export of the layout hf, opened by transformers with the code that goes with it, computes what we compute."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import saisa_jax
from saisa_jax.__main__ import main
from saisa_jax.batch import Batch, empty_batch
from saisa_jax.checkpoints import load_model, save_model
from saisa_jax.config import ModelConfig, ProjectorConfig, VisionConfig
from saisa_jax.convert.import_checkpoint import resized
from saisa_jax.data.images import prepare_image
from saisa_jax.data.sample import USER, Turn
from saisa_jax.data.text.conversation import encode_prompt
from saisa_jax.data.text.tokenizer import train_tokenizer
from saisa_jax.models.saisa import Saisa, abstract_params
from saisa_jax.testing.configs import tiny_config
from saisa_jax.testing.tokenizers import byte_level, sentence_piece

torch = pytest.importorskip("torch", reason="CPU torch is not installed")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

NEW = 5  # tokens that are generated
TEXTS = ((7, 12), (4, 3, 9), (16,))  # tokens before, between and after the images of each row


def changed(alignment: str = "saisa", vision: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    model = tiny_config(alignment).model
    return dataclasses.replace(model, vision=dataclasses.replace(model.vision, **(vision or {})), **changes)


SHARED = ProjectorConfig(sharing="shared", hidden_dim=24)
SIGLIP = {"family": "siglip", "class_token": False, "pre_norm": False, "patch_bias": True, "post_norm": True}
DINO = {"family": "dinov2", "pre_norm": False, "patch_bias": True, "layer_scale": True}
REGISTERS = DINO | {"family": "dinov2_with_registers", "num_registers": 3, "image_size": 40, "position_size": 32}
CONVNEXT = VisionConfig(
    kind="convnext", family="convnext", image_size=32, patch_size=8, embed_dim=16, num_layers=2, depths=(1, 1),
    widths=(8, 16), mlp_dim=64, num_heads=1, class_token=False, pre_norm=False, patch_bias=True, layer_scale=True,
    select_layer=-1, activation="gelu",
)  # fmt: skip
VARIANTS = {
    "saisa": changed(),
    "one projector, Qwen2": changed(projector=SHARED, qkv_bias=True, tie_embeddings=True),
    "low rank": changed(projector=ProjectorConfig(kind="low_rank", rank=6, hidden_dim=24), visual_layers=(1,)),
    "some layers, SigLIP": changed(vision=SIGLIP | {"select_layer": -1}, visual_layers=(1,)),
    "Qwen3": changed(qk_norm=True, visual_layers=(1,)),
    "SmolLM3": changed(unrotated_layers=(1,)),
    "some layers, Mistral, registers": changed(vision=REGISTERS, visual_layers=(0,), sliding_window=20),
    "naavit, Mistral, DINOv2": changed("naavit", DINO | {"select_layer": -1, "post_norm": True}, sliding_window=20),
    "another size of images": dataclasses.replace(changed(), vision=resized(changed().vision, 40)),
    "ConvNeXt": dataclasses.replace(changed(), vision=CONVNEXT),
}


def random_params(model: ModelConfig) -> Any:
    """Weights large enough that every part shows in the logits."""
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.3 * random.standard_normal(x.shape, np.float32), abstract_params(model))


def finished(
    directory: Path, model: ModelConfig, tokenizer: Any = None, system: str | None = None, **changes: Any
) -> Path:
    config = tiny_config(model.alignment)
    finetune = dataclasses.replace(config.finetune, sharing=model.projector.sharing, **changes)
    data = dataclasses.replace(config.data, system_prompt=system)
    config = dataclasses.replace(config, model=model, data=data, finetune=finetune)
    tokenizer = tokenizer or train_tokenizer()
    save_model(directory, random_params(config.model), config, tokenizer, {"stage": "finetune"})
    return directory


def exported(source: Path, to: Path) -> Any:
    """The model in torch."""
    assert main(["convert", "export", f"--from={source}", "--layout=hf", f"--to={to}"]) == 0
    load = transformers.AutoModelForImageTextToText.from_pretrained
    model, loading = load(to, trust_remote_code=True, output_loading_info=True)
    assert not any(loading[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def rows(model: ModelConfig, image_token: int) -> tuple[dict[str, Any], np.ndarray]:
    """Prompts of TEXTS as transformers wants them, padded on the left; and their images, uint8."""
    random = np.random.default_rng(1)
    P, size = model.vision.num_patches, model.vision.image_size
    ids = []
    for counts in TEXTS:
        words = [random.integers(4, 100, count).tolist() for count in counts]
        ids.append([*words[0], *(token for text in words[1:] for token in [image_token] * P + text)])
    length = max(map(len, ids))
    padded = torch.tensor([[0] * (length - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
    images = random.integers(0, 256, (sum(len(counts) - 1 for counts in TEXTS), size, size, 3), np.uint8)
    mean, std = np.float32(model.vision.image_mean), np.float32(model.vision.image_std)
    pixels = torch.tensor(((images / np.float32(255) - mean) / std).transpose(0, 3, 1, 2))
    return {"input_ids": padded, "attention_mask": mask, "pixel_values": pixels}, images


def our_batch(model: ModelConfig, sequences: Any, mask: Any, images: np.ndarray, image_token: int) -> Batch:
    """The same rows, with what was generated, as ours: the text alone, and where the images stand."""
    P = model.vision.num_patches
    found = [row[len(row) - int(valid.sum()) - NEW :].numpy() for row, valid in zip(sequences, mask, strict=True)]
    batch = empty_batch(len(found), max(len(row) for row in found), 2, model.vision.image_size)
    used = 0
    for number, row in enumerate(found):
        (places,) = np.nonzero(row != image_token)
        (visual,) = np.nonzero(row == image_token)
        batch["tokens"][number, : len(places)] = row[places]
        batch["positions"][number, : len(places)] = places
        batch["segment_ids"][number, : len(places)] = 1
        for slot, first in enumerate(visual[::P]):
            batch["image_positions"][number, slot], batch["image_segment_ids"][number, slot] = first, 1
            batch["images"][number, slot] = images[used]
            used += 1
    return batch


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_in_torch_is_ours(variant: str, tmp_path: Path, close: Callable[..., None]) -> None:
    """A batch of one image, two images and none: the logits of every step, from prompt and cache."""
    source = finished(tmp_path / "ckpt", VARIANTS[variant])
    theirs = exported(source, tmp_path / "out")
    params, config, *_ = load_model(source)
    token = theirs.config.image_token_id
    inputs, images = rows(config.model, token)
    out = theirs.generate(
        **inputs, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, output_logits=True,
        return_dict_in_generate=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    batch = our_batch(config.model, out.sequences, inputs["attention_mask"], images, token)
    logits, _ = jax.jit(lambda p, b: Saisa(config.model).apply({"params": p}, b))(params, batch)
    for row, length in enumerate((batch["segment_ids"] > 0).sum(1)):
        ours = np.asarray(logits)[row, length - NEW - 1 : length - 1, : config.model.vocab_size]
        close(ours, torch.stack(out.logits)[:, row].numpy(), atol=1e-4)

    # Without a cache, and the loss: of every token but the first and those after an image.
    labels = inputs["input_ids"].masked_fill((inputs["attention_mask"] == 0) | (inputs["input_ids"] == token), -100)
    with torch.no_grad():
        whole = theirs(**inputs, labels=labels, use_cache=False)
    close(whole.logits[:, -1].numpy(), out.logits[0].numpy(), atol=1e-4)
    assert np.isfinite(whole.loss.item())


def test_back_again_is_the_same_to_the_bit(tmp_path: Path) -> None:
    for number, variant in enumerate(("some layers, SigLIP", "low rank", "another size of images")):
        root = tmp_path / str(number)
        source = finished(root / "ckpt", VARIANTS[variant])
        assert main(["convert", "export", f"--from={source}", "--layout=hf", f"--to={root / 'out'}"]) == 0
        assert main(["convert", "import", f"--from={root / 'out'}", f"--to={root / 'again'}"]) == 0
        (params, config, tokenizer, _), (back, read, spoken, _) = load_model(source), load_model(root / "again")
        jax.tree.map(np.testing.assert_array_equal, params, back)
        unused = {"num_layers": config.model.vision.num_used_layers, "select_layer": -1}
        vision = dataclasses.replace(config.model.vision, **unused)
        ends = read.model.end_token_ids
        assert read.model == dataclasses.replace(config.model, vision=vision, end_token_ids=ends)
        assert tokenizer.get_vocab().items() <= spoken.get_vocab().items()
        assert main(["convert", "export", f"--from={root / 'again'}", "--layout=hf", f"--to={root / 'twice'}"]) == 0
        for file in sorted((root / "out").iterdir()):
            assert (root / "twice" / file.name).read_bytes() == file.read_bytes(), file.name


CONVERSATIONS = {
    "an image first": ["<image>\nwhat shape is present?"],
    "a second question": ["<image>\nis it red?", "no", "is it blue?"],
    "its image last": ["what shape is present? <image>"],
    "images within the text": ["is <image> or is <image> the blue one?"],
    "none": ["is it red?"],
}


@pytest.mark.parametrize(
    ("template", "tokenizer"),
    [
        ("vicuna_v1", "sentence_piece"),
        ("chatml", "byte_level"),
        ("plain", "byte_level"),
        ("llama_3_instruct", "byte_level"),
        ("mistral_instruct", "byte_level"),
    ],
)
def test_its_processor_speaks_as_we_do(
    template: str, tokenizer: str, tmp_path: Path, close: Callable[..., None]
) -> None:
    made = {"byte_level": byte_level, "sentence_piece": sentence_piece}[tokenizer]()
    model = changed(vision={"image_mode": "pad"}, vocab_size=len(made))  # no room for <image>
    source = finished(tmp_path / "ckpt", model, made, "Be brief.", template=template)
    assert main(["convert", "export", f"--from={source}", "--layout=hf", f"--to={tmp_path / 'out'}"]) == 0
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8))
    for texts in [texts for texts in CONVERSATIONS.values() if template != "plain" or len(texts) == 1]:
        turns = [Turn((USER, "assistant")[number % 2], text) for number, text in enumerate(texts)]
        encoded = encode_prompt(turns, template, made, model.vision.num_patches, system_prompt="Be brief.")
        expected = encoded.tokens.tolist()
        messages = [{"role": turn.role, "content": parts(turn.text, image)} for turn in turns]
        inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
        ids = np.ravel(inputs["input_ids"])
        visual = ids == len(made)
        assert ids[~visual].tolist() == expected, texts
        assert visual.sum() == texts[0].count("<image>") * model.vision.num_patches
    pixels = np.asarray(processor.image_processor(image)["pixel_values"])[0]
    mean, std = np.float32(model.vision.image_mean), np.float32(model.vision.image_std)
    square = prepare_image(image, model.vision.image_size, model.vision.image_mode, model.vision.image_mean)
    ours = (square / np.float32(255) - mean) / std
    close(pixels, ours.transpose(2, 0, 1), atol=1e-5)


def parts(text: str, image: Any) -> Any:
    """A turn's content as people write it for transformers: a string without images, or a list of parts."""
    if "<image>" not in text:
        return text
    first, *rest = text.split("<image>")
    found: list[dict[str, Any]] = [{"type": "text", "text": first}] if first else []
    for piece in rest:
        found.append({"type": "image", "image": image})
        found += [{"type": "text", "text": piece}] if piece else []
    return found


def test_the_answers_are_those_of_our_own_generation(tmp_path: Path) -> None:
    """From pictures and words to words, and what it says of prompts that do not fit."""
    source = finished(tmp_path / "ckpt", changed())
    theirs = exported(source, tmp_path / "out")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (40, 64, 3), np.uint8)) for _ in range(2)]
    questions = ["what shape is present?", "is <image> or is <image> red?"]
    ours = saisa_jax.load(source).generate(questions, [images[:1], images], max_new_tokens=NEW)
    contents = [[{"type": "image", "image": images[0]}, {"type": "text", "text": questions[0]}]]
    left = iter(images)
    contents.append(
        [{**part, "image": next(left)} if part["type"] == "image" else part for part in parts(questions[1], None)]
    )
    processor.tokenizer.padding_side = "left"
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": content}] for content in contents],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True,
    )  # fmt: skip
    out = theirs.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    answers = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [answer.strip() for answer in answers] == ours

    with pytest.raises(ValueError, match=r"hold 48 image tokens, and 2 image\(s\) of 16 were given"):
        theirs.generate(**{**inputs, "pixel_values": inputs["pixel_values"][:2]}, max_new_tokens=1)
    with pytest.raises(ValueError, match="pixel_values without an image token"):
        theirs(input_ids=torch.tensor([[5, 6]]), pixel_values=inputs["pixel_values"])


def test_the_official_answers(fixtures_dir: Path, tmp_path: Path) -> None:
    """The tokens that the official program's weights gave in the official program."""
    from safetensors.numpy import load_file

    directory = fixtures_dir / "saisa_tiny"
    expected, numbers = (
        load_file(directory / "expected.safetensors"),
        json.loads((directory / "expected.json").read_text()),
    )
    source, images = tmp_path / "ckpt", ("--tokenizer=none", "--template=vicuna_v1")
    assert main(["convert", "import", f"--from={directory}", f"--to={source}", "--dtype=float32", *images]) == 0
    params, config, _, metadata = load_model(source)
    save_model(tmp_path / "spoken", params, config, train_tokenizer(), metadata)
    theirs = exported(tmp_path / "spoken", tmp_path / "out")
    for prompt in ("p1", "p5", "p0", "long"):
        ids = expected[f"{prompt}.input_ids"].tolist()
        at = ids.index(-200)
        ids[at : at + 1] = [theirs.config.image_token_id] * config.model.vision.num_patches
        features = torch.tensor(expected[f"image_{numbers['prompts'][prompt]['image']}.vision_features"])
        theirs.get_image_features = lambda _, features=features: features[None]
        wanted = expected[f"{prompt}.gen_recomputed_tokens"].tolist()
        out = theirs.generate(
            input_ids=torch.tensor([ids]), pixel_values=torch.zeros(1, 3, 8, 8), max_new_tokens=len(wanted),
            min_new_tokens=len(wanted), do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert out[0, len(ids) :].tolist() == wanted, prompt


def test_a_model_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config()
    save_model(tmp_path / "ckpt", random_params(config.model), config, None, {"stage": "finetune"})
    assert main(["convert", "export", f"--from={tmp_path / 'ckpt'}", "--layout=hf", f"--to={tmp_path / 'out'}"]) == 2
    assert "hf wants a tokenizer, and this model has none: import it with --tokenizer=DIR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (changed("llava"), r"alignment='llava': .* a class of its own, llava-hf"),
        (
            changed(projector=ProjectorConfig(kind="resampler", num_tokens=4, num_heads=2)),
            r"kind='resampler': its projectors are 'mlp' and 'low_rank'",
        ),
        (changed(vision={"select_layer": 0}), r"select_layer=0: features of an encoder without any layer"),
    ],
)
def test_what_it_cannot_say(model: ModelConfig, reason: str, tmp_path: Path, capsys: Any) -> None:
    source = finished(tmp_path / "ckpt", model)
    assert main(["convert", "export", f"--from={source}", "--layout=hf", f"--to={tmp_path / 'out'}"]) == 2
    assert re.search(reason, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
