"""Trains a model that `convert import` has made, on the demo's data:

python train.py --config=configs/imported.py:runs/start --workdir=runs/mine
"""

from ml_collections import ConfigDict

from saisa_jax.checkpoints import read_account
from saisa_jax.config import to_config_dict


def get_config(checkpoint: str) -> ConfigDict:
    """LLaVA-1.5's two stages; `checkpoint` is the directory that was imported to."""
    _, imported = read_account(checkpoint)
    config = to_config_dict(imported)
    config.update({"init_from": checkpoint, "data": {"tokenizer": f"{checkpoint}/tokenizer"}})
    return config
