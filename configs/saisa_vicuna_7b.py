r"""SAISA of Vicuna-7B and CLIP ViT-L/14 at 336 pixels: the paper's main model, in its two stages.

    python -m saisa_jax convert import --llm=lmsys/vicuna-7b-v1.5 \
        --vision=openai/clip-vit-large-patch14-336 --to=checkpoints/vicuna_7b
    python train.py --config=configs/saisa_vicuna_7b.py --workdir=runs/saisa_vicuna_7b

One stage alone: --config=configs/saisa_vicuna_7b.py:pretrain, or :finetune.
"""

from ml_collections import ConfigDict

from saisa_jax import presets
from saisa_jax.configs.common import recipe


def get_config(stage: str | None = None) -> ConfigDict:
    model = presets.make("vicuna-7b", "clip-vit-l-336")
    return recipe("saisa_vicuna_7b", model, "checkpoints/vicuna_7b", stage)
