"""A GGUF file of a Llama-family model as tensors under Hugging Face's names, with its config and tokenizer.

A large one is split into `NAME-00001-of-00003.gguf` and so on, the first of which says what the model is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saisa_jax.convert.rows import ConvertError

_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ARCHITECTURES = ("llama", "qwen2", "qwen3")
SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1's scaling of the frequencies, as its outcome


class GgufFile:
    """The tensors of a GGUF file, dequantised to float32 one by one.

    Args:
      path: of a model whose architecture is llama (Mistral and SmolLM2 among them), qwen2 or qwen3; of a split one any
        part.

    Raises:
      ConvertError: the `gguf` package is missing, no whole GGUF file, a part that is not there, or another
        architecture.
    """

    def __init__(self, path: str | Path):
        self.where = Path(path)
        if not self.where.is_file():
            raise ConvertError(f"there is no file {self.where}")
        try:
            import gguf
        except ImportError as error:
            raise ConvertError("reading GGUF files takes the gguf package: pip install gguf") from error
        self.metadata: dict[str, Any] = {}
        # Their type, shape, offset, size and file.
        self._tensors: dict[str, tuple[Any, tuple[int, ...], int, int, Path]] = {}
        for file in _shards(self.where):
            try:
                reader = gguf.GGUFReader(file)
                held = {name: field.contents() for name, field in reader.fields.items()}
                found = {
                    _their_name(t.name): (t.tensor_type, tuple(map(int, t.shape)), t.data_offset, t.n_bytes, file)
                    for t in reader.tensors
                }
            except (ValueError, OSError, KeyError, IndexError, TypeError) as error:
                raise ConvertError(f"{file} is no whole GGUF file (truncated?): {error}") from error
            del reader  # it has mapped the file
            self.metadata = {**held, **self.metadata}  # the first one says what the model is
            self._tensors |= found
            end = max((offset + size for _, _, offset, size, _ in found.values()), default=0)
            if end > file.stat().st_size:
                raise ConvertError(f"{file} is no whole GGUF file (truncated?): its tensors end at byte {end}")
        self.architecture = str(self.metadata.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ConvertError(f"{self.where}: architecture {self.architecture!r} is not known here; known: {known}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(name for name in self._tensors if name != ROPE_FACTORS))

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key][1][::-1]  # GGUF counts from the axis that varies fastest

    def dtype_name(self, key: str) -> str:
        return "F32"

    def is_float(self, key: str) -> bool:
        return True

    def stored(self, key: str) -> tuple[str, int]:
        kind, _, _, size, _ = self._tensors[key]
        return kind.name, size

    def read(self, key: str) -> np.ndarray:
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        kind, _, offset, size, file = self._tensors[key]
        raw = np.fromfile(file, np.uint8, count=size, offset=offset)
        if raw.size != size:
            raise ConvertError(f"{file} is no whole GGUF file (truncated while it was read?)")
        shape = self.shape(key)
        if kind.name in ("F32", "F16"):
            array = raw.view(np.float32 if kind.name == "F32" else np.float16).reshape(shape)
        else:
            array = dequantize(raw.reshape(quant_shape_to_byte_shape(shape, kind)), kind)
        array = array.astype(np.float32, copy=False)
        if self.architecture == "llama" and ".q_proj." in key:
            return _unpermute(array, self._field("attention.head_count"))
        if self.architecture == "llama" and ".k_proj." in key:
            return _unpermute(array, self._field("attention.head_count_kv", self._field("attention.head_count")))
        return array

    def _field(self, name: str, default: Any = None) -> Any:
        value = self.metadata.get(f"{self.architecture}.{name}", default)
        if value is None:
            raise ConvertError(f"{self.where} has no {self.architecture}.{name} in its metadata")
        return value

    def config(self) -> dict[str, Any]:
        """What config.json would say.

        Raises:
          ConvertError: metadata that is missing, or scaled rotary embeddings of an unknown kind.
        """
        if "model.embed_tokens.weight" not in self._tensors:
            raise ConvertError(f"{self.where} holds no token_embd.weight")
        vocabulary, width = self.shape("model.embed_tokens.weight")
        heads = int(self._field("attention.head_count"))
        head_dim = self._field("attention.key_length", self._field("rope.dimension_count", width // heads))
        raw: dict[str, Any] = {
            "model_type": self.architecture,
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": int(self._field("feed_forward_length")),
            "num_hidden_layers": int(self._field("block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": int(self._field("attention.head_count_kv", heads)),
            "head_dim": int(head_dim),
            # Stored as float32: 1e-5 comes back as 9.9999997e-06.
            "rms_norm_eps": float(f"{self._field('attention.layer_norm_rms_epsilon'):.6g}"),
            "rope_theta": float(f"{self._field('rope.freq_base', 10000.0):.7g}"),
            "max_position_embeddings": int(self._field("context_length")),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
        }
        scaling = self._rope_scaling(raw["head_dim"], raw["rope_theta"])
        return raw | ({"rope_scaling": scaling} if scaling else {})

    def _rope_scaling(self, head_dim: int, theta: float) -> dict[str, Any] | None:
        if ROPE_FACTORS in self._tensors:
            return self._llama3_scaling(head_dim, theta)
        kind = self._field("rope.scaling.type", "none")
        if kind == "none":
            return None
        return {"rope_type": kind, "factor": float(self._field("rope.scaling.factor"))}

    def _llama3_scaling(self, head_dim: int, theta: float) -> dict[str, Any]:
        """Llama 3.1 to 3.3 differ in one number; the file holds what came of it for each frequency."""
        _, shape, offset, _, file = self._tensors[ROPE_FACTORS]
        seen = np.fromfile(file, np.float32, count=shape[0], offset=offset)
        turns = 8192 / (2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
        for factor in (8.0, 32.0):
            smooth = np.clip((turns - 1) / 3, 0, 1)
            if len(seen) == len(turns) and np.allclose(1 / ((1 - smooth) / factor + smooth), seen, rtol=1e-3):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
        raise ConvertError(f"{self.where}: its {ROPE_FACTORS} are not those of Llama 3.1 or 3.2")

    def tokenizer(self) -> Any:
        """The tokenizer that the metadata describes.

        Raises:
          ConvertError: one of a kind that is not known.
        """
        from saisa_jax.convert.files.gguf_tokenizer import build_tokenizer

        return build_tokenizer(self.metadata, self.where)


def choose_gguf(files: Sequence[str], where: str) -> list[str]:
    """Of the GGUF files of a folder the only one, or all parts of the only one that is split.

    Raises:
      ConvertError: there are several, by name.
    """
    models: dict[str, list[str]] = {}
    for file in sorted(files):
        split = SPLIT.fullmatch(file)
        models.setdefault(split[1] if split else file, []).append(file)
    if len(models) != 1:
        named = ", ".join(parts[0] for parts in models.values())
        raise ConvertError(f"{where} holds {len(models)} models in GGUF: name the file that is meant: {named}")
    return next(iter(models.values()))


def _shards(path: Path) -> list[Path]:
    """The files of a model, of which `path` is one; the first one first."""
    split = SPLIT.fullmatch(path.name)
    if not split:
        return [path]
    files = [path.with_name(f"{split[1]}-{n:05}-of-{split[3]}{split[4]}") for n in range(1, int(split[3]) + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ConvertError(f"{path} is one of {len(files)} parts, and these are not there: {', '.join(missing)}")
    return files


def _their_name(name: str) -> str:
    """Hugging Face's name of a tensor; a name that is not known stays, and is reported as unexpected."""
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if found and found[2] in _BLOCK:
        return f"model.layers.{found[1]}.{_BLOCK[found[2]]}.{found[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{_OUTER[stem]}.{kind}" if stem in _OUTER else name


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp rotates pairs of neighbours (2i, 2i + 1), Hugging Face the halves (i, i + H/2): rows back in order."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
