"""Runs of encode in processes that can be killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from encode_world import make_tree
from places import HELPERS
from tiny_backbones import tiny_sd

# Imports once and forks for every run, so that a run that dies costs no new start of torch.
SERVER = """
import json, os, signal, sys, threading
import torch, diffusers, transformers
from pathlib import Path
from encode_world import quick
from d3pack.encode import driver, encode
from d3pack.encode.methods.classcond import method
from d3pack.encode.methods.d3m import method
from d3pack.encode.methods.minimax import method
from d3pack.sources import open_source
from d3pack.system import journal
from d3pack.teachers import resnet
import diffusers.models.unets.unet_2d_condition, transformers.models.clip.modeling_clip
import diffusers.models.autoencoders.autoencoder_tiny
torch.set_num_threads(1)
journal.CHECKPOINT_SECONDS, journal._SAVING = 0.0, float("inf")

def work(job):
    seen = []
    def listen(event):
        stage = event.get("stage", "")
        seen.append((event["event"], stage))
        if job.get("kill_at") == [event["event"], stage, seen.count(seen[-1])]:
            os.kill(os.getpid(), signal.SIGKILL)
    if job.get("kill_at") == "written":
        real = driver.write
        def write(pack, output):
            real(pack, output)
            os.kill(os.getpid(), signal.SIGKILL)
        driver.write = write
    if "threads" in job:
        torch.get_num_threads = lambda: job["threads"]
    if "kill_after" in job:
        threading.Timer(job["kill_after"], os.kill, (os.getpid(), signal.SIGKILL)).start()
    out = Path(job["output"])
    source = open_source(job["source"], on_error=job.get("on_error", "skip"))
    encode(source, out, quick(job["backbone"], **job.get("changes", {})), listeners=[listen],
           teachers=out.parent / (out.name + ".teachers"))
    return seen

for line in sys.stdin:
    job = json.loads(line)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            answer = {"seen": work(job)}
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    answer = json.loads(text) if text else {}
    print(json.dumps({"status": status, **answer}), flush=True)
"""


class Server:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = make_tree(folder / "source")
        self.backbone = tiny_sd(folder / "backbone")
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=HELPERS,
        )

    def run(self, name: str, **job: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        whole = {
            "output": str(self.folder / name),
            "source": str(self.source),
            "backbone": str(self.backbone),
            **job,
        }
        self._process.stdin.write(json.dumps(whole) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def bytes_of(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def close(self) -> None:
        self._process.communicate()
