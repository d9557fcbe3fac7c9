"""Starts a real ComfyUI server, submits prompts to it over HTTP and follows them on its websocket."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import mimetypes
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp

ROOT = Path(__file__).resolve().parents[1]
PACK_NAME = "comfyui-adaflow"
NOT_COPIED = shutil.ignore_patterns(".git", ".cache", ".venv", "__pycache__", "demo-output", "*.mp4")


class ServerError(RuntimeError):
    """The server did not start, stopped, or answered with an error."""


class PromptRejected(ServerError):
    """ComfyUI refused a prompt before running it; ``node_errors`` is its answer by node id."""

    def __init__(self, answer: dict):
        self.error, self.node_errors = answer.get("error") or {}, answer.get("node_errors") or {}
        lines = [f"{self.error.get('message', 'refused')}: {self.error.get('details', '')}".rstrip(": ")]
        for node, entry in self.node_errors.items():
            for error in entry["errors"]:
                lines.append(f"node {node} ({entry['class_type']}): {error['message']}: {error['details']}")
        super().__init__("\n".join(lines))


class ExecutionError(ServerError):
    """A node raised while the prompt ran."""

    def __init__(self, node_id: str, node_type: str, message: str, traceback: str = ""):
        self.node_id, self.node_type, self.message, self.traceback = node_id, node_type, message.strip(), traceback
        super().__init__(f"node {node_id} ({node_type}): {self.message}")


class Interrupted(ServerError):
    """The prompt was cancelled."""


@dataclass
class Progress:
    """Where a running prompt is: the node at work, and how far it is if it tells (``maximum`` 0 if not)."""

    node_id: str
    value: float = 0
    maximum: float = 0


def link_pack(folder: Path, pack: Path = ROOT) -> None:
    """Make the checkout visible in a ``custom_nodes`` folder: a link, on Windows a junction, else a copy."""
    target = folder / PACK_NAME
    folder.mkdir(parents=True, exist_ok=True)
    if target.is_symlink():
        target.unlink()
    if target.exists():
        return
    try:
        target.symlink_to(pack, target_is_directory=True)
        return
    except OSError:
        pass
    try:
        import _winapi

        _winapi.CreateJunction(str(pack), str(target))
    except (ImportError, OSError):
        shutil.copytree(pack, target, ignore=NOT_COPIED)


def unlink_pack(folder: Path) -> None:
    """Take the link away again, so that removing the folder around it cannot reach the checkout."""
    target = folder / PACK_NAME
    if target.is_symlink():
        target.unlink()
    elif os.name == "nt" and target.exists():
        with contextlib.suppress(OSError):  # removes a junction; a copy is not empty and stays
            target.rmdir()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def has_gpu(python: str) -> bool:
    """Whether that Python's torch sees an accelerator ComfyUI can use."""
    code = (
        "import torch; x = getattr(torch, 'xpu', None); "
        "print(torch.cuda.is_available() or torch.backends.mps.is_available() or bool(x and x.is_available()))"
    )
    answer = subprocess.run([python, "-W", "ignore", "-c", code], capture_output=True, text=True)
    return answer.stdout.strip() == "True"


class ComfyClient:
    """Talks to the ComfyUI at ``url``."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.id = uuid.uuid4().hex

    def request(self, path: str, body: dict | None = None, timeout: float = 60):
        """The JSON that ``path`` answers, by POST if there is a ``body``; HTTP errors raise ``HTTPError``."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"} if data else {})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            text = response.read()
        return json.loads(text) if text.strip() else None

    def read(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=600) as response:
            return response.read()

    def object_info(self) -> dict:
        return self.request("/object_info")

    def submit(self, prompt: dict) -> str:
        """Queue a prompt; its id.

        Raises:
            PromptRejected: validation failed, for the whole or for one of its outputs.
        """
        try:
            answer = self.request("/prompt", {"prompt": prompt, "client_id": self.id})
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise PromptRejected(json.load(error)) from error
        if answer.get("node_errors"):
            self.request("/queue", {"delete": [answer["prompt_id"]]})
            self.interrupt(answer["prompt_id"])
            raise PromptRejected(answer)
        return answer["prompt_id"]

    def history(self, prompt_id: str) -> dict | None:
        """What ComfyUI keeps of a prompt that ended; None while it has not."""
        return self.request(f"/history/{prompt_id}").get(prompt_id)

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Cancel the running prompt; with an id only if it is that one, where ComfyUI is new enough to tell."""
        self.request("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def follow(self, prompt_id: str, on_progress: Callable[[Progress], None] | None = None, timeout: float = 0) -> dict:
        """Wait for a prompt; its outputs by node id.

        Raises:
            ExecutionError: a node raised.
            Interrupted: it was cancelled.
            TimeoutError: it took longer than ``timeout`` seconds (0: no limit).
        """
        return asyncio.run(self._follow(prompt_id, on_progress or (lambda progress: None), timeout))

    async def _follow(self, prompt_id: str, on_progress, timeout: float) -> dict:
        started = time.monotonic()
        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket_:
            while True:
                ended = await asyncio.to_thread(self.history, prompt_id)
                if ended is not None:
                    return self._outputs(ended)
                if timeout and time.monotonic() - started > timeout:
                    raise TimeoutError(f"the prompt has not ended after {timeout:.0f} s")
                await self._listen(socket_, prompt_id, on_progress)

    async def _listen(self, socket_, prompt_id: str, on_progress, seconds: float = 2.0) -> None:
        """Pass on progress until the prompt ends or ``seconds`` are over."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                message = await socket_.receive(timeout=left)
            except asyncio.TimeoutError:
                return
            if message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.ERROR):
                raise ServerError("the server closed the connection")
            if message.type != aiohttp.WSMsgType.TEXT:
                continue  # a preview picture
            event = json.loads(message.data)
            data = event.get("data") or {}
            if data.get("prompt_id") != prompt_id:
                continue
            if event["type"] == "progress":
                on_progress(Progress(str(data.get("node")), data["value"], data["max"]))
            elif event["type"] == "executing":
                if data.get("node") is None:
                    return
                on_progress(Progress(str(data["node"])))
            elif event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                return

    @staticmethod
    def _outputs(entry: dict) -> dict:
        for kind, data in entry["status"].get("messages") or []:
            if kind == "execution_error":
                trace = "".join(data.get("traceback") or [])
                raise ExecutionError(str(data["node_id"]), data["node_type"], data["exception_message"], trace)
            if kind == "execution_interrupted":
                raise Interrupted("the prompt was cancelled")
        return entry["outputs"]

    def run(self, prompt: dict, on_progress: Callable[[Progress], None] | None = None, timeout: float = 0) -> dict:
        """Submit, wait, and return the outputs by node id. An exception here, Ctrl-C too, cancels the prompt."""
        prompt_id = self.submit(prompt)
        try:
            return self.follow(prompt_id, on_progress, timeout)
        except (KeyboardInterrupt, TimeoutError):
            with contextlib.suppress(OSError):
                self.request("/queue", {"delete": [prompt_id]})
                self.interrupt(prompt_id)
            raise

    @staticmethod
    def files(output: dict) -> list[dict]:
        """The files (``filename``, ``subfolder``, ``type``) that one node's entry of the outputs lists."""
        lists = [value for value in output.values() if isinstance(value, list)]
        return [item for items in lists for item in items if isinstance(item, dict) and "filename" in item]

    def fetch(self, file: dict, target: Path) -> Path:
        """Save one such file at ``target``."""
        query = urllib.parse.urlencode({key: file.get(key, "") for key in ("filename", "subfolder", "type")})
        part = target.with_name(target.name + ".part")
        part.write_bytes(self.read(f"/view?{query}"))
        part.replace(target)
        return target

    def upload(self, path: Path) -> str:
        """Put a file into ComfyUI's input folder; the name it has there."""
        boundary, name = uuid.uuid4().hex, urllib.parse.quote(path.name)
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            f"Content-Type: {kind}\r\n\r\n"
        )
        body = head.encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        request = urllib.request.Request(self.url + "/upload/image", body, headers)
        with urllib.request.urlopen(request, timeout=600) as response:
            answer = json.load(response)
        return f"{answer['subfolder']}/{answer['name']}" if answer.get("subfolder") else answer["name"]


class ServerProcess(ComfyClient):
    """A ComfyUI of one's own: in ``base``, with the checkout among its custom nodes, on a free port.

    Args:
        comfyui: the folder with ``main.py``.
        base: ComfyUI's base directory (input, output, temp, models, custom_nodes); made if missing.
        python: the Python that runs it.
        cpu: force the CPU; None uses a GPU where there is one.
        pack: the checkout to link into ``custom_nodes``.
        arguments: more arguments of ``main.py``.
        log: the file its output goes to (default: ``server.log`` in ``base``).
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        python: str | None = None,
        cpu: bool | None = None,
        pack: Path = ROOT,
        arguments: tuple[str, ...] = (),
        log: Path | None = None,
    ):
        self.comfyui, self.base, self.pack, self.arguments = Path(comfyui), Path(base), pack, arguments
        self.python = python or os.environ.get("COMFYUI_PYTHON") or sys.executable
        self.cpu = not has_gpu(self.python) if cpu is None else cpu
        self.log = log or self.base / "server.log"
        self.process: subprocess.Popen | None = None
        super().__init__("http://127.0.0.1:0")

    def start(self, timeout: float = 300) -> ServerProcess:
        """Start it and wait until it answers.

        Raises:
            ServerError: it stopped or did not answer; with the end of its log.
        """
        for name in ("input", "output", "temp", "models/checkpoints", "models/controlnet", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        link_pack(self.base / "custom_nodes", self.pack)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        database = (self.base / "user" / "comfyui.db").as_posix()
        command = [self.python, "-u", str(self.comfyui / "main.py"), "--port", str(port), "--listen", "127.0.0.1"]
        command += ["--base-directory", str(self.base), "--database-url", f"sqlite:///{database}"]
        command += ["--disable-auto-launch", *(["--cpu"] if self.cpu else []), *self.arguments]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
        if (self.comfyui / ".site").is_dir():  # packages of this version alone, which set-up put there
            environment["PYTHONPATH"] = str(self.comfyui / ".site")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.comfyui,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the caller: it cancels the prompt first
            )
        atexit.register(self.stop)
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise ServerError(f"ComfyUI stopped while starting; {self.log} ends:\n{self.log_tail()}")
            with contextlib.suppress(OSError, ValueError):
                self.request("/system_stats", timeout=5)
                return self
            time.sleep(0.25)
        self.stop()
        raise ServerError(f"ComfyUI did not answer within {timeout:.0f} s; {self.log} ends:\n{self.log_tail()}")

    def stop(self) -> None:
        """Stop it; waits until it is gone."""
        atexit.unregister(self.stop)
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def log_tail(self, lines: int = 25) -> str:
        return "\n".join(self.log_text().splitlines()[-lines:])

    def __enter__(self) -> ServerProcess:
        return self.start()

    def __exit__(self, *exception) -> None:
        self.stop()
