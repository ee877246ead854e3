"""The emotion sets of the pools: raw files to texts with one of six labels.

Four of the five in-domain sets of "Knowledge Fusion By Evolving Weights of Language Models" (Du et al., Findings of
ACL 2024): DailyDialog, CrowdFlower, TEC and ISEAR; two of its five sets out of domain, EmoInt and AffectiveText,
and two more.
"""

from __future__ import annotations

import csv
import json
import re
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

LABELS = ("anger", "disgust", "fear", "joy", "sadness", "surprise")  # Ekman 1992
NAMES = {
    "happiness": "joy", "happy": "joy", "fun": "joy", "enthusiasm": "joy", "love": "joy", "relief": "joy",
    "hate": "anger", "worry": "fear", "angry": "anger", "sad": "sadness", "optimism": "joy",
}  # fmt: skip
Example = tuple[str, str]


def tec(data: Path) -> Iterator[Example]:
    """Tweets whose hashtag named the emotion."""
    for line in (data / "tec/Jan9-2012-tweets-clean.txt").read_text(encoding="utf-8").splitlines():
        match = re.fullmatch(r"\d+:\t(.*?)\s*:: (\w+)\s*", line)
        if match:
            yield match[1], match[2]


def crowdflower(data: Path) -> Iterator[Example]:
    """Tweets that crowd workers judged."""
    with (data / "crowdflower/text_emotion.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield row["content"], row["sentiment"]


def isear(data: Path) -> Iterator[Example]:
    """Situations that people remembered."""
    text = (data / "isear/isear.csv").read_text(encoding="utf-8", errors="replace")
    for row in csv.DictReader(text.splitlines(), delimiter="|"):
        said = row.get("SIT") or ""
        if "no response" not in said.lower():
            yield said.replace("á", " "), row["Field1"]


def dailydialog(data: Path) -> Iterator[Example]:
    """Utterances of written dialogues that bear an emotion."""
    with zipfile.ZipFile(data / "dailydialog/data.zip") as archive:
        dialogues = json.loads(archive.read("data/dialogues.json"))
    for dialogue in dialogues:
        for turn in dialogue["turns"]:
            yield turn["utterance"], turn.get("emotion", "")


def goemotions(data: Path) -> Iterator[Example]:
    """Comments on Reddit with exactly one of the six."""
    names = (data / "goemotions/ekman/labels.txt").read_text().split()
    for line in (data / "goemotions/ekman/test.tsv").read_text(encoding="utf-8").splitlines():
        text, labels, _ = line.split("\t")
        if "," not in labels:
            yield text, names[int(labels)]


def emoint(data: Path) -> Iterator[Example]:
    """Tweets of clear intensity, of all three parts; one rated for several emotions has the strongest."""
    rated = []
    for path in [p for kind in ("*gold.txt", "*train.txt") for p in sorted((data / "emoint").rglob(kind))]:
        for line in path.read_text(encoding="utf-8").splitlines():
            parts = line.split("\t")
            if len(parts) == 4 and re.fullmatch(r"[01]\.\d+", parts[3]) and float(parts[3]) >= 0.5:
                rated.append((float(parts[3]), parts[1], parts[2]))
    for _, text, label in sorted(rated, key=lambda row: -row[0]):  # of equal texts the first is kept
        yield text, label


def affectivetext(data: Path) -> Iterator[Example]:
    """Headlines, with the emotion that six annotators found strongest on average."""
    root = ElementTree.fromstring((data / "affectivetext/affectivetext_test.xml").read_text(encoding="utf-8"))
    texts = {node.get("id"): node.text or "" for node in root}
    totals: dict[str, list[float]] = {}
    for path in sorted((data / "affectivetext/Annotations").glob("*.txt")):
        for line in path.read_text().splitlines():
            parts = line.split()
            if len(parts) >= 7 and parts[0] in texts:
                held = totals.setdefault(parts[0], [0.0] * 6)
                totals[parts[0]] = [a + float(b) for a, b in zip(held, parts[1:7], strict=True)]
    for name, values in totals.items():
        if max(values) > 0 and sorted(values)[-1] > sorted(values)[-2]:
            yield texts[name], LABELS[values.index(max(values))]


def tweeteval(data: Path) -> Iterator[Example]:
    """Tweets of SemEval 2018."""
    folder = data / "tweeteval/emotion"
    names = dict(line.split("\t") for line in (folder / "mapping.txt").read_text().splitlines() if line.strip())
    texts = (folder / "test_text.txt").read_text(encoding="utf-8").splitlines()
    labels = (folder / "test_labels.txt").read_text().split()
    for text, label in zip(texts, labels, strict=True):
        yield text, names[label]


IN_DOMAIN: dict[str, Callable[[Path], Iterator[Example]]] = {
    "tec": tec, "crowdflower": crowdflower, "isear": isear, "dailydialog": dailydialog,
}  # fmt: skip
OUT_OF_DOMAIN: dict[str, Callable[[Path], Iterator[Example]]] = {
    "goemotions": goemotions, "emoint": emoint, "affectivetext": affectivetext, "tweeteval": tweeteval,
}  # fmt: skip


def examples(read: Callable[[Path], Iterator[Example]], data: Path) -> Iterator[dict[str, str]]:
    """The texts of a set that have one of the six labels, tidied."""
    for text, label in read(data):
        label = NAMES.get(label.lower(), label.lower())
        tidy = " ".join(text.split())
        if label in LABELS and tidy:
            yield {"text": tidy, "label": label}
