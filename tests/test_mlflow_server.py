"""Tracking through a real `mlflow server` on loopback, which is killed and started again in mid-run."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import requests
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from mlflow.tracking import MlflowClient
from torch.utils.data import DataLoader, TensorDataset

from zimage_lit.tracking import ResilientMLFlowLogger, send_spool, ui_command, ui_url


class Server:
    """A process that answers at /health of a free port of this machine, and everything it started."""

    def __init__(self, command: list[str] | str, port: int) -> None:
        self.command, self.port, self.url = command, port, f"http://127.0.0.1:{port}"

    def start(self) -> None:
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            self.command,
            shell=isinstance(self.command, str),
            env=environment,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(600):
            assert self.process.poll() is None, f"{self.command} ended with {self.process.returncode}"
            try:
                if requests.get(f"{self.url}/health", timeout=1).text == "OK":
                    return
            except requests.RequestException:
                time.sleep(0.1)
        raise AssertionError(f"{self.command} does not answer")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh database, made once, for MLflow takes seconds to set one up."""
    database = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{database}")
    return database


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Server]:
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    shutil.copy(empty_store, folder)
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "--workers", "1"]
    running = Server([*command, "--port", str(port)], port)
    running.start()
    yield running
    running.kill()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zimage_lit.tracking.SEND_EVERY", 0.1)
    # a killed server refuses at once, a busy one may be slow
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")


class Line(pl.LightningModule):
    """Fits a line, and logs its loss and a picture."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(1, width)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        loss = (self.layer(batch[0]) - 1).square().mean()
        self.log("train/loss", loss)
        assert isinstance(self.logger, ResilientMLFlowLogger)
        self.logger.log_image("samples/line", np.full((16, 16, 3), index, np.uint8), self.global_step)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def steps(client: MlflowClient, run_id: str | None, key: str) -> list[int]:
    return [metric.step for metric in client.get_metric_history(str(run_id), key)]


def test_a_training_is_tracked_through_the_server(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.chdir(tmp_path)
    logger = ResilientMLFlowLogger("trainer", "run")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=logger,
        callbacks=[ModelCheckpoint()],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Line(), DataLoader(TensorDataset(torch.ones(8, 1))))
    client = MlflowClient(server.url)
    run = client.get_run(str(logger.run_id))
    assert run.info.status == "FINISHED" and run.data.params["width"] == "4"
    assert steps(client, logger.run_id, "train/loss") == list(range(8))
    assert len(client.list_artifacts(run.info.run_id, "images")) == 16, "eight pictures, each with its small copy"
    assert len(client.search_runs([run.info.experiment_id, "0"])) == 1, "no stray runs"
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "nothing beside the output folder"
    assert list((tmp_path / "run").rglob("*.ckpt"))
    address = f"{server.url}/#/experiments/{run.info.experiment_id}/runs?compareRunsMode=CHART"
    assert ui_command(logger) == address
    assert f"Compare runs at {address}" in capsys.readouterr().out


def test_a_server_that_goes_away_delays_but_loses_nothing(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    patient = ResilientMLFlowLogger("lost", str(tmp_path / "patient"), tracking_uri=server.url)
    ending = ResilientMLFlowLogger("lost", str(tmp_path / "ending"), tracking_uri=server.url, wait_at_end=0.5)
    for step in range(60):
        for logger in (patient, ending):
            logger.log_metrics({"loss": 1 / (step + 1), "rate": step}, step)
            if step % 20 == 0:
                logger.log_image("samples/a", np.full((8, 8, 3), step, np.uint8), step)
        if step == 20:
            time.sleep(0.3)  # so that some have arrived
            server.kill()
    ending.finalize("success")
    said = capsys.readouterr().out
    unsent = re.search(
        rf"MLflow at {server.url} has not received (\d+) metric values, (\d+) images, 1 other records", said
    )
    assert unsent and int(unsent[1]) >= 78 and int(unsent[2]) >= 1
    command = next(line for line in said.splitlines() if "-m zimage_lit.tracking" in line)
    assert shlex.split(command)[-1] == str(tmp_path / "ending")

    resumed = ResilientMLFlowLogger("lost", str(tmp_path / "ending"), tracking_uri=server.url, wait_at_end=0.5)
    resumed.log_metrics({"loss": 0.0}, 60)  # a resumed run goes on although the server is still away
    assert resumed.run_id == ending.run_id
    assert "Training goes on" in caplog.text

    server.start()
    patient.finalize("success")
    send_spool(tmp_path / "ending")
    client = MlflowClient(server.url)
    for logger, last in ((patient, 60), (ending, 61)):
        run_id = str(logger.run_id)
        assert steps(client, run_id, "loss") == list(range(last))
        assert [metric.value for metric in client.get_metric_history(run_id, "rate")] == list(range(60))
        assert len(client.list_artifacts(run_id, "images")) == 6, "three pictures, each with its small copy"
    assert client.get_run(str(patient.run_id)).info.status == "FINISHED"
    assert "answers again" in caplog.text


def test_the_printed_command_opens_the_comparison(tmp_path: Path, empty_store: Path) -> None:
    (tmp_path / "out puts").mkdir()
    shutil.copy(empty_store, tmp_path / "out puts")
    logger = ResilientMLFlowLogger("local", str(tmp_path / "out puts" / "run"))
    logger.log_image("samples/a", np.zeros((8, 8, 3), np.uint8), 0)
    logger.finalize()
    port = free_port()
    interface = Server(ui_command(logger, port), port)
    interface.start()
    try:
        page = requests.get(ui_url(logger, port), timeout=10)
        assert page.ok and "<title>MLflow</title>" in page.text
        pictures = {"run_id": str(logger.run_id), "path": "images"}
        files = requests.get(f"{interface.url}/ajax-api/2.0/mlflow/artifacts/list", pictures, timeout=10).json()[
            "files"
        ]
        assert len(files) == 2
        picture = {"run_uuid": str(logger.run_id), "path": files[1]["path"]}
        assert requests.get(f"{interface.url}/get-artifact", picture, timeout=10).content.startswith(b"\x89PNG")
    finally:
        interface.kill()
