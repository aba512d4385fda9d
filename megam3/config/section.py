"""What every section of a recipe is: strict, immutable, described by the docstrings below its fields."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""What fits an int64 tensor, where seeds are hashed."""


class Section(BaseModel):
    """Base of every section: strict types, no unknown keys, no infinite number or NaN, immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
