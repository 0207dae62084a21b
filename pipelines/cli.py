"""`restoray`: parse, call, map errors to exit codes. Modules are imported by the verb that needs them.

Exit codes: 0 ok, 1 failure, 2 usage, 3 finished with quarantined rows, 4 quality gate failed, 75 retry later,
130 interrupted (Ctrl-C or SIGTERM).
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines import cli_analyze
from pipelines.cli_support import (
    Command,
    Compile,
    Device,
    Precision,
    build_options,
    complete_captioner,
    complete_plan,
    complete_preset,
    complete_recipe,
    complete_role,
    complete_spec,
    end_curation,
    local_model,
    named_folders,
    parse_options,
    plain,
    plan_lines,
    yaml_text,
)
from pipelines.cli_weights import weights
from pipelines.console import Console
from pipelines.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_QUARANTINED,
    EXIT_USAGE,
    Failure,
    RestorayError,
    UsageError,
    unknown,
)

INTERRUPTED = "interrupted: the same command resumes where this one stopped."

app = typer.Typer(
    name="restoray",
    help="Curate, train, restore, evaluate and serve generative image restoration on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes for this run only.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where the results go.")]
RequiredOut = Annotated[Path, typer.Option("--out", "-o", help="Where the results go.")]
Images = Annotated[Path | None, typer.Option("--images", help="Your own folder of photographs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, resolved, and do nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on standard output and no progress.")]
ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="A model folder, models:/name@alias or a shipped name.")
]


# -- verbs -----------------------------------------------------------------------------------------------------------


def show_version(wanted: bool) -> None:
    """--version."""
    if wanted:
        typer.echo(f"restoray {version('restoray')}")
        raise typer.Exit


@app.callback()
def restoray(
    _version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Curate, train, restore, evaluate and serve generative image restoration on Ray."""


@app.command(cls=Command)
def demo(
    overrides: Overrides = None,
    out: Out = None,
    images: Images = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """The whole product on real photographs: the same as `restoray run demo`."""
    run_named_plan("demo", overrides, out, images, dry_run, as_json)


@app.command(cls=Command)
def run(
    plan: Annotated[str, typer.Argument(autocompletion=complete_plan, help="A plan's name or a YAML file.")],
    overrides: Overrides = None,
    out: Out = None,
    images: Images = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Run a plan: its stages in order; what is done is skipped, what was interrupted goes on."""
    run_named_plan(plan, overrides, out, images, dry_run, as_json)


def run_named_plan(
    plan: str, overrides: list[str] | None, out: Path | None, images: Path | None, dry_run: bool, as_json: bool
) -> None:
    """What demo and run share."""
    from pipelines.plans import run_plan

    console = Console(silent=as_json)
    result = run_plan(plan, out, overrides or (), images, dry_run, console)
    lines = plan_lines(result) if dry_run else result.lines()
    console.result(result.to_json(), lines)
    raise typer.Exit(0 if dry_run else result.exit_code)


@app.command(cls=Command)
def curate(
    spec: Annotated[str, typer.Argument(autocompletion=complete_spec, help="A corpus spec's name or a YAML file.")],
    overrides: Overrides = None,
    out: Out = None,
    images: Images = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Pictures of any source to shards, with an index, a manifest, a quarantine and a report."""
    from pipelines.catalogue import check_sources as check_paths
    from pipelines.catalogue import load_spec
    from pipelines.cluster import local_ray
    from pipelines.curate import curate as curate_corpus
    from pipelines.curation.select import thresholds
    from pipelines.sources import check_sources, for_folder

    console = Console(silent=as_json)
    resolved = load_spec(spec, overrides or [])
    if images is not None:
        resolved = for_folder(resolved, images)
    bounds = thresholds(resolved)
    if dry_run:
        document = {**plain(resolved), "thresholds": {name: plain(bound) for name, bound in bounds.items()}}
        console.result(document, [yaml_text(document)])
        return
    if out is None:
        raise UsageError("curate needs --out FOLDER (or --dry-run).")
    if images is None:
        check_paths(resolved, typed=spec)
    check_sources(resolved, out)  # a folder without pictures dies here, before Ray
    with local_ray(), console.bar("curate") as progress:
        result = curate_corpus(resolved, out, progress=progress)
    end_curation(result, out, console)


@app.command(cls=Command)
def datasets(
    name: Annotated[str | None, typer.Argument(autocompletion=complete_spec, help="Tell all about this one.")] = None,
    role: Annotated[
        str | None, typer.Option(autocompletion=complete_role, help="train, regularisation or benchmark.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the corpora and benchmarks of the papers: what they are, their licence, how to get and curate them."""
    from pipelines.catalogue import describe, list_corpora, list_json, list_lines

    console = Console(silent=as_json)
    if name is not None:
        description = describe(name)
        console.result(description.to_json(), description.lines())
        return
    entries = list_corpora(role)
    console.result(list_json(entries), list_lines(entries))


@app.command(cls=Command)
def caption(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS", help="A curated corpus.")],
    model: Annotated[
        str,
        typer.Option("--model", "-m", autocompletion=complete_captioner, help="A captioner, a hub id or a folder."),
    ],
    overrides: Overrides = None,
    name: Annotated[str, typer.Option(help="Of the column that holds the captions.")] = "captions",
    engine: Annotated[str, typer.Option(help="transformers, or vllm where that extra is installed.")] = "transformers",
    as_json: Json = False,
) -> None:
    """Caption a corpus; KEY=VALUE sets prompt, max_tokens, batch_size, workers, num_gpus, revision, overwrite."""
    from pipelines.caption import caption_corpus
    from pipelines.cli_support import caption_spec
    from pipelines.cluster import local_ray
    from pipelines.shards import open_corpus

    console = Console(silent=as_json)
    spec = caption_spec(model, parse_options(overrides or []))
    open_corpus(corpus)
    with local_ray(), console.bar("caption") as progress:
        result = caption_corpus(corpus, spec, name=name, progress=progress, engine=engine)
    written = result.samples - result.given - result.quarantined
    counts = f"{written} captioned, {result.given} came with the corpus, {result.quarantined} quarantined"
    console.result(plain(result), [f"{counts}; {result.folder}"])
    raise typer.Exit(EXIT_QUARANTINED if result.quarantined else 0)


@app.command(cls=Command)
def replay(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS", help="A corpus that `restoray curate` made.")],
    codes: Annotated[
        list[str] | None, typer.Option("--code", help="Only rows quarantined for this reason; repeat.")
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="Count the reasons and do nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Try a corpus' quarantined pictures again, and only those."""
    from pipelines.curate import quarantined, saved_spec
    from pipelines.curate import replay as replay_quarantine

    console = Console(silent=as_json)
    if listing:
        reasons = quarantined(corpus)
        console.result(reasons, [f"{count:>8}  {code}" for code, count in reasons.items()] or ["nothing"])
        return
    saved_spec(corpus)
    from pipelines.cluster import local_ray

    with local_ray(), console.bar("replay") as progress:
        result = replay_quarantine(corpus, codes or (), progress=progress)
    end_curation(result, corpus, console)


@app.command(cls=Command)
def train(
    recipe: Annotated[str, typer.Argument(autocompletion=complete_recipe, help="A recipe's name or a YAML file.")],
    overrides: Overrides = None,
    out: Out = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", "-i", metavar="NAME=FOLDER", help="A corpus or an earlier stage's folder; repeat."),
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Train one stage by its recipe."""
    from pipelines.plans import load_checked_recipe, recipe_documents

    console = Console(silent=as_json)
    resolved = load_checked_recipe(recipe, overrides or [])
    if dry_run:
        document, _ = recipe_documents(resolved)
        console.result(document, [yaml_text(document)])
        return
    if out is None:
        raise UsageError("train needs --out FOLDER (or --dry-run).")
    from pipelines.cluster import local_ray
    from pipelines.stages import step_progress, train_folder, train_inputs
    from pipelines.train import check_inputs
    from pipelines.train import train as train_stage

    folders = train_inputs(named_folders(inputs or []))
    check_inputs(resolved, folders)
    with train_folder(resolved, folders, out), local_ray(), console.bar(resolved.name) as progress:
        result = train_stage(resolved, folders, out, on_metrics=step_progress(progress, resolved.steps))
    lines = [f"model: {result.model}"]
    if getattr(resolved, "teacher", ""):  # it has passed its gate, or nobody would be here
        from pipelines.gate import register

        lines.append(f"registered as {resolved.name}, version {register(resolved, out)}; {out / 'gate' / 'gate.json'}")
    console.result(plain(result), lines)


@app.command(cls=Command)
def restore(
    source: Annotated[Path, typer.Argument(help="A folder of pictures.")],
    model: ModelOption,
    out: RequiredOut,
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="With a picture's name it fixes every random bit.")] = 0,
    reference: Annotated[
        Path | None, typer.Option(help="A folder with a second picture of each name, for options such as reference=hq.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Each picture's prompt: .jsonl of {key, prompt or caption}, or .csv.")
    ] = None,
    captioner: Annotated[
        str | None,
        typer.Option(
            autocompletion=complete_captioner,
            help="Writes the prompts that are missing: a captioner, a hub id or a folder.",
        ),
    ] = None,
    caption_view: Annotated[
        str, typer.Option(help="What it looks at: auto (coarse where the model has it), lq, coarse.")
    ] = "auto",
    max_megapixels: Annotated[float, typer.Option(min=0.0001, help="Larger inputs are refused, by their header.")] = 50,
    device: Device = "cpu",
    precision: Precision = "fp32",
    compiled: Compile = "off",
    as_json: Json = False,
) -> None:
    """Restore a folder of pictures; KEY=VALUE sets the restorer's options."""
    from components.images import Limits
    from pipelines.cli_support import caption_spec
    from pipelines.cluster import local_ray
    from pipelines.restore import list_pictures, model_identity, restore_folder
    from pipelines.restore_prompts import AUTO, caption_wish, read_prompts
    from pipelines.stages import check_options

    console = Console(silent=as_json)
    options, build = parse_options(overrides or []), build_options(device, precision, compiled)
    sources, _ = list_pictures(source, out)
    if captioner is None and caption_view != AUTO:
        raise UsageError("--caption-view needs --captioner.")
    folder, identity = model_identity(local_model(model))
    check_options(identity.system, identity.defaults, options)
    own = read_prompts(prompts, sources, source, identity.frame) if prompts is not None else None
    wish = caption_wish(caption_spec(captioner, {}), caption_view, identity, device) if captioner is not None else None
    gpus = float(device == "cuda")
    with local_ray(), console.bar("restore") as progress:
        result = restore_folder(
            folder,
            source,
            out,
            options=options,
            seed=seed,
            progress=progress,
            references=reference,
            limits=Limits(max_pixels=round(max_megapixels * 1e6)),
            build_options=build,
            num_gpus=gpus,
            prompts=own,
            captioner=wish,
        )
    line = f"{result.restored} restored, {result.skipped} done before, {result.quarantined} quarantined; {out}"
    lines = [f"{result.unprompted} of {len(sources)} pictures have no line in {prompts}"] if result.unprompted else []
    console.result(plain(result), [line, *lines])
    raise typer.Exit(EXIT_QUARANTINED if result.quarantined else 0)


@app.command(cls=Command)
def degrade(
    source: Annotated[Path | None, typer.Argument(metavar="IN", help="A folder of pictures, or one picture.")] = None,
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="Where the results go.")] = None,
    overrides: Overrides = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", "-p", autocompletion=complete_preset, help="The degradation; default realesrgan."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="With a picture's name it fixes every random bit; default 0.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option("--replay", metavar="RECORDS", help="Apply the plans of these records again.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Degrade a folder and keep the plans; KEY=VALUE sets the preset's options. Or replay recorded plans."""
    from pipelines.degrade import degrade_folder, replay

    console = Console(silent=as_json)
    if record is not None:
        if overrides or preset is not None or seed is not None:
            raise UsageError("--replay takes no preset, seed or options: the records say everything.")
        if source is not None and out is None:
            raise UsageError("--replay takes IN and OUT, or neither: then OUT is `replayed` beside the records.")
        target = out or record.parent / "replayed"
        with console.bar("replay") as progress:
            result = replay(record, source, target, progress=progress)
    elif source is None or out is None or "=" in out.name:  # an option in OUT's place
        raise UsageError("degrade needs IN and OUT (or --replay RECORDS).")
    else:
        with console.bar("degrade") as progress:
            result = degrade_folder(
                source, out, preset or "realesrgan", parse_options(overrides or []), seed or 0, progress=progress
            )
    counts = f"{result.degraded} degraded, {result.skipped} done before, {result.quarantined} quarantined"
    sheet = [f"look at {result.sheet}"] if result.sheet else []
    console.result(plain(result), [f"{counts}; {result.folder}", *sheet])
    if result.differing:
        raise Failure(f"{len(result.differing)} pictures differ from their records, first {result.differing[0]}.")
    raise typer.Exit(EXIT_QUARANTINED if result.quarantined else 0)


@app.command(cls=Command)
def evaluate(
    restored: Annotated[Path, typer.Argument(help="Restored pictures.")],
    hq: Annotated[Path, typer.Option("--hq", help="The originals, by the same names.")],
    lq: Annotated[Path, typer.Option("--lq", help="The degraded inputs, by the same names.")],
    out: RequiredOut,
    metrics: Annotated[list[str] | None, typer.Option("--metric", help="A pyiqa metric; repeat.")] = None,
    as_json: Json = False,
) -> None:
    """Score restored pictures against their originals, beside the input and a classical baseline."""
    from pipelines.evaluate import evaluate as evaluate_pictures

    console = Console(silent=as_json)
    chosen: dict[str, Any] = {"metrics": metrics} if metrics else {}
    with console.bar("evaluate") as progress:
        summary = evaluate_pictures(restored, lq, hq, out, progress=progress, **chosen)
    console.result(
        plain(summary), [*(f"{name}: {text}" for name, text in summary.verdicts.items()), summary.verdict, str(out)]
    )
    raise typer.Exit(EXIT_QUARANTINED if summary.quarantined else 0)


app.add_typer(cli_analyze.app, name="analyze")


@app.command(cls=Command)
def serve(
    model: ModelOption,
    host: Annotated[str, typer.Option(help="Address to bind; the default is reachable from this machine only.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    device: Device = "cpu",
    precision: Precision = "fp32",
    compiled: Compile = "off",
) -> None:
    """Serve a model: POST /v1/restore, GET /health."""
    from pipelines.cluster import local_ray
    from pipelines.restore import model_identity
    from pipelines.serve import serve as serve_model

    build = build_options(device, precision, compiled)
    folder, _ = model_identity(local_model(model))
    with local_ray():
        serve_model(
            folder,
            host=host,
            port=port,
            on_ready=lambda url: typer.echo(f"ready: {url}"),
            build_options=build,
            num_gpus=float(device == "cuda"),
        )


@app.command(cls=Command)
def doctor(
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Look for what would keep a run from working, and say what to do about it."""
    from pipelines.doctor import examine, finding_lines

    findings = examine(out)
    failed = any(finding.status == "fail" for finding in findings)
    document = {"ok": not failed, "findings": [dataclasses.asdict(finding) for finding in findings]}
    Console(silent=as_json).result(document, finding_lines(findings))
    raise typer.Exit(EXIT_FAILURE if failed else 0)


@app.command(cls=Command)
def recipes(
    name: Annotated[
        str | None, typer.Argument(autocompletion=complete_recipe, help="Print this one, resolved.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the shipped recipes, plans, datasets and degradations, or print one recipe resolved."""
    from pipelines.home import shipped

    console = Console(silent=as_json)
    if name is not None:
        if not name.endswith((".yaml", ".yml")) and name not in shipped("recipes"):
            raise unknown("recipe", name, shipped("recipes"))
        from pipelines.plans import load_checked_recipe, recipe_documents

        document, _ = recipe_documents(load_checked_recipe(name, []))
        console.result(document, [yaml_text(document)])
        return
    from components.degradations import PRESETS

    listing = {kind: sorted(shipped(kind)) for kind in ("recipes", "mixtures", "plans", "datasets")}
    listing["degradations"] = list(PRESETS)
    console.result(listing, [f"{kind}: {', '.join(names) or 'none'}" for kind, names in listing.items()])


@app.command(cls=Command)
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The HTML file; RUN/report.html by default.")] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained report.html about a run, finished or not."""
    from pipelines.report import write_report

    if not (run_dir / "plan.json").is_file():
        raise UsageError(f"{run_dir} is no run: it has no plan.json.")
    target = out or run_dir / "report.html"
    write_report(run_dir, target)
    Console(silent=as_json).result({"report": str(target)}, [str(target)])


app.add_typer(weights)


# -- the command -------------------------------------------------------------------------------------------------------


def interrupt(signum: int, frame: object) -> None:
    """SIGTERM ends a command the way Ctrl-C does: cleanly, resumable, exit 130."""
    raise KeyboardInterrupt


def main() -> None:
    """The console command."""
    from pipelines.cluster import quiet_environment

    quiet_environment()
    signal.signal(signal.SIGTERM, interrupt)
    as_json = "--json" in sys.argv
    try:
        code = int(app(standalone_mode=False) or EXIT_OK)
        message = INTERRUPTED if code == EXIT_INTERRUPTED else ""  # typer makes a Ctrl-C this code and says nothing
    except RestorayError as error:
        code, message = error.exit_code, str(error)
    except (KeyboardInterrupt, typer.Abort):
        code, message = EXIT_INTERRUPTED, INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away: nothing is left to be said to it
        sys.stderr.close()
        sys.exit(EXIT_FAILURE)
    except OSError as error:
        code, message = EXIT_FAILURE, f"{error.filename or 'input or output'}: {error.strerror or error}."
    except Exception as error:  # the parser's own classes are private to typer
        show = getattr(error, "show", None)
        if show is None:
            raise
        code, message = getattr(error, "exit_code", EXIT_USAGE), ""
        show()
    if message:
        report_error(message, code, as_json)
    sys.exit(code)


def report_error(message: str, code: int, as_json: bool) -> None:
    """One sentence on standard error; under --json also a document on standard output."""
    if as_json:
        sys.stdout.write(json.dumps({"error": message, "exit_code": code}) + "\n")
    sys.stderr.write(f"restoray: {message}\n")


if __name__ == "__main__":
    main()
