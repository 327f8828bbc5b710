"""The recorded fixtures, their models in float32, and their prompts as one padded batch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy before safetensors looks for it)
import numpy as np
import pytest
from safetensors.numpy import load_file

from saisa_jax.batch import Batch, empty_batch
from saisa_jax.config import ModelConfig
from saisa_jax.convert.configs import decoder_config_from_hf, vision_config_from_hf
from saisa_jax.convert.hf_json import read_json
from saisa_jax.convert.read import import_params
from saisa_jax.models.saisa import Saisa

SMALL = Path(__file__).parents[1] / "data"

PROMPTS = ("p1", "p5", "p0", "long")


@dataclasses.dataclass
class Fixture:
    """One recorded checkpoint: `saisa_tiny` or `llava_tiny`."""

    prompts: ClassVar[tuple[str, ...]] = PROMPTS
    num_patches: ClassVar[int] = 16  # P
    new_tokens: ClassVar[int] = 12

    name: str
    layout: str
    placeholder: int

    @property
    def small(self) -> Path:
        return SMALL / self.name

    @cached_property
    def expected(self) -> dict[str, np.ndarray]:
        return load_file(self.small / "expected.safetensors")

    @cached_property
    def numbers(self) -> dict[str, Any]:
        return json.loads((self.small / "expected.json").read_text())

    @cached_property
    def grads(self) -> dict[str, np.ndarray]:
        return load_file(self.small / "grads.safetensors")

    @cached_property
    def config(self) -> ModelConfig:
        """From the recorded config.json files; float32."""
        raw = read_json(self.small / "config.json")
        if self.name == "saisa_tiny":
            tower = self.small / "vision_tower"
            vision = vision_config_from_hf(read_json(tower / "config.json"), tower, raw["mm_vision_select_layer"])
            config = decoder_config_from_hf(raw, self.small, vision=vision)
        else:
            vision = vision_config_from_hf(raw["vision_config"], self.small, raw["vision_feature_layer"])
            text = raw["text_config"]
            config = decoder_config_from_hf(text, self.small, alignment="llava", sharing="shared", vision=vision)
        return dataclasses.replace(config, dtype="float32")

    @cached_property
    def model(self) -> Saisa:
        return Saisa(self.config)

    @cached_property
    def params(self) -> dict[str, Any]:
        """Decoder and projectors; without the tower, which needs the full fixtures."""
        parts = ("decoder", "projector")
        return import_params(self.small, self.config, layout=self.layout, parts=parts, dtype="float32").params

    def text(self, prompt: str) -> np.ndarray:
        """Token ids of a prompt, its image placeholder left out."""
        ids = self.expected[f"{prompt}.input_ids"]
        return ids[ids != self.placeholder]

    def image_start(self, prompt: str) -> int:
        return int(np.flatnonzero(self.expected[f"{prompt}.input_ids"] == self.placeholder)[0])

    def text_positions(self, prompt: str, new: int = 0) -> np.ndarray:
        """Places of the text tokens, and of `new` tokens after them, in the expanded sequence."""
        place = np.arange(len(self.text(prompt)) + new)
        return place + self.num_patches * (place >= self.image_start(prompt))

    def visual_positions(self, prompt: str) -> np.ndarray:
        return self.image_start(prompt) + np.arange(self.num_patches)

    @cached_property
    def features(self) -> np.ndarray:
        """Recorded vision features of each prompt's picture [B, P, C]."""
        pictures = [self.numbers["prompts"][prompt]["image"] for prompt in PROMPTS]
        return np.stack([self.expected[f"image_{picture}.vision_features"] for picture in pictures])

    def batch(self, extra: int = 0) -> Batch:
        """All prompts as one batch, a row each, padded on the right, with `extra` places more."""
        length = max(len(self.text(prompt)) for prompt in PROMPTS) + extra
        batch = empty_batch(len(PROMPTS), length, 1, self.config.vision.image_size)
        for row, prompt in enumerate(PROMPTS):
            tokens = self.text(prompt)
            self.set_row(batch, row, tokens, self.text_positions(prompt))
            batch["image_positions"][row] = self.image_start(prompt)
            batch["image_segment_ids"][row] = 1
        return batch

    @staticmethod
    def set_row(batch: Batch, row: int, tokens: np.ndarray, positions: np.ndarray) -> None:
        batch["tokens"][row, : len(tokens)] = tokens
        batch["positions"][row, : len(tokens)] = positions
        batch["segment_ids"][row, : len(tokens)] = 1

    def labels(self, case: str, prompt: str) -> np.ndarray:
        """-100 or the label of each text token; a token's logits are scored against the next one's label."""
        if self.name == "saisa_tiny":
            return self.expected[f"train.{case}.labels_text"]
        return self.expected[f"train.{case}.labels_expanded"][self.text_positions(prompt)]


@pytest.fixture(scope="session")
def saisa_tiny() -> Fixture:
    return Fixture("saisa_tiny", "saisa", -200)


@pytest.fixture(scope="session")
def llava_tiny() -> Fixture:
    return Fixture("llava_tiny", "llava-hf", 127)


@pytest.fixture(scope="session", params=["saisa_tiny", "llava_tiny"])
def recorded(request: pytest.FixtureRequest) -> Fixture:
    """Each of the two in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def tower(recorded: Fixture, fixtures_dir: Path) -> dict[str, Any]:
    """The recorded CLIP tower, {"vision": ...} in float32; it is in the full fixtures alone."""
    directory, layout = fixtures_dir / recorded.name, recorded.layout
    if recorded.name == "saisa_tiny":
        directory, layout = directory / "vision_tower", "hf-vision"
    return import_params(directory, recorded.config, layout=layout, parts=("vision",), dtype="float32").params


@pytest.fixture(params=PROMPTS)
def prompt(request: pytest.FixtureRequest) -> str:
    """The name of each recorded prompt in turn."""
    return request.param


DIFFERENCE = "largest difference of "


@pytest.fixture
def close(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Asserts that our numbers are theirs, and notes how far they are apart for the table after the tests."""

    def check(ours: Any, theirs: Any, atol: float, what: str = "logits") -> None:
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.shape == theirs.shape
        record_property(DIFFERENCE + what, float(np.abs(ours - theirs).max()))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    largest: dict[str, float] = {}
    for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
        for name, value in report.user_properties:
            if name.startswith(DIFFERENCE):
                row = f"{report.nodeid.split('/')[-1]} {name.removeprefix(DIFFERENCE)}"
                largest[row] = max(largest.get(row, 0.0), value)
    if largest:
        terminalreporter.section("largest differences")
        for row, value in largest.items():
            terminalreporter.write_line(f"{value:.1e}  {row}")
