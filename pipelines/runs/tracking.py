"""Tracking: one parent run with a child run for each stage, which MLflow stores in a sqlite file of the output folder.

Only this module imports mlflow, and only inside functions: the import takes seconds. Rules:
    - only the driver tracks. Workers write metrics.jsonl, which the driver tails (`tail_metrics`).
    - a store that cannot be reached never ends a job. Operations that fail are appended to tracking-backlog.jsonl and
      replayed on the next start. So an operation may run twice, and its second run changes nothing.
    - runs are identified by name and digest, so that a resumed job continues its runs and opens no new ones.
    - one client with explicit addresses: MLflow's global ones would make an mlflow.db in the working directory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from PIL import Image

from components.naming import is_text, printable
from pipelines.core.errors import Failure, UsageError, unknown
from pipelines.core.metrics import MetricRow

DATABASE = "mlflow.db"
ARTIFACTS = "mlflow-artifacts"
BACKLOG = "tracking-backlog.jsonl"
REFUSED = "tracking-refused.jsonl"
ALIAS = "candidate"
"""Alias of each newly registered version. MLflow reserves "latest", which `resolve` reads as the highest version."""
COPY_LIMIT_MIB = 512
"""Model folders up to this size are copied into the artifacts; of larger ones only path and digest are registered."""
PARAMS_A_CALL, METRICS_A_CALL, PARAM_CHARS, DIGEST_CHARS = 100, 1000, 6000, 32  # the limits of MLflow 3.17
RETRY_AFTER_S = 30.0
"""Time without calls to the store after an outage, so that a dead store does not slow a job."""
PENDING = "pending-"
_NAME = re.compile(r"[^\w\-. :/]")


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat.update(flatten(value, name))
        else:
            flat[name] = value
    return flat


def store_uri(database: Path) -> str:
    """The address of a sqlite file for MLflow: "%", "?" and "#" of its path must not end or change the address.

    Raises:
        UsageError: the path holds bytes that are not UTF-8; MLflow's addresses cannot hold them.
    """
    path = str(database.absolute())
    if not is_text(path):
        raise UsageError(
            f"{printable(path)} cannot be MLflow's store: its path is not UTF-8 text; choose another output folder."
        )
    address = re.sub("[%?#;&]", lambda match: f"%{ord(match[0]):02X}", path)
    # With "sqlite:" MLflow would make a folder of the quoted name.
    return f"sqlite:///{path}" if address == path else f"sqlite+pysqlite:///{address}"


def resolve(uri: str, out_dir: Path) -> Path:
    """The local model folder of `models:/name@alias` in the store below `out_dir`; see Tracker.resolve."""
    return Tracker(out_dir).resolve(uri)


class Tracker:
    """Writes the runs of one experiment.

    Args:
        out_dir: holds mlflow.db, mlflow-artifacts/ and the backlog. The first call makes it.
        experiment: MLflow's experiment name.
        uri: another MLflow store (a server's address); None takes the sqlite file.
        warn: gets one message for each outage.
        lock_timeout_s: how long to wait while another process holds the sqlite file.
    """

    def __init__(
        self,
        out_dir: Path,
        experiment: str = "restoray",
        uri: str | None = None,
        warn: Callable[[str], None] = logging.getLogger("restoray").warning,
        lock_timeout_s: float = 5.0,
    ) -> None:
        self.out_dir, self.experiment = Path(out_dir).absolute(), experiment
        self.database = None if uri else self.out_dir / DATABASE
        self.uri = uri or store_uri(self.out_dir / DATABASE)
        self.backlog, self.refusals = self.out_dir / BACKLOG, self.out_dir / REFUSED
        self._warn, self._lock_timeout_s = warn, lock_timeout_s
        self._run_ids: dict[str, str] = {}
        self._own_runs: set[str] = set()
        self._down_since: float | None = None
        self._experiment_id: str | None = None
        self._mlflow: Any = None
        self._lock = threading.RLock()

    # -- operations

    def start_parent(self, name: str, tags: Mapping[str, str] | None = None) -> str:
        """Open or continue the run called `name`. Replays an earlier backlog first, and sweeps what a kill left open.

        Returns:
            MLflow's run id; while the store cannot be reached, a "pending-..." id in its place.
        """
        self.replay_backlog()
        run = self._start({"name": name, "tags": dict(tags or {}), "identity": ["parent", name]})
        self.sweep(run)
        return run

    def start_child(self, parent: str, stage: str, digest: str) -> str:
        """Open or continue the run of one stage below `parent`. The same digest gives the same run."""
        tags = {"restoray.stage": stage, "restoray.digest": digest}
        identity = ["child", parent, stage, digest]
        return self._start({"name": f"{stage}-{digest[:8]}", "tags": tags, "parent": parent, "identity": identity})

    def log_params(self, run: str, params: Mapping[str, Any]) -> None:
        """Log a mapping, nested or flat. A value that a resume changes becomes a tag `changed.*`."""
        flat = {key: value if isinstance(value, str) else json.dumps(value) for key, value in flatten(params).items()}
        self._submit({"op": "params", "run": run, "params": flat})

    def log_metrics(self, run: str, rows: Iterable[MetricRow | tuple[int, str, float, float]]) -> None:
        """Log (step, name, value, time) rows in batches; NaN values stay NaN."""
        batch = [[int(step), str(name), float(value), float(seconds)] for step, name, value, seconds in rows]
        for start in range(0, len(batch), METRICS_A_CALL):
            self._submit({"op": "metrics", "run": run, "rows": batch[start : start + METRICS_A_CALL]})

    def log_image(self, run: str, path: Path, key: str, step: int = 0) -> None:
        """Log a picture file as step `step` of `key`."""
        self._submit({"op": "image", "run": run, "path": str(Path(path).absolute()), "key": key, "step": int(step)})

    def log_artifact(self, run: str, path: Path, folder: str | None = None) -> None:
        """Copy one file into the run's artifacts."""
        self._submit({"op": "artifact", "run": run, "path": str(Path(path).absolute()), "folder": folder})

    def log_dataset_digest(self, run: str, name: str, digest: str, context: str = "training") -> None:
        """Log which data the run used. MLflow holds 36 characters of a digest, so a tag holds the whole one."""
        self._submit({"op": "dataset", "run": run, "name": name, "digest": digest, "context": context})

    def finish(self, run: str, status: str = "FINISHED") -> None:
        """End a run as FINISHED, FAILED or KILLED."""
        if status not in ("FINISHED", "FAILED", "KILLED"):
            raise ValueError(f"status must be FINISHED, FAILED or KILLED, got {status!r}")
        self._submit({"op": "finish", "run": run, "status": status, "time": time.time()})
        self._own_runs.discard(self._run_ids.get(run, run))

    def register_model(self, run: str, model_dir: Path, name: str) -> int | None:
        """Register a model folder with the metrics of its model.json, and set the alias `candidate`.

        Returns:
            The version; None while the store cannot be reached (the next start then registers it). The same model.json
            under the same name keeps its version.

        Raises:
            Failure: the folder has no model.json, or MLflow or a models:/ address cannot hold the name.
        """
        if not re.fullmatch(r"[\w\-. ]{1,200}", name):
            raise Failure(f"{name!r} cannot name a model: use letters, digits, '-', '_', '.' and spaces")
        folder = Path(model_dir).absolute()
        if not (folder / "model.json").is_file():
            raise Failure(f"{folder.name} is not a model folder: it has no model.json")
        version = self._submit({"op": "model", "run": run, "folder": str(folder), "name": name})
        return None if version is None else int(version)

    def set_alias(self, name: str, alias: str, version: int) -> None:
        """Set `models:/name@alias` to a version."""
        self._submit({"op": "alias", "name": name, "alias": alias, "version": int(version)})

    def sweep(self, parent: str) -> list[str]:
        """Mark RUNNING runs below `parent` that a killed process left open as KILLED; this tracker's own runs stay.

        Returns:
            The ids of those runs; [] if the store cannot be reached.
        """
        run_ids = self._submit({"op": "sweep", "parent": parent}, keep=False)
        return list(run_ids or [])

    def resolve(self, uri: str) -> Path:
        """The local folder of `models:/name@alias`, `models:/name/version` or `models:/name` (the highest version).

        Raises:
            UsageError: the address is malformed, or the model, alias or version does not exist.
            Failure: the store cannot be reached, or its copy of the model is missing or changed.
        """
        match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))?", uri)
        if match is None:
            raise UsageError(f"{uri!r} is not a model address; write models:/name@alias or models:/name/version")
        if self.database is not None and not self.database.is_file():
            raise Failure(f"no MLflow store in {str(self.out_dir)!r}, so {uri!r} cannot be found")
        trouble = self._probe()
        if trouble:
            raise Failure(f"the MLflow store cannot be reached: {trouble}")
        return self._resolve(*match.groups())

    def addresses(self) -> list[str]:
        """The addresses models:/name@alias of all registered models. Raises Failure: the store cannot be reached."""
        trouble = self._probe()
        if trouble:
            raise Failure(f"the MLflow store cannot be reached: {trouble}")
        models = self._client().search_registered_models(max_results=1000)
        return [f"models:/{model.name}@{alias}" for model in models for alias in sorted(dict(model.aliases))]

    def replay_backlog(self) -> int:
        """Apply the operations of an earlier outage; returns their number.

        An operation that a healthy store refuses goes to tracking-refused.jsonl with the reason, so that it does not
        block the others. If the store fails meanwhile, the remaining operations stay in the backlog.
        """
        with self._lock:
            if not self.backlog.exists():
                return 0
            trouble = self._probe()
            if trouble:
                self._outage(trouble)
                return 0
            self._down_since = None
            lines = self.backlog.read_text(encoding="utf-8").splitlines()
            applied = 0
            for index, line in enumerate(lines):
                try:
                    operation = json.loads(line)
                except ValueError:  # a kill cut this line off
                    continue
                try:
                    self._apply({**operation, "replayed": True})
                    applied += 1
                except Exception as error:  # noqa: BLE001 - the probe below finds out whether the store is away or refuses
                    trouble = self._probe()
                    if trouble:
                        self._outage(trouble)
                        rest = "".join(f"{later}\n" for later in lines[index:])
                        scratch = self.backlog.with_name(f".{self.backlog.name}")
                        scratch.write_text(rest, encoding="utf-8")
                        scratch.replace(self.backlog)
                        return applied
                    self._append(self.refusals, {**operation, "error": f"{type(error).__name__}: {error}"[:500]})
            self.backlog.unlink()
            return applied

    # -- applying operations, or writing them to the backlog

    def _start(self, operation: dict[str, Any]) -> str:
        pending = f"{PENDING}{uuid.uuid4().hex[:16]}"
        run = self._submit({"op": "start", "pending": pending, "time": time.time(), **operation})
        if run is not None:
            self._own_runs.add(str(run))
        return str(run) if run is not None else pending

    def _submit(self, operation: dict[str, Any], keep: bool = True) -> Any:
        """Apply an operation now, or append it to the backlog. Errors of the store are not raised."""
        with self._lock:
            down = self._down_since
            if down is not None and time.monotonic() - down < RETRY_AFTER_S:
                trouble = "still unreachable"
            else:
                trouble = self._probe()
                if not trouble and down is not None:
                    self._down_since = None
                    self.replay_backlog()  # operations of the outage come first
            if not trouble:
                try:
                    return self._apply(operation)
                except Exception as error:  # noqa: BLE001 - the job continues after any error of MLflow or its database
                    trouble = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                    if self._probe():
                        self._outage(trouble)
                    else:
                        self._warn(f"MLflow refused an operation ({operation['op']}): {trouble}")
            else:
                self._outage(trouble)
            if keep:
                self._append(self.backlog, operation)
            return None

    def _outage(self, trouble: str) -> None:
        if self._down_since is None:
            self._warn(
                f"the MLflow store cannot be reached ({trouble}); tracking goes to {BACKLOG} and is replayed later"
            )
        self._down_since = self._down_since if trouble == "still unreachable" else time.monotonic()

    def _append(self, path: Path, operation: Mapping[str, Any]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(operation) + "\n")
        except OSError as error:  # on a full disk the job fails elsewhere with a better message
            self._warn(f"an operation of the tracking is lost: {error}")

    def _probe(self) -> str:
        """Why the store cannot be written now; "" if it can. MLflow itself would retry for more than a minute."""
        if self.database is None:
            return ""
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.database, timeout=self._lock_timeout_s, isolation_level=None)
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("ROLLBACK")
            finally:
                connection.close()
        except (sqlite3.Error, OSError) as error:
            return str(error)
        return ""

    def _client(self) -> Any:
        if self._mlflow is None:
            # MLflow reads these at import or at its first call; a user's own setting stays.
            for name, value in {
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
                "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
                "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false",
                "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
                "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
                "GIT_PYTHON_REFRESH": "quiet",
            }.items():
                os.environ.setdefault(name, value)
            from mlflow import MlflowClient

            for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
                logging.getLogger(noisy).setLevel(logging.WARNING)
            self._mlflow = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        if self._experiment_id is None:
            experiment = self._mlflow.get_experiment_by_name(self.experiment)
            location = None if self.database is None else (self.out_dir / ARTIFACTS).as_uri()
            experiment_id = (
                experiment.experiment_id
                if experiment
                else self._mlflow.create_experiment(self.experiment, artifact_location=location)
            )
            self._experiment_id = str(experiment_id)
        return self._mlflow

    def _apply(self, operation: Mapping[str, Any]) -> Any:
        """Apply one operation; a second time changes nothing."""
        act: Callable[[Mapping[str, Any]], Any] = getattr(self, f"_apply_{operation['op']}")
        return act(operation)

    def _run(self, run: str) -> str:
        """MLflow's run id. A pending id is looked up in this process, else by its tag."""
        if not run.startswith(PENDING):
            return run
        if run not in self._run_ids:
            runs = self._search(f"tags.`restoray.{run}` = 'yes'")
            if not runs:
                raise LookupError(f"run {run} was not started")
            self._run_ids[run] = runs[0].info.run_id
        return self._run_ids[run]

    def _search(self, query: str) -> list[Any]:
        client = self._client()
        return list(client.search_runs([self._experiment_id], filter_string=query, max_results=1000))

    def _apply_start(self, operation: Mapping[str, Any]) -> str:
        client = self._client()
        parts = [self._run(part) if part.startswith(PENDING) else part for part in operation["identity"]]
        identity = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        tags = {**operation["tags"], "restoray.identity": identity}
        if operation.get("replayed"):  # later operations, also of later processes, refer to the run by this id
            tags[f"restoray.{operation['pending']}"] = "yes"
        if operation.get("parent"):
            tags["mlflow.parentRunId"] = self._run(operation["parent"])
        runs = self._search(f"tags.`restoray.identity` = '{identity}'")
        if runs:
            run = str(runs[0].info.run_id)
            client.update_run(run, status="RUNNING")
            for key, value in tags.items():
                client.set_tag(run, key, value)
        else:
            start_ms = int(operation["time"] * 1000)
            new_run = client.create_run(self._experiment_id, start_time=start_ms, tags=tags, run_name=operation["name"])
            run = str(new_run.info.run_id)
        self._run_ids[operation["pending"]] = run
        self._own_runs.add(run)
        return run

    def _apply_params(self, operation: Mapping[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        client, run = self._client(), self._run(operation["run"])
        existing = client.get_run(run).data.params
        params, tags = [], []
        for key, value in operation["params"].items():
            name, text = _NAME.sub("_", key)[:250], value[:PARAM_CHARS]
            if name not in existing:
                params.append(Param(name, text))
            elif existing[name] != text:
                tags.append(RunTag(f"changed.{name}"[:250], text))
        for start in range(0, len(params), PARAMS_A_CALL):
            client.log_batch(run, params=params[start : start + PARAMS_A_CALL])
        for start in range(0, len(tags), PARAMS_A_CALL):
            client.log_batch(run, tags=tags[start : start + PARAMS_A_CALL])

    def _apply_metrics(self, operation: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        rows = operation["rows"]
        metrics = [
            Metric(_NAME.sub("_", name)[:250], value, int(when * 1000), step) for step, name, value, when in rows
        ]
        self._client().log_batch(self._run(operation["run"]), metrics=metrics)

    def _apply_image(self, operation: Mapping[str, Any]) -> None:
        with Image.open(operation["path"], formats=("PNG", "JPEG", "WEBP")) as picture:
            picture.load()
            client, run = self._client(), self._run(operation["run"])
            key, step = _NAME.sub("_", operation["key"]), operation["step"]
            tag = f"restoray.image.{key}.{step}"[:250]  # a second call would make a second file
            if tag not in client.get_run(run).data.tags:
                client.log_image(run, picture, key=key, step=step)
                client.set_tag(run, tag, "yes")

    def _apply_artifact(self, operation: Mapping[str, Any]) -> None:
        self._client().log_artifact(self._run(operation["run"]), operation["path"], operation["folder"])

    def _apply_dataset(self, operation: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        client, run = self._client(), self._run(operation["run"])
        name, digest = operation["name"], operation["digest"]
        source = json.dumps({"sha256": digest})
        dataset = Dataset(name=name[:500], digest=digest[:DIGEST_CHARS], source_type="restoray", source=source)
        client.log_inputs(run, [DatasetInput(dataset, [InputTag("mlflow.data.context", operation["context"])])])
        client.set_tag(run, f"restoray.dataset.{_NAME.sub('_', name)}"[:250], digest)

    def _apply_tags(self, operation: Mapping[str, Any]) -> None:
        client, run = self._client(), self._run(operation["run"])
        for key, value in operation["tags"].items():
            client.set_tag(run, _NAME.sub("_", key)[:250], value)

    def _apply_finish(self, operation: Mapping[str, Any]) -> None:
        run, end_ms = self._run(operation["run"]), int(operation["time"] * 1000)
        self._client().set_terminated(run, status=operation["status"], end_time=end_ms)

    def _apply_sweep(self, operation: Mapping[str, Any]) -> list[str]:
        client, parent = self._client(), self._run(operation["parent"])
        running = self._search(f"tags.`mlflow.parentRunId` = '{parent}' and attributes.status = 'RUNNING'")
        stale = [str(run.info.run_id) for run in running if run.info.run_id not in self._own_runs]
        for run in stale:
            client.set_tag(run, "restoray.swept", "the process ended without finishing this run")
            client.set_terminated(run, status="KILLED")
        return stale

    def _apply_model(self, operation: Mapping[str, Any]) -> int:
        client, run = self._client(), self._run(operation["run"])
        folder, name = Path(operation["folder"]), operation["name"]
        document = (folder / "model.json").read_bytes()
        digest = hashlib.sha256(document).hexdigest()
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        for version in client.search_model_versions(f"name = '{name}'"):
            if version.tags.get("restoray.digest") == digest:
                client.set_registered_model_alias(name, ALIAS, version.version)
                return int(version.version)
        model = client.create_logged_model(
            self._experiment_id, name=name, source_run_id=run, tags={"restoray.digest": digest}, model_type="restoray"
        )
        size_mib = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
        fits = size_mib <= COPY_LIMIT_MIB
        if fits:
            client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")
        for key, value in flatten(json.loads(document).get("metrics") or {}).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                client.log_metric(run, _NAME.sub("_", key)[:250], float(value), step=0, model_id=model.model_id)
        # The registry looks up a models:/ source in the global store, not in ours: a local source is therefore a path.
        source = folder.as_uri()
        if fits:
            source = model.artifact_location if self.database is not None else f"models:/{model.model_id}"
        tags = {"restoray.digest": digest, "restoray.model_id": model.model_id}
        new_version = client.create_model_version(name, source=source, run_id=run, tags=tags)
        client.set_registered_model_alias(name, ALIAS, new_version.version)
        return int(new_version.version)

    def _apply_alias(self, operation: Mapping[str, Any]) -> None:
        self._client().set_registered_model_alias(operation["name"], operation["alias"], operation["version"])

    def _resolve(self, name: str, alias: str | None, number: str | None) -> Path:
        client = self._client()
        models = {model.name: model for model in client.search_registered_models(max_results=1000)}
        if name not in models:
            raise unknown("model", name, models)
        versions = {str(version.version): version for version in client.search_model_versions(f"name = '{name}'")}
        aliases = dict(models[name].aliases)
        if number is not None:
            if number not in versions:
                raise unknown(f"version of {name}", number, versions)
        elif alias in (None, "latest"):
            if not versions:
                raise UsageError(f"model {name!r} has no version")
            number = max(versions, key=int)
        elif alias in aliases:
            number = str(aliases[alias])
        else:
            raise unknown(f"alias of {name}", str(alias), {*aliases, "latest"})
        version = versions[str(number)]
        folder = self._local_folder(str(version.source))
        document = folder / "model.json"
        if not document.is_file():
            raise Failure(f"version {number} of {name!r} is registered, but its model folder does not exist")
        expected = version.tags.get("restoray.digest")
        if expected and hashlib.sha256(document.read_bytes()).hexdigest() != expected:
            raise Failure(
                f"version {number} of {name!r} was changed after its registration: model.json has another sha256"
            )
        return folder

    def _local_folder(self, source: str) -> Path:
        address = urlsplit(source)
        if address.scheme in ("", "file"):
            folder = Path(unquote(address.path))
            if not folder.is_dir() and ARTIFACTS in folder.parts:  # the output folder has moved
                folder = self.out_dir / Path(*folder.parts[folder.parts.index(ARTIFACTS) :])
            return folder
        from mlflow.artifacts import download_artifacts

        return Path(download_artifacts(artifact_uri=source, tracking_uri=self.uri, registry_uri=self.uri))
