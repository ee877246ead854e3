"""What a search begins with: models that the user names, beside those that the search chooses itself."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evolver.config.section import Section

Word = Literal["experts", "average", "masses"]
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
