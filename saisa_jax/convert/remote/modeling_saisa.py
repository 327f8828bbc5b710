"""SAISA (arXiv 2502.02458) and NAAViT for transformers: a stock decoder, whose cache holds keys and values of images.

    model = AutoModelForImageTextToText.from_pretrained(DIR, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(DIR, trust_remote_code=True)

Text is computed by the unchanged decoder (Llama, Mistral, Qwen2, Qwen3, SmolLM3). A visual token exists only as a key
and a value of each layer, which depend on its image and its position alone: projector, the layer's input norm, k_proj
(then k_norm where the decoder has it) and v_proj, rotation. They are put into the cache between those of the text, in
the order of the sequence; after that, generation is the decoder's own.

Shapes: B rows, S tokens of a row (an image counts as P tokens), T text tokens of a row, U visual tokens of all rows,
P visual tokens of an image, K key heads, H their width, C width of the vision encoder, D width of the decoder.
"""

import inspect

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel, rotate_half

# What transformers calls the cache: `past_key_values`, and `cache` in later versions.
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


class SaisaConfig(PretrainedConfig):
    """A decoder, a vision encoder, and how the images enter the decoder.

    alignment: saisa (projected for each layer anew) or naavit (one residual stream, through the decoder's MLPs).
    projector_kind: mlp, or low_rank: one MLP for all layers, and beside it for each layer a part of projector_rank.
    projector_sharing: per_layer or shared.
    visual_layers: the layers that see the images; None: all.
    image_token_id: stands for a visual token in `input_ids`; it may lie beyond the vocabulary.
    image_seq_length: P. image_size: pixels of a side, if other than the encoder was trained on.
    vision_feature_layer, vision_feature_norm: which hidden state of the encoder is used, and whether it is normalised.
    template, system_prompt: how the model was spoken to in training; the chat template says the same.
    """

    model_type = "saisa"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        alignment="saisa",
        projector_kind="mlp",
        projector_rank=128,
        projector_sharing="per_layer",
        projector_dim=None,
        visual_layers=None,
        image_token_id=None,
        image_seq_length=576,
        image_size=None,
        vision_feature_layer=-1,
        vision_feature_norm=False,
        template=None,
        system_prompt=None,
        **kwargs,
    ):
        self.text_config = _sub_config(text_config, "llama")
        self.vision_config = _sub_config(vision_config, "clip_vision_model")
        self.alignment = alignment
        self.projector_kind = projector_kind
        self.projector_rank = projector_rank
        self.projector_sharing = projector_sharing
        self.projector_dim = projector_dim
        self.visual_layers = visual_layers
        self.image_token_id = image_token_id
        self.image_seq_length = image_seq_length
        self.image_size = image_size
        self.vision_feature_layer = vision_feature_layer
        self.vision_feature_norm = vision_feature_norm
        self.template = template
        self.system_prompt = system_prompt
        super().__init__(**kwargs)


def _sub_config(fields, model_type):
    if isinstance(fields, PretrainedConfig):
        return fields
    fields = dict(fields or {})
    return AutoConfig.for_model(fields.pop("model_type", model_type), **fields)


class SaisaProjector(nn.Module):
    """fc2(gelu(fc1(Z))): [U, C] -> [U, D]."""

    def __init__(self, inner, outer, width):
        super().__init__()
        self.linear_1 = nn.Linear(inner, width)
        self.linear_2 = nn.Linear(width, outer)

    def forward(self, features):
        return self.linear_2(nn.functional.gelu(self.linear_1(features)))


class SaisaLowRank(nn.Module):
    """E + up(silu(down(E))): a layer's own part beside the tokens E [U, D] of the projector of all layers."""

    def __init__(self, width, rank):
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)

    def forward(self, tokens):
        return tokens + self.up(nn.functional.silu(self.down(tokens)))


class SaisaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Vision encoder, projectors, decoder."""

    config_class = SaisaConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    _supports_sdpa = True
    # Of an encoder, what its features do not depend on.
    _keys_to_ignore_on_load_missing = [r"vision_tower\.(.*\.)?(head\.|post_layernorm\.|layernorm\.|mask_token)"]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        text, vision = config.text_config, config.vision_config
        self.vision_tower = AutoModel.from_config(vision)
        layers = range(text.num_hidden_layers)
        self.visual_layers = list(layers) if config.visual_layers is None else list(config.visual_layers)
        width = getattr(vision, "hidden_size", None) or vision.hidden_sizes[-1]
        dim, low_rank = text.hidden_size, config.projector_kind == "low_rank"
        each = map(str, self.visual_layers if config.projector_sharing == "per_layer" else ())
        self.multi_modal_projector = nn.ModuleDict()  # by layer; "shared": before all layers
        if config.projector_sharing == "shared" or low_rank:
            self.multi_modal_projector["shared"] = SaisaProjector(width, dim, config.projector_dim or dim)
        for name in each:
            own = SaisaLowRank(dim, config.projector_rank) if low_rank else None
            self.multi_modal_projector[name] = own or SaisaProjector(width, dim, config.projector_dim or dim)
        self.language_model = AutoModelForCausalLM.from_config(text)
        for number in set(layers) - set(self.visual_layers):
            self.language_model.model.layers[number].register_forward_pre_hook(_hide_images, with_kwargs=True)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def get_image_features(self, pixel_values):
        """The encoder's raw features [images, P, C] of pixels [images, 3, height, width]."""
        config, states = self.config, []
        resampled = config.image_size not in (None, getattr(config.vision_config, "image_size", None))
        asked = "interpolate_pos_encoding" in inspect.signature(self.vision_tower.forward).parameters
        options = {"interpolate_pos_encoding": True} if resampled and asked else {}  # DINOv2 is never asked
        number = config.vision_feature_layer  # of the hidden states, of which the first is the embeddings
        layer = _layers_of(self.vision_tower)[number if number < 0 else number - 1]
        hook = layer.register_forward_hook(lambda *call: states.append(call[-1]))
        try:
            self.vision_tower(pixel_values.to(self.dtype), **options)
        finally:
            hook.remove()
        state = states[0][0] if isinstance(states[0], tuple) else states[0]
        if state.ndim == 4:  # the map of a ConvNeXt
            state = state.flatten(2).transpose(1, 2)
        if config.vision_feature_norm:
            tower = getattr(self.vision_tower, "vision_model", self.vision_tower)
            state = (tower.post_layernorm if hasattr(tower, "post_layernorm") else tower.layernorm)(state)
        return state[:, -config.image_seq_length :]  # without the class token

    def forward(
        self,
        input_ids,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """As of any causal decoder; `image_token_id` stands P times where an image of `pixel_values` stands.

        pixel_values: [images, 3, height, width], the images of all rows in their order.
        """
        cache = past_key_values if cache is None else cache
        length = input_ids.shape[1]
        is_image = input_ids == self.config.image_token_id
        past = cache.get_seq_length() if cache is not None else 0
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), past + length)
        if position_ids is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
        if is_image.any():
            if past:
                raise ValueError("an image after a cached prefix: give the whole conversation, without a cache")
            hidden = self._with_images(input_ids, pixel_values, attention_mask.bool(), position_ids, cache)
        elif pixel_values is not None and not past:
            raise ValueError("pixel_values without an image token in input_ids: the prompt has to say <image>")
        else:
            if cache is not None and getattr(cache, "is_image", None) is not None:
                cache.hidden_images = self._mask_of_text(cache, attention_mask.bool(), position_ids)
            hidden = self.language_model.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE: cache},
            ).last_hidden_state
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.language_model.lm_head(hidden[:, keep])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.text_config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})

    def _with_images(self, input_ids, pixel_values, valid, positions, cache):
        """Hidden states [B, S, D] of rows that hold images; those of visual tokens, which do not exist, are 0."""
        is_image = input_ids == self.config.image_token_id
        given = 0 if pixel_values is None else len(pixel_values) * self.config.image_seq_length
        if given != is_image.sum():
            raise ValueError(
                f"input_ids hold {int(is_image.sum())} image tokens, and {given // self.config.image_seq_length} "
                f"image(s) of {self.config.image_seq_length} were given"
            )
        is_text = valid & ~is_image
        order = torch.argsort((~is_text).int(), dim=1, stable=True)[:, : int(is_text.sum(1).max())]  # text, then rest
        real = is_text.gather(1, order)
        places = positions.gather(1, order)
        seen, hidden = self._mask(places, positions, valid), self._mask(places, positions, is_text)
        interleaved = InterleavedCache(self, cache, pixel_values, is_image, is_text, real, positions, hidden)
        if cache is not None and len(self.visual_layers) < self.config.text_config.num_hidden_layers:
            cache.is_image = is_image
        text = self.language_model.model(
            input_ids=input_ids.gather(1, order).masked_fill(~real, 0),
            attention_mask=seen,
            position_ids=places,
            use_cache=True,
            **{CACHE: interleaved},
        ).last_hidden_state
        hidden = text.new_zeros(*input_ids.shape, text.shape[-1])
        hidden[is_text] = text[real]
        return hidden

    def _mask(self, queries, keys, valid):
        """What is added to the scores, [B, 1, queries, keys]: 0 where a key may be seen, else almost -infinity."""
        queries, keys = queries[:, :, None], keys[:, None]
        seen = (keys <= queries) & valid[:, None]
        if getattr(self.config.text_config, "sliding_window", None):
            seen &= queries - keys < self.config.text_config.sliding_window
        return torch.where(seen, 0.0, torch.finfo(self.dtype).min).to(self.dtype)[:, None]

    def _mask_of_text(self, cache, valid, positions):
        """The mask of a later step for layers that do not see the images in the cache."""
        keys = (valid.cumsum(-1) - 1).clamp(min=0)
        valid = valid.clone()
        valid[:, : cache.is_image.shape[1]] &= ~cache.is_image
        length, offset = cache.get_mask_sizes(positions.shape[1], 0)
        return self._mask(positions, keys, valid)[..., offset : offset + length]


class InterleavedCache(DynamicCache):
    """Stands in for the cache while prompts are read: gives each layer the images' keys and values beside the text's.

    The decoder hands in those of the text [B, K, T, H]; it gets back, and the cache keeps, those of the whole rows
    [B, K, S, H].
    """

    def __init__(self, model, cache, pixel_values, is_image, is_text, real, positions, hidden_images):
        super().__init__()
        self.cache, self.decoder = cache, model.language_model.model
        self.config, self.projectors = model.config, model.multi_modal_projector
        self.hidden_images = hidden_images  # the mask of layers that do not see them
        self.visual_layers = set(model.visual_layers)
        self.is_image, self.is_text, self.real = is_image, is_text, real
        features = model.get_image_features(pixel_values).flatten(0, 1)
        self.visual = self.projectors["shared"](features) if "shared" in self.projectors else features
        self.rotation = self.decoder.rotary_emb(self.visual, positions[is_image][None])

    def update(self, keys, values, layer_idx, *args, **kwargs):
        layer = self.decoder.layers[layer_idx]
        whole = [self._spread(keys), self._spread(values)]
        if layer_idx in self.visual_layers:
            for rows, visual in zip(whole, self._visual_kv(layer, layer_idx), strict=True):
                rows[self.is_image] = visual
        if self.config.alignment == "naavit":
            self.visual = self.visual + layer.mlp(layer.post_attention_layernorm(self.visual))
        whole = [rows.transpose(1, 2) for rows in whole]
        if self.cache is not None:
            self.cache.update(*whole, layer_idx, *args, **kwargs)
        return whole

    def _spread(self, text):
        rows = text.new_zeros(*self.is_text.shape, text.shape[1], text.shape[3])
        rows[self.is_text] = text.transpose(1, 2)[self.real]
        return rows

    def _visual_kv(self, layer, number):
        """Keys, rotated to their places, and values of all visual tokens, [U, K, H] each."""
        tokens = self.projectors[str(number)](self.visual) if str(number) in self.projectors else self.visual
        h, attention = layer.input_layernorm(tokens), layer.self_attn
        keys, values = (
            project(h).unflatten(-1, (-1, attention.head_dim)) for project in (attention.k_proj, attention.v_proj)
        )
        keys = attention.k_norm(keys) if hasattr(attention, "k_norm") else keys
        if not getattr(attention, "use_rope", True):  # of SmolLM3
            return keys, values
        cos, sin = (part[0, :, None] for part in self.rotation)
        return keys * cos + rotate_half(keys) * sin, values


def _hide_images(layer, args, kwargs):
    """Gives a layer that does not see the images its own mask."""
    mask = getattr(kwargs.get(CACHE), "hidden_images", None)
    return (args, kwargs) if mask is None else (args, kwargs | {"attention_mask": mask})


def _layers_of(tower):
    """The layers (ConvNeXt: stages) of a vision encoder, whatever transformers calls them."""
    tower = getattr(tower, "vision_model", tower)
    encoder = tower.encoder
    return next(getattr(encoder, name) for name in ("layers", "layer", "stages") if hasattr(encoder, name))
