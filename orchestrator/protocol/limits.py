"""Named limits of everything that crosses a process boundary; each with its reason."""

from typing import Final

SCHEMA_VERSION: Final = 6
"""Raised when a message changes its meaning; a peer of another schema is refused at Hello."""

MAX_FRAME_BYTES: Final = 64 * 1024 * 1024
"""One message. A Kimi-K2 rank's layout is under 2 MiB; 64 MiB leaves room for a rank that holds a whole model."""

MAX_HELLO_BYTES: Final = 64 * 1024
"""The first frame, read before the peer is known: small, so that strangers cannot make us allocate."""

MAX_NAME_CHARS: Final = 512
"""Tensor, engine and run names. Hugging Face names are under 120 characters."""

MAX_REASON_CHARS: Final = 4000
"""Free text in errors; longer ones are cut, because they end in logs and in the journal."""

MAX_COUNT: Final = 2**53
"""Counts, sequences, bytes, epochs: what JSON, and every reader that takes its numbers for floats, holds exactly."""

MAX_FOREIGN_EPOCH: Final = 2**52
"""An epoch of another daemon that an agent may claim to have obeyed. We go above it, and each of our own starts one
further: from here on MAX_COUNT is out of reach."""

MAX_NONCE: Final = 2**63 - 1
"""Incarnations and generations: random numbers of up to 63 bits."""

MAX_STEP: Final = 10**18 - 1
"""18 digits, as the names of step directories have them."""

MAX_SECONDS: Final = 1e9
"""Durations: 31 years."""

MAX_ENDPOINT_BYTES: Final = 16 * 1024 * 1024
"""How a transport reaches an agent: NIXL's metadata have some hundred bytes per region and device, 4 MB for 4096."""

MAX_NET_DEVICES: Final = 64
"""Network devices that agents are told to use; a host has a dozen."""

MAX_DEVICE: Final = 4095
"""Number of a device in its host."""

MAX_PATH_BYTES: Final = 4096
"""Linux' PATH_MAX."""

MAX_TENSORS: Final = 2_000_000
"""Logical tensors in one layout: 61 layers × 385 experts × 3 × 2 is 141 k for Kimi-K2."""

MAX_UNREAD: Final = 1000
"""Names of tensors that a trainer has and nobody needs: for people, who stop reading earlier."""

MAX_LEFT_OUT: Final = 1000
"""Names of tensors that an engine's rank leaves out, over all reasons; for people, too. A rank with an eighth of
Kimi-K2's experts needs nothing of 120 k tensors."""

MAX_LEFT_OUT_REASONS: Final = 64
"""Reasons by which one rank leaves tensors out; a dozen are known."""

MAX_LEFT_OUT_CHARS: Final = 400
"""Of one such reason, which may be the text of a kernel's error."""

MAX_LANDS_CHARS: Final = 600
"""Of why an engine's rank lands as it does: two reasons, each of which may be the text of a driver's error."""

MAX_FINDINGS: Final = 24
"""What one agent says that is wrong around it; of a whole host with eight ports a dozen are known."""

MAX_FINDING_CHARS: Final = 600
"""Of the evidence for one of them: it may list a host's ports …"""

MAX_FINDING_FIX_CHARS: Final = 300
"""… of what to do about it …"""

MAX_FINDING_CHECK_CHARS: Final = 100
"""… and of what was looked at."""

MAX_ROWS: Final = 4_000_000
"""Boxes in one layout."""

MAX_WORLD: Final = 65_536
"""Ranks of one trainer or one engine."""

MAX_SERVERS: Final = 64
"""API servers of one engine: one for each node, or for each data-parallel rank."""

MAX_URL_CHARS: Final = 2048
"""Of an engine's server."""

MAX_OPEN_GRANTS: Final = 64
"""Grants that one writer may have open at once: one that runs, and those whose edge to a frozen peer never ended."""

MAX_MARKER_BYTES: Final = 64 * 1024
"""A marker is empty or a small JSON manifest."""

MAX_RANK: Final = 4
"""Dimensions of a logical tensor; lower ranks are padded with extent 1 on the left."""

MAX_DIMENSIONS: Final = 64
"""Of a shape that is read at all, so that one with more than MAX_RANK is refused with the tensor's name."""
