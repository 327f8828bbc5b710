"""Flags of JAX that other libraries and habits set: training and inference work under all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLAGS = {"JAX_ENABLE_X64": "1", "JAX_DEBUG_NANS": "1", "JAX_NUMPY_RANK_PROMOTION": "raise"}

UNDER_FLAGS = """
import dataclasses, json, sys
import jax
from etils import epath
from PIL import Image
import saisa_jax
from saisa_jax.testing.configs import tiny_config
from saisa_jax.training import loop

jax.config.update("jax_default_device", jax.devices()[1])
set_before = [jax.config.values[name.lower()] for name in json.loads(sys.argv[1])]
config, workdir = tiny_config(), epath.Path(sys.argv[2])
config = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, steps=2), stages=("finetune",))
assert loop.run(config, workdir) == 0
model = saisa_jax.load(workdir / "finetune" / "model")
assert {str(leaf.dtype) for leaf in jax.tree.leaves(model.params)} == {"float32"}
picture = Image.new("RGB", (32, 32), "red")
assert isinstance(model.generate("what color?", picture, max_new_tokens=2), str)
chat = model.chat()
chat.add_image(picture)
assert "".join(chat.ask("what color?", 2)) is not None
assert set_before == [jax.config.values[name.lower()] for name in json.loads(sys.argv[1])] == [True, True, "raise"]
"""


def test_training_and_inference_under_flags_that_others_set(tmp_path: Path) -> None:
    environment = os.environ | FLAGS
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    names = str(list(FLAGS)).replace("'", '"')
    done = subprocess.run(
        [sys.executable, "-c", UNDER_FLAGS, names, tmp_path],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
