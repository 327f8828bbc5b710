"""GGUF files: names, order of rows, quantisation, config and tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import saisa_jax
from saisa_jax.__main__ import main
from saisa_jax.convert.configs import decoder_config_from_hf
from saisa_jax.convert.files.gguf import GgufFile
from saisa_jax.convert.files.gguf_tokenizer import build_tokenizer
from saisa_jax.convert.files.open import open_checkpoint
from saisa_jax.convert.rows import ConvertError

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

D, F, N, K, H, L, W = 64, 96, 4, 2, 16, 2, 300
THEIRS = {
    "attn_norm": (D,), "ffn_norm": (D,), "attn_q": (N * H, D), "attn_k": (K * H, D), "attn_v": (K * H, D),
    "attn_output": (D, N * H), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F),
}  # fmt: skip


def byte_tokens() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "ĠĠ", "12"]


def write(
    path: Path, tensors: dict[str, np.ndarray], pre: str = "smollm", architecture: str = "llama", split: int = 0
) -> Path:
    """A GGUF file whose projections are quantised (Q8_0); split: files of so many tensors."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_block_count(L)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(H)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = byte_tokens()
    tokens += [f"<unused{i}>" for i in range(W - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (W - 3))
    writer.add_token_merges(["Ġ Ġ", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    for name, value in tensors.items():
        quantised = value.ndim == 2 and name.startswith("blk")
        kind = gguf.GGMLQuantizationType.Q8_0 if quantised else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(value, kind) if quantised else value
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {f"blk.{i}.{name}.weight": shape for i in range(L) for name, shape in THEIRS.items()}
    shapes |= {"token_embd.weight": (W, D), "output_norm.weight": (D,)}
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tensors())


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def test_tensors_and_config(file: Path) -> None:
    source, held = GgufFile(file), tensors()
    assert source.shape("model.layers.0.self_attn.k_proj.weight") == (K * H, D)
    exact = source.read("model.embed_tokens.weight")
    np.testing.assert_array_equal(exact, held["token_embd.weight"])
    np.testing.assert_allclose(
        source.read("model.layers.1.mlp.down_proj.weight"), held["blk.1.ffn_down.weight"], atol=0.02
    )
    for name, heads in (("q", N), ("k", K)):
        read = source.read(f"model.layers.0.self_attn.{name}_proj.weight")
        np.testing.assert_allclose(permuted(read, heads), held[f"blk.0.attn_{name}.weight"], atol=0.02)
    config = decoder_config_from_hf(source.config(), file)
    assert (config.norm_eps, config.rope_theta, config.head_dim) == (1e-5, 1e5, H)
    assert config.tie_embeddings and config.vocab_size == W and config.max_length == 128


def test_qwen3_has_norms_and_rows_in_order(tmp_path: Path) -> None:
    held = tensors() | {
        f"blk.{i}.attn_{n}_norm.weight": np.full(H, i + 2.0, np.float32) for i in range(L) for n in "qk"
    }
    source = GgufFile(write(tmp_path / "3.gguf", held, architecture="qwen3", pre="qwen2"))
    assert decoder_config_from_hf(source.config(), tmp_path).qk_norm
    np.testing.assert_array_equal(source.read("model.layers.1.self_attn.k_norm.weight"), np.full(H, 3.0))
    read = source.read("model.layers.0.self_attn.q_proj.weight")
    np.testing.assert_allclose(read, held["blk.0.attn_q.weight"], atol=0.02)


def test_rope_factors_of_llama_3(tmp_path: Path) -> None:
    turns = 8192 / (2 * np.pi * 100000.0 ** (np.arange(0, H, 2) / H))
    smooth = np.clip((turns - 1) / 3, 0, 1)
    factors = (1 / ((1 - smooth) / 32 + smooth)).astype(np.float32)
    source = GgufFile(write(tmp_path / "3.gguf", tensors() | {"rope_freqs.weight": factors}))
    scaling = decoder_config_from_hf(source.config(), tmp_path).rope_scaling
    assert (scaling.kind, scaling.factor) == ("llama3", 32.0) and "rope_freqs.weight" not in source.names
    with pytest.raises(ConvertError, match="not those of Llama"):
        _ = GgufFile(write(tmp_path / "4.gguf", tensors() | {"rope_freqs.weight": factors * 2})).config()


def test_digits_are_split_where_smollm_splits_them(file: Path) -> None:
    tokenizer = GgufFile(file).tokenizer()
    assert tokenizer.tokenize("a 12") == ["a", "Ġ", "1", "2"]  # and the merge of 1 and 2 is never used
    metadata = GgufFile(file).metadata | {"tokenizer.ggml.pre": "gpt-2"}
    assert build_tokenizer(metadata, file).tokenize("a 12") == ["a", "Ġ", "12"]
    text = "é  日本\t 12"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_inspect_says_how_it_is_stored(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "inspect", str(file), "--all"]) == 0
    out = capsys.readouterr().out
    assert "14 Q8_0" in out and "6 F32" in out
    assert any("blk" not in line and "down_proj" in line and "Q8_0" in line for line in out.splitlines())


def test_an_import_answers(file: Path, tmp_path: Path) -> None:
    assert main(["convert", "import", f"--from={file}", f"--to={tmp_path / 'ckpt'}"]) == 0
    model = saisa_jax.load(str(tmp_path / "ckpt"))
    assert model.stage_config.template == "chatml" and model.config.data.system_prompt == "Be kind."
    assert len(model.generate(["hi"], [[]], max_new_tokens=2)) == 1


def test_split_files_and_folders_of_one_model(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = GgufFile(file)
    write(tmp_path / "big.gguf", tensors(), split=8)
    parts = sorted(tmp_path.iterdir())
    assert [path.name for path in parts] == [f"big-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for source in (GgufFile(parts[0]), GgufFile(parts[1]), open_checkpoint(tmp_path)):
        assert source.names == whole.names and source.config() == whole.config()
        for key in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"):
            np.testing.assert_array_equal(source.read(key), whole.read(key))
    shutil.copy(file, tmp_path / "other.GGUF")
    words = ["convert", "import", f"--to={tmp_path / 'out'}"]
    assert main([*words, f"--from={tmp_path}"]) == 2
    said = "holds 2 models in GGUF: name the file that is meant: big-00001-of-00003.gguf, other.GGUF"
    assert said in capsys.readouterr().err
    parts[1].unlink()
    assert main([*words, f"--from={parts[0]}"]) == 2
    assert "one of 3 parts, and these are not there: big-00002-of-00003.gguf" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["~/models/tiny.GGUF", "~/models"])
def test_load_reads_a_gguf(given: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SAISA_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "models").mkdir()
    shutil.copy(file, tmp_path / "models" / "tiny.GGUF")
    model = saisa_jax.load(given)
    table = np.asarray(model.params["embed_tokens"]["embedding"])[:W]
    np.testing.assert_array_equal(table, tensors()["token_embd.weight"])
    assert model.tokenizer.tokenize("a 12") == ["a", "Ġ", "1", "2"] and model.stage_config.template == "chatml"


def test_sentencepiece(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab", "▁ab"]
    types = [2, 3, 3, *([6] * 256), 1, 1, 1, 1, 1]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [0.0] * 259 + [-9.0, -9.0, -9.0, -1.0, -2.0], "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    tokenizer = build_tokenizer(metadata, tmp_path)
    assert tokenizer.tokenize("ab b") == ["▁ab", "▁", "b"]
    assert tokenizer.tokenize("é") == ["▁", "<0xC3>", "<0xA9>"]


def test_what_is_refused(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(file.read_bytes()[:-1000])
    other = write(tmp_path / "other.gguf", tensors(), architecture="gemma")
    unknown = write(tmp_path / "unknown.gguf", tensors(), pre="new-thing")
    lacking = write(tmp_path / "lacking.gguf", {k: v for k, v in tensors().items() if k != "blk.1.ffn_up.weight"})
    for path, message in (
        (short, "truncated"),
        (other, "'gemma' is not known here; known: llama, qwen2, qwen3"),
        (unknown, "'new-thing' is not one of default, gpt-2, smollm"),
        (lacking, "missing     model.layers.1.mlp.up_proj.weight"),
        (tmp_path / "none.gguf", "there is no"),
    ):
        assert main(["convert", "import", f"--from={path}", f"--to={tmp_path / 'out'}"]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.unfinished").exists()
