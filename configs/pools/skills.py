"""The four skills of make demo-llm as training items, and word problems whose answer is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prepare_llm import TASKS, Task, llm_folder, unique
from texts import normalise
from train_experts import TRAINING_SETS, evaluation_keys, overlap_key

Row = dict[str, Any]


def training_rows(data: Path) -> dict[str, list[Row]]:
    """Items to choose from, by skill; of word problems also the answer to be written. None is an evaluation item."""
    forbidden = evaluation_keys()
    out: dict[str, list[Row]] = {}
    for task in TASKS:
        items = [i for group in TRAINING_SETS[task.skill](data).values() for i in unique(group)]
        clean = [i for i in items if normalise(i["question"]) and overlap_key(i) not in forbidden]
        out[task.skill] = [
            {"prompt": prompt(task, i), "choices": [f" {c}" for c in i["choices"]], "answer": i["answer"]}
            for i in clean
        ]
        if task.skill == "maths":
            out[task.skill] += [{"prompt": prompt(task, i), "completion": f" {answer(i)}\n"} for i in clean]
    return out


def written_maths() -> list[Row]:
    """The demo's evaluation problems without their choices."""
    task = next(t for t in TASKS if t.skill == "maths")
    path = llm_folder() / "tasks" / f"{task.name}.jsonl"
    items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{"text": i["question"], "prompt": prompt(task, i), "answer": answer(i)} for i in items]


def prompt(task: Task, item: Row) -> str:
    """The question as the demo asks it."""
    return task.prompt.replace("{{question}}", item["question"])


def answer(item: Row) -> str:
    """The right choice."""
    found: str = item["choices"][item["answer"]]
    return found
