"""The examples of docs/extending.md, each a whole file: run, and used through the public registration points alone."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saisa_jax.config import ATTENTION_IMPLS, ModelConfig, ProjectorConfig, SourceConfig, VisionConfig
from saisa_jax.convert.configs import decoder_to_hf
from saisa_jax.convert.families import DECODERS
from saisa_jax.convert.families import ENCODERS as FAMILIES
from saisa_jax.convert.layouts import decoder_family, layout_for
from saisa_jax.data.pipeline import StageData
from saisa_jax.data.sample import ASSISTANT, USER, Turn
from saisa_jax.data.sources import SOURCES
from saisa_jax.data.text.conversation import encode
from saisa_jax.data.text.templates import TEMPLATES
from saisa_jax.data.text.tokenizer import load_tokenizer
from saisa_jax.evaluation.tasks import TASKS, Item, TaskData
from saisa_jax.models.attention import KERNELS
from saisa_jax.models.encoders import ENCODERS
from saisa_jax.models.projectors import PROJECTORS
from saisa_jax.models.saisa import Saisa, init_params
from saisa_jax.testing.batches import IMAGE, make_batch
from saisa_jax.testing.configs import tiny_config

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
Run = Callable[[str], ModuleType]
EXAMPLES = dict(re.findall(r"^## (.*?)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture(autouse=True)
def nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for registry in (PROJECTORS, ENCODERS, SOURCES, TASKS, FAMILIES, DECODERS):
        monkeypatch.setattr(registry, "_entries", dict(registry))
    tables = [(table, dict(table)) for table in (TEMPLATES, ATTENTION_IMPLS, KERNELS)]
    yield
    for name in [name for name in sys.modules if name.startswith("example_")]:
        del sys.modules[name]
    for table, before in tables:
        table.clear()
        table.update(before)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Writes the example under a heading of the page into a file and imports it."""

    def write_and_import(heading: str) -> ModuleType:
        name = "example_" + re.sub(r"\W", "_", heading.lower())
        (tmp_path / f"{name}.py").write_text(EXAMPLES[heading])
        monkeypatch.syspath_prepend(str(tmp_path))
        return importlib.import_module(name)

    return write_and_import


def logits(config: ModelConfig, params: Any, batch: Any, model: type[Saisa] = Saisa) -> jax.Array:
    return jax.jit(lambda p, b: model(config).apply({"params": p}, b)[0][..., : config.vocab_size])(params, batch)


def test_every_example_has_a_test() -> None:
    assert {f"test_{re.sub(r'^an? ', '', name.lower()).replace(' ', '_')}" for name in EXAMPLES} <= set(globals())


def test_projector(run: Run) -> None:
    run("A projector")
    config = dataclasses.replace(tiny_config().model, projector=ProjectorConfig("gated", sharing="per_layer"))
    params = init_params(config, jax.random.key(0))
    assert params["layers"]["visual_proj"]["gate"]["kernel"].shape[0] == config.num_layers
    batch = make_batch(config, [[5, IMAGE, 6, 7]])
    gradient = jax.grad(lambda p: jnp.sum(logits(config, p, batch) ** 2))(params)
    assert np.abs(gradient["layers"]["visual_proj"]["gate"]["kernel"]).max() > 0


def test_vision_encoder(run: Run) -> None:
    run("A vision encoder")
    model = tiny_config().model
    config = dataclasses.replace(model, vision=dataclasses.replace(model.vision, kind="pooled"))
    params = init_params(config, jax.random.key(0))
    assert params["vision"]["colors"]["kernel"].shape == (3, config.vision.embed_dim)
    batch = make_batch(config, [[IMAGE, 5, 6]])
    other = dict(batch, images=255 - batch["images"])
    assert np.abs(logits(config, params, batch) - logits(config, params, other)).max() > 1e-4


def test_family_of_encoders(run: Run) -> None:
    """tests/test_convert/test_families.py imports and exports with it."""
    family = FAMILIES["pooled"] if run("A family of encoders") else None
    config = VisionConfig(family="pooled", kind="pooled", image_size=24, patch_size=8, embed_dim=16, num_heads=1)
    (kernel, bias) = layout_for(dataclasses.replace(tiny_config().model, vision=config), "hf-vision").rows
    assert (kernel.theirs, kernel.ours, bias.key) == ((16, 3), (3, 16), "to_width.bias")
    assert family is not None and family.config_to_hf(config) == {"pixels": 24, "window": 8, "width": 16}


def test_family_of_decoders(run: Run) -> None:
    run("A family of decoders")
    wide = dataclasses.replace(tiny_config().model, max_length=123)
    assert decoder_family(wide) is DECODERS["extra_wide"] and decoder_family(tiny_config().model) is DECODERS["llama"]
    assert "max_position_embeddings" not in decoder_to_hf(wide)


def test_data_source(run: Run, tmp_path: Path) -> None:
    run("A data source")
    (tmp_path / "words.txt").write_text("red blue green yellow " * 4)
    config = tiny_config()
    source = SourceConfig("words", path=str(tmp_path / "words.txt"))
    finetune = dataclasses.replace(config.finetune, sources=(source,), validation=())
    data = dataclasses.replace(config.data, turns_per_sample=None)
    iterator = StageData(
        dataclasses.replace(config, finetune=finetune, data=data), "finetune", load_tokenizer("easy_vqa")
    ).batches()
    batch = next(iterator)
    iterator.close()
    assert {name.split("/")[0] for row in batch.sample_ids for name in row} == {"words"}
    assert batch.batch["loss_weights"].any()


def test_benchmark(run: Run, tmp_path: Path) -> None:
    run("A benchmark")
    row = {"id": "1", "image": "a.png", "question": "is it red?", "answers": ["yes", "yeah"], "kind": "color"}
    (tmp_path / "questions.json").write_text(json.dumps([row]))
    task = TASKS["pictures"]
    (item,) = task.items(TaskData(str(tmp_path / "questions.json"), "folder"))
    assert isinstance(item, Item) and task.score("Yeah.", item) == 1 and task.score("no", item) == 0
    scored = [{"image": image, "score": score} for image, score in (("a", 1.0), ("a", 0.0), ("b", 1.0))]
    assert task.metrics(scored) == {"pictures": 0.5}


def test_prompt_template(run: Run) -> None:
    run("A prompt template")
    tokenizer = load_tokenizer("easy_vqa")
    turns = Turn(USER, "what color is the shape?"), Turn(ASSISTANT, "red")
    encoded = encode(turns, "question_answer", tokenizer, num_patches=4, num_images=0)
    assert encoded.tokens[0] == tokenizer.bos_token_id and encoded.loss_weights.any()
    learned = encoded.targets[encoded.loss_weights > 0]
    assert learned[-1] == tokenizer.eos_token_id and "red" in tokenizer.decode(learned)


def test_attention_implementation(run: Run) -> None:
    run("An attention implementation")
    config = tiny_config().model
    params = init_params(config, jax.random.key(0))
    batch = make_batch(config, [[5, IMAGE, 6, 7], [3, 9, 4, 8, 2]])
    inside = batch["segment_ids"] > 0
    library = dataclasses.replace(config, attention_impl="library")
    expected = logits(config, params, batch)
    np.testing.assert_allclose(logits(library, params, batch)[inside], expected[inside], rtol=0, atol=1e-5)


def test_alignment(run: Run) -> None:
    model = run("An alignment").SaisaWithMLP
    config = tiny_config().model
    params = init_params(config, jax.random.key(0))
    batch = make_batch(config, [[5, IMAGE, 6, 7]])
    whole = logits(config, params, batch, model)
    assert np.abs(whole - logits(config, params, batch)).max() > 1e-4
    # The image cache computes the same: the last token's logits, read through cached keys and values.
    last, _ = model(config).apply({"params": params}, batch, 0, method="prefill")
    np.testing.assert_allclose(last[:, : config.vocab_size], whole[:, -1], rtol=0, atol=1e-5)
