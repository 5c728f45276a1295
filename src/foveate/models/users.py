"""A model of the user's, made by a function that is named as package.module:function."""

from __future__ import annotations

import importlib
import traceback
from typing import Any

from foveate.types import InputError


def made_by(name: str, expected: str, *arguments: Any) -> Any:
    """What the function `name` gives for the arguments; its module is imported, so that its code runs.

    Args:
        name: "package.module:function".
        expected: what may stand in its place, for the message.
        *arguments: of the function.

    Raises:
        InputError: no such module or function, or one that raises; the message then names the line of its file.
    """
    where, _, which = name.partition(":")
    try:
        function = getattr(importlib.import_module(where), which)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"model: {name!r} is not found ({error}); expected {expected}; is it on PYTHONPATH?"
        ) from error
    except Exception as error:
        raise InputError(f"model: {name!r} is not found, as {where} {_told(error)}; correct it") from error
    try:
        return function(*arguments)
    except InputError:
        raise
    except Exception as error:
        call = f"{which}({', '.join(map(repr, arguments))})"
        raise InputError(f"model: {name}, called as {call}, {_told(error)}; correct it") from error


def _told(error: Exception) -> str:
    """What was raised, and the line of the user's file that leads there; none if it is our call that does not fit."""
    ours = __file__, importlib.__file__
    frames = [each for each in traceback.extract_tb(error.__traceback__) if each.filename not in ours]
    places = [f" ({each.filename}, line {each.lineno})" for each in frames if not each.filename.startswith("<")]
    return f"raises {type(error).__name__}: {' '.join(str(error).split())}{''.join(places[:1])}"
