"""Tables inside of ``env.args``: types, bounds, and unknown keys answered with the nearest one."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from veneer.types import ConfigError

S = TypeVar("S", bound="Spec")


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def read_specs(kind: type[S], table: Any, key: str) -> list[S]:
    """A list of tables. ``key``: where it stands in the configuration.

    Raises:
        ConfigError: names the key and what is wrong.
    """
    try:
        return TypeAdapter(list[kind]).validate_python(table)  # pyright: ignore[reportInvalidTypeForm]
    except ValidationError as error:
        raise ConfigError(_explain(kind, error, key)) from error


def _explain(kind: type[Spec], error: ValidationError, key: str) -> str:
    """One complaint in one line: of an unknown key first, because the right one is then missing."""
    complaints = error.errors(include_input=False)  # what was put in may be a secret
    first = next((c for c in complaints if c["type"] == "extra_forbidden"), complaints[0])
    path = key + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return f"{path}: {first['msg'][0].lower()}{first['msg'][1:]}"
    *parents, wrong = (part for part in first["loc"] if isinstance(part, str))
    model: type[BaseModel] = kind
    for parent in parents:
        model = _model_in(model.model_fields[parent].annotation) or model
    near = difflib.get_close_matches(wrong, model.model_fields, n=1, cutoff=0.5)
    return f"unknown key {path}; " + (f"did you mean {near[0]!r}?" if near else f"keys are {', '.join(model.model_fields)}")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model of a key, of a list of it, or of one that may be missing."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for inner in get_args(annotation) if (model := _model_in(inner))), None)
