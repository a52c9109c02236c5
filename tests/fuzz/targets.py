"""Every parser that a stranger, a peer or a neighbour on the file system reaches, with what it may raise.

``feed`` takes bytes and returns whether they were accepted; what is refused by the parser's own error was not. Anything
else that is raised is a bug. ``seeds`` are right, made by the code itself; those in ``corpus/NAME/`` once were not.
"""

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path

import msgspec
from fleets import ANNOUNCE, policy_for
from settings_files import MINIMAL
from told import round_trip
from websockets.frames import CloseCode
from websockets.protocol import Side
from weightsync.agents.link.token import read_token
from weightsync.agents.transport.nixl import card as cards
from weightsync.agents.transport.nixl import notices
from weightsync.agents.transport.nixl.errors import MetadataError
from weightsync.orchestrator.core.errors import JournalUnreadable, PeerMisbehaved
from weightsync.orchestrator.core.events import AgentConnected, AgentSaid
from weightsync.orchestrator.core.machine import start, step
from weightsync.orchestrator.core.memory import Memory, replay, saved
from weightsync.orchestrator.core.policy import Admission
from weightsync.orchestrator.core.records import (
    Committed,
    EngineAdmitted,
    EpochBegan,
    MemorySaved,
    RoundEnded,
    decode_record,
    decode_row,
    encode_record,
)
from weightsync.orchestrator.daemon.access.access import Claim
from weightsync.orchestrator.daemon.admin import routes
from weightsync.orchestrator.daemon.admin.applications import Applications
from weightsync.orchestrator.daemon.admin.audit import NAME, Audit, AuditLine, verify
from weightsync.orchestrator.daemon.engines.http import excerpt_of
from weightsync.orchestrator.daemon.journal import Journal, JournalError, JournalLost
from weightsync.orchestrator.daemon.run_directory.scan import MarkerDirectory
from weightsync.orchestrator.protocol.application import Admitted, Applicant, Application
from weightsync.orchestrator.protocol.codec import (
    ProtocolError,
    decode_first,
    decode_from_agent,
    decode_from_daemon,
    encode,
)
from weightsync.orchestrator.protocol.layout import Layout, Region, Tensor
from weightsync.orchestrator.protocol.limits import MAX_HELLO_BYTES, SCHEMA_VERSION
from weightsync.orchestrator.protocol.markers import (
    BROADCASTS,
    MarkerError,
    decode_manifest,
    encode_manifest,
    manifest,
)
from weightsync.orchestrator.protocol.messages import (
    Announce,
    Bye,
    Connect,
    Heartbeat,
    Hello,
    HubRendezvous,
    NixlSettings,
    Outcome,
    Ready,
    Refused,
    Staged,
    Welcome,
)
from weightsync.orchestrator.protocol.names import Member, RoundName, Version
from weightsync.orchestrator.protocol.proof import Challenge, agent_proof
from weightsync.orchestrator.protocol.token import TokenError
from weightsync.orchestrator.protocol.websocket import Endpoint, FrameError
from weightsync.orchestrator.settings.credentials import Credential, read_credentials
from weightsync.orchestrator.settings.engine_lists import with_lists
from weightsync.orchestrator.settings.problems import ConfigError
from weightsync.orchestrator.settings.settings import load

Feed = Callable[[bytes], bool]


@dataclass(frozen=True)
class Target:
    """``feed`` is made for one test, with a directory of its own."""

    name: str
    seeds: tuple[bytes, ...]
    feed: Callable[[Path], Feed]


def refused(*errors: type[Exception]) -> Callable[[Callable[[bytes], object]], Callable[[Path], Feed]]:
    """Of a parser that needs no directory, and refuses with one of ``errors``."""

    def made(parse: Callable[[bytes], object]) -> Callable[[Path], Feed]:
        def feed(data: bytes) -> bool:
            try:
                parse(data)
            except errors as error:
                if not str(error):
                    raise AssertionError("a refusal says why") from error
                return False
            return True

        return lambda _: feed

    return made


# ------------------------------------------------------------------------------------------------------ on the wire
def masked(payload: bytes, opcode: int = 2) -> bytes:
    """A client's frame, of which the mask is zero."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else bytes([0xFE, *size.to_bytes(2)])
    return bytes([0x80 | opcode]) + length + bytes(4) + payload


@refused(FrameError)
def frames(data: bytes) -> None:
    """In pieces, as a network brings them; whatever came, the connection can be ended in order."""
    end = Endpoint(Side.SERVER, 64 * 1024)
    size = data[0] + 1 if data else 1
    try:
        for at in range(1, len(data), size):
            assert all(len(message) <= 64 * 1024 for message in end.receive(data[at : at + size]))
    finally:
        end.close(CloseCode.PROTOCOL_ERROR, "over")
        end.answers()


CHALLENGE = Challenge("unit", "ab" * 32, "cd" * 32, b"")
CLAIM = Claim("t" * 32, Credential("trainer"), CHALLENGE)
HELLOS = tuple(
    Hello(schema=SCHEMA_VERSION, run_id="unit", member=member, world=2, incarnation=7, generation=generation)
    for member, generation in ((Member("trainer", "", 0), 9), (Member("inference", "e0", 1), 0))
)
LAYOUT = Layout(
    tensors=(Tensor("model.norm.weight", "bfloat16", (64,)),), regions=(Region(1 << 40, 1 << 20),), rows=bytes(64)
)
SAID = (
    Announce(layout=LAYOUT, endpoint_name="trainer-0", endpoint=b"\x01" * 40),
    ANNOUNCE,
    Ready(fingerprint="f"),
    Staged(version=Version(9, 1), bytes=10, convert_seconds=0.5, digest_seconds=0.1),
    Heartbeat(),
    Bye(reason="over"),
)


@refused(ProtocolError)
def first_frame(data: bytes) -> None:
    decode_first(CLAIM.said_in(agent_proof(CLAIM.token, CHALLENGE, data) + data), MAX_HELLO_BYTES)
    # The same without the proof is never believed.
    try:
        CLAIM.said_in(data)
    except ProtocolError:
        return
    raise AssertionError("believed without a proof")


@refused(ProtocolError, PeerMisbehaved)
def said_to_the_core(data: bytes) -> None:
    """A Hello, or what an agent says after its Hello, is decided; what is decided can be said and written."""
    message = decode_from_agent(data)
    fleet, _ = start(policy_for(["e0"]), "j", [], 0.0, "life")
    hello = message if isinstance(message, Hello) else HELLOS[0]
    round_trip(step(fleet, [AgentConnected(1, hello.member, 1, hello)], 1.0))
    if not isinstance(message, Hello | Heartbeat):
        round_trip(step(fleet, [AgentSaid(2, hello.member, 1, message)], 2.0))
        round_trip(step(fleet, [AgentConnected(3, HELLOS[1].member, 2, HELLOS[1])], 3.0))


TOLD = (
    Welcome(
        epoch=1, journal_id="j", heartbeat_seconds=5.0, lost_after_heartbeats=3, transport=NixlSettings(),
        rendezvous=HubRendezvous(),
    ),
    Connect(fingerprint="f", root="r", peers=(), copies=b"", expected_bytes=0),
    Outcome(version=Version(9, 1), committed=True),
    Refused(reason="no", fault="config", retry=False),
)  # fmt: skip


@refused(MetadataError)
def card(data: bytes) -> None:
    """What a peer with a token seals itself."""
    cards.unseal(hashlib.sha256(data).digest() + data, "engine-0")


def notice(_: Path) -> Feed:
    """Anybody who reaches an agent's endpoint may send one; what is none is nothing."""
    return lambda data: notices.decode(data) is not None


def application(_: Path) -> Feed:
    admission = Admission(("a*",), ("*",), (ip_network("10.0.0.0/8"),), 4, 40.0, ())
    fleet, _commands = start(policy_for([], admission=admission), "j", [], 0.0)

    async def post(event: object) -> None:
        step(fleet, [event], 0.0)  # type: ignore[list-item]

    async def nobody(host: str) -> frozenset[str]:
        host.encode("idna")  # as the resolver does first
        raise OSError("nobody knows it")

    door = Applications(fleet, post, lambda: 1, nobody)
    claim = Claim("t" * 32, Credential("engine"), CHALLENGE)

    def feed(data: bytes) -> bool:
        answer = asyncio.run(routes._answered(door, claim, data, "10.0.0.1"))
        return isinstance(msgspec.json.decode(msgspec.json.encode(answer), type=type(answer)), Admitted)

    return feed


APPLICATION = Application(run_id="unit", engine=Applicant(name="a0", urls=("http://10.0.0.1:8000",)))


# ------------------------------------------------------------------------------------------------------------ in files
@refused(MarkerError)
def marker(data: bytes) -> None:
    found = decode_manifest(data)
    if found is not None:
        assert decode_manifest(encode_manifest(found)) == found


def run_directory(directory: Path) -> Feed:
    """The first line names the step's directory, the rest is its STABLE."""
    broadcasts = directory / BROADCASTS
    broadcasts.mkdir()
    scanned = MarkerDirectory(directory, "unit", clock=lambda: 0.0)

    def feed(data: bytes) -> bool:
        name, _, content = data.partition(b"\n")
        name = name.replace(b"/", b"")[:200].replace(b"\0", b"") or b"step_0"
        place = bytes(broadcasts) + b"/" + (b"step_0" if name in (b".", b"..") else name)
        Path(place.decode("utf-8", "surrogateescape")).mkdir(exist_ok=True)
        file = Path(place.decode("utf-8", "surrogateescape")) / "STABLE"
        file.write_bytes(content)
        scan = scanned.scan()
        for problem in scan.problems:
            str(problem).encode()
        file.unlink()
        file.parent.rmdir()
        scanned.scan()
        return any(found.stable is not None for found in scan.waiting)

    return feed


CONFIGURATION = (MINIMAL + "trainer: {world: 8}\nengines_admit: {names: [d-*], hosts: [10.1.0.0/16]}\n").encode()


def configuration(directory: Path) -> Feed:
    """Up to a line of "---" a file, then variables, one on each line."""
    file = directory / "config.yaml"

    def parse(data: bytes) -> None:
        text, _, variables = data.partition(b"\n---\n")
        file.write_bytes(text)
        lines = [line.decode("utf-8", "surrogateescape").partition("=") for line in variables.split(b"\n") if line]
        str(load(file, {name: value for name, _, value in lines})).encode("utf-8", "surrogateescape")

    return refused(ConfigError)(parse)(directory)


def engines_from(directory: Path) -> Feed:
    file = directory / "engines.yaml"

    def parse(data: bytes) -> None:
        file.write_bytes(data)
        with_lists(directory / "config.yaml", (), file)

    return refused(ConfigError)(parse)(directory)


def token_files(directory: Path) -> Feed:
    """The first line names the file, the rest is in it."""
    (directory / "trainer.token").touch(mode=0o600)
    (directory / "trainer.token").write_text("0123456789abcdef\n")
    (directory / "engine.token").touch(mode=0o600)
    (directory / "engine.token").write_text("fedcba9876543210\n")

    def parse(data: bytes) -> None:
        name, _, content = data.partition(b"\n")
        name = name.replace(b"/", b"").replace(b"\0", b"")[:100] + b".token"
        file = directory / name.decode("utf-8", "surrogateescape")
        file.touch(mode=0o600)
        file.write_bytes(content)
        try:
            read_token(file)
            read_credentials(directory)
        finally:
            file.write_text("0123456789abcdef\n" if name == b"trainer.token" else "fedcba9876543210\n")
            if name not in (b"trainer.token", b"engine.token"):
                file.unlink()

    return refused(ConfigError, TokenError)(parse)(directory)


RECORDS = (
    EpochBegan(epoch=3),
    Committed(round=RoundName(3, 1), version=Version(9, 1), sequence=8),
    EngineAdmitted(engine=APPLICATION.engine),
    RoundEnded(
        round=RoundName(3, 1), version=Version(9, 1), attempt=1, engines=("e0",), left_out=(), outcome="committed",
        reason="", bytes=0, descriptors=0, times={},
    ),
)  # fmt: skip


@refused(JournalUnreadable)
def record(data: bytes) -> None:
    decode_row(data)
    found = decode_record(data)
    assert decode_record(encode_record(found)) == found
    start(policy_for(["e0"]), "j", [found], 0.0)


@refused(JournalUnreadable)
def snapshot(data: bytes) -> None:
    memory = Memory()
    replay(memory, MemorySaved(memory=data))
    assert isinstance(memory.epoch, int)


def checkpoint_index(directory: Path) -> Feed:
    """What a trainer rank has left beside its part, with the transport ``filesystem``."""
    from weightsync.agents.transport.filesystem import INDEX_SUFFIX, CheckpointError, _parts

    def parse(data: bytes) -> None:
        (directory / f"part-0{INDEX_SUFFIX}").write_bytes(data)
        list(_parts(directory))

    return refused(CheckpointError)(parse)(directory)


def journal(directory: Path) -> Feed:
    """The file itself, as a broken disk leaves it."""
    file = directory / "fuzzed" / "journal.sqlite"
    file.parent.mkdir(mode=0o700)

    def parse(data: bytes) -> None:
        for old in file.parent.iterdir():
            old.unlink()
        file.write_bytes(data)
        with Journal.open(file) as opened:
            for entry in opened.since("MemorySaved"):
                decode_record(entry.body, entry.intact)

    return refused(JournalError, JournalLost, JournalUnreadable)(parse)(directory)


def folded() -> Memory:
    memory = Memory()
    for each in RECORDS:
        replay(memory, each)
    return memory


def a_journal() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "journal.sqlite"
        with Journal.open(path, clock=lambda: 12.5) as made:
            made.append([(type(each).__name__, encode_record(each)) for each in RECORDS])
        return path.read_bytes()


LINE = AuditLine(
    time="t", who="ann", address="::1", credential="operator", verb="hold", target="e0", reason="r", result="ok"
)


def audit(directory: Path) -> Feed:
    """Whatever is in the file, it is told, and the next line can be appended and follows what is there."""

    def feed(data: bytes) -> bool:
        (directory / NAME).write_bytes(data)
        report = verify(directory)
        head = Audit(directory).append(LINE)
        after = verify(directory, head)
        assert after.last >= report.last
        assert len(after.problems) <= len(report.problems) + 1
        return not report.problems

    return feed


def audit_lines() -> bytes:
    first = msgspec.json.encode(msgspec.structs.replace(LINE, number=1, before="0" * 64))
    second = msgspec.structs.replace(LINE, number=2, before=hashlib.sha256(first).hexdigest())
    return first + b"\n" + msgspec.json.encode(second) + b"\n"


def told_by_an_engine(_: Path) -> Feed:
    def feed(data: bytes) -> bool:
        excerpt_of(data).encode()
        return True

    return feed


STABLE = encode_manifest(manifest("unit", Version(9, 5)))

TARGETS = (
    Target("frames", (b"\x00" + masked(b"abc") + masked(b"ping", 9), b"\xff" + masked(b"x" * 300)), frames),
    Target("first_frame", tuple(encode(hello) for hello in HELLOS), first_frame),
    Target("agent", tuple(encode(message) for message in (*HELLOS, *SAID)), said_to_the_core),
    Target("daemon", tuple(encode(message) for message in TOLD), refused(ProtocolError)(decode_from_daemon)),
    Target(
        "card", (msgspec.msgpack.encode(cards.Card(cards.SCHEMA, "engine-0", Region(1 << 40, 64), b"nixl" * 9)),), card
    ),
    Target("notice", (notices.encode(notices.Notice("landed", RoundName(3, 1), 7)),), notice),
    Target("application", (msgspec.json.encode(APPLICATION),), application),
    Target("marker", (STABLE, b""), marker),
    Target("run_directory", (b"step_5\n" + STABLE, b"step_7\n"), run_directory),
    Target("configuration", (CONFIGURATION, CONFIGURATION + b"---\nWEIGHTSYNC__LISTEN__PORT=7411\n"), configuration),
    Target("engines_from", (b"engines:\n- {name: a, url: 'http://h:1'}\n", b'{"engines": []}'), engines_from),
    Target("token_files", (b"viewer.ann\n" + b"0" * 32, b"engine.e0\n" + b"a" * 16 + b"\n" + b"b" * 16), token_files),
    Target("record", tuple(encode_record(each) for each in RECORDS), record),
    Target("snapshot", (saved(Memory()).memory, saved(folded()).memory), snapshot),
    Target("journal", (a_journal(),), journal),
    Target("checkpoint_index", (b'{"rank": 0, "world": 1, "boxes": []}',), checkpoint_index),
    Target("audit", (audit_lines(), b""), audit),
    Target("engine_answers", (b'{"error": {"message": "no"}}', b'{"detail": [1]}', b"<html>"), told_by_an_engine),
)
