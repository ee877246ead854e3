"""The files beside the weights of merged models: tokenizer, chat template, settings of generation."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from evolver.checkpoints.chat import CHAT_FILE, GENERATION_FILE, SPECIAL_FILE, TOKENIZER_SETTINGS, Chat, update_json
from evolver.checkpoints.weights import TOKENIZER_FILE, read_json
from evolver.merging.mergekit.vocabulary import Vocabulary, extend_tokenizer, with_vocabulary

# What a model folder has besides weights, and what goes with the tokenizer that was chosen. What else the base's folder
# may have is told by ``merging.export.beside_of``.
TOKENIZER = (
    CHAT_FILE, TOKENIZER_FILE, TOKENIZER_SETTINGS, "vocab.json", "merges.txt", "vocab.txt",
    SPECIAL_FILE, "added_tokens.json", "tokenizer.model", "spiece.model", "preprocessor_config.json",
    "sentencepiece.bpe.model", "source.spm", "target.spm", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.json", "tekken.json",
)  # fmt: skip
COMPANIONS = (GENERATION_FILE, *TOKENIZER)


@dataclass(frozen=True)
class CommonTokens:
    """The tokens of merged models, where those of the models differ.

    Attributes:
        target: all tokens and their rows.
        folder: of the model whose tokenizer is extended by the tokens that it lacks.
        donors: the folders of all models, by name.
    """

    target: Vocabulary
    folder: Path
    donors: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Companions:
    """The files that a model's folder has beside its weights, with what a run changes in them.

    Attributes:
        folder: whose files they are.
        chat: the chat template and stop tokens that take the place of those in ``folder``; None: its own.
        tokens: the tokens that take the place of those in ``folder``; None: its own.
    """

    folder: Path
    chat: Chat | None = None
    tokens: CommonTokens | None = None

    @property
    def changed(self) -> bool:
        """Whether they are others than those in ``folder``."""
        return self.chat is not None or self.tokens is not None

    def write(self, target: Path) -> None:
        """Write the files into the folder of a model, which holds its config.json already, with the tokens' numbers."""
        origin = self.folder if self.tokens is None else self.tokens.folder
        for name in COMPANIONS:
            if (origin / name).exists():
                shutil.copyfile(origin / name, target / name)
        if self.tokens is not None:
            extend_tokenizer(target, self.tokens.target, self.tokens.donors)
        if self.chat is not None:
            self.chat.write(target)

    def dress(self, model: Path, target: Path) -> Path:
        """Show a model with these files: ``target`` becomes a folder of links to its own files, and of these.

        Returns ``target``.
        """
        target.mkdir(parents=True)
        for file in model.iterdir():
            if file.is_file() and file.name not in (*COMPANIONS, "config.json"):
                (target / file.name).symlink_to(file.resolve())
        self._show(model, target)
        return target

    @contextlib.contextmanager
    def shown(self) -> Iterator[Path]:
        """A folder that holds the files, and config.json, as long as the context lasts: ``folder`` itself where nothing
        is changed, else a temporary one.
        """
        if not self.changed:
            yield self.folder
            return
        with tempfile.TemporaryDirectory(prefix="evolver-companions-") as place:
            self._show(self.folder, Path(place))
            yield Path(place)

    def _show(self, model: Path, target: Path) -> None:
        """Write the files, and the config.json of a model as it is with the tokens."""
        shutil.copyfile(model / "config.json", target / "config.json")
        if self.tokens is not None:
            config = read_json(target / "config.json", str(target))
            update_json(target / "config.json", with_vocabulary(config, self.tokens.target))
        self.write(target)
