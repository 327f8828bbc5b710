r"""SAISA of Mistral-7B-Instruct and CLIP ViT-L/14 at 336 pixels.

    python -m saisa_jax convert import --llm=mistralai/Mistral-7B-Instruct-v0.1 \
        --vision=openai/clip-vit-large-patch14-336 --to=checkpoints/mistral_7b
    python train.py --config=configs/saisa_mistral_7b.py --workdir=runs/saisa_mistral_7b

One stage alone: --config=configs/saisa_mistral_7b.py:pretrain, or :finetune.
"""

from ml_collections import ConfigDict

from saisa_jax import presets
from saisa_jax.configs.common import recipe


def get_config(stage: str | None = None) -> ConfigDict:
    model = presets.make("mistral-7b", "clip-vit-l-336")
    return recipe("saisa_mistral_7b", model, "checkpoints/mistral_7b", stage, template="mistral_instruct")
