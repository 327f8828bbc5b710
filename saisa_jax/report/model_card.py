"""The README.md of a model that goes to the Hugging Face hub: what the checkpoint itself says, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saisa_jax import flops
from saisa_jax.checkpoints import read_account
from saisa_jax.config import STAGES, Config, FlamingoConfig, ModelConfig, ProjectorConfig, StageConfig
from saisa_jax.convert import sidecar
from saisa_jax.convert.layouts import decoder_family

TEXT = 64  # tokens of the prompt whose FLOPs the card names
USE = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True, padding_side="left")
content = [{{"type": "image", "path": "picture.png"}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
tokens = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1]:]
print(processor.batch_decode(tokens, skip_special_tokens=True)[0])
```
"""


def model_card(checkpoint: str, layout: str, name: str) -> str:
    """The card of a finished model, in Markdown.

    Args:
      checkpoint: the finished model.
      layout: that it is exported in.
      name: of the repository, ORG/NAME.

    Raises:
      CheckpointError: the checkpoint cannot be read.
    """
    document, config = read_account(checkpoint)
    stage = document["metadata"]["stage"]
    model = config.model_for(stage)
    sources = {name: source for name, (source, _) in sidecar.read(checkpoint).items()}
    sees = any(path.startswith("vision/") for path in document["leaves"])
    sections = [
        _front(layout, [source.repository for source in sources.values() if source.repository]),
        f"# {name.split('/')[-1]}\n",
        _what(model, document["parameters"], sees),
        *(["## Use\n", USE.format(name=name)] if layout == "hf" else []),
        *(["## Cost\n", _cost(model)] if sees else []),
        "## Training\n",
        "\n".join(_training(config, document["metadata"])) + "\n",
        "## Licences\n",
        "\n".join(_licences(checkpoint, sources)) + "\n",
    ]
    return "\n".join(sections)


def _front(layout: str, bases: list[str]) -> str:
    lines = ["---", "pipeline_tag: image-text-to-text"]
    lines += ["library_name: transformers"] if layout in ("hf", "llava-hf", "hf-llm", "hf-vision") else []
    lines += ["base_model:", *(f"- {base}" for base in bases)] if bases else []
    return "\n".join([*lines, "tags:", "- saisa_jax", "- vision-language", "---", ""])


def _what(model: ModelConfig, parameters: int, sees: bool) -> str:
    visual = {
        "saisa": "visual tokens are keys and values of its layers, and nothing else: no queries, no MLP",
        "naavit": "visual tokens ask nothing; they are keys and values, and go through the MLPs",
        "llava": "visual tokens are part of the sequence",
        "flamingo": "visual tokens are keys and values of gated cross layers, one before every "
        f"{model.flamingo.every} of the decoder's"
        + (", which read the text since the image as well" if model.flamingo.local_text else ""),
    }[model.alignment]
    each = "one for each layer that sees the image" if model.per_layer_projectors else "one for all layers"
    rows = {
        "alignment": f"{model.alignment}: {visual} ([arXiv 2502.02458](https://arxiv.org/abs/2502.02458))",
        "parameters": f"{parameters:,}",
        "decoder": f"{decoder_family(model).model_type}, {model.num_layers} layers of width {model.embed_dim}",
    }
    if sees:
        vision = model.vision
        views = f", for each of up to {vision.max_views} views" if vision.grids else ""
        rows["vision encoder"] = (
            f"{vision.family}, images of {vision.image_size} pixels ({vision.image_mode}), {model.num_visual_tokens} "
            f"visual tokens of width {vision.embed_dim}{views}"
        )
        rows["projectors"] = f"{model.projector.kind}, {each}"
    if model.visual_layers is not None:
        rows["layers that see the image"] = ", ".join(map(str, model.visual_layers))
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""])


def _cost(model: ModelConfig) -> str:
    """Prefill of one image, beside LLaVA of the same decoder and encoder."""
    shared = ProjectorConfig(sharing="shared")
    llava = dataclasses.replace(
        model, alignment="llava", projector=shared, visual_layers=None, flamingo=FlamingoConfig()
    )
    here, there = (flops.prefill(each, TEXT).total / 1e12 for each in (model, llava))
    beside = "" if model.alignment == "llava" else f"; LLaVA of the same decoder and encoder {there:.4g}"
    return (
        f"A prompt of one image and {TEXT} text tokens takes {here:.4g} TFLOPs until the first token of the answer, "
        f"encoder and head included{beside}.\n"
    )


def _training(config: Config, metadata: dict[str, Any]) -> Iterator[str]:
    imported = metadata.get("imported")
    if imported is not None:
        yield f"Imported ({', '.join(imported['parts'])}) and not trained by saisa_jax since."
        return
    for name in STAGES[: STAGES.index(metadata["stage"]) + 1]:
        yield f"- {name}: {_stage(config.stage(name))}"
    yield f"- trained with [saisa_jax](https://arxiv.org/abs/2502.02458), recipe `{config.name}`, seed {config.seed}"


def _stage(stage: StageConfig) -> str:
    data = ", ".join(source.name or Path(source.path).name or source.format for source in stage.sources) or "no data"
    length = f"{stage.steps} steps" if stage.steps else f"{stage.epochs:g} epoch(s)"
    return (
        f"{data}; {length} of {stage.batch_size} rows, learning rate {stage.optimizer.lr:g} "
        f"({stage.optimizer.schedule}), template `{stage.template}`, projectors {stage.sharing}"
    )


def _licences(checkpoint: str, sources: dict[str, sidecar.Source]) -> Iterator[str]:
    for source in sources.values():
        where = f"[{source.repository}](https://huggingface.co/{source.repository})" if source.repository else "files"
        parts = ", ".join(source.parts)
        yield f"- {parts}: made from {where} (layout {source.layout}), whose licence holds here as well"
    terms = sorted({file.name for _, kept in sidecar.read(checkpoint).values() for file in sidecar.kept_files(kept)})
    terms = [name for name in terms if name in sidecar.TERMS]
    if terms:
        yield f"- terms that came with them: {', '.join(terms)}"
    if not sources:
        yield "- trained from random weights; the licences of the training data are their publishers'"
