"""ScienceQA, the questions of the test split with a picture: 2,017."""

from __future__ import annotations

from collections.abc import Iterator

from saisa_jax.data.sample import DataError
from saisa_jax.evaluation.benchmark_files import BenchmarkFiles, Place, need, read_json
from saisa_jax.evaluation.prompts import LETTER, options
from saisa_jax.evaluation.scorers.letters import LETTERS, scienceqa_llava, scienceqa_lmms
from saisa_jax.evaluation.tasks import TASKS
from saisa_jax.evaluation.tasks.task import Item, Task, TaskData

FILES = BenchmarkFiles(
    ("scienceqa",),
    "lmms-lab-encoder/ScienceQA",
    ("test",),
    ("llava_test_CQM-A.json",),
    "LLaVA's eval.zip, with images, problems.json and pid_splits.json of the ScienceQA repository beside it",
)


def items(data: TaskData) -> Iterator[Item]:
    place = FILES.find(data)
    yield from _llava(place) if place.questions else _hub(place)


def _llava(place: Place) -> Iterator[Item]:
    assert place.questions
    path = place.file("problems.json")
    problems = read_json(path)
    for row in read_json(place.questions):
        if "image" not in row:
            continue
        name = str(need(row, "id", place.questions))
        if name not in problems:
            raise DataError(f"{path} has no problem {name} of {place.questions}")
        problem = problems[name]
        if place.data.prompts == "llava":
            question = row["conversations"][0]["value"].replace("<image>", "").strip()
        else:
            question = _question(problem["hint"], problem["question"], problem["choices"])
        image = place.picture("images", "test", row["image"])
        yield _item(name, question, problem["choices"], problem["answer"], image, problem.get("subject", ""))


def _hub(place: Place) -> Iterator[Item]:
    table = place.table(("question", "choices", "answer", "hint", "image", "subject?"), "ScienceQA-IMG")
    for number in range(len(table)):
        row = table[number]
        if row["image"] is not None:
            question = _question(row["hint"], row["question"], row["choices"])
            name = table.name(number)
            yield _item(name, question, row["choices"], row["answer"], row["image"], row.get("subject") or "")


def _question(hint: str, question: str, choices: list[str]) -> str:
    context = f"Context: {hint}\n" if hint else ""
    return f"{context}{question}\n{options(choices)}"


def _item(name: str, question: str, choices: list[str], answer: int, image: object, kind: str) -> Item:
    right = LETTERS[answer]
    return Item(name, question + LETTER, (right,), (image,), kind, extra={"choices": list(choices)})  # type: ignore[arg-type]


def parse(output: str, item: Item) -> str:
    return scienceqa_llava(output, len(item.extra["choices"]))


TASKS.register("scienceqa_img")(
    Task(
        title="ScienceQA-IMG",
        items=items,
        score=lambda output, item: float(parse(output, item) == item.answers[0]),
        metric="letter",
        parse=parse,
        schools={
            "llava": {},
            "lmms": {
                "score": lambda output, item: float(scienceqa_lmms(output) == item.answers[0]),
                "parse": lambda output, item: scienceqa_lmms(output),
            },
        },
    )
)
