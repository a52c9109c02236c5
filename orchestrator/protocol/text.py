"""Text that others wrote, made fit for logs, messages, markers and the journal: of one line, bounded, encodable."""

import re
from typing import Final

from weightsync.orchestrator.protocol.limits import MAX_REASON_CHARS

_ODD: Final = re.compile(
    # Control characters; what reorders or breaks lines without being seen; surrogates, which no encoder takes.
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


def clean(text: str, limit: int = MAX_REASON_CHARS) -> str:
    """``text`` in at most ``limit`` characters: a line break or tab is a blank, another odd character its escape.

    A byte that is no UTF-8, as Python keeps it in names of files (PEP 383), is shown as a shell would: ``\\xff``.
    """
    if len(text) > limit:
        text = text[: limit + 1]  # before anything that costs by its length
    if _ODD.search(text) is not None:
        text = _ODD.sub(_escaped, text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _escaped(found: "re.Match[str]") -> str:
    code = ord(found[0])
    if found[0].isspace():
        return " "
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
