"""`python -m saisa_jax bench image`: what a first and a second question about an image cost, and a compilation.

First and second questions alternate in one run, so that other load on the machine affects both alike; the ratio
is that of the medians.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from PIL import Image

from saisa_jax.data.sample import USER, Turn
from saisa_jax.inference.generate import bucket
from saisa_jax.inference.model import Request, VisionLanguageModel

QUESTION = "what is in the image?"


def seconds(act: Callable[[], Any]) -> float:
    """Seconds of a call until its arrays are ready."""
    return timed(act, time.perf_counter)[0]


def timed(act: Callable[[], Any], *clocks: Callable[[], float]) -> list[float]:
    """What each of the clocks says of it."""
    start = [clock() for clock in clocks]
    jax.block_until_ready(act())
    return [clock() - since for clock, since in zip(clocks, start, strict=True)]


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

    times: dict[str, list[float]] = {"first": [], "second": [], "first_processor": [], "second_processor": []}
    for n in range(repeat + 1):
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        for name in ("first", "second"):
            took = timed(lambda p=pixels: prefill(p, question), time.perf_counter, time.process_time)
            if n:  # the first pair compiles
                times[name].append(took[0])
                times[f"{name}_processor"].append(took[1])
    request = request_of(pixels, question)
    room = bucket(len(request.encoded.tokens)) - len(request.encoded.tokens)
    longer = question + " what?" * (room + 1)  # the next bucket of text
    return {
        **times,
        "compile": seconds(lambda: prefill(pixels, longer)),
        "reuse": seconds(lambda: prefill(pixels, longer)),
    }
