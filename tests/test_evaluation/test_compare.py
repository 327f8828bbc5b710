"""Two evaluations side by side: the interval against simulation, and results that cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from saisa_jax.cli import eval as eval_verb
from saisa_jax.evaluation.compare import compare_places, show
from saisa_jax.evaluation.metrics import clustered_interval
from saisa_jax.evaluation.paired import mcnemar, paired_difference
from saisa_jax.evaluation.results import ResultError, find_results, read_result


def simulated(rng: np.random.Generator, pictures: int, each: int, lift: float) -> tuple[np.ndarray, np.ndarray]:
    """Right answers [pictures, each] of two models that find the same questions hard, the second better by `lift`."""
    gain = lift + 0.2 * rng.choice([-1, 1], (pictures, 1))  # whole pictures are won and lost
    hard, own = rng.uniform(size=(2, pictures, each))
    return (hard < 0.4), (np.where(rng.uniform(size=hard.shape) < 0.9, hard, own) < 0.4 + gain)


def test_interval_covers_as_often_as_it_says() -> None:
    """Against the truth, and beside the interval that takes questions for independent."""
    rng, pictures, each = np.random.default_rng(0), 100, 8
    big = simulated(np.random.default_rng(1), 200_000, each, 0.1)
    truth = float(big[1].mean() - big[0].mean())
    assert truth == pytest.approx(0.1, abs=2e-3)
    clusters = [n // each for n in range(pictures * each)]
    covered, naive, widths, apart = 0, 0, [], []
    for _ in range(300):
        a, b = (x.ravel().astype(float).tolist() for x in simulated(rng, pictures, each, 0.1))
        low, high = paired_difference(a, b, clusters).interval
        covered += low <= truth <= high
        widths.append(high - low)
        low, high = paired_difference(a, b, list(range(len(a)))).interval
        naive += low <= truth <= high
        one, other = clustered_interval(a, clusters), clustered_interval(b, clusters)
        apart.append(float(np.hypot(one.high - one.low, other.high - other.low)))
    assert covered >= 276 > naive  # 92% of 300; binomial: 95% +- 2.5%
    assert np.mean(widths) < 0.9 * np.mean(apart)  # pairing pays


def test_interval_is_that_of_a_bootstrap_of_pictures() -> None:
    rng, pictures, each = np.random.default_rng(2), 400, 5
    a, b = (x.astype(float) for x in simulated(rng, pictures, each, 0.06))
    drawn = (b - a).sum(1)[rng.integers(0, pictures, (4000, pictures))].sum(1) / (pictures * each)
    low, high = np.quantile(drawn, [0.025, 0.975])
    mean, interval, _ = paired_difference(
        a.ravel().tolist(), b.ravel().tolist(), list(np.repeat(range(pictures), each))
    )
    assert mean == pytest.approx((b - a).mean())
    assert interval.high - interval.low == pytest.approx(high - low, rel=0.06)
    assert interval.low == pytest.approx(low, abs=0.15 * (high - low))


def test_difference_by_hand() -> None:
    """Agresti and Min's own form, 1/2 added to each cell: 53 alike right, 8 lost, 16 won, 9 alike wrong."""
    a, b = [1.0] * 61 + [0.0] * 25, [1.0] * 53 + [0.0] * 8 + [1.0] * 16 + [0.0] * 9
    mean, interval, size = paired_difference(a, b, list(range(86)))
    n, lost, won = size + 2, 8 / 86 * size + 0.5, 16 / 86 * size + 0.5
    middle, half = (won - lost) / n, 1.96 * np.sqrt(won + lost - (won - lost) ** 2 / n) / n
    assert mean == pytest.approx(8 / 86) and interval == pytest.approx((middle - half, middle + half), abs=1e-4)
    assert size == pytest.approx(86 / (86 / 85))


def test_no_change_leaves_room_for_doubt() -> None:
    mean, interval, size = paired_difference([1.0, 0.0] * 20, [1.0, 0.0] * 20, [n // 4 for n in range(40)])
    assert mean == 0 and size == 10 and interval == pytest.approx((-1.96 / 12 * 11**0.5 / 11**0.5, 0.1633), abs=1e-3)
    low, high = paired_difference([0.0] * 5, [1.0] * 5, list(range(5))).interval
    assert 0 < low < high == 1
    with pytest.raises(ValueError, match="2 and 1 scores came with 2"):
        paired_difference([0.0, 1.0], [1.0], [0, 1])


@pytest.mark.parametrize(
    ("lost", "won", "p"), [(0, 0, 1.0), (3, 3, 1.0), (0, 5, 0.0625), (2, 8, 0.109375), (150, 200, 0.0087)]
)
def test_mcnemar(lost: int, won: int, p: float) -> None:
    assert mcnemar(lost, won) == mcnemar(won, lost) == pytest.approx(p, rel=0.01)


def rows(outputs: str, **changed: Any) -> list[dict[str, Any]]:
    """Answers, right where the letter is y; two questions a picture."""
    return [
        {"id": f"q{n}", "images": [f"{n // 2}.png"], "question": f"is it {n}?", "answers": ["y"], "output": output}
        | {"score": float(output == "y")}
        | changed
        for n, output in enumerate(outputs)
    ]


def write(folder: Path, answers: list[dict[str, Any]], **record: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    scores = [row["score"] for row in answers if row["score"] is not None]
    known = {"task": "toy", "n": len(scores), "accuracy": sum(scores) / len(scores), "metric": "exact match"}
    known |= {"metrics": {"f1": 0.5}, "model": {"name": folder.name}, "versions": {"saisa_jax": "1"}}
    (folder / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    (folder / "toy.json").write_text(json.dumps(known | {"settings": {"limit": None}} | record))
    return folder / "toy.json"


def test_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = rows("y")[0] | {"id": "broken", "score": None, "output": None, "error": "?"}
    a = write(tmp_path / "a", [*rows("yynny" * 4), failed])
    b = write(tmp_path / "b", rows("ynyny" * 4 + "yy"), versions={"saisa_jax": "2"}, settings={"limit": 22})
    assert eval_verb.main(["--compare", str(a), str(b), f"--output={tmp_path / 'out'}"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 worse, 4 better, 12 alike; the interval holds 0" in shown and "p = 1" in shown
    assert "right -> wrong q1: is it 1? | 'y' -> 'n' | y" in shown and "wrong -> right q2" in shown
    assert "versions differ: saisa_jax 1 / 2" in shown and "limit differs: None / 22" in shown
    assert "1 questions could not be asked in the first" in shown and "2 questions were scored in the second" in shown
    written = json.loads((tmp_path / "out" / "toy.compare.json").read_text())
    assert [change["id"] for change in written["worse"]] == ["q1", "q6", "q11", "q16"] and written["n"] == 20
    assert written["difference"] == 0 and written["metrics"] == {"f1": [0.5, 0.5]} and written["names"] == ["a", "b"]

    many = write(tmp_path / "many", rows("n" * 20))
    (one,) = compare_places(str(a.parent), str(many.parent))
    console = Console(record=True, width=200)
    console.print(show(one))
    assert "and 7 more (--output=FOLDER writes all)" in console.export_text()
    soft = write(tmp_path / "soft", rows("y" * 20, score=0.3))
    (one,) = compare_places(str(a), str(soft))
    assert one.p_value is None and len(one.worse) == 12 and len(one.better) == 8


@pytest.mark.parametrize(
    ("answers", "record", "message"),
    [
        ({}, {"task": "gqa"}, "is of the task toy, and .* of gqa"),
        ({}, {"prompts": "lmms"}, "has prompts llava, and .* lmms: their scores do not say the same"),
        ({}, {"metric": "F1"}, "has metric exact match, and .* F1"),
        ({"question": "who?"}, {}, "5 questions of .* are others .* 'q0' asks 'is it 0\\?'.*'who\\?'"),
        ({"answers": ["n"]}, {}, "5 questions of .* are others"),
        (
            {"score": None},
            {"accuracy": None, "note": "a server scores"},
            "no scored question in common: a server scores",
        ),
        ({}, {"n": 6}, "holds 5 scored answers and toy.json is of 6; evaluate again: python eval.py --tasks=toy"),
    ],
)
def test_what_cannot_be_compared(answers: dict[str, Any], record: dict[str, Any], message: str, tmp_path: Path) -> None:
    a = write(tmp_path / "a", rows("ynyny"), prompts="llava")
    changed = rows("ynyny", **answers)
    b = write(tmp_path / "b", rows("ynyny"), prompts="llava")
    b.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    b.write_text(json.dumps(json.loads(b.read_text()) | record))
    with pytest.raises(ResultError, match=message):
        compare_places(str(a), str(b))


def test_results_that_are_not_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "run" / "evaluation", rows("yn"))
    assert find_results(tmp_path / "run") == find_results(path.parent) == find_results(path) == {"toy": path}
    whole, lines = path.read_text(), path.with_suffix(".jsonl").read_text()
    for json_text, text, message in (
        (whole[:40], lines, "is no whole JSON file"),
        ("[]", lines, "is not what eval.py writes"),
        (whole, lines[:-20], "line 2 is no answer"),
        (whole, lines * 2, "line 3 is a second answer to 'q0'"),
    ):
        path.write_text(json_text)
        path.with_suffix(".jsonl").write_text(text)
        with pytest.raises(ResultError, match=message):
            read_result(path)
    path.with_suffix(".jsonl").rename(path.with_name("toy.partial.jsonl"))
    with pytest.raises(ResultError, match=r"holds no finished evaluation: toy\.partial\.jsonl is not finished"):
        find_results(tmp_path / "run")
    with pytest.raises(ResultError, match="is neither a"):
        find_results(tmp_path / "gone")
    write(tmp_path / "other", rows("yn"))
    with pytest.raises(ResultError, match=r"no such file; in .*other are toy\.json"):
        find_results(tmp_path / "other" / "toys.json")
    assert eval_verb.main(["--compare", str(tmp_path / "gone"), str(tmp_path / "other")]) == 1
    assert capsys.readouterr().err.startswith("ResultError: ")
    with pytest.raises(SystemExit):
        eval_verb.main(["--compare", "a", "b", "--workdir=c"])
    assert "--compare evaluates nothing: leave out --workdir" in capsys.readouterr().err
