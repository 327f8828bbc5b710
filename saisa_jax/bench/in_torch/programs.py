"""What `bench peers` calls of PyTorch: each model of `peer.py` in each runtime, and training with AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import torch
from torch import nn

from saisa_jax.bench.in_torch.peer import DTYPES, Llava, Official, Peer, Saisa
from saisa_jax.bench.sizes import Size, features_of, rows_of
from saisa_jax.bench.times import cores
from saisa_jax.config import Config, ConfigError, OptimizerConfig
from saisa_jax.convert.write import to_tensors

PEERS: dict[str, tuple[type[Peer], ...]] = {"saisa": (Saisa, Official), "llava": (Llava,)}
NAMES = {"eager": "PyTorch", "compile": "torch.compile"}
Calls = dict[str, Callable[[], Any]]


def device() -> str:
    """Where torch computes: on the same kind of device as JAX.

    Raises:
      ConfigError: this build of torch cannot.
    """
    backend = jax.default_backend()
    if backend == "gpu" and not torch.cuda.is_available():
        raise ConfigError(
            "JAX computes on a GPU and this torch has none: install its CUDA build, or compare on the CPU with "
            "JAX_PLATFORMS=cpu"
        )
    return "cuda" if backend == "gpu" else "cpu"


def why_not_compiled() -> str:
    """Why `torch.compile` does not work here; "" if it does."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device()))
    except Exception as error:  # of whichever part: no C++ compiler, no Triton, a Python that it does not know
        return str(error).strip().splitlines()[0] or type(error).__name__
    return ""


def product(dtype: str) -> Callable[[int], Callable[[], Any]]:
    """A product of large matrices, for the peak of this machine."""

    def make(size: int) -> Callable[[], Any]:
        square = torch.ones(size, size, dtype=DTYPES[dtype], device=device())
        return synchronised(lambda: square @ square)

    return make


def synchronised(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, which returns when its results are there."""

    def wait() -> Any:
        out = call()
        if device() == "cuda":
            torch.cuda.synchronize()
        return out

    return wait


def programs(
    size: Size, config: Config, params: Any, dtype: str, tokens: int, measures: Sequence[str], runtimes: Sequence[str]
) -> Iterator[tuple[str, Calls, Calls]]:
    """(name, what each measure calls, what it answers) of every peer of a model in every runtime.

    Args:
      size: of the model and its row.
      config: ours.
      params: ours, in float32.
      dtype: of parameters and activations; in training of products alone, as under ours.
      tokens: that a call of `decode` reads.
      measures: which to make.
      runtimes: of NAMES.
    """
    torch.set_num_threads(cores())
    model = config.model_for("finetune")
    rows = config.finetune.batch_size
    batch = rows_of(size, model, rows)
    on = device()
    asked = torch.tensor(batch["tokens"], device=on).long()
    features = torch.tensor(features_of(size, rows), device=on)
    answers_of = torch.tensor(batch["targets"], device=on).long(), torch.tensor(batch["loss_weights"], device=on)
    for kind in PEERS[model.alignment]:

        def load(in_dtype: str, kind: type[Peer] = kind) -> Any:
            peer = kind(model, size.before, size.text, tokens)
            parts = ("decoder", "projector")
            return peer.load(to_tensors(params, model, model.alignment, parts=parts), in_dtype, on)

        peer = load(dtype)
        for runtime in runtimes if kind is not Official else ("eager",):
            through = torch.compile if runtime == "compile" else lambda function: function
            calls, answers = inference(peer, asked, features.to(DTYPES[dtype]), tokens, through)
            if "train" in measures and kind is not Official:
                step = training(
                    load("float32"), config.finetune.optimizer, dtype, (asked, features, *answers_of), through
                )
                calls["train"] = answers["train"] = step
            name = NAMES[runtime] if kind is not Official else "the authors' way"
            yield (
                name,
                *({measure: call for measure, call in of.items() if measure in measures} for of in (calls, answers)),
            )


def inference(peer: Any, asked: Any, features: Any, tokens: int, through: Callable[[Any], Any]) -> tuple[Calls, Calls]:
    """Prefill, a second question where keys and values of the picture are kept, and `tokens` more tokens."""
    single = isinstance(peer, Official)  # takes one row at a time
    prefill, decode = through(peer.prefill), through(peer.decode)
    rows = [slice(row, row + 1) for row in range(len(asked))] if single else [slice(None)]

    @torch.no_grad()
    def first() -> Any:
        return torch.cat([prefill(asked[row], features[row])[0] for row in rows])

    calls: Calls = {"prefill": synchronised(first)}
    answers: Calls = {"prefill": lambda: numpy_of(first())}

    with torch.no_grad():
        caches = [peer.prefill(asked[row], features[row])[1] for row in rows]
    if not single:
        caches = [with_room(peer, caches[0])]
    token = torch.zeros(len(asked), dtype=torch.long, device=asked.device)
    places = [torch.tensor([peer.length + number], device=asked.device) for number in range(tokens)]

    @torch.no_grad()
    def more(count: int) -> tuple[Any, Any]:
        logits, chosen = [], []
        for row, cache in zip(rows, caches, strict=True):
            growing, next_token = list(cache), token[row]
            for number in range(count):
                logits.append(decode(next_token, places[number], growing))
                chosen.append(logits[-1].argmax(-1))
        return torch.cat(logits[:: max(count, 1)]), chosen

    calls["decode"] = synchronised(lambda: more(tokens)[1])
    answers["decode"] = lambda: numpy_of(more(1)[0])

    if isinstance(peer, Saisa) and not single:
        ask = through(peer.ask)
        with torch.no_grad():
            kept = peer.image_kv(features)
        second = torch.no_grad()(lambda: ask(asked, kept)[0])
        calls["second"], answers["second"] = synchronised(second), lambda: numpy_of(second())
    return calls, answers


def with_room(peer: Any, cache: Any) -> Any:
    """A prompt's keys and values in buffers that have room for more."""
    buffers = peer.buffers_for(len(cache[0][0]))
    for filled, given in zip(buffers, cache, strict=True):
        for buffer, prompt in zip(filled, given, strict=True):
            buffer[:, :, : prompt.shape[2]] = prompt
    return buffers


def training(
    peer: Any, optimizer: OptimizerConfig, dtype: str, batch: tuple[Any, ...], through: Callable[[Any], Any]
) -> Callable[[], Any]:
    """A step of the fused AdamW over all parameters; returns its loss."""
    peer.requires_grad_(True)
    parameters = [parameter for parameter in peer.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(
        parameters,
        lr=1e-6,
        betas=(optimizer.b1, optimizer.b2),
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        fused=True,
    )
    loss_of = through(peer.loss)

    def step() -> Any:
        adam.zero_grad(set_to_none=True)
        with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = loss_of(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, optimizer.clip_norm)
        adam.step()
        return loss.detach().cpu().numpy()

    return step


def numpy_of(tensor: Any) -> Any:
    return tensor.float().cpu().numpy()
