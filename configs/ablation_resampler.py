r"""Ablation: SAISA whose projectors are Perceiver resamplers, which read an image into 64 tokens.

    python -m saisa_jax convert import --llm=lmsys/vicuna-7b-v1.5 \
        --vision=openai/clip-vit-large-patch14-336 --to=checkpoints/vicuna_7b
    python train.py --config=configs/ablation_resampler.py --workdir=runs/ablation_resampler

The import's own projector, which is an MLP, is not used: stage 1 starts from a random resampler.
One stage alone: --config=configs/ablation_resampler.py:pretrain, or :finetune.
"""

from ml_collections import ConfigDict

from saisa_jax import presets
from saisa_jax.config import ProjectorConfig
from saisa_jax.configs.common import recipe


def get_config(stage: str | None = None) -> ConfigDict:
    model = presets.make("vicuna-7b", "clip-vit-l-336", projector=ProjectorConfig("resampler", num_tokens=64))
    return recipe("ablation_resampler", model, "checkpoints/vicuna_7b", stage)
