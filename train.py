"""Trains a model by a recipe: python train.py --config=configs/demo.py --workdir=runs/demo [--config.a.b=v ...]

The verb `train` of saisa_jax/cli/train.py; --help lists its flags.
"""

import sys

from saisa_jax.__main__ import program

if __name__ == "__main__":
    program(["train", *sys.argv[1:]])
