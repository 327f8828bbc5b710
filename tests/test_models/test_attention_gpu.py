"""cuDNN's attention against `xla`: what is handed to it anywhere, its numbers where there is an NVIDIA GPU."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saisa_jax.models.attention import attend
from saisa_jax.models.mask import KeyBlock, PackedPositions, make_mask

BATCH, TEXT, VISUAL, HEADS, KV_HEADS, HEAD_DIM = 3, 61, 128, 4, 2, 64


def inputs():
    """Queries and blocks: a packed row with an image, a row of text alone, a row of padding."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=(BATCH, *shape)), jnp.bfloat16)  # noqa: E731
    positions = np.arange(TEXT) + np.where(np.arange(TEXT) > 9, VISUAL, 0)
    segments = np.tile(np.array([[1], [1], [0]]), (1, TEXT))
    segments[0, 40:] = 2
    text = PackedPositions(jnp.tile(positions, (BATCH, 1)), jnp.asarray(segments))
    visual = PackedPositions(
        jnp.tile(jnp.arange(10, 10 + VISUAL), (BATCH, 1)), jnp.tile(jnp.array([[1], [0], [0]]), (1, VISUAL))
    )
    keys = lambda length: (normal(KV_HEADS, length, HEAD_DIM) for _ in range(2))  # noqa: E731
    blocks = [KeyBlock(*keys(length), make_mask(text, at)) for at, length in ((visual, VISUAL), (text, TEXT))]
    return normal(TEXT, HEADS, HEAD_DIM), blocks


def test_what_cudnn_is_asked(monkeypatch):
    """Even lengths, a mask that admits no padding; the answer is cut back, and 0 where nothing may be read."""
    asked = {}

    def instead(q, k, v, *, implementation, **kwargs):
        asked.update(implementation=implementation, q=q.shape, k=k.shape, v=v.shape, mask=kwargs["mask"])
        return original(q, k, v, implementation="xla", **kwargs)

    original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    q, blocks = inputs()
    out, expected = (jax.jit(lambda impl=impl: attend(q, blocks, impl)[0])() for impl in ("cudnn", "xla"))
    keys = VISUAL + TEXT + 1
    assert asked["implementation"] == "cudnn" and asked["q"] == (BATCH, TEXT + 1, HEADS, HEAD_DIM)
    assert asked["k"] == asked["v"] == (BATCH, keys, KV_HEADS, HEAD_DIM)
    assert asked["mask"].shape == (BATCH, 1, TEXT + 1, keys) and asked["mask"].dtype == bool
    np.testing.assert_allclose(np.float32(out), np.float32(expected), atol=0.02)  # bfloat16 has 8 bits
    assert not np.asarray(out)[2].any()


def test_without_cudnn_it_says_so():
    q, blocks = inputs()
    with pytest.raises(RuntimeError, match="cuDNN is not detected"):
        jax.eval_shape(lambda: attend(q, blocks, "cudnn")[0])


@pytest.mark.cuda
def test_cudnn_is_xla():
    if not Path("/dev/nvidia0").exists():
        pytest.skip("no NVIDIA GPU is here")
    # In a process of its own: this one has chosen the CPU.
    env = {**os.environ, "JAX_PLATFORMS": "cuda", "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, __file__], env=env, check=True)


def compare() -> None:
    """Output and gradients of `cudnn` and `xla` on the GPU, in bfloat16."""
    q, blocks = inputs()

    def run(q, keys_values, impl):
        given = [block._replace(k=k, v=v) for block, (k, v) in zip(blocks, keys_values, strict=True)]
        out = attend(q, given, impl)[0].astype(jnp.float32)
        return jnp.sum(jnp.sin(out)), out

    both = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True), static_argnums=2)
    keys_values = [(block.k, block.v) for block in blocks]
    (_, out), gradients = both(q, keys_values, "cudnn")
    (_, expected), expected_gradients = both(q, keys_values, "xla")
    np.testing.assert_allclose(out, expected, atol=0.02)
    assert not np.asarray(out)[2].any()
    for gradient, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        gradient, wanted = np.float32(gradient), np.float32(wanted)
        np.testing.assert_allclose(gradient, wanted, atol=0.02 * np.abs(wanted).max())
        assert np.isfinite(gradient).all() and not gradient[2].any()


if __name__ == "__main__":
    compare()
