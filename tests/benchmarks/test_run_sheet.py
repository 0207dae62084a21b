"""The sheet of a run: right pictures in the right order, with their scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import run_sheet

from components.images import decode, encode_png


def test_a_sheet_has_input_result_and_original_of_the_named_pictures(tmp_path: Path) -> None:
    stages = [{"verb": "restore", "folder": "restored-0"}, {"verb": "evaluate", "folder": "scores-0"}]
    (tmp_path / "plan.json").write_text(json.dumps({"stages": stages}))
    levels = {"lq": 40, "restored": 120, "hq": 200}
    for name, level in levels.items():
        (tmp_path / "restored-0" / name).mkdir(parents=True)
        for key in ("a", "b"):
            picture = np.full((32, 48, 3), level + 20 * (key == "b"), np.uint8)
            (tmp_path / "restored-0" / name / f"{key}.png").write_bytes(encode_png(picture))
    scores = {"lq": {"psnr": 20.0, "st_lpips": 0.5}, "restored": {"psnr": 21.25, "st_lpips": 0.4}}
    (tmp_path / "scores-0").mkdir()
    (tmp_path / "scores-0" / "scores.jsonl").write_text(json.dumps({"key": "b", "scores": scores}) + "\n")
    out = tmp_path / "sheet.jpg"
    run_sheet.main([str(tmp_path), "--keys", "b", "--out", str(out), "--side", "32"])
    picture = decode(out.read_bytes())
    middles = [int(picture[8 + 16, 8 + 16 + 32 * place].mean()) for place in range(3)]
    assert np.allclose(middles, [60, 140, 220], atol=6)
    assert run_sheet.caption("b", scores) == "b\npsnr 20 to 21.25\nst_lpips 0.5 to 0.4"

    both = [tmp_path / "restored-0" / "lq", tmp_path / "restored-0" / "restored"]
    run_sheet.main(["--folders", *map(str, both), "--out", str(out), "--side", "32", "--columns", "2"])
    wide = decode(out.read_bytes())
    middles = [int(wide[8 + 16, 8 + 16 + x].mean()) for x in (0, 32, 72, 104)]
    assert np.allclose(middles, [40, 120, 60, 140], atol=6)
