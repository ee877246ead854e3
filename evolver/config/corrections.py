"""Methods that every merge of a search goes through: the entries of ``search.after``."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from evolver.config.section import Section


class AfterSettings(Section):
    """A method that every merge of the search goes through, such as `aim`, `lines` or `subspace_boosting`."""

    method: str = Field(description="merge method, which gets the merged model alone")
    tune: list[str] | None = Field(
        None, description="names of the settings to tune; default: all numbers but lambda and weight"
    )
    settings: dict[str, Any] = Field(
        default_factory=dict, description="fixed settings of the method, in the forms of search.settings"
    )
