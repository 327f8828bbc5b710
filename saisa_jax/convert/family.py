"""What a family of weights is: its names of config fields and tensors, and its published sizes.

A family is one file in `families/` that registers one object. A new encoder is a module in `models/encoders/`
and such a file; a new family of decoders that `models/decoder.py` can compute is the file alone.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from saisa_jax.config import ConfigError, ModelConfig, VisionConfig
from saisa_jax.convert.rows import TensorRow

# Their hidden_act -> our activation. Of several spellings the first is written.
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# Fields of `ModelConfig` for what decoders of this build have besides Llama's; a family is told by those that it has.
EXTRAS = ("qkv_bias", "qk_norm", "unrotated_layers", "sliding_window")

Aliases = tuple[tuple[str, str], ...]  # (regex, replacement): other spellings of keys


def activation_from_hf(fields: Mapping[str, Any]) -> str:
    """Our name of `hidden_act`.

    Raises:
      ConfigError: one that we do not have.
    """
    if fields["hidden_act"] not in ACTIVATIONS:
        raise ConfigError(f"hidden_act={fields['hidden_act']!r} is not one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[fields["hidden_act"]]


def activation_to_hf(activation: str) -> str:
    """The reverse of `activation_from_hf`."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == activation)


def vit_from_hf(fields: Mapping[str, Any], mlp_dim: int) -> dict[str, Any]:
    """Fields of `VisionConfig` that all ViTs spell alike."""
    return {
        "image_size": fields["image_size"],
        "patch_size": fields["patch_size"],
        "embed_dim": fields["hidden_size"],
        "num_layers": fields["num_hidden_layers"],
        "num_heads": fields["num_attention_heads"],
        "mlp_dim": mlp_dim,
        "activation": activation_from_hf(fields),
        "norm_eps": float(fields["layer_norm_eps"]),
    }


def vit_to_hf(config: VisionConfig) -> dict[str, Any]:
    """The reverse of `vit_from_hf`, but for the MLP."""
    return {
        "image_size": config.position_size or config.image_size,  # of which the table of positions is
        "patch_size": config.patch_size,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_act": activation_to_hf(config.activation),
        "layer_norm_eps": config.norm_eps,
    }


class Family(abc.ABC):
    """What encoders and decoders have in common.

    Attributes:
      model_type, architecture: in config.json.
      defaults: fields of config.json that its files leave out where they equal the class's default.
      only: fields of config.json that have one value here; another is refused.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]] = {}
    only: ClassVar[Mapping[str, Any]] = {}

    def check_fields(self, fields: Mapping[str, Any]) -> None:
        """Raises ConfigError for an option of config.json that is not supported here."""
        for field, value in self.only.items():
            if fields.get(field, value) != value:
                raise ConfigError(f"{field}={fields[field]!r} is not supported, only {value!r}")


class EncoderFamily(Family):
    """A family of vision encoders.

    Attributes:
      image_processor: in preprocessor_config.json.
      image_mean, image_std: of a directory without a preprocessor_config.json.
      switches: fields of `VisionConfig` that all of the family have in common; an encoder with others is none of it.
      select_layer: the hidden state to use where an import does not say; LLaVA's choice.
      in_llava_hf: whether transformers' LLaVA supports it as its tower, which takes a row of patches
        behind at most a class token.
      presets: published encoders by name.
    """

    image_processor: ClassVar[str]
    image_mean: ClassVar[tuple[float, ...]] = IMAGENET[0]
    image_std: ClassVar[tuple[float, ...]] = IMAGENET[1]
    switches: ClassVar[Mapping[str, Any]]
    select_layer: ClassVar[int] = -2
    in_llava_hf: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, VisionConfig]] = {}

    @abc.abstractmethod
    def config_from_hf(
        self, fields: Mapping[str, Any], preprocessor: Mapping[str, Any], select_layer: int
    ) -> dict[str, Any]:
        """Fields of `VisionConfig` besides `switches` and those of the pixels.

        Args:
          fields: of config.json, with `defaults`.
          preprocessor: of preprocessor_config.json; empty: there is none.
          select_layer: the hidden state that is the output.

        Raises:
          ConfigError: an option that the encoder does not have.
        """

    @abc.abstractmethod
    def config_to_hf(self, config: VisionConfig) -> dict[str, Any]:
        """The reverse: fields of config.json besides `model_type` and `architectures`.

        Raises:
          ConfigError: an encoder that the family's config.json cannot describe.
        """

    @abc.abstractmethod
    def rows(self, config: VisionConfig, root: str) -> Iterator[TensorRow]:
        """One row a parameter, the paths below `vision/`, the keys below `root`."""

    def root(self, tower: str) -> str:
        """The prefix of all keys, below that of the tower in a multimodal checkpoint ("": a checkpoint of its own)."""
        return tower

    def aliases(self, tower: str) -> Aliases:
        """Other spellings of the keys."""
        return ()

    def ignored(self, config: VisionConfig) -> tuple[str, ...]:
        """Regexes of whole keys, below the root, that the model never reads."""
        return ()

    def beside(self) -> tuple[str, ...]:
        """Regexes of whole keys of a checkpoint of its own that belong to something else (CLIP's text model)."""
        return ()


class DecoderFamily(Family):
    """A family of decoders that `models/decoder.py` computes.

    Attributes:
      llava: (model_type, architecture) of the original LLaVA's multimodal class, which keeps the decoder's fields at
        the top level.
      also: further model_types that are read as this one.
      presets: fields of `ModelConfig` of published decoders by name.
    """

    llava: ClassVar[tuple[str, str]]
    also: ClassVar[tuple[str, ...]] = ()
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @abc.abstractmethod
    def holds(self, config: ModelConfig) -> bool:
        """Whether a decoder is one of this family, so that its classes compute the same."""

    @abc.abstractmethod
    def config_from_hf(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `ModelConfig`.

        Args:
          fields: of config.json, with `defaults`.

        Raises:
          ConfigError: an option that our decoder does not have.
        """

    @abc.abstractmethod
    def config_to_hf(self, config: ModelConfig) -> dict[str, Any]:
        """The reverse: fields of config.json besides `model_type` and `architectures`.

        Raises:
          ConfigError: a decoder that the family's config.json cannot describe.
        """

    @abc.abstractmethod
    def rows(self, config: ModelConfig, body: str, head: str) -> Iterator[TensorRow]:
        """One row a parameter, with keys below `body`, of the head below `head`."""

    def ignored(self) -> tuple[str, ...]:
        """Regexes of whole keys, below the body, that the model never reads."""
        return ()
