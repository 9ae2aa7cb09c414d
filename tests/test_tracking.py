"""Tracking in a local SQLite store, read back through MLflow's own client."""

import json
import math
import multiprocessing
import os
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.utilities import rank_zero_only
from lock_holder import held_by_another
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from PIL import Image

from zimage_lit.errors import UserError
from zimage_lit.spool import Spool, deliver
from zimage_lit.tracking import ResilientMLFlowLogger, main, resolve_store, send_spool


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def make(store: str, tmp_path: Path) -> Callable[..., ResilientMLFlowLogger]:
    def make_logger(**kwargs: object) -> ResilientMLFlowLogger:
        return ResilientMLFlowLogger(tmp_path.name, str(tmp_path / "run"), tracking_uri=store, **kwargs)  # type: ignore[arg-type]

    return make_logger


def history(client: MlflowClient, run_id: str | None, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(str(run_id), key)]


def image_names(client: MlflowClient, run_id: str | None) -> list[str]:
    return sorted(Path(file.path).name for file in client.list_artifacts(str(run_id), "images"))


def test_runs_that_begin_together_open_the_store_one_after_the_other(tmp_path: Path) -> None:
    arguments = ("x", str(tmp_path / "run"))
    opening = threading.Thread(
        target=ResilientMLFlowLogger, args=arguments, kwargs={"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}
    )
    with held_by_another(tmp_path / "mlflow.db.lock"):
        opening.start()
        opening.join(0.5)
        assert opening.is_alive() and not (tmp_path / "mlflow.db").exists()
    opening.join(60)
    assert not opening.is_alive() and (tmp_path / "mlflow.db").exists()


def test_all_that_is_logged_arrives(make: Callable[..., ResilientMLFlowLogger], tmp_path: Path) -> None:
    logger = make(run_name="first", tags={"team": "vision"})
    red = np.full((300, 512, 3), (255, 0, 0), np.uint8)
    logger.log_hyperparams({"model": {"width": 64, "layers": [1, 2]}, "prompt": "x" * 900})
    for step in range(3):
        logger.log_metrics({"train/loss": 1.0 / (step + 1), "train/bad?name": np.float32(step)}, step)
    logger.log_metrics({"nan": math.nan, "inf": math.inf}, 7)
    logger.log_image("samples/prompt 0", red, 0)
    logger.log_text("lr: 1\n", "config/config.yaml")
    table: dict[str, list[Any]] = {
        "prompt": ["a cat", "一只猫"],
        "score": [0.5, np.float32("nan")],
        "image": [Image.fromarray(red)] * 2,
    }
    logger.log_table(table, "eval/scores.json")
    logger.log_tags({"git.commit": "abc"})
    logger.log_dataset("tinyworld", "f" * 64, "data/tinyworld")
    logger.finalize("success")

    client, run_id = logger.experiment, str(logger.run_id)
    run = client.get_run(run_id)
    assert (run.info.status, run.info.run_name, run.data.tags["team"]) == ("FINISHED", "first", "vision")
    assert run.data.params == {"model/width": "64", "model/layers": "[1, 2]", "prompt": "x" * 500}
    assert history(client, run_id, "train/loss") == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert history(client, run_id, "train/bad_name") == [(0, 0.0), (1, 1.0), (2, 2.0)]
    assert math.isnan(run.data.metrics["nan"]) and run.data.metrics["inf"] > 1e308
    assert run.data.tags["git.commit"] == "abc" and run.data.tags["dataset/tinyworld"] == "f" * 64
    dataset = run.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest) == ("tinyworld", "f" * 36)

    png, webp = image_names(client, run_id)[1], image_names(client, run_id)[0]
    folder = Path(client.download_artifacts(run_id, "images", str(tmp_path)))
    assert np.array_equal(np.asarray(Image.open(folder / png)), red)
    assert Image.open(folder / webp).size == (256, 150)
    assert Path(client.download_artifacts(run_id, "config/config.yaml", str(tmp_path))).read_text() == "lr: 1\n"
    stored = json.loads(Path(client.download_artifacts(run_id, "eval/scores.json", str(tmp_path))).read_text())
    assert stored["columns"] == ["prompt", "score", "image"]
    assert [row[:2] for row in stored["data"]] == [["a cat", 0.5], ["一只猫", None]]
    picture = stored["data"][1][2]
    whole, small = (
        Image.open(client.download_artifacts(run_id, picture[key], str(tmp_path)))
        for key in ("filepath", "compressed_filepath")
    )
    assert np.array_equal(np.asarray(whole), red) and small.size == (256, 150)
    assert not any((tmp_path / "run" / "mlflow_spool" / run_id / "files").iterdir()), "sent files are not kept twice"


def test_images_and_tables_are_stored_as_mlflow_itself_stores_them(make: Callable[..., ResilientMLFlowLogger]) -> None:
    ours, theirs = make(), make(resume=False)
    picture = np.zeros((8, 8, 3), np.uint8)
    columns: dict[str, list[Any]] = {"prompt": ["a", "b"], "score": [1, 2]}
    ours.log_image("samples/a", picture, 3)
    ours.log_table(columns, "eval/t.json")
    ours.finalize()
    theirs.experiment.log_image(theirs.run_id, picture, key="samples/a", step=3)
    theirs.experiment.log_table(theirs.run_id, columns, "eval/t.json")

    def stored(logger: ResilientMLFlowLogger) -> tuple[list[str], dict[str, str], object]:
        client, run_id = logger.experiment, str(logger.run_id)
        names = [re.sub(r"timestamp\+\d{13}\+[0-9a-f-]{36}", "…", name) for name in image_names(client, run_id)]
        tags = {key: value for key, value in client.get_run(run_id).data.tags.items() if "logged" in key}
        path = client.download_artifacts(run_id, "eval/t.json")
        return names, tags, json.loads(Path(path).read_text())

    assert ours.run_id != theirs.run_id
    assert stored(ours) == stored(theirs)


def test_a_resumed_run_continues_the_same_run(make: Callable[..., ResilientMLFlowLogger]) -> None:
    first = make()
    first.log_hyperparams({"lr": 0.1, "width": 8})
    for step in range(4):
        first.log_metrics({"loss": float(step)}, step)
    first.log_image("sample", np.zeros((8, 8, 3), np.uint8), 2)
    first.finalize("failed")

    second = make()
    assert second.run_id == first.run_id
    assert second.version == first.run_id and second.name == first.experiment_id
    second.log_hyperparams({"lr": 0.2, "width": 8, "new": 1})
    second.log_metrics({"loss": 2.0}, 2)  # trained again from the checkpoint of step 2, with the same result …
    second.log_metrics({"loss": 3.5}, 3)  # … and with another
    second.log_metrics({"loss": 4.0}, 4)
    second.log_image("sample", np.full((8, 8, 3), 9, np.uint8), 2)
    second.flush()
    run = second.experiment.get_run(second.run_id)
    assert run.info.status == "RUNNING"
    second.finalize()
    run = second.experiment.get_run(second.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1", "width": "8", "new": "1"} and run.data.tags["changed/lr"] == "0.2"
    assert sorted(history(second.experiment, second.run_id, "loss")) == [
        (0, 0),
        (1, 1),
        (2, 2),
        (3, 3),
        (3, 3.5),
        (4, 4),
    ]
    assert len(image_names(second.experiment, second.run_id)) == 2, "one picture and its small copy"
    assert make(resume=False).run_id != first.run_id


def test_a_run_that_the_store_lost_begins_anew(
    make: Callable[..., ResilientMLFlowLogger], caplog: pytest.LogCaptureFixture
) -> None:
    first = make()
    first.experiment.delete_run(first.run_id)
    assert make().run_id != first.run_id
    assert "a new one begins" in caplog.text


def test_sending_twice_leaves_one_copy(make: Callable[..., ResilientMLFlowLogger]) -> None:
    logger = make()
    logger.log_hyperparams({"lr": 1})
    logger.log_metrics({"loss": 1.0, "nan": math.nan}, 0)
    logger.log_text("x", "a/b.txt")
    logger.log_dataset("data", "abc", "here")
    logger.log_metrics({"loss": 1.0}, 1)
    logger.flush()
    sent_again = Spool(logger._spool.folder)
    for record in [
        each for each, _ in sent_again.read() if each["kind"] != "text"
    ]:  # its file is gone with the first sending
        sent_again.append(record)
    deliver(logger.experiment, str(logger.run_id), sent_again)
    assert history(logger.experiment, logger.run_id, "loss") == [(0, 1.0), (1, 1.0)]
    assert len(history(logger.experiment, logger.run_id, "nan")) == 1
    assert len(logger.experiment.get_run(logger.run_id).inputs.dataset_inputs) == 1


def test_two_senders_of_one_spool_take_turns(tmp_path: Path) -> None:
    arrived: list[bytes] = []

    class Store:
        def log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
            time.sleep(0.02)
            arrived.append(Path(path).read_bytes())

        def set_tag(self, *_: object) -> None:
            pass

    spool = Spool(tmp_path)
    for number in b"abcde":
        spool.append({"kind": "image"}, {"images/a.png": bytes([number])})
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda sender: deliver(Store(), "run", sender), [Spool(tmp_path), Spool(tmp_path)]))
    assert b"".join(arrived) == b"abcde"


def test_a_process_forked_while_records_are_sent_does_not_stop_the_sending(tmp_path: Path) -> None:
    spool, child = Spool(tmp_path), 0

    class Store:
        def set_tag(self, *_: object) -> None:
            nonlocal child
            child = child or os.fork()
            if not child:
                time.sleep(20)
                os._exit(0)

    spool.append({"kind": "tags", "values": {"a": "b"}})
    deliver(Store(), "run", spool)
    try:
        sending = threading.Thread(target=deliver, args=(Store(), "run", spool), daemon=True)
        sending.start()
        sending.join(5)
        assert not sending.is_alive()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_what_mlflow_refuses_is_put_aside_and_the_rest_arrives(
    make: Callable[..., ResilientMLFlowLogger], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = make()
    logger.log_tags({"k" * 300: "a name too long for MLflow"})
    logger.log_metrics({"loss": 1.0}, 0)
    logger.log_metrics({"m" * 300: 1.0}, 0)
    logger.log_metrics({"loss": 2.0}, 1)
    logger.finalize()
    assert history(logger.experiment, logger.run_id, "loss") == [(0, 1.0), (1, 2.0)]
    refused = (logger._spool.folder / "refused.jsonl").read_text().splitlines()
    assert len(refused) == 2 and "too long for MLflow" in refused[0] and "m" * 300 in refused[1]
    assert caplog.text.count("refuses a record") == 1
    assert "MLflow refused 2 records" in capsys.readouterr().out


def _log_and_die(folder: Path) -> None:
    spool = Spool(folder)
    for step in range(500):
        spool.append({"kind": "metrics", "time": step, "step": step, "values": {"loss": step}})
    spool.append({"kind": "text"}, {"notes/a.txt": b"hello"})
    os.kill(os.getpid(), signal.SIGKILL)


def test_kill_9_loses_nothing_that_was_logged(make: Callable[..., ResilientMLFlowLogger], tmp_path: Path) -> None:
    logger = make()
    logger.log_tags({"killed": "soon"})
    logger.flush()
    folder = logger._spool.folder
    process = multiprocessing.get_context("fork").Process(target=_log_and_die, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with (folder / "records.jsonl").open("a") as stream:
        stream.write('{"kind": "metrics", "time": 5')  # killed in the middle of a write
    assert send_spool(tmp_path / "run") == 501
    assert history(logger.experiment, logger.run_id, "loss") == [(step, step) for step in range(500)]
    assert Path(logger.experiment.download_artifacts(str(logger.run_id), "notes/a.txt")).read_text() == "hello"
    assert send_spool(tmp_path / "run") == 0
    resumed = make()
    resumed.log_metrics({"loss": 500.0}, 500)
    resumed.finalize()
    assert history(resumed.experiment, logger.run_id, "loss")[-1] == (500, 500)


def test_a_full_disk_does_not_end_the_training_and_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = Spool(tmp_path)
    spool.append({"step": 0})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (spool.end + 5, limits[1]))
    try:
        spool.append({"step": 1})
        spool.append({"step": 2}, {"picture.png": bytes(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    spool.append({"step": 3})
    assert [record["step"] for record, _ in spool.read()] == [0, 3]
    assert spool.lost == 2 and "may be lost" in caplog.text


def test_only_rank_zero_logs(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = ResilientMLFlowLogger(
        "ranks", str(tmp_path / "outputs" / "run"), tracking_uri=f"sqlite:///{tmp_path}/other.db"
    )
    logger.log_metrics({"loss": 1.0}, 0)
    logger.log_hyperparams({"lr": 1})
    logger.finalize()
    assert list(tmp_path.iterdir()) == []


def test_the_default_store_is_shared_by_all_runs_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = tmp_path / "outputs"
    default = f"sqlite:///{outputs}/mlflow.db", f"{outputs}/mlartifacts"
    assert resolve_store(None, outputs / "quickstart") == default
    assert resolve_store(None, outputs / "tiny" / "dpo") == default
    assert resolve_store(None, tmp_path / "elsewhere" / "run")[0] == f"sqlite:///{tmp_path}/elsewhere/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert resolve_store("sqlite:///my.db", outputs / "x") == (f"sqlite:///{tmp_path}/my.db", f"{tmp_path}/mlartifacts")
    assert resolve_store("https://host/mlflow", outputs / "x") == ("https://host/mlflow", None)


def test_a_server_that_does_not_answer_at_the_start_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@{address}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=rf"^No MLflow server answers at http://{address}: start it") as caught:
        ResilientMLFlowLogger("experiment", str(tmp_path))
    assert "secret" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_one_sentence(
    make: Callable[..., ResilientMLFlowLogger],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UserError, match=r"mlflow_run\.json does not exist"):
        send_spool(tmp_path)
    monkeypatch.setattr("sys.argv", ["tracking", str(tmp_path)])
    assert main() == 1
    assert capsys.readouterr().err.startswith(f"{tmp_path}/mlflow_run.json does not exist")
    (tmp_path / "no.db").write_text("this is not a database, whatever its name says")
    with pytest.raises(UserError, match=r"^The MLflow store sqlite:.*no\.db cannot be opened"):
        ResilientMLFlowLogger("experiment", str(tmp_path), tracking_uri=f"sqlite:///{tmp_path}/no.db")
    with pytest.raises(ValueError, match=r"ends in \.json"):
        make().log_table({"a": [1]}, "scores.csv")


def test_a_store_that_is_locked_for_a_while_delays_but_loses_nothing(
    make: Callable[..., ResilientMLFlowLogger], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = make()
    client, send = logger.experiment, logger.experiment.log_batch
    failures = iter([MlflowException("database is locked")] * 2)

    def sometimes(*args: object, **kwargs: object) -> None:
        for failure in failures:
            raise failure
        send(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(client, "log_batch", sometimes)
    monkeypatch.setattr("zimage_lit.tracking.SEND_EVERY", 0.1)
    for step in range(1200):  # more than one request takes
        logger.log_metrics({"loss": float(step), "rate": -float(step)}, step)
    logger.finalize()
    assert history(client, logger.run_id, "loss") == [(step, step) for step in range(1200)]
    assert len(history(client, logger.run_id, "rate")) == 1200
    assert "does not answer" in caplog.text and "answers again" in caplog.text


def test_a_slow_server_is_waited_for(
    make: Callable[..., ResilientMLFlowLogger], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = make(wait_at_end=0.1)
    client, send = logger.experiment, logger.experiment.log_artifact

    def slowly(*args: Any) -> None:
        time.sleep(0.3)
        send(*args)

    monkeypatch.setattr(client, "log_artifact", slowly)
    logger.log_text("a", "a.txt")
    logger.log_text("b", "b.txt")
    logger.finalize()
    assert len(client.list_artifacts(str(logger.run_id))) == 2
    assert "has not received" not in capsys.readouterr().out
