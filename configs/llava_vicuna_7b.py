r"""The baseline LLaVA-1.5-7B: visual tokens in every attention and every MLP.

    python -m saisa_jax convert import --llm=lmsys/vicuna-7b-v1.5 \
        --vision=openai/clip-vit-large-patch14-336 --to=checkpoints/vicuna_7b
    python train.py --config=configs/llava_vicuna_7b.py --workdir=runs/llava_vicuna_7b

One stage alone: --config=configs/llava_vicuna_7b.py:pretrain, or :finetune.
"""

from ml_collections import ConfigDict

from saisa_jax import presets
from saisa_jax.configs.common import recipe


def get_config(stage: str | None = None) -> ConfigDict:
    model = presets.make("vicuna-7b", "clip-vit-l-336", alignment="llava")
    return recipe("llava_vicuna_7b", model, "checkpoints/vicuna_7b", stage)
