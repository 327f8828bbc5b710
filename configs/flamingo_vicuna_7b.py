r"""Flamingo (arXiv 2204.14198) of Vicuna-7B: a gated cross layer before every fourth of the decoder's, in two stages.

    python -m saisa_jax convert import --llm=lmsys/vicuna-7b-v1.5 \
        --vision=openai/clip-vit-large-patch14-336 --to=checkpoints/vicuna_7b
    python train.py --config=configs/flamingo_vicuna_7b.py --workdir=runs/flamingo_vicuna_7b

Stage 1 is Flamingo's training: the decoder is frozen, its 1.62 billion parameters of cross layers and the projector
learn from captions. Stage 2 trains the decoder as well. It differs from the paper in data and size, and in that text
sees every image before it. Variants:

    --config.model.flamingo.local_text=True    keys are the text since the image, too (CASA, arXiv 2512.19535)
    --config.model.projector.kind=resampler --config.model.projector.num_tokens=64    Flamingo's own connector

One stage alone: --config=configs/flamingo_vicuna_7b.py:pretrain, or :finetune.
"""

from ml_collections import ConfigDict

from saisa_jax import presets
from saisa_jax.configs.common import recipe


def get_config(stage: str | None = None) -> ConfigDict:
    model = presets.make("vicuna-7b", "clip-vit-l-336", alignment="flamingo")
    config = recipe("flamingo_vicuna_7b", model, "checkpoints/vicuna_7b", stage)
    config.update({"pretrain": {"optimizer": {"lr": 1e-4}}})  # Flamingo's; LLaVA's 1e-3 is that of a projector alone
    return config
