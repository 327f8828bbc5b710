"""MME: two questions a picture, one of them to be denied; a score of 200 a category."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from saisa_jax.data.sample import DataError
from saisa_jax.evaluation.benchmark_files import BenchmarkFiles, Place, need, read_lines
from saisa_jax.evaluation.prompts import SHORT, without
from saisa_jax.evaluation.scorers.yes_no import mme_llava, mme_lmms
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.evaluation.tasks.task import Item, Row, Task, TaskData

COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
YES_OR_NO = " Please answer yes or no."
FILES = BenchmarkFiles(
    ("mme",),
    "lmms-lab-encoder/MME",
    ("test",),
    ("llava_mme.jsonl",),
    "LLaVA's eval.zip, with MME_Benchmark_release_version (BradyFU/Awesome-Multimodal-Large-Language-Models) beside it",
)


def items(data: TaskData) -> Iterator[Item]:
    """A picture's name is asked twice, so that an item's is that of picture and number."""
    place = FILES.find(data)
    count: Counter[str] = Counter()
    seen = set()
    for name, question, answer, image in _llava(place) if place.questions else _hub(place):
        if (name, question) in seen:
            continue  # LLaVA's file repeats some, and its script leaves them out
        seen.add((name, question))
        count[name] += 1
        category = name.split("/")[0]
        yield Item(f"{name}/{count[name]}", question + SHORT, (answer,), (image,), category, extra={"picture": name})


def _llava(place: Place) -> Iterator[tuple]:
    assert place.questions
    answers: dict[tuple[str, str], str] = {}
    root = place.file("MME_Benchmark_release_version")
    for row in read_lines(place.questions):
        name = need(row, "question_id", place.questions)
        category, _, picture = name.partition("/")
        stem = picture.rpartition("/")[2].rpartition(".")[0]
        if (name, "") not in answers:
            answers |= {(name, ""): ""} | {
                (name, question): answer for question, answer in _answers(root / category, stem)
            }
        question = without(row["text"], SHORT).replace(YES_OR_NO, "")
        if (name, question.strip()) not in answers:
            raise DataError(f"{root / category}/{stem}.txt has no question {question!r} of {place.questions}")
        yield (
            name,
            question,
            answers[name, question.strip()],
            place.picture("MME_Benchmark_release_version", row["image"]),
        )


def _answers(folder: object, stem: str) -> Iterator[tuple[str, str]]:
    for path in (folder / "questions_answers_YN" / f"{stem}.txt", folder / f"{stem}.txt"):  # type: ignore[operator]
        if path.exists():
            for line in path.read_text().splitlines():
                question, _, answer = line.strip().rpartition("\t")
                yield question.replace(YES_OR_NO, "").strip(), answer.strip().lower()
            return
    raise DataError(f"{folder} has no {stem}.txt with the answers")


def _hub(place: Place) -> Iterator[tuple]:
    table = place.table(("question_id", "question", "answer", "image", "category"))
    for number in range(len(table)):
        row = table[number]
        answer = row["answer"].lower().strip().replace(".", "")
        name = row["question_id"]
        name = name if name.startswith(f"{row['category']}/") else f"{row['category']}/{name}"
        yield name, row["question"].strip().replace(YES_OR_NO, ""), answer, row["image"]


def metrics(rows: Sequence[Row]) -> Mapping[str, float]:
    """Of a category 100 (acc + acc+), acc+ the share of pictures with both questions right; and sums of categories."""
    pictures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        pictures[row["kind"]][row["extra"]["picture"]].append(row["score"])
    found = {"perception": 0.0, "cognition": 0.0}
    for category, scores in pictures.items():
        both = [pair for pair in scores.values() if len(pair) > 1]
        acc = sum(map(sum, scores.values())) / sum(map(len, scores.values()))
        plus = sum(all(pair) for pair in both) / len(both) if both else 0.0
        found |= {category: 100 * (acc + plus), f"{category} acc": 100 * acc, f"{category} acc+": 100 * plus}
        found["cognition" if category in COGNITION else "perception"] += 100 * (acc + plus)
    return {**found, "total": found["perception"] + found["cognition"]}


TASKS.register("mme")(
    Task(
        title="MME",
        items=items,
        score=lambda output, item: float(mme_llava(output) == item.answers[0]),
        metric="accuracy",
        parse=lambda output, item: mme_llava(output),
        metrics=metrics,
        headline="perception",
        schools={
            "llava": {},
            "lmms": {
                "score": lambda output, item: float(mme_lmms(output) == item.answers[0]),
                "parse": lambda output, item: mme_lmms(output),
            },
        },
    )
)
