"""Files of a tokenizer that trainers save beside an adapter, and that no version has a use for."""

from __future__ import annotations

from collections.abc import Iterable

TEMPLATES_FOLDER = "additional_chat_templates"
_NAMES = frozenset({"chat_template.json", "tokenizer.model"})
_MOST_NAMES = 5


def unused(path: str) -> tuple[str, str] | None:
    """(the adapter's folder, the file's name below it) where ``path`` is such a file; else None."""
    folder, _, name = path.rpartition("/")
    if name in _NAMES:
        return folder, name
    above, _, last = folder.rpartition("/")
    if last == TEMPLATES_FOLDER and name.endswith(".jinja"):
        return above, f"{last}/{name}"
    return None


def is_unused(name: str) -> bool:
    """Whether ``name``, below the adapter's folder, is that of such a file."""
    return unused(name) == ("", name)


def ignored_unused(names: Iterable[str]) -> str:
    """The warning about them."""
    listed = sorted(names)
    shown = ", ".join(name[:120] for name in listed[:_MOST_NAMES])
    more = f" and {len(listed) - _MOST_NAMES} more" if len(listed) > _MOST_NAMES else ""
    return (
        f"{shown}{more} ignored: a version has one chat template, that of chat_template.jinja or"
        " tokenizer_config.json, and reads with the base's tokenizer"
    )
