"""Two prompts on one clip at the same time: the second waits, takes what the first has done, or works beside it."""

import shutil

import av
import numpy as np
import pytest
from comfy_client import ServerProcess
from server_graph import basic_prompt

pytestmark = [pytest.mark.server, pytest.mark.timeout(900)]


def prompt_of(object_info: dict, clip: str, name: str, text: str, resume: str = "resume") -> dict:
    prompt = basic_prompt(object_info, clip, frames=6, steps=3)
    prompt["positive"]["inputs"]["text"] = text
    prompt["save"]["inputs"] |= {"filename_prefix": f"two/{name}", "codec": "ffv1", "resume": resume}
    for node in ("invert", "joint", "propagate"):
        prompt[node]["inputs"]["resume"] = resume
    return prompt


def frames_of(server, outputs: dict, folder) -> np.ndarray:
    """Every frame of the video that was saved."""
    (file,) = server.files(outputs["save"])
    with av.open(str(server.fetch(file, folder / file["filename"]))) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_prompts_that_are_queued_together_give_what_each_gives_alone(server, clip, object_info, tmp_path):
    wanted = {"red": "a red disc", "blue": "a blue disc", "again": "a red disc"}
    queued = [server.submit(prompt_of(object_info, clip, name, text)) for name, text in wanted.items()]
    red, blue, again = (frames_of(server, server.follow(prompt, timeout=600), tmp_path) for prompt in queued)
    assert np.array_equal(red, again) and not np.array_equal(red, blue)
    for name, together in (("red", red), ("blue", blue)):
        alone = server.run(prompt_of(object_info, clip, name, wanted[name], "start afresh"), timeout=600)
        assert np.array_equal(frames_of(server, alone, tmp_path), together)
    assert list((server.base / "output" / "adaflow_runs").glob("save-*")) == []


def test_two_servers_that_share_an_output_folder_do_not_disturb_each_other(server, clip, object_info, tmp_path):
    (tmp_path / "other" / "input").mkdir(parents=True)
    shutil.copy(server.base / "input" / clip, tmp_path / "other" / "input" / clip)
    shared = ("--output-directory", str(server.base / "output"))
    with ServerProcess(server.comfyui, tmp_path / "other", cpu=True, arguments=shared) as other:
        queued = [
            (at, at.submit(prompt_of(object_info, clip, name, "a green disc", resume)))
            for resume in ("start afresh", "resume")
            for at, name in ((server, "first"), (other, "second"))
        ]
        found = [frames_of(at, at.follow(prompt, timeout=600), tmp_path) for at, prompt in queued]
    assert all(np.array_equal(frames, found[0]) for frames in found)
    assert list((server.base / "output" / "adaflow_runs").glob("save-*")) == []
