r"""Ablation: SAISA with one projector for all layers in stage 2 as well.

    python -m saisa_jax convert import --llm=lmsys/vicuna-7b-v1.5 \
        --vision=openai/clip-vit-large-patch14-336 --to=checkpoints/vicuna_7b
    python train.py --config=configs/ablation_shared_projector.py --workdir=runs/ablation_shared_projector

One stage alone: --config=configs/ablation_shared_projector.py:pretrain, or :finetune.
"""

from ml_collections import ConfigDict

from saisa_jax import presets
from saisa_jax.config import ProjectorConfig
from saisa_jax.configs.common import recipe


def get_config(stage: str | None = None) -> ConfigDict:
    model = presets.make("vicuna-7b", "clip-vit-l-336", projector=ProjectorConfig(sharing="shared"))
    return recipe("ablation_shared_projector", model, "checkpoints/vicuna_7b", stage)
