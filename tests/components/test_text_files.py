"""Encodings of text files: what Python encodes is decoded again, and text of other encodings is refused."""

from __future__ import annotations

import pytest

from components.captions.text import SEPARATOR, join_texts, split_texts, tidy
from components.text_files import decode_text
from components.types import SampleError

WESTERN = ("A café with a “menu”, 5 € – naïve", "Ein süßes Mädchen sagt „Größe“", "¿Qué? ¡Mañana! 1ª", "l’été créée")
OTHERS = (
    "Привет, мир и кошки",
    "Μια γάτα κάθεται στο χαλί",
    "قطة تجلس على سجادة",
    "बिल्ली चटाई पर बैठी है",
    "แมวนั่งบนเสื่อ ที่บ้าน",
    "一只猫坐在垫子上。",
    "猫がマットの上に座っています",
    "고양이가 매트 위에 앉아 있다",
    "می\u200cخواهم 👩\u200d🚒",
    "con mèo ngồi trên thảm",
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("text", [*WESTERN, *OTHERS, "a cat", "a"])
def test_unicode_is_decoded_with_and_without_its_mark(text: str, encoding: str) -> None:
    assert decode_text(text.encode(encoding)) == text


def test_marks_of_both_byte_orders() -> None:
    assert decode_text(b"\xfe\xff" + "né".encode("utf-16-be")) == "né"
    assert decode_text(b"\xff\xfe" + "né".encode("utf-16-le")) == "né"


@pytest.mark.parametrize("text", WESTERN)
def test_cp1252_is_decoded(text: str) -> None:
    assert decode_text(text.encode("cp1252")) == text


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("кошка на ковре", "cp1251"),
        ("кошка на ковре", "koi8-r"),
        ("一只猫坐在垫子上", "gbk"),
        ("猫がマットの上に座る", "shift_jis"),
        ("고양이가 매트 위에", "euc-kr"),
        ("γάτα στο χαλί", "cp1253"),
        ("żółw na płocie", "cp1250"),
        ("süße Mädchen", "mac-roman"),
        ("süße Mädchen", "cp437"),
        ("ładny kot", "cp1250"),
        ("Łódka", "iso8859_2"),
        ("Łąka i las", "cp1250"),
        ("Über den Wolken", "mac-roman"),
        ("über alles", "mac-roman"),
        ("Österreich", "cp850"),
        ("école", "cp850"),
        ("güneşli bir gün", "cp1254"),
        ("kırmızı araba", "cp1254"),
        ("œuvre", "iso8859_15"),
        ("5€", "iso8859_15"),
        ("猫がマットの上に座る", "iso2022_jp"),
        ("고양이가 매트 위에", "iso2022_kr"),
    ],
)
def test_other_encodings_are_refused_and_not_read_as_cp1252(text: str, encoding: str) -> None:
    with pytest.raises(SampleError, match="save it as UTF-8"):
        decode_text(text.encode(encoding))


@pytest.mark.parametrize(
    "data", [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\xff\xd8\xff\xe0\0\x10JFIF\0", b"\xff\xfea", b"\1\2\3"]
)
def test_bytes_that_are_no_text_are_refused(data: bytes) -> None:
    with pytest.raises(SampleError) as error:
        decode_text(data)
    assert error.value.code == "not_text"


def test_a_stray_control_character_does_not_change_the_encoding() -> None:
    assert decode_text(b"a\0b cats") == "a\0b cats"
    assert decode_text(b"tab\there\x1b[31mred") == "tab\there\x1b[31mred"


def test_the_beginning_of_a_file_may_end_inside_a_character() -> None:
    assert decode_text("xxé".encode()[:-1], is_whole=False) == "xx"
    assert decode_text("añb".encode("utf-16")[:-1], is_whole=False) == "añ"
    with pytest.raises(SampleError):
        decode_text("xxé".encode("utf-8-sig")[:-1])


def test_joiners_selectors_and_flags_stay() -> None:
    flag = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
    for text in ("می\u200cخواهم", "क्\u200dष", "👩\u200d👩\u200d👧", "❤\ufe0f", flag, "\u06dd١٢"):
        assert tidy(f" {text}\n") == text
    assert tidy("a\U000e0068\U000e0069 b") == "a b", "tags without a flag are hidden text"
    assert tidy("co\u00adoperate \ufeffx\u2066y\ufffd\ufffe") == "cooperate xy"
    assert tidy("\u200c \u200d") == ""


def test_several_texts_are_one_caption() -> None:
    assert join_texts([" a\ncat ", "", "a pet"]) == f"a cat{SEPARATOR}a pet"
    assert split_texts(f"a cat{SEPARATOR}a pet") == ["a cat", "a pet"]
    assert (join_texts(["a"]), split_texts("a"), split_texts(""), split_texts(" ")) == ("a", ["a"], [], [])


@pytest.mark.parametrize(
    "text",
    [
        "Þórður sagði nýja sögu",
        "¡Hola! «¿Sí?» ‚Ja‘, sagte er",
        "© Zoë, 20 °C, 1½in, £5, ±2 µm, m² ™",
        "»Žižek« in München",
    ],
)
def test_signs_of_western_texts_stay(text: str) -> None:
    assert decode_text(text.encode("cp1252")) == text


def test_the_separator_of_mongolian_vowels_stays() -> None:
    assert tidy("\u182e\u180e\u1820\n") == "\u182e\u180e\u1820"
