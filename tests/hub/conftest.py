"""Every test here talks to a Hub on 127.0.0.1, with a cache and a token of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_loopback import LoopbackHub
from huggingface_hub import constants
from huggingface_hub.utils import _http
from object_stores import any_bucket, bucket, faulty, store_servers

__all__ = ["any_bucket", "bucket", "faulty", "store_servers"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A fresh Hub, which huggingface_hub in this process takes for the real one."""
    with LoopbackHub() as server:
        home = tmp_path / "hf"
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_TELEMETRY": True,  # the client's own daily request is not ours to count
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("HF_HOME", str(home))
        # Retries wait for seconds: the order of events is what is tested, not the waiting.
        monkeypatch.setattr("time.sleep", server.waited.append)
        _http.close_session()
        yield server
        _http.close_session()


@pytest.fixture
def login(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_loopback")


@pytest.fixture
def cache(hub: LoopbackHub) -> Path:
    return Path(constants.HF_HUB_CACHE)
