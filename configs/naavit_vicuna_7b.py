r"""The paper's pilot: LLaVA-1.5-7B without attention among visual tokens (NAAViT).

    python -m saisa_jax convert import --llm=lmsys/vicuna-7b-v1.5 \
        --vision=openai/clip-vit-large-patch14-336 --to=checkpoints/vicuna_7b
    python train.py --config=configs/naavit_vicuna_7b.py --workdir=runs/naavit_vicuna_7b

One stage alone: --config=configs/naavit_vicuna_7b.py:pretrain, or :finetune.
"""

from ml_collections import ConfigDict

from saisa_jax import presets
from saisa_jax.configs.common import recipe


def get_config(stage: str | None = None) -> ConfigDict:
    model = presets.make("vicuna-7b", "clip-vit-l-336", alignment="naavit")
    return recipe("naavit_vicuna_7b", model, "checkpoints/vicuna_7b", stage)
