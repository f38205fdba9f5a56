"""Message bodies without their content, byte for byte as long.

A `Body` is where one message's bytes stand in a direction's bytes: in chunks, in frames, with
holes. `redact` writes what stands there instead. What no rule knows becomes filler.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field

from halton_meter.redaction import protobuf, words
from halton_meter.redaction.codings import coded, plainer
from halton_meter.redaction.filler import Filler
from halton_meter.redaction.half import Run
from halton_meter.redaction.heads import shown_media_type
from halton_meter.redaction.json_text import redacted_fragment, redacted_json
from halton_meter.wire.codings import DecodeError, decoder

_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n|\Z)")
_SSE_LINE = re.compile(
    rb"(?P<field>data|event|id|retry)?(?P<colon>: ?)(?P<value>[^\r\n]*)(?P<end>[\r\n]*)"
)
_SSE_START = (b"data:", b"event:", b"id:", b"retry:", b":")
_BOUNDARY = re.compile(rb'boundary="?([^";,]{1,200})"?', re.IGNORECASE)
_PART_NAME = re.compile(rb'name="([^"]{0,200})"', re.IGNORECASE)
# What stays of a part's or an AWS frame's head.
_DISPOSITION = re.compile(
    rb'(\s*;\s*)([A-Za-z-]+\*?)(\s*=\s*)("(?:\\.|[^"\\\r\n])*"?|[^;"\r\n]*)|([^;]+|;)', re.DOTALL
)
_DISPOSITIONS = frozenset((b"form-data", b"attachment", b"file", b"inline"))
_MEDIA_TYPE = re.compile(rb"[A-Za-z]{1,20}/[A-Za-z0-9.+-]{1,60}(?:; ?charset=[A-Za-z0-9-]{1,20})?")
_EVENT = re.compile(rb"(?:\A|[\r\n])(?:data|event):")
_FRAME_BYTES_MIN = 16


@dataclass(slots=True)
class Body:
    """Where a message's body stands: pieces between holes, each in parts (run, start, end).

    `head` are its header fields, redacted; `interim` says that another head follows (1xx).
    """

    sent: bool
    content_type: bytes = b""
    coding: str = ""
    pieces: list[list[tuple[Run, int, int]]] = field(default_factory=lambda: [[]])
    from_start: bool = True  # the first piece begins where the body does
    head: list[tuple[str, str]] = field(default_factory=list)  # as it may be shown
    interim: bool = False

    def add(self, run: Run, start: int, end: int) -> None:
        """The next bytes of it."""
        if end > start:
            self.pieces[-1].append((run, start, end))

    def lose(self) -> None:
        """A hole."""
        if not self.pieces[-1] and len(self.pieces) == 1:
            self.from_start = False
        elif self.pieces[-1]:
            self.pieces.append([])


def redact(body: Body, filler: Filler) -> None:
    """Write over a body."""
    kind = ""
    for number, parts in enumerate(body.pieces):
        text = b"".join([run.data[start:end] for run, start, end in parts])
        if not text:
            continue
        whole = number == 0 and body.from_start
        if whole or not kind:
            kind = form(body.content_type, text) if whole else _form_within(body, text)
        instead = _piece(body, text, whole, kind, filler)
        assert len(instead) == len(text)
        at = 0
        for run, start, end in parts:
            run.out[start:end] = instead[at : at + end - start]
            at += end - start


def _piece(body: Body, text: bytes, whole: bool, kind: str, filler: Filler) -> bytes:
    chain = decoder(body.coding) if body.coding else None
    if chain is None and body.coding.strip().lower() not in ("", "identity"):
        return filler.data(text)
    if chain is None:
        return redacted(text, whole, kind, body, filler)
    if not whole:
        return filler.data(text)  # no coding survives a hole
    given: list[bytes] = []
    try:
        chain.feed(text, given.append)
    except DecodeError:
        if not given and text.lstrip()[:1] in (b"{", b"[", b"d", b"e", b":"):
            return redacted(text, True, form(body.content_type, text), body, filler)
        return filler.data(text)
    plain = b"".join(given)
    instead = redacted(plain, True, form(body.content_type, plain), body, filler)
    way = body.coding.strip().lower(), len(text), chain.ended(), text[:2]
    found = coded(way[0], instead, *way[1:]) or coded(way[0], plainer(plain, instead), *way[1:])
    return filler.data(text) if found is None else found


def form(content_type: bytes, text: bytes) -> str:
    """How a body is written, by its first bytes, else by the content type."""
    lowered = content_type.lower()
    if b"eventstream" in lowered and text[:1] == b"\0":
        return "eventstream"
    if lowered.startswith(b"application/grpc"):
        return "grpc"
    start = text[:256].lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:1] in (b"{", b"[", b'"'):
        return "json"
    if start.startswith(_SSE_START) or b"event-stream" in lowered:
        return "sse"
    if b"multipart/" in lowered:
        return "multipart"
    if b"x-www-form-urlencoded" in lowered:
        return "form"
    return "json" if b"json" in lowered else "other"


def _form_within(body: Body, text: bytes) -> str:
    """The same of a body whose beginning is lost, by what stands in it."""
    if b":message-type\x07\x00" in text:
        return "eventstream"
    if b"\0" in text[:4096]:
        return "other"
    if _EVENT.search(text) is not None:
        return "sse"
    found = form(body.content_type, text)
    return "json" if found in ("other", "grpc") else found


def redacted(text: bytes, whole: bool, kind: str, body: Body, filler: Filler) -> bytes:
    """A decoded piece of a body; `whole` says that it begins where the body does."""
    if kind == "sse":
        return _sse(text, whole, filler)
    if kind == "eventstream":
        return _event_stream(text, filler)
    if kind == "grpc":
        return protobuf.redacted_messages(text, filler) if whole else filler.data(text)
    if kind == "multipart":
        return _multipart(text, body.content_type, filler)
    if kind == "json" and whole:
        return redacted_json(text, filler, body.sent)
    if kind == "json":
        return _lines_behind(text, filler, body.sent)
    if kind == "form":
        return re.sub(rb"[^&=+]+", lambda found: filler.text(found.group()), text)
    return filler.data(text)


def _lines_behind(text: bytes, filler: Filler, mark: bool) -> bytes:
    """JSON behind a hole: lines that begin with a value of their own are read as such."""
    out: list[bytes] = []
    for number, match in enumerate(_LINE.finditer(text)):
        line = match.group()
        whole = number > 0 and line[:1] in (b"{", b"[")
        read = redacted_json if whole else redacted_fragment
        out.append(read(line, filler, mark))
    return b"".join(out)


# --- server-sent events -------------------------------------------------------------------------


def _sse(text: bytes, whole: bool, filler: Filler) -> bytes:
    out: list[bytes] = []
    for number, match in enumerate(_LINE.finditer(text)):
        line = match.group()
        found = _SSE_LINE.fullmatch(line)
        if found is not None:
            out.append(_sse_line(found, filler))
        elif not line.strip(b"\r\n"):
            out.append(line)
        elif number == 0 and not whole:
            out.append(redacted_fragment(line, filler))
        else:
            out.append(_text_line(line, filler))
    return b"".join(out)


def _text_line(line: bytes, filler: Filler) -> bytes:
    text = line.rstrip(b"\r\n")
    start = text.lstrip()[:1]
    if start in (b"{", b"["):
        return redacted_json(line, filler)
    return filler.text(text) + line[len(text) :]


def _sse_line(found: re.Match[bytes], filler: Filler) -> bytes:
    name, value = found.group("field") or b"", found.group("value")
    if name == b"data":
        if value.lstrip()[:1] in (b"{", b"[", b'"') and value != b"[DONE]":
            value = redacted_json(value, filler)
        elif not (value == b"[DONE]" or words.is_word(value)):
            value = filler.text(value)
    elif name == b"event":
        value = filler.keep(value) if words.is_name(value) else filler.text(value)
    elif name == b"id":
        value = filler.id(value)
    elif not (name == b"retry" and value.isdigit()):
        value = filler.text(value)
    return name + found.group("colon") + value + found.group("end")


# --- AWS event streams --------------------------------------------------------------------------


def _event_stream(text: bytes, filler: Filler) -> bytes:
    out: list[bytes] = []
    at = written = 0
    while at + _FRAME_BYTES_MIN <= len(text):
        total = int.from_bytes(text[at : at + 4])
        if total < _FRAME_BYTES_MIN or zlib.crc32(text[at : at + 8]) != int.from_bytes(
            text[at + 8 : at + 12]
        ):
            at = text.find(b"\0", at + 1)  # behind a hole: as our reader looks for a frame
            if at < 0:
                break
            continue
        out.append(filler.data(text[written:at]))
        end = at + total
        headers_end = at + 12 + int.from_bytes(text[at + 4 : at + 8])
        if headers_end > min(end - 4, len(text)):
            break
        frame = text[at : at + 12] + _frame_headers(text[at + 12 : headers_end], filler)
        if end > len(text):
            out.append(frame + redacted_json(text[headers_end:], filler))
            return b"".join(out)
        frame += redacted_json(text[headers_end : end - 4], filler)
        out.append(frame + zlib.crc32(frame).to_bytes(4))
        at = written = end
    return b"".join(out) + filler.data(text[written:])


def _frame_headers(raw: bytes, filler: Filler) -> bytes:
    """String headers one after another; from the first other one on, filler."""
    out: list[bytes] = []
    at = 0
    while at < len(raw):
        name_end = at + 1 + raw[at]
        value_start = name_end + 3
        if value_start > len(raw) or raw[name_end] != 7:
            break
        value_end = value_start + int.from_bytes(raw[name_end + 1 : value_start])
        value = raw[value_start:value_end]
        is_protocols = raw[at + 1 : at + 2] == b":"
        if is_protocols and _MEDIA_TYPE.fullmatch(value):
            shown = shown_media_type(value, filler)
        else:
            shown = value if is_protocols and words.is_name(value) else filler.text(value)
        out.append(raw[at:value_start] + shown)
        at = value_end
    return b"".join(out) + filler.data(raw[at:])


# --- forms --------------------------------------------------------------------------------------


def _multipart(text: bytes, content_type: bytes, filler: Filler) -> bytes:
    found = _BOUNDARY.search(content_type)
    if found is None:
        return filler.data(text)
    mark = b"--" + found.group(1).strip()
    parts = text.split(mark)
    kept = [filler.data(parts[0])]
    kept += [_part(part, filler) for part in parts[1:]]
    return mark.join(kept)


def _part(part: bytes, filler: Filler) -> bytes:
    head, separator, value = part.partition(b"\r\n\r\n")
    if not separator:
        return part if part.strip(b"-\r\n") == b"" else filler.data(part)
    lines = [_part_line(line, filler) for line in head.split(b"\r\n")]
    name = _PART_NAME.search(head)
    is_file = b"filename" in head.lower()
    end = b"\r\n" if value.endswith(b"\r\n") else b""
    value = value.removesuffix(b"\r\n")
    shown = None
    if not is_file and name is not None and words.is_word(name.group(1)):
        if name.group(1) in words.MODELS:
            shown = words.shown_model(value)
        elif words.is_word(value) or (
            words.holds_figures(name.group(1)) and words.is_figure(value)
        ):
            shown = value
    body = filler.data(value) if shown is None else filler.keep(shown)
    return b"\r\n".join(lines) + separator + body + end


def _part_line(line: bytes, filler: Filler) -> bytes:
    name, colon, value = line.partition(b":")
    lowered = name.strip().lower()
    if lowered == b"content-disposition":
        return name + colon + _DISPOSITION.sub(lambda found: _named(found, filler), value)
    if lowered == b"content-type" and _MEDIA_TYPE.fullmatch(value.strip()):
        return name + colon + shown_media_type(value, filler)
    if not line:
        return line
    return filler.text(line)


def _named(found: re.Match[bytes], filler: Filler) -> bytes:
    if (other := found.group(5)) is not None:
        return other if other.strip().lower() in (*_DISPOSITIONS, b";", b"") else filler.data(other)
    before, name, equals, value = found.group(1, 2, 3, 4)
    text = value.strip(b'"')
    known = name.lower() in (b"name", b"filename", b"filename*")
    if not (name.lower() == b"name" and words.is_word(text)):
        value = value.replace(text, filler.data(text)) if text else value
    return before + (name if known else filler.data(name)) + equals + value
