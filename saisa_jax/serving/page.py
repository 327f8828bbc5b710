"""The page at `/`, and what it draws: the attention of an answer's words over the pictures, by layer."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from saisa_jax.data.sample import ASSISTANT, DataError, Turn
from saisa_jax.data.text.conversation import without_placeholders
from saisa_jax.inference.model import VisionLanguageModel
from saisa_jax.serving.pictures import PictureLimits, read_pictures
from saisa_jax.serving.protocol import bad, read_messages, said_of
from saisa_jax.serving.text import TextStream

# The page is one file, and talks to this server alone.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def html() -> str:
    """The page."""
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def attention(model: VisionLanguageModel, body: dict[str, Any], limits: PictureLimits) -> dict[str, Any]:
    """What the words of an answer read of the conversation's pictures.

    Args:
      model: that answered.
      body: {"messages": [...]} of chat completions, of which the last is the answer.
      limits: of its pictures.

    Returns:
      {"pieces": A texts of the answer's tokens, "layers": L, "side": patches of a picture's side (0: its visual tokens
      are no grid), "pictures": data URLs of M views of pictures as the encoder sees them, "share": [A][L], what part
      of a token's attention is on pictures, "maps": base64 of bytes [A, L, M, P], each token's and layer's largest
      weight being 255}.

    Raises:
      ProtocolError: the conversation cannot be read.
    """
    messages = body.get("messages")
    messages = messages if isinstance(messages, list) else []
    last = messages[-1] if messages else None
    said = last.get("content") if isinstance(last, dict) and last.get("role") == ASSISTANT else None
    if not isinstance(said, str):
        raise bad("the last message is the assistant's, with a string: the answer whose attention is shown", "messages")
    turns, urls, system = read_messages(messages[:-1])
    try:
        images = read_pictures(model, urls, limits)
        answer = Turn(ASSISTANT, without_placeholders(said))
        tokens, weights = model.answer_attention([*turns, answer], images, system)  # [L, A, V]
    except DataError as error:
        raise bad(said_of(error), "messages") from error
    vision = model.model_config.vision
    stream = TextStream(model.tokenizer)
    highest = np.maximum(weights.max(axis=-1, keepdims=True, initial=0), 1e-9)
    maps = np.rint(255 * weights / highest).astype(np.uint8).swapaxes(0, 1)
    grid = vision.patches_per_side**2 == model.model_config.num_visual_tokens
    seen = vision.patches_per_side * vision.patch_size if grid else vision.image_size
    return {
        "pieces": [stream.push(token) for token in tokens],
        "layers": len(weights),
        "side": vision.patches_per_side if grid else 0,
        "pictures": [_data_url(view.pixels[:seen, :seen]) for image in images for view in image.views],
        "share": np.round(weights.sum(axis=-1).T, 4).tolist(),
        "maps": base64.b64encode(maps.tobytes()).decode(),
    }


def _data_url(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
