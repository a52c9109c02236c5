"""Bytes that were right once: a seed, with a few things done to it. hypothesis shrinks what fails."""

from collections.abc import Sequence

from hypothesis import strategies as st

WORDS: tuple[bytes, ...] = (
    b"\x00", b"\xff" * 8, b"\xc0\x80", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x1b[2J", b"\r\n", b"\n\n", b'"', b"\\ud800",
    b"-1", b"0", b"1e999", b"NaN", b"9" * 25, b"9" * 5000, b"18446744073709551616", b"null", b"true", b"{}", b"[]",
    b"[" * 3000, b'{"a":' * 3000, b"\x91" * 3000, b"\x81\xa1a" * 3000, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff",
    b"\xcf" + b"\xff" * 8, b"\xd3\x80" + b"\x00" * 7, b"\xcb\x7f\xf0" + b"\x00" * 6, b"\xc6\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff", b"\xc0", b"\xc2", b"\xd4\x01\x00", b"\xd6\xff\xff\xff\xff\xff",
    b"&a ", b"*a", b"<<: *a\n", b"!!python/object/apply:os.system ['x']", b"!!binary x", b"!!timestamp x", b"? ", b"- ",
    b": ", b"\t", b"%YAML 9\n", b"Content-Length: -1\r\n", b"Transfer-Encoding: chunked\r\n", b"HTTP/1.1", b"..%2f",
    b"../../etc/passwd", b"/dev/zero", b"x" * 70_000,
)  # fmt: skip
"""What parsers stumble over: JSON, msgpack, YAML, UTF-8, HTTP, WebSocket."""

MAX_CHANGES = 6


@st.composite
def mutated(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """One of ``seeds``, changed at most MAX_CHANGES times."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, MAX_CHANGES))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 40)))
        match draw(st.integers(0, 7)):
            case 0:
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                data[at:at] = draw(st.sampled_from(WORDS))
            case 2:
                data[at:end] = draw(st.sampled_from(WORDS))
            case 3:
                data[at:at] = draw(st.binary(max_size=16))
            case 4:
                del data[at:end]
            case 5:
                data[at:at] = data[at:end] * draw(st.integers(1, 50))
            case 6:
                del data[at:]
            case _:
                other = draw(st.sampled_from(seeds))
                data[at:end] = other[draw(st.integers(0, len(other))) :]
    return bytes(data)
