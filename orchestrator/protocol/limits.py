"""Named limits of everything that crosses a process boundary; each with its reason."""

from typing import Final

SCHEMA_VERSION: Final = 2
"""Raised when a message changes its meaning; a peer of another schema is refused at Hello."""

MAX_FRAME_BYTES: Final = 64 * 1024 * 1024
"""One message. A Kimi-K2 rank's layout is under 2 MiB; 64 MiB leaves room for a rank that holds a whole model."""

MAX_HELLO_BYTES: Final = 64 * 1024
"""The first frame, read before the peer is known: small, so that strangers cannot make us allocate."""

MAX_NAME_CHARS: Final = 512
"""Tensor, engine and run names. Hugging Face names are under 120 characters."""

MAX_REASON_CHARS: Final = 4000
"""Free text in errors; longer ones are cut, because they end in logs and in the journal."""

MAX_TENSORS: Final = 2_000_000
"""Logical tensors in one layout: 61 layers × 385 experts × 3 × 2 is 141 k for Kimi-K2."""

MAX_UNREAD: Final = 1000
"""Names of tensors that a trainer has and nobody needs: for people, who stop reading earlier."""

MAX_ROWS: Final = 4_000_000
"""Boxes in one layout."""

MAX_WORLD: Final = 65_536
"""Ranks of one trainer or one engine."""

MAX_OPEN_GRANTS: Final = 64
"""Grants that one writer may have open at once: one that runs, and those whose edge to a frozen peer never ended."""

MAX_MARKER_BYTES: Final = 64 * 1024
"""A marker is empty or a small JSON manifest."""

MAX_RANK: Final = 4
"""Dimensions of a logical tensor; lower ranks are padded with extent 1 on the left."""
