r"""SAISA of SmolLM3-3B and SigLIP2 so400m at 384 pixels: 729 visual tokens an image.

    python -m saisa_jax convert import --llm=HuggingFaceTB/SmolLM3-3B \
        --vision=google/siglip2-so400m-patch14-384 --to=checkpoints/smollm3_3b
    python train.py --config=configs/saisa_smollm3_3b.py --workdir=runs/saisa_smollm3_3b

One stage alone: --config=configs/saisa_smollm3_3b.py:pretrain, or :finetune.
"""

from ml_collections import ConfigDict

from saisa_jax import presets
from saisa_jax.configs.common import recipe


def get_config(stage: str | None = None) -> ConfigDict:
    model = presets.make("smollm3-3b", "siglip2-so400m-384")
    return recipe("saisa_smollm3_3b", model, "checkpoints/smollm3_3b", stage, template="chatml")
