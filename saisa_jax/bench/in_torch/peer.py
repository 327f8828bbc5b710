"""SAISA and LLaVA in PyTorch, as a user would write them: what `bench peers` measures this program against.

The modules are those of transformers' Llama (norms, MLPs, rotary positions, names of the parameters) and attention is
`scaled_dot_product_attention`; what differs between the models is who runs through which layer, below. Keys and values
lie in buffers of a fixed size, so that a token is written where it belongs and nothing is concatenated.

    Saisa      the like of this program: the text alone runs through the layers, and the head reads the last token
    Official   the same model as its authors' program computes it: one sequence with the visual tokens in it, an
               explicit mask, norms of all rows, a cache that is concatenated, the head over all rows; one row at a time
    Llava      all tokens run through all layers, under a causal mask that is not written out

Axes: B batch, T text, V visual tokens of a row, S = T + V, C vision width, D embed, N query heads, K key/value heads, H
head_dim. `before` text tokens stand before the image.

The folder is no package, so that nothing imports torch with `saisa_jax`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Peer(nn.Module):
    """A Llama with projectors, and what its models share.

    Args:
      config: the `ModelConfig` of ours.
      before: text tokens before the image.
      text: T.
      room: tokens that a row may get beyond its prompt.
    """

    takes_rows = True  # several at once
    trains = True

    def __init__(self, config: Any, before: int, text: int, room: int) -> None:
        super().__init__()
        self.visual, self.before, self.text = config.vision.num_patches, before, text
        self.length = self.visual + text
        self.room, self.heads, self.groups = self.length + room, config.num_heads, config.num_kv_heads
        llama = transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.embed_dim,
            intermediate_size=config.mlp_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            max_position_embeddings=self.room,
        )
        decoder = transformers.LlamaForCausalLM(llama)
        self.model, self.lm_head = decoder.model, decoder.lm_head
        widths = config.vision.embed_dim, config.projector_dim, config.embed_dim
        for holder in self.projector_holders():
            first, second = nn.Linear(*widths[:2]), nn.Linear(*widths[1:])
            holder.mm_projector = nn.Sequential(first, nn.GELU(), second)

        places = torch.arange(self.room)
        self.register_buffer("places", places, persistent=False)
        image = (places >= before) & (places < before + self.visual)
        self.register_buffer("of_text", places[: self.length][~image[: self.length]], persistent=False)
        # The places of the prompt in the order in which keys lie, [V; T], and which of them the text may read.
        ordered = torch.cat([places[: self.length][image[: self.length]], self.of_text])
        self.register_buffer("ordered", ordered, persistent=False)
        self.register_buffer("may_read", self.of_text[:, None] >= ordered[None], persistent=False)

    def projector_holders(self) -> Iterable[nn.Module]:
        raise NotImplementedError

    def load(self, tensors: Iterator[tuple[str, Any]], dtype: str, device: str) -> Peer:
        """The parameters, by the names of the official layout."""
        missing, unknown = self.load_state_dict({name: torch.tensor(value) for name, value in tensors}, strict=False)
        # A tied head, and the projector that the official program runs for nothing.
        missing = [name for name in missing if name != "lm_head.weight" and not name.startswith("model.mm_projector")]
        assert not missing and not unknown, (missing, unknown)
        self.to(device)  # before the dtype changes: angles are float32
        cos, sin = self.model.rotary_emb(torch.empty((), device=device), self.places[None])
        self.to(DTYPES[dtype])
        self.cos, self.sin = cos.to(DTYPES[dtype]), sin.to(DTYPES[dtype])
        return self.requires_grad_(False).eval()

    # --- what layers are made of --------------------------------------------------------------------------------------

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [1, S, H] of positions [S]."""
        return self.cos[:, positions], self.sin[:, positions]

    def queries(self, layer: Any, h: Tensor) -> Tensor:
        return layer.self_attn.q_proj(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def keys_values(self, layer: Any, h: Tensor) -> tuple[Tensor, Tensor]:
        attention = layer.self_attn
        k, v = (project(h).unflatten(-1, (self.groups, -1)) for project in (attention.k_proj, attention.v_proj))
        return k.transpose(1, 2), v.transpose(1, 2)

    def attend(self, layer: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.heads != self.groups
        )
        return layer.self_attn.o_proj(out.transpose(1, 2).flatten(2))

    def buffers_for(self, rows: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, K, room, H] of each layer."""
        config, weight = self.model.config, self.lm_head.weight
        shape = rows, self.groups, self.room, config.head_dim
        return [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.model.layers]

    # --- what is measured ---------------------------------------------------------------------------------------------

    def prefill(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits [B, W] after the last token of prompts [B, T] about features [B, V, C], and the cache."""
        raise NotImplementedError

    def decode(self, token: Tensor, at: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Logits after one more token [B], which stands at the place `at` [1] of the sequence and of the cache."""
        x = self.model.embed_tokens(token)[:, None]
        rotation, mask = self.rotation(at), (self.places <= at)[None]
        for layer, (keys, values) in zip(self.model.layers, cache, strict=True):
            h = layer.input_layernorm(x)
            k, v = self.keys_values(layer, h)
            q, k = apply_rotary_pos_emb(self.queries(layer, h), k, *rotation)
            keys.index_copy_(2, at, k)
            values.index_copy_(2, at, v)
            x = x + self.attend(layer, q, keys, values, mask)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.lm_head(self.model.norm(x[:, -1])).float()

    def hidden(self, tokens: Tensor, features: Tensor) -> Tensor:
        """What the head reads of every text token [B, T, D]."""
        raise NotImplementedError

    def loss(self, tokens: Tensor, features: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Mean of the weighted tokens' negative log-likelihood."""
        logits = self.lm_head(self.hidden(tokens, features)).float()
        nll = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (nll * weights.flatten()).sum() / weights.sum()


class Saisa(Peer):
    """Two streams: visual tokens are keys and values, made anew for each layer; the text is all that asks."""

    def projector_holders(self) -> Iterable[nn.Module]:
        return self.model.layers

    def image_kv(self, features: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Rotated keys, and values, of the image for each layer: all that a question reads of it."""
        rotation, kept = self.rotation(self.ordered[: self.visual]), []
        for layer in self.model.layers:
            k, v = self.keys_values(layer, layer.input_layernorm(layer.mm_projector(features)))
            kept.append((rotated(k, rotation), v))
        return kept

    def through(self, x: Tensor, images: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The text [B, T, D] through all layers, and its keys and values behind those of the image."""
        rotation, cache = self.rotation(self.of_text), []
        for layer, (of_image, values_of_image) in zip(self.model.layers, images, strict=True):
            h = layer.input_layernorm(x)
            k, v = self.keys_values(layer, h)
            q, k = apply_rotary_pos_emb(self.queries(layer, h), k, *rotation)
            keys, values = torch.cat([of_image, k], 2), torch.cat([values_of_image, v], 2)
            cache.append((keys, values))
            x = x + self.attend(layer, q, keys, values, self.may_read)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return x, cache

    def prefill(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        return self.ask(tokens, self.image_kv(features))

    def ask(self, tokens: Tensor, images: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """A question about an image whose keys and values are kept."""
        x, cache = self.through(self.model.embed_tokens(tokens), images)
        return self.lm_head(self.model.norm(x[:, -1])).float(), cache

    def hidden(self, tokens: Tensor, features: Tensor) -> Tensor:
        x, _ = self.through(self.model.embed_tokens(tokens), self.image_kv(features))
        return self.model.norm(x)


class Llava(Peer):
    """One sequence, in which everything reads what stands before it."""

    def projector_holders(self) -> Iterable[nn.Module]:
        return [self.model]

    def through(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        text, image = self.model.embed_tokens(tokens), self.model.mm_projector(features)
        x, cache = torch.cat([text[:, : self.before], image, text[:, self.before :]], 1), []
        rotation = self.rotation(self.places[: self.length])
        for layer in self.model.layers:
            h = layer.input_layernorm(x)
            k, v = self.keys_values(layer, h)
            q, k = apply_rotary_pos_emb(self.queries(layer, h), k, *rotation)
            cache.append((k, v))
            x = x + self.attend(layer, q, k, v, None, causal=True)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return x, cache

    def prefill(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        x, cache = self.through(tokens, features)
        return self.lm_head(self.model.norm(x[:, -1])).float(), cache

    def hidden(self, tokens: Tensor, features: Tensor) -> Tensor:
        x, _ = self.through(tokens, features)
        return self.model.norm(x.index_select(1, self.of_text))


class Official(Saisa):
    """SAISA with the work of its authors' program, of which half is thrown away.

    Every layer's projection is alive from the start and written over the visual rows of the one sequence; norms read
    all rows; the text's rows are picked out for queries, put back, and picked out again for the MLP; LLaVA's projector
    runs as well, and is read by nobody; the head gives float32 logits of all rows. Several rows: one after the other.
    """

    takes_rows = False
    trains = False  # theirs does not

    def projector_holders(self) -> Iterable[nn.Module]:
        return [self.model, *self.model.layers]

    def prefill(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        text, image = self.model.embed_tokens(tokens), slice(self.before, self.before + self.visual)
        x = torch.cat([text[:, : self.before], self.model.mm_projector(features), text[:, self.before :]], 1)
        projections = [layer.mm_projector(features) for layer in self.model.layers]
        places = self.places[: self.length]
        (cos, sin), cache = self.rotation(places), []
        may_read = (self.of_text[:, None] >= places[None])[None, None]
        for layer, projected in zip(self.model.layers, projections, strict=True):
            x[:, image] = projected
            h = layer.input_layernorm(x)
            q = self.queries(layer, h[:, self.of_text])
            k, v = self.keys_values(layer, h)
            q, k = rotated(q, (cos[:, self.of_text], sin[:, self.of_text])), rotated(k, (cos, sin))
            cache.append((k, v))
            attended = torch.zeros_like(x)
            attended[:, self.of_text] = self.attend(layer, q, k, v, may_read)
            x = x + attended
            h = layer.post_attention_layernorm(x)
            through = torch.zeros_like(x)
            through[:, self.of_text] = layer.mlp(h[:, self.of_text])
            x = x + through
        return self.lm_head(self.model.norm(x)).float()[:, -1], cache

    def decode(self, token: Tensor, at: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        x, rotation = self.model.embed_tokens(token)[:, None], self.rotation(at)
        for number, (layer, (keys, values)) in enumerate(zip(self.model.layers, cache, strict=True)):
            h = layer.input_layernorm(x)
            k, v = self.keys_values(layer, h)
            q, k = apply_rotary_pos_emb(self.queries(layer, h), k, *rotation)
            cache[number] = keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
            x = x + self.attend(layer, q, keys, values, None)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.lm_head(self.model.norm(x)).float()[:, -1]


def rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    return apply_rotary_pos_emb(x, x, *rotation)[0]
