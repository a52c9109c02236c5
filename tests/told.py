"""Whatever the core has sent or written is taken back by its reader as it is."""

from collections.abc import Iterable

from weightsync.orchestrator.core.commands import Accept, Append, Command, Refuse, Send, SendPlan, WriteMarker
from weightsync.orchestrator.core.records import decode_record, encode_record
from weightsync.orchestrator.protocol.codec import decode_from_daemon, encode
from weightsync.orchestrator.protocol.markers import decode_manifest, encode_manifest, manifest
from weightsync.orchestrator.protocol.messages import FromDaemon


def round_trip(commands: Iterable[Command]) -> None:
    """Each message, record and marker of ``commands``, encoded and decoded again."""
    for command in commands:
        match command:
            case Send(message=message):
                _message(message)
            case SendPlan(connect=message) | Accept(welcome=message) | Refuse(refused=message):
                _message(message)
            case Append(record=record):
                assert decode_record(encode_record(record)) == record
            case WriteMarker(version=version, facts=facts):
                said = manifest("run", version, **facts)
                assert decode_manifest(encode_manifest(said)) == said


def _message(message: FromDaemon) -> None:
    assert decode_from_daemon(encode(message)) == message
