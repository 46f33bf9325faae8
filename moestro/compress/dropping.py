"""What a model's file holds and its code does not load, such as layers for multi-token prediction: it goes only where it is named."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatch

from moestro.core.errors import CoverageError, InputError
from moestro.core.layer import ModelFacts
from moestro.models.layout import Layout

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def lost_tensors(dropped: Iterable[str], layout: Layout, *, reshaped: bool = False) -> set[str]:
    """The tensors that will be left out: those that the model does not load and that a pattern names.

    reshaped: whether the number or the width of experts changes, on which multi-token-prediction layers depend. Raises CoverageError when
    one of these would be lost and none names it, or only a part of them is named, InputError for a pattern that names nothing.
    """
    dropped = tuple(dropped)
    for pattern in dropped:
        if not any(fnmatch(name, pattern) for name in layout.ignored):
            raise InputError(
                f"no tensor that may be dropped is called {pattern!r}",
                expected=f"one of {len(layout.ignored)}, such as {layout.ignored[0]}"
                if layout.ignored
                else "nothing: the model loads all",
                fix="leave out --drop" if not layout.ignored else "name what the model does not load; all else has to stay",
            )
    lost = {name for name in layout.ignored if any(fnmatch(name, pattern) for pattern in dropped)}
    extra = [name for name in layout.ignored if predicts(name, layout.facts)]
    if (left := [name for name in extra if name not in lost]) and (reshaped or len(left) < len(extra)):
        raise CoverageError(
            f"{len(left)} tensors that the model does not load have experts of their own and would not fit, such as {left[0]}"
            if reshaped
            else f"{len(left)} tensors of layers for multi-token prediction would stay without the others, such as {left[0]}",
            expected="the decoder's layers only",
            fix=f"allow their loss: moestro plan METHOD MODEL --drop '{pattern_of(left[0])}'",
        )
    return lost


def predicts(name: str, facts: ModelFacts) -> bool:
    """Whether a tensor that is not loaded belongs to layers that predict tokens after the next."""
    return layer_of(name) >= facts.decoder_layers or "mtp" in name


def layer_of(name: str) -> int:
    """The decoder layer a tensor belongs to, or -1."""
    found = _LAYER.search(name)
    return int(found[1]) if found else -1


def pattern_of(name: str) -> str:
    """What names a tensor's whole layer, or itself."""
    found = _LAYER.search(name)
    return f"{name[: found.end()]}*" if found else name
