"""What ``scripts/demo`` runs: the shipped workflow in a real ComfyUI, on a clip, into a folder one can look at."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from comfy_client import (
    ROOT,
    ComfyClient,
    ExecutionError,
    Interrupted,
    Progress,
    PromptRejected,
    ServerError,
    ServerProcess,
    unlink_pack,
)
from demo_clip import ATTRIBUTES, DEMO_STEPS, demo_clip, demo_settings, render
from demo_sheet import contact_sheet
from setup_env import cache_folder, say
from workflow_api import Prompt, WorkflowError, find_nodes, set_input, swap_node, upstream, workflow_to_api

CLIP_FRAMES = 96
DEMO_SIZE = 192


class DemoError(RuntimeError):
    """The demo cannot go on; the message is for the user."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/demo",
        description="Edits a video in a real ComfyUI, started for it, with a workflow of this pack. Leaves the edited "
        "video, a contact sheet (source above, edit below) and the y-t picture (cuts and keyframes) in a folder.",
    )
    add = parser.add_argument
    add("--video", type=Path, metavar="PATH", help="the clip to edit (default: a red car drawn by code)")
    add(
        "--edit",
        metavar="WHAT=VALUE",
        help="what to change in the drawn clip: colour, season, time or style (default: colour=blue); the contact "
        "sheet then shows the truth as well",
    )
    add("--prompt", metavar="TEXT", help="what the edited clip shall show")
    add("--source-prompt", metavar="TEXT", help="what the clip shows now")
    add(
        "--checkpoint",
        metavar="FILE",
        help="a Stable Diffusion 1.x, 2.x or SDXL checkpoint (default: the small demo model of this pack); with "
        "--server, a name from its list of checkpoints",
    )
    add("--frames", type=int, metavar="N", help="frames to edit, from the first (default: all of them)")
    add(
        "--size",
        type=int,
        metavar="PX",
        help=f"longer side, a multiple of 64 (default: {DEMO_SIZE}, with --checkpoint 512)",
    )
    add(
        "--steps",
        type=int,
        metavar="N",
        help=f"steps of inversion and of sampling (default: {DEMO_STEPS}, with --checkpoint 50)",
    )
    add("--output", type=Path, default=Path("demo-output"), metavar="DIR", help="default: ./demo-output")
    add("--workflow", type=Path, metavar="JSON", help="a saved workflow (default: the basic edit in workflows/)")
    add("--server", metavar="URL", help="use this running ComfyUI, with the pack installed, and start none")
    return parser.parse_args()


def shipped_workflow() -> Path:
    """The basic edit among the workflows of the pack."""
    found = sorted((ROOT / "workflows").glob("*.json"))
    basic = [path for path in found if "basic" in path.stem.lower()]
    if not basic:
        raise DemoError(f"{ROOT / 'workflows'} has no basic workflow")
    return basic[0]


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is started."""
    if args.video is not None and not args.video.is_file():
        raise DemoError(f"--video is {args.video}, which is no file")
    if args.checkpoint and not args.server and not Path(args.checkpoint).is_file():
        raise DemoError(f"--checkpoint is {args.checkpoint}, which is no file")
    if args.video is not None and args.prompt is None:
        raise DemoError("--prompt is missing: say what the edited clip shall show")
    for name, least in (("frames", 1), ("steps", 1), ("size", 64)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise DemoError(f"--{name} is {value}; expected {least} or more")
    if args.size is not None and args.size % 64:
        raise DemoError(f"--size is {args.size}; expected a multiple of 64")
    args.workflow = args.workflow or shipped_workflow()
    args.size = args.size or (512 if args.checkpoint else DEMO_SIZE)
    args.steps = args.steps or (50 if args.checkpoint else DEMO_STEPS)
    if args.video is not None and args.source_prompt is None:
        say("no --source-prompt: the clip is inverted with an empty prompt; a description of it would keep it better")
    args.source_prompt = args.source_prompt or ("" if args.video else demo_clip().caption())
    args.changes = edit_of_drawn_clip(args)
    args.prompt = args.prompt or demo_clip().edited(**args.changes).caption()


def edit_of_drawn_clip(args: argparse.Namespace) -> dict[str, str]:
    """The attribute of the drawn clip that is to change, and what to; empty where a prompt says it instead."""
    if args.prompt is not None:
        if args.edit is not None:
            raise DemoError("--edit and --prompt are both given; --edit writes the prompt for the drawn clip")
        return {}
    name, _, value = (args.edit or "colour=blue").partition("=")
    if name not in ATTRIBUTES:
        raise DemoError(f"--edit is {args.edit}; expected one of {', '.join(ATTRIBUTES)}, an equals sign and a value")
    if value not in ATTRIBUTES[name]:
        raise DemoError(f"--edit is {args.edit}; {name} is one of {', '.join(ATTRIBUTES[name])}")
    return {name: value}


def build_prompt(workflow: dict, object_info: dict, args: argparse.Namespace, video: str, checkpoint: str) -> Prompt:
    """The workflow as it is submitted: with this clip, these texts and this model, all else as saved."""
    prompt = workflow_to_api(workflow, object_info)
    if checkpoint:
        swap_node(prompt, "AdaFlowLoadDemoModel", "CheckpointLoaderSimple", {"ckpt_name": checkpoint})
        set_input(prompt, "CheckpointLoaderSimple", "ckpt_name", checkpoint)
    else:
        swap_node(prompt, "CheckpointLoaderSimple", "AdaFlowLoadDemoModel", {})
        for name, settings in demo_settings(*args.changes).items():
            for key, value in settings.items():
                set_input(prompt, name, key, value)
    if not set_input(prompt, "AdaFlowLoadVideo", "file", video):
        raise DemoError("the workflow has no AdaFlowLoadVideo node")
    for key, value in {"first_frame": 0, "frame_count": args.frames or 0, "stride": 1, "size": args.size}.items():
        set_input(prompt, "AdaFlowLoadVideo", key, value)
    texts = {"AdaFlowDDIMInvert": {"source": args.source_prompt}}
    for name in ("AdaFlowJointKeyframeEdit", "KSampler"):
        texts[name] = {"positive": args.prompt} | ({} if checkpoint else {"negative": ""})
    for name, given in texts.items():
        for node in find_nodes(prompt, name):
            prompt[node]["inputs"]["steps"] = args.steps
            for key, text in given.items():
                encoder = upstream(prompt, node, key, "CLIPTextEncode")
                if encoder:
                    prompt[encoder]["inputs"]["text"] = text
    return prompt


class Bar:
    """A progress bar in the terminal; a line per node and quarter where there is no terminal."""

    def __init__(self, prompt: Prompt, stream=sys.stderr):
        self.titles = {key: node["_meta"]["title"] for key, node in prompt.items()}
        self.stream, self.live = stream, stream.isatty()
        self.node, self.started, self.quarter = None, time.monotonic(), -1

    def __call__(self, progress: Progress) -> None:
        title = self.titles.get(progress.node_id, progress.node_id)
        if progress.node_id != self.node:
            self.finish()
            self.node, self.started, self.quarter = progress.node_id, time.monotonic(), -1
        seconds = time.monotonic() - self.started
        share = progress.value / progress.maximum if progress.maximum else 0.0
        if self.live:
            filled = round(24 * share)
            counts = f"{progress.value:.0f}/{progress.maximum:.0f}" if progress.maximum else ""
            line = f"  {title[:34]:34} [{'#' * filled}{'-' * (24 - filled)}] {counts:>9} {seconds:5.0f} s"
            print(f"\r{line}", end="", file=self.stream, flush=True)
        elif int(share * 4) > self.quarter:
            self.quarter = int(share * 4)
            print(f"  {title}: {share:4.0%} after {seconds:.0f} s", file=self.stream, flush=True)

    def finish(self) -> None:
        if self.live and self.node is not None:
            print(file=self.stream)
        self.node = None


def bring_file(source: Path, target: Path) -> str:
    """Make a file visible at ``target``, copied only where it cannot be linked; its name.

    A hard link, since AdaFlowLoadVideo refuses symbolic links that lead out of ComfyUI's folders.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
    return target.name


def save_results(client: ComfyClient, prompt: Prompt, outputs: dict, video: Path, args: argparse.Namespace) -> None:
    """Fetch the edited video and the y-t picture, and draw the contact sheet."""
    folder = args.output
    videos = [file for node in find_nodes(prompt, "AdaFlowSaveVideo") for file in client.files(outputs.get(node, {}))]
    if not videos:
        raise DemoError("the workflow saved no video")
    edited = client.fetch(videos[0], folder / f"edit{Path(videos[0]['filename']).suffix}")
    say(f"edited video:  {edited}")
    rows = {"source": video, "edited": edited}
    if args.changes:
        rows["truth"] = draw_demo_clip(folder / "truth.mp4", args, sound=False, **args.changes)
    sheet = contact_sheet(rows, folder / "contact-sheet.png", f'prompt: "{args.prompt}"')
    say(f"contact sheet: {sheet}")
    selects = find_nodes(prompt, "AdaFlowKeyframeSelect")
    pictures = [file for node in selects for file in client.files(outputs.get(node, {}))]
    if pictures:
        say(f"y-t picture:   {client.fetch(pictures[0], folder / 'yt.png')}  (cuts in red, keyframes in yellow)")


def draw_demo_clip(path: Path, args: argparse.Namespace, **changes) -> Path:
    """The demo clip at the size asked for, as near to 3:2 as multiples of 64 allow."""
    height = max(64, round(args.size / 1.5 / 64) * 64)
    return render(path, frames=args.frames or CLIP_FRAMES, width=args.size, height=height, **changes)


def demo(client: ComfyClient, args: argparse.Namespace, input_folder: Path | None) -> None:
    """Bring the clip to the server, run the workflow, save what it made."""
    video = args.video
    if video is None:
        video = draw_demo_clip(args.output / "source.mp4", args)
        say(f"source clip:   {video}")
    # A name that is new to the server, whatever the user's file is called.
    name = f"demo-source{video.suffix.lower() or '.mp4'}"
    if input_folder is not None:
        name = bring_file(video, input_folder / name)
    else:
        say(f"sending {video} to {client.url}")
        name = client.upload(video)
    checkpoint = args.checkpoint if args.server or not args.checkpoint else Path(args.checkpoint).name
    prompt = build_prompt(json.loads(args.workflow.read_text()), client.object_info(), args, name, checkpoint)
    say(f"submitting {args.workflow.name}: {args.steps} steps, up to {args.size} pixels")
    bar = Bar(prompt)
    try:
        outputs = client.run(prompt, bar)
    finally:
        bar.finish()
    save_results(client, prompt, outputs, video, args)


def with_own_server(args: argparse.Namespace) -> None:
    """Start a ComfyUI in a folder of its own, run the demo on it, and remove the folder."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    base = Path(tempfile.mkdtemp(prefix="demo-", dir=cache_folder()))
    log = args.output / "server.log"
    server = ServerProcess(Path(os.environ["COMFYUI_PATH"]), base, log=log)
    try:
        if args.checkpoint:
            checkpoint = Path(args.checkpoint)
            folder = base / "models" / "checkpoints"
            folder.mkdir(parents=True)
            try:
                (folder / checkpoint.name).symlink_to(checkpoint.resolve())
            except OSError:  # Windows without the right to
                bring_file(checkpoint, folder / checkpoint.name)
        say(f"starting ComfyUI on the {'CPU' if server.cpu else 'GPU'} (log: {log})")
        with server:
            demo(server, args, base / "input")
    finally:
        server.stop()
        unlink_pack(base / "custom_nodes")
        shutil.rmtree(base, ignore_errors=True)


def main() -> int:
    args = parse_arguments()
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    where = "" if args.server else f"\n  the server's log: {args.output / 'server.log'}"
    try:
        check_arguments(args)
        args.output.mkdir(parents=True, exist_ok=True)
        if args.server:
            demo(ComfyClient(args.server), args, None)
        else:
            with_own_server(args)
    except KeyboardInterrupt:
        say("cancelled: the prompt was interrupted and the server stopped")
        return 130
    except ExecutionError as error:
        say(f"{error.node_type} (node {error.node_id}) failed:\n  {error.message}{where}")
    except PromptRejected as error:
        say(f"ComfyUI refused the workflow:\n  {error}{where}")
    except Interrupted:
        say("the prompt was cancelled")
    except (DemoError, WorkflowError) as error:
        say(str(error))
    except (ServerError, OSError) as error:
        say(f"{error}{where}")
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
