"""What the schemas of requests share: the settings of all models, and numbers as clients write
them."""

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

_EXACT = 2**53
"""Bound below which every whole number is exact as a float."""
_NUMBER = r"-?[0-9]{1,20}(\.[0-9]{1,20})?"


class Body(BaseModel):
    """A JSON object of a request."""

    model_config = ConfigDict(
        extra="ignore", strict=True, allow_inf_nan=False, frozen=True, hide_input_in_errors=True
    )


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT else value


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and re.fullmatch(_NUMBER, value) else value


Ignored = Annotated[object, Field(exclude=True)]
"""Any value, as deep as it likes, which is not written again where a body is."""
Whole = Annotated[int, BeforeValidator(_whole)]
"""An integer; JSON writes 20 and 20.0 for the same number."""
Bias = Annotated[
    float,
    BeforeValidator(_number),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string", "pattern": f"^{_NUMBER}$"}]}),
]
"""A number, or a text of one, as some clients write the values of `logit_bias`."""
