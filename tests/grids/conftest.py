"""A study of tiny cells that is run once, and a real S3 server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from grid_cells import TASK, CopiedCells, grid_of
from moto.server import ThreadedMotoServer

import icl_dual as icl
from icl_dual.grids import Results, worker
from icl_dual.models import tiny_model

_ACCOUNT = {"key": "test", "secret": "test"}


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of the cells of `grid_of`, which `run_study` ran."""
    folder = tmp_path_factory.mktemp("study")
    cells = [cell.cell for cell in grid_of().cells()]
    icl.run_study(cells, folder, tasks=[TASK], models=[tiny_model()], progress=False)
    return folder


@pytest.fixture
def copied(study: Path, monkeypatch: pytest.MonkeyPatch) -> type[CopiedCells]:
    """Let workers take the cells of the study instead of computing them."""
    kind = type("Copied", (CopiedCells,), {"study": study, "runs": []})
    monkeypatch.setattr(worker, "CellRunner", kind)
    return kind


@pytest.fixture(scope="session")
def s3_server() -> Iterator[dict[str, Any]]:
    """The options of fsspec for an S3 server with the bucket `grid`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    names = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=url, **names).create_bucket(Bucket="grid")
    yield {"endpoint_url": url, **_ACCOUNT}
    server.stop()


@pytest.fixture
def local_results(tmp_path: Path) -> Results:
    """Empty results in a local folder, for what does not depend on the storage."""
    return Results(tmp_path / "results")


@pytest.fixture(params=["local", "s3"])
def results(request: pytest.FixtureRequest, tmp_path: Path) -> Results:
    """Empty results in a local folder, and on a real S3 server."""
    if request.param == "local":
        return Results(tmp_path / "results")
    options = request.getfixturevalue("s3_server")
    return Results(f"s3://grid/{tmp_path.name}", options)
