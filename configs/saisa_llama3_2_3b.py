r"""SAISA of Llama-3.2-3B-Instruct and SigLIP2 so400m at 384 pixels: 729 visual tokens an image.

    python -m saisa_jax convert import --llm=meta-llama/Llama-3.2-3B-Instruct \
        --vision=google/siglip2-so400m-patch14-384 --to=checkpoints/llama3_2_3b
    python train.py --config=configs/saisa_llama3_2_3b.py --workdir=runs/saisa_llama3_2_3b

One stage alone: --config=configs/saisa_llama3_2_3b.py:pretrain, or :finetune.
"""

from ml_collections import ConfigDict

from saisa_jax import presets
from saisa_jax.configs.common import recipe


def get_config(stage: str | None = None) -> ConfigDict:
    model = presets.make("llama3.2-3b", "siglip2-so400m-384")
    return recipe("saisa_llama3_2_3b", model, "checkpoints/llama3_2_3b", stage, template="llama_3_instruct")
