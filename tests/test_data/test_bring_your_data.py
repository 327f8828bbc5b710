"""The README's "Bring your data", line by line on the tiny configuration."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = "saisa_jax/testing/configs.py"

MAKE = """
import json, os
from PIL import Image

os.makedirs("runs/mine/images", exist_ok=True)
colors = ["red", "blue", "green", "yellow", "black", "gray", "teal", "brown"] * 8
for n, color in enumerate(colors):
    Image.new("RGB", (64, 48), color).save(f"runs/mine/images/{n}.png")
ask = {"from": "human", "value": "<image>\\nwhat color is the shape?"}
samples = [
    {"id": f"mine/{n}", "image": f"{n}.png", "conversations": [ask, {"from": "gpt", "value": color}]}
    for n, color in enumerate(colors)
]
json.dump(samples, open("runs/mine/train.json", "w"))
"""

COMMANDS = """
python -m saisa_jax data prepare --config=configs/demo.py --to=runs/mine/shards --config.finetune.sources="({'path': 'runs/mine/train.json', 'images': 'runs/mine/images'},)"
python -m saisa_jax data inspect --config=configs/demo.py --n=3 --out=runs/mine/inspect.png --config.finetune.sources="({'format': 'arrayrecord', 'path': 'runs/mine/shards'},)"
python train.py --config=configs/demo.py --workdir=runs/mine/run --config.stages=finetune --config.finetune.sources="({'format': 'arrayrecord', 'path': 'runs/mine/shards'},)"
"""  # noqa: E501


def test_the_example_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(MAKE, {})
    outputs = []
    for line in COMMANDS.strip().splitlines():
        words = shlex.split(line.replace("configs/demo.py", f"{ROOT}/{TINY}").replace("train.py", f"{ROOT}/train.py"))
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        environment["PYTHONPATH"] = str(ROOT)
        done = subprocess.run([sys.executable, *words[1:]], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        outputs.append(done.stdout)
    assert "64 samples with 64 images" in outputs[0]
    assert "what color is the shape?" in outputs[1]
    assert (tmp_path / "runs/mine/inspect.png").stat().st_size > 1000
    assert (tmp_path / "runs/mine/run/finetune/model").is_dir()
