"""A finished model and everything that it needs to answer: parameters, configuration, tokenizer, template."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, overload

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import Float
from PIL import Image

from saisa_jax import parallel
from saisa_jax.batch import Batch
from saisa_jax.checkpoints import load_model
from saisa_jax.config import DTYPES, Config, ConfigError, MeshConfig, ModelConfig, StageConfig
from saisa_jax.data.rows.collate import Example, pack_rows
from saisa_jax.data.sample import USER, DataError, ImageSource, Turn
from saisa_jax.data.text.conversation import IMAGE, Encoded, check_length, encode, encode_prompt, end_token_id
from saisa_jax.data.views import ImageLoader, count_views
from saisa_jax.errors import did_you_mean
from saisa_jax.inference import memory
from saisa_jax.inference.generate import GREEDY, Generator, ImageSlots, Sampling, bucket, check_sampling
from saisa_jax.inference.image_cache import DEFAULT_BYTES, EncodedImage, ImageCache
from saisa_jax.inference.import_cache import find_model
from saisa_jax.inference.pictures import picture
from saisa_jax.inference.quantize import quantize as quantize_params
from saisa_jax.inference.quantize import variables_of
from saisa_jax.models.saisa import Saisa, abstract_params

if TYPE_CHECKING:
    from saisa_jax.inference.batches import Prompt
    from saisa_jax.inference.chat import Chat

AnyImage = ImageSource | Image.Image | np.ndarray | jax.Array | BinaryIO | EncodedImage

IMAGES_AT_ONCE = 16  # so many go through the vision encoder together


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What is asked: turns that end with the user's, their images, and a system prompt of its own (None: the model's).

    `name` is for errors.
    """

    turns: tuple[Turn, ...]
    images: tuple[Any, ...] = ()  # as in `generate`
    system: str | None = None
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Request:
    """One question as the model reads it."""

    encoded: Encoded
    images: tuple[EncodedImage, ...]  # in the order of its image slots


@dataclasses.dataclass(frozen=True, repr=False)
class VisionLanguageModel:
    """What `load` gives: ask it with `generate`, or talk to it with `chat`.

    Attributes:
      params: the parameters, or quantised ones.
      config: the configuration of the run that made them.
      tokenizer: a Hugging Face tokenizer.
      stage: the last stage of training, whose template the model knows.
      metadata: what was written beside the parameters.
      mesh: the devices that hold the parameters; None: one.
      image_cache: images that were asked about before.
      allow_urls: fetch pictures that are named by an http or https URL.
    """

    params: Any
    config: Config
    tokenizer: Any
    stage: str
    metadata: dict[str, Any]
    mesh: Mesh | None = None
    image_cache: ImageCache = dataclasses.field(default_factory=ImageCache)
    allow_urls: bool = False

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        kinds = "/".join(sorted({str(leaf.dtype) for leaf in leaves}))
        count = f"{sum(leaf.size for leaf in leaves):,} parameters"
        model = self.model_config
        return (
            f"VisionLanguageModel({self.config.name}: {model.alignment}, {count} in {kinds}, computed in {model.dtype})"
        )

    @property
    def model_config(self) -> ModelConfig:
        """The model as its last stage leaves it."""
        return self.config.model_for(self.stage)

    @property
    def stage_config(self) -> StageConfig:
        return self.config.stage(self.stage)

    @functools.cached_property
    def generator(self) -> Generator:
        if self.tokenizer is None:
            raise DataError("this model was imported without a tokenizer: import it again with --tokenizer=DIR")
        return Generator(
            self.model_config, [end_token_id(self.stage_config.template, self.tokenizer)], multiple_of=self.row_ways
        )

    @functools.cached_property
    def loader(self) -> ImageLoader:
        return ImageLoader(self.model_config.vision, cache_bytes=0)

    # --- asking -------------------------------------------------------------------------------------------------------

    @overload
    def generate(
        self,
        questions: str,
        images: AnyImage | Sequence[AnyImage] | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_error: str = "raise",
    ) -> str: ...

    @overload
    def generate(
        self,
        questions: Sequence[str],
        images: Sequence[Sequence[AnyImage]] | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_error: str = "raise",
    ) -> list[Any]: ...

    def generate(
        self,
        questions: Any,
        images: Any = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        on_error: str = "raise",
    ) -> Any:
        """The answer to a question, or answers to several.

            model.generate("what is this?", "a.png")
            model.generate(["what is this?", "which is larger?"], [["a.png"], ["a.png", "b.png"]])

        Questions of any mixture share a batch: none, one or several images each, of any length. Rows, text, images and
        answers are padded to buckets, so that a like batch compiles nothing.

        Args:
          questions: one, or a list. `<image>` in one says where an image stands; otherwise its images stand before it.
          images: of one question an image or a list of them; of several questions a list for each; None: there are
            none. An image is a path, a PIL image, an array or tensor [height, width, 3] or [3, height, width] of
            uint8 or of floats in 0..1, bytes of an encoded file, a data URL, an open file, what `encode_images` gave,
            or with `allow_urls` an http or https URL.
          max_new_tokens: of an answer.
          temperature: 0 is greedy.
          top_p: sample among the most likely tokens that hold this much of the probability.
          seed: of the sampling.
          on_error: "raise": nothing is answered if a question cannot be, and the error names the first ten of these;
            "return": the others are answered, and the error stands in the place of the answer.

        Returns:
          a string, or a list of them (and of DataErrors, with on_error="return").

        Raises:
          DataError: a question that is empty, too long, or does not fit its images; an image that cannot be read; other
            types than these.
        """
        asked = [
            Conversation((Turn(USER, question),), tuple(sources), name=f"question {number}")
            for number, (question, sources) in enumerate(_paired(questions, images))
        ]
        answers = self.answer(asked, max_new_tokens, Sampling(temperature, top_p), seed, on_error)
        return answers[0] if isinstance(questions, str) else answers

    def chat(self) -> Chat:
        """A conversation with this model, which reads only what is new in each turn (`inference/chat.py`)."""
        from saisa_jax.inference.chat import Chat  # which is written for this class

        return Chat(self)

    def answer(
        self,
        conversations: Sequence[Conversation],
        max_new_tokens: int = 64,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        on_error: str = "raise",
    ) -> list[Any]:
        """The next answer in each of several conversations, as one batch. The rest is as in `generate`."""
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error={on_error!r} is neither raise nor return")
        check_sampling(sampling)
        self.check_alone("generate")
        requests = self._requests(conversations, max_new_tokens)
        good = [request for request in requests if isinstance(request, Request)]
        bad = [error for error in requests if isinstance(error, DataError)]
        if bad and on_error == "raise":
            if len(requests) == 1:
                raise bad[0]
            more = f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
            some = "; ".join(map(str, bad[:10]))
            raise DataError(f"{len(bad)} of {len(requests)} questions cannot be answered: {some}{more}")
        answers = iter(self._answers(good, max_new_tokens, sampling, seed) if good else ())
        return [next(answers) if isinstance(request, Request) else request for request in requests]

    def answer_batches(
        self,
        prompts: Sequence[Prompt],
        batches: Sequence[Sequence[int | None]],
        max_new_tokens: int,
        cache_bytes: int | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[list[Any]]:
        """Greedy answers to many prompts, batch by batch, by all processes of the mesh (`inference/batches.py`).

        `cache_bytes` of pictures stay on each device; None: as many as `image_cache` may have.
        """
        from saisa_jax.inference.batches import Answerer  # which is written for this class

        cache_bytes = self.image_cache.max_bytes if cache_bytes is None else cache_bytes
        return iter(Answerer(self, prompts, batches, max_new_tokens, cache_bytes, stop))

    def encode_images(self, images: Sequence[Any]) -> list[EncodedImage]:
        """Images, ready to be asked about any number of times: give them to `generate` in place of the pictures.

        What the text reads of an image is computed once and kept (`image_cache`); `generate` finds images that it has
        seen by itself as well, by content. Under LLaVA, whose visual tokens depend on the prompt, only the pixels are.

        Raises:
          DataError: an image that cannot be read.
        """
        self.check_alone("encode_images")
        pictures = [self._pixels(image, f"image {n}") for n, image in enumerate(images)]
        views = iter(self._encode([view for picture in pictures for view in picture.views]))
        return [EncodedImage.of_views([next(views) for _ in picture.views]) for picture in pictures]

    def attention(self, question: str, images: Sequence[Any]) -> Float[np.ndarray, "L V"]:
        """How much the answer's first token reads each visual token, by layer, averaged over heads.

        It is the attention of the prompt's last token, from which the answer's first token is predicted.
        """
        self.check_alone("attention")
        pixels = [self._pixels(image, "") for image in images]
        request = self.request((Turn(USER, question),), pixels)
        return self._attention_to_images(request, [len(request.encoded.tokens) - 1])[:, 0]

    def answer_attention(
        self, turns: Sequence[Turn], images: Sequence[Any], system: str | None = None
    ) -> tuple[list[int], Float[np.ndarray, "L A V"]]:
        """The tokens of an answer, and how much each was predicted from each visual token, by layer, over all heads.

        Args:
          turns: a conversation that ends with the answer; A are its tokens, without the one that ends it.
          images: of the conversation.
          system: a system prompt; None: the model's.

        Raises:
          DataError: the conversation or an image cannot be read; it is longer than `model.max_length`, or what memory
            has room for.
        """
        self.check_alone("answer_attention")
        pixels = [self._pixels(image, "") for image in images]
        encoded = encode(
            [*(dataclasses.replace(turn, loss=False) for turn in turns[:-1]), turns[-1]],
            self.stage_config.template,
            self.tokenizer,
            self.model_config.num_visual_tokens,
            system_prompt=self.config.data.system_prompt if system is None else system,
            num_images=len(pixels),
            views=[len(image.views) for image in pixels],
        )
        check_length(encoded, len(encoded.tokens), self.model_config.max_length)
        rows = np.flatnonzero((encoded.loss_weights > 0) & ~np.isin(encoded.targets, self.generator.eos_ids))
        views = tuple(view for image in pixels for view in image.views)
        weights = self._attention_to_images(Request(encoded, views), rows)
        return encoded.targets[rows].tolist(), weights

    def _attention_to_images(self, request: Request, queries: Any) -> Float[np.ndarray, "L Q V"]:
        """Weights of some of a prompt's tokens over the visual tokens of its images, averaged over heads.

        Raises:
          DataError: the prompt is so long that they do not fit into the devices' memory.
        """
        images = tuple(dataclasses.replace(image, kv=None) for image in request.images)
        batch = self.batch([Request(request.encoded, images)])
        text, slots = batch["tokens"].shape[1], batch["image_positions"].shape[1]
        needed = memory.attention_bytes(self.model_config, self.mesh, text, slots)
        if needed > (free := memory.free_bytes(memory.devices_of(self.mesh))):
            raise DataError(
                f"the attention of {len(request.encoded.tokens)} tokens with {len(images)} pictures, of all layers and "
                f"heads, takes {needed / 2**30:.3g} GiB of a device, and {free / 2**30:.3g} GiB are free: shorten the "
                "conversation"
            )
        with self.on_mesh():
            weights = np.asarray(_attention(self.model_config, self.params, batch))  # [L, 1, T, V + T]
        return weights[:, 0, queries, : len(images) * self.model_config.num_visual_tokens]

    # --- from questions to batches ------------------------------------------------------------------------------------

    def request(
        self,
        turns: Sequence[Turn],
        images: Sequence[EncodedImage],
        max_new_tokens: int = 0,
        name: str = "",
        system: str | None = None,
    ) -> Request:
        """A conversation, ending with the user's turn, as the model reads it. Errors as of `prompt`."""
        views = [image.views for image in images]
        encoded = self.prompt(turns, list(map(len, views)), max_new_tokens, name, system)
        return Request(encoded, tuple(itertools.chain.from_iterable(views)))

    def prompt(
        self,
        turns: Sequence[Turn],
        views: Sequence[int],
        max_new_tokens: int = 0,
        name: str = "",
        system: str | None = None,
    ) -> Encoded:
        """The text of a conversation that ends with the user's turn, and the places of its images.

        Args:
          turns: of the conversation.
          views: of each of its images, how many image slots it takes (`views_of`).
          max_new_tokens: of the answer, for which there has to be room.
          name: for errors.
          system: a system prompt; None: the model's.

        Raises:
          DataError: the last turn is empty, the images do not fit the turns, or prompt and answer exceed
            `model.max_length`.
        """
        _ = self.generator  # or else there is nothing to tokenise with
        if not turns[-1].text.replace(IMAGE, "").strip() and self.stage_config.template != "plain":
            raise DataError("the question is empty: ask something", name)
        encoded = encode_prompt(
            turns,
            self.stage_config.template,
            self.tokenizer,
            self.model_config.num_visual_tokens,
            num_images=len(views),
            views=views,
            system_prompt=self.config.data.system_prompt if system is None else system,
            sample_id=name,
        )
        check_length(encoded, len(encoded.tokens), self.model_config.max_length)
        if encoded.length + max_new_tokens > self.model_config.max_length:
            raise DataError(
                f"a prompt of {encoded.length} positions leaves no room for {max_new_tokens} new tokens within "
                f"model.max_length={self.model_config.max_length}; shorten it, or lower max_new_tokens",
                name,
            )
        return encoded

    def views_of(self, images: Sequence[Any], name: str = "") -> list[int]:
        """How many image slots each of these images takes; it is read only where that depends on its size.

        Raises:
          DataError: an image whose size cannot be read.
        """
        vision = self.model_config.vision
        if not vision.grids:
            return [1] * len(images)
        return [
            len(image.views)
            if isinstance(image, EncodedImage)
            else count_views(picture(image, name, self.allow_urls), vision, name)
            for image in images
        ]

    def _requests(self, conversations: Sequence[Conversation], max_new_tokens: int) -> list[Request | DataError]:
        """One request for each conversation, or why there is none. All new images are encoded together."""
        if not conversations:
            raise ValueError("no questions")
        requests: list[Request | DataError] = []
        for asked in conversations:
            try:
                prepared = [self._pixels(image, asked.name) for image in asked.images]
                requests.append(self.request(asked.turns, prepared, max_new_tokens, asked.name, asked.system))
            except DataError as error:
                requests.append(error)
        different = {image.key: image for r in requests if isinstance(r, Request) for image in r.images}
        encoded = dict(zip(different, self._encode(list(different.values())), strict=True))
        return [
            Request(r.encoded, tuple(encoded[image.key] for image in r.images)) if isinstance(r, Request) else r
            for r in requests
        ]

    def check_sees(self, images: Sequence[Any], name: str) -> None:
        """Raises DataError if there are images and the model has no encoder for them."""
        if images and "vision" not in variables_of(self.params)["params"]:
            raise DataError("this model was imported without a vision encoder: ask it without images", name)

    def _pixels(self, image: Any, name: str) -> EncodedImage:
        self.check_sees((image,), name)
        if isinstance(image, EncodedImage):
            expected = (self.model_config.vision.image_size, self.model_config.vision.image_size, 3)
            for view in image.views:
                if view.pixels.shape != expected:
                    raise DataError(f"an encoded image of {view.pixels.shape}, expected {expected}", name)
            if image.model is self.params:
                return image
            return EncodedImage.of_views([EncodedImage(view.key, view.pixels, None) for view in image.views])
        return EncodedImage.of_views(self.loader(picture(image, name, self.allow_urls), name))

    def _encode(self, images: Sequence[EncodedImage]) -> list[EncodedImage]:
        """The same images with keys and values, where the model has such: kept ones, or else new ones."""
        if not self.generator.caches_images or self.config.data.blind:
            return list(images)
        done = {image.key: image for image in images if image.kv is not None}
        for key in dict.fromkeys(image.key for image in images if image.kv is None):
            found = self.image_cache.get(key)
            if found is not None and found.model is self.params:
                done[key] = found
        missing = list({image.key: image for image in images if image.key not in done}.values())
        for start in range(0, len(missing), IMAGES_AT_ONCE):
            some = missing[start : start + IMAGES_AT_ONCE]
            with self.on_mesh():
                new = self.generator.encode(self.params, np.stack([image.pixels for image in some]))
            for image, kv in zip(some, new, strict=True):
                done[image.key] = dataclasses.replace(image, kv=kv, model=self.params)
                self.image_cache.put(done[image.key])
        return [done[image.key] for image in images]

    def batch(self, requests: Sequence[Request]) -> Batch:
        """The requests, a row each, padded to buckets. The pixels of images that are encoded are not read again."""
        blind = self.config.data.blind
        fresh = any(image.kv is None for request in requests for image in request.images)
        size = self.model_config.vision.image_size if fresh else 0
        slots = max(len(request.encoded.image_positions) for request in requests)
        return pack_rows(
            [[Example(r.encoded, None if blind else [x.pixels[:size, :size] for x in r.images])] for r in requests],
            count=bucket(len(requests), smallest=self.row_ways),
            text_length=bucket(max(len(request.encoded.tokens) for request in requests)),
            max_images=bucket(slots, smallest=1) if slots else 0,
            image=size,
        )

    def image_slots(self, batch: Batch, requests: Sequence[Request]) -> ImageSlots | None:
        """The requests' encoded images for the generator; None where it is to encode the batch's pixels, which it does
        if one of the images is not encoded.

        The number of different images is padded to a bucket, with copies of the first.
        """
        images = [image for request in requests for image in request.images]
        different = {image.key: image.kv for image in images if image.kv is not None}
        if not different or any(image.kv is None for image in images):
            return None
        numbers = {key: n for n, key in enumerate(different)}
        slots = np.zeros(batch["image_positions"].shape, np.int32)
        for row, request in enumerate(requests):
            slots[row, : len(request.images)] = [numbers[image.key] for image in request.images]
        kvs = list(different.values())
        return ImageSlots(tuple(kvs + kvs[:1] * (bucket(len(kvs), smallest=1) - len(kvs))), slots)

    def _answers(self, requests: Sequence[Request], max_new_tokens: int, sampling: Sampling, seed: int) -> list[str]:
        batch = self.batch(requests)
        with self.on_mesh():
            tokens = self.generator(
                self.params, batch, max_new_tokens, sampling, seed, self.image_slots(batch, requests)
            )
        return [self.text(row) for row in tokens[: len(requests)]]

    def text(self, tokens: Sequence[int]) -> str:
        """Generated tokens as a person reads them."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    @property
    def row_ways(self) -> int:
        """Over so many devices the rows of a batch are split."""
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def check_alone(self, what: str) -> None:
        """Raises ConfigError if other processes hold parts of this model: they would have to ask the same."""
        if self.mesh is not None and (count := len({device.process_index for device in self.mesh.devices.flat})) > 1:
            raise ConfigError(
                f"{what} runs in one process, and {count} hold this model: evaluate it with eval.py or answer_batches, "
                "which all of them run; or load it in one process"
            )

    def on_mesh(self) -> contextlib.AbstractContextManager[None]:
        """The context in which programs run on this model's parameters."""
        if self.mesh is None:
            return parallel.broadcasting()
        return parallel.use(self.mesh, parallel.make_rules(self.model_config, self.mesh))


def _paired(questions: Any, images: Any) -> list[tuple[str, Sequence[Any]]]:
    """Each question with its images.

    Raises:
      DataError: neither one question nor a list, or other images than that asks for.
    """
    if isinstance(questions, str):
        if images is None:
            return [(questions, ())]
        return [(questions, images if isinstance(images, list | tuple) else [images])]
    if not isinstance(questions, list | tuple) or not all(isinstance(question, str) for question in questions):
        wrong = next((q for q in questions if not isinstance(q, str)), "") if isinstance(questions, list) else questions
        raise DataError(
            f"a question is a string, and several are a list of strings; this is a {type(wrong).__name__} "
            "(of a conversation with turns: model.chat())"
        )
    if not questions:
        raise DataError("no questions: the list is empty")
    if images is None:
        return [(question, ()) for question in questions]
    if not isinstance(images, list | tuple) or not all(isinstance(some, list | tuple) for some in images):
        raise DataError("several questions need a list of images for each: [['a.png'], []], not ['a.png'] or 'a.png'")
    if len(questions) != len(images):
        raise DataError(f"{len(questions)} questions came with {len(images)} lists of images; give one list each")
    return list(zip(questions, images, strict=True))


@functools.partial(jax.jit, static_argnums=0)
def _attention(model: ModelConfig, params: Any, batch: Batch) -> Any:
    model = dataclasses.replace(model, attention_impl="xla")  # which alone has the weights, whatever training used
    captured: Any = Saisa(model).apply(variables_of(params), batch, capture=("attention",))[1]
    return captured["attention"].mean(axis=2)  # [L, B, T, V + T]


def load(
    source: str | os.PathLike[str],
    mesh: Mesh | MeshConfig | str | None = None,
    dtype: Any = None,
    quantize: str | None = None,
    image_cache_bytes: int = DEFAULT_BYTES,
    allow_urls: bool = False,
    switches: Mapping[str, Any] | None = None,
    blind: bool = False,
) -> VisionLanguageModel:
    """Loads a model.

    Args:
      source: a finished model (`WORKDIR/finetune/model`, local or gs://), the workdir of a run, a Hugging Face
        directory, a .gguf file or a repository of the hub (org/name); foreign files are imported once into a cache.
      mesh: devices to spread the parameters over, each of which reads its own part: "fsdp=4,tensor=2" of all that there
        are, or what `parallel.make_mesh` gives; None: the first device holds all.
      dtype: of the parameters, and what is computed in: float32, bfloat16 or float16; None: the checkpoint's own.
      quantize: "int8" keeps projections as 8-bit weights (needs qwix); None: as they are.
      image_cache_bytes: of keys and values of images that are kept for further questions about them.
      allow_urls: fetch pictures that are named by an http or https URL, within 20 s and 34 MB each.
      switches: fields of its `ModelConfig` to run it with, which need no other parameters:
        {"frozen_visual_layers": (20, 21)}.
      blind: leave the slots of all pictures empty: what the words alone give away.

    Raises:
      CheckpointError: no such directory, something else in it, or damaged files.
      ConvertError: foreign files that cannot be imported.
      ConfigError: another dtype, switches that are not the model's, or a model that does not divide by the mesh.
    """
    dtype = None if dtype is None else dtype_name(dtype)
    mesh = MeshConfig.parse(mesh) if isinstance(mesh, str) else mesh
    mesh = parallel.make_mesh(mesh) if isinstance(mesh, MeshConfig) else mesh

    def sharding(config: Config, metadata: dict[str, Any]) -> Any:
        if mesh is None:
            return SingleDeviceSharding(jax.local_devices()[0])
        model = config.model_for(metadata["stage"])
        return parallel.shardings_of(abstract_params(model, boxed=True), mesh, parallel.make_rules(model, mesh))

    with parallel.broadcasting():
        params, config, tokenizer, metadata = load_model(find_model(source), sharding=sharding, dtype=dtype)
    if dtype:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    if switches:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **switches))
    if blind:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, blind=True))
    if quantize:
        params = quantize_params(params, quantize)
    return VisionLanguageModel(
        params, config, tokenizer, metadata["stage"], metadata, mesh, ImageCache(image_cache_bytes), allow_urls
    )


def dtype_name(dtype: Any) -> str:
    """The name of a dtype that a model can be computed in.

    Raises:
      ConfigError: another one.
    """
    try:
        name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        short = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
        meant = short.get(name.removeprefix("torch."), name.removeprefix("torch."))
        raise ConfigError(f"dtype={name!r} is not one of {', '.join(DTYPES)}{did_you_mean(meant, DTYPES)}")
    return name
