"""Image classifiers, scored on images and labels."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evolver.config.evaluation import DataSet, TaskEntry
from evolver.errors import BadInput, cause_of, refuse_special
from evolver.evaluation.base import AskedItem, ItemText, Scored, judge
from evolver.evaluation.batches import Batches, PreparedParts, by_length
from evolver.evaluation.blueprint import ModelFolder
from evolver.evaluation.data import Row
from evolver.evaluation.examples import Example
from evolver.evaluation.items import Item
from evolver.evaluation.judges.classifier import (
    LabelledRows,
    Seen,
    TextQuestion,
    by_head,
    label_text,
    named_metric,
    right_answer,
    take_in,
)
from evolver.evaluation.live import LiveModel
from evolver.evaluation.scores.metrics import VALUE, Metric
from evolver.storage.paths import expand

# Images of a forward pass where no batch size is given.
BATCH = 32


@judge("image-classifier", "data", "select_data", "report_data", "image", "label", "threshold", "head")
class Images(LabelledRows):
    """The judge of data sets of images: files by path, or the images of a Parquet file or a data set."""

    def check_model(self, model: ModelFolder | None, asked: Sequence[AskedItem]) -> None:
        """See ``ChecksModel``: a base needs what scales its images."""
        if model is not None:
            _processor(model.folder)

    def columns(self, entry: TaskEntry) -> list[str]:
        return [entry.image, entry.label]

    def prepare(self, rows: list[Row], entry: TaskEntry, data: str | DataSet, key: str) -> list[Row]:
        folder = Path(expand(data)).parent if isinstance(data, str) else Path()
        kept = [{**row, entry.image: _encoded(row[entry.image], folder, key)} for row in rows]
        for number, row in enumerate(kept, 1):
            _check(row[entry.image], f"{key}: the image of row {number}")
        return kept

    def content(self, row: Row, entry: TaskEntry) -> Any:
        return [row[entry.image].hex(), row[entry.label]]

    def metric(self, entry: TaskEntry) -> Metric:
        return named_metric(entry, self.named[entry.task])

    def right(self, asked: AskedItem) -> float:
        return right_answer(self.row(asked)[asked.entry.label], self._spaces.of(asked.entry), asked.entry)

    def scorer(self, model: LiveModel, asked: Sequence[AskedItem], scored: Iterable[Item]) -> ImageScorer:
        spaces = self._spaces
        questions = [
            TextQuestion(a.entry, (), self.right(a), spaces.head(a.entry), spaces.names(a.entry)) for a in asked
        ]
        images = [self.row(a)[a.entry.image] for a in asked]
        return ImageScorer(model, questions, images, self.settings.batch_size or BATCH, spaces.seen_of(model))

    def probable(self, entry: TaskEntry) -> bool:
        """See ``Probable``."""
        return entry.metric not in VALUE

    def show(self, asked: AskedItem) -> ItemText:
        """See ``Shows``: a report holds no images, so it says which one it is."""
        right = label_text(self.right(asked), asked.entry, self._spaces.names(asked.entry))
        return ItemText(f"the image of row {asked.item.index + 1} of {asked.item.task.partition(':')[2]}", right)


class ImageScorer:
    """Images of one size, side by side; each is decoded and scaled once."""

    def __init__(
        self, model: LiveModel, questions: Sequence[TextQuestion], images: Sequence[bytes], most: int, seen: Seen
    ) -> None:  # fmt: skip
        self.model, self.questions, self._images, self._most, self._seen = model, questions, images, most, seen
        self._processor = _processor(model.folder)
        self._mode = "L" if getattr(model.module.config, "num_channels", 3) == 1 else "RGB"
        self._ready: PreparedParts[Batches[Tensor]] = PreparedParts()

    def score(self, places: Sequence[int]) -> Scored:
        return by_head(self.model, self.questions, places, self._score)

    def _score(self, places: Sequence[int]) -> Scored:
        key = tuple(places)
        if key not in self._ready:
            keys = by_length(dict.fromkeys(places, 1), self._most)
            self._ready[key] = Batches(keys, self._pixels)
        out = Scored(tokens=len(places))
        for numbers, logits in self._ready[key].run(self._forward):
            take_in(out, self.questions, numbers, self._seen(logits))
        return out

    def examples(self, places: Sequence[int]) -> Iterator[Example]:
        """See ``GivesExamples``."""
        for place in places:
            question, pixels = self.questions[place], self._pixels([place])
            there = pixels.to(self.model.device, self.model.module.dtype)
            yield Example({"pixel_values": there}, question.observed(), question.head)

    @torch.inference_mode()
    def _forward(self, pixels: Tensor) -> Tensor:
        """Logits (rows, labels)."""
        there = pixels.to(self.model.device, self.model.module.dtype)
        logits: Tensor = self.model.forward(None, pixel_values=there).logits.float()
        if not torch.isfinite(logits).all():
            raise FloatingPointError("the model's outputs are not finite")
        return logits.cpu()

    def _pixels(self, places: Sequence[int]) -> Tensor:
        """(rows, channels, height, width), kept beside the device: there may be many."""
        from PIL import Image

        images = [Image.open(io.BytesIO(self._images[p])).convert(self._mode) for p in places]
        pixels: Tensor = self._processor(images=images, return_tensors="pt")["pixel_values"]
        return pixels


def _processor(folder: Path) -> Any:
    """What scales images for the model; where torchvision is missing, Transformers takes the one of Pillow."""
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"model.base: {folder} has no image processor that can be read; save it there (preprocessor_config.json)."
        ) from error
    except ImportError as error:
        reason = " ".join(str(error).split())[:200]
        raise BadInput(f"model.base: the image processor of {folder} needs another package: {reason}") from error


def _check(image: bytes, what: str) -> None:
    from PIL import Image, UnidentifiedImageError

    try:
        Image.open(io.BytesIO(image))  # reads its head only
    except UnidentifiedImageError as error:
        raise BadInput(
            f"{what} has no known format, or is damaged; give an image in a format such as PNG or JPEG."
        ) from error


def _encoded(image: Any, folder: Path, key: str) -> bytes:
    """An image's file: of a path, of what a data set holds (bytes, or an image of PIL's)."""
    if isinstance(image, dict) and image.get("bytes"):
        return bytes(image["bytes"])
    if isinstance(image, bytes):
        return image
    path = image.get("path") if isinstance(image, dict) else image
    if isinstance(path, str):
        try:
            refuse_special(folder / expand(path))
            return (folder / expand(path)).read_bytes()
        except (OSError, ValueError) as error:
            raise BadInput(
                f"{key}: the image {path[:200]} cannot be read ({cause_of(error)}); correct the path."
            ) from error
    if hasattr(image, "save"):
        file = io.BytesIO()
        image.save(file, format="PNG")
        return file.getvalue()
    raise BadInput(f"{key}: an image is a {type(image).__name__}; give paths of image files, or encoded images.")
