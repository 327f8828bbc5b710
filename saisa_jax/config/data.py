"""The data's part of the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from saisa_jax.config.checks import check, choice, positive

ON_ERROR = ("raise", "drop")
ON_LONG = ("truncate", "raise", "drop")


@dataclass(frozen=True)
class SourceConfig:
    """Where samples come from. A stage lists one or more of them, and an epoch goes through all of them."""

    format: str = (
        "llava"  # a module of `data/sources/` reads it: easy_vqa | llava | chat | parquet | tfds | arrayrecord
    )
    # llava, chat: a .json or .jsonl file; parquet: a file, a folder or a pattern of names ("data/train-*.parquet");
    # arrayrecord: a directory that `data prepare` wrote; tfds: the data_dir.
    path: str = ""
    images: str = ""  # llava, chat: the folder, .zip or .tar that holds the samples' images
    # llava, chat: take an image's name that is an absolute path as it is; otherwise such a name is an error.
    allow_absolute: bool = False
    name: str = ""  # tfds: the data set, "vqa_rad" or "vqa_rad/config:1.0.0"
    split: str = "train"  # easy_vqa: train | validation | test; tfds: any split, "train[:90%]"; parquet: of a folder
    # tfds: from features to turns, "{question} => {answer}"; a caption is " => {caption}". What follows is what both
    # sides say; "<image>" stands where the images of `image_feature` stand (none: in front).
    # parquet: so too, or the column that holds the conversation; "": texts, conversations or messages.
    turns: str = ""
    image_feature: str = "image"  # tfds, parquet: where the images are ("image": of parquet `images` too); "": none
    task: str = "vqa"  # easy_vqa: caption | vqa
    # How often an epoch goes through this source. 0.5: through half of it, the next epoch through the other half.
    weight: float = 1.0

    def __post_init__(self) -> None:
        check(0 <= self.weight < float("inf"), f"sources.weight={self.weight} is not a number from 0 on")
        needs = {"tfds": "name", **dict.fromkeys(("llava", "chat", "parquet", "arrayrecord"), "path")}.get(self.format)
        check(
            needs is None or bool(getattr(self, needs)),
            f"a source of format={self.format!r} needs {needs}: for example --config.finetune.sources="
            f"\"({{'format': '{self.format}', '{needs}': '...'}},)\"",
        )
        check(
            (self.turns.count("=>") == 1 if self.format == "tfds" else self.turns.count("=>") <= 1),
            f"sources.turns={self.turns!r} should say what both sides say: '{{question}} => {{answer}}'",
        )

    def __str__(self) -> str:
        """For messages: its format and path."""
        return f"{self.format}:{self.path or self.name or self.task}"


@dataclass(frozen=True)
class DataConfig:
    """What all stages and the evaluation have in common."""

    # Several samples, with their images, in one row of the stage's text_length and max_images; False: one sample a row.
    packing: bool = True
    # Without packing: batches of samples of like length and of one modality (image or not), as LLaVA does.
    group_by_length: bool = False
    on_error: str = "raise"  # a sample that cannot be used: raise | drop (counted, its ids are written down)
    max_drop: float = 0.01  # with on_error=drop: more than this share of the samples is an error all the same
    on_long: str = (
        "truncate"  # a sample of more than text_length tokens, or max_length positions: truncate | raise | drop
    )
    system_prompt: str | None = None  # None: the template's own
    tokenizer: str = "easy_vqa"  # a directory with a tokenizer, or "easy_vqa": the demo's, trained on its text
    # Questions of a sample whose questions are independent (all of easy_vqa's): None: all; 1: one question a sample.
    # Fewer than there are: another random choice in each epoch.
    turns_per_sample: int | None = None
    # The sources hold what a frozen encoder made of the images, not the images: sets of `data prepare --features`.
    features: bool = False
    augment: bool = False  # mirror and shift images, for data whose text does not depend on left and right
    blind: bool = False  # leave every image slot empty: what can be answered without the images
    num_workers: int = 0  # processes that read rows; 0: threads of this one
    num_threads: int | None = None  # of each process that reads; None: its share of the cores, 16 at most
    prefetch: int = 16  # batches
    # Samples that are shuffled, and planned into rows, together. An epoch of more goes block by block, each with some
    # of the files of a prepared set.
    shuffle_block_size: int = 2**20
    # Of the copies that this host keeps of a bucket's prepared files (~/.cache/saisa_jax): those read longest ago go
    # when others need their room. None: four fifths of what the disk has free.
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        choice("data.on_error", self.on_error, ON_ERROR)
        choice("data.on_long", self.on_long, ON_LONG)
        check(0 <= self.max_drop <= 1, f"data.max_drop={self.max_drop} is not a share of the samples (0..1)")
        check(not (self.packing and self.group_by_length), "data.group_by_length=True needs data.packing=False")
        check(
            not (self.packing and self.turns_per_sample is not None),
            "data.turns_per_sample chooses other turns in each epoch, so that rows cannot be planned: set "
            "data.packing=False",
        )
        for name in ("num_workers", "num_threads"):
            check((getattr(self, name) or 0) >= 0, f"data.{name}={getattr(self, name)} must not be negative")
        check(
            not (self.features and self.augment),
            "data.augment changes images, and data.features=True has none: set data.augment=False, or train on images",
        )
        positive("data.prefetch", self.prefetch)
        positive("data.shuffle_block_size", self.shuffle_block_size)
        if self.cache_bytes is not None:
            positive("data.cache_bytes", self.cache_bytes)
        if self.turns_per_sample is not None:
            positive("data.turns_per_sample", self.turns_per_sample)
