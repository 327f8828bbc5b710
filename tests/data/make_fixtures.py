"""Makes the small copies of the recorded fixtures in this folder; README.md says what they are.

python tests/data/make_fixtures.py DIRECTORY_OF_THE_FULL_FIXTURES
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy before safetensors looks for it)
from safetensors import safe_open
from safetensors.numpy import save_file

HERE = Path(__file__).parent
# What each small file leaves out. The towers are 30 MB each; the hidden states of the tower can only be compared where
# the tower is; the gradient of the top-level projector is all zeros.
LEFT_OUT = {
    "saisa_tiny": {
        "model.safetensors": (),
        "expected.safetensors": ("image_a.vision_hidden_states", "image_b.vision_hidden_states"),
        "grads.safetensors": ("model.mm_projector.",),
    },
    "llava_tiny": {
        "model.safetensors": ("vision_tower.",),
        "expected.safetensors": (),
        "grads.safetensors": (),
    },
}
COPIED = ("README.md", "config.json", "expected.json", "generation_config.json", "preprocessor_config.json")


def main(full: Path) -> None:
    for name, files in LEFT_OUT.items():
        target = HERE / name
        target.mkdir(exist_ok=True)
        for file in COPIED:
            if (full / name / file).exists():
                shutil.copyfile(full / name / file, target / file)
        for file, left_out in files.items():
            with safe_open(full / name / file, framework="np") as source:
                names = [name for name in source.keys() if not name.startswith(left_out)]  # noqa: SIM118
                kept = {name: source.get_tensor(name) for name in names}
                save_file(kept, target / file, metadata=source.metadata())
                (target / file).chmod(0o644)  # save_file makes it private
    tower = HERE / "saisa_tiny" / "vision_tower"
    tower.mkdir(exist_ok=True)
    for file in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(full / "saisa_tiny" / "vision_tower" / file, tower / file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
