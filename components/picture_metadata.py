"""Metadata of picture files, taken apart and rebuilt: what a result carries is written by this module, never copied.

Of EXIF and XMP only the properties listed here are kept, each with a plausible type and length; texts with control
characters or markup are dropped. So a thumbnail, a maker's note, a script, an entity or bytes behind the end cannot
reach a result. Everything that is dropped because it is broken or suspicious is named in a note. Torch-free.

    private   the camera, the exposure, dates, the author and the rights; no place, owner or serial number
    keep      these too
    none      nothing

References: EXIF 2.32; XMP specification part 1 (ISO 16684-1); IPTC Photo Metadata 2023.1.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from PIL import ExifTags, ImageCms

from components.types import SampleError

Metadata = Literal["private", "keep", "none"]
METADATA: tuple[Metadata, ...] = ("private", "keep", "none")

MAX_EXIF_BYTES = 1 << 20  # ours; JPEG's limit is 64 KiB
MAX_XMP_BYTES = 1 << 20  # ours
MAX_ICC_BYTES = 4 << 20  # ours: printers' profiles have up to 3 MB
MAX_TEXT_CHARS, MAX_ITEMS, MAX_NUMBERS, MAX_ENTRIES = 2000, 64, 64, 512  # ours
MAX_XMP_OUT_BYTES = 48 << 10  # JPEG holds 64 KiB in one segment

BYTE, ASCII, SHORT, LONG, RATIONAL, UNDEFINED, SIGNED_LONG, SIGNED_RATIONAL = 1, 2, 3, 4, 5, 7, 9, 10
SIZES = {BYTE: 1, ASCII: 1, SHORT: 2, LONG: 4, RATIONAL: 8, UNDEFINED: 1, SIGNED_LONG: 4, SIGNED_RATIONAL: 8}
LETTERS = {BYTE: "B", SHORT: "H", LONG: "I", RATIONAL: "I", SIGNED_LONG: "i", SIGNED_RATIONAL: "i"}
EXIF_POINTER, GPS_POINTER, ORIENTATION, COLOR_SPACE, EXIF_VERSION = 0x8769, 0x8825, 0x0112, 0xA001, 0x9000

MAIN_TAGS = frozenset({0x010E, 0x010F, 0x0110, 0x011A, 0x011B, 0x0128, 0x0132, 0x013B, 0x4746, 0x8298})
"""Description, camera, resolution, date, artist, rating, copyright."""
RESOLUTION_TAGS = frozenset({0x011A, 0x011B, 0x0128})
EXIF_TAGS = frozenset(
    {
        *(0x829A, 0x829D, 0x8822, 0x8827, *range(0x8830, 0x8836), 0x9003, 0x9004, 0x9010, 0x9011, 0x9012),
        *(*range(0x9201, 0x920B), 0x9290, 0x9291, 0x9292, 0xA20E, 0xA20F, 0xA210, 0xA215, 0xA217),
        *(*range(0xA401, 0xA40B), 0xA40C, 0xA432, 0xA433, 0xA434),
    }
)
"""Exposure, dates and lens."""
OWNER_TAGS = frozenset({0xA420, 0xA430, 0xA431, 0xA435})
"""Unique id, owner, serial numbers of body and lens."""
GPS_TAGS = frozenset(range(32))

Entry = tuple[int, int, bytes]
"""(tag, type, little-endian value) of a directory."""

MARKUP = re.compile(r"<\s*[a-zA-Z!?/%]")

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
NAMESPACES = {
    "dc": "http://purl.org/dc/elements/1.1/",
    "exif": "http://ns.adobe.com/exif/1.0/",
    "Iptc4xmpCore": "http://iptc.org/std/Iptc4xmpCore/1.0/xmlns/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "photoshop": "http://ns.adobe.com/photoshop/1.0/",
    "restoray": "urn:restoray:1",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "xmpRights": "http://ns.adobe.com/xap/1.0/rights/",
}
PROPERTIES: Mapping[str, tuple[str, ...]] = {
    "dc": ("title", "description", "creator", "rights", "subject"),
    "xmp": ("CreateDate", "Rating", "Label"),
    "xmpRights": ("Marked", "UsageTerms", "WebStatement"),
    "photoshop": ("Headline", "Credit", "Source", "DateCreated", "Instructions"),
}
PLACES: Mapping[str, tuple[str, ...]] = {
    "photoshop": ("City", "State", "Country"),
    "Iptc4xmpCore": ("Location", "CountryCode"),
    "exif": ("GPSLatitude", "GPSLongitude", "GPSAltitude", "GPSAltitudeRef", "GPSTimeStamp"),
    "xmpRights": ("Owner",),
}
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
"""IPTC's term for a picture that a trained model has changed."""

Property = tuple[str, str, str, tuple[str, ...]]
"""(namespace's prefix, name, "" or the kind of the list: Alt, Bag, Seq; texts)."""


@dataclass(frozen=True, kw_only=True)
class Tags:
    """What is kept of a file's metadata, checked.

    Attributes:
        main, exif, gps: entries of EXIF's directories, sorted by tag.
        properties: of XMP.
        notes: one sentence for each thing that was dropped because it is broken or suspicious.
    """

    main: tuple[Entry, ...] = ()
    exif: tuple[Entry, ...] = ()
    gps: tuple[Entry, ...] = ()
    properties: tuple[Property, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def has_exif(self) -> bool:
        """Whether EXIF has more than a resolution, which every TIFF has."""
        return bool({tag for tag, _, _ in self.main} - RESOLUTION_TAGS or self.exif or self.gps)


@dataclass
class _Notes:
    lines: list[str] = field(default_factory=list)

    def drop(self, what: str, why: str) -> None:
        line = f"{what} dropped: {why}"
        if line not in self.lines and len(self.lines) < MAX_ITEMS:
            self.lines.append(line)


def read_tags(exif: bytes, xmp: bytes, rule: Metadata, is_tiff: bool = False) -> Tags:
    """Take metadata apart.

    Args:
        exif: untrusted; with or without the prefix of JPEG. For a TIFF the whole file, whose first directory it is.
        xmp: untrusted packet.
        rule: see the top of this file.
        is_tiff: whether `exif` is a TIFF's file.
    """
    if rule == "none":
        return Tags()
    notes = _Notes()
    main, details, gps = _read_exif(exif, rule, notes, is_tiff) if exif else ((), (), ())
    properties = _read_xmp(xmp, rule, notes) if xmp else ()
    return Tags(main=main, exif=details, gps=gps, properties=properties, notes=tuple(notes.lines))


# --- EXIF -------------------------------------------------------------------------------------------------------------


def _read_exif(
    data: bytes, rule: Metadata, notes: _Notes, is_tiff: bool
) -> tuple[tuple[Entry, ...], tuple[Entry, ...], tuple[Entry, ...]]:
    data = data[6:] if data[:6] == b"Exif\0\0" else data
    if len(data) > MAX_EXIF_BYTES and not is_tiff:
        notes.drop("EXIF", f"{len(data)} bytes exceed {MAX_EXIF_BYTES}")
        return (), (), ()
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 8:
        notes.drop("EXIF", "it has no header")
        return (), (), ()
    names: Mapping[int, str] = ExifTags.TAGS
    (first,) = struct.unpack_from(f"{order}I", data, 4)
    main = _directory(data, first, order, "EXIF", names, MAIN_TAGS, notes)
    exif_tags = EXIF_TAGS | OWNER_TAGS if rule == "keep" else EXIF_TAGS
    offsets = {name: _pointer(data, first, order, name) for name in (EXIF_POINTER, GPS_POINTER)}
    details: tuple[Entry, ...] = ()
    gps: tuple[Entry, ...] = ()
    if offsets[EXIF_POINTER]:
        details = _directory(data, offsets[EXIF_POINTER], order, "EXIF", names, exif_tags, notes)
    if offsets[GPS_POINTER] and rule == "keep":
        gps = _directory(data, offsets[GPS_POINTER], order, "EXIF", ExifTags.GPSTAGS, GPS_TAGS, notes)
    return main, details, gps


def _rows(data: bytes, at: int, order: str) -> list[tuple[int, int, int, int]]:
    """(tag, type, count, place of the value field) of a directory, as far as it lies inside the data."""
    if not 8 <= at <= len(data) - 2:
        return []
    (count,) = struct.unpack_from(f"{order}H", data, at)
    fitting = min(count, MAX_ENTRIES, (len(data) - at - 2) // 12)
    places = [at + 2 + 12 * number for number in range(fitting)]
    return [(*struct.unpack_from(f"{order}HHI", data, place), place + 8) for place in places]


def _pointer(data: bytes, at: int, order: str, name: int) -> int:
    """Place of another directory; 0 for none."""
    for tag, kind, count, place in _rows(data, at, order):
        if (tag, kind, count) == (name, LONG, 1):
            return int(struct.unpack_from(f"{order}I", data, place)[0])
    return 0


def _directory(
    data: bytes, at: int, order: str, what: str, names: Mapping[int, str], tags: frozenset[int], notes: _Notes
) -> tuple[Entry, ...]:
    """The entries with these tags, each once."""
    entries: dict[int, Entry] = {}
    rows = _rows(data, at, order)
    if not rows:
        notes.drop(what, "a directory lies outside the data or is empty")
    for tag, kind, count, place in rows:
        if tag not in tags or tag in entries:
            continue
        name = f"{what} {names.get(tag, tag)}"
        if kind not in LETTERS and kind != ASCII:
            continue
        size = SIZES[kind] * count
        if size > 4:
            (place,) = struct.unpack_from(f"{order}I", data, place)
        limit = MAX_TEXT_CHARS if kind == ASCII else MAX_NUMBERS * SIZES[kind]
        if size > limit or place + size > len(data) or count < 1:
            notes.drop(name, "its length is impossible" if place + size > len(data) else f"{size} bytes")
            continue
        value = data[place : place + size]
        if kind == ASCII:
            text = _text(value.split(b"\0")[0].decode("utf-8", "replace"))
            if text is None:
                notes.drop(name, "control characters or markup")
                continue
            entries[tag] = (tag, ASCII, text.encode() + b"\0")
        else:
            letters = LETTERS[kind]
            numbers = struct.unpack(f"{order}{size // struct.calcsize(letters)}{letters}", value)
            entries[tag] = (tag, kind, struct.pack(f"<{len(numbers)}{letters}", *numbers))
    return tuple(entries[tag] for tag in sorted(entries))


def _text(text: str) -> str | None:
    """A text without blanks at its ends; None if it is too long or holds control characters or markup."""
    text = text.strip()
    bad = any(not letter.isprintable() and letter not in "\n\r\t" for letter in text)
    return None if bad or len(text) > MAX_TEXT_CHARS or MARKUP.search(text) else text


def exif_block(tags: Tags, is_srgb: bool) -> bytes:
    """EXIF as a block of its own, with orientation 1 and the colour space; b"" if nothing was kept."""
    return directories(tags, (), is_srgb, 0)[0] if tags.has_exif else b""


def directories(tags: Tags, others: Iterable[Entry], is_srgb: bool, pixel_bytes: int) -> tuple[bytes, int]:
    """A little-endian TIFF header with the directories, and the place behind them.

    Args:
        others: further entries of the first directory, which replace those of `tags`.
        is_srgb: False for a colour space of its own.
        pixel_bytes: bytes of the pixels that follow, to check the largest offset.
    """
    main = {entry[0]: entry for entry in (*tags.main, (ORIENTATION, SHORT, struct.pack("<H", 1)), *others)}
    space = (COLOR_SPACE, SHORT, struct.pack("<H", 1 if is_srgb else 0xFFFF))
    details = {entry[0]: entry for entry in (*tags.exif, (EXIF_VERSION, UNDEFINED, b"0232"), space)}
    if not tags.has_exif:
        details = {}
    for pointer, entries in ((EXIF_POINTER, details), (GPS_POINTER, tags.gps)):
        if entries:
            main[pointer] = (pointer, LONG, bytes(4))
    start = 8 + _size(main.values())
    exif_end = start + _size(details.values())
    end = exif_end + _size(tags.gps)
    if end + pixel_bytes > 0xFFFFFFFF:
        raise SampleError("too_large", "a TIFF holds at most 4 GiB")
    for pointer, place in ((EXIF_POINTER, start), (GPS_POINTER, exif_end)):
        if pointer in main:
            main[pointer] = (pointer, LONG, struct.pack("<I", place))
    head = struct.pack("<2sHI", b"II", 42, 8)
    blocks = [_write(main.values(), 8), _write(details.values(), start), _write(tags.gps, exif_end)]
    return head + b"".join(blocks), end


def _size(entries: Iterable[Entry]) -> int:
    values = [value for _, _, value in entries]
    return 6 + 12 * len(values) + sum(len(v) + len(v) % 2 for v in values if len(v) > 4) if values else 0


def _write(entries: Iterable[Entry], at: int) -> bytes:
    rows = sorted(entries)
    if not rows:
        return b""
    body, data = struct.pack("<H", len(rows)), b""
    behind = at + 6 + 12 * len(rows)
    for tag, kind, value in rows:
        body += struct.pack("<HHI", tag, kind, len(value) // SIZES[kind])
        if len(value) > 4:
            body += struct.pack("<I", behind + len(data))
            data += value + bytes(len(value) % 2)
        else:
            body += value.ljust(4, b"\0")
    return body + bytes(4) + data


# --- XMP --------------------------------------------------------------------------------------------------------------


def _read_xmp(packet: bytes, rule: Metadata, notes: _Notes) -> tuple[Property, ...]:
    tree = _tree(packet, notes)
    if tree is None:
        return ()
    lists = {
        f"{{{NAMESPACES[prefix]}}}{name}": (prefix, name)
        for table in ((PROPERTIES, PLACES) if rule == "keep" else (PROPERTIES,))
        for prefix, names in table.items()
        for name in names
    }
    properties: dict[tuple[str, str], Property] = {}
    for description in tree.iter(f"{{{RDF}}}Description"):
        values = [(name, "", [value]) for name, value in description.attrib.items()]
        values += [(child.tag, *_values(child)) for child in description]
        for tag, kind, texts in values:
            if tag not in lists or lists[tag] in properties:
                continue
            checked = [text for text in map(_text, texts[:MAX_ITEMS]) if text is not None]
            if len(checked) < len(texts):
                notes.drop(f"XMP {':'.join(lists[tag])}", "control characters, markup or length")
            if any(checked):
                properties[lists[tag]] = (*lists[tag], kind, tuple(text for text in checked if text))
    return tuple(properties[name] for name in sorted(properties))


def _tree(packet: bytes, notes: _Notes) -> ElementTree.Element | None:
    if len(packet) > MAX_XMP_BYTES:
        notes.drop("XMP", f"{len(packet)} bytes exceed {MAX_XMP_BYTES}")
        return None
    try:
        text = packet.rstrip(b"\0").decode("utf-8")
    except UnicodeDecodeError:
        notes.drop("XMP", "it is not UTF-8")
        return None
    if re.search(r"<!\s*(?:DOCTYPE|ENTITY)", text, re.IGNORECASE):
        notes.drop("XMP", "it declares a document type or entities")
        return None
    try:
        return ElementTree.fromstring(text.lstrip("\ufeff"))
    except (ElementTree.ParseError, ValueError):
        notes.drop("XMP", "it is not well-formed")
        return None


def _values(element: ElementTree.Element) -> tuple[str, list[str]]:
    """The kind of a property's list and its texts; of a text in several languages the default one."""
    for kind in ("Alt", "Bag", "Seq"):
        items = element.find(f"{{{RDF}}}{kind}")
        if items is not None:
            rows = list(items)
            if kind == "Alt":
                rows = [row for row in rows if row.get(XML_LANG) == "x-default"][:1] or rows[:1]
            return kind, [row.text or "" for row in rows]
    return "", [element.text or ""]


def xmp_packet(properties: Sequence[Property], provenance: Mapping[str, str]) -> bytes:
    """An XMP packet of properties and of what a result says about itself; b"" if there is neither.

    Args:
        provenance: texts by name; a name that XML does not allow is left out.
    """
    rows = [*properties]
    if provenance:
        rows.append(("Iptc4xmpExt", "DigitalSourceType", "", (SOURCE_TYPE,)))
        names = sorted(name for name in provenance if re.fullmatch(r"[A-Za-z_][\w.-]*", name, re.ASCII))
        rows += [("restoray", name, "", (provenance[name],)) for name in names]
    if not rows:
        return b""
    body = "".join(_element(*row) for row in rows)
    prefixes = sorted({row[0] for row in rows})
    spaces = "".join(f' xmlns:{prefix}="{NAMESPACES[prefix]}"' for prefix in prefixes)
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{RDF}"><rdf:Description rdf:about=""{spaces}>'
        f"{body}</rdf:Description></rdf:RDF></x:xmpmeta>"
        '<?xpacket end="r"?>'
    ).encode()


def _element(prefix: str, name: str, kind: str, texts: Sequence[str]) -> str:
    values = [escape("".join(c for c in text if c.isprintable() or c in "\n\t")) for text in texts]
    if not kind:
        return f"<{prefix}:{name}>{values[0]}</{prefix}:{name}>"
    language = ' xml:lang="x-default"' if kind == "Alt" else ""
    items = "".join(f"<rdf:li{language}>{value}</rdf:li>" for value in values)
    return f"<{prefix}:{name}><rdf:{kind}>{items}</rdf:{kind}></{prefix}:{name}>"


def read_provenance(packet: bytes) -> dict[str, str]:
    """What a result of ours says about itself in its XMP packet, by name; {} for another packet."""
    tree = _tree(packet, _Notes())
    prefix = f"{{{NAMESPACES['restoray']}}}"
    elements = () if tree is None else tree.iter()
    return {each.tag[len(prefix) :]: each.text or "" for each in elements if str(each.tag).startswith(prefix)}


# --- profiles ---------------------------------------------------------------------------------------------------------


def check_profile(profile: bytes) -> str:
    """Why a profile cannot go with a result, as part of a sentence; "" if it can."""
    if len(profile) > MAX_ICC_BYTES:
        return f"{len(profile)} bytes exceed {MAX_ICC_BYTES}"
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space.strip() != "RGB":
            return "it is not for RGB"
        ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), "RGB", "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return "it is broken"
    return ""
