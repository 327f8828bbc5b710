# ruff: noqa: E501
"""Records what the published scorers say of random answers, for test_references.py.

    pip download --no-deps -d DIR lmms-eval==0.7.3 && unzip DIR/*.whl -d DIR/lmms       (MIT)
    git clone https://github.com/haotian-liu/LLaVA DIR/llava                             (Apache 2.0)
    git clone https://github.com/MMMU-Benchmark/MMMU DIR/mmmu                            (Apache 2.0)
    python tests/test_evaluation/test_scorers/record_references.py DIR

The scorers are loaded file by file, so that neither torch nor the rest of lmms-eval is needed; pandas, requests, pyyaml
and tqdm are. MME's own script lies behind a form; its rule for an answer is written down here, and so are GQA's,
SEED-Bench's and MMStar's, which are a line or two within programs.
"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import json
import logging
import random
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

COUNT = 1000
FILE = Path(__file__).parents[2] / "data" / "benchmark_scores.json.gz"
COLORS = ["red", "blue", "green", "yellow", "black", "white", "gray", "orange", "brown", "pink"]
WORDS = [
    *COLORS,
    *[
        "cat",
        "dog",
        "t-shirt",
        "couldnt've",
        "dont",
        "dog's",
        "one",
        "two",
        "ten",
        "none",
        "10",
        "1,000",
        "3.5",
        "50%",
        "a",
        "the",
        "yes",
        "no",
        "not",
    ],
]


def load_from(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Lmms:
    """lmms-eval's tasks without its imports."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("lmms_eval", "lmms_eval.tasks", "lmms_eval.tasks._task_utils", "lmms_eval.tasks.mmbench"):
            self._shell(name)
        self._shell("loguru", logger=logging.getLogger("lmms"))
        self._shell("lmms_eval.verifiers", VerificationPipeline=object, VerifyResult=object)
        self._shell("lmms_eval.verifiers.openai", OpenAIVerifier=object)

    def _shell(self, name: str, **attributes: Any) -> None:
        module = types.ModuleType(name)
        module.__path__ = [str(self.root / name.replace(".", "/"))]  # type: ignore[attr-defined]
        vars(module).update(attributes)
        sys.modules[name] = module

    def task(self, name: str, file: str = "utils.py") -> Any:
        return load_from(self.root / "lmms_eval" / "tasks" / name / file, f"{name}_{file[:-3]}".replace("-", "_"))

    def exact_match(self) -> Any:
        """The one function of api/metrics.py, whose other imports are many."""
        text = (self.root / "lmms_eval" / "api" / "metrics.py").read_text()
        start = text.index("def exact_match_hf_evaluate")
        space: dict[str, Any] = {}
        exec("import re, string\nimport numpy as np\n" + text[start : text.index("\n###", start)], space)
        return space["exact_match_hf_evaluate"]


def phrase(rng: random.Random) -> str:
    """Some words with signs, as a model or an annotator may write them."""
    words = [rng.choice(WORDS) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    words = [rng.choice((str, str, str.upper, str.capitalize))(word) for word in words]
    joined = rng.choice((" ", " ", ", ", "  ", "\n", "-", "/", " - ", "\t")).join(words)
    return rng.choice(("", "", "", " ", "(", '"')) + joined + rng.choice(("", "", ".", "?", "!", ",", " .", "'s", ")"))


def annotators(rng: random.Random) -> list[str]:
    few = [phrase(rng) for _ in range(3)]
    return [rng.choice(few) for _ in range(10)]


def near(rng: random.Random, answers: list[str]) -> str:
    """An answer that is often one of the right ones, written otherwise."""
    text = rng.choice((rng.choice(answers), phrase(rng)))
    return rng.choice((str, str.lower, str.capitalize))(text) + rng.choice(("", "", ".", " ", "?"))


def letter_answer(rng: random.Random, texts: list[str]) -> str:
    """An answer to a multiple choice in one of the forms that models use."""
    number = rng.randrange(len(texts))
    letter, text = "ABCDEFGH"[number], texts[number]
    other = "ABCDE"[rng.randrange(5)]
    forms = (
        "{x}", "{x}", "{x}.", "({x})", "{x})", "{x}:", "{x}. {t}", "{x}, {t}", "({x}) {t}", "{t}", "{t}.", "The answer is {x}.",
        "The answer is {x}", "The answer is ({x}).", "the correct answer is {x}", "Option {x}", "option {x}: {t}", "I choose {x}, not {o}",
        "Either {x} or {o}", "({x}) rather than ({o})", "A picture of {t} and so {x}", "It is {t}, as anybody can see here.", "{l}", "{l}.",
        "Because of {t}", "", " ", "none", "{x} {o}", "Answer: {x}", "{x}\n{t}", "So the {t} that is in it, {x}.", "That's {t}!", "E", "答案是{x}",
    )  # fmt: skip
    return rng.choice(forms).format(x=letter, t=text, o=other, l=letter.lower())


def yes_no_answer(rng: random.Random) -> str:
    forms = (
        ["yes", "no", "Yes", "No", "YES", "NO", "y", "n", "Y", "N", "yes.", "no.", "Yes.", "other"],
        [
            "Yes, there is",
            "No, there is not.",
            "There is no dog.",
            "I do not know",
            "Not sure",
            " yes ",
            "It is. No",
            "",
        ],
        [
            "Nothing",
            "yesterday",
            "no, it isn't",
            "The answer is yes",
            "There's not, no",
            "unknown",
            "n.",
            "nope",
            "a no",
        ],
    )
    return rng.choice(rng.choice(forms))


def number_answer(rng: random.Random) -> tuple[str, str]:
    right = rng.choice(("1200", "3.14", "0.5", "-7", "red", "12 m", "x", "1,200", "2e3", "['a b', 'c']"))
    forms = (
        "{r}", "{r}.", "so the result is {r}.", "The answer is {r}", "x = {r}", "It could be {o}. Thus {r}", "{o}", "about {o} or {r}",
        "final result: {r}\nnot {o}", "", "= {r}", "the value is 1,200 m", "is ", "3.141", "we get {r} because it is so.",
    )  # fmt: skip
    return right, rng.choice(forms).format(r=right, o=rng.choice(("5", "blue", "1,234.5", "1e-3")))


def main(root: Path) -> None:
    cases: list[dict[str, Any]] = []
    lmms = Lmms(root / "lmms")
    rng = random.Random(0)
    for record in (words, yes_no, letters, mmbench, mmmu):
        cases += record(lmms, root, rng)
    with gzip.GzipFile(FILE, "wb", mtime=0) as file:
        file.write(json.dumps(cases, ensure_ascii=False, separators=(",", ":")).encode())
    print(f"{len(cases)} sets, {sum(len(case['rows']) for case in cases)} answers, {FILE.stat().st_size} bytes")


def case(task: str, school: str, rows: list[Any], **further: Any) -> dict[str, Any]:
    """rows: of output, answers, kind, extra, expected score."""
    return {"task": task, "school": school, "rows": rows, **further}


def words(lmms: Lmms, root: Path, rng: random.Random) -> list[dict[str, Any]]:
    m4c = load_from(root / "llava/llava/eval/m4c_evaluator.py", "m4c")
    sys.modules["tqdm"].tqdm = lambda x: x  # type: ignore[attr-defined]
    vqav2, textvqa, vizwiz = (lmms.task(name) for name in ("vqav2", "textvqa", "vizwiz_vqa"))
    rows: dict[Any, list[Any]] = {}
    table = [*m4c.EvalAIAnswerProcessor.CONTRACTIONS, *m4c.EvalAIAnswerProcessor.CONTRACTIONS.values()]
    for number in range(COUNT + len(table)):
        answers = annotators(rng) if number < COUNT else [table[number - COUNT], *annotators(rng)[1:]] * 1
        output = near(rng, answers) if number < COUNT else answers[0].replace("'", "")
        dicts = [{"answer": answer, "answer_id": place} for place, answer in enumerate(answers)]
        evaluator = m4c.TextVQAAccuracyEvaluator()
        evaluator.__class__.eval_pred_list.__globals__["tqdm"] = lambda x: x
        llava = evaluator.eval_pred_list([{"pred_answer": output, "gt_answers": answers}])
        said = {
            ("vqav2", "lmms"): vqav2.vqav2_process_results_val({"question_id": 1, "answers": dicts}, [output])["exact_match"],
            ("textvqa", "lmms"): textvqa.textvqa_process_results({"question_id": 1, "answers": [*answers]}, [output])["exact_match"],
            ("vizwiz", "lmms"): vizwiz.vizwiz_vqa_process_results({"question_id": 1, "answers": [*answers]}, [output])["exact_match"],
            ("textvqa", "llava"): llava,
        }  # fmt: skip
        for key, score in said.items():
            rows.setdefault(key, []).append([output, answers, "", {}, score])
    for key in (("vqav2", "llava"), ("vizwiz", "llava")):  # scored by the same class before the upload
        rows[key] = rows["textvqa", "llava"]
    match, ocrbench = lmms.exact_match(), lmms.task("ocrbench")
    pairs = [(near(rng, [answer]).strip(), answer) for answer in (phrase(rng).strip().lower() for _ in range(COUNT))]
    options = {"ignore_case": True, "ignore_punctuation": True}
    rows["gqa", "lmms"] = [[o, [a], "", {}, float(match([o], [a], **options)["exact_match"])] for o, a in pairs]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "a.jsonl", Path(folder) / "b.json"
        source.write_text("".join(json.dumps({"question_id": 1, "text": output}) + "\n" for output, _ in pairs))
        script = root / "llava/scripts/convert_gqa_for_eval.py"
        subprocess.run([sys.executable, script, "--src", source, "--dst", target], check=True)
        read = [row["prediction"] for row in json.loads(target.read_text())]
    rows["gqa", "llava"] = [[o, [a], "", {}, float(said == a)] for (o, a), said in zip(pairs, read, strict=True)]
    rows["ocrbench", "lmms"] = []
    for _ in range(COUNT):
        answers = [phrase(rng) for _ in range(rng.randint(1, 3))]
        wide = near(rng, answers).translate({code: code + 0xFEE0 for code in range(0x41, 0x5B)})
        output = rng.choice(("It says ", "")) + rng.choice((near(rng, answers), wide))
        kind = rng.choice(("HME100k", "IIIT5K"))
        doc = {"answer": answers, "dataset": kind, "question_type": "t"}
        score = ocrbench.ocrbench_process_results(doc, [output])["ocrbench_accuracy"]["score"]
        rows["ocrbench", "lmms"].append([output, answers, "t", {"dataset": kind}, float(score)])
    return [case(key[0], key[1], part) for key, part in rows.items()]


def yes_no(lmms: Lmms, root: Path, rng: random.Random) -> list[dict[str, Any]]:
    pope, mme, llava = lmms.task("pope"), lmms.task("mme"), load_from(root / "llava/llava/eval/eval_pope.py", "pope")
    asked = [(yes_no_answer(rng), rng.choice(("yes", "no"))) for _ in range(COUNT + 200)]
    rows: dict[str, list[Any]] = {"lmms": [], "llava": []}
    results = []
    for number, (output, answer) in enumerate(asked):
        kind = ("random", "popular", "adversarial")[number % 3]
        result = pope.pope_process_results({"answer": answer, "question_id": number}, [output])
        results.append(result["pope_accuracy"])
        rows["lmms"].append([output, [answer], kind, {}, result["pope_accuracy"]["score"]])
        changed = [{"text": output.strip()}]
        with tempfile.NamedTemporaryFile("w") as file, contextlib.suppress(ZeroDivisionError):
            file.write(json.dumps({"label": answer}))
            file.flush()
            with contextlib.redirect_stdout(io.StringIO()):
                llava.eval_pope(changed, file.name)
        rows["llava"].append([output, [answer], kind, {}, float(changed[0]["text"] == answer)])
    names = ("accuracy", "precision", "recall", "f1_score", "yes_ratio")
    whole = {name.removesuffix("_score"): getattr(pope, f"pope_aggregate_{name}")(results) for name in names}
    split = {}
    for kind in ("random", "popular", "adversarial"):
        part = [(output, answers[0]) for output, answers, k, _, _ in rows["llava"] if k == kind]
        with tempfile.NamedTemporaryFile("w") as file, contextlib.redirect_stdout(io.StringIO()) as out:
            file.write("\n".join(json.dumps({"label": answer}) for _, answer in part))
            file.flush()
            llava.eval_pope([{"text": output.strip()} for output, _ in part], file.name)
        for line in out.getvalue().splitlines():
            if line.startswith(("F1 score", "Accuracy", "Precision", "Recall", "Yes ratio")):
                name, value = line.split(": ")
                key = name.lower().replace(" score", "").replace(" ", "_")
                split[f"{kind} {key}"] = float(value)
    split["mean f1"] = sum(split[f"{kind} f1"] for kind in ("random", "popular", "adversarial")) / 3
    cases = [case("pope", "lmms", rows["lmms"], metrics=whole), case("pope", "llava", rows["llava"], metrics=split)]
    categories = [*mme.eval_type_dict["Perception"], *mme.eval_type_dict["Cognition"]]
    rows, results, official = {"lmms": [], "llava": []}, {}, {}
    for number in range(COUNT + 200):
        output, answer = yes_no_answer(rng), rng.choice(("yes", "no"))
        category, name = categories[number // 2 % len(categories)], f"{number // 2}.png"
        doc = {"question_id": name, "category": category, "answer": answer}
        for key, result in mme.mme_process_results(doc, [output]).items():
            results.setdefault(key, []).append(result)
            score = result["score"]
        rows["lmms"].append([output, [answer], category, {"picture": name}, score])
        start = output.strip().lower()[:4]  # eval_tool/calculation.py: parse_pred_ans
        said = "yes" if "yes" in start else "no" if "no" in start else "other"
        rows["llava"].append([output, [answer], category, {"picture": name}, float(said == answer)])
        official.setdefault(category, {}).setdefault(name, []).append(said == answer)
    whole = {key.split("_")[1]: mme.mme_aggregate_results(part) for key, part in results.items()}
    own = {}
    for category, pairs in official.items():
        flat = [one for pair in pairs.values() for one in pair]
        own[category] = 100 * (sum(flat) / len(flat) + sum(all(pair) for pair in pairs.values()) / len(pairs))
    own["perception"] = sum(own[category] for category in mme.eval_type_dict["Perception"])
    return [
        *cases, case("mme", "lmms", rows["lmms"], metrics=whole), case("mme", "llava", rows["llava"], metrics=own)
    ]  # fmt: skip


def letters(lmms: Lmms, root: Path, rng: random.Random) -> list[dict[str, Any]]:
    sqa, seed, mmstar, cv, mmvp = (lmms.task(name) for name in ("scienceqa", "seedbench", "mmstar", "cv_bench", "mmvp"))
    rows: dict[Any, list[Any]] = {}
    problems, predictions = {}, []
    for number in range(COUNT):
        count = rng.randint(2, 5)
        texts = rng.sample(COLORS, count)
        right = rng.randrange(count)
        letter, output = "ABCDE"[right], letter_answer(rng, texts)
        extra = {"choices": texts}
        doc = {"choices": texts, "answer": right}
        rows.setdefault(("scienceqa_img", "lmms"), []).append(
            [output, [letter], "", extra, sqa.sqa_process_results(doc, [output])["exact_match"]]
        )
        problems[str(number)] = {"choices": texts, "answer": right}
        predictions.append({"question_id": str(number), "text": output.strip(), "prompt": "<image>"})
        four = "ABCD"[rng.randrange(4)]
        short = rng.choice((output, four, "ABCD"[rng.randrange(4)]))
        result = seed.seed_process_result({"answer": four, "data_type": "image", "question_id": 1}, [short])
        score = float(seed.seed_aggregation_result([result["seed_all"]]))
        rows.setdefault(("seed_bench", "lmms"), []).append([short, [four], "", {}, score])
        rows.setdefault(("seed_bench", "llava"), []).append([short, [four], "", {}, float(short.strip() == four)])
        star = {"l2_category": f"ability {rng.randrange(5)}"}
        said = mmstar.exact_match(output, four)
        rows.setdefault(("mmstar", "lmms"), []).append([output, [four], "c", star, said])
        predict, small = output.lower().strip().replace("\n", " "), four.lower()
        try:  # MMStar's eval
            hit = small == predict[0] or (predict[0] == "(" and small == predict[1])
            hit = hit or (predict[:7] == "option " and small == predict[7])
            hit = hit or (predict[:14] == "the answer is " and small == predict[14])
        except IndexError:
            hit = False
        rows.setdefault(("mmstar", "llava"), []).append([output, [four], "c", star, float(hit)])
        source = ("ADE20K", "COCO", "Omni3D")[number % 3]
        doc = {"answer": f"({four})", "idx": 1, "type": "2D", "task": "Count", "source": source}
        hit = cv.cv_bench_process_results(doc, [output])["cv_bench_acc"]["is_correct"]
        rows.setdefault(("cv_bench", "lmms"), []).append([output, [four], "Count", {"source": source}, float(hit)])
        two = "AB"[number % 2]
        doc = {"Index": number + 1, "Correct Answer": f"({two.lower()})"}
        hit = mmvp.mmvp_process_results(doc, [output])["mmvp_accuracy"]
        rows.setdefault(("mmvp", "lmms"), []).append(
            [output, [two], "", {"pair": number // 2}, float(hit["is_correct"])]
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "problems.json").write_text(json.dumps(problems))
        (folder / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
        (folder / "said.jsonl").write_text("".join(json.dumps(row) + "\n" for row in predictions))
        script, arguments = (
            root / "llava/llava/eval/eval_science_qa.py",
            ["--base-dir", folder, "--result-file", folder / "said.jsonl"],
        )
        arguments += ["--output-file", folder / "out.json", "--output-result", folder / "result.json"]
        subprocess.run([sys.executable, script, *arguments], check=True, stdout=subprocess.DEVNULL)
        read = json.loads((folder / "result.json").read_text())["results"]
    rows["scienceqa_img", "llava"] = [
        [output, answers, kind, extra, float(read[str(number)] == problems[str(number)]["answer"])]
        for number, (output, answers, kind, extra, _) in enumerate(rows["scienceqa_img", "lmms"])
    ]
    star_rows = [
        {"l2_category": extra["l2_category"], "score": score} for _, _, _, extra, score in rows["mmstar", "lmms"]
    ]
    pair_rows = [{"pair_index": extra["pair"], "is_correct": score} for _, _, _, extra, score in rows["mmvp", "lmms"]]
    cv_rows = [{"source": extra["source"], "is_correct": score} for _, _, _, extra, score in rows["cv_bench", "lmms"]]
    further = {
        ("mmstar", "lmms"): {"average": mmstar.mmstar_aggregate_results(star_rows)},
        ("mmvp", "lmms"): {"pairs": mmvp.mmvp_aggregate_pair_results(pair_rows)},
        ("cv_bench", "lmms"): {"2D and 3D": cv.cv_bench_default_aggregate_results(cv_rows)},
    }
    return [case(key[0], key[1], part, metrics=further.get(key, {})) for key, part in rows.items()]


def mmbench(lmms: Lmms, root: Path, rng: random.Random) -> list[dict[str, Any]]:
    evaluator = lmms.task("mmbench", "mmbench_evals.py").MMBench_Evaluator()
    rows, table = [], []
    for index in range(500):
        count = rng.choice((2, 3, 4, 4))
        texts = rng.sample(COLORS, count)
        right = texts[rng.randrange(count)]
        sure = rng.random() < 0.6
        for turn in range(count):
            turned = texts[turn:] + texts[:turn]
            letter = "ABCD"[turned.index(right)]
            forms = (letter, f"{letter}.", f"({letter})", f"{letter}. {right}", right, f"The answer is {letter}")
            output = rng.choice(forms) if sure else letter_answer(rng, turned)
            output = output.strip()
            options = dict(zip("ABCD", [*turned, "nan", "nan"], strict=False))
            place = index + turn * 1_000_000
            wide = f"wide {index % 3}"
            table.append({"index": place, "question": "q", "answer": letter, "prediction": output, **options, "category": "c"}
                         | {"hint": "nan", "source": "s", "split": "dev", "L2-category": wide})  # fmt: skip
            rows.append([output, [letter], "c", {"index": place, "choices": options, "L2-category": wide}, None])
    with contextlib.redirect_stdout(io.StringIO()):
        overall, _, wider = evaluator.eval_result([dict(row) for row in table], eval_method="static")
        for row, line in zip(rows, table, strict=True):
            alone = evaluator.eval_result([{**line, "index": 1}], eval_method="static")
            row[4] = float(alone[0])
    metrics = {"circular": float(overall)} | {f"circular {name}": float(value) for name, value in wider.items()}
    return [case("mmbench", "lmms", rows, metrics=metrics)]


def mmmu(lmms: Lmms, root: Path, rng: random.Random) -> list[dict[str, Any]]:
    theirs, official = lmms.task("mmmu"), load_from(root / "mmmu/mmmu/utils/eval_utils.py", "eval_utils")
    docs = []
    for number in range(2 * COUNT):
        subject = ("Art_Theory", "Math", "Design")[number * 3 // (2 * COUNT)]
        name = f"validation_{subject}_{number}"
        if number % 2:
            right, output = number_answer(rng)
            docs.append((output, [right], subject, {"options": {}, "question_type": "open"}, name))
        else:
            texts = [" ".join(rng.sample(COLORS, 2)) for _ in range(rng.randint(2, 6))]
            letters_of = dict(zip("ABCDEF", texts, strict=False))
            right = "ABCDEF"[rng.randrange(len(texts))]
            extra = {"options": letters_of, "question_type": "multiple-choice"}
            docs.append((letter_answer(rng, texts), [right], subject, extra, name))
    cases = []
    for school, seed in (("lmms", 0), ("llava", 42)):
        random.seed(seed)
        rows, results = [], []
        for output, answers, subject, extra, name in docs:
            kind = extra["question_type"]
            if school == "lmms":
                doc = {
                    "id": name,
                    "question_type": kind,
                    "answer": answers[0],
                    "options": repr(list(extra["options"].values())),
                }
                result = theirs.mmmu_process_results(doc, [output])["mmmu_acc"]
                score = theirs.evaluate_mmmu([result])[1]["acc"]
                results.append(result)
            else:
                if kind == "multiple-choice":
                    said = official.parse_multi_choice_response(output, list(extra["options"]), extra["options"])
                else:
                    said = official.parse_open_response(output)
                right = answers[0]
                if right.startswith("["):
                    answers = ["a b", "c"]
                sample = {
                    "id": name,
                    "question_type": kind,
                    "answer": answers if len(answers) > 1 else right,
                    "parsed_pred": said,
                }
                score = official.evaluate([sample])[1]["acc"]
            rows.append([output, answers, subject, extra, float(score)])
        metrics = {
            "Art and Design": sum(row[4] for row in rows if row[2] != "Math") / sum(row[2] != "Math" for row in rows)
        }
        if school == "lmms":
            with contextlib.redirect_stdout(io.StringIO()):
                metrics["overall"] = theirs.mmmu_aggregate_results(results)
        cases.append(case("mmmu", school, rows, metrics=metrics))
    return cases


if __name__ == "__main__":
    main(Path(sys.argv[1]))
