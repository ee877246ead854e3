"""What all sections of a configuration have in common, and the forms of texts in them."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ConfigDict

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
FUNCTION = r"^.+\.py:[A-Za-z_]\w*$"


class Section(BaseModel):
    """A part of the configuration. It cannot be changed, refuses unknown keys, and never converts types silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


SectionType = TypeVar("SectionType", bound=Section)
