"""FLOPs: the paper's figures, and the formula against what our programs really multiply."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from saisa_jax import flops, presets
from saisa_jax.__main__ import main
from saisa_jax.batch import empty_batch
from saisa_jax.config import (
    TRAIN_ALL,
    TRAIN_ALL_BUT_VISION,
    TRAIN_PROJECTOR,
    ConfigError,
    GroupConfig,
    Groups,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
)
from saisa_jax.models.saisa import Saisa, abstract_params
from saisa_jax.testing.programs import products_in

TEXT = 16


def seven_b(alignment: str, **overrides: Any) -> ModelConfig:
    return presets.make("vicuna-7b", "clip-vit-l-336", alignment, **overrides)


def small(alignment: str = "saisa", **overrides: Any) -> ModelConfig:
    """Of the demo's kind: the vision encoder is a good part of the work."""
    vision = VisionConfig(image_size=32, patch_size=8, embed_dim=32, num_layers=3, num_heads=2, mlp_dim=64)
    fields = {
        "vocab_size": 200,
        "embed_dim": 48,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "mlp_dim": 96,
        "dtype": "float32",
        "scan_layers": False,
        "vision": vision,
        "projector": ProjectorConfig(sharing="per_layer" if alignment == "saisa" else "shared", hidden_dim=40),
    }
    return ModelConfig(alignment=alignment, **(fields | overrides))


CONVNEXT = VisionConfig(
    kind="convnext",
    image_size=70,
    patch_size=8,
    embed_dim=48,
    num_layers=2,
    depths=(2, 1),
    widths=(32, 48),
    class_token=False,
    pre_norm=False,
    select_layer=-1,
)
VARIANTS = {
    "saisa": small(),
    "saisa, one projector": small(projector=ProjectorConfig(sharing="shared")),
    "saisa, some layers": small(visual_layers=(1,), tie_embeddings=True),
    "saisa, convnext": small(vision=CONVNEXT),
    "naavit": small("naavit"),
    "llava": small("llava", num_kv_heads=4),
}


# --- The paper's figures ---------------------------------------------------------------------------------------------


def test_the_papers_figures() -> None:
    """8.50 TFLOPs for LLaVA-1.5-7B, 2.86 for SAISA: 66% less."""
    total = {
        name: flops.prefill(seven_b(name), text=64, convention="paper").total for name in ("llava", "naavit", "saisa")
    }
    assert round(total["llava"] / 1e12, 2) == 8.50
    assert round(total["naavit"] / 1e12, 3) == 7.074
    assert round(total["saisa"] / 1e12, 2) == 2.86
    assert round(100 * (total["saisa"] / total["llava"] - 1), 1) == -66.4


def test_the_one_projector_before_the_layers_counts_in_the_decoder_convention() -> None:
    total = {
        name: flops.prefill(seven_b(name), text=64, convention="decoder").total for name in ("llava", "naavit", "saisa")
    }
    assert {name: round(flops_ / 1e12, 3) for name, flops_ in total.items()} == {
        "llava": 8.528,
        "naavit": 7.098,
        "saisa": 2.860,
    }
    assert round(100 * (total["saisa"] / total["llava"] - 1), 1) == -66.5


@pytest.mark.parametrize(
    ("llm", "vision", "llava", "saisa"),
    [
        ("vicuna-13b", "clip-vit-l-336", 16.576, 5.523),
        ("llama3-8b", "clip-vit-l-336", 9.148, 1.997),  # grouped keys and values
        ("vicuna-7b", "siglip-so400m-384", 10.601, 3.424),
    ],
)
def test_other_sizes(llm: str, vision: str, llava: float, saisa: float) -> None:
    for alignment, expected in (("llava", llava), ("saisa", saisa)):
        total = flops.prefill(presets.make(llm, vision, alignment), text=64, convention="paper").total
        assert round(total / 1e12, 3) == expected


def test_end_to_end_adds_the_encoder_and_one_row_of_the_head() -> None:
    whole = flops.prefill(seven_b("saisa"), text=64)
    decoder = flops.prefill(seven_b("saisa"), text=64, convention="decoder")
    assert round(whole.vision / 1e12, 3) == 0.366
    assert whole.head == 2 * 4096 * 32000
    assert whole.total == decoder.total + whole.vision + whole.head
    assert flops.prefill(seven_b("saisa"), text=64, head_rows=64).head == 64 * whole.head


def test_images_projectors_and_layers() -> None:
    one, two = (flops.prefill(seven_b("saisa"), text=64, images=images) for images in (1, 2))
    assert (two.vision, two.projectors) == (2 * one.vision, 2 * one.projectors)
    assert (two.q, two.mlp, two.head) == (one.q, one.mlp, one.head)

    shared = flops.prefill(seven_b("saisa", projector=ProjectorConfig(sharing="shared")), text=64)
    assert shared.projectors * 32 == one.projectors
    eight = flops.prefill(seven_b("saisa", visual_layers=tuple(range(8))), text=64)
    assert eight.projectors * 4 == one.projectors
    text_only = flops.prefill(seven_b("saisa"), text=64, images=0)
    assert eight.kv == text_only.kv + (one.kv - text_only.kv) / 4
    assert text_only.vision == text_only.projectors == 0
    assert text_only.total == flops.prefill(seven_b("llava"), text=64, images=0).total


def test_an_unknown_convention_is_an_error() -> None:
    with pytest.raises(ValueError, match="convention='papers' is not one of"):
        flops.prefill(small(), text=TEXT, convention="papers")


# --- Counted ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", ["llava", "naavit", "saisa"])
def test_xla_counts_the_same_in_our_prefill_at_7b(alignment: str) -> None:
    config = seven_b(alignment)
    assert flops.counted_prefill(config, text=64) == pytest.approx(flops.prefill(config, text=64).total, rel=0.02)


def test_xla_counts_the_same_with_a_convnext() -> None:
    config = presets.make("vicuna-7b", "convnext-xlarge-384")
    assert flops.counted_prefill(config, text=64) == pytest.approx(flops.prefill(config, text=64).total, rel=0.02)


def test_xla_counts_the_same_with_two_images_or_none() -> None:
    config = presets.make("llama3-8b", "clip-vit-l-336", visual_layers=(0, 1, 16), num_layers=20)
    for images in (0, 2):
        formula = flops.prefill(config, text=64, images=images).total
        assert flops.counted_prefill(config, text=64, images=images) == pytest.approx(formula, rel=0.02)


def shapes_of(config: ModelConfig, rows: int, images: int) -> Any:
    batch = empty_batch(rows, TEXT, images, config.vision.image_size)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)


def test_the_convnext_preset_multiplies_exactly_what_the_formula_says() -> None:
    config = presets.make("smollm2-135m", "convnext-xlarge-384")
    forward = lambda params, batch: Saisa(config).apply({"params": params}, batch)[0]  # noqa: E731
    program = jax.make_jaxpr(forward)(abstract_params(config), shapes_of(config, 1, 1))
    assert products_in(program.jaxpr) == flops.prefill(config, TEXT, head_rows=TEXT).total


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_small_model_multiplies_exactly_what_the_formula_says(variant: str) -> None:
    config = VARIANTS[variant]
    for images in (0, 1, 2):
        forward = lambda params, batch: Saisa(config).apply({"params": params}, batch)[0]  # noqa: E731
        program = jax.make_jaxpr(forward)(abstract_params(config), shapes_of(config, 1, images))
        formula = flops.prefill(config, TEXT, images, head_rows=TEXT)
        assert products_in(program.jaxpr) == formula.total, f"{images} images"


# --- Training --------------------------------------------------------------------------------------------------------


def only(*patterns: str) -> Groups:
    """Groups in which what matches trains and all else is frozen."""
    return (*((pattern, GroupConfig()) for pattern in patterns), (r".*", GroupConfig(frozen=True)))


GROUPS = {
    "projectors": TRAIN_PROJECTOR,
    "all but vision": TRAIN_ALL_BUT_VISION,
    "all": TRAIN_ALL,
    "keys": only("layers/attn/k_proj/.*"),
    "norms of the layers": only("layers/input_norm/.*"),
    "head": only("final_norm/.*", "lm_head/.*"),
    "upper half of the projectors": only(r"(layers/)?visual_proj/fc2/.*"),
}


def products_of_a_step(variant: str, groups: str, rows: int) -> int:
    """FLOPs of the matrix products in the gradient of a loss with respect to what trains."""
    config = VARIANTS[variant]
    flat, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config))
    paths = ["/".join(entry.key for entry in path) for path, _ in flat]
    trains = [not next(group.frozen for pattern, group in GROUPS[groups] if re.fullmatch(pattern, p)) for p in paths]
    leaves = [leaf for _, leaf in flat]
    trainable = [leaf for leaf, yes in zip(leaves, trains, strict=True) if yes]
    frozen = [leaf for leaf, yes in zip(leaves, trains, strict=True) if not yes]

    def loss(trainable: list[Any], frozen: list[Any], batch: Any) -> Any:
        rest, own = iter(frozen), iter(trainable)
        params = jax.tree.unflatten(tree, [next(own if yes else rest) for yes in trains])
        logits, _ = Saisa(config).apply({"params": params}, batch)
        return jnp.sum(jax.nn.log_softmax(logits[..., : config.vocab_size])[..., 0])

    program = jax.make_jaxpr(jax.value_and_grad(loss))(trainable, frozen, shapes_of(config, rows, 1))
    return products_in(program.jaxpr)


@pytest.mark.parametrize(
    ("variant", "groups"),
    [
        *(("saisa", groups) for groups in GROUPS),
        *(("saisa, some layers", groups) for groups in ("projectors", "all")),
        *(("saisa, convnext", groups) for groups in ("projectors", "all")),
        *(("naavit", groups) for groups in ("projectors", "all but vision", "keys")),
        *(("llava", groups) for groups in ("projectors", "all but vision")),
    ],
)
def test_a_training_step_multiplies_exactly_what_the_formula_says(variant: str, groups: str) -> None:
    config = VARIANTS[variant]
    assert flops.train_step(config, GROUPS[groups], 2, TEXT, 1) == products_of_a_step(variant, groups, 2)


def test_what_trains_costs_three_times_its_forward_pass() -> None:
    config = seven_b("llava")
    forward = flops.prefill(config, 64, head_rows=64)
    patches = 2 * 576 * 3 * 14**2 * 1024  # pixels need no gradient
    assert flops.train_step(config, TRAIN_ALL, 1, 64) == 3 * forward.total - patches
    # Stage 1: encoder once, decoder twice, its attention three times.
    stage1 = flops.train_step(config, TRAIN_PROJECTOR, 1, 64)
    decoder = forward.q + forward.kv + forward.o + forward.mlp + forward.head
    fc1 = 2 * 576 * 1024 * 4096  # its input needs no gradient
    assert stage1 == forward.vision + 3 * forward.projectors - fc1 + 2 * decoder + 3 * forward.attention


def test_a_parameter_without_a_group_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"matches no row of groups"):
        flops.train_step(small(), ((r"vision/.*", GroupConfig()),), 1, TEXT)


# --- The verb --------------------------------------------------------------------------------------------------------


def test_the_verb_prints_the_three_alignments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flops", "--model=vicuna-7b", "--vision=clip-vit-l-336", "--text=64", "--no-count"]) == 0
    printed = capsys.readouterr().out
    for expected in ("LLaVA", "NAAViT", "SAISA", "8.504", "2.860 (-66.4%)", "8.528", "2.860 (-66.5%)", "projectors"):
        assert expected in printed
    assert "XLA" not in printed


def test_the_verb_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flops", "--model=smollm2-135m"]) == 0
    printed = capsys.readouterr().out
    assert "as XLA counts it" in printed and "counted / formula" in printed


def test_verbs_and_models_that_do_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flop"]) == 2
    error = capsys.readouterr().err
    assert "did you mean flops?" in error and "report" in error
    assert main(["flops", "--model=vicuna"]) == 2
    assert "did you mean vicuna-7b" in capsys.readouterr().err
    assert main(["flops", "--text=0"]) == 2
    assert "--text=0" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0
