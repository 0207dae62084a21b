"""The stages of a plan: folders of trainings, inputs, outputs, torn files, and the models that a recipe names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components.corpora import SourceSpec
from components.images import encode_png
from components.places import find_model_folder
from components.restoring import Ask
from components.synthetic import dead_leaves
from components.systems.recipes import load_recipe
from pipelines.core.console import Console
from pipelines.core.errors import RetryLater, Unfinished, UsageError
from pipelines.core.metrics import Tail, read_metrics
from pipelines.corpus.shards import write_corpus
from pipelines.curation.curate import load_spec
from pipelines.curation.sources import iter_entries
from pipelines.curation.sources.files import SkippedFiles
from pipelines.runs import stages
from pipelines.runs.identity import train_identity
from pipelines.runs.one_training import train_folder
from pipelines.runs.plan import load_plan
from pipelines.runs.stages import check_restore, corpus_files, folders_of, run_restore, run_study, spec_of
from pipelines.runs.verb import CurateSettings, RestoreSettings, StageContext, StudySettings, TrainSettings
from pipelines.training.inputs import TrainInputs, check_inputs
from pipelines.training.recipes import check_recipe
from pipelines.training.stage_files import METRICS, ORDER, Log, Sample, log_order, read_order


def recipe(*overrides: str) -> Any:
    return load_recipe("instantir-dcp-nano", overrides)


def write_index(folder: Path, **counts: int) -> Path:
    """Write an index with one shard per split and these numbers of samples."""
    splits = {
        split: {
            "samples": n,
            "table": {"name": f"{split}.arrow"},
            "shards": [{"name": f"{split}-0.tar", "bytes": 0, "sha256": "0" * 64, "samples": n}],
        }
        for split, n in counts.items()
    }
    (folder / "index.json").write_text(json.dumps({"format": 2, "digest": "d", "splits": splits}))
    return folder


def test_a_folder_belongs_to_one_training(tmp_path: Path) -> None:
    out, inputs = tmp_path / "out", TrainInputs(data_digests={"corpus": "1"})
    for _ in range(2):  # the same training resumes
        with train_folder(recipe(), inputs, out):
            (out / "ray").mkdir(exist_ok=True)
    with train_folder(recipe("placement.workers=2"), inputs, out):
        pass
    for other, data in ((recipe("seed=1"), "1"), (recipe(), "2")):
        with (
            pytest.raises(UsageError, match=r"holds a training of instantir-dcp-nano with other.*another --out"),
            train_folder(other, TrainInputs(data_digests={"corpus": data}), out),
        ):
            pass
    (out / "stage.json").unlink()
    with pytest.raises(UsageError, match=r"without a stage\.json"), train_folder(recipe(), inputs, out):
        pass


def test_a_folder_has_one_trainer_at_a_time(tmp_path: Path) -> None:
    with (
        train_folder(recipe(), TrainInputs(), tmp_path),
        pytest.raises(RetryLater, match="in use"),
        train_folder(recipe(), TrainInputs(), tmp_path),
    ):
        pass


def test_a_corpus_without_held_out_pictures_is_refused_on_the_driver(tmp_path: Path) -> None:
    corpus = write_index(tmp_path, train=1, held_out=0)
    inputs = TrainInputs(corpora={"corpus": corpus})
    with pytest.raises(UsageError, match="at least 2 usable pictures"):
        check_inputs(recipe(), inputs)
    write_index(tmp_path, train=1, held_out=1)
    check_inputs(recipe(), inputs)


@pytest.mark.parametrize(
    ("name", "parents", "words"),
    [
        ("instantir-previewer-nano", (), r"of stage dcp \(or, .* or aggregator\), but the inputs hold no model"),
        ("instantir-aggregator-nano", ("dcp",), r"stage previewer \(or, .*\), but .* a model of stage dcp"),
        ("instarevive-bsr-nano", ("dcp",), "starts from no model"),
        (
            "instantir-dcp-nano",
            ("onestep",),
            r"starts from no model \(or, to train .* dcp or previewer or aggregator",
        ),
        ("prior-encoder-nano", (), "of stage autoencoder"),
    ],
)
def test_a_stage_without_its_parent_is_refused_on_the_driver(
    name: str, parents: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    corpora = {"corpus": write_index(tmp_path, train=1, held_out=1)}
    with pytest.raises(UsageError, match=words):
        check_inputs(load_recipe(name), TrainInputs(corpora=corpora, parents=dict.fromkeys(parents, tmp_path)))


@pytest.mark.parametrize(
    ("stage", "parents"),
    [
        ("dcp", ("dcp", "aggregator")),
        ("previewer", ("dcp", "previewer", "aggregator")),
        ("aggregator", ("aggregator",)),
    ],
)
def test_a_trained_model_can_be_trained_further(stage: str, parents: tuple[str, ...], tmp_path: Path) -> None:
    corpora = {"corpus": write_index(tmp_path, train=1, held_out=1)}
    for parent in parents:
        check_inputs(load_recipe(f"instantir-{stage}-nano"), TrainInputs(corpora=corpora, parents={parent: tmp_path}))


def test_a_warm_start_replaces_a_parent(tmp_path: Path) -> None:
    corpora = {"corpus": write_index(tmp_path, train=1, held_out=1)}
    check_inputs(load_recipe("prior-denoiser-nano", ["warm_start=nano"]), TrainInputs(corpora=corpora))


def test_corpus_files_lists_every_table_and_shard(tmp_path: Path) -> None:
    files = ["train.arrow", "held_out.arrow", "train/train-0.tar", "held_out/held_out-0.tar"]
    assert corpus_files(write_index(tmp_path, train=2, held_out=1)) == files


def test_a_restore_stage_counts_all_refusals_and_lists_all_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("hq", "lq", "restored"):
        (tmp_path / "work" / name).mkdir(parents=True)
        (tmp_path / "work" / name / "a.png").touch()
    (tmp_path / "trained" / "model").mkdir(parents=True)
    write_index(tmp_path / "trained", train=1, held_out=3)
    monkeypatch.setattr("pipelines.runs.stages.prepare_heldout", lambda *_, **__: SimpleNamespace(quarantined=2))
    result = SimpleNamespace(restored=1, skipped=0, quarantined=1)
    model = SimpleNamespace(request_options=lambda options: Ask())
    monkeypatch.setattr("pipelines.runs.stages.open_model", lambda folder: model)
    monkeypatch.setattr("pipelines.runs.stages.restore_folder", lambda *_, **__: result)
    results = run_restore(
        StageContext(
            plan="p",
            name="restored",
            verb="restore",
            digest="0",
            run_dir=tmp_path,
            stage_dir=tmp_path / "work",
            inputs={"trained": tmp_path / "trained"},
            settings=RestoreSettings(),
            console=Console(silent=True),
        )
    )
    assert results["quarantined"] == 3
    assert {"hq/a.png", "lq/a.png", "restored/a.png", "restored/records.jsonl"} <= set(results["outputs"])


def test_a_folder_that_nobody_named_is_left_out_and_a_named_one_is_taken(tmp_path: Path) -> None:
    """The shipped plan resolves without the folder; with it, the folder's names are held out."""
    spec = load_spec("nano")
    alone = spec_of(CurateSettings(spec="nano"))
    assert [source.kind for source in alone.sources] == ["demo_corpus", "skimage"]
    assert (alone.split.held_out, alone.split.held_out_fraction) == ([], 0.2)
    both = spec_of(CurateSettings(spec="nano", pictures=str(tmp_path)))
    assert [source.path for source in both.sources] == ["", "", str(tmp_path)] and both.split == spec.split
    assert spec_of(CurateSettings(spec="folder")) == load_spec("folder")  # its only source: an error names it later
    with pytest.raises(UsageError, match="spec demo has no folder source without a path"):
        spec_of(CurateSettings(spec="demo", pictures=str(tmp_path)))


def test_the_place_of_the_pictures_is_not_part_of_a_digest(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "p.png").write_bytes(encode_png(dead_leaves(64, 0, 0)))
    (tmp_path / "plan.yaml").write_text("stages: [{name: corpus, verb: curate, spec: nano}]")
    first = load_plan(tmp_path / "plan.yaml", [f"corpus.pictures={tmp_path / 'a'}"]).stages[0].digest
    (tmp_path / "a").rename(tmp_path / "b")
    assert load_plan(tmp_path / "plan.yaml", [f"corpus.pictures={tmp_path / 'b'}"]).stages[0].digest == first
    assert load_plan(tmp_path / "plan.yaml").stages[0].digest != first


def test_shipped_pictures_can_be_chosen_by_name() -> None:
    source = SourceSpec(kind="demo_corpus", names=["tea-gardens.jpg", "mr-lee.jpg"])
    assert [entry.key for entry in iter_entries(source, None, SkippedFiles())] == ["mr-lee", "tea-gardens"]
    with pytest.raises(UsageError, match=r'Did you mean "mr-lee\.jpg"'):
        list(iter_entries(SourceSpec(kind="demo_corpus", names=["mr-le.jpg"]), None, SkippedFiles()))


def test_a_training_stage_gets_its_minutes_and_its_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    def train_one(*_: Any, **named: Any) -> Any:
        calls.append(named)
        raise Unfinished("later")

    monkeypatch.setattr(stages, "train_one", train_one)
    for start in ("", "nano"):
        context = StageContext(
            plan="p",
            name="regression",
            verb="train",
            digest="d",
            run_dir=tmp_path,
            stage_dir=tmp_path,
            inputs={},
            settings=TrainSettings(recipe="unetres-regression", start=start),
            recipe=load_recipe("unetres-regression", ["steps=7"]),
            minutes=9.0,
            console=Console(silent=True),
        )
        with pytest.raises(Unfinished):
            stages.run_train(context)
    assert calls == [{"minutes": 9.0, "start": None}] * 2  # the shipped state is of another recipe


def student_plan(path: Path, student: str = "teacher: adaptor", needs: str = "[corpus, adaptor]") -> Path:
    """A plan whose distillation takes the adaptor as its teacher."""
    path.write_text(
        "stages:\n  - {name: corpus, verb: curate, spec: demo}\n"
        "  - {name: encoder, verb: train, recipe: supir-encoder-nano, needs: [corpus]}\n"
        "  - {name: adaptor, verb: train, recipe: supir-adaptor-nano, needs: [corpus, encoder]}\n"
        f"  - {{name: student, verb: train, recipe: distil-onestep-nano, {student}, needs: {needs}}}\n"
    )
    return path


@pytest.mark.parametrize(
    ("student", "needs", "words"),
    [
        ("teacher: adapter", "[corpus, adaptor]", r'teacher of distil-onestep-nano.*"adapter".*Did you mean "adaptor"'),
        ("teacher: adaptor", "[corpus]", "teacher of distil-onestep-nano"),
        ("teacher: corpus", "[corpus, adaptor]", "teacher of distil-onestep-nano"),
        ("overrides: []", "[corpus, adaptor]", "distils a teacher, and none is set"),
        ("teacher: adaptor, overrides: [teacher=nano]", "[corpus, adaptor]", "the recipe has one already"),
        ("teacher: adaptor, overrides: [distil=false]", "[corpus, adaptor]", "the recipe distils none"),
    ],
)
def test_a_wrong_teacher_is_refused_when_its_plan_is_loaded(
    student: str, needs: str, words: str, tmp_path: Path
) -> None:
    assert load_plan(student_plan(tmp_path / "plan.yaml")).stages[-1].recipe.teacher == ""
    with pytest.raises(UsageError, match=words):
        load_plan(student_plan(tmp_path / "plan.yaml", student, needs))


def test_another_teacher_is_another_student(tmp_path: Path) -> None:
    needs = "[corpus, encoder, adaptor]"
    digests = {
        teacher: load_plan(student_plan(tmp_path / "plan.yaml", f"teacher: {teacher}", needs)).stages[-1].digest
        for teacher in ("encoder", "adaptor")
    }
    assert digests["encoder"] != digests["adaptor"]


def test_a_distillation_gets_the_model_of_its_teachers_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    def train_one(*given: Any, **_: Any) -> Any:
        calls.append(given)
        raise Unfinished("later")

    monkeypatch.setattr(stages, "train_one", train_one)
    for name in ("corpus", "adaptor"):
        (tmp_path / name).mkdir()
    write_index(tmp_path / "corpus", train=1, held_out=1)
    model_folder(tmp_path / "adaptor" / "model")
    context = StageContext(
        plan="p",
        name="student",
        verb="train",
        digest="d",
        run_dir=tmp_path,
        stage_dir=tmp_path,
        inputs={name: tmp_path / name for name in ("corpus", "adaptor")},
        settings=TrainSettings(recipe="distil-onestep-nano", teacher="adaptor"),
        recipe=load_recipe("distil-onestep-nano"),
        console=Console(silent=True),
    )
    with pytest.raises(Unfinished):
        stages.run_train(context)
    ((recipe, inputs, *_),) = calls
    assert recipe.teacher == str(tmp_path / "adaptor" / "model") and recipe.student_gate is not None
    assert inputs.parents == {} and set(inputs.corpora) == {"corpus"} and context.recipe.teacher == ""


def test_a_torn_row_costs_that_row_only(tmp_path: Path) -> None:
    rows: list[Any] = []
    (tmp_path / METRICS).write_text('{"step": 1, "name": "loss", "value": 2.0, "time": 0}\n{"step": 2, "na')
    (tmp_path / ORDER).write_text('{"step": 1, "rank": 0, "positions": [0], "keys": ["a"]}\n{"st')
    log = Log(tmp_path, active=True)
    log.write(2, {"loss": 1.0})
    log_order(tmp_path, 0, 2, [Sample(1, "b", "", "")])
    assert read_metrics(tmp_path / METRICS) == {"loss": {1: 2.0, 2: 1.0}}
    assert read_order(tmp_path) == {0: "a", 1: "b"}
    tail = Tail(tmp_path / METRICS, rows.extend)
    tail.offset = 0
    with tail:
        pass
    assert [row[0] for row in rows] == [1, 2]


def model_folder(path: Path, name: str = "a") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "model.json").write_text(json.dumps({"name": name}))
    return path


def test_models_that_a_recipe_names_are_checked_and_identify_its_stage(tmp_path: Path) -> None:
    """Other weights of the coarse restorer or of the teacher make another training."""
    for key in ("coarse", "teacher"):
        folder = model_folder(tmp_path / key)
        recipe = load_recipe("instarevive-bsr-nano", [f"{key}={folder}"])
        check_recipe(recipe)
        first = train_identity(recipe)
        assert set(first) == {"prior", key}
        model_folder(folder, "b")
        second = train_identity(recipe)
        assert first["prior"] == second["prior"] and first[key] != second[key]
        with pytest.raises(
            UsageError, match=f'unknown {key} "owner/name"'
        ):  # a hub id is not allowed: it must be a model folder
            check_recipe(load_recipe("instarevive-bsr-nano", [f"{key}=owner/name"]))


def test_a_missing_start_says_how_to_make_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path))
    quiet = ["missing_captions.model="]
    with pytest.raises(UsageError, match=r"no model instarevive-bfr for warm_start: .*restoray train instarevive-bfr"):
        check_recipe(load_recipe("instarevive-inpaint", quiet))
    with pytest.raises(UsageError, match=r"restoray train swinir or restoray weights import swinir.*coarse=MODEL"):
        check_recipe(load_recipe("instarevive-bsr", quiet))
    check_recipe(load_recipe("instarevive-bsr", [*quiet, "coarse="]))


def test_a_coarse_view_without_a_coarse_restorer_is_refused() -> None:
    with pytest.raises(UsageError, match=r"missing_captions\.view: the coarse view needs a coarse restorer"):
        check_recipe(load_recipe("instarevive-bsr-nano", ["missing_captions.view=coarse"]))


def test_a_task_may_start_from_another_tasks_model(tmp_path: Path) -> None:
    """The other model must be of the same stage. The model is checked before the corpus."""
    recipe = load_recipe("instarevive-bsr-nano")
    nowhere = {"corpora": {"corpus": tmp_path}}
    with pytest.raises(UsageError, match=r"from a model of stage onestep\), but the inputs hold a model of stage dcp"):
        check_inputs(recipe, TrainInputs(**nowhere, parents={"dcp": tmp_path}))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"index\.json|no corpus"):
        check_inputs(recipe, TrainInputs(**nowhere, parents={"onestep": tmp_path}))  # type: ignore[arg-type]


def test_pairs_are_not_degraded_again() -> None:
    check_restore(RestoreSettings(pairs="lq", preset="none"), None, {})
    with pytest.raises(UsageError, match="not degraded again; set preset=none"):
        check_restore(RestoreSettings(pairs="lq"), None, {})


@pytest.mark.parametrize("name", ["swinir", "swinir-nano", "swinir-face"])
def test_a_recipe_without_a_prior_needs_none(name: str) -> None:
    """`prior: none` of these recipes was refused as an unknown prior."""
    check_recipe(load_recipe(name))


def test_a_papers_recipe_does_not_train_without_its_lpips(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A missing file ends the driver at once; a file, a name in the weights folder, a hub id and "" pass."""
    monkeypatch.setenv("RESTORAY_HOME", str(tmp_path / "home"))
    inputs = TrainInputs(corpora={"ffhq": write_index(tmp_path, train=4, held_out=2)})
    with pytest.raises(UsageError, match=r"distillation.lpips names weights that are not here: lpips-vgg is no file"):
        check_inputs(load_recipe("instarevive-bfr"), inputs)
    (tmp_path / "vgg.pth").touch()
    for place in (str(tmp_path / "vgg.pth"), "some/lpips", ""):
        check_inputs(load_recipe("instarevive-bfr", [f"distillation.lpips={place}"]), inputs)
    (tmp_path / "home" / "weights" / "lpips-vgg").mkdir(parents=True)
    check_inputs(load_recipe("instarevive-bfr"), inputs)


def study_plan(path: Path, **changes: Any) -> Path:
    """A plan whose study compares two adaptors."""
    study = {
        "name": "connectors",
        "verb": "study",
        "arms": {"a": {"model": "adaptor", "tau": 2}, "b": {"model": "zero-conv"}},
        "needs": ["corpus", "adaptor", "zero-conv"],
        **changes,
    }
    train = {"verb": "train", "recipe": "supir-adaptor-nano", "needs": ["corpus", "encoder"]}
    stages_ = [
        {"name": "corpus", "verb": "curate", "spec": "demo"},
        {"name": "encoder", "verb": "train", "recipe": "supir-encoder-nano", "needs": ["corpus"]},
        {"name": "adaptor", **train},
        {"name": "zero-conv", **train, "overrides": ["adaptor.connector=zero_conv"]},
        study,
    ]
    path.write_text(json.dumps({"stages": stages_}))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": {}}, "at least one arm"),
        ({"arms": {"a": {"model": "adapter"}}}, r"arm 'a'.*(?i:did you mean) \"?adaptor"),
        ({"arms": {"a": {"tua": 1}}}, r"arm 'a'.*tua.*tau"),
        ({"options": {"tua": 1}}, r"tua.*tau"),
        ({"preset": "x5"}, "x5"),
        ({"study": "encodr"}, "encoder"),
        ({"study": "encoder"}, "arm 'a'.*models alone"),
        ({"study": "encoder", "arms": {"a": {"model": ["adaptor", "zero-conv"]}}}, "arm 'a'.*models alone"),
        ({"arms": {"a": {"model": ["adaptor", "zero-con"]}}}, r"arm 'a'.*zero-conv"),
        (
            {"arms": {"a": {"model": ["adaptor", "zero-conv"]}, "b": {"model": "adaptor"}}},
            "1 for arm 'b' and 2 for 'a'",
        ),
        ({"paper": {"c": {"psnr": 1.0}}}, 'numbers "c"'),
    ],
)
def test_a_wrong_study_is_refused_when_its_plan_is_loaded(changes: Any, words: str, tmp_path: Path) -> None:
    assert load_plan(study_plan(tmp_path / "plan.yaml")).stages[-1].settings.arms["a"]["tau"] == 2
    with pytest.raises(UsageError, match=words):
        load_plan(study_plan(tmp_path / "plan.yaml", **changes))


def test_a_study_stage_compares_models_on_the_held_out_pictures(tmp_path: Path) -> None:
    """Two copies of the shipped model, one of them with other options."""
    samples: list[Any] = [(f"p{n}", "png", encode_png(dead_leaves(96, 3, n)), {}) for n in range(3)]
    write_corpus(tmp_path / "corpus", "leaves", {"train": samples[:1], "held_out": samples[1:]})
    for name in ("first", "second"):
        shutil.copytree(find_model_folder("nano"), tmp_path / name / "model")  # type: ignore[arg-type]
    context = StageContext(
        plan="p",
        name="s",
        verb="study",
        digest="0",
        run_dir=tmp_path,
        stage_dir=tmp_path / "stage",
        inputs={name: tmp_path / name for name in ("corpus", "first", "second")},
        settings=StudySettings(arms={"one": {"model": "first"}, "two": {"strength": 0.5}}, side_px=64, preset="x4"),
        console=Console(silent=True),
    )
    results = run_study(context)
    assert results["quarantined"] == 0 and "two against one" in results["verdict"]
    assert {"study/report.html", "study/summary.json", "study/arms.png"} <= set(results["outputs"])
    summary = json.loads((tmp_path / "stage" / "study" / "summary.json").read_text())
    assert summary["pictures"] == 2 and set(summary["arms"]) == {"input", "one", "two"}
    folders = [str(tmp_path / name / "model") for name in ("second", "first")]
    assert folders_of({"model": ["second", "first"]}, context.inputs) == {"model": folders}
    assert folders_of({"model": "first"}, context.inputs) == {"model": folders[1]} and folders_of({}, {}) == {}


def test_negatives_without_a_path_are_made_of_a_needed_corpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    def curate(spec: Any, out: Path, **options: Any) -> Any:
        calls.append((spec, options["images"]))
        (out / "index.json").write_text(json.dumps({"splits": {}}))
        return SimpleNamespace(accepted=1, rejected=0, digest="d")

    monkeypatch.setattr(stages, "curate", curate)
    settings = CurateSettings(spec="supir-negatives", overrides=["sources.0.path=", "sources.0.negatives.prior=nano"])
    (tmp_path / "corpus").mkdir()
    (tmp_path / "stage").mkdir()
    (tmp_path / "corpus" / "index.json").write_text("{}")
    context = StageContext(
        plan="p",
        name="negatives",
        verb="curate",
        digest="0",
        run_dir=tmp_path,
        stage_dir=tmp_path / "stage",
        inputs={"corpus": tmp_path / "corpus"},
        settings=settings,
        images=tmp_path / "mine",
        console=Console(silent=True),
    )
    stages.run_curate(context)
    ((spec, images),) = calls
    assert images is None, "the user's pictures replace the corpus's sources, not the negatives"
    assert spec.sources[0].path == str(tmp_path / "corpus") and spec.sources[0].negatives.prior == "nano"
    mine = stages.curate_identity(settings, None, tmp_path)
    assert mine == stages.curate_identity(settings, None, None) and mine["spec"]["sources"][0]["kind"] == "negatives"
