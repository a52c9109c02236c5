"""The kinds of fields that messages, records and markers are made of: each number and each text with its bounds.

msgspec holds a decoded value to them. A bound of a float keeps NaN and infinity out, too: neither compares with it.
"""

from typing import Annotated, ClassVar

import msgspec
from weightsync.orchestrator.protocol.limits import (
    MAX_COUNT,
    MAX_ENDPOINT_BYTES,
    MAX_NAME_CHARS,
    MAX_NONCE,
    MAX_PATH_BYTES,
    MAX_REASON_CHARS,
    MAX_SECONDS,
    MAX_STEP,
    MAX_WORLD,
)
from weightsync.orchestrator.protocol.text import clean

Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)]
Reason = Annotated[str, msgspec.Meta(max_length=MAX_REASON_CHARS)]
Path = Annotated[str, msgspec.Meta(max_length=MAX_PATH_BYTES)]
Endpoint = Annotated[bytes, msgspec.Meta(max_length=MAX_ENDPOINT_BYTES)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_COUNT)]
Nonce = Annotated[int, msgspec.Meta(ge=0, le=MAX_NONCE)]
Step = Annotated[int, msgspec.Meta(ge=0, le=MAX_STEP)]
World = Annotated[int, msgspec.Meta(ge=1, le=MAX_WORLD)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=MAX_SECONDS)]
DigestWord = Annotated[int, msgspec.Meta(ge=0)]
"""64 bits: msgpack has no larger integer, and msgspec takes no larger bound."""


class Spoken(msgspec.Struct, frozen=True):
    """Base of structs with free text, the fields named in ``spoken``: cleaned in every one, composed here or decoded.

    So whatever prefixes a sentence has gathered on its way, a struct that holds it can be encoded and is taken back.
    """

    spoken: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for field in self.spoken:
            said = getattr(self, field)
            if said and (tidy := clean(said)) is not said:
                msgspec.structs.force_setattr(self, field, tidy)
