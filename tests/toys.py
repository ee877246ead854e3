"""Toy models, toy tasks and short calls, so that every test below runs the real thing in seconds."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from evolver import ledger
from evolver.config.reading import config_at
from evolver.driver.run import run
from evolver.errors import BadInput
from evolver.evaluation.scores.course import Evaluation
from evolver.pool import Pool
from evolver.records import Candidate, Result, Split
from evolver.records.recipe import dump_recipe
from evolver.storage import storage_at
from evolver.workers.plan import Plan
from evolver.workers.pools.local import LocalPool
from evolver.workers.shared import SharedPool
from evolver.workers.worker import Worker

ROOT = Path(__file__).parent.parent
COLOURS = ("red", "green", "blue", "white", "black", "yellow")
THINGS = ("house", "river", "stone", "tree", "bird", "boat")
MOODS = ("bad", "fair", "good")  # the labels of the toy classifiers of texts
TAGS = ("O", "B-thing", "I-thing", "B-colour", "I-colour")  # the labels of the toy classifiers of words
# Of a processor, for the loop in slowness(): on an idle core of the machine where bounds were set.
REFERENCE_SECONDS = 0.11
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LENGTH = 128  # positions of the toy models
DROP = object()  # as a value: leave this key out


def tokenizer() -> Any:
    """A byte-level BPE tokenizer trained on the toys' own words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    corpus = [f"Question: is the {c} {t} {d}?\nAnswer: {d} {t}" for c in COLOURS for t in THINGS for d in COLOURS]
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=LENGTH
    )


def make_models(folder: Path) -> None:
    """A tiny Llama ``base``, noisy fine-tunes ``a``, ``b``, ``c``, and an adapter ``lora``."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokenizer()
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(words), max_position_embeddings=LENGTH, tie_word_embeddings=True, initializer_range=0.1,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    weights = {k: v.clone() for k, v in base.state_dict().items()}
    for seed, name in enumerate(("base", "a", "b", "c")):
        torch.manual_seed(seed)
        base.load_state_dict({k: v + 0.05 * (seed > 0) * torch.randn_like(v) for k, v in weights.items()})
        base.tie_weights()
        base.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    base.load_state_dict(weights)
    adapter = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(9)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter.save_pretrained(folder / "lora")


def noisy_experts(model: Any, folder: Path, *beside: Any) -> None:
    """Save a model as ``base``, and two fine-tunes of it, ``a`` and ``b``, each with what belongs ``beside`` it."""
    import torch

    weights = {k: v.clone() for k, v in model.state_dict().items()}
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        model.load_state_dict({k: v + 0.1 * (seed > 0) * torch.randn_like(v) for k, v in weights.items()})
        for part in (model, *beside):
            part.save_pretrained(folder / name)


def make_encoders(folder: Path) -> None:
    """A tiny BERT that names one of ``MOODS``, and two noisy fine-tunes of it."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    words = tokenizer()
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(words),
        max_position_embeddings=LENGTH, initializer_range=0.3, pad_token_id=2,
        id2label=dict(enumerate(MOODS)), label2id={n: i for i, n in enumerate(MOODS)},
    )  # fmt: skip
    torch.manual_seed(0)
    noisy_experts(BertForSequenceClassification(config), folder, words)


def make_rerankers(folder: Path) -> None:
    """A tiny BERT that gives a number for two texts, and two noisy fine-tunes of it."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    words = tokenizer()
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(words),
        max_position_embeddings=LENGTH, initializer_range=0.3, pad_token_id=2, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    noisy_experts(BertForSequenceClassification(config), folder, words)


def ranked(count: int = 75) -> list[dict[str, Any]]:
    """Texts as queries, each with four documents of which one is right."""
    draw = random.Random(5)
    return [
        {
            "query": text, "documents": [" ".join(draw.choices(COLOURS + THINGS, k=5)) for _ in range(4)],
            "marks": [int(place == n % 4) for place in range(4)],
        }
        for n, text in enumerate(texts(count))
    ]  # fmt: skip


def make_taggers(folder: Path) -> None:
    """A tiny BERT that names one of ``TAGS`` for each word, and two noisy fine-tunes of it."""
    import torch
    from transformers import BertConfig, BertForTokenClassification

    words = tokenizer()
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(words),
        max_position_embeddings=LENGTH, initializer_range=0.3, pad_token_id=2,
        id2label=dict(enumerate(TAGS)), label2id={n: i for i, n in enumerate(TAGS)},
    )  # fmt: skip
    torch.manual_seed(0)
    noisy_experts(BertForTokenClassification(config), folder, words)


def tagged(count: int = 75, tags: Sequence[str] = TAGS) -> list[dict[str, list[str]]]:
    """The words of ``texts``, each with one of the tags."""
    draw = random.Random(4)
    return [{"text": t.split(), "label": [draw.choice(tags) for _ in t.split()]} for t in texts(count)]


def make_image_classifiers(folder: Path) -> None:
    """A tiny ViT for handwritten digits, and two noisy fine-tunes of it."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        num_labels=10, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    noisy_experts(ViTForImageClassification(config), folder, ViTImageProcessorPil(size={"height": 16, "width": 16}))


def texts(count: int = 75) -> list[str]:
    """Texts of one to twenty words, each with its number before them."""
    draw = random.Random(3)
    return [" ".join([str(n), *draw.choices(COLOURS + THINGS, k=draw.randint(1, 20))]) for n in range(count)]


def digits(count: int = 70) -> Iterator[tuple[bytes, int]]:
    """Handwritten digits (images of 8 by 8 pixels) as PNG files, and what they are."""
    from PIL import Image
    from sklearn.datasets import load_digits

    found = load_digits()
    for pixels, label in zip(found.images[:count], found.target[:count], strict=True):
        file = io.BytesIO()
        # Not compressed, as nobody else would save it: a digest of the file has to be one of this very file.
        Image.fromarray((pixels * 15).astype("uint8")).save(file, format="PNG", compress_level=0)
        yield file.getvalue(), int(label)


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """Write a JSONL file; returns its path."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


class Oracle:
    """The average of the experts. Most answers of the toy tasks are its own, so that merging makes better models."""

    def __init__(self, models: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        experts = [AutoModelForCausalLM.from_pretrained(models / n).state_dict() for n in ("a", "b", "c")]
        self.words = AutoTokenizer.from_pretrained(models / "base")
        self.model = AutoModelForCausalLM.from_pretrained(models / "base").eval()
        self.model.load_state_dict({k: torch.stack([e[k] for e in experts]).mean(0) for k in experts[0]})

    def logits(self, rows: list[list[int]]) -> Any:
        import torch

        width = max(map(len, rows))
        with torch.inference_mode():  # padding at the right is never seen by what stands before it
            return self.model(torch.tensor([r + [0] * (width - len(r)) for r in rows])).logits.log_softmax(-1)

    def choice(self, context: str, options: list[str]) -> int:
        size = len(self.words.encode(context))
        rows = [self.words.encode(f"{context} {option}") for option in options]
        logits = self.logits(rows)
        scores = [sum(float(logits[k, i - 1, r[i]]) for i in range(size, len(r))) for k, r in enumerate(rows)]
        return scores.index(max(scores))

    def next_word(self, text: str) -> str:
        return self.words.decode([int(self.logits([self.words.encode(text)])[0, -1].argmax())])


def make_tasks(folder: Path, models: Path) -> None:
    """Tasks of each kind: choices (toy, pair), one continuation (last), a word (echo), a few words of which the first
    number counts (free), over-long prompts (long), a whole text (roll), yes or no (yesno), and one with examples of
    its own (shots).
    """
    draw, oracle = random.Random(0), Oracle(models)

    def choices(number: int) -> dict[str, Any]:
        options = draw.sample([f"{c} {t}" for c in COLOURS for t in THINGS], 4)
        question = f"Is the {draw.choice(COLOURS)} {draw.choice(THINGS)} {number} {draw.choice(COLOURS)}?"
        answer = draw.randrange(4) if draw.random() < 0.3 else oracle.choice(f"Question: {question}\nAnswer:", options)
        return {"question": question, "choices": options, "answer": answer}

    def echo(number: int) -> dict[str, Any]:
        for _ in range(50):
            question = f"{draw.choice(COLOURS)} {draw.choice(THINGS)} {draw.choice(COLOURS)} {number}"
            said = oracle.next_word(question)
            if said.strip().isalpha() and said.isascii():
                break
        return {"question": question, "said": said if number % 3 else "stone"}

    long = [" ".join([f"number {n}", *draw.choices(THINGS, k=150)]) for n in range(12)]
    documents = {
        "toy": [choices(n) for n in range(110)],
        "pair": [choices(n) for n in range(200, 270)],
        "echo": [echo(n) for n in range(40)],
        "long": [choices(n) | {"question": question} for n, question in enumerate(long)],
        "empty": [],
        "examples": [choices(n) for n in range(300, 340)],
    }
    choose = {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    say = {"doc_to_text": "{{question}}", "doc_to_target": "said"}
    mutual = [{"metric": "acc_mutual_info", "aggregation": "mean", "higher_is_better": True}]
    kinds: dict[str, dict[str, Any]] = {
        "toy": choose,
        "pair": choose,
        "long": choose,
        "empty": choose,
        "last": {
            **say,
            "output_type": "loglikelihood",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        "echo": {
            **say,
            "output_type": "generate_until",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 1, "do_sample": False},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "filter_list": [{"name": "first", "filter": [{"function": "take_first"}]}],
        },
        "free": {
            **say,
            "output_type": "generate_until",
            "generation_kwargs": {"until": ["s"], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "filter_list": [
                {
                    "name": "word",
                    "filter": [{"function": "regex", "regex_pattern": "([a-z]{2,3})"}, {"function": "take_first"}],
                }
            ],
        },
        "roll": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{question}}",
            "metric_list": [
                {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
                {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
            ],
        },
        "yesno": {
            **choose,
            "doc_to_choice": [" stone", " tree"],
            "doc_to_target": "{{answer % 2}}",
            "metric_list": [
                {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True},
                {"metric": "f1", "aggregation": "f1", "higher_is_better": True},
            ],
        },
        "mutual": {**choose, "metric_list": mutual},
        "shots": {**choose, "num_fewshot": 2, "fewshot_split": "validation"},
    }
    files = {"last": "echo", "free": "echo", "roll": "long", "yesno": "toy", "mutual": "pair", "shots": "toy"}
    folder.mkdir(parents=True)
    for name, lines in documents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, kind in kinds.items():
        data: Any = str(folder / f"{files.get(name, name)}.jsonl")
        if name == "shots":
            data = {"train": data, "validation": str(folder / "examples.jsonl")}
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": data}, "test_split": "train"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, **kind}))
    (folder / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["toy", "pair"]}))


def settings(models: Path, tasks: Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A valid configuration with dotted keys changed (``{"search.mode": "generational", "budget.items": DROP}``)."""
    out: dict[str, Any] = {
        "run": "toy",
        "seed": 1,
        "model": {"base": str(models / "base")},
        "experts": {name: str(models / name) for name in ("a", "b", "c")},
        "search": {"algorithm": "evolver", "generations": 3},
        "budget": {"candidates": 9},
        "evaluation": {
            "include_path": str(tasks),
            "tasks": [{"task": "toy", "dev": 40, "report": 30}],
            "block_items": 8,
        },
        "baselines": {"masses": [0.5, 1.0]},
    }
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        section = out
        for key in path:
            section = section.setdefault(key, {})
        if value is DROP:
            del section[last]
        else:
            section[last] = value
    for task in out["evaluation"]["tasks"]:
        task.setdefault("select", 0)  # the finals have tests of their own, and everything else is quicker without them
    return out


# Changes that make the toy's run a short one.
SHORT = {
    "budget.candidates": 3,
    "evaluation.tasks": [{"task": "toy", "dev": 12, "report": 8}],
    "baselines.masses": [1.0],
}


class Silent:
    """A display that keeps what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def stage(self, name: str, total: int | None) -> None: ...
    def result(self, candidate: Candidate, result: Result, left: float | None) -> None: ...
    def close(self) -> None: ...


class NoWork(LocalPool):
    """A pool for runs in which nothing is left to be evaluated."""

    def submit(self, candidate: Candidate) -> None:
        raise AssertionError(f"candidate {candidate.number} of stage {candidate.stage} is evaluated again")


def run_here(
    file: Path, results: Path, make_pool: Callable[..., Pool] = LocalPool, display: Silent | None = None,
    **options: Any,
) -> Path:  # fmt: skip
    """A whole run in this process; returns its folder."""
    return Path(run(config_at(file), storage_at(results), make_pool, display or Silent(), "cpu", **options).location)


def cut_short(folder: Path) -> None:
    """Take the second half of a finished run's ledger away, and what was written at its end, as if it were killed."""
    parts = sorted(Path(folder, "ledger").glob("part-*.parquet"))
    for part in parts[len(parts) // 2 :]:
        part.unlink()
    for name in ("recipe.json", "report.md"):
        Path(folder, name).unlink()


class LastFirst:
    """A pool of one worker in this process, which evaluates first what came last."""

    def __init__(self, worker: Worker) -> None:
        self._worker, self.waiting = worker, list[Candidate]()

    def free(self) -> int:
        return 8 - len(self.waiting)

    def submit(self, candidate: Candidate) -> None:
        self.waiting.append(candidate)

    def wait(self) -> list[Result]:
        return [self._worker.evaluate(self.waiting.pop())]

    def close(self) -> None: ...


def shared_result(worker: Worker, candidate: Candidate, parts: int) -> Result:
    """The result of a candidate whose items are shared among so many workers."""
    pool = LastFirst(worker)
    shared = SharedPool(pool, parts, lambda c: Evaluation(c, worker.scale, worker.block, None))
    shared.submit(candidate)
    assert len(pool.waiting) == parts
    (result,) = shared.wait()
    return result


def no_work(plan: Plan, split: Split, tasks: Any) -> Pool:
    return NoWork(plan, split, tasks)


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str


def run_process(file: Path, results: Path) -> Ended:
    """``python evolve.py FILE`` as a user calls it."""
    ended = subprocess.run(command(file, results), cwd=ROOT, capture_output=True, text=True, check=False)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def evolver(*arguments: Any, cwd: Path | None = None) -> Ended:
    """``evolver ARGUMENTS`` in this process, which has imported what it needs."""
    from evolver.commands.cli import main

    out, err, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    given, sys.argv = sys.argv, ["evolver", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(cwd or Path.cwd()):
            main()
        code: Any = 0
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = given
        signal.signal(signal.SIGTERM, handler)
    return Ended(code or 0, out.getvalue(), err.getvalue())


def refusal(code: int, err: str) -> str:
    """The one sentence with which a command refused its input, after warnings if there are any."""
    assert code == 2, err
    assert "Traceback" not in err
    said = [line for line in err.strip().splitlines() if not line.startswith("warning: ")]
    assert len(said) == 1, err
    return said[0]


def command(file: Path, results: Path) -> list[str]:
    return [sys.executable, str(ROOT / "evolve.py"), str(file), "--results", str(results)]


def rows(folder: Path, event: str = "finished") -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of a run's ledger by (stage, number), each checked to stand there once."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for row in all_rows(folder, event):
        key = (row["stage"], row["number"])
        assert key not in found, f"{key} is {event} twice"
        found[key] = row
    return found


def all_rows(folder: Path, event: str) -> list[dict[str, Any]]:
    table = ledger.read_table(storage_at(folder / "ledger"))
    nodes = ledger.nodes_of([table])
    rows = [row for row in table.to_pylist() if row["event"] == event]
    return [row | {"recipe": dump_recipe(nodes.recipe(row["recipe_id"]))} for row in rows]


def essence(folder: Path) -> dict[tuple[str, int], tuple[Any, ...]]:
    """What must not depend on how a run was carried out: recipe, status and scores of every candidate."""
    keys = ("recipe_id", "status", "score", "bound", "items")
    return {key: tuple(str(row[k]) for k in keys) for key, row in rows(folder).items()}


def winner(folder: Path) -> str:
    return (folder / "recipe.json").read_text()


def refused(call: Callable[[], object], *said: object) -> None:
    """That a call is refused in one sentence that says all of this."""
    with pytest.raises(BadInput) as caught:
        call()
    assert "\n" not in str(caught.value)
    for part in said:
        assert str(part) in str(caught.value), str(caught.value)


@functools.cache
def slowness() -> float:
    """How many times as long as on the machine where bounds were set a processor takes here: at least once."""
    began = time.process_time()
    sum(n * n % 7 for n in range(2_000_000))
    return max(1.0, (time.process_time() - began) / REFERENCE_SECONDS)


def chromium() -> str:
    """Chromium's path. Without one a test is skipped or, where ``make browser`` asks for it, fails."""
    if CHROMIUM is None:
        (pytest.fail if os.environ.get("EVOLVER_BROWSER") else pytest.skip)("there is no Chromium here")
    return str(CHROMIUM)


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
