"""Figures of evaluation: resident scoring against the bare forward passes and lm-eval, and what is left unscored.

Run by ``make benchmark-evaluation``; writes results/benchmarks/evaluation.md. Every ratio is of medians measured in one
process, the compared parts taking turns, so that a change of the machine's speed meets both.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from bare import bare_forward

from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.evaluation.language.decoder import DecoderOnly
from evolver.evaluation.language.library import quiet
from evolver.evaluation.language.loglikelihood import LogLikelihoods
from evolver.evaluation.language.resident import LanguageScorer
from evolver.records import Candidate
from evolver.records.recipe import Cross
from evolver.report.text import markdown_table
from evolver.workers.worker import Worker

ROUNDS = 5
CONFIG = "configs/demo-llm.yaml"
PAGE = Path("results/benchmarks/evaluation.md")
TASKS = ("demo_commonsense", "demo_science", "demo_maths", "demo_sentiment")
# Words of a context that four choices share; SmolLM2 reads about 1.3 tokens a word.
LONG_WORDS = 300

WORDS_OF_DUELS = """## Items until a decision

Duels of a candidate with the incumbent: is its score on all dev items higher? *exact*, *racing* and *oracle* are the
shares of the items that are scored until the decision: by exact early stopping (decisions as by scoring all, always),
by the race, and by a sequential probability ratio test that is told the true difference, which no test can beat by
much at a small error rate. *÷ racing, winners completed* counts that a winner is scored in full all the same, as it
is the next incumbent. *wrong* is the observed error rate. Simulated: 500 duels, true differences normal around -3
points with a deviation of 5; of a run: complete candidates of demo-llm's search, early stopping off, in the run's
order of items and reshuffled. Three times fewer items at 5 % are reached with 1,000 items and candidates that agree
with the incumbent on 95 % of them; with 240 items, or differences of one standard error and less, the oracle shows
that there is not more to be had at this error rate."""


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="environment with mergekit-evolve, to compare whole searches")
    parser.add_argument("--ledger", help="a run's ledger without early stopping, whose duels are replayed")
    parser.add_argument("--duels", help="what duels.py has printed before, which does not depend on the machine")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            *against_bare(Path(folder), 200),
            *against_bare(Path(folder), 1000),
            against_lm_eval(Path(folder), 200),
            context_reuse(Path(folder)),
        ]
        for row in rows:
            print(row, flush=True)
    replayed = ["--ledger", given.ledger] if given.ledger else []
    less = Path(given.duels).read_text() if given.duels else output("tests/benchmarks/duels.py", *replayed)
    peer = output("tests/benchmarks/mergekit_evolve.py", "--peer", given.peer) if given.peer else ""
    write_page(rows, less, peer)


def against_bare(folder: Path, items: int) -> Iterator[list[str]]:
    """A warm evaluation against the bare forward passes on its batches."""
    worker = worker_of(folder, [{"task": t, "dev": items // 4, "report": 1} for t in TASKS])
    worker.scorer.score(0, items)
    bare = bare_forward(worker)
    found = taking_turns({"resident": lambda: evaluate(worker), "bare": bare})
    yield [
        f"resident evaluation ÷ bare forward passes, {items} multiple-choice items",
        f"{found['resident'] / found['bare']:.3f} ({found['resident']:.2f} s ÷ {found['bare']:.2f} s)",
        "≤ 1.15",
    ]


def against_lm_eval(folder: Path, items: int) -> list[str]:
    """lm-eval on the same model and items, a model and a task manager at hand, against a warm evaluation."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    worker = worker_of(folder, [{"task": t, "dev": items // 4, "report": 1} for t in TASKS])
    chosen: dict[str, list[int]] = {}
    for item in worker_tasks[id(worker)].items.dev:
        chosen.setdefault(item.task, []).append(item.index)
    lm = HFLM(pretrained=worker.live.module, tokenizer=worker.live.tokenizer, batch_size=16)
    manager = TaskManager(include_path=str(tasks_folder()), include_defaults=False)

    def theirs() -> None:
        with quiet():
            simple_evaluate(
                lm, tasks=list(TASKS), samples=chosen, task_manager=manager, bootstrap_iters=0, log_samples=True
            )

    evaluate(worker)
    theirs()
    found = taking_turns({"resident": lambda: evaluate(worker), "lm-eval": theirs}, rounds=3)
    return [
        f"lm_eval.simple_evaluate (batch size 16) ÷ resident evaluation, second candidate on, {items} items",
        f"{found['lm-eval'] / found['resident']:.1f} ({found['lm-eval']:.2f} s ÷ {found['resident']:.2f} s)",
        "≥ 3",
    ]


def context_reuse(folder: Path) -> list[str]:
    """Four choices behind a long context: one row a question, against one row a choice."""
    worker = worker_of(long_context_task(folder), [{"task": "long", "dev": 24, "report": 1}])
    ((scorer, _),) = worker.scorer.parts
    assert isinstance(scorer, LanguageScorer)
    together, apart = DecoderOnly(worker.live, scorer.lm.max_length), DecoderOnly(worker.live, scorer.lm.max_length)
    apart.shares = False
    ways = {n: LogLikelihoods(f, 2048, None) for n, f in (("together", together), ("apart", apart))}
    for way in ways.values():
        way(scorer.groups)
    found = taking_turns({n: (lambda w=w: w(scorer.groups)) for n, w in ways.items()}, rounds=3)
    tokens = sum(len(g.pairs[0][0]) for g in scorer.groups.values()) / len(scorer.groups)
    return [
        f"choices apart ÷ choices together: four choices share a context of {tokens:.0f} tokens",
        f"{found['apart'] / found['together']:.1f} ({found['apart']:.2f} s ÷ {found['together']:.2f} s)",
        "≥ 2",
    ]


worker_tasks: dict[int, Any] = {}


def worker_of(folder: Path, tasks: list[dict[str, Any]]) -> Worker:
    """A worker with demo-llm's models on these tasks, holding an offspring."""
    raw = yaml.safe_load(Path(CONFIG).read_text())
    own = folder / "tasks"
    raw["evaluation"] |= {"tasks": tasks, "include_path": str(own if own.is_dir() else tasks_folder())}
    raw["evaluation"]["block_items"] = 10_000
    config = folder / f"{len(worker_tasks)}.yaml"
    config.write_text(yaml.safe_dump(raw))
    ready = prepare(config_at(config))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    child = Cross(ready.experts[0], (ready.experts[1],), "evolver", 0.5, 0.5, 1)
    result = worker.evaluate(Candidate(0, child, "benchmark"))
    if result.status != "ok":
        raise SystemExit(result.reason)
    worker_tasks[id(worker)] = ready.tasks
    return worker


def evaluate(worker: Worker) -> None:
    """Score all items of the model that is live: forward passes, filters, metrics."""
    worker.scorer.score(0, len(worker.scale.tasks))


def long_context_task(folder: Path) -> Path:
    """A task whose four choices share a long context, made of demo-llm's own questions."""
    rows = [json.loads(line) for line in (tasks_folder() / "demo_science.jsonl").read_text().splitlines()]
    story = " ".join(r["question"] for r in rows).split()
    own = folder / "long"
    (own / "tasks").mkdir(parents=True)
    lines = [
        json.dumps({**r, "context": " ".join(story[50 * n : 50 * n + LONG_WORDS])}) for n, r in enumerate(rows[:40])
    ]
    (own / "tasks" / "long.jsonl").write_text("\n".join(lines))
    task = yaml.safe_load((tasks_folder() / "demo_science.yaml").read_text())
    task |= {"task": "long", "doc_to_text": "{{context}}\nQuestion: {{question}}\nAnswer:"}
    task["dataset_kwargs"] = {"data_files": str(own / "tasks" / "long.jsonl")}
    (own / "tasks" / "long.yaml").write_text(yaml.safe_dump(task))
    return own


def tasks_folder() -> Path:
    """Where demo-llm's tasks lie."""
    from evolver.storage.paths import expand

    return Path(expand(yaml.safe_load(Path(CONFIG).read_text())["evaluation"]["include_path"]))


def taking_turns(actions: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each action."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            found[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def output(script: str, *arguments: str) -> str:
    """What another benchmark prints."""
    return subprocess.run([sys.executable, script, *arguments], check=True, text=True, stdout=subprocess.PIPE).stdout


def write_page(rows: Sequence[Sequence[str]], less: str, peer: str) -> None:
    """The Markdown page."""
    setting = (
        f"SmolLM2-135M-Instruct in bfloat16, the tasks of demo-llm, {psutil.cpu_count()} cores, {platform.machine()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads. Made by `make benchmark-evaluation`."
    )
    parts = [
        "# Evaluation: what an item costs, and how many are scored",
        setting,
        markdown_table(["figure", "measured", "must reach"], rows),
        WORDS_OF_DUELS,
        less.strip(),
        peer.strip() or "The comparison of whole searches with mergekit-evolve is still to be measured.",
    ]
    PAGE.write_text("\n\n".join(p for p in parts if p) + "\n")
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
