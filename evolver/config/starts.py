"""What a search begins with: models that the user names, beside those that the search chooses itself."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from evolver.config.section import Section

# Models that are scored as baselines anyhow, and merges that are guessed from the experts before the search.
PriorWord = Literal["nan", "relevance", "depth", "clusters", "mwa", "cocktail", "greedy"]
Word = Literal["experts", "average", "masses"] | PriorWord
PRIORS: tuple[PriorWord, ...] = get_args(PriorWord)
# Those for which the experts have to be scored first.
RATED: tuple[PriorWord, ...] = ("mwa", "cocktail", "greedy")
WORDS = ("experts", "average", "masses", *PRIORS)
FILES = ("recipe", "run", "mergekit")


class StartFile(Section):
    """One model that a search begins with, from a file."""

    recipe: str | None = Field(None, description="path of a recipe.json, such as that of an exported model")
    run: str | None = Field(None, description="folder of a finished run, whose winner the search begins with")
    mergekit: str | None = Field(None, description="path of a mergekit file that merges experts of this configuration")

    @property
    def place(self) -> tuple[str, str]:
        """The kind of file, and where it is."""
        return next((key, value) for key in FILES if (value := getattr(self, key)) is not None)


def start_proposer(name: str) -> str:
    """What is noted as the proposer of a model that a search begins with: a word of ``start``, or a kind of file."""
    return f"start ({name})"


def start_of(proposer: str) -> str | None:
    """The inverse; None for what a search has proposed."""
    name = proposer.removeprefix("start (").removesuffix(")")
    return name if proposer == start_proposer(name) else None
