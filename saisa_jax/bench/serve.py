"""`python -m saisa_jax bench serve`: what a server answers, with few and with many clients, against one by one.

One model in one run: first its own `generate`, a question after the other without a server; then the server, with 1, 8
and 64 clients that ask about the same picture, or each time about another one. Clients are a process of their own, so
that they take no time from the server's threads. Every answer has the same number of tokens: end tokens are ignored.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from saisa_jax.bench.clients import Answered, Load, noise
from saisa_jax.inference.generate import Generator
from saisa_jax.inference.image_cache import ImageCache
from saisa_jax.inference.model import VisionLanguageModel
from saisa_jax.serving.app import Server, Settings
from saisa_jax.serving.background import in_background
from saisa_jax.serving.engine import Engine

QUESTION = "what is in the image?"
SAME, DIFFERENT = "the same picture", "different pictures"


@dataclass(frozen=True)
class Measured:
    """How one load was answered.

    Attributes:
      clients: that asked at once; 0: no server, one question after the other.
      pictures: SAME or DIFFERENT.
      requests, tokens: a second.
      first, slowest: seconds to the first token, the median and the 95th percentile.
    """

    clients: int
    pictures: str
    requests: float
    tokens: float
    first: float = float("nan")
    slowest: float = float("nan")


def bench(
    model: VisionLanguageModel,
    clients: Sequence[int] = (1, 8, 64),
    *,
    rows: int = 8,
    requests: int = 64,
    tokens: int = 32,
    question: str = QUESTION,
) -> Iterator[Measured]:
    """Measures; one result after the other, for each of SAME and DIFFERENT beginning with that without a server.

    Args:
      model: of any alignment but llava.
      clients: numbers of clients.
      rows: of the server.
      requests: of each load; at least two of each client.
      tokens: of an answer.
      question: about every picture.
    """
    load = Load("", 1, requests, 1, 0, 2 * model.model_config.vision.image_size, tokens, question)
    fresh = _numbers(requests * 4 * (len(clients) + 2))
    alone = {kind: _alone(model, load, kind, fresh) for kind in (SAME, DIFFERENT)}
    engine = Engine(model, rows)
    engine.start()
    engine.ready.wait()
    settings = Settings("bench", queue=max(clients), seconds=3600.0)
    with in_background(Server(engine, settings)) as url:
        load = dataclasses.replace(load, url=url)
        _asked(dataclasses.replace(load, requests=2 * rows, clients=rows))  # what is slow once
        for kind in (SAME, DIFFERENT):
            yield alone[kind]
            for count in clients:
                many = max(requests, 2 * count)
                pictures = 1 if kind == SAME else many
                now = dataclasses.replace(
                    load, clients=count, requests=many, pictures=pictures, first_picture=fresh(pictures)
                )
                yield _measured(count, kind, _asked(now))
    engine.drain()
    engine.join()


def _numbers(start: int) -> Callable[[int], int]:
    """Numbers of pictures that nobody has seen."""
    used = [start]

    def fresh(count: int) -> int:
        used[0] += count
        return used[0]

    return fresh


def _alone(model: VisionLanguageModel, load: Load, kind: str, fresh: Callable[[int], int]) -> Measured:
    """One question after the other, each as a batch of one row, whose image cache works as the server's."""
    endless = dataclasses.replace(model.model_config, end_token_ids=())
    own = dataclasses.replace(model, image_cache=ImageCache(model.image_cache.max_bytes))
    own.__dict__["generator"] = Generator(endless, [])
    ask = lambda n: own.generate(load.question, noise(n, load.size), load.tokens)  # noqa: E731
    count, first = max(4, load.requests // 4), fresh(load.requests)
    ask(first)
    start = time.perf_counter()
    for number in range(1, count + 1):
        ask(first if kind == SAME else first + number)
    seconds = time.perf_counter() - start
    return Measured(0, kind, count / seconds, count * load.tokens / seconds)


def _asked(load: Load) -> list[Answered]:
    done = subprocess.run(
        [sys.executable, "-m", "saisa_jax.bench.clients"], input=json.dumps(asdict(load)), text=True, check=True,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    return [Answered(**each) for each in json.loads(done.stdout)]


def _measured(clients: int, kind: str, answered: list[Answered]) -> Measured:
    seconds = max(each.ended for each in answered) - min(each.asked for each in answered)
    waits = [each.first - each.asked for each in answered]
    return Measured(
        clients,
        kind,
        len(answered) / seconds,
        sum(each.tokens for each in answered) / seconds,
        statistics.median(waits),
        statistics.quantiles(waits, n=20, method="inclusive")[-1],
    )
