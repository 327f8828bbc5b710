"""FLOPs: the paper's figures, and the count in the jaxpr against the closed form and against XLA."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from saisa_jax import flops, presets
from saisa_jax.__main__ import main
from saisa_jax.batch import empty_batch
from saisa_jax.cli.flops import growth_table
from saisa_jax.config import (
    TRAIN_ALL,
    TRAIN_ALL_BUT_VISION,
    TRAIN_PROJECTOR,
    Config,
    ConfigError,
    FlamingoConfig,
    GroupConfig,
    Groups,
    LoraConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
)
from saisa_jax.models.encoders.convnext import EXPANSION, KERNEL
from saisa_jax.models.layers import dense
from saisa_jax.models.projectors import PROJECTORS
from saisa_jax.models.projectors.mlp import MLPProjector
from saisa_jax.models.saisa import Saisa, abstract_params
from saisa_jax.testing.configs import PROJECTORS as TINY_PROJECTORS
from saisa_jax.testing.configs import tiny_config
from saisa_jax.training.optimizer import flatten
from saisa_jax.training.setup import setup_stage
from saisa_jax.training.step import make_train_step

TEXT = 16
ROOT = Path(__file__).parents[1]
SHARED = ProjectorConfig(sharing="shared")


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
    "low rank": small(projector=ProjectorConfig("low_rank", hidden_dim=40, rank=24)),
    "resampler": small(projector=ProjectorConfig("resampler", num_tokens=5, num_layers=3)),
    "naavit": small("naavit"),
    "llava, resampler": small("llava", projector=ProjectorConfig("resampler", "shared", num_tokens=7)),
    "llava": small("llava", num_kv_heads=4),
    "flamingo": small("flamingo", flamingo=FlamingoConfig(2)),
    "flamingo, local text": small("flamingo", flamingo=FlamingoConfig(1, local_text=True)),
    "flamingo, resampler": small(
        "flamingo", projector=ProjectorConfig("resampler", "shared", num_tokens=5), flamingo=FlamingoConfig(3)
    ),
    "llava, switched": small("llava", naavit_layers=(0,), frozen_visual_layers=(2,)),
}


def closed_form(config: ModelConfig, text: int, images: int = 1, head_rows: int = 1) -> dict[str, int]:
    """FLOPs of a forward pass by part, from the sizes alone.

    With t text tokens, v visual tokens (M images of P), D embed, A = N*H, K*H, F mlp, C vision width, a decoder layer
    costs

        part          llava           naavit          saisa
        projectors    -               -               2v(C*D + D*D)      its own; a shared one counts once for all;
                                                      4vD*rank           low_rank, beside the shared one
                                                      a resampler's queries also read M*(patches + P) features C wide
        q             2(t+v)DA        2tDA            2tDA
        kv            4(t+v)D*K*H     4(t+v)D*K*H     4(t+v)D*K*H        t alone in a layer that does not see the image
        o             2(t+v)AD        2tAD            2tAD
        attention     4(t+v)(t+v)A    4t(t+v)A        4t(t+v)A           scores and values, in full
        mlp           6(t+v)DF        6(t+v)DF        6tDF

    Flamingo's decoder is that of text alone. A cross layer costs q 2tDA, kv 4vDKH (with local text 4(t+v)DKH),
    o 2tAD, attention 4tvA (4t(t+v)A) and mlp 6tDF; where there is neither image nor local text, the mlp alone.
    """
    c, visual = config, images * config.num_visual_tokens
    queries, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    sees = sum(role != "none" for role in c.visual_roles) if images else 0
    parts = dict.fromkeys(flops.PARTS, 0)
    parts["vision"] = images * closed_form_of_encoder(c.vision)
    projector = 2 * visual * (c.vision.embed_dim * c.projector_dim + c.projector_dim * c.embed_dim)
    parts["projectors"] = projector * (sees if c.per_layer_projectors else 1)
    if c.projector.kind == "resampler":
        width, read = c.vision.embed_dim, images * c.vision.num_patches + visual
        attends = 4 * visual * width**2 + 4 * read * width**2  # q and o of the queries, k and v of what they read
        attends += 4 * visual * (c.vision.num_patches + c.num_visual_tokens) * width
        one = c.projector.num_layers * (attends + 16 * visual * width**2) + 2 * visual * width * c.embed_dim
        parts["projectors"] = one * (sees if c.per_layer_projectors else 1)
    if c.projector.kind == "low_rank":
        parts["projectors"] = projector + sees * 4 * visual * c.embed_dim * c.projector.rank
    parts["head"] = 2 * head_rows * c.embed_dim * c.padded_vocab_size
    roles = [(c.visual_roles.count(role), visual, role) for role in ("keys", "mlp", "queries")] if images else []
    for layers, seen, role in (*roles, (c.num_layers - sees, 0, "none")):
        asking = text + (seen if role == "queries" else 0)
        through_mlp = text + (seen if role in ("mlp", "queries") else 0)
        parts["q"] += layers * 2 * asking * c.embed_dim * queries
        parts["kv"] += layers * 4 * (text + seen) * c.embed_dim * kv_heads
        parts["attention"] += layers * 4 * asking * (text + seen) * queries
        parts["o"] += layers * 2 * asking * queries * c.embed_dim
        parts["mlp"] += layers * 6 * through_mlp * c.embed_dim * c.mlp_dim
    read = visual + (text if c.flamingo.local_text else 0)
    for _ in c.cross_layers:
        parts["q"] += 2 * text * c.embed_dim * queries if read else 0
        parts["kv"] += 4 * read * c.embed_dim * kv_heads
        parts["attention"] += 4 * text * read * queries
        parts["o"] += 2 * text * queries * c.embed_dim if read else 0
        parts["mlp"] += 6 * text * c.embed_dim * c.mlp_dim
    return parts


def closed_form_of_encoder(c: VisionConfig) -> int:
    """FLOPs of one image up to the layer that is put out."""
    if c.kind == "vit":
        rows = c.num_patches + c.class_token + c.num_registers
        of_layer = 8 * rows * c.embed_dim**2 + 4 * rows * rows * c.embed_dim + 4 * rows * c.embed_dim * c.mlp_dim
        return 2 * c.num_patches * 3 * c.patch_size**2 * c.embed_dim + c.num_used_layers * of_layer
    places = (c.image_size // c.stem_size) ** 2
    total = 2 * places * 3 * c.stem_size**2 * c.widths[0]
    for stage in range(c.num_used_layers):
        places, width = (c.image_size // (c.stem_size * 2**stage)) ** 2, c.widths[stage]
        total += 2 * places * 4 * c.widths[stage - 1] * width if stage else 0  # halves the map
        total += c.depths[stage] * (2 * places * KERNEL**2 * width + 4 * places * EXPANSION * width**2)
    return total


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


def test_the_family_at_7b() -> None:
    """Low-rank parts cost a twelfth of a projector for each layer; ViCA reads the image in eight layers of 32."""
    low_rank = flops.prefill(seven_b("saisa", projector=ProjectorConfig("low_rank")), text=64, convention="paper")
    vica = seven_b("saisa", projector=SHARED, visual_layers=(0, 1, 7, 8, 9, 10, 11, 14))
    assert (round(low_rank.projectors / 1e12, 3), round(low_rank.total / 1e12, 2)) == (0.063, 2.15)
    assert round(flops.prefill(vica, text=64, convention="decoder").total / 1e12, 2) == 1.17
    flamingo = flops.prefill(seven_b("flamingo"), text=64, convention="decoder").total
    assert round(flamingo / 1e12, 2) == 1.34
    frozen = seven_b("llava", frozen_visual_layers=tuple(range(13, 32)))
    assert round(flops.prefill(frozen, text=64, convention="paper").total / 1e12, 1) == 4.7  # as ShortV prints it


def test_the_documentations_table_of_the_family() -> None:
    rows = [line.split("|")[1:-1] for line in (ROOT / "docs" / "family.md").read_text().splitlines() if "|" in line]
    found = {row[0].strip(): [cell.strip() for cell in row[1:5]] for row in rows if len(row) == 6}
    for name, change in {
        "LLaVA-1.5": {"alignment": "llava"},
        "NAAViT": {"alignment": "naavit"},
        "SAISA": {},
        "SAISA, shared": {"projector": SHARED},
        "SAISA, low rank": {"projector": ProjectorConfig("low_rank")},
        "SAISA, resampler": {"projector": ProjectorConfig("resampler", num_tokens=64)},
        "Flamingo": {"alignment": "flamingo"},
        "Flamingo, local text": {"alignment": "flamingo", "flamingo": FlamingoConfig(local_text=True)},
        "ViCA": {"projector": SHARED, "visual_layers": (0, 1, 7, 8, 9, 10, 11, 14), "frozen_prefix": True},
    }.items():
        config = presets.make("vicuna-7b", "clip-vit-l-336", **change)
        params = {path: leaf.size for path, leaf in flatten(abstract_params(config)).items()}
        projector = sum(size for path, size in params.items() if "visual_proj" in path or "cross_layers/" in path)
        prefill = flops.prefill(config, text=64, convention="decoder").total
        train = flops.train_step(config, TRAIN_ALL_BUT_VISION, 1, 512, 1)
        shape = (len(config.visible_layers), 2, config.num_kv_heads, config.num_visual_tokens, config.head_dim, 2)
        cache = "-" if config.alignment == "llava" else f"{math.prod(shape) / 1e6:.0f}"
        assert found[name] == [f"{projector / 1e6:.1f}", f"{prefill / 1e12:.2f}", f"{train / 1e12:.1f}", cache], name


def test_an_unknown_convention_is_an_error() -> None:
    with pytest.raises(ValueError, match="convention='papers' is not one of"):
        flops.prefill(small(), text=TEXT, convention="papers")


# --- The closed form, and XLA's count ---------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", ["llava", "naavit", "saisa", "flamingo"])
@pytest.mark.parametrize(
    ("llm", "vision"),
    [
        ("vicuna-7b", "clip-vit-l-336"),
        ("vicuna-7b", "siglip-so400m-384"),
        ("llama3-8b", "clip-vit-l-336"),  # grouped keys and values
        ("qwen3-0.6b", "clip-vit-l-336"),  # heads together twice as wide as the model
        ("smollm2-135m", "convnext-xlarge-384"),  # one table for embedding and head
    ],
)
def test_presets_cost_what_the_closed_form_says(llm: str, vision: str, alignment: str) -> None:
    config = presets.make(llm, vision, alignment)
    assert flops.prefill(config, text=64).parts == closed_form(config, text=64)


@pytest.mark.parametrize("variant", VARIANTS)
def test_small_models_cost_what_the_closed_form_says(variant: str) -> None:
    config = VARIANTS[variant]
    for images in (0, 1, 2):
        assert flops.prefill(config, TEXT, images).parts == closed_form(config, TEXT, images), f"{images} images"
    forward = flops.training(config, TRAIN_PROJECTOR, 2, TEXT, 2).forward
    assert forward.parts == {part: 2 * n for part, n in closed_form(config, TEXT, 2, head_rows=TEXT).items()}


def test_how_the_saving_grows_with_visual_tokens() -> None:
    """The table of docs/family.md: five views of any resolution, 2,880 visual tokens."""
    configs = {name: seven_b(name) for name in ("llava", "saisa")}
    table = growth_table(configs, 64, (1, 5), "decoder")
    assert [list(column.cells) for column in table.columns] == [
        ["1", "5"], ["576", "2,880"], ["8.528", "42.796"], ["2.860 (-66.5%)", "10.978 (-74.3%)"]
    ]  # fmt: skip


def test_how_a_model_runs_does_not_change_what_it_costs() -> None:
    config = small()
    other = dataclasses.replace(
        config, scan_layers=False, remat_policy="full", dtype="bfloat16", attention_impl="flash", head_dim=128
    )
    same = dataclasses.replace(config, dtype="bfloat16", head_dim=128)
    assert flops.prefill(other, TEXT) == flops.prefill(same, TEXT)
    assert flops.training(other, TRAIN_ALL, 3, TEXT) == flops.training(same, TRAIN_ALL, 3, TEXT)


def test_positions_that_are_resampled_are_counted_once_a_batch() -> None:
    vision = dataclasses.replace(small().vision, position_size=48)  # 6 x 6 positions for 4 x 4 patches
    added = flops.prefill(small(vision=vision), TEXT, 2).vision - flops.prefill(small(), TEXT, 2).vision
    # One side after the other, as einsum goes about it: "ai,bj,ijc->abc".
    assert 0 < added < 2 * 32 * (6 * 6 * 4 * 4 + 6 * 6 * 4)
    assert added == flops.prefill(small(vision=vision), TEXT, 1).vision - flops.prefill(small(), TEXT, 1).vision


@pytest.mark.parametrize(
    "config",
    [
        seven_b("llava"),
        seven_b("naavit"),
        seven_b("saisa"),
        seven_b("saisa", projector=ProjectorConfig("low_rank"), visual_layers=(0, 1, 7, 8)),
    ],
)
def test_xla_counts_the_same_in_our_prefill_at_7b(config: ModelConfig) -> None:
    assert flops.xla_prefill(config, text=64) == pytest.approx(flops.prefill(config, text=64).total, rel=0.02)


def test_xla_counts_the_same_with_a_convnext() -> None:
    config = presets.make("vicuna-7b", "convnext-xlarge-384")
    assert flops.xla_prefill(config, text=64) == pytest.approx(flops.prefill(config, text=64).total, rel=0.02)


def test_xla_counts_the_same_with_two_images_or_none() -> None:
    config = presets.make("llama3-8b", "clip-vit-l-336", visual_layers=(0, 1, 16), num_layers=20)
    for images in (0, 2):
        ours = flops.prefill(config, text=64, images=images).total
        assert flops.xla_prefill(config, text=64, images=images) == pytest.approx(ours, rel=0.02)


# --- A projector of one's own ---------------------------------------------------------------------------------------


class GatedProjector(nn.Module):
    """MLP(Z) * sigmoid(W Z): one product more, of which nothing else here knows."""

    config: ModelConfig

    @nn.compact
    def __call__(self, features: Any) -> Any:
        gate = dense(self.config.embed_dim, ("vision_embed", "embed"), name="gate")(features)
        return MLPProjector(self.config, name="mlp")(features) * nn.sigmoid(gate)


@pytest.mark.parametrize("sharing", ["shared", "per_layer"])
def test_a_projector_of_ones_own_is_counted(sharing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    PROJECTORS.register("gated_for_flops")(GatedProjector)
    plain = small(projector=ProjectorConfig(sharing=sharing, hidden_dim=40))
    gated = small(projector=ProjectorConfig("gated_for_flops", sharing=sharing, hidden_dim=40))
    layers = plain.num_layers if sharing == "per_layer" else 1
    product = layers * 2 * (2 * plain.vision.num_patches) * plain.vision.embed_dim * plain.embed_dim

    def added(count: Any) -> dict[str, int]:
        with_gate, without = count(gated).parts, count(plain).parts
        return {part: with_gate[part] - without[part] for part in flops.PARTS if with_gate[part] != without[part]}

    assert added(lambda config: flops.prefill(config, TEXT, 2)) == {"projectors": product}
    step = functools.partial(flops.training, groups=TRAIN_PROJECTOR, rows=1, text=TEXT, images=2)
    assert added(lambda config: step(config).forward) == {"projectors": product}
    assert added(lambda config: step(config).backward) == {"projectors": product}  # of its kernel; features are frozen


# --- Training --------------------------------------------------------------------------------------------------------


def only(*patterns: str) -> Groups:
    """Groups in which what matches trains and all else is frozen."""
    return (*((pattern, GroupConfig()) for pattern in patterns), (r".*", GroupConfig(frozen=True)))


def test_what_trains_costs_three_times_its_forward_pass() -> None:
    config = seven_b("llava")
    forward = flops.training(config, TRAIN_ALL, 1, 64).forward
    patches = 2 * 576 * 3 * 14**2 * 1024  # pixels need no gradient
    assert flops.train_step(config, TRAIN_ALL, 1, 64) == 3 * forward.total - patches
    # Stage 1: encoder once, decoder twice, its attention three times.
    stage1 = flops.train_step(config, TRAIN_PROJECTOR, 1, 64)
    decoder = forward.q + forward.kv + forward.o + forward.mlp + forward.head
    fc1 = 2 * 576 * 1024 * 4096  # its input needs no gradient
    assert stage1 == forward.vision + 3 * forward.projectors - fc1 + 2 * decoder + 3 * forward.attention


def test_what_is_frozen_has_no_backward_pass() -> None:
    backward = lambda *patterns, images=1: flops.training(small(), only(*patterns), 1, TEXT, images).backward  # noqa: E731
    head = closed_form(small(), TEXT, head_rows=TEXT)["head"]
    assert backward("lm_head/.*") == flops.Breakdown(head=head)
    assert backward("final_norm/.*") == flops.Breakdown(head=head)
    assert backward("nothing").total == backward(".*visual_proj/.*", images=0).total == 0
    lora = small(lora=LoraConfig(rank=4))
    assert flops.training(lora, TRAIN_PROJECTOR, 1, TEXT, images=0).backward.total == 0  # nor have frozen adapters
    # Behind layer 1, which alone sees the image, the layers of the last group are gone through, those before are not.
    some = flops.training(small(visual_layers=(1,)), only(".*visual_proj/.*"), 1, TEXT).backward
    every = closed_form(small(visual_layers=(1,)), TEXT)
    assert some.mlp == every["mlp"] * 2 / 3 and some.o == every["o"] * 2 / 3 and some.vision == 0


def test_a_parameter_without_a_group_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"matches no row of groups"):
        flops.train_step(small(), ((r"vision/.*", GroupConfig()),), 1, TEXT)


def step_flops(config: Config, stage: str) -> tuple[int, int]:
    """(in the train step's own program, what it needs)."""
    p = setup_stage(config, stage, 10)
    s = p.settings
    step = make_train_step(p.model, p.optimizer, p.shardings, s.accumulation)
    executed = flops.count(jax.make_jaxpr(step)(p.abstract_state(), p.abstract_batch()).jaxpr)
    return executed, flops.train_step(p.model, s.groups, s.batch_size, s.text_length, s.max_images)


@pytest.mark.parametrize("alignment", ["saisa", "naavit", "llava", "casa", *TINY_PROJECTORS])
@pytest.mark.parametrize(("stage", "groups"), [("pretrain", TRAIN_PROJECTOR), ("finetune", TRAIN_ALL_BUT_VISION)])
def test_a_train_step_executes_what_it_needs(alignment: str, stage: str, groups: Groups) -> None:
    config = tiny_config(alignment)
    config = dataclasses.replace(config, **{stage: dataclasses.replace(config.stage(stage), groups=groups)})
    executed, needed = step_flops(config, stage)
    assert executed == needed


def gradient(config: ModelConfig) -> tuple[Any, tuple[Any, Any]]:
    """The function whose gradient of the decoder's layers a step takes, and its abstract arguments."""
    params = abstract_params(config)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), empty_batch(1, 128, 1, config.vision.image_size)
    )

    def loss(layers: Any, batch: Any) -> Any:
        return jnp.sum(Saisa(config).apply({"params": params_of(layers)}, batch, method=Saisa.hidden)[0])

    def params_of(layers: Any) -> Any:
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params | {"layers": {}})
        return zeros | {"layers": layers}

    return jax.grad(loss), (params["layers"], batch)


@pytest.mark.parametrize("policy", ["none", "names", "full"])
def test_xla_counts_the_same_in_a_gradient_that_computes_again(policy: str) -> None:
    """As it is lowered, with layers of the width of 7B; element-wise operations included."""
    config = seven_b("saisa", num_layers=2, scan_layers=False, dtype="float32", vocab_size=256, remat_policy=policy)
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_layers=2))
    function, arguments = gradient(config)
    traced = jax.jit(function).trace(*arguments)
    by_xla = traced.lower().cost_analysis()["flops"]
    assert by_xla == pytest.approx(flops.count(traced.jaxpr.jaxpr), rel=0.03)


@pytest.mark.parametrize(("policy", "kernels"), [("none", 7), ("names", 7), ("full", 9)])
def test_a_step_knows_its_attention(policy: str, kernels: int) -> None:
    """Legal pairs alone are useful; a kernel's tiles, two products forward and five backward, are executed."""
    config = small(head_dim=16, num_layers=1, scan_layers=False, remat_policy=policy)
    square = dataclasses.replace(
        config, attention_impl="flash", vision=dataclasses.replace(config.vision, image_size=91)
    )
    function, arguments = gradient(square)  # 11 x 11 patches and 128 tokens: 249 keys, a tile of 256
    work = flops.of_step(square, TRAIN_ALL, 1, 128, 1, jax.make_jaxpr(function)(*arguments).jaxpr)
    queries, keys = 128, 11 * 11 + 128
    product = 2 * queries * keys * square.num_heads * square.head_dim
    assert work.needed_attention == 6 * product and work.executed_attention == kernels * product / keys * 256
    assert work.useful(1.0) == work.needed and work.useful(0.25) == work.needed - 4.5 * product
    assert work.done(1.0) - work.done(0.5) == work.executed_attention / 2


def test_recomputation_is_executed_and_accumulation_changes_nothing() -> None:
    config = tiny_config()
    plain, needed = step_flops(config, "finetune")
    full = dataclasses.replace(config, model=dataclasses.replace(config.model, remat_policy="full"))
    recomputed, same = step_flops(full, "finetune")
    assert same == needed and 1.2 * plain < recomputed < 4 / 3 * plain
    mesh = dataclasses.replace(config.mesh, data=4, fsdp=1, tensor=2)
    halves = dataclasses.replace(config, mesh=mesh, finetune=dataclasses.replace(config.finetune, accumulation=2))
    assert step_flops(halves, "finetune")[0] == plain


# --- Programs --------------------------------------------------------------------------------------------------------


def count(function: Any, *arguments: Any) -> int:
    return flops.count(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_products_convolutions_loops_and_branches() -> None:
    x, w = jnp.zeros((2, 8, 16)), jnp.zeros((16, 32))
    product = 2 * 2 * 8 * 16 * 32
    assert count(lambda x, w: x @ w, x, w) == product
    (only_one,) = flops.products(jax.make_jaxpr(lambda x, w: x @ w)(x, w).jaxpr)
    assert only_one.bytes == x.nbytes + w.nbytes + 4 * 2 * 8 * 32
    assert count(jax.jit(lambda x, w: jax.checkpoint(jnp.matmul)(x, w)), x, w) == product
    square = jnp.zeros((16, 16))
    loop = lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]  # noqa: E731
    assert count(loop, square, square) == 5 * 2 * 16**3
    branch = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)  # noqa: E731
    assert count(branch, square) == 2 * 2 * 16**3
    image, kernel = jnp.zeros((1, 8, 8, 3)), jnp.zeros((2, 2, 3, 4))
    convolve = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(2, 2), padding="VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert count(convolve, image, kernel) == 2 * 4 * 4 * 4 * (2 * 2 * 3)


def test_cudnns_attention_is_counted_by_its_name() -> None:
    """It cannot be traced without cuDNN; its primitives are there all the same."""
    q, k = jax.ShapeDtypeStruct((2, 6, 4, 8), "bfloat16"), jax.ShapeDtypeStruct((2, 10, 2, 8), "bfloat16")
    out = SimpleNamespace(aval=q)
    for primitive, products in (
        (fused_attention_stablehlo._dot_product_attention_fwd_p_wrapper, 2),
        (fused_attention_stablehlo._dot_product_attention_bwd_p_wrapper, 5),
    ):
        equation = SimpleNamespace(
            primitive=primitive,
            params={},
            source_info=SimpleNamespace(name_stack=""),
            invars=[SimpleNamespace(aval=x) for x in (q, k, k)],
            outvars=[out],
            effects=set(),
        )
        assert flops.count(SimpleNamespace(eqns=[equation], outvars=[out])) == products * 2 * (2 * 4 * 6 * 10 * 8)


# --- The verb --------------------------------------------------------------------------------------------------------


def test_the_verb_prints_the_alignments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flops", "--model=vicuna-7b", "--vision=clip-vit-l-336", "--text=64"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "LLaVA",
        "NAAViT",
        "SAISA",
        "8.504",
        "2.860 (-66.4%)",
        "8.528",
        "2.860 (-66.5%)",
        "projectors",
        "Flamingo",
    ):
        assert expected in printed
    assert "as XLA counts it" in printed and "XLA's count / ours" in printed and "other" not in printed


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
