r"""SAISA of Qwen3-8B and CLIP ViT-L/14 at 336 pixels.

    python -m saisa_jax convert import --llm=Qwen/Qwen3-8B \
        --vision=openai/clip-vit-large-patch14-336 --to=checkpoints/qwen3_8b
    python train.py --config=configs/saisa_qwen3_8b.py --workdir=runs/saisa_qwen3_8b

One stage alone: --config=configs/saisa_qwen3_8b.py:pretrain, or :finetune.
"""

from ml_collections import ConfigDict

from saisa_jax import presets
from saisa_jax.configs.common import recipe


def get_config(stage: str | None = None) -> ConfigDict:
    model = presets.make("qwen3-8b", "clip-vit-l-336")
    return recipe("saisa_qwen3_8b", model, "checkpoints/qwen3_8b", stage, template="chatml")
