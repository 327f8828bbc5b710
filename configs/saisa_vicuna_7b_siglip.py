r"""SAISA of Vicuna-7B and SigLIP so400m at 384 pixels: 729 visual tokens an image.

    python -m saisa_jax convert import --llm=lmsys/vicuna-7b-v1.5 \
        --vision=google/siglip-so400m-patch14-384 --to=checkpoints/vicuna_7b_siglip
    python train.py --config=configs/saisa_vicuna_7b_siglip.py --workdir=runs/saisa_vicuna_7b_siglip

One stage alone: --config=configs/saisa_vicuna_7b_siglip.py:pretrain, or :finetune.
"""

from ml_collections import ConfigDict

from saisa_jax import presets
from saisa_jax.configs.common import recipe


def get_config(stage: str | None = None) -> ConfigDict:
    model = presets.make("vicuna-7b", "siglip-so400m-384")
    return recipe("saisa_vicuna_7b_siglip", model, "checkpoints/vicuna_7b_siglip", stage)
