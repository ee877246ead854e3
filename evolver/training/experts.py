"""A pool of experts on disk: its base, and each expert, trained once for its content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from evolver.checkpoints.shards import disk_errors
from evolver.checkpoints.sources import open_base
from evolver.checkpoints.weights import is_head
from evolver.errors import BadInput
from evolver.evaluation.data import Row, read_rows
from evolver.evaluation.items import item_hash
from evolver.evaluation.overlap import TEXTS_KEY, TRAINING_FILE
from evolver.records.canonical import content_hash
from evolver.storage import disk_refusals, whole_folder
from evolver.storage.paths import expand
from evolver.training.fit import fit
from evolver.training.losses import Learner, lessons_of, loss_of, training_text
from evolver.training.settings import PoolConfig, Training
from evolver.training.show import Show

# Part of an expert's identity: raise it when the training changes.
TRAINING_VERSION = 1
LINEAR = "all-linear"


def make_experts(pool: PoolConfig, show: Show) -> dict[str, Path]:
    """Train what is missing, and return the folders of the base and of every expert by name.

    Raises BadInput for data or models that cannot be read, where peft is wanted and missing, and where nothing can be
    written to the cache.
    """
    with disk_refusals(cache()):
        base = _base(pool)
        return {"base": base, **{name: _expert(pool, name, base, show) for name in pool.experts}}


def cache() -> Path:
    """Where experts are kept."""
    return Path(expand("$EVOLVER_CACHE")) / "experts"


def _base(pool: PoolConfig) -> Path:
    """The common ancestor: of classifiers with a head, or without one where each expert has its own."""
    origin = open_base(pool.base, "base")
    if pool.kind != "classifier":
        return _linked(pool, "base", origin.path)
    key = content_hash([TRAINING_VERSION, origin.digest(), pool.labels, pool.seed])
    target = cache() / key
    if not target.exists():
        with whole_folder(target) as folder:
            module = _module(pool, origin.path, pool.labels or ["0", "1"], pool.seed)
            kept = {n: t for n, t in module.state_dict().items() if pool.labels or not is_head(n)}
            with disk_errors():
                module.save_pretrained(folder, state_dict=kept)
            _tokenizer(origin.path).save_pretrained(folder)
    return _linked(pool, "base", target)


def _expert(pool: PoolConfig, name: str, base: Path, show: Show) -> Path:
    entry, settings = pool.experts[name], pool.training(name)
    rows = [row for file in entry.files for row in read_rows(file, f"experts.{name}.data")]
    seed = entry.seed if entry.seed is not None else pool.seed
    labels = pool.labels or (_own_labels(rows, entry.label, f"experts.{name}") if pool.own_heads else [])
    read = [pool.kind, pool.template, labels, entry.text, entry.text_pair, entry.label]
    contents = [hashlib.sha256(Path(expand(file)).read_bytes()).hexdigest() for file in entry.files]
    key = content_hash(
        [TRAINING_VERSION, open_base(str(base), "base").digest(), settings.model_dump(), seed, contents, read]
    )
    target = cache() / key
    if target.exists():
        show.say(f"{name}: it exists already ({target})")
    else:
        _train(pool, name, base, rows, labels, seed, target, show)
    _note_texts(target, [training_text(pool, entry, row) for row in rows])
    return _linked(pool, name, target)


def _note_texts(folder: Path, texts: Sequence[str]) -> None:
    """Write the hashes of the training texts into an expert's record, also into that of an earlier version. A run
    compares them with those of its items.
    """
    file = folder / TRAINING_FILE
    record = json.loads(file.read_text())
    if TEXTS_KEY not in record:
        record[TEXTS_KEY] = sorted({item_hash(text) for text in texts})
        temporary = file.with_name(f".{TRAINING_FILE}-{os.getpid()}")
        temporary.write_text(json.dumps(record, indent=1))
        os.replace(temporary, file)


def _own_labels(rows: Sequence[Row], label: str, key: str) -> list[str]:
    """The labels that occur, in alphabetical order."""
    without = next((n for n, r in enumerate(rows, 1) if r.get(label) is None), None)
    if without is not None:
        raise BadInput(f"{key}.label: row {without} of the data has no {label!r}; name the key of the label.")
    return sorted({str(r[label]) for r in rows})


def _train(
    pool: PoolConfig, name: str, base: Path, rows: Sequence[Row], labels: Sequence[str], seed: int, target: Path,
    show: Show,
) -> None:  # fmt: skip
    settings, began = pool.training(name), time.monotonic()
    tokenizer = _tokenizer(base)
    module = _module(pool, base, labels, seed).float()
    module = _prepared(module, settings, seed)
    loss = loss_of(pool, name, tokenizer, labels)
    lessons = lessons_of(loss, rows, f"experts.{name}.data")
    scratch = target.with_name(f"{target.name}.training")
    if left_out := len(rows) - len(lessons):
        show.say(f"{name}: {left_out} of {len(rows)} items are longer than max_tokens and left out")
    show.begin(name, settings.steps)
    learner = Learner(module.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)
    fit(learner, loss, lessons, settings, seed, scratch, show.step)
    record = {"items": len(lessons), "seconds": round(time.monotonic() - began), "settings": settings.model_dump()}
    with whole_folder(target) as folder:
        with disk_errors():
            _write(module, base, folder)
        tokenizer.save_pretrained(folder)
        (folder / TRAINING_FILE).write_text(json.dumps({"expert": name, "seed": seed, **record}, indent=1))
    shutil.rmtree(scratch, ignore_errors=True)


def _module(pool: PoolConfig, folder: Path, labels: Sequence[str], seed: int) -> Any:
    """The model of a folder; what it lacks of a classifier is drawn by the seed."""
    import transformers

    kinds: dict[str, Any] = {
        "classifier": transformers.AutoModelForSequenceClassification,
        "causal-lm": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    ids = dict(enumerate(labels))
    named: dict[str, Any] = {}
    if pool.kind == "classifier":  # where the base has a head for another number of labels, a new one is drawn
        named = {"id2label": ids, "label2id": {v: k for k, v in ids.items()}, "ignore_mismatched_sizes": True}
    torch.manual_seed(seed)
    return kinds[pool.kind].from_pretrained(folder, use_safetensors=True, **named)


def _tokenizer(folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


def _prepared(module: Any, settings: Training, seed: int) -> Any:
    """The model with the parameters that are to be trained."""
    if settings.method == "lora":
        try:
            import peft
        except ImportError as error:
            raise BadInput("train.method: lora needs peft; run pip install 'evolver[experts]'.") from error
        torch.manual_seed(seed)
        heads = [n for n, _ in module.named_children() if is_head(n)]
        return peft.get_peft_model(
            module,
            peft.LoraConfig(
                r=settings.rank, lora_alpha=settings.alpha, target_modules=LINEAR, modules_to_save=heads or None
            ),
        )
    return _frozen(module, settings.freeze)


def _frozen(module: Any, parts: Sequence[str]) -> Any:
    """The model, with the parameters whose names hold one of the parts staying as they are."""
    parameters = dict(module.named_parameters())
    for part in parts:
        if not any(part in name for name in parameters):
            raise BadInput(
                f"train.freeze: {part!r} is not in the name of any parameter; give a part of a name, such as "
                f"{min(parameters)}."
            )
    for name, parameter in parameters.items():
        parameter.requires_grad = not any(part in name for part in parts)
    if not any(p.requires_grad for p in parameters.values()):
        raise BadInput("train.freeze: this freezes all parameters, so that nothing can be trained; leave a part out.")
    return module


def _write(module: Any, base: Path, folder: Path) -> None:
    """Write an expert in the dtypes of its base."""
    origin = open_base(str(base), "base")
    if hasattr(module, "peft_config"):
        module.to(next(iter(origin.headers.values())).dtype).save_pretrained(folder)
        return
    dtypes = {n: i.dtype for n, i in origin.headers.items()}
    default = next(iter(dtypes.values()))
    module.config.dtype = default
    state = module.state_dict()
    known = {t.data_ptr() for n, t in state.items() if n in dtypes}
    own = {n: t for n, t in state.items() if n in dtypes or t.data_ptr() not in known}  # no second names of tied ones
    module.save_pretrained(folder, state_dict={n: t.to(dtypes.get(n, default)) for n, t in own.items()})
    if "tie_word_embeddings" in origin.config:  # as read, T5's always says true, whatever the file of its base says
        config = json.loads((folder / "config.json").read_text())
        config["tie_word_embeddings"] = origin.config["tie_word_embeddings"]
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _linked(pool: PoolConfig, name: str, target: Path) -> Path:
    """A name for people: the folder of the pool has a link to what is kept by its content."""
    link = cache() / pool.pool / name
    link.parent.mkdir(parents=True, exist_ok=True)
    temporary = link.with_name(f".{name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(target, link.parent))
    os.replace(temporary, link)
    return link


def locations(folders: Mapping[str, Path]) -> Iterator[str]:
    """Where everything lies, a line each."""
    for name, folder in folders.items():
        yield f"{name}: {folder}"
