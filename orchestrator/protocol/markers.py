"""Markers: the durable, human-readable edge between trainer and daemon in the run directory.

``<run directory>/broadcasts/step_<N>/`` holds up to four: ``STABLE`` from the trainer, and ``TRANSFER_READY``,
``COMMITTED``, ``FAILED`` from the daemon. Each is empty (as ``touch`` makes it) or one JSON manifest.
"""

import re
from typing import Annotated, Final, Literal

import msgspec
from weightsync.orchestrator.protocol.fields import Count, Name, Nonce, Reason, Spoken, Step
from weightsync.orchestrator.protocol.limits import MAX_MARKER_BYTES, MAX_NAME_CHARS, MAX_REASON_CHARS, SCHEMA_VERSION
from weightsync.orchestrator.protocol.names import Version
from weightsync.orchestrator.protocol.text import clean

MarkerKind = Literal["STABLE", "TRANSFER_READY", "COMMITTED", "FAILED"]

KINDS: Final[tuple[MarkerKind, ...]] = ("STABLE", "TRANSFER_READY", "COMMITTED", "FAILED")
OUTCOMES: Final[tuple[MarkerKind, ...]] = ("COMMITTED", "FAILED")
BROADCASTS: Final = "broadcasts"

MAX_ENGINES_CHARS: Final = MAX_MARKER_BYTES // 2
"""Of all engines' names together; the rest of a marker has as much again."""

_TEXTS: Final = {"reason": MAX_REASON_CHARS, "engines": MAX_ENGINES_CHARS}

_STEP = re.compile(r"step_(0|[1-9][0-9]{0,17})", re.ASCII)


class MarkerError(ValueError):
    """A marker whose contents are not a manifest of this schema. Its writer's fault; not to be retried."""


class Manifest(Spoken, frozen=True, kw_only=True, omit_defaults=True):
    """What a marker says. Beyond the version, each where it applies: how often it was ``restaged`` after it had FAILED,
    the commit's ``sequence``, ``round`` and ``digest`` as text, the fingerprint of the ``plan``, the names of the
    ``engines``, the ``reason`` of a failure."""

    schema: Count
    run_id: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME_CHARS)]
    generation: Nonce
    step: Step
    restaged: Count = 0
    sequence: Count = 0
    round: Name = ""
    digest: Name = ""
    plan: Name = ""
    engines: Annotated[str, msgspec.Meta(max_length=MAX_ENGINES_CHARS)] = ""
    reason: Reason = ""
    spoken = ("reason",)

    @property
    def version(self) -> Version:
        """The version it speaks of."""
        return Version(self.generation, self.step)


_decoder = msgspec.json.Decoder(Manifest)


def manifest(run_id: str, version: Version, **facts: str | int | float) -> Manifest:
    """A Manifest of this schema; ``facts`` are its optional fields, reason and engines cut to their limits.

    Raises:
        MarkerError: a fact that is no field, or does not fit it.
    """
    unknown = facts.keys() - set(Manifest.__struct_fields__)
    if unknown:
        raise MarkerError(f"a manifest has no {', '.join(sorted(unknown))}")
    fields = {"schema": SCHEMA_VERSION, "run_id": run_id, "generation": version.generation, "step": version.step}
    for name, limit in _TEXTS.items():
        if name in facts:
            facts[name] = clean(str(facts[name]), limit)
    try:
        return msgspec.convert({**facts, **fields}, Manifest)
    except msgspec.ValidationError as error:
        raise MarkerError(f"no manifest can say this: {error}") from error


def step_name(step: int) -> str:
    """Name of the directory of ``step``.

    Raises:
        ValueError: negative, or more than 18 digits.
    """
    name = f"step_{step}"
    if parse_step(name) is None:
        raise ValueError(f"a step must have 1 to 18 digits, got {step}")
    return name


def parse_step(name: str) -> int | None:
    """The step that a directory is named after, or None when it is named otherwise."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of a marker, one JSON object and a newline.

    Raises:
        MarkerError: longer than MAX_MARKER_BYTES.
    """
    data = msgspec.json.encode(manifest) + b"\n"
    if len(data) > MAX_MARKER_BYTES:
        raise MarkerError(f"a manifest of {len(data)} bytes exceeds the limit of {MAX_MARKER_BYTES}")
    return data


def decode_manifest(data: bytes) -> Manifest | None:
    """The manifest in a marker's bytes, or None for an empty marker.

    Raises:
        MarkerError: too long, torn, no JSON object of the right shape, or of another schema.
    """
    if len(data) > MAX_MARKER_BYTES:
        raise MarkerError(f"it has more than {MAX_MARKER_BYTES} bytes")
    if not data.strip():
        return None
    try:
        found = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MarkerError(f"it holds no whole manifest: {error}") from error
    if found.schema != SCHEMA_VERSION:
        raise MarkerError(f"its schema is {found.schema}, this daemon reads {SCHEMA_VERSION}")
    return found
