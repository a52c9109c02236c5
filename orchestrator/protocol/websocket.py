"""One side of a WebSocket connection after its handshake: bytes in, messages and bytes out, no I/O.

A thin layer over the sans-I/O protocol of the ``websockets`` library, which does all of RFC 6455's framing. Both ends
of the control channel use it instead of a library's streams because a message then costs no task switch: it is handled
in the call that read it, which is what a barrier over thousands of agents consists of.

What the library leaves to its user and is done here: fragments are joined and counted, text is refused, and every
breach, the library's or ours, becomes one FrameError.
"""

from typing import Final, NoReturn

from websockets.frames import Close, CloseCode, Frame, Opcode
from websockets.protocol import Protocol, Side, State
from weightsync.orchestrator.protocol.codec import ProtocolError

MAX_CONTROL_BYTES: Final = 125
"""RFC 6455 §5.5: payload of a ping, pong or close."""

MAX_FRAGMENTS: Final = 4096
"""Of one message. Neither side of ours fragments; a proxy may, by its buffer, and empty fragments must cost nothing."""

_CODE_BYTES: Final = 2


class FrameError(ProtocolError):
    """The peer broke RFC 6455 or a limit; ``code`` is what the connection is closed with. The peer's fault."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def message_frame(payload: bytes, side: Side) -> bytes:
    """``payload`` as one binary frame, masked if ``side`` is the client.

    A server's frames are not masked, so the same bytes serve any number of peers.
    """
    return Frame(Opcode.BINARY, payload).serialize(mask=side is Side.CLIENT)


class Endpoint:
    """The protocol state of one side.

    Args:
        side: whose frames are masked (the client's) and whose are not.
        limit: largest message that the peer may send, in bytes.
    """

    def __init__(self, side: Side, limit: int) -> None:
        self._side = side
        self._protocol = Protocol(side, state=State.OPEN, max_size=limit)
        self._fragments: list[bytes] = []
        self._broken = False

    @property
    def peer_closed(self) -> Close | None:
        """Code and reason of the peer's Close, None before it."""
        return self._protocol.close_rcvd

    def limit_messages(self, limit: int) -> None:
        """Accept messages of at most ``limit`` bytes, from the next frame that begins to arrive."""
        self._protocol.max_message_size = limit

    def message(self, payload: bytes) -> bytes:
        """The frame to send for a binary message."""
        # Not by the protocol object: it refuses to send once the peer's Close has been read, and the owner may be
        # answering a message that came in the same read before that Close.
        return message_frame(payload, self._side)

    def close(self, code: int, reason: str) -> bytes:
        """The frame that begins the closing handshake, or ends it after a FrameError; empty if that was taken before.

        ``reason`` is cut, between characters, to what fits a control frame.
        """
        if self._protocol.state is State.OPEN:
            room = MAX_CONTROL_BYTES - _CODE_BYTES
            self._protocol.send_close(code, reason.encode()[:room].decode(errors="ignore"))
        return self.answers()

    def answers(self) -> bytes:
        """Takes what is to be sent in answer to what was received: pongs, and the echo of a Close."""
        # The library asks for the end of the stream by an empty write. It vanishes here: transports are ended by their
        # owners, which give the peer time to read why.
        return b"".join(self._protocol.data_to_send())

    def receive(self, data: bytes) -> list[bytes]:
        """Binary messages that ``data`` completes. Nothing is read after the peer's Close or a FrameError.

        A length above the limit is an error as soon as its header has come.

        Raises:
            FrameError: the peer broke the protocol or the limit; messages before that in ``data`` are lost.
        """
        messages: list[bytes] = []
        if self._broken:
            return messages
        self._protocol.receive_data(data)
        for frame in self._protocol.events_received():
            assert isinstance(frame, Frame)  # requests and responses are of the handshake, which is over
            self._take(frame, messages)
        failure = self._protocol.parser_exc
        if failure is not None:
            self._broken = True
            said = self._protocol.close_sent
            raise FrameError(said.code if said else CloseCode.PROTOCOL_ERROR, str(failure)) from failure
        return messages

    def _take(self, frame: Frame, messages: list[bytes]) -> None:
        """Joins fragments; pings and Closes have been answered by the library, pongs need nothing."""
        if frame.opcode is Opcode.TEXT:
            self._fail(CloseCode.UNSUPPORTED_DATA, "a text frame: messages are binary")
        elif frame.opcode is Opcode.BINARY and frame.fin:
            messages.append(bytes(frame.data))
        elif frame.opcode in (Opcode.BINARY, Opcode.CONT):
            # The library adds up the fragments' bytes but not their number: empty ones would pile up for ever.
            if len(self._fragments) == MAX_FRAGMENTS:
                self._fail(CloseCode.MESSAGE_TOO_BIG, f"a message of more than {MAX_FRAGMENTS} fragments")
            self._fragments.append(bytes(frame.data))
            if frame.fin:
                messages.append(b"".join(self._fragments))
                self._fragments.clear()

    def _fail(self, code: CloseCode, reason: str) -> NoReturn:
        self._broken = True
        self._fragments.clear()
        self._protocol.fail(code, reason)
        raise FrameError(code, reason)
