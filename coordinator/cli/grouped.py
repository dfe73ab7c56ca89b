"""Options that belong together, declared once as a dataclass and taken by any number of commands.

Typer reads a command's options from its signature and has no groups of its own (its maintainers:
repeat them, or write a decorator). This is that decorator: a parameter whose type is a dataclass
stands for all the fields of that class, each an option or argument with its default.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_type_hints


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer is to see it: fields in place of the dataclasses that hold them."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if is_dataclass(parameter.annotation)
    }

    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{each.name: values.pop(each.name) for each in fields(group)})
        command(**values)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, __name__
    run.__annotations__ = {}  # Typer would look their names up here; the signature has them
    run.__signature__ = signature.replace(parameters=list(_flat(signature)))  # type: ignore[attr-defined]
    return run


def _flat(signature: inspect.Signature) -> Iterator[inspect.Parameter]:
    for parameter in signature.parameters.values():
        group = parameter.annotation
        if not is_dataclass(group):
            yield parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            continue
        hints = get_type_hints(group, include_extras=True)
        for each in fields(group):
            yield inspect.Parameter(
                each.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=_default_of(each),
                annotation=hints[each.name],
            )


def _default_of(each: Field[Any]) -> Any:
    return inspect.Parameter.empty if each.default is MISSING else each.default
