"""The shipped corpora and their descriptions: complete, with citations, and with help for a missing path."""

from __future__ import annotations

import functools
import json
import re
import shlex
from pathlib import Path

import pytest

from components.corpora import CorpusSpec, load_corpus_spec
from components.systems.recipes import load_mixture
from pipelines.core.errors import UsageError
from pipelines.core.home import shipped_files
from pipelines.corpus import catalogue
from pipelines.curation.sources import list_entries

TRAIN = {
    *(
        "supir-20m",
        "lsdir",
        "div2k",
        "flickr2k",
        "ffhq",
        "ffhq-raw",
        "journeydb",
        "imagenet",
        "laion",
        "sa-1b",
        "bdd100k",
    ),
    *("lol", "rain", "ffhq-cartoon", "dra-300k", "demo", "folder", "pairs", "dead-leaves", "nano"),
}
BENCHMARKS = {
    *("realsr", "drealsr", "realset65", "realphoto60", "real47", "div2k-val", "celeba-test", "lfw-test", "wider-test"),
    *("imagenet-test", "instantir-test", "rain100l"),
}
"""The four papers' sets: sec. 4 and the appendices of each name them."""
OURS = {"demo", "folder", "pairs", "dead-leaves", "nano"}

METRICS = {"psnr", "ssim", "lpips", "clipiqa", "maniqa", "musiq", "niqe", "fid", "ids"}
"""What the papers' tables score (SUPIR tab. 1, InstantIR tab. 1, InstaRevive tabs. 1 and 2, DRA tab. 2)."""
WITH_TARGET = {"psnr", "ssim", "lpips", "ids"}

CITATION = re.compile(
    r"(SUPIR|InstantIR|InstaRevive|DRA) (sec\. \d(\.\d)?|app\. [A-Z](\.\d)?|tab\. \d[ab]?|code)(,[^:]*)?: "
)
SOURCE_OF_A_NUMBER = re.compile(r"#.*\b(ours|SUPIR|InstantIR|InstaRevive|DRA|ResShift)\b")
NAMES = sorted(shipped_files("datasets"))


@functools.cache
def shipped_spec(name: str) -> CorpusSpec:
    """Cached: loading a spec takes a few hundredths of a second, and there are many tests."""
    return catalogue.load_spec(name)


@pytest.fixture(scope="module")
def entries() -> list[catalogue.Entry]:
    return catalogue.list_corpora()


@pytest.mark.parametrize("name", NAMES)
def test_every_spec_has_name_licence_and_homepage(name: str) -> None:
    spec = shipped_spec(name)
    assert spec.name == name
    assert spec.description and spec.licence
    if name not in OURS:
        assert re.match(r"https://[\w.-]+", spec.homepage)
        assert re.search(r"\d", spec.description), "its size"
        assert spec.papers


def test_the_corpora_of_the_papers_are_complete(entries: list[catalogue.Entry]) -> None:
    roles = {entry.name: entry.role for entry in entries}
    assert {name for name, role in roles.items() if role == "train"} == TRAIN
    assert {name for name, role in roles.items() if role == "benchmark"} == BENCHMARKS
    assert {name for name, role in roles.items() if role == "regularisation"} == {"supir-negatives"}


@pytest.mark.parametrize("name", NAMES)
def test_every_use_and_every_number_has_its_origin(name: str) -> None:
    for use in shipped_spec(name).papers:
        assert CITATION.match(use), use
    for line in shipped_files("datasets")[name].read_text().splitlines():
        if re.match(r"\s*-?\s*\w+:\s+-?[\d.]+\s*(#|$)", line):
            assert SOURCE_OF_A_NUMBER.search(line), line


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_a_benchmark_names_its_metrics_and_loses_no_picture(name: str) -> None:
    spec = shipped_spec(name)
    assert spec.metrics and set(spec.metrics) <= METRICS
    if WITH_TARGET & set(spec.metrics):
        assert all(pair.hq for pair in spec.pairs)
    else:
        assert [pair.hq for pair in spec.pairs] == [""]
    assert spec.split.held_out_fraction == 1, "it must never be trained on"
    assert (spec.filters.preset, spec.filters.scores, spec.filters.models) == ("none", {}, [])
    assert spec.filters.flat_below == 0 and spec.max_bad_fraction == 0
    assert not spec.dedup.exact and not spec.dedup.near


def test_the_corpora_with_the_filters_for_restoration() -> None:
    presets = {name: shipped_spec(name).filters.preset for name in NAMES}
    assert {name for name, preset in presets.items() if preset == "restoration"} == {
        *("supir-20m", "dra-300k", "laion", "sa-1b", "demo", "folder")
    }
    assert not shipped_spec("supir-negatives").dedup.exact


def test_the_supir_recipe() -> None:
    """SUPIR sec. 3.2 and app. A.2."""
    spec = shipped_spec("supir-20m")
    assert spec.filters.min_side_px == 1024
    assert len(spec.sources) == 2 and "in-the-wild" in spec.sources[1].path
    assert spec.caption is not None and spec.caption.model == "llava"
    assert spec.caption.prompt == "Describe this image and its style in a very detailed manner."
    assert "supir-negatives" in " ".join(catalogue.describe("supir-20m").notes)
    mixture = load_mixture("supir")
    assert mixture["sources"] == {"supir-20m": 20_000_000 + 70_000, "supir-negatives": 100_000}  # sec. 4.1
    assert mixture["captioners"] == {"supir-negatives": "negative"}


# --- a missing path ---------------------------------------------------------------------------------------------------


def refusal(spec: CorpusSpec) -> str:
    with pytest.raises(UsageError) as error:
        catalogue.check_paths(spec)
    return str(error.value)


@pytest.mark.parametrize("name", sorted((TRAIN | BENCHMARKS | {"supir-negatives"}) - OURS - {"imagenet", "laion"}))
def test_the_error_for_a_missing_path_has_contents_homepage_and_command(name: str) -> None:
    spec = shipped_spec(name)
    sentence = refusal(spec)
    assert "\n" not in sentence and "<" not in sentence
    assert sentence.startswith(f"{name}: source 0 ({spec.sources[0].kind}) has no path: it takes ")
    assert "https://" in sentence
    command = shlex.split(sentence.partition("type: ")[2])
    assert command[:3] == ["restoray", "curate", name] and command[-2:] == ["--out", "CORPUS"]
    as_told = catalogue.load_spec(name, command[3:-2])
    catalogue.check_paths(as_told)
    assert [source.path for source in as_told.sources if source.path.startswith("<")] == []


def test_the_sentence_for_lsdir() -> None:
    assert refusal(shipped_spec("lsdir")) == (
        "lsdir: source 0 (folder) has no path: it takes the folders of shard-00.tar.gz to shard-16.tar.gz, unpacked "
        "(see https://ofsoundof.github.io/lsdir-data/); type: restoray curate lsdir sources.0.path=DIR --out CORPUS"
    )


def test_the_sentence_names_the_first_source_that_lacks_a_path() -> None:
    spec = catalogue.load_spec("dra-300k", ["sources.0.path=DIV2K"])
    sentence = refusal(spec)
    assert sentence.startswith("dra-300k: source 1 (folder) has no path: it takes your own photographs")
    assert "sources.0.path" not in sentence and "sources.1.path=DIR" in sentence


def test_the_sentence_for_a_folder_without_path_is_short() -> None:
    assert refusal(shipped_spec("folder")).endswith("type: restoray curate folder --images DIR --out CORPUS")


@pytest.mark.parametrize("name", ["demo", "dead-leaves", "imagenet", "laion"])
def test_shipped_synthetic_and_url_corpora_need_no_path(name: str) -> None:
    catalogue.check_paths(shipped_spec(name))
    assert catalogue.describe(name).entry.needs == ()


def test_pairs_need_the_path_of_their_source_and_of_their_inputs() -> None:
    needs = catalogue.describe("realsr").entry.needs
    assert [need.key for need in needs] == ["sources.0.path", "pairs.0.lq"] and "LR4.png" in needs[1].what
    (need,) = catalogue.describe("realsr", ["sources.0.path=HR"]).entry.needs
    assert need.override() == "pairs.0.lq=DIR"
    spec = catalogue.load_spec("realsr", ["sources.0.path=HR", "pairs.0.lq=LR"])
    assert catalogue.entry_of(spec).needs == ()
    assert (spec.pairs[0].hq, spec.pairs[0].lq, spec.pairs[0].scale) == ("HR", "LR", 4)


def test_real_pictures_have_inputs_and_no_targets() -> None:
    spec = catalogue.load_spec("realset65", ["sources.0.path=PICTURES"])
    assert catalogue.entry_of(spec).needs == ()
    assert (spec.pairs[0].hq, spec.pairs[0].lq) == ("", "PICTURES")


# --- names and overrides ----------------------------------------------------------------------------------------------


def test_unknown_names_get_the_near_one() -> None:
    with pytest.raises(UsageError, match=r'unknown dataset "lsdri"\. Did you mean "lsdir"\?'):
        catalogue.describe("lsdri")
    with pytest.raises(UsageError, match=r'unknown role "benchmarks"\. Did you mean "benchmark"\?'):
        catalogue.list_corpora("benchmarks")


def test_a_misspelt_key_is_refused_with_the_near_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(shipped_files("datasets")["lsdir"].read_text().replace("min_side_px", "min_sid_px"))
    with pytest.raises(UsageError, match=r"mine\.yaml: .*min_sid_px.*Did you mean: 'min_side_px'"):
        catalogue.load_spec(path)


def test_an_override_reaches_one_place_of_a_list_and_leaves_the_others() -> None:
    before = shipped_spec("supir-20m")
    after = catalogue.load_spec("supir-20m", ["sources.1.path=FACES", "filters.scores.blur.min=0.25", "shard_mib=2"])
    assert [source.path for source in after.sources] == [before.sources[0].path, "FACES"]
    assert after.sources[1].licence == before.sources[1].licence
    assert after.filters.scores["blur"].min == 0.25 and after.shard_mib == 2


@pytest.mark.parametrize("override", ["sources.7.path=X", "sources.0.pth=X", "sources.path=X", "pairs.0.lq=X"])
def test_an_override_of_a_missing_list_place_is_one_sentence(override: str) -> None:
    with pytest.raises(UsageError, match=r"^lsdir\.yaml: [^\n]*$"):
        catalogue.load_spec("lsdir", [override])


def test_a_pair_cannot_shrink(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("name: x\npairs: [{hq: a, lq: b, scale: 0}]\n")
    with pytest.raises(ValueError, match="scale of a pair must be at least 1, got 0"):
        load_corpus_spec(path)


def test_dead_leaves_come_in_any_number() -> None:
    assert len(list_entries(shipped_spec("dead-leaves"))[0]) == 1000
    spec = catalogue.load_spec("dead-leaves", ["sources.0.count=7", "sources.0.size_px=64"])
    entries, _ = list_entries(spec)
    assert [entry.leaves for entry in entries] == [(64, 0, number) for number in range(7)]


# --- what is printed --------------------------------------------------------------------------------------------------


def test_the_listing_names_every_corpus_once_under_its_role(entries: list[catalogue.Entry]) -> None:
    lines = catalogue.list_lines(entries)
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(names) == NAMES
    assert lines.index("For training:") < lines.index("For measuring:")
    only = catalogue.list_lines(catalogue.list_corpora("benchmark"))
    assert {line.split()[0] for line in only if line.startswith("  ")} == BENCHMARKS
    assert "For training:" not in only


def test_the_listing_is_json(entries: list[catalogue.Entry]) -> None:
    document = json.loads(json.dumps(catalogue.list_json(entries)))
    by_name = {row["name"]: row for row in document["datasets"]}
    assert by_name["realphoto60"]["metrics"] == ["clipiqa", "musiq", "maniqa"]
    assert [need["key"] for need in by_name["realsr"]["needs"]] == ["sources.0.path", "pairs.0.lq"]


def test_a_description_has_licence_use_command_notes_and_the_resolved_spec() -> None:
    description = catalogue.describe("realphoto60", ["sources.0.path=PICTURES"])
    text = "\n".join(description.lines())
    for part in (
        "none stated",
        "https://github.com/Fanghua-Yu/SUPIR",
        "tab. 2a: 60 pictures",
        "could not be reproduced",
    ):
        assert part in text
    assert "restoray curate realphoto60 --out CORPUS" in text
    assert "  lq: PICTURES" in text, "resolved, not ${sources.0.path}"
    document = json.loads(json.dumps(description.to_json()))
    pair = {"hq": "", "lq": "PICTURES", "hq_name": "", "lq_name": "", "scale": 2, "note": ""}
    assert document["spec"]["pairs"] == [pair]


def test_a_spec_outside_the_package_is_described_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("# My holidays.\nname: holidays\nsources: [{kind: folder}]\n")
    description = catalogue.describe(str(path))
    assert description.notes == ("My holidays.",)
    assert description.entry.command == f"restoray curate {path} --images DIR --out CORPUS"


def test_the_table_in_the_documentation_is_up_to_date(repository: Path) -> None:
    table = catalogue.markdown()
    assert (repository / "docs" / "datasets.md").read_text() == table, (
        "python -m pipelines.corpus.catalogue > docs/datasets.md"
    )
    rows = [line for line in table.splitlines() if line.startswith("| ") and "`restoray curate " in line]
    assert len(rows) == len(NAMES)
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {7}, "five cells each"
