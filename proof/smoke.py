"""What `make proof-smoke` trains instead of the real thing: random weights and drawings of its own, in their places.

    python -m proof.smoke runs/proof-smoke

Decoder and encoder are of the real ones' families, two and three layers small; the packages hold polygons. So every
command of `make proof` runs in minutes and without a download. Accuracies mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from saisa_jax.__main__ import main as saisa_jax
from saisa_jax.config import ModelConfig
from saisa_jax.presets import VISIONS
from saisa_jax.testing.checkpoints import write_checkpoint
from saisa_jax.testing.drawings import draw_packages
from saisa_jax.testing.tokenizers import byte_level

VISION = dataclasses.replace(
    VISIONS["dinov2-small"], image_size=56, embed_dim=32, num_heads=2, mlp_dim=64, num_layers=3, post_norm=False
)
MODEL = ModelConfig(
    vocab_size=512,
    embed_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=64,
    max_length=1024,
    vision=VISION,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="a directory")
    root = parser.parse_args().root
    if not (root / "packages").exists():
        draw_packages(root / "packages")
    if not (root / "start" / "model.json").exists():
        for name, layout in (("decoder", "hf-llm"), ("encoder", "hf-vision")):
            if not (root / "weights" / name).exists():
                write_checkpoint(root / "weights" / name, layout, MODEL, dtype="F32")
        byte_level().save_pretrained(root / "weights" / "decoder")
        words = [f"--llm={root}/weights/decoder", f"--vision={root}/weights/encoder", f"--to={root}/start"]
        saisa_jax(["convert", "import", *words, "--select_layer=2"])
    for stamp in ("downloads/checked", "packages/unpacked"):  # so that make downloads nothing
        (root / stamp).parent.mkdir(exist_ok=True)
        (root / stamp).touch()


if __name__ == "__main__":
    main()
