"""`restoray analyze`: studies of a tiny InstantIR on small pictures: values, resume, quarantine and sentences."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from components.evaluation.statistics import Band, mean_band, rank_correlation
from components.images import encode_png
from components.synthetic import dead_leaves
from pipelines.analysis import levels as lv
from pipelines.analysis.bands import band_text, correlation_verdict, verdict
from pipelines.analysis.instantir.creative import far_captions, groups_of
from pipelines.analysis.instantir.previews import difference, over_steps, quality_sentences
from pipelines.analysis.instantir.questions import fixed_timesteps
from pipelines.analysis.model import StudyJob
from pipelines.analysis.studies import analyze
from pipelines.analysis.study import StudyResult, finite, numbers
from pipelines.commands import main as cli
from pipelines.core.errors import Failure, UsageError
from pipelines.core.pictures import is_output
from pipelines.core.rows import read_lines
from pipelines.pages.figures import Line, Panel, draw

STEPS, SIDE = 2, 32


def fill(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        (folder / f"p{index}.png").write_bytes(encode_png(dead_leaves(48, 0, index)))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, a broken one and a note."""
    pictures = fill(tmp_path / "in", 2)
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0nothing")
    (pictures / "notes.txt").write_text("")
    return pictures


def run(
    study: str, model: Path, images: Path, out: Path, options: dict[str, int] | None = None, **settings: Any
) -> StudyResult:
    """A study at SIDE with the nano preset."""
    job = StudyJob(model=model, images=images, out=out, options=options or {}, side_px=SIDE)
    return analyze(study, job, mixed="realesrgan-nano", **settings)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


# -- closed forms ------------------------------------------------------------------------------------------------------


def test_levels_are_the_papers_four_and_every_fault_once() -> None:
    levels = lv.all_levels("realesrgan-nano")
    assert {level.name for level in levels} >= set(lv.QUALITY)
    assert len({level.name for level in levels}) == len(levels) == 4 + 12 - 2  # x4 and x8 are in both lists
    for kind, strengths in lv.STRENGTHS.items():
        assert tuple(level.strength for level in levels if level.kind == kind) == strengths
    assert [level.name for level in lv.all_levels("realesrgan-nano", faults=False)] == list(lv.QUALITY)
    picture = dead_leaves(64, 0, 0)
    assert np.array_equal(lv.degrade(levels[0], picture, 0, "a"), picture)
    for kind in lv.STRENGTHS:  # a stronger fault has a larger error
        squares = [
            float(np.square(lv.degrade(level, picture, 0, "a").astype(float) - picture).mean())
            for level in levels
            if level.kind == kind
        ]
        assert 0 < squares[0] < squares[1] < squares[2], kind
    with pytest.raises(UsageError, match="realesrgan"):
        lv.all_levels("realesrgn")


def band(low: float, high: float) -> Band:
    return Band(mean=np.array((low + high) / 2), low=np.array(low), high=np.array(high))


@pytest.mark.parametrize(
    ("bands", "words"),
    [
        ([(1, 2), (1, 3)], "as the paper says"),
        ([(-2, -1), (-3, -1)], "against the paper"),
        ([(-1, 1), (-2, 3)], "does not depend"),
        ([(1, 2), (-2, 3)], "not ordered"),
        ([(math.nan, math.nan)] * 2, "too few to say"),
    ],
)
def test_sentences_follow_the_intervals(bands: list[tuple[float, float]], words: str) -> None:
    pairs = [("x4", "HQ"), ("x8", "x4")]
    steps = {name: {pair: band(*b) for pair, b in zip(pairs, bands, strict=True)} for name in ("to_denoised", "delta")}
    sentences = quality_sentences(steps)
    assert len(sentences) == 2
    assert all(words in sentence for sentence in sentences)


def test_words_follow_the_interval_and_few_pictures_have_none() -> None:
    x = np.arange(8.0)
    up, down = rank_correlation(x, x), rank_correlation(x, -x)
    assert [correlation_verdict(each, "rises", "falls") for each in (up, down)] == ["rises", "falls"]
    assert correlation_verdict(rank_correlation(x, np.array([3.0, 1, 4, 1, 5, 0, 2, 6])), "", "") == "no clear effect"
    assert correlation_verdict(rank_correlation(x[:5], x[:5]), "rises", "falls") == "too few to say"
    assert "all values are equal" in correlation_verdict(rank_correlation(x, np.ones(8)), "rises", "falls")
    assert (verdict(mean_band(x + 9)), verdict(mean_band(-9 - x)), verdict(mean_band(x - 3.5))) == (
        "higher",
        "lower",
        "no clear effect",
    )
    assert (verdict(mean_band(x[:5] + 9)), band_text(mean_band(x[:5]))) == ("too few to say", "+2")


def test_a_difference_of_ratios_is_one_of_logarithms() -> None:
    one = np.array([[np.nan, 1.0, 4.0], [np.nan, 2.0, 2.0]] * 3)
    assert over_steps(one, "change").tolist() == [2.5, 2.0] * 3
    assert over_steps(one, "delta").tolist() == pytest.approx([np.log(2.0)] * 6)
    ratio = difference(3 * one, one, "delta")
    assert np.exp([ratio.mean, ratio.low, ratio.high]).tolist() == pytest.approx([3.0] * 3)


def test_far_prompts_share_fewest_words() -> None:
    captions = {
        "a": "red, dark, low contrast, smooth",
        "b": "red and blue, dark, low contrast, smooth",
        "c": "green, bright, high contrast, detailed",
    }
    far = far_captions(captions, 0)
    assert (far["a"], far["b"]) == (captions["c"], captions["c"])
    assert far["c"] in (captions["a"], captions["b"])
    assert far == far_captions(dict(reversed(captions.items())), 0)


def test_groups_are_thirds_by_rank() -> None:
    assert groups_of(np.array([0.5, -1.0, 3.0, 0.1, 0.0, 9.0])).tolist() == [1, 0, 2, 1, 0, 2]


def test_fixed_timesteps_are_the_samplers_own() -> None:
    assert fixed_timesteps(np.array([751, 501, 251, 1])) == {"first": 751, "middle": 251, "last": 1}


def test_rows_hold_plain_numbers() -> None:
    assert numbers(np.array([[1.23456789, np.nan], [np.inf, 0]])) == [[1.23457, None], [None, 0.0]]
    assert finite({"a": np.array([1.0, np.nan]), "b": (np.float64(2), "x")}) == {"a": [1.0, None], "b": [2.0, "x"]}


def test_a_plot_is_a_png_and_equal_numbers_give_equal_bytes() -> None:
    y = np.array([1.0, np.nan, 3.0])
    panels = [
        Panel(title="lines", x_label="x", y_label="y", x=np.arange(3.0), lines=[Line(label="a", y=y, low=y, high=y)]),
        Panel(title="points", x_label="x", y_label="y", points=(y, y), reference=(2.0, "here")),
    ]
    png = draw(panels)
    assert png.startswith(b"\x89PNG")
    assert png == draw(panels)
    with pytest.raises(ValueError, match="panel"):
        draw([])


# -- studies -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.full  # half a minute; the studies' parts are in tests/components/test_insight.py
def test_previews_resume_and_quarantine(tiny: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run("previews", tiny, folder, out, faults=False)
    assert (first.measured, first.kept, first.quarantined, first.ignored) == (2, 0, 1, 1)
    (bad,) = read_lines(out / "quarantine.jsonl")
    assert (bad["key"], bad["code"]) == ("broken", "truncated")
    rows = read_lines(out / "values.jsonl")
    assert [row["key"] for row in rows] == ["p0", "p1"]
    for row in rows:
        assert set(row["levels"]) == set(lv.QUALITY)
        assert row["levels"]["HQ"]["lq_rms"] == 0
        for by in row["levels"].values():
            assert by["change"][0] is None and by["delta"][0] is None
            expected = (by["to_denoised"][1] / by["change"][1]) ** 2
            assert by["delta"][1] == pytest.approx(expected, rel=1e-4)
    cells = table(out / "values.csv")
    assert len(cells) == 2 * 4 * STEPS
    assert float(cells[0]["to_denoised"]) == rows[0]["levels"]["HQ"]["to_denoised"][0]
    summary = json.loads((out / "summary.json").read_text())
    mean = np.mean([row["levels"]["x8"]["to_denoised"][1] for row in rows])
    assert summary["levels"]["x8"]["to_denoised"]["mean"][1] == pytest.approx(mean)
    page = first.report.read_text()
    assert "data:image/png" in page and "data:image/jpeg" in page
    assert "http" not in page.replace("http-equiv", "")
    assert all(sentence.split(".")[0][:20] in page for sentence in first.seen)
    assert (out / "fig4.png").is_file() and (out / "previews.jpg").is_file()
    assert is_output(out, None)

    before = first.report.read_bytes()
    lines = (out / "values.jsonl").read_bytes().splitlines(keepends=True)
    (out / "values.jsonl").write_bytes(lines[0] + lines[1][:40])  # a process that was killed while it wrote
    resumed = run("previews", tiny, folder, out, faults=False)
    assert (resumed.measured, resumed.kept) == (1, 1)
    assert resumed.report.read_bytes() == before  # the same noise: the same numbers and pictures
    (out / "strips" / "p0.png").write_bytes(b"damaged")
    (folder / "p1.png").write_bytes(encode_png(dead_leaves(48, 1, 7)))
    (folder / "p2.png").write_bytes(encode_png(dead_leaves(48, 1, 8)))
    third = run("previews", tiny, folder, out, faults=False)
    assert (third.measured, third.kept) == (3, 0)
    again = run("previews", tiny, folder, out, faults=False)
    assert (again.measured, again.kept) == (0, 3)
    (folder / "p2.png").unlink()
    other = run("previews", tiny, folder, out, {"steps": 1}, faults=False)
    assert (other.measured, other.kept) == (2, 0)
    with pytest.raises(UsageError, match="holds the study 'previews'"):
        run("tokens", tiny, folder, out)


@pytest.mark.slow
def test_clean_tokens_retrieve_themselves_and_every_fault_has_a_sentence(
    tiny: Path, folder: Path, tmp_path: Path
) -> None:
    result = run("tokens", tiny, folder, tmp_path / "out")
    rows = read_lines(tmp_path / "out" / "values.jsonl")
    assert len(rows) == 2
    for row in rows:
        for by in row["levels"]["HQ"].values():
            assert by["rank"] == 1 and by["similarity"] == pytest.approx(1) and by["margin"] > 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["chance"] == pytest.approx(1 / 2)
    ranks = [row["levels"]["noise 40"]["pooled"]["rank"] for row in rows]
    assert summary["found"]["noise 40"]["pooled"]["mean"] == pytest.approx(np.mean([rank == 1 for rank in ranks]))
    assert {kind for kind in lv.STRENGTHS if any(text.startswith(kind) for text in result.seen)} == set(lv.STRENGTHS)
    # another gallery may change every rank, so all rows are measured again
    (folder / "p9.png").write_bytes(encode_png(dead_leaves(48, 0, 9)))
    assert run("tokens", tiny, folder, tmp_path / "out").measured == 3


@pytest.mark.slow
@pytest.mark.full
def test_prompts_the_time_input_and_crowds(tiny: Path, tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", 4)
    creative = run("creative", tiny, folder, tmp_path / "c", {"steps": 3}, stop=0.7)
    rows = read_lines(tmp_path / "c" / "values.jsonl")
    for row in rows:
        for name in ("close", "far"):
            # Aggregator and previews stop after two of three steps. Both runs have the same noise, so only the prompt
            # moves the first preview.
            assert row[name]["preview"][2] is None and row[name]["preview"][0] > 0
            assert row[name]["preview_mean"] == pytest.approx(np.mean(row[name]["preview"][:2]), rel=1e-4)
    assert sum("prompts, previews" in sentence for sentence in creative.seen) == 2
    with pytest.raises(UsageError, match="no step with a preview"):
        run("creative", tiny, folder, tmp_path / "x", {"steps": 2}, stop=0.3)

    run("time", tiny, folder, tmp_path / "t")
    rows = read_lines(tmp_path / "t" / "values.jsonl")
    for row in rows:
        assert row["told"]["true"]["moved"] == [0.0] * STEPS
        # with the first step's own time the first preview equals the ordinary one; with another time it does not
        assert row["told"]["first"]["moved"][0] == pytest.approx(0, abs=1e-5)
        assert row["told"]["last"]["moved"][0] > 1e-5

    crowded = run("crowded", tiny, folder, tmp_path / "k")
    assert crowded.measured == 4
    cells = table(tmp_path / "k" / "values.csv")
    assert sorted(cells[0]) == sorted(
        [
            "key",
            "joint",
            "edges",
            "segments",
            "hues",
            "lq_error",
            "error",
            "gain",
            "preview_error",
            "delta",
            "aggregator",
        ]
    )
    summary = json.loads((tmp_path / "k" / "summary.json").read_text())
    correlation = summary["correlations"]["error"]["edges"]
    x, y = ([float(cell[name]) for cell in cells] for name in ("edges", "error"))
    d = np.argsort(np.argsort(x)) - np.argsort(np.argsort(y))
    assert correlation["rho"] == pytest.approx(1 - 6 * float((d**2).sum()) / (4 * 15))
    assert correlation["n"] == 4


@pytest.mark.slow
def test_accuracy_counts_the_encoders_predictions(tmp_path: Path) -> None:
    """A tiny DINOv2 with a head, saved and loaded like the real one. transformers alone repeats its predictions."""
    import torch
    from transformers import BitImageProcessor, Dinov2Config, Dinov2ForImageClassification

    from pipelines.analysis.accuracy import analyze_accuracy

    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        mlp_ratio=2,
        patch_size=8,
        image_size=32,
        num_labels=3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        head = Dinov2ForImageClassification(config).eval()
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for part in (head, processor):
        part.save_pretrained(tmp_path / "encoder")
    images = tmp_path / "imagenet"
    pictures = {}
    for number, name in enumerate(("n01", "n02", "n03")):
        (images / name).mkdir(parents=True)
        for index in range(2):
            pictures[f"{name}/{index}"] = picture = dead_leaves(256, number, index)
            (images / name / f"{index}.png").write_bytes(encode_png(picture))
    result = analyze_accuracy(images, tmp_path / "out", str(tmp_path / "encoder"), mixed="realesrgan-nano")
    rows = {row["key"]: row for row in read_lines(tmp_path / "out" / "values.jsonl")}
    assert set(rows) == set(pictures)
    with torch.inference_mode():
        pixels = processor(images=list(pictures.values()), return_tensors="pt").pixel_values
        expected = dict(zip(pictures, head(pixels).logits.argmax(dim=1).tolist(), strict=True))
    assert {key: row["predicted"]["HQ"] for key, row in rows.items()} == expected
    assert {key: row["class"] for key, row in rows.items()} == {key: int(key[2]) - 1 for key in rows}
    right = np.mean([expected[key] == rows[key]["class"] for key in rows])
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["accuracy"]["HQ"]["mean"] == pytest.approx(right)
    assert f"Right of clean pictures: {right:.3f} [" in result.seen[0]

    # nearest class means: clean references classify themselves if each class has one picture
    reference = tmp_path / "reference"
    for name in ("n01", "n02", "n03"):
        (reference / name).mkdir(parents=True)
        (reference / name / "0.png").write_bytes((images / name / "0.png").read_bytes())
    near = tmp_path / "near"
    analyze_accuracy(reference, near, str(tmp_path / "encoder"), "nearest", reference, mixed="realesrgan-nano")
    assert all(row["predicted"]["HQ"] == row["class"] for row in read_lines(near / "values.jsonl"))

    for arguments, message in (
        ({"method": "linaer"}, 'Did you mean "linear"'),
        ({"method": "nearest"}, "--reference"),
        ({"encoder": str(tmp_path / "nowhere")}, "no DINOv2 weights"),
    ):
        arguments = {"encoder": str(tmp_path / "encoder"), **arguments}
        with pytest.raises(UsageError, match=message):
            analyze_accuracy(images, tmp_path / "x", **arguments)
    (images / "n04").mkdir()
    (images / "n04" / "0.png").write_bytes(encode_png(dead_leaves(64, 9, 9)))
    with pytest.raises(UsageError, match="4 of 4 folders are not classes of the head"):
        analyze_accuracy(images, tmp_path / "x", str(tmp_path / "encoder"))


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_ends_with_3_where_a_picture_is_bad(
    tiny: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "analyze",
        "crowded",
        "--model",
        str(tiny),
        "--images",
        str(folder),
        "--out",
        str(tmp_path / "out"),
    ]
    words += ["--side", str(SIDE), "--mixed", "realesrgan-nano", "--json", "steps=1"]
    assert cli.build_app()(words, standalone_mode=False) == 3
    document = json.loads(capsys.readouterr().out)
    assert (document["measured"], document["quarantined"]) == (2, 1)
    assert document["seen"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["stepz=3"], 'Did you mean "?steps'),
        (["--mixed", "realesrgn"], "Did you mean"),
        (["--imagse", "x"], 'Did you mean "--images"'),
        (["--side", "40"], "multiple of 16 px"),
        (["--side", "4"], "at least 8 px"),
        (["--limit", "-1"], "at least 1"),
        (["--model", "nanoo"], 'Did you mean "nano"'),
        (["--model", "nano"], "this study needs an InstantIR model"),
        (["--images", "nowhere"], "does not exist"),
    ],
)
def test_wrong_input_is_one_sentence_and_makes_nothing(
    tiny: Path, folder: Path, tmp_path: Path, changes: list[str], message: str
) -> None:
    words = [
        "analyze",
        "previews",
        "--model",
        str(tiny),
        "--images",
        str(folder),
        "--out",
        str(tmp_path / "out"),
    ]
    with pytest.raises(UsageError, match=message):
        cli.build_app()([*words, *changes], standalone_mode=False)
    assert not (tmp_path / "out").exists()


def test_an_unknown_study_dies_with_the_near_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='Did you mean "previews"'):
        analyze("previws", StudyJob(model="nano", images=tmp_path, out=tmp_path / "out"))


@pytest.mark.slow
def test_a_folder_of_broken_pictures_fails(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0nothing")
    with pytest.raises(Failure, match="none of the 1 pictures"):
        run("time", tiny, tmp_path / "in", tmp_path / "out")
