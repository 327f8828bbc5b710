r"""Ablation: SAISA in which every second layer sees the image.

    python -m saisa_jax convert import --llm=lmsys/vicuna-7b-v1.5 \
        --vision=openai/clip-vit-large-patch14-336 --to=checkpoints/vicuna_7b
    python train.py --config=configs/ablation_half_the_layers.py --workdir=runs/ablation_half_the_layers

One stage alone: --config=configs/ablation_half_the_layers.py:pretrain, or :finetune.
"""

from ml_collections import ConfigDict

from saisa_jax import presets
from saisa_jax.configs.common import recipe


def get_config(stage: str | None = None) -> ConfigDict:
    model = presets.make("vicuna-7b", "clip-vit-l-336", visual_layers=tuple(range(0, 32, 2)))
    return recipe("ablation_half_the_layers", model, "checkpoints/vicuna_7b", stage)
