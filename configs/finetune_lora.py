"""Stage 2 with LoRA: the decoder's projections get adapters, the projectors train at a tenth of their rate.

    python train.py --config=configs/finetune_lora.py:runs/start --workdir=runs/lora

The argument is a model that `convert import` has made or stage 1 has left; the data are named as everywhere:
`--config.data...` and the recipe's `finetune.sources`. The settings are LLaVA-1.5's (rank 128, alpha 256, rates 2e-4
and 2e-5; its dropout of 0.05 is left out). The finished model in WORKDIR/finetune/model has the adapters merged into
it, so that everything reads it as any other; WORKDIR/finetune/adapter keeps them alone, with the projectors.
"""

import dataclasses

from ml_collections import ConfigDict

from saisa_jax.checkpoints import read_account
from saisa_jax.config import TRAIN_ADAPTERS, DistillConfig, LoraConfig, OptimizerConfig, to_config_dict


def get_config(checkpoint: str) -> ConfigDict:
    """`checkpoint` is a finished model's directory."""
    _, before = read_account(checkpoint)
    finetune = dataclasses.replace(
        before.finetune,
        optimizer=OptimizerConfig(lr=2e-4),
        groups=TRAIN_ADAPTERS,
        lora=LoraConfig(rank=128, alpha=256.0),
    )
    data = dataclasses.replace(before.data, tokenizer=f"{checkpoint}/tokenizer")
    config = dataclasses.replace(
        before, stages=("finetune",), init_from=checkpoint, data=data, finetune=finetune, distill=DistillConfig()
    )
    return to_config_dict(config)
