"""MLflow tracking that a lost server cannot stop.

Everything a run logs is first appended to a spool on disk (`<output_dir>/mlflow_spool/<run id>/`), then sent by a
background thread, oldest first. So training never waits for a server, a killed process loses nothing it had logged, and
what could not be sent is sent when the run is resumed or by `python -m zimage_lit.tracking OUTPUT_DIR`.
"""

import atexit
import json
import logging
import math
import os
import re
import shlex
import sys
import threading
import time
import uuid
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import requests
from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags
from PIL import Image

from zimage_lit.errors import UserError
from zimage_lit.files import locked, read_json, write_atomically
from zimage_lit.grids import encoded
from zimage_lit.spool import Spool, deliver, first_line

log = logging.getLogger(__name__)

RUN_FILE = "mlflow_run.json"
PARENT = "mlflow.parentRunId"  # the tag of a run that is part of another
TAGS_VARIABLE = "ZIMAGE_LIT_RUN_TAGS"  # environment: tags, as JSON, of all runs of a process
SPOOL_FOLDER = "mlflow_spool"
SEND_EVERY = 1.0  # seconds; what is logged in between travels in one request
LONGEST_PARAM = 500  # older servers take no more; the config artifact holds the whole value
LONGEST_DIGEST = 36  # MLflow's limit
THUMBNAIL = 256  # pixels of the longer side of the copy that the UI shows
STATUS = {"success": "FINISHED", "finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}


class ResilientMLFlowLogger(MLFlowLogger):
    """Lightning's MLflow logger, with a spool between the training and the server.

    Args:
        experiment_name: MLflow experiment; runs of one experiment are compared on one page.
        run_name: name shown in the UI; None lets MLflow invent one.
        output_dir: folder of the run; holds the spool and `mlflow_run.json`, which a resumed run continues.
        tracking_uri: MLflow store; None means the environment variable MLFLOW_TRACKING_URI, else the file `mlflow.db`
            in the nearest folder above `output_dir` called `outputs`, else in the folder above it.
        tags: further tags of the run, such as PARENT; those of the environment (TAGS_VARIABLE) join them.
        resume: False starts a new MLflow run even where `mlflow_run.json` exists.
        wait_at_end: seconds that the end of a run waits for a server that does not answer.

    Raises:
        UserError: a store that cannot be opened or, for a run that is not resumed, a server that does not answer.
    """

    def __init__(
        self,
        experiment_name: str,
        output_dir: str,
        run_name: str | None = None,
        tracking_uri: str | None = None,
        tags: dict[str, str] | None = None,
        resume: bool = True,
        wait_at_end: float = 30.0,
    ) -> None:
        self.output_dir = Path(output_dir).resolve()
        self.wait_at_end = wait_at_end
        uri, artifacts = resolve_store(tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"), self.output_dir)
        run_file = self.output_dir / RUN_FILE
        way_out = "delete it, and the run begins anew in MLflow"
        self._known_run: dict[str, str] = read_json(run_file, way_out) if resume and run_file.exists() else {}
        self._logged: dict[tuple[str, int], Any] = {}
        self._hurry = threading.Event()
        self._answers = True
        self._said_at = -1  # end of the spool when the person was told that something has not arrived
        rank_zero = getattr(rank_zero_only, "rank", 0) == 0
        if rank_zero and is_server(uri):
            shorten_retries()
            if not self._known_run:
                check_server(uri)
        # the other ranks never talk to the store; if they opened an SQLite file as well, all would race to set it up
        client_uri = uri if rank_zero else "http://127.0.0.1"
        try:
            with sole_opening(client_uri):
                own_tags = {**json.loads(os.environ.get(TAGS_VARIABLE, "{}")), **(tags or {})}
                super().__init__(experiment_name, run_name, client_uri, own_tags, artifact_location=artifacts)
        except Exception as error:
            raise UserError(f"The MLflow store {shown(uri)} cannot be opened: {first_line(error)}") from error
        self._tracking_uri = uri
        self._announced = PARENT in (self.tags or {})  # how runs compare is for the whole to say

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        """The plain MLflow client; what is logged through it directly waits for the server and is not spooled."""
        if not self._initialized:
            self._open_run()
            self._initialized = True
        return self._mlflow_client

    def _open_run(self) -> None:
        resumed_run = self._resumed_run()
        self._known_run = run = resumed_run or self._created_run()
        self._run_id, self._experiment_id = run["run_id"], run["experiment_id"]
        note = {**run, "tracking_uri": shown(self._tracking_uri)}
        write_atomically(self.output_dir / RUN_FILE, json.dumps(note))
        self._spool = Spool(self.output_dir / SPOOL_FOLDER / self._run_id)
        for record, _ in self._spool.read():
            if record["kind"] == "metrics":
                self._logged.update({(key, record["step"]): value for key, value in record["values"].items()})
            elif record["kind"] == "image":
                self._logged[f"image {record['key']}", record["step"]] = record["name"]
        if resumed_run:
            self._spool.append({"kind": "status", "status": "RUNNING", "time": now()})
        threading.Thread(target=self._send_forever, name="mlflow-sender", daemon=True).start()
        atexit.register(self.flush)

    def _resumed_run(self) -> dict[str, str] | None:
        """The run that `mlflow_run.json` names, None where there is none or the store has it no more."""
        if not self._known_run:
            return None
        try:
            stage = self._mlflow_client.get_run(self._known_run["run_id"]).info.lifecycle_stage
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                if self._known_run["tracking_uri"] != shown(self._tracking_uri):
                    raise UserError(no_answer(self._tracking_uri)) from error
                log.warning("%s Training goes on: what it logs is kept and sent later.", no_answer(self._tracking_uri))
                return self._known_run
            stage = "deleted"
        if stage == "deleted":
            log.warning("%s does not hold the run of %s: a new one begins.", shown(self._tracking_uri), self.output_dir)
            return None
        return self._known_run

    def _created_run(self) -> dict[str, str]:
        client, name = self._mlflow_client, self._experiment_name
        try:
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                experiment_id = client.create_experiment(name, artifact_location=self._artifact_location)
            else:
                experiment_id = experiment.experiment_id
            run = client.create_run(experiment_id, tags=resolve_tags(self.tags), run_name=self._run_name)
        except MlflowException as error:
            raise UserError(f"MLflow at {shown(self._tracking_uri)} cannot begin a run: {first_line(error)}") from error
        return {"run_id": run.info.run_id, "experiment_id": experiment_id}

    def _send_forever(self) -> None:
        while True:
            self._hurry.wait(SEND_EVERY)
            self._hurry.clear()
            try:
                deliver(self._mlflow_client, self._known_run["run_id"], self._spool)
            except Exception as error:  # of whatever kind: nothing here may end the training, and the spool holds all
                if self._answers:
                    log.warning("MLflow does not answer; what is logged is kept and sent later: %s", first_line(error))
                self._answers = False
                time.sleep(SEND_EVERY)
                continue
            if not self._answers:
                log.warning("MLflow answers again and has everything.")
            self._answers = True

    def _keep(self, record: dict[str, Any], files: Mapping[str, bytes] | None = None) -> None:
        _ = self.experiment
        self._spool.append(record, files)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log numbers at a step; what a resumed run computes again with the same result is not logged twice."""
        _ = self.experiment
        step = step or 0
        values = {allowed(key): float(value) for key, value in metrics.items()}
        values = {key: value for key, value in values.items() if self._logged.get((key, step)) != value}
        if values:
            self._keep({"kind": "metrics", "time": now(), "step": step, "values": values})

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log parameters, nested names joined by `/`, values cut to 500 characters."""
        flat = _flatten_dict(_convert_params(params))
        values = {allowed(key): str(value)[:LONGEST_PARAM] for key, value in flat.items()}
        self._keep({"kind": "params", "values": values})

    @rank_zero_only
    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._keep({"kind": "tags", "values": {allowed(key): str(value) for key, value in tags.items()}})

    @rank_zero_only
    def log_image(self, key: str, image: Image.Image | np.ndarray, step: int) -> None:
        """Log an RGB picture (PIL, or uint8 (H, W, 3)) as one step of the series `key`.

        The UI finds the steps of a series by file name, and shows the WebP copy. A picture that a resumed run draws
        again takes the place of the first.
        """
        _ = self.experiment
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        key = allowed(key)
        first = f"{key.replace('/', '~')}+step+{step}+timestamp+{now()}+{uuid.uuid4()}"
        name = self._logged.setdefault((f"image {key}", step), first)
        files = {f"images/{name}.png": encoded(picture, "PNG"), f"images/{name}+compressed.webp": small_copy(picture)}
        self._keep({"kind": "image", "key": key, "step": step, "name": name}, files)

    @rank_zero_only
    def log_text(self, text: str, artifact_path: str) -> None:
        """Log a text file, such as the resolved configuration, at a path among the run's artifacts."""
        self._keep({"kind": "text"}, {artifact_path: text.encode()})

    @rank_zero_only
    def log_table(self, columns: Mapping[str, Sequence[Any]], artifact_path: str) -> None:
        """Log a table that the UI compares across runs row by row; cells are numbers, texts or PIL images.

        Raises:
            ValueError: an artifact path that does not end in .json, or columns of different length.
        """
        if not artifact_path.endswith(".json"):
            raise ValueError(f"The table {artifact_path} needs a name that ends in .json.")
        files: dict[str, bytes] = {}
        rows = [[table_cell(cell, artifact_path, files) for cell in row] for row in zip(*columns.values(), strict=True)]
        files[artifact_path] = json.dumps({"columns": list(columns), "data": rows}).encode()
        self._keep({"kind": "table", "path": artifact_path}, files)

    @rank_zero_only
    def log_dataset(self, name: str, fingerprint: str, source: str, context: str = "training") -> None:
        """Log a data set as an input of the run; the whole fingerprint is the tag `dataset/<name>`."""
        digest = fingerprint[:LONGEST_DIGEST]
        self._keep({"kind": "dataset", "name": name, "digest": digest, "source": source, "context": context})
        self.log_tags({f"dataset/{name}": fingerprint})

    @rank_zero_only
    def flush(self) -> None:
        """Wait until everything has arrived; what a server silent for `wait_at_end` seconds did not take is said."""
        if not self._initialized:
            return
        began = time.monotonic()
        while self._spool.sent < self._spool.end and self._said_at < self._spool.end:
            if not self._answers and time.monotonic() > began + self.wait_at_end:
                break
            self._hurry.set()
            time.sleep(0.02)
        if self._spool.sent < self._spool.end and self._said_at < self._spool.end:
            self._said_at = self._spool.end
            print(
                f"MLflow at {shown(self._tracking_uri)} has not received {self._spool.unsent()}: they are kept in "
                f"{self._spool.folder} and sent when the run is resumed, or by\n"
                f"  {python()} -m zimage_lit.tracking {shlex.quote(str(self.output_dir))}"
            )

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Set the status of the MLflow run, wait for the last records and print how the runs are compared."""
        if not self._initialized:
            return
        self._keep({"kind": "status", "status": STATUS.get(status, "FINISHED"), "time": now()})
        self.flush()
        if self._spool.lost:
            print(f"{self._spool.lost} records could not be written to {self._spool.folder} and are lost to MLflow.")
        if self._spool.refused:
            print(f"MLflow refused {self._spool.refused} records: see {self._spool.folder / 'refused.jsonl'}.")
        if not self._announced:
            self._announced = True
            command, url = ui_command(self), ui_url(self)
            print(f"Compare runs at {url}" if command == url else f"Compare runs by\n  {command}\nat {url}")

    @property
    def tracking_uri(self) -> str:
        """The absolute address of the store."""
        return self._tracking_uri

    @property
    def save_dir(self) -> str:
        """Where Lightning puts what belongs to the run."""
        return str(self.output_dir)


def ui_url(logger: ResilientMLFlowLogger, port: int = 5000) -> str:
    """The page that shows the runs of the logger's experiment side by side, sample images included."""
    server = shown(logger._tracking_uri).rstrip("/") if is_server(logger._tracking_uri) else f"http://127.0.0.1:{port}"
    return f"{server}/#/experiments/{logger.experiment_id}/runs?compareRunsMode=CHART"


def ui_command(logger: ResilientMLFlowLogger, port: int = 5000) -> str:
    """The shell command that serves `ui_url` from a local store; for a server, which runs already, just the address."""
    if is_server(logger._tracking_uri):
        return ui_url(logger)
    # background jobs and further workers serve MLflow's features for language models, and triple the time to start
    return (
        f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {python()} -m mlflow ui "
        f"--backend-store-uri {shlex.quote(logger._tracking_uri)} --workers 1 --port {port}"
    )


def send_spool(output_dir: str | Path, tracking_uri: str | None = None) -> int:
    """Send what a run could not; returns the number of records, 0 where all had arrived.

    Args:
        output_dir: folder of the run.
        tracking_uri: the store, where it is not (or no more) the one that the run began with.

    Raises:
        UserError: no tracked run in the folder, or a server that does not answer.
    """
    run_file = Path(output_dir) / RUN_FILE
    if not run_file.exists():
        raise UserError(f"{run_file} does not exist: name the output folder of a tracked run.")
    run = read_json(run_file, "without it nobody knows which MLflow run the records belong to")
    uri = tracking_uri or run["tracking_uri"]
    spool = Spool(run_file.parent / SPOOL_FOLDER / run["run_id"])
    records = sum(1 for _ in spool.read(spool.sent))
    if is_server(uri):
        shorten_retries()
        check_server(uri)
    try:
        deliver(MlflowClient(uri), run["run_id"], spool)
    except (MlflowException, requests.RequestException) as error:
        raise UserError(f"MLflow at {shown(uri)} did not take everything: {first_line(error)}") from error
    return records


@contextmanager
def sole_opening(uri: str) -> Iterator[None]:
    """One process at a time where the store is an SQLite file: two that begin together would both make its tables."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    with locked(Path(uri.removeprefix("sqlite:///") + ".lock"), "name another store"):
        yield


def resolve_store(uri: str | None, output_dir: Path) -> tuple[str, str | None]:
    """The absolute address of the store, and where new experiments keep artifacts (None: the server decides)."""
    if uri and is_server(uri):
        return uri, None
    root = next((parent for parent in output_dir.parents if parent.name == "outputs"), output_dir.parent)
    scheme = "sqlite:///"
    if uri and not uri.startswith(scheme):
        return uri, str(root / "mlartifacts")
    database = Path(uri.removeprefix(scheme)).resolve() if uri else root / "mlflow.db"
    database.parent.mkdir(parents=True, exist_ok=True)
    return scheme + database.as_posix(), str(database.parent / "mlartifacts")


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def shown(uri: str) -> str:
    """The address without user and password, fit for screens and files."""
    return re.sub(r"//[^/@]*@", "//", uri)


def no_answer(uri: str) -> str:
    return (
        f"No MLflow server answers at {shown(uri)}: start it or correct the address "
        "(key tracking_uri, environment variable MLFLOW_TRACKING_URI)."
    )


def check_server(uri: str) -> None:
    """Raise UserError where nothing answers at the address within five seconds."""
    try:
        answers = requests.get(f"{uri.rstrip('/')}/health", timeout=5).status_code < 500
    except requests.exceptions.SSLError:
        answers = True  # it speaks; MLflow's own settings decide whom to trust
    except requests.RequestException:
        answers = False
    if not answers:
        raise UserError(no_answer(uri))


def shorten_retries() -> None:
    """MLflow would try a dead server for four minutes before the sender noticed; only the environment changes that."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


def allowed(name: str) -> str:
    """The name with what MLflow refuses replaced by an underscore."""
    return re.sub(r"[^\w/. -]", "_", name, flags=re.ASCII)


def small_copy(picture: Image.Image) -> bytes:
    """What the UI shows in place of the picture: WebP of THUMBNAIL pixels, to which smaller pictures are enlarged."""
    size = [max(1, round(side * THUMBNAIL / max(picture.size))) for side in picture.size]
    return encoded(picture.resize((size[0], size[1])), "WEBP")


def table_cell(cell: Any, artifact_path: str, files: dict[str, bytes]) -> Any:
    """The JSON of one cell; the content of a picture is added to `files`."""
    if isinstance(cell, Image.Image):
        stem = f"table_images/{artifact_path.removesuffix('.json')}/{uuid.uuid4()}"
        files |= {f"{stem}.png": encoded(cell, "PNG"), f"{stem}.webp": small_copy(cell)}
        return {"type": "image", "filepath": f"{stem}.png", "compressed_filepath": f"{stem}.webp"}
    if isinstance(cell, np.generic):
        cell = cell.item()
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell  # JSON knows no NaN


def now() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)


def python() -> str:
    """This Python, as a shell must call it."""
    return shlex.quote(sys.executable)


def main() -> int:
    if len(sys.argv) != 2:
        print("Usage: python -m zimage_lit.tracking OUTPUT_DIR", file=sys.stderr)
        return 2
    try:
        print(f"{send_spool(sys.argv[1])} records sent.")
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
