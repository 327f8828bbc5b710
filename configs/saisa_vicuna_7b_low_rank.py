r"""SAISA of Vicuna-7B whose projectors are one for all layers and a low-rank part for each, as after distillation in
"Just MLPs" (arXiv 2609.34972), in the paper's two stages: 55 million parameters instead of 671 million.

    python -m saisa_jax convert import --llm=lmsys/vicuna-7b-v1.5 \
        --vision=openai/clip-vit-large-patch14-336 --to=checkpoints/vicuna_7b
    python train.py --config=configs/saisa_vicuna_7b_low_rank.py --workdir=runs/saisa_vicuna_7b_low_rank

Stage 1 trains the projector that all layers share; stage 2 starts at exactly that model, with parts that are zero.
One stage alone: --config=configs/saisa_vicuna_7b_low_rank.py:pretrain, or :finetune.
"""

from ml_collections import ConfigDict

from saisa_jax import presets
from saisa_jax.config import ProjectorConfig
from saisa_jax.configs.common import recipe


def get_config(stage: str | None = None) -> ConfigDict:
    model = presets.make("vicuna-7b", "clip-vit-l-336", projector=ProjectorConfig("low_rank", rank=128))
    return recipe("saisa_vicuna_7b_low_rank", model, "checkpoints/vicuna_7b", stage)
