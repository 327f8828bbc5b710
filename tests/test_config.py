"""The configuration: in and out of a ConfigDict, and every check."""

import dataclasses

import pytest

from saisa_jax.cli.flags import read_config
from saisa_jax.config import (
    Config,
    ConfigError,
    FlamingoConfig,
    GroupConfig,
    ModelConfig,
    ProjectorConfig,
    RopeScalingConfig,
    StageConfig,
    VisionConfig,
    from_config_dict,
    nearest_fields,
    to_config_dict,
    to_dict,
)
from saisa_jax.testing.configs import tiny_config


def test_round_trips():
    for config in (Config(), tiny_config(), tiny_config("llava")):
        assert from_config_dict(Config, to_config_dict(config)) == config
        assert from_config_dict(Config, to_dict(config)) == config


def test_overrides_reach_the_dataclasses():
    config = to_config_dict(Config())
    config.model.sliding_window = 64
    config.model.rope_scaling.kind, config.model.rope_scaling.factor = "llama3", 32.0
    config.finetune.optimizer.lr = 1
    config.stages = ("finetune",)
    built = from_config_dict(Config, config)
    assert built.model.sliding_window == 64 and built.finetune.optimizer.lr == 1.0 and built.stages == ("finetune",)
    assert built.model.rope_scaling == RopeScalingConfig("llama3", factor=32.0)
    assert from_config_dict(Config, to_dict(built)) == built


def test_a_typo_is_answered_with_the_nearest_keys():
    with pytest.raises(AttributeError, match="batch_size"):
        to_config_dict(Config()).finetune.batch_sizes = 3
    with pytest.raises(ConfigError, match=r"unknown config key finetune.batch_sze; did you mean finetune.batch_size"):
        from_config_dict(Config, {"finetune": {"batch_sze": 3}})
    with pytest.raises(ConfigError, match=r"finetune: batch_size=0 must be positive"):
        from_config_dict(Config, {"finetune": {"batch_size": 0}})
    assert nearest_fields("finetune.lr") == ["pretrain.optimizer.lr", "finetune.optimizer.lr"]
    assert nearest_fields("finetune.batch_sze")[0] == "finetune.batch_size" and not nearest_fields("seed")
    with pytest.raises(ConfigError, match=r"model.num_layers='4' should be of type int"):
        from_config_dict(Config, {"model": {"num_layers": "4"}})
    with pytest.raises(ConfigError, match=r"training.log_every=True should be of type int"):
        from_config_dict(Config, {"training": {"log_every": True}})


MODEL = ModelConfig()


def convnext(**changes):
    fields = {
        "image_size": 32, "patch_size": 8, "embed_dim": 16, "num_layers": 2, "depths": (2, 1), "widths": (8, 16),
        "class_token": False, "pre_norm": False, "select_layer": -1,
    }  # fmt: skip
    return VisionConfig(kind="convnext", **(fields | changes))


def flamingo(**changes) -> ModelConfig:
    return ModelConfig(**({"projector": ProjectorConfig(sharing="shared")} | changes), alignment="flamingo")


IMPOSSIBLE = [
    (lambda: ModelConfig(num_heads=6, num_kv_heads=4), r"num_heads=6 is not divisible by model.num_kv_heads=4"),
    (lambda: VisionConfig(image_size=13, patch_size=14), r"image_size=13 holds no patch of model.vision.patch_size=14"),
    (lambda: VisionConfig(embed_dim=10, num_heads=4), r"embed_dim=10 is not divisible"),
    (lambda: VisionConfig(num_layers=4, select_layer=-6), r"select_layer=-6 is out of range"),
    (lambda: VisionConfig(depths=(2,), widths=(8,)), r"need model.vision.kind=convnext"),
    (lambda: convnext(num_layers=3), r"one entry for each of the model.vision.num_layers=3 stages"),
    (lambda: convnext(widths=(8, 0)), r"entry of model.vision.depths and .widths,=0 must be positive"),
    (lambda: convnext(class_token=True), r"has no class_token: set model.vision.class_token=False"),
    (lambda: convnext(post_norm=True), r"has no post_norm"),
    (lambda: convnext(embed_dim=8), r"embed_dim=8 is not the width 16 of the selected stage"),
    (lambda: convnext(patch_size=7), r"patch_size=7 is no stride .* a multiple of 2"),
    (lambda: ModelConfig(visual_layers=(0, 40)), r"visual_layers names \[40\], out of range .* 0..31"),
    (lambda: ModelConfig(visual_layers=(3, 1)), r"strictly increasing"),
    (lambda: ModelConfig(visual_layers=()), r"non-empty"),
    (lambda: ModelConfig(head_dim=7), r"head_dim=7 must be even"),
    (lambda: RopeScalingConfig("yarn"), r"model.rope_scaling.kind='yarn' is not one of none, linear, llama3"),
    (lambda: RopeScalingConfig("linear", factor=0.5), r"model.rope_scaling.factor=0.5 must be at least 1"),
    (lambda: RopeScalingConfig("llama3", low_freq_factor=4.0), r"must be less than .*high_freq_factor=4.0"),
    (lambda: RopeScalingConfig("llama3", original_max_length=0), r"original_max_length=0 must be positive"),
    (lambda: ModelConfig(alignment="sasia"), r"did you mean saisa"),
    (lambda: ModelConfig(alignment="llava"), r"set model.projector.sharing=shared"),
    (lambda: ModelConfig(alignment="llava", projector=ProjectorConfig(sharing="shared"), frozen_prefix=True),
     r"model.frozen_prefix is a choice of model.alignment=saisa or naavit"),
    (lambda: ProjectorConfig("resampler"), r"into a number of tokens: set model.projector.num_tokens"),
    (lambda: ProjectorConfig(num_tokens=4), r"num_tokens=4 is a choice of model.projector.kind=resampler: 'mlp' makes"),
    (lambda: ModelConfig(projector=ProjectorConfig("resampler", num_tokens=4, num_heads=3)),
     r"model.vision.embed_dim=1024 is not divisible by model.projector.num_heads=3"),
    (lambda: ProjectorConfig("low_rank", rank=0), r"model.projector.rank=0 must be positive"),
    (lambda: ModelConfig(alignment="llava", projector=ProjectorConfig("low_rank", "shared")),
     r"a part for each layer, and model.alignment='llava' one projector: set model.projector.kind=mlp"),
    (lambda: Config(model=ModelConfig(projector=ProjectorConfig("low_rank", "shared")),
                    finetune=StageConfig(sharing="shared")),
     r"low_rank trains a part for each layer in stage 2: set finetune.sharing=per_layer"),
    (lambda: flamingo(flamingo=FlamingoConfig(every=0)), r"model.flamingo.every=0 must be positive"),
    (lambda: flamingo(flamingo=FlamingoConfig(every=33)),
     r"model.flamingo.every=33 is out of range for model.num_layers=32 \(legal: 1..32\)"),
    (lambda: flamingo(visual_layers=(1,)), r"visual_layers is a choice of model.alignment=saisa, not of 'flamingo'"),
    (lambda: flamingo(naavit_layers=(1,)), r"naavit_layers is a choice of model.alignment=llava, not of 'flamingo'"),
    (lambda: flamingo(frozen_prefix=True), r"frozen_prefix is a choice of .*saisa or naavit, not of 'flamingo'"),
    (lambda: flamingo(projector=ProjectorConfig()), r"alignment='flamingo' has one projector: set model.projector.sha"),
    (lambda: ModelConfig(flamingo=FlamingoConfig(local_text=True)),
     r"flamingo.every and .local_text are choices of model.alignment=flamingo, not of 'saisa'"),
    (lambda: ModelConfig(dtype="float64"), r"model.dtype='float64' is not one of"),
    (lambda: dataclasses.replace(MODEL, remat_policy="all"), r"remat_policy='all'"),
    (lambda: StageConfig(groups=((".*", GroupConfig(frozen=True)),)), r"nothing would train"),
    (lambda: StageConfig(steps=0), r"steps=0 must be positive"),
    (lambda: Config(stages=("finetune", "pretrain")), r"pretrain comes before finetune"),
    (lambda: Config(stages=()), r"stages is empty"),
    (lambda: Config(model=ModelConfig(alignment="naavit", projector=ProjectorConfig(sharing="shared"))),
     r"finetune.sharing=per_layer: set both alike"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), IMPOSSIBLE)
def test_what_cannot_run_is_an_error_that_names_its_flag(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_derived_sizes():
    assert ModelConfig(vocab_size=129).padded_vocab_size == 256
    assert VisionConfig().num_used_layers == 23 and VisionConfig().num_patches == 576
    assert VisionConfig(select_layer=-1).num_used_layers == 24
    assert VisionConfig(image_size=384).patches_per_side == 27
    assert (convnext().stem_size, convnext().num_patches) == (4, 16)
    earlier = convnext(select_layer=-2, embed_dim=8, patch_size=4)
    assert (earlier.stem_size, earlier.num_patches, earlier.num_used_layers) == (4, 64, 1)
    assert Config().model_for("pretrain").projector.sharing == "shared"


# --- The command line ------------------------------------------------------------------------------------------------

RECIPE = "--config=saisa_jax/testing/configs.py"


def test_a_recipe_with_settings():
    config = read_config([f"{RECIPE}:llava", "--config.finetune.optimizer.lr=0.5", "--config.stages=finetune"])
    assert config.model.alignment == "llava" and config.finetune.optimizer.lr == 0.5
    assert config.stages == ("finetune",)
    config = read_config([RECIPE, "--config.profile.steps=10,15", "--config.training.wandb=llms"])
    assert config.profile.steps == (10, 15) and config.training.wandb == "llms"
    assert read_config(["--config", "saisa_jax/testing/configs.py"]) == tiny_config()  # nothing is left from before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"--config is missing"),
        (["--config=nowhere.py"], r"nowhere.py"),
        ([f"{RECIPE}:nothing"], r"nothing"),
        ([RECIPE, "--config.finetune.batchsize=3"], r"no --config.finetune.batchsize; .*--config.finetune.batch_size"),
        ([RECIPE, "--config.seed=three"], r"invalid literal for int\(\)"),
        ([RECIPE, "--config.seed=-1"], r"seed=-1 must not be negative"),
        ([RECIPE, "--sed=3"], r"'sed'"),
        ([RECIPE, "seed=3"], r"unexpected arguments \['seed=3'\]"),
    ],
)
def test_what_is_wrong_with_a_command_line_is_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as raised:
        read_config(arguments)
    assert "\n" not in str(raised.value)
