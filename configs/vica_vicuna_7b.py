r"""ViCA (arXiv 2602.07574) of Vicuna-7B: one projector, whose tokens eight of the layers read, in both stages.

    python -m saisa_jax convert import --llm=lmsys/vicuna-7b-v1.5 \
        --vision=openai/clip-vit-large-patch14-336 --to=checkpoints/vicuna_7b
    python train.py --config=configs/vica_vicuna_7b.py --workdir=runs/vica_vicuna_7b

Text before the image gets nothing of attention, as in the authors' program for 7B
(`model.frozen_prefix`); their published weights: docs/family.md.
One stage alone: --config=configs/vica_vicuna_7b.py:pretrain, or :finetune.
"""

from ml_collections import ConfigDict

from saisa_jax import presets
from saisa_jax.config import ProjectorConfig
from saisa_jax.configs.common import recipe

LAYERS = (0, 1, 7, 8, 9, 10, 11, 14)  # that the authors chose by measurement


def get_config(stage: str | None = None) -> ConfigDict:
    shared = ProjectorConfig(sharing="shared")
    model = presets.make("vicuna-7b", "clip-vit-l-336", projector=shared, visual_layers=LAYERS, frozen_prefix=True)
    return recipe("vica_vicuna_7b", model, "checkpoints/vicuna_7b", stage)
