r"""SAISA of Vicuna-7B and DINOv2-L with registers at 336 pixels: 576 visual tokens of an encoder that never read text.

    python -m saisa_jax convert import --llm=lmsys/vicuna-7b-v1.5 \
        --vision=facebook/dinov2-with-registers-large --image_size=336 --to=checkpoints/vicuna_7b_dinov2
    python train.py --config=configs/saisa_vicuna_7b_dinov2.py --workdir=runs/saisa_vicuna_7b_dinov2

One stage alone: --config=configs/saisa_vicuna_7b_dinov2.py:pretrain, or :finetune.
"""

import dataclasses

from ml_collections import ConfigDict

from saisa_jax import presets
from saisa_jax.configs.common import recipe


def get_config(stage: str | None = None) -> ConfigDict:
    # Its positions were learnt on 518 pixels. The features are those of the layer before the last, as an import has it.
    encoder = dataclasses.replace(
        presets.VISIONS["dinov2-with-registers-large"],
        image_size=336,
        position_size=518,
        select_layer=-2,
        post_norm=False,
    )
    model = presets.make("vicuna-7b", encoder)
    return recipe("saisa_vicuna_7b_dinov2", model, "checkpoints/vicuna_7b_dinov2", stage)
