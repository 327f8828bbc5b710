r"""SAISA of Vicuna-7B and ConvNeXt-XL at 384 pixels: 144 visual tokens an image.

    python -m saisa_jax convert import --llm=lmsys/vicuna-7b-v1.5 \
        --vision=facebook/convnext-xlarge-384-22k-1k --to=checkpoints/vicuna_7b_convnext
    python train.py --config=configs/saisa_vicuna_7b_convnext.py --workdir=runs/saisa_vicuna_7b_convnext

One stage alone: --config=configs/saisa_vicuna_7b_convnext.py:pretrain, or :finetune.
"""

from ml_collections import ConfigDict

from saisa_jax import presets
from saisa_jax.configs.common import recipe


def get_config(stage: str | None = None) -> ConfigDict:
    model = presets.make("vicuna-7b", "convnext-xlarge-384")
    return recipe("saisa_vicuna_7b_convnext", model, "checkpoints/vicuna_7b_convnext", stage)
