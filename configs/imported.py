"""Trains a model that `convert import` has made, on the demo's data:

python train.py --config=configs/imported.py:runs/start --workdir=runs/mine
"""

from ml_collections import ConfigDict

from saisa_jax.checkpoints import read_account
from saisa_jax.config import ConfigError, SourceConfig, to_config_dict, to_dict


def get_config(checkpoint: str) -> ConfigDict:
    """LLaVA-1.5's two stages; `checkpoint` is the directory that was imported to."""
    document, imported = read_account(checkpoint)
    if not any(path.startswith("vision/") for path in document["leaves"]):
        raise ConfigError(
            f"{checkpoint} is an LLM without a vision encoder, and this recipe trains both: import them together, "
            "python -m saisa_jax convert import --llm=LLM --vision=ENCODER --to=DIR"
        )
    config = to_config_dict(imported)
    config.update({"init_from": checkpoint, "data": {"tokenizer": f"{checkpoint}/tokenizer"}})
    if imported.model.dtype == "float16":  # answers are computed so; gradients would need their loss scaled
        config.update({"model": {"dtype": "bfloat16"}})
    for stage, task in (("pretrain", "caption"), ("finetune", "vqa")):
        held_out = SourceConfig("easy_vqa", task=task, split="validation")
        config.update(
            {stage: {"sources": (to_dict(SourceConfig("easy_vqa", task=task)),), "validation": (to_dict(held_out),)}}
        )
    return config
