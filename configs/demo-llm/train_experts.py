"""Train the demo's four LoRA experts, or measure them.

    python configs/demo-llm/train_experts.py --data DIR [--only SKILL] [--base DIR]
    python configs/demo-llm/train_experts.py --measure [--only SKILL] [--limit N] [--base DIR]

`DIR` is a folder with the training sets that experts/README.md lists. An expert that is there already is skipped.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prepare_llm import BASE_NAME, TASKS, Item, Task, arithmetic_item, llm_folder, sentiment_item, unique
from texts import normalise, tidy
from torch import Tensor

from evolver.storage import whole_folder

EXPERTS = Path(__file__).parent / "experts"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LIBRARIES = ("torch", "transformers", "peft", "lm_eval")
# One shape for all batches: oneDNN compiles its bfloat16 kernels anew, for many seconds, at each new one.
LENGTH = 64  # tokens of an item with all its choices; longer training items are left out
SCORED_MULTIPLE = 128  # the number of scored tokens of a batch is padded to a multiple of this


@dataclass(frozen=True)
class Settings:
    """How an expert is trained; the same for all."""

    rank: int = 8
    alpha: int = 16
    steps: int = 160
    batch: int = 12
    peak_rate: float = 7e-4
    warmup: int = 16
    seed: int = 0


# --- training sets ---------------------------------------------------------------------------------------------------


def commonsense_sets(data: Path) -> dict[str, list[Item]]:
    """CommonsenseQA's training split."""
    lines = (data / "commonsenseqa/CommonsenseQA/train_rand_split.jsonl").read_text().splitlines()
    items = []
    for row in map(json.loads, lines):
        labels = [choice["label"] for choice in row["question"]["choices"]]
        choices = [tidy(choice["text"]) for choice in row["question"]["choices"]]
        question = tidy(row["question"]["stem"])
        items.append({"question": question, "choices": choices, "answer": labels.index(row["answerKey"])})
    return {"CommonsenseQA": items}


def science_sets(data: Path) -> dict[str, list[Item]]:
    """The training splits of OpenBookQA and ARC."""
    names = {"OpenBookQA": "openbookqa", "ARC-Easy": "ARC-Easy", "ARC-Challenge": "ARC-Challenge"}
    files = {name: data / "llm-adapters-qa" / folder / "train.json" for name, folder in names.items()}
    return {name: [item for item in map(parse_numbered, load(file)) if item] for name, file in files.items()}


def parse_numbered(row: Item) -> Item | None:
    """An item from an instruction with "Answer1: … Answer2: …"; None where it doesn't have that form."""
    match = re.fullmatch(r"[^:]*: (.*)\n\nAnswer1: (.*)\n\nAnswer format: .*", row["instruction"].strip(), re.DOTALL)
    if match is None:
        return None
    choices = [tidy(choice) for choice in re.split(r" Answer\d: ", match[2])]
    answer = int(row["answer"].removeprefix("answer")) - 1
    if len(set(choices)) != len(choices) or not all(choices) or answer >= len(choices):
        return None
    return {"question": tidy(match[1]), "choices": choices, "answer": answer}


def maths_sets(data: Path) -> dict[str, list[Item]]:
    """Short word problems with a number for an answer, as multiple choice."""
    multi = load(data / "commonsenseqa/MultiArith/MultiArith.json")
    single = load(data / "commonsenseqa/SingleEq/questions.json")
    addsub = load(data / "llm-adapters-qa/AddSub/test.json")
    problems = {
        "MultiArith": [(row["sQuestion"], row["lSolutions"][0]) for row in multi],
        "SingleEq": [(row["sQuestion"], row["lSolutions"][0]) for row in single],
        "AddSub": [(row["instruction"], row["answer"]) for row in addsub],
    }
    built = {name: [arithmetic_item(detokenise(q), float(a)) for q, a in pairs] for name, pairs in problems.items()}
    return {name: [item for item in items if item] for name, items in built.items()}


def sentiment_sets(data: Path) -> dict[str, list[Item]]:
    """SST-2's training split: sentences of film reviews."""
    lines = (data / "sentconv6/stsa.binary.train").read_text(encoding="latin-1").splitlines()
    return {"SST-2": [sentiment_item(detokenise(line[2:]), line[0] == "1") for line in lines]}


def load(path: Path) -> Any:
    """The contents of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def detokenise(text: str) -> str:
    """Undo the spaces that old corpora put before punctuation and clitics."""
    return re.sub(r"\s+([.,!?;:]|n't\b|'(?:s|re|ve|ll|d|m)\b)", r"\1", text)


TRAINING_SETS: dict[str, Callable[[Path], dict[str, list[Item]]]] = {
    "commonsense": commonsense_sets,
    "science": science_sets,
    "maths": maths_sets,
    "sentiment": sentiment_sets,
}


def overlap_key(item: Item) -> str:
    """What makes a training item a copy of an evaluation item: the same text, whatever the numbers in it."""
    return re.sub(r"\d+", "0", normalise(item["question"]))


def evaluation_keys() -> set[str]:
    """The keys of all evaluation items of all four tasks."""
    return {overlap_key(item) for task in TASKS for item in evaluation_items(task)}


def evaluation_items(task: Task) -> list[Item]:
    """The items that prepare_llm.py wrote for a task."""
    path = llm_folder() / "tasks" / f"{task.name}.jsonl"
    if not path.is_file():
        sys.exit(f"{path} is missing: run `python configs/demo-llm/prepare_llm.py` first.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def training_examples(task: Task, data: Path, tokenizer: Any) -> tuple[list[Example], dict[str, dict[str, int]]]:
    """What to train a skill on, and for each set how many items were used and how many were dropped why."""
    forbidden, kept, counts = evaluation_keys(), list[Example](), {}
    for name, items in TRAINING_SETS[task.skill](data).items():
        items = [item for item in unique(items) if normalise(item["question"])]
        clean = [item for item in items if overlap_key(item) not in forbidden]
        examples = [tokenise(item, task.prompt, tokenizer) for item in clean]
        fitting = [example for example in examples if example.length <= LENGTH]
        dropped = {
            "dropped as evaluation items": len(items) - len(clean),
            "dropped as too long": len(clean) - len(fitting),
        }
        counts[name] = {"used": len(fitting)} | dropped
        kept += fitting
    return kept, counts


# --- scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """An item as tokens."""

    context: list[int]
    choices: list[list[int]]
    answer: int

    @property
    def length(self) -> int:
        """All its tokens, the context counted once."""
        return len(self.context) + sum(map(len, self.choices))


@dataclass(frozen=True)
class Batch:
    """Items packed one per row: the context once, then all choices, each seeing the context and itself only."""

    ids: Tensor  # (items, length)
    positions: Tensor  # (items, length)
    mask: Tensor  # (items, 1, length, length), true where a token may look
    sources: Tensor  # (scored tokens,) index into the flat hidden states: the state that predicts the token
    targets: Tensor  # (scored tokens,) the token
    owners: Tensor  # (scored tokens,) the choice that it belongs to, counted over the whole batch
    n_choices: list[int]
    answers: list[int]


def tokenise(item: Item, prompt: str, tokenizer: Any) -> Example:
    """Split context and choices as lm-eval does: the choice is what follows the context's tokens in the whole."""
    text = prompt.replace("{{question}}", item["question"])
    context: list[int] = tokenizer.encode(text)
    choices = [tokenizer.encode(f"{text} {choice}")[len(context) :] for choice in item["choices"]]
    return Example(context, choices, item["answer"])


def pack(examples: list[Example]) -> Batch:
    """Lay the examples out as one batch."""
    length = max(LENGTH, *(example.length for example in examples))
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    positions, block = torch.zeros_like(ids), torch.full_like(ids, -2)  # block: -2 padding, -1 context, else choice
    sources, targets, owners, choice = [], [], [], 0
    for row, example in enumerate(examples):
        end = len(example.context)
        ids[row, :end], positions[row, :end], block[row, :end] = torch.tensor(example.context), torch.arange(end), -1
        for tokens in example.choices:
            span = slice(end, end + len(tokens))
            ids[row, span], block[row, span] = torch.tensor(tokens), choice
            positions[row, span] = len(example.context) + torch.arange(len(tokens))
            sources += [row * length + i - 1 for i in (len(example.context), *range(end + 1, span.stop))]
            targets += tokens
            owners += [choice] * len(tokens)
            end, choice = span.stop, choice + 1
    seen = (block[:, None, :] == -1) | (block[:, None, :] == block[:, :, None])
    mask = (seen & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
    padding = -len(targets) % SCORED_MULTIPLE
    scored = [torch.tensor(v + [fill] * padding) for v, fill in ((sources, 0), (targets, 0), (owners, choice))]
    n_choices = [len(example.choices) for example in examples]
    return Batch(ids, positions, mask, scored[0], scored[1], scored[2], n_choices, [e.answer for e in examples])


def choice_scores(model: Any, batch: Batch) -> list[Tensor]:
    """For each item, the summed log-likelihood of each choice."""
    hidden = model.model(batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False)
    states = hidden.last_hidden_state.flatten(0, 1)[batch.sources]
    logits = model.lm_head(states).float()
    token_scores = -torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    scores = torch.zeros(sum(batch.n_choices) + 1).index_add(0, batch.owners, token_scores)  # the last is padding
    return list(torch.split(scores[:-1], batch.n_choices))


def choice_loss(scores: list[Tensor], answers: list[int]) -> Tensor:
    """Cross-entropy over the choices' scores: what accuracy is decided by."""
    losses = [torch.nn.functional.cross_entropy(s, torch.tensor(a)) for s, a in zip(scores, answers, strict=True)]
    return torch.stack(losses).mean()


# --- training --------------------------------------------------------------------------------------------------------


def load_base(base: Path) -> tuple[Any, Any]:
    """The base model in bfloat16 and its tokenizer."""
    os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    return model, AutoTokenizer.from_pretrained(base)


def with_adapter(model: Any, settings: Settings) -> Any:
    """The model with fresh LoRA weights."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=PROJECTIONS,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def batches(examples: list[Example], settings: Settings) -> Iterator[Batch]:
    """Batches in a seeded order, pass after pass."""
    shuffler, queue = random.Random(settings.seed), list[Example]()
    for _ in range(settings.steps):
        while len(queue) < settings.batch:
            queue += shuffler.sample(examples, len(examples))
        yield pack(queue[: settings.batch])
        del queue[: settings.batch]


def rate_at(step: int, settings: Settings) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to zero."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - settings.warmup) / (settings.steps - settings.warmup)))


def fit(model: Any, examples: list[Example], settings: Settings) -> None:
    """Train the adapter."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=settings.peak_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, settings))
    model.train()
    start, losses, hits = time.monotonic(), list[float](), list[bool]()
    for step, batch in enumerate(batches(examples, settings), 1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = choice_scores(model.get_base_model(), batch)
        loss = choice_loss(scores, batch.answers)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        hits += [int(s.argmax()) == a for s, a in zip(scores, batch.answers, strict=True)]
        if step % 20 == 0:
            report(step, losses[-20:], hits[-20 * settings.batch :], time.monotonic() - start)


def report(step: int, losses: list[float], hits: list[bool], seconds: float) -> None:
    """One line of progress."""
    loss, right = sum(losses) / len(losses), sum(hits) / len(hits)
    print(f"  step {step}: loss {loss:.3f}, right {right:.1%} (last 20 steps), {seconds:.0f} s", flush=True)


def save_adapter(model: Any, folder: Path) -> None:
    """Write the adapter in bfloat16, its configuration in a fixed order, and no model card."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = load(folder / "adapter_config.json")
    config |= {"base_model_name_or_path": BASE_NAME, "target_modules": PROJECTIONS}
    write_json(folder / "adapter_config.json", config)


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def train(task: Task, data: Path, base: Path, settings: Settings) -> None:
    """Train one expert, unless it is there."""
    target = EXPERTS / task.skill
    if (target / "adapter_model.safetensors").is_file():
        print(f"{task.skill}: there already")
        return
    start = time.monotonic()
    torch.manual_seed(settings.seed)
    model, tokenizer = load_base(base)
    examples, counts = training_examples(task, data, tokenizer)
    print(f"{task.skill}: {json.dumps(counts)}", flush=True)
    model = with_adapter(model, settings)
    fit(model, examples, settings)
    record = {
        "skill": task.skill,
        "training sets": counts,
        "settings": vars(settings),
        "minutes": round((time.monotonic() - start) / 60, 1),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    with whole_folder(target) as folder:
        save_adapter(model, folder)
        write_json(folder / "training.json", record)
    print(f"{task.skill}: done in {record['minutes']} minutes", flush=True)


# --- measuring -------------------------------------------------------------------------------------------------------


def merged(base: Path, expert: str | None) -> tuple[Any, Any]:
    """The base, or the base with an expert's adapter merged in, and the tokenizer."""
    from peft import PeftModel

    model, tokenizer = load_base(base)
    if expert:
        model = PeftModel.from_pretrained(model, EXPERTS / expert).merge_and_unload()
    return model.eval(), tokenizer


def measure(base: Path, tasks: list[Task], limit: int | None) -> None:
    """Score base and experts with lm-eval; keep the figures and print them as a Markdown table."""
    path = EXPERTS / "measured.json"
    rows: dict[str, Any] = load(path) if path.is_file() else {}
    wanted = {task.name: min(limit or sys.maxsize, len(evaluation_items(task))) for task in tasks}
    for expert in (None, *(task.skill for task in TASKS)):
        row = rows.setdefault(expert or "base", {})
        missing = [name for name, items in wanted.items() if row.get(name, {}).get("items") != items]
        if missing:
            row |= score(*merged(base, expert), missing, limit)
            write_json(path, rows)
    print_table(rows)


def score(model: Any, tokenizer: Any, names: list[str], limit: int | None) -> dict[str, dict[str, float]]:
    """acc, acc_norm and the number of items for each task."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    language_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=64)
    manager = TaskManager(include_path=str(llm_folder() / "tasks"), include_defaults=False)
    settings: dict[str, Any] = {"limit": limit, "bootstrap_iters": 0, "log_samples": False}
    found = simple_evaluate(model=language_model, tasks=list(names), task_manager=manager, **settings)
    assert found is not None
    figures = {}
    for name in names:
        metrics = {m: round(found["results"][name][f"{m},none"], 4) for m in ("acc", "acc_norm")}
        figures[name] = metrics | {"items": found["n-samples"][name]["effective"]}
    return figures


def print_table(rows: dict[str, Any]) -> None:
    """The figures as a Markdown table: acc in percent, its standard error, acc_norm in brackets."""
    print("| model | " + " | ".join(f"{t.name} ({rows['base'][t.name]['items']})" for t in TASKS) + " |")
    print("|---|" + "---|" * len(TASKS))
    for name, row in rows.items():
        cells = [cell(row[task.name]) for task in TASKS]
        print(f"| {name} | " + " | ".join(cells) + " |")


def cell(figures: dict[str, float]) -> str:
    """One model on one task."""
    error = math.sqrt(figures["acc"] * (1 - figures["acc"]) / figures["items"])
    return f"{figures['acc']:.1%} ± {error:.1%} ({figures['acc_norm']:.1%})"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the training sets")
    parser.add_argument("--only", choices=list(TRAINING_SETS), help="train this expert, or measure its task, alone")
    parser.add_argument("--base", type=Path, default=llm_folder() / "base", help="the base model's folder")
    parser.add_argument("--measure", action="store_true", help="score base and experts instead of training")
    parser.add_argument("--limit", type=int, help="with --measure: the first so many items of each task (default all)")
    arguments = parser.parse_args()
    chosen = [task for task in TASKS if arguments.only in (None, task.skill)]
    if arguments.measure:
        measure(arguments.base, chosen, arguments.limit)
        return
    if arguments.data is None:
        parser.error("--data DIR is needed for training")
    for task in chosen:
        train(task, arguments.data, arguments.base, Settings())


if __name__ == "__main__":
    main()
