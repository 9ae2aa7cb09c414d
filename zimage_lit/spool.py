"""The spool between a run and its MLflow server: what is logged is first kept on disk, then sent, oldest first.

Sending a record twice leaves one copy: MLflow's stores keep one metric per (key, timestamp, step, value), and files go
to fixed artifact paths. So everything arrives once although a process may die between sending a record and noting it.
"""

import fcntl
import json
import logging
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

METRICS_PER_REQUEST, PARAMS_PER_REQUEST = 1000, 100  # MLflow's limits
TABLES_TAG = "mlflow.loggedArtifacts"

Record = dict[str, Any]


class Spool:
    """An append-only file of JSON records, the files they speak of, and how far the server has received them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records, self._position = folder / "records.jsonl", folder / "sent.json"
        folder.mkdir(parents=True, exist_ok=True)
        self._stream = self._records.open("ab", buffering=0)
        self._lock = threading.Lock()
        content = self._records.read_bytes()
        self.end = content.rfind(b"\n") + 1  # behind it: half a line of a process killed while writing
        self._stream.truncate(self.end)
        self.sent = self._noted()
        self.lost = self.refused = 0

    def append(self, record: Record, files: Mapping[str, bytes] | None = None) -> None:
        """Hand a record, and the content of its artifacts by artifact path, to the operating system.

        A full disk must not end the training: what cannot be written is counted in `lost`, and said.
        """
        with self._lock:
            try:
                for path, content in (files or {}).items():
                    local = self.folder / "files" / uuid.uuid4().hex / Path(path).name
                    local.parent.mkdir(parents=True)
                    local.write_bytes(content)
                    record.setdefault("files", []).append([str(local.relative_to(self.folder)), str(Path(path).parent)])
                line = json.dumps(record).encode() + b"\n"
                if self._stream.write(line) < len(line):
                    raise OSError("the disk is full")
                self.end += len(line)
            except OSError as error:
                self._stream.truncate(self.end)
                self.lost += 1
                if self.lost == 1:
                    log.warning(
                        "What is logged from here on may be lost: %s cannot be written (%s).", self.folder, error
                    )

    def read(self, start: int = 0) -> Iterator[tuple[Record, int]]:
        """(record, byte position behind it) for every record from byte `start` on."""
        with self._records.open("rb") as stream:
            stream.seek(start)
            while stream.tell() < self.end:
                yield json.loads(stream.readline()), stream.tell()

    def batches(self) -> Iterator[tuple[list[Record], int]]:
        """The unsent records in order, neighbouring metrics together, each batch with the byte position behind it."""
        metrics: list[Record] = []
        metrics_end = self.sent
        for record, end in self.read(self.sent):
            if record["kind"] == "metrics":
                metrics.append(record)
                metrics_end = end
            if metrics and (record["kind"] != "metrics" or len(metrics) == METRICS_PER_REQUEST):
                yield metrics, metrics_end
                metrics = []
            if record["kind"] != "metrics":
                yield [record], end
        if metrics:
            yield metrics, metrics_end

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One sender at a time: a resumed run and the command that sends what it left may meet, also in one process,
        whose threads `files.locked` would not keep apart."""
        with (self.folder / "sending.lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            try:
                self.sent = self._noted()
                yield
            finally:
                fcntl.flock(stream, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile has it open, too

    def _noted(self) -> int:
        """The byte position before which everything has arrived, as the folder says."""
        return int(self._position.read_text()) if self._position.exists() else 0

    def mark_sent(self, position: int) -> None:
        """Note, atomically, that everything before byte `position` has arrived."""
        temporary = self._position.with_suffix(".tmp")
        temporary.write_text(str(position))
        temporary.replace(self._position)
        self.sent = position

    def refuse(self, record: Record, error: Exception) -> None:
        """Put aside what the server will never take, so that it does not block all that follows."""
        with (self.folder / "refused.jsonl").open("a") as stream:
            stream.write(json.dumps({**record, "error": str(error)}) + "\n")
        self.refused += 1
        if self.refused == 1:
            log.warning("MLflow refuses a record, now kept in %s: %s", self.folder / "refused.jsonl", first_line(error))

    def unsent(self) -> str:
        """What has not arrived, in words."""
        counts = {"metric values": 0, "images": 0, "other records": 0}
        for record, _ in self.read(self.sent):
            name = {"metrics": "metric values", "image": "images"}.get(record["kind"], "other records")
            counts[name] += len(record["values"]) if record["kind"] == "metrics" else 1
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def deliver(client: MlflowClient, run_id: str, spool: Spool) -> None:
    """Send every unsent record, oldest first; raises what the client raises when the server does not answer."""
    with spool.alone():
        for records, end in spool.batches():
            taken = send_or_refuse(client, run_id, spool, records)
            spool.mark_sent(end)
            for local, _ in records[0].get("files", ()) if taken else ():
                shutil.rmtree((spool.folder / local).parent)


def send_or_refuse(client: MlflowClient, run_id: str, spool: Spool, records: Sequence[Record]) -> bool:
    """Whether the server took all records; those beside a refused one are sent one by one."""
    try:
        send(client, run_id, spool.folder, records)
    except Exception as error:
        if not is_refusal(error):
            raise
        if len(records) == 1:
            spool.refuse(records[0], error)
        else:
            for record in records:
                send_or_refuse(client, run_id, spool, [record])
        return False
    return True


def send(client: MlflowClient, run_id: str, folder: Path, records: Sequence[Record]) -> None:
    """Send records of one kind (several only where they are metrics)."""
    record = records[0]
    for local, artifact_folder in record.get("files", ()):
        client.log_artifact(run_id, str(folder / local), None if artifact_folder == "." else artifact_folder)
    match record["kind"]:
        case "metrics":
            metrics = [Metric(k, v, each["time"], each["step"]) for each in records for k, v in each["values"].items()]
            for start in range(0, len(metrics), METRICS_PER_REQUEST):
                client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_REQUEST])
        case "params":
            send_params(client, run_id, record["values"])
        case "tags":
            for key, value in record["values"].items():
                client.set_tag(run_id, key, value)
        case "image":
            client.set_tag(run_id, "mlflow.loggedImages", True)
        case "table":
            tables = json.loads(client.get_run(run_id).data.tags.get(TABLES_TAG, "[]"))
            entry = {"path": record["path"], "type": "table"}
            if entry not in tables:
                client.set_tag(run_id, TABLES_TAG, json.dumps([*tables, entry]))
        case "dataset":
            dataset = Dataset(record["name"], record["digest"], "local", json.dumps({"uri": record["source"]}))
            client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", record["context"])])])
        case "status" if record["status"] == "RUNNING":
            client.update_run(run_id, status="RUNNING")
        case "status":
            client.set_terminated(run_id, record["status"], record["time"])


def send_params(client: MlflowClient, run_id: str, values: Mapping[str, str]) -> None:
    """MLflow never changes a parameter: a value that differs in a resumed run is kept as the tag `changed/<name>`."""
    known = client.get_run(run_id).data.params
    new = [Param(key, value) for key, value in values.items() if key not in known]
    for start in range(0, len(new), PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=new[start : start + PARAMS_PER_REQUEST])
    for key, value in values.items():
        if known.get(key, value) != value:
            client.set_tag(run_id, f"changed/{key}", value)


def is_refusal(error: Exception) -> bool:
    """True where the answer would be the same for ever; a lost connection, a full disk or a lapsed login may mend."""
    if isinstance(error, MlflowException):
        return error.get_http_status_code() in (400, 409, 413, 422)
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code in (400, 409, 413, 422)
    return isinstance(error, FileNotFoundError)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
