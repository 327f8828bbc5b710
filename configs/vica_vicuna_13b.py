r"""ViCA (arXiv 2602.07574) of Vicuna-13B: one projector, whose tokens eight of the layers read, in both stages.

    python -m saisa_jax convert import --llm=lmsys/vicuna-13b-v1.5 \
        --vision=openai/clip-vit-large-patch14-336 --to=checkpoints/vicuna_13b
    python train.py --config=configs/vica_vicuna_13b.py --workdir=runs/vica_vicuna_13b

The authors' published weights: docs/family.md.
One stage alone: --config=configs/vica_vicuna_13b.py:pretrain, or :finetune.
"""

from ml_collections import ConfigDict

from saisa_jax import presets
from saisa_jax.config import ProjectorConfig
from saisa_jax.configs.common import recipe

LAYERS = (0, 6, 8, 9, 10, 13, 14, 16)  # that the authors chose by measurement


def get_config(stage: str | None = None) -> ConfigDict:
    shared = ProjectorConfig(sharing="shared")
    model = presets.make("vicuna-13b", "clip-vit-l-336", projector=shared, visual_layers=LAYERS)
    return recipe("vica_vicuna_13b", model, "checkpoints/vicuna_13b", stage)
