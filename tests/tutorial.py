"""The commands of docs/tutorial.md, as a reader in a clone of the repository types them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"
PLACES = ("/tmp/weightsync-demo", "/tmp/weightsync-by-hand", "/tmp/rounds.html")
"""Where it writes to outside of the clone."""


def blocks() -> list[str]:
    """The fenced blocks of commands, in their order."""
    return re.findall(r"^```bash\n(.*?)^```$", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)
