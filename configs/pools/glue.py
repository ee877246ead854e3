"""Four tasks of GLUE (Wang et al. 2019): raw files to texts, or pairs of texts, with a label.

The items for testing are the public validation sets of RTE and CoLA (in domain) and the test sets of MRPC and SST-2;
SST-2 is that of whole sentences (6,920 for training), not GLUE's of phrases.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

Row = dict[str, str]


def cola(data: Path, split: str) -> Iterator[Row]:
    """Is this a sentence of English?"""
    for line in lines(data / "glue-cola" / f"in_domain_{'train' if split == 'train' else 'dev'}.tsv"):
        _, label, _, text = line.split("\t")
        yield {"text": text, "label": "acceptable" if label == "1" else "unacceptable"}


def sst2(data: Path, split: str) -> Iterator[Row]:
    """Does the reviewer like the film?"""
    for line in lines(data / "sentconv6" / f"stsa.binary.{split}"):
        yield {"text": line[2:], "label": "positive" if line[0] == "1" else "negative"}


def mrpc(data: Path, split: str) -> Iterator[Row]:
    """Do the two sentences say the same?"""
    for row in table(data / "glue-mrpc" / f"msr_paraphrase_{split}.txt"):
        label = "equivalent" if row["Quality"] == "1" else "different"
        yield {"text": row["#1 String"], "text_pair": row["#2 String"], "label": label}


def rte(data: Path, split: str) -> Iterator[Row]:
    """Does the second sentence follow from the first? Every fifth item for training is one for testing here: the
    validation set alone, of 277, is too small to show what such a model learns of it.
    """
    train, dev = (list(table(data / "glue-rte" / f"{name}.tsv")) for name in ("train", "dev"))
    for row in [r for n, r in enumerate(train) if n % 5] if split == "train" else [*dev, *train[::5]]:
        yield {"text": row["sentence1"], "text_pair": row["sentence2"], "label": row["label"]}


TASKS: dict[str, Callable[[Path, str], Iterator[Row]]] = {"sst2": sst2, "mrpc": mrpc, "rte": rte, "cola": cola}


def lines(path: Path) -> list[str]:
    """The lines of a file that are not empty; some of these files are not UTF-8."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return [line for line in text.split("\n") if line.strip()]


def table(path: Path) -> Iterator[Row]:
    """Rows of tab-separated values without quotes."""
    for row in csv.DictReader(lines(path), delimiter="\t", quoting=csv.QUOTE_NONE):
        if None not in row.values() and None not in row:
            yield row
