"""Evaluates a finished run, or asks its model a question: python eval.py --workdir=runs/demo

The verb `eval` of saisa_jax/cli/eval.py; --help lists its flags.
"""

import sys

from saisa_jax.__main__ import program

if __name__ == "__main__":
    program(["eval", *sys.argv[1:]])
