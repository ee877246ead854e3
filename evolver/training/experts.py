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

from evolver.config import expand
from evolver.errors import BadInput
from evolver.evaluation.data import Row, read_rows
from evolver.folder import whole_folder
from evolver.merging.weights import is_head, open_base
from evolver.records import content_hash
from evolver.training.fit import fit
from evolver.training.losses import Learner, lessons_of, loss_of
from evolver.training.settings import PoolConfig, Training
from evolver.training.show import Show

# Part of an expert's identity: raise it when the training changes.
VERSION = 1
LINEAR = "all-linear"


def make_pool(pool: PoolConfig, show: Show) -> dict[str, Path]:
    """Train what is missing, and return the folders of the base and of every expert by name.

    Raises BadInput for data or models that cannot be read, or where peft is wanted and missing.
    """
    base = _base(pool)
    folders = {"base": base}
    for name in pool.experts:
        folders[name] = _expert(pool, name, base, show)
    return folders


def cache() -> Path:
    """Where experts are kept."""
    return Path(expand("$EVOLVER_CACHE")) / "experts"


def _base(pool: PoolConfig) -> Path:
    """The common ancestor: of classifiers with a head, or without one where each expert has its own."""
    if pool.kind != "classifier":
        origin = open_base(pool.base, "base")
        return _linked(pool, "base", origin.path)
    key = content_hash([VERSION, open_base(pool.base, "base").digest(), pool.labels, pool.seed])
    target = cache() / key
    if not target.exists():
        with whole_folder(target) as folder:
            module = _module(pool, Path(expand(pool.base)), pool.labels or ["0", "1"], pool.seed)
            kept = {n: t for n, t in module.state_dict().items() if pool.labels or not is_head(n)}
            module.save_pretrained(folder, state_dict=kept)
            _tokenizer(Path(expand(pool.base))).save_pretrained(folder)
    return _linked(pool, "base", target)


def _expert(pool: PoolConfig, name: str, base: Path, show: Show) -> Path:
    entry, settings = pool.experts[name], pool.training(name)
    rows = [row for file in entry.data for row in read_rows(file, f"experts.{name}.data")]
    seed = entry.seed if entry.seed is not None else pool.seed
    labels = pool.labels or (sorted({str(r[entry.label]) for r in rows}) if pool.kind == "classifier" else [])
    read = [pool.kind, pool.prompt, labels, entry.text, entry.text_pair, entry.label]
    contents = [hashlib.sha256(Path(expand(file)).read_bytes()).hexdigest() for file in entry.data]
    key = content_hash([VERSION, open_base(str(base), "base").digest(), settings.model_dump(), seed, contents, read])
    target = cache() / key
    if target.exists():
        show.say(f"{name}: there already ({target})")
    else:
        _train(pool, name, base, rows, labels, seed, target, show)
    return _linked(pool, name, target)


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
    show.begin(name, settings.steps)
    learner = Learner(module.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer)
    fit(learner, loss, lessons, settings, seed, scratch, show.step)
    record = {"items": len(lessons), "seconds": round(time.monotonic() - began), "settings": settings.model_dump()}
    with whole_folder(target) as folder:
        _write(module, base, folder)
        tokenizer.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps({"expert": name, "seed": seed, **record}, indent=1))
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
    named = {"id2label": ids, "label2id": {v: k for k, v in ids.items()}} if pool.kind == "classifier" else {}
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
    for name, parameter in module.named_parameters():
        parameter.requires_grad = not any(part in name for part in settings.freeze)
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
    module.save_pretrained(folder, state_dict={n: t.to(dtypes.get(n, default)) for n, t in module.state_dict().items()})


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
