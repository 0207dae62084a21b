"""Evaluation: comparisons and verdicts, missing pictures and scores, and reuse of rows."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from components.evaluation.metrics import METRIC_INFO
from components.images import encode_png
from components.randomness import generator
from pipelines.commands.main import build_app
from pipelines.core.errors import Failure, UsageError
from pipelines.evaluation.evaluate import compare, evaluate, fit, median_baseline, overall_verdict, restate

FAST = ("psnr", "gmsd")


def clean(index, height=64, width=80):
    y, x = np.mgrid[0:height, 0:width] / (5.0 + index)
    return np.clip(np.stack([np.sin(x), np.cos(y), np.sin(x * y / 9)], -1) * 90 + 128, 0, 255).astype(np.uint8)


def grain(image, sigma, index):
    return np.clip(np.rint(image + generator(index, "grain").normal(0, sigma, image.shape)), 0, 255).astype(np.uint8)


@pytest.fixture
def folders(tmp_path):
    """Four pictures; restored is better than the input on all but the last."""
    roles = {role: tmp_path / role for role in ("restored", "lq", "hq")}
    for folder in roles.values():
        (folder / "deep").mkdir(parents=True)
    for index in range(4):
        key = f"deep/p{index}" if index == 0 else f"p{index}"
        hq = clean(index)
        pictures = {"hq": hq, "lq": grain(hq, 20, index), "restored": grain(hq, 5 if index < 3 else 40, index + 9)}
        for role, image in pictures.items():
            (roles[role] / f"{key}.png").write_bytes(encode_png(image, {}))
    return roles


def run(folders, out, **options):
    return evaluate(folders["restored"], folders["lq"], folders["hq"], out, **{"metrics": FAST, **options})


def psnr(a, b):
    return -10 * np.log10(np.mean((a / 255.0 - b / 255.0) ** 2))


def test_means_differences_and_wins_match_a_second_derivation(folders, tmp_path):
    summary = run(folders, tmp_path / "out")
    expected = []
    for key in summary.pictures:
        images = {role: cv2.imread(str(folders[role] / f"{key}.png")) for role in folders}
        expected.append((psnr(images["restored"], images["hq"]), psnr(images["lq"], images["hq"])))
    expected = np.array(expected)
    assert summary.pictures == ["deep/p0", "p1", "p2", "p3"]
    assert summary.means["restored"]["psnr"]["mean"] == pytest.approx(expected[:, 0].mean(), abs=1e-3)
    assert summary.means["lq"]["psnr"]["mean"] == pytest.approx(expected[:, 1].mean(), abs=1e-3)
    [against_input] = [c for c in summary.comparisons if (c.metric, c.opponent) == ("psnr", "lq")]
    assert against_input.mean_difference == pytest.approx((expected[:, 0] - expected[:, 1]).mean(), abs=1e-3)
    assert (against_input.wins, against_input.losses, against_input.ties) == (3, 1, 0)
    assert "better on 3 of 4 pictures" in summary.verdicts["psnr"]
    assert summary.verdict.startswith("4 pictures are too few to say whether restored beats its input in psnr, gmsd")
    assert "bicubic_median" in summary.verdict
    document = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert document == json.loads(json.dumps(summary.to_json()))
    assert document["folders"] == {role: f"../{role}" for role in ("restored", "lq", "hq")}


def test_rerun_reuses_rows_and_changes_nothing(folders, tmp_path):
    calls = []
    first = run(folders, tmp_path / "out", progress=lambda count, of=0, note="": calls.append((count, of, note)))
    bytes_first = (tmp_path / "out" / "scores.jsonl").read_bytes()
    again = run(folders, tmp_path / "out")
    assert (first.reused, again.reused) == (0, 4)
    assert calls == [(1, 4, "deep/p0"), (2, 4, "p1"), (3, 4, "p2"), (4, 4, "p3")]
    assert (tmp_path / "out" / "scores.jsonl").read_bytes() == bytes_first
    assert again.comparisons == first.comparisons


def test_only_changed_pictures_are_scored_again(folders, tmp_path):
    run(folders, tmp_path / "out")
    scores = tmp_path / "out" / "scores.jsonl"
    lines = scores.read_text().splitlines()
    scores.write_text("\n".join(lines[:2]) + "\n" + lines[2][:40])  # a kill inside the third row
    (folders["restored"] / "p1.png").write_bytes(encode_png(clean(1), {}))
    summary = run(folders, tmp_path / "out")
    assert summary.reused == 1
    rows = {row["key"]: row for row in map(json.loads, scores.read_text().splitlines())}
    assert set(rows) == {"deep/p0", "p1", "p2", "p3"}
    assert rows["p1"]["scores"]["restored"]["psnr"] == 80.0
    assert run(folders, tmp_path / "out", metrics=("psnr", "gmsd", "ssim")).reused == 0  # one more metric


def test_missing_and_unusable_pictures_are_named(folders, tmp_path):
    (folders["hq"] / "p1.png").unlink()
    (folders["restored"] / "p2.png").write_bytes(b"not a picture")
    (folders["restored"] / "p3.png").write_bytes(encode_png(clean(3, 60, 80), {}))
    (folders["lq"] / "extra.png").write_bytes(encode_png(clean(5), {}))
    summary = run(folders, tmp_path / "out")
    reasons = {(entry["key"], entry["where"]): entry["reason"] for entry in summary.missing}
    assert summary.pictures == ["deep/p0"]
    assert reasons["p1", "hq"] == "no counterpart in the hq folder"
    assert {("extra", "restored"), ("extra", "hq")} <= set(reasons)
    assert "[not_image]" in reasons["p2", "score"] or "[unsupported_format]" in reasons["p2", "score"]
    assert "[shape]" in reasons["p3", "score"]
    assert "60 x 80 and 64 x 80" in reasons["p3", "score"]
    assert summary.verdict.endswith("4 pictures have no score (see missing).")
    assert summary.quarantined == json.loads((tmp_path / "out" / "summary.json").read_text())["quarantined"] == 4
    assert "too few" in summary.verdicts["psnr"]


def test_no_score_at_all_is_a_failure_with_its_reason(folders, tmp_path):
    for path in folders["restored"].rglob("*.png"):
        path.write_bytes(b"not a picture")
    with pytest.raises(Failure, match=r"not one picture .* could be scored \(deep/p0: \[.*summary\.json"):
        run(folders, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["pictures"], summary["quarantined"]) == ([], 4)


def test_unwritable_output_is_one_sentence(folders, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Failure, match=r"cannot write to .*file/out: Not a directory\.$"):
        run(folders, tmp_path / "file" / "out")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipelines.evaluation.evaluate.replace_file", full)
    with pytest.raises(Failure, match=r"out: No space left on device\.$"):
        run(folders, tmp_path / "out")


def test_a_picture_that_cannot_be_read_costs_only_itself(folders, tmp_path, monkeypatch):
    read_bytes = Path.read_bytes

    def read(path):
        if path.name == "p1.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    summary = run(folders, tmp_path / "out")
    assert summary.pictures == ["deep/p0", "p2", "p3"]
    assert "[unreadable] cannot be read: Permission denied" in [entry["reason"] for entry in summary.missing]


def test_the_command_says_by_its_exit_code_that_pictures_have_no_score(folders, tmp_path):
    roles = [str(folders["restored"]), "--hq", str(folders["hq"]), "--lq", str(folders["lq"])]
    command = ["evaluate", *roles, "--out", str(tmp_path / "out"), "--metric", "psnr", "--json"]
    assert CliRunner().invoke(build_app(), command).exit_code == 0
    (folders["hq"] / "p1.png").unlink()
    assert CliRunner().invoke(build_app(), command).exit_code == 3


def test_two_files_of_one_stem_keep_their_suffix_and_are_reported(folders, tmp_path):
    (folders["lq"] / "p1.jpg").write_bytes((folders["lq"] / "p1.png").read_bytes())
    summary = run(folders, tmp_path / "out")
    assert "p1" not in summary.pictures
    assert {"p1", "p1.png", "p1.jpg"} <= {entry["key"] for entry in summary.missing}


def test_small_inputs_are_brought_to_size(folders, tmp_path):
    for path in folders["lq"].rglob("*.png"):
        path.write_bytes(encode_png(np.ascontiguousarray(cv2.imread(str(path))[::2, ::2, ::-1]), {}))
    summary = run(folders, tmp_path / "out")
    assert len(summary.pictures) == 4
    assert summary.means["lq"]["psnr"]["mean"] < summary.means["restored"]["psnr"]["mean"]


def test_without_targets_metrics_that_need_one_are_refused_and_the_others_work(folders, tmp_path):
    with pytest.raises(UsageError, match=r"psnr, lpips: these metrics compare with the originals\. Add --hq .*piqe"):
        evaluate(folders["restored"], folders["lq"], None, tmp_path / "out", metrics=("psnr", "piqe", "lpips"))
    assert not (tmp_path / "out").exists()
    for metrics in (None, ("piqe", "entropy")):
        summary = evaluate(folders["restored"], folders["lq"], None, tmp_path / "out", metrics=metrics)
        names = {"piqe", "color_drift"} if metrics is None else {"piqe", "entropy"}
        assert all(set(summary.means[arm]) == names for arm in ("restored", "lq", "bicubic_median"))
        assert {c.metric for c in summary.comparisons} == set(summary.verdicts) == names
        small = [entry for entry in summary.missing if entry["metric"] == "niqe_restoray"]
        assert summary.missing == small and len(small) == (12 if metrics is None else 0)
        assert "hq" not in summary.folders


def test_inputs_with_recorded_plans_have_a_consistency(tmp_path):
    """The plan is that of the input's bytes, wherever the records are; the input's own score stands beside it."""
    from components.degradations import build_degradation
    from components.images import decode, to_float, to_uint8
    from pipelines.evaluation.degrade import degrade_folder

    originals = tmp_path / "originals"
    originals.mkdir()
    for index in range(6):
        (originals / f"p{index}.png").write_bytes(encode_png(clean(index, 96, 112), {}))
    degrade_folder(originals, tmp_path / "lq", "x4-noise40", seed=3)
    assert evaluate(originals, originals, None, tmp_path / "none", metrics=("piqe",)).pictures
    assert "consistency" not in evaluate(originals, originals, None, tmp_path / "none").metrics  # no plans there
    summary = evaluate(originals, tmp_path / "lq", originals, tmp_path / "out", metrics=("psnr", "consistency"))
    assert summary.means["restored"]["consistency"] == {"mean": 80.0, "pictures": 6}  # the true picture
    lq = decode((tmp_path / "lq" / "p0.png").read_bytes())
    plan = build_degradation("x4-noise40").draw(3, "p0", 0)
    again = to_uint8(build_degradation("none").apply(to_float(lq), plan))
    row = json.loads((tmp_path / "out" / "scores.jsonl").read_text().splitlines()[0])
    assert row["scores"]["lq"]["consistency"] == pytest.approx(psnr(again.astype(float), lq.astype(float)), abs=1e-4)
    assert "consistency" not in summary.verdict and "psnr" in summary.verdict
    sentence = summary.verdicts["consistency"]
    assert sentence.startswith("In consistency restored has 80.00, the input itself ") and "dB in psnr" in sentence
    (tmp_path / "lq" / "p1.png").write_bytes(encode_png(clean(1, 96, 112), {}))  # not the record's picture
    changed = evaluate(originals, tmp_path / "lq", originals, tmp_path / "out", metrics=("psnr", "consistency"))
    assert {(m["key"], m["reason"]) for m in changed.missing} == {("p1", "no recorded plan")}


def test_the_command_works_without_originals(folders, tmp_path):
    command = ["evaluate", str(folders["restored"]), "--lq", str(folders["lq"]), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(build_app(), command)
    assert result.exit_code == 0, result.output
    assert "piqe: In piqe 4 pictures are too few to say" in result.output
    result = CliRunner().invoke(build_app(), [*command, "--metric", "ssim"])
    assert "ssim: this metric compares with the originals" in str(result.exception)


def test_missing_weights_are_one_failure_and_no_missing_score(folders, tmp_path, monkeypatch):
    import pyiqa

    calls = []

    def create(name, device):
        calls.append(name)
        raise OSError("no network")

    monkeypatch.setattr(pyiqa, "create_metric", create)
    with pytest.raises(Failure, match=r"metric niqe cannot be opened \(OSError: no network\)\.$"):
        run(folders, tmp_path / "out", metrics=("niqe",))
    assert calls == ["niqe"], "not once for each picture"
    with pytest.raises(UsageError, match="fid judges sets of pictures"):
        run(folders, tmp_path / "out", metrics=("psnr", "fid"))


def test_baseline_is_median_then_bicubic():
    spike = np.full((16, 16, 3), 50, np.uint8)
    spike[8, 8] = 255
    assert (median_baseline(spike, 32, 32) == 50).all()  # the median removes an impulse before the resize can spread it
    assert fit(spike, 16, 16) is spike
    assert fit(spike, 32, 32).max() > 200


@pytest.mark.parametrize(
    ("gains", "outcome", "words"),
    [
        ((1.0, 1.2, 0.8, 1.1, 0.9, 1.0), "beats", "restored beats its input"),
        ((-1.0, -1.2, -0.8, -1.1, -0.9, -1.0), "loses", "restored loses to its input"),
        ((1.0, -1.2, 0.8, -1.1, 0.9, -1.0), "even", "no clear difference"),
        ((0.0,) * 6, "even", "better on 0 of 6"),
        ((1.0, 1.2, 0.8, 1.1, 0.9), "too few", "5 pictures are too few to say whether restored beats its input"),
        ((1.0, 1.5), "too few", "2 pictures are too few to say"),
        ((5.0,), "too few", "1 picture is too few to say"),
    ],
)
def test_outcomes_follow_the_interval(gains, outcome, words):
    comparison = compare("psnr", METRIC_INFO["psnr"], "lq", [(20 + gain, 20.0) for gain in gains])
    assert comparison.outcome == outcome
    assert words in comparison.sentence
    lower = compare("gmsd", METRIC_INFO["gmsd"], "lq", [(0.2 - gain / 100, 0.2) for gain in gains])
    assert lower.outcome == outcome
    assert "lower is better" in lower.sentence
    assert (lower.wins, lower.losses) == (comparison.wins, comparison.losses)
    assert (comparison.low is None) == (comparison.high is None) == (outcome == "too few")
    assert (", mean " in comparison.sentence) and ("[" in comparison.sentence) == (outcome != "too few")


def test_overall_names_wins_and_losses():
    infos = {name: METRIC_INFO[name] for name in ("psnr", "ssim")}
    comparisons = [
        compare("psnr", infos["psnr"], "lq", [(21.0 + n / 9, 20.0) for n in range(6)]),
        compare("ssim", infos["ssim"], "lq", [(0.5, 0.6 + n / 90) for n in range(6)]),
    ]
    sentence = overall_verdict(comparisons, "lq", infos)
    assert sentence.startswith("Restored beats its input in psnr; loses to it in ssim (psnr better on 6 of 6 pictures")
    comparisons[1] = compare("ssim", infos["ssim"], "lq", [(0.5, 0.6), (0.5, 0.7)])
    sentence = overall_verdict(comparisons, "lq", infos)
    assert "beats its input in psnr; 2 pictures are too few to say whether it beats it in ssim (psnr" in sentence


def test_few_pictures_rarely_claim_a_difference_where_there_is_none():
    """400 evaluations of 6 pictures without a difference: about 4 % claim one, and of 5 pictures none."""
    draw = generator(0, "nothing differs")
    pairs = 25 + draw.normal(0, 2, (400, 6, 2))
    outcomes = [compare("psnr", METRIC_INFO["psnr"], "lq", [tuple(pair) for pair in rows]).outcome for rows in pairs]
    assert 4 <= 400 - outcomes.count("even") <= 28
    assert {"beats", "loses"} <= set(outcomes), "the claims are on both sides"
    few = {compare("psnr", METRIC_INFO["psnr"], "lq", [tuple(pair) for pair in rows[:5]]).outcome for rows in pairs}
    assert few == {"too few"}


def test_an_earlier_summary_is_restated_with_todays_verdicts(folders, tmp_path):
    """Before statistics 2, intervals of two to five pictures claimed differences."""
    summary = run(folders, tmp_path / "out")
    today = json.loads(json.dumps(summary.to_json()))
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    old = json.loads(json.dumps(today))
    del old["versions"]["statistics"]
    old["verdict"] = "Restored beats its input in psnr."
    old["comparisons"][0] |= {"outcome": "beats", "low": 1.0, "high": 2.0, "sentence": "beats"}
    assert restate(old, rows) == {**today, "versions": old["versions"]}
    assert restate({**today, "verdict": "x"}, rows)["verdict"] == "x"


def test_bad_calls_are_usage_errors(folders, tmp_path):
    with pytest.raises(UsageError, match='Did you mean "psnr"'):
        run(folders, tmp_path / "out", metrics=("psnrr",))
    with pytest.raises(UsageError, match='Did you mean "psnr"'):
        run(folders, tmp_path / "out", metrics=("PSNR",))
    with pytest.raises(UsageError, match="Each metric needs an option of its own"):
        run(folders, tmp_path / "out", metrics=("psnr,ssim",))
    with pytest.raises(UsageError, match="which is a file: name the folder that holds it"):
        evaluate(next(folders["lq"].rglob("*.png")), folders["lq"], folders["hq"], tmp_path / "out")
    with pytest.raises(UsageError, match='Did you mean "bicubic_median"'):
        run(folders, tmp_path / "out", baselines=("bicubic_medium",))
    with pytest.raises(UsageError, match="no folder"):
        evaluate(tmp_path / "nowhere", folders["lq"], folders["hq"], tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no pictures in"):
        evaluate(tmp_path / "empty", folders["lq"], folders["hq"], tmp_path / "out")


@pytest.mark.parametrize("role", ["hq", "lq"])
def test_folders_with_another_affix_are_paired_by_it(folders, tmp_path, role):
    expected = run(folders, tmp_path / "out").means
    for path in [*folders[role].rglob("*.png")]:
        path.rename(path.with_name(f"{path.stem}_{role}4.png"))
    summary = run(folders, tmp_path / "again")
    assert (summary.means, summary.missing) == (expected, [])
    assert summary.pictures == ["deep/p0", "p1", "p2", "p3"]


def test_folders_of_other_names_are_refused(folders, tmp_path):
    for path in [*folders["hq"].rglob("*.png")]:
        path.rename(path.with_name(f"{'abcd'[int(path.stem[1:])]}.png"))
    with pytest.raises(UsageError, match=r"hq does not fit .* 4 of 4 inputs have no target"):
        run(folders, tmp_path / "out")


def test_an_input_of_another_shape_is_named_with_both_sizes(folders, tmp_path):
    for index, shape in ((1, (80, 64)), (2, (16, 20)), (3, (21, 27))):  # the last two: 1/4, and 1/3 rounded
        (folders["lq"] / f"p{index}.png").write_bytes(encode_png(clean(index, *shape), {}))
    summary = run(folders, tmp_path / "out")
    assert summary.pictures == ["deep/p0", "p2", "p3"]
    [missing] = summary.missing
    assert missing["key"] == "p1" and "64 x 80 pixels and the target 80 x 64" in missing["reason"]
    assert missing["reason"].startswith("[pair_size]")
