"""`python -m saisa_jax bench image`: what a first and a second question about an image cost, and a compilation.

First and second questions alternate in one run, so that other load on the machine affects both alike; the ratio
is that of the medians.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from saisa_jax.bench.times import Timed
from saisa_jax.data.sample import USER, Turn
from saisa_jax.inference.generate import bucket
from saisa_jax.inference.model import Request, VisionLanguageModel

QUESTION = "what is in the image?"


def bench(model: VisionLanguageModel, repeat: int, question: str = QUESTION) -> dict[str, Any]:
    """Times of prefill, in seconds.

    Args:
      model: any model; where images cannot be kept (LLaVA) both questions cost the same.
      repeat: pairs of questions that are timed.
      question: asked about an image of noise, a new one for each pair.

    Returns:
      {"first": [...], "second": [...], "compile": seconds of the first call with a new bucket, "reuse": of the next},
      and the processor time of all threads of this process, "first_processor" and "second_processor".
    """
    rng = np.random.default_rng(0)
    size = model.model_config.vision.image_size

    def request_of(pixels: Any, text: str) -> Request:
        return model.request((Turn(USER, text),), model.encode_images([Image.fromarray(pixels)]), 1)

    def prefill(pixels: Any, text: str) -> Any:
        request = request_of(pixels, text)
        batch = model.batch([request])
        with model.on_mesh():
            return model.generator.prefill(model.params, batch, 16, model.image_slots(batch, [request]))[0]

    asked = {"first": Timed(), "second": Timed()}
    for n in range(repeat + 1):
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        for timed in asked.values():
            (timed if n else Timed()).add(lambda p=pixels: prefill(p, question))  # the first pair compiles
    request = request_of(pixels, question)
    room = bucket(len(request.encoded.tokens)) - len(request.encoded.tokens)
    longer, more = question + " what?" * (room + 1), Timed()  # the next bucket of text
    for _ in range(2):
        more.add(lambda: prefill(pixels, longer))
    return {
        **{name: timed.seconds for name, timed in asked.items()},
        **{f"{name}_processor": timed.processor for name, timed in asked.items()},
        "compile": more.seconds[0],
        "reuse": more.seconds[1],
    }
