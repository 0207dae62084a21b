"""The report of an invented curation: its counts are right, foreign text is escaped, and examples are safe."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Pillow

import pipelines.curation.report as report_module
from components.corpora import Bounds, CorpusSpec, ModelScore
from components.images import encode_png
from components.quality import SCORES
from components.randomness import generator
from components.types import SampleError
from pipelines.core.errors import Failure
from pipelines.curation.report import fact_text, write_curate_report
from pipelines.curation.survey import origin

NASTY = '<script>alert("x")</script>'
TEXTS = ("key", "source", "sha256", "ext", "licence", "credit", "caption", "at", "split", "code", "stage", "detail")
TYPES = {"number": pa.int64(), "bytes": pa.int64(), "width": pa.int32(), "height": pa.int32()}
VOID = ("meta", "img", "br", "line", "path", "rect", "polyline")


class Page(HTMLParser):
    """The content of a page: tags, addresses, alternative texts, words."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.alts, self.words, self.open = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for n, v in attrs if n in ("src", "href", "srcset", "action", "data", "poster")]
        self.alts += [value for name, value in attrs if name == "alt" and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def decided_row(number, code="", **facts):
    """A row as `select` writes it, by default of a decoded picture."""
    row = dict.fromkeys(TEXTS, "") | {"number": number, "key": f"p{number:04d}", "source": f"folder:p{number}.png"}
    row |= {"bytes": 5000 + number, "width": 80, "height": 64, "ext": "png", "at": json.dumps({"n": number})}
    row |= {"split": "" if code else "train", "code": code, "stage": "filter" if code else ""}
    return row | facts


def broken_row(number, code, detail="it is broken", **facts):
    nothing = {"width": 0, "height": 0, "ext": "", "stage": "measure", "detail": detail}
    return decided_row(number, code, **{**nothing, **facts})


def write_parts(folder, rows, scores=(), size=40):
    folder.mkdir(parents=True, exist_ok=True)
    types = TYPES | dict.fromkeys(TEXTS, pa.string()) | {f"score/{name}": pa.float32() for name in scores}
    paths = []
    for first in range(0, len(rows), size):
        columns = {n: pa.array([row.get(n) for row in rows[first : first + size]], t) for n, t in types.items()}
        paths.append(folder / f"{first:06d}.parquet")
        pq.write_table(pa.table(columns), paths[-1])
    return paths


def picture(number, height=64, width=80):
    base = generator(number, "picture").integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.kron(base, np.ones((8, 8, 1), np.uint8))


def read(at):
    return encode_png(picture(json.loads(at)["n"]))


def page_of(tmp_path, rows, bounds=None, scores=(), spec=None, facts=None, read=read):
    parts = write_parts(tmp_path / "work" / "decided", rows, scores)
    out = write_curate_report(tmp_path, spec or CorpusSpec(name="test"), bounds or {}, parts, read, facts or {})
    assert out == tmp_path / "report.html"
    page = Page(out.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def test_the_page_counts_every_candidate(tmp_path):
    rows = [decided_row(n, caption="a cat" if n < 30 else "", licence="CC0-1.0") for n in range(60)]
    rows += [decided_row(n, split="held_out") for n in range(60, 70)]
    rows += [decided_row(n, "blurred", detail="sharpness is 0.5", **{"score/sharpness": 0.5}) for n in range(70, 82)]
    rows += [decided_row(n, "duplicate", stage="select", detail="same bytes as p0001") for n in range(82, 87)]
    rows += [broken_row(n, "truncated") for n in range(87, 99)] + [broken_row(99, "http_error", stage="list")]
    facts = {"corpus digest": "abc123", "bytes": 3 * 2**20, "seconds": 75.2, "stages": {"list": 1, "measure": 12}}
    bounds = {"sharpness": Bounds(min=1.0)}
    for row in rows[:70]:
        row["score/sharpness"] = 5.0 + row["number"] / 10
    text = page_of(tmp_path, rows, bounds, ["sharpness"], facts=facts).text
    for words in (
        "Candidates 100 Accepted 70 70.0 % · train 60 · held-out 10 Rejected 30 30.0 % , for 4 reasons",
        "With a caption 42.9 %",
        "Candidates listed 100",
        "Could be read and decoded 87 −13",
        "Within all thresholds 75 −12",
        "No copies 70 −5",
        "blurred filter 12 12.0 % sharpness below 1. " + SCORES["sharpness"].description,
        "truncated measure 12 12.0 % The file or the download ends early.",
        "duplicate select 5 5.0 % The same bytes as an earlier picture.",
        "http_error list 1 1.0 % The server refused for good, as with 404.",
        "corpus digest abc123 bytes 3 MiB seconds 1 min 15 s stages list 1 · measure 12",
        "sharpness accepted ≥ 1",
        "refuses 12 (12.0 %) · measured 0.5 to 11.9",
        "CC0-1.0 60 60",
        "not stated 40 10",
        "p0070 sharpness 0.5",
        "8 of 12 with source and detail",
        "quarantine.jsonl",
        "restoray replay",
    ):
        assert words.replace("% ,", "%,") in text, words


def test_bars_add_up_to_the_counts(tmp_path):
    values = generator(3, "values").normal(4, 2, 500)
    bounds = {"sharpness": Bounds(min=2.0)}
    rows = [
        decided_row(n, "" if bounds["sharpness"].hold(float(np.float32(v))) else "blurred", **{"score/sharpness": v})
        for n, v in enumerate(values)
    ]
    parts = write_parts(tmp_path / "decided", rows, ["sharpness"])
    text = write_curate_report(tmp_path, CorpusSpec(name="t"), bounds, parts, read, {}).read_text(encoding="utf-8")
    chart = text.partition('aria-label="sharpness')[2].partition("</svg>")[0]
    tips = re.findall(r"<title>[^:]*: (\d+) accepted, (\d+) rejected", chart)
    accepted = int((values >= 2).sum())
    assert [sum(int(tip[i]) for tip in tips) for i in (0, 1)] == [accepted, 500 - accepted]
    assert not any(int(a) and int(r) for a, r in tips)  # no bar crosses the threshold
    assert chart.count('class="bound"') == 1
    assert chart.count('class="outside"') == 1


def test_foreign_text_is_escaped_and_the_page_sends_nothing(tmp_path):
    strange = {"key": NASTY, "source": f"https://{NASTY}/a.png", "licence": NASTY, "detail": NASTY, "caption": NASTY}
    rows = [decided_row(0, **strange), decided_row(1, NASTY, **strange), broken_row(2, "corrupt", **strange)]
    spec = CorpusSpec(name=NASTY, description=NASTY, licence=NASTY, homepage=f'javascript:"{NASTY}')
    page = page_of(tmp_path, rows, {}, [NASTY], spec, {NASTY: NASTY})
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert NASTY in page.text
    assert all(address.startswith(("data:image/jpeg;base64,", "#")) for address in page.addresses)
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", text)
    assert str(tmp_path) not in text


def shown_keys(page):
    return {alt for alt in page.alts if re.fullmatch(r"p\d{4}", alt)}


def test_examples_do_not_depend_on_order_or_parts(tmp_path):
    rows = [decided_row(n, "" if n % 2 else "blurred") for n in range(300)]
    one = page_of(tmp_path / "a", rows)
    shuffled = [rows[n] for n in generator(5, "order").permutation(300)]
    parts = write_parts(tmp_path / "b" / "decided", shuffled, size=7)
    write_curate_report(tmp_path / "b", CorpusSpec(name="test"), {}, parts, read, {})
    other = Page((tmp_path / "b" / "report.html").read_text(encoding="utf-8"))
    assert shown_keys(one) == shown_keys(other)
    odd = {key for key in shown_keys(one) if int(key[1:]) % 2}
    assert (len(odd), len(shown_keys(one))) == (16, 24)
    assert max(int(key[1:]) for key in odd) > 100  # not only the first rows
    assert "8 of 150 with source and detail" in one.text


def test_the_same_rows_give_the_same_bytes(tmp_path):
    rows = [decided_row(n, "" if n % 3 else "blurred", **{"score/sharpness": n, "score/noise": n}) for n in range(90)]
    pages = []
    for name in ("a", "b"):
        page_of(tmp_path / name, rows, {"noise": Bounds(max=50)}, ["sharpness", "noise"])
        pages.append((tmp_path / name / "report.html").read_bytes())
    assert pages[0] == pages[1]


def test_only_pictures_that_were_decoded_before_are_decoded(tmp_path):
    numbers = []

    def read_and_note(at):
        numbers.append(json.loads(at)["n"])
        return read(at)

    unsafe = ("too_large", "crashed", "timeout", "out_of_memory", "too_small", "truncated")
    rows = [broken_row(n, code) for n, code in enumerate(unsafe)]
    rows += [decided_row(10), decided_row(11, "noisy"), decided_row(12, "duplicate", stage="select")]
    rows.append(decided_row(13, "faces", stage="score", detail="faces failed: [crashed] the process died"))
    page = page_of(tmp_path, rows, {"faces": Bounds(min=0.5)}, ["faces"], read=read_and_note)
    assert sorted(numbers) == [10, 11, 12]
    assert shown_keys(page) == {"p0010", "p0011", "p0012"}
    assert page.text.count("it is broken") == len(unsafe)
    assert "faces failed: [crashed] the process died" in page.text


def test_missing_pictures_are_counted(tmp_path):
    def partly(at):
        number = json.loads(at)["n"]
        if number == 1:
            raise SampleError("unreadable", "gone")
        if number == 2:
            raise FileNotFoundError(2, "gone")
        return b"no picture" if number == 3 else read(at)

    page = page_of(tmp_path, [decided_row(n) for n in range(6)], read=partly)
    assert shown_keys(page) == {"p0000", "p0004", "p0005"}
    assert "3 pictures of this choice could not be read again and are left out." in page.text


def test_examples_show_the_whole_picture_and_a_part_at_native_size(tmp_path):
    image = np.full((400, 600, 3), 90, np.uint8)
    image[250:394, 450:594] = picture(7, 144, 144)
    page = page_of(tmp_path, [decided_row(0, width=600, height=400)], read=lambda _: encode_png(image))
    data = [a.partition(",")[2] for a in page.addresses if a.startswith("data:")]
    whole, part = (np.asarray(Pillow.open(io.BytesIO(base64.b64decode(text)))) for text in data)
    assert (whole.shape, part.shape) == ((96, 144, 3), (144, 144, 3))
    assert part.std() > 40  # the corner with detail, not the plain middle
    assert "600 × 400 · train" in page.text


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [decided_row(0)],
        [broken_row(0, "empty", at="", bytes=0)],
        [decided_row(n, split="held_out") for n in range(3)],
        [decided_row(0, "odd_code", stage="odd_stage")],
    ],
    ids=["nothing", "one", "one broken", "no train", "unknown code and stage"],
)
def test_small_corpora_have_a_page(tmp_path, rows):
    page = page_of(tmp_path, rows)
    assert f"Candidates {len(rows)}" in page.text
    accepted = sum(not row["code"] for row in rows)
    assert f"Accepted {accepted}" in page.text
    assert ("Reasons" in page.text) is (accepted < len(rows))
    assert "nan" not in (tmp_path / "report.html").read_text(encoding="utf-8").partition("<main>")[2]


def test_scores_without_values_or_description_have_no_chart_or_text(tmp_path):
    spec = CorpusSpec(name="test")
    spec.filters.models = [ModelScore(name="faces", kind="detector", model="some/detr", label="person")]
    bounds = {"sharpness": Bounds(min=1), "faces": Bounds(max=0.9), "unheard_of": Bounds()}
    rows = [decided_row(n, **{"score/faces": n / 4, "score/unheard_of": 1.0}) for n in range(4)]
    rows.append(decided_row(4, "faces", **{"score/faces": 0.95, "score/unheard_of": float("nan")}))
    text = page_of(tmp_path, rows, bounds, ["sharpness", "faces", "unheard_of"], spec).text
    assert "faces accepted ≤ 0.9 Learned score: detector some/detr, “person”." in text
    assert "Measured, without a threshold unheard_of" in text
    assert "faces filter 1 20.0 % faces above 0.9." in text
    assert "p0004 faces 0.95" in text
    assert "sharpness" not in text


def test_a_score_that_is_missing_in_the_sample_has_a_chart(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.curation.survey.SAMPLED_FILES", 1)
    rows = [decided_row(n, **{"score/rare": n if n == 70 else None}) for n in range(80)]
    text = page_of(tmp_path, rows, {}, ["rare"]).text
    assert "Measured, without a threshold rare" in text
    assert "measured 70" in text


def test_a_page_of_noise_stays_below_the_limit(tmp_path, monkeypatch):
    def noise(at):
        shape = (160, 160, 3)
        return encode_png(generator(json.loads(at)["n"], "noise").integers(0, 256, shape, dtype=np.uint8))

    rows = [decided_row(n, f"reason_{n % 3}") for n in range(30)]
    monkeypatch.setattr(report_module, "MAX_BYTES", 400_000)
    page_of(tmp_path, rows, read=noise)
    assert (tmp_path / "report.html").stat().st_size <= 400_000
    monkeypatch.setattr(report_module, "MAX_BYTES", 10_000_000)
    page_of(tmp_path, rows, read=noise)
    assert (tmp_path / "report.html").stat().st_size > 400_000


def test_kinds_beyond_the_table_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.curation.survey.KINDS_COUNTED", 20)
    rows = [decided_row(n, source=f"https://host{n % 25:02d}.test/{n}.png") for n in range(100)]
    text = page_of(tmp_path, rows).text
    assert "https://host00.test 4 4" in text
    assert "more than 5 more 40 40" in text  # 5 of the 20 kinds with their own count, and 5 others


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("folder:a.png", "folder"),
        ("folder:birds/more/a.png", "folder:birds"),
        ("tar:2026/00001.tar/x/a.jpg", "tar:2026/00001.tar"),
        ("tar:00001.tar", "tar:00001.tar"),
        ("tar:b.tar.gz/a.jpg", "tar:b.tar.gz"),
        ("parquet:part-1.parquet#3/77", "parquet:part-1.parquet"),
        ("https://images.test:8080/a/b.jpg?x=1", "https://images.test:8080"),
        ("plain", "plain"),
    ],
)
def test_sources_are_counted_by_their_place(source, expected):
    assert origin(source) == expected


def test_every_code_of_the_decoder_has_a_meaning():
    import components.images
    import pipelines.curation.sources.fetch

    texts = "\n".join(module.__doc__ for module in (components.images, pipelines.curation.sources.fetch))
    codes = {
        c for line in re.findall(r"^    ([a-z_]+(?:, [a-z_]+)*)(?: \*)? {2,}", texts, re.M) for c in line.split(", ")
    }
    assert len(codes) > 20
    assert codes <= report_module.MEANINGS.keys()


def test_facts_have_units():
    assert fact_text("bytes", 1536) == "1.5 KiB"
    assert [fact_text("seconds", s) for s in (3.25, 75, 7260)] == ["3.2 s", "1 min 15 s", "2 h 1 min"]
    assert fact_text("counts", {"list": 1200, "measure": 2}) == "list 1,200 · measure 2"
    assert fact_text("digest", "a" * 64) == "a" * 64


def test_unreadable_rows_and_unwritable_pages_are_one_sentence(tmp_path):
    parts = write_parts(tmp_path / "decided", [decided_row(0)])
    spec = CorpusSpec(name="test")
    with pytest.raises(Failure, match=r"^cannot write r\.html to .*: Not a directory\.$"):
        write_curate_report(tmp_path, spec, {}, parts, read, {}, parts[0] / "x" / "r.html")
    parts[0].write_bytes(b"PAR1 and nothing else")
    with pytest.raises(Failure, match=r"^the decided rows of test cannot be read: "):
        write_curate_report(tmp_path, spec, {}, parts, read, {})
    assert not (tmp_path / "report.html").exists()


def test_the_page_can_have_another_path(tmp_path):
    parts = write_parts(tmp_path / "decided", [decided_row(0)])
    target = tmp_path / "new" / "page.html"
    assert write_curate_report(tmp_path, CorpusSpec(name="t"), {}, parts, read, {}, target) == target
    assert not (tmp_path / "report.html").exists()
    assert [path.name for path in target.parent.iterdir()] == ["page.html"]


def test_real_pictures(tmp_path, images_dir):
    paths = sorted((images_dir / "hq").glob("*.jpg"))[:4]
    rows = [decided_row(n, at=str(path), bytes=path.stat().st_size) for n, path in enumerate(paths)]
    page = page_of(tmp_path, rows, read=lambda at: Path(at).read_bytes())
    assert len([a for a in page.addresses if a.startswith("data:image/jpeg")]) == 8
