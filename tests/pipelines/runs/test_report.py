"""The report of an artificial run: it holds everything, sends nothing, and escapes untrusted text."""

import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

import pipelines.runs.report as report_module
from components.images import encode_png
from components.randomness import generator
from pipelines.core.errors import Failure, UsageError
from pipelines.core.home import shipped_files
from pipelines.core.metrics import MetricRow
from pipelines.corpus.shards import write_corpus
from pipelines.evaluation.evaluate import evaluate
from pipelines.pages.charts import curve_chart, loss_pairs, nice_ticks, smooth
from pipelines.runs.engine import write_plan_json
from pipelines.runs.plan import load_plan
from pipelines.runs.records import PlanResult
from pipelines.runs.report import headline, write_report

NASTY = '<script>alert("x")</script>'


class Page(HTMLParser):
    """The tags, addresses and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.words, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [
            value for name, value in attrs if name in ("src", "href", "srcset", "action", "data", "poster")
        ]
        if tag not in ("meta", "img", "br", "line", "circle", "polyline", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "circle", "polyline"):
            assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def picture(seed, height=64, width=80):
    base = generator(seed, "picture").integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.kron(base, np.ones((8, 8, 1), np.uint8))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def add_corpus(folder):
    facts = {"licence": "CC0", "credit": NASTY, "caption": f"a {NASTY}"}
    samples = [(f"s{index}", "png", encode_png(picture(50 + index), {}), facts) for index in range(3)]
    write_corpus(folder, "test", {"train": samples})
    broken = {"key": f"bad{NASTY}", "source": "bad.jpg", "stage": "decode", "code": "truncated", "detail": "cut short"}
    write_lines(folder / "quarantine.jsonl", [broken, {**broken, "key": "flat", "code": "flat"}])


def add_training(folder):
    (folder / "samples").mkdir(parents=True)
    rows = [{"step": s, "name": "loss", "value": 1 / (1 + s / 50), "time": 0.0} for s in range(1, 201)]
    rows += [{"step": s, "name": "heldout/perceptor", "value": 0.8 - s / 1000, "time": 0.0} for s in range(0, 201, 50)]
    write_lines(folder / "metrics.jsonl", rows)
    for step in (0, 200):
        (folder / "samples" / f"step-{step:06d}.png").write_bytes(encode_png(picture(step, 64, 240), {}))
    (folder / "model").mkdir()
    card = {"name": "instantir-dcp-nano", "system": "instantir", "licence": "Apache-2.0", "prior": None}
    (folder / "model" / "model.json").write_text(json.dumps({**card, "metrics": {"autoencoder": {"psnr_db": 33.25}}}))


def add_pictures(folder):
    keys = ("cat", "deep/dog", "a & b's <i>")
    for index, key in enumerate(keys):
        hq = picture(index)
        poor = np.clip(hq.astype(int) + generator(index, "n").normal(0, 25, hq.shape), 0, 255).astype(np.uint8)
        better = ((hq.astype(int) + poor) // 2).astype(np.uint8)
        for role, image in {"hq": hq, "lq": poor, "restored": better}.items():
            path = folder / role / f"{key}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_png(image, {"seed": "7", "note": NASTY}))


@pytest.fixture
def run_dir(tmp_path):
    run = tmp_path / "demo-run"
    folders = {name: run / f"{name}-{'0' * 8}" for name in ("curate", "dcp", "restore", "evaluate")}
    add_corpus(folders["curate"])
    add_training(folders["dcp"])
    add_pictures(folders["restore"])
    source = folders["restore"]
    evaluate(
        source / "restored", source / "lq", source / "hq", folders["evaluate"], metrics=("psnr", "ms_ssim", "gmsd")
    )
    stages = [
        {
            "name": name,
            "verb": verb,
            "digest": "ab" * 32,
            "folder": folders[name].name,
            "seconds": seconds,
            "state": "finished",
            "skipped": False,
            "resolved": {"steps": 7, "prompt": NASTY},
        }
        for name, verb, seconds in (
            ("curate", "curate", 3.5),
            ("dcp", "train", 80.25),
            ("restore", "restore", 12),
            ("evaluate", "evaluate", 4),
        )
    ]
    plan = {"format": 1, "plan": "demo", "title": f"The demo {NASTY}", "stages": stages}
    (run / "plan.json").write_text(json.dumps(plan))
    return run


def page_of(run):
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_it_shows_the_whole_run(run_dir):
    out = write_report(run_dir)
    assert out == run_dir / "report.html"
    page = Page(out.read_text(encoding="utf-8"))
    assert page.open == []
    assert "3 pictures are too few to say whether restored beats its input in psnr" in page.text
    assert "better on 3 of 3 too few to say" in page.text and "95 % interval" not in page.text
    for words in (
        "cat",
        "deep/dog",
        "a & b's <i>",
        "truncated",
        "80.2",
        "autoencoder/psnr_db 33.25",
        "-25.0",
        "perceptor",
    ):
        assert words in page.text, words
    assert "restoray serve --model dcp-00000000/model" in page.text
    assert "3 numbers" not in page.text  # 9: ms_ssim on three pictures and three arms
    assert "9 numbers or pictures are missing" in page.text
    # 3 pictures x 3 roles, 2 sample sheets, 3 thumbnails
    assert len([a for a in page.addresses if a.startswith("data:image/jpeg;base64,")]) == 14
    assert page.tags.count("svg") == 1


def test_nothing_leaves_the_page(run_dir):
    text = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(text)
    assert all(address.startswith(("data:image/", "#")) for address in page.addresses)
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|@import|url\(|//cdn|fetch\(|XMLHttpRequest", text)
    assert str(run_dir.parent) not in text  # the page does not show where it was made


def test_untrusted_text_is_escaped(run_dir):
    text = write_report(run_dir).read_text(encoding="utf-8")
    assert "alert(" in text
    assert NASTY not in text
    assert text.count("<script") == 2  # the template's own script
    assert NASTY in Page(text).text


def test_the_best_arm_is_marked_by_direction(run_dir):
    summary_path = run_dir / "evaluate-00000000" / "summary.json"
    summary = json.loads(summary_path.read_text())
    rows = [json.loads(line) for line in (run_dir / "evaluate-00000000" / "scores.jsonl").read_text().splitlines()]
    table = report_module.score_table(rows, summary)
    columns = [column["name"] for column in table["columns"]]
    for block, row in zip(table["blocks"][1:], rows, strict=True):
        for name, pick in (("psnr", max), ("gmsd", min)):
            best = pick(row["scores"], key=lambda arm, row=row, name=name: row["scores"][arm][name])
            best_arms = [line["arm"] for line in block["lines"] if line["cells"][columns.index(name)]["best"]]
            assert best_arms == [report_module.ARM_LABELS[best]]
        assert block["lines"][0]["cells"][columns.index("ms_ssim")]["why"].startswith("needs 161 px")


@pytest.mark.parametrize("missing", ["curate", "dcp", "restore", "evaluate", "plan.json"])
def test_partial_runs_have_a_report(run_dir, missing):

    if missing == "plan.json":
        (run_dir / missing).unlink()
    else:
        shutil.rmtree(run_dir / f"{missing}-00000000")
    page = page_of(run_dir)
    assert page.open == []
    assert ("has not been evaluated" in page.text) is (missing == "evaluate")


def test_the_report_of_a_killed_run_shows_what_is_missing(run_dir):
    plan = json.loads((run_dir / "plan.json").read_text())
    plan["stages"][3] |= {"state": "interrupted", "seconds": 0.0}
    (run_dir / "plan.json").write_text(json.dumps(plan))
    with (run_dir / "dcp-00000000" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 201, "na')
    (run_dir / "restore-00000000" / "restored" / "cat.png").write_bytes(b"half a picture")
    (run_dir / "evaluate-00000000" / "summary.json").write_text("{")
    page = page_of(run_dir)
    assert "Not finished: evaluate." in page.text
    assert "restore-00000000/restored/cat.png could not be shown" in page.text
    assert "evaluate-00000000/summary.json could not be read" in page.text


def test_folders_outside_the_run_are_not_followed(run_dir, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "metrics.jsonl").write_text('{"step": 1, "name": "secret loss", "value": 1, "time": 0}\n')
    plan = json.loads((run_dir / "plan.json").read_text())
    plan["stages"][1]["folder"] = "../secret"
    (run_dir / "plan.json").write_text(json.dumps(plan))
    page = page_of(run_dir)
    assert "secret loss" not in page.text
    assert "stage dcp names a folder outside the run" in page.text


def test_many_large_pictures_stay_below_the_limit(run_dir, monkeypatch):
    folder = run_dir / "restore-00000000"
    for index in range(30):
        noise = generator(index, "noise").integers(0, 256, (160, 160, 3), dtype=np.uint8)
        for role in ("restored", "lq", "hq"):
            (folder / role / f"n{index:02d}.png").write_bytes(encode_png(noise, {}))
    monkeypatch.setattr(report_module, "SIZES", ((160, 90), (48, 70)))
    monkeypatch.setattr(report_module, "MAX_BYTES", 500_000)
    out = write_report(run_dir, run_dir / "elsewhere" / "page.html")
    assert out.stat().st_size <= 500_000
    assert "24 of 33 are shown" in Page(out.read_text(encoding="utf-8")).text


def test_it_shows_the_complete_command_that_continues(run_dir):
    assert "restoray run demo --out ." in page_of(run_dir).text
    plan = json.loads((run_dir / "plan.json").read_text())
    plan |= {
        "file": str(run_dir.parent / "my plan.yaml"),
        "images": str(run_dir.parent / "Anna's photos"),
        "overrides": ["workers=2", "dcp.prior=a b"],
    }
    (run_dir / "plan.json").write_text(json.dumps(plan))
    text = page_of(run_dir).text
    command = next(line for line in text.split("restoray ") if line.startswith("run "))
    words = shlex.split(command[: command.index("photos") + len("photos'")])
    overrides = ["workers=2", "dcp.prior=a b"]
    assert words == ["run", "../my plan.yaml", *overrides, "--out", ".", "--images", "../Anna's photos"]


def test_plan_json_holds_what_the_command_needs(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(encode_png(picture(0), {}))
    plan = load_plan("demo", ["workers=1"], tmp_path / "photos")
    write_plan_json(plan, PlanResult(plan="demo", run_dir=tmp_path, stages=[]), tmp_path / "photos")
    document = json.loads((tmp_path / "plan.json").read_text())
    assert report_module.run_again(tmp_path, document) == "restoray run demo workers=1 --out . --images photos"
    own = load_plan(shipped_files("plans")["demo"])
    assert own.origin["file"].endswith("demo.yaml")


def test_unwritable_output_is_one_sentence(run_dir, monkeypatch):
    with pytest.raises(Failure, match=r"cannot write r\.html to .*plan\.json/x: Not a directory\.$"):
        write_report(run_dir, run_dir / "plan.json" / "x" / "r.html")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipelines.runs.report.replace_file", full)
    with pytest.raises(Failure, match=r"demo-run: No space left on device\.$"):
        write_report(run_dir)


def test_bad_calls_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="no run folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is not a run"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def rows(**series):
    return [MetricRow(s, name.replace("__", "/"), v, 0.0) for name, points in series.items() for s, v in points]


def test_curves_pair_training_with_held_out():
    both = rows(
        heldout__a=[(0, 1.0), (9, 0.5)], heldout__b=[(0, 2.0)], b__loss=[(1, 3.0)], loss=[(1, 4.0)], lr=[(1, 9.0)]
    )
    assert loss_pairs(both) == [("a", [(1, 4.0)], [(0, 1.0), (9, 0.5)]), ("b", [(1, 3.0)], [(0, 2.0)])]
    assert loss_pairs(rows(loss=[(1, 4.0), (2, float("nan")), (1, 5.0)])) == [
        ("loss", [(1, 5.0)], [])
    ]  # the later value of a step counts
    assert loss_pairs([]) == []


def test_change_is_of_the_held_out_loss():
    chart = curve_chart("a", [(s, 7.0) for s in range(1, 11)], [(0, 2.0), (5, 1.9), (10, 1.5)])
    assert (chart["start"], chart["end"], chart["kind"]) == (2.0, 1.5, "held-out")
    assert chart["change"] == pytest.approx(-25.0)
    alone = curve_chart("<b>", [(1, 1.0)], [])
    assert alone["start"] is None
    assert "<b>" not in alone["svg"]


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0], [-1.0, 1.0], [1e-9, 2e-9], [1e12, 1.0]])
def test_charts_stay_inside_their_frame(values):
    svg = curve_chart("x", list(enumerate(values)), list(enumerate(values)))["svg"]
    assert "nan" not in svg
    for block in re.findall(r'points="([^"]*)"', svg):
        for pair in block.split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= 640
            assert 0 <= y <= 260


def test_smooth_keeps_length_and_lines():
    line = np.arange(100.0)
    assert smooth(line)[10:90] == pytest.approx(line[10:90])
    assert smooth(np.array([3.0])) == pytest.approx([3.0])
    spike = np.zeros(400)
    spike[200] = 21.0
    assert smooth(spike)[200] == pytest.approx(1.0)  # 10 neighbours on each side


def test_ticks_are_round():
    assert nice_ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(0.13, 0.58) == [0.2, 0.3, 0.4, 0.5]


def test_the_report_of_an_earlier_run_claims_nothing_on_few_pictures(run_dir):
    """Before statistics 2 a summary could say that restored beats its input on two pictures."""
    path = run_dir / "evaluate-00000000" / "summary.json"
    summary = json.loads(path.read_text())
    del summary["versions"]["statistics"]
    summary["verdict"] = "Restored beats its input in psnr."
    for comparison in summary["comparisons"]:
        comparison.update(outcome="beats", low=1.0, high=2.0, sentence="In psnr restored beats its input.")
    path.write_text(json.dumps(summary))
    text = page_of(run_dir).text
    assert "restored beats its input." not in text.lower()
    assert "3 pictures are too few to say whether restored beats its input in psnr" in text
    del summary["means"]
    path.write_text(json.dumps(summary))
    assert "its verdict is shown as it was written" in page_of(run_dir).text


def test_the_report_of_an_evaluation_without_originals(run_dir):
    source = run_dir / "restore-00000000"
    shutil.rmtree(run_dir / "evaluate-00000000")
    shutil.rmtree(source / "hq")
    evaluate(source / "restored", source / "lq", None, run_dir / "evaluate-00000000")
    page = page_of(run_dir)
    assert "3 pictures are too few to say whether restored beats its input in piqe" in page.text
    assert "piqe" in page.text and "psnr better" not in page.text
    assert "ground truth" not in page.text.split("Before and after")[1].split("Scores")[0]
    assert page.open == []


def test_the_first_sentence_counts_pictures_and_names_what_got_worse():
    def one(metric: str, opponent: str, wins: int, mean: float, outcome: str) -> dict[str, Any]:
        return {
            "metric": metric,
            "opponent": opponent,
            "wins": wins,
            "pictures": 12,
            "mean_difference": mean,
            "outcome": outcome,
        }

    comparisons = [
        one("psnr", "lq", 11, 0.52, "beats"),
        one("psnr", "bicubic_median", 2, -1.0, "loses"),
        one("gmsd", "lq", 3, 0.01, "loses"),
        one("st_lpips", "lq", 10, -0.1, "even"),
        one("consistency", "lq", 0, -5.0, "loses"),
    ]
    sentence = headline(comparisons, {"consistency"}, {"psnr": "dB"})
    assert sentence == (
        "The restored picture is better than its input on 11 of 12 in psnr (mean +0.52 dB), 10 of 12 in st_lpips "
        "(mean -0.1); on average it is worse in gmsd."
    )
    assert headline([], set()) == ""
    few = [one("piqe", "lq", 1, 2.0, "too few")]
    assert headline(few, set()).endswith("1 of 12 in piqe (mean +2). These are too few pictures to say more.")
