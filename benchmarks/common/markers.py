"""Tables that a command writes into a page of docs, between two markers."""

from __future__ import annotations


def replace_between(document: str, begin: str, end: str, text: str) -> str:
    """The document with this text between its markers, an empty line on both sides."""
    before, opened, rest = document.partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise ValueError(f"the document lacks the marker {end if opened else begin}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"
