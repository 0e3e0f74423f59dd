"""A page to play with: the same noise through all models of a run, in any number of steps.

    python play.py                                  the toy run, or the models that are shipped
    python play.py --ckpt WEIGHTS --base WAN_DIR    Wan's and AnyFlow's weights, in any words
"""
import argparse
import base64
import itertools
import json
import os
import select
import shlex
import socket
import threading
import time
import webbrowser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cli
from config import folder_of, record_of

SIZES = {"frames": 81, "height": 480, "width": 832}      # of clips of weights without a run


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser("A page to play with.", "python play.py --run-dir runs/demo-loop")
    add = parser.add_argument
    add("--run-dir", type=Path, help="the run (default runs/toy-shapes, or what is shipped)")
    add("--ckpt", type=Path, help="RUN/STAGE, or Wan or AnyFlow weights (default: all of the run)")
    add("--base", type=Path, help="the weights' pipeline folder, for its encoders (default none)")
    for name, default in SIZES.items():
        add(f"--{name}", type=int, least=1, default=default,
            help=f"{'pixel frames' if name == 'frames' else 'pixels'}, for weights without a run "
            f"(default {default})")
    add("--port", type=int, default=8000, help="of the page, 0: any that is free (default 8000)")
    add("--no-browser", action="store_true", help="open no browser (default off)")
    return parser.parse(argv)


if __name__ == "__main__":
    cli.run(parse_args)   # answers --help and wrong flags, before what takes seconds to import

import imageio.v3 as iio
import torch

import data
import distributed
import flowmap
import runs
from media import to_pixels
from pipeline import Pipeline, latents, load_pipeline, stream
from sample import default_run, newest_stage

PAGE = Path(__file__).with_name("play.html")
MODELS = (("teacher", "pretrain", "euler"), ("flow map", "flowmap", "euler"),
          ("student", "distill", "euler"), ("consistency sampler", "flowmap", "consistency"))
MODES = ("compare", "steps", "strip", "stream")
HEADERS = {"Content-Security-Policy": "default-src 'self' 'unsafe-inline' data:; frame-ancestors "
           "'none'", "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


class Player:
    """The models, and the one answer at a time that is made with them."""

    def __init__(self, args, device):
        self.making, self.stopping = threading.Lock(), threading.Event()
        self.running, self.next_prompt = None, None      # of the stream: its id; what comes next
        self.args, self.source = args, args.ckpt or args.run_dir or default_run()
        self.device, self.pipelines = device, {}         # by folder
        self.models = self.find_models()                 # {name: (folder, sampler, causal)}
        first = next(iter(self.models.values()))[0]
        pipeline, self.record = self.load(first), record_of(first)
        self.fps = pipeline.fps
        self.words = pipeline.words if "vocabulary" in self.record else None     # Wan's are large

    def load(self, folder) -> Pipeline:
        if folder not in self.pipelines:
            if self.args.base:                           # Wan's are large: one at a time
                self.pipelines.clear()
            sizes = {name: getattr(self.args, name) for name in SIZES}
            self.pipelines[folder] = load_pipeline(folder, self.device, self.args.base, **sizes)
        return self.pipelines[folder]

    def find_models(self) -> dict:
        if self.args.ckpt:
            pipeline = self.load(self.source)
            names = ("euler", "consistency")[:1 + pipeline.network.config.second_time]
            return {name: (self.source, name, len(pipeline.chunks) > 1) for name in names}
        newest_stage(self.source)                        # or the error that there is none
        models = {}
        for form, causal in (("", False), (", chunk by chunk", True)):
            for name, stage, sampler in MODELS[causal:]:         # the teacher has one form
                own = self.source / folder_of(stage, causal)
                folder = runs.teacher_of(self.source) if stage == "pretrain" else own
                if runs.finished(folder):
                    models[name + form] = (folder, sampler, causal)
        return models

    def state(self) -> dict:
        """What the page has to know."""
        config, captions = self.record.get("config", {}), []
        if config.get("data") in data.SETS:
            captions = data.open_data(config["data"], config["frames"], config["size"]).captions
        return {"source": str(self.source), "fps": self.fps, "captions": captions,
                "models": [{"name": name, "causal": self.models[name][2]} for name in self.models]}

    def check(self, request) -> dict:
        """What is asked for, all of it in bounds. Raises ValueError."""
        if not isinstance(request, dict):
            raise ValueError("a request is an object of JSON")
        asked = {name: request.get(name) for name in ("mode", "model", "prompt", "seed", "steps")}
        mode, model, prompt, seed, steps = asked.values()
        models = [name for name in self.models if mode != "stream" or self.models[name][2]]
        limits = {
            "mode": (f"one of {', '.join(MODES)}", mode in MODES),
            "model": (f"one of {', '.join(models) or 'none, as none makes chunks'}",
                      model in models),
            "prompt": ("text of 1 to 2000 letters",
                       isinstance(prompt, str) and 0 < len(prompt) <= 2000),
            "seed": ("a whole number from 0 to 2147483647",
                     type(seed) is int and 0 <= seed < 2**31),
            "steps": ("a whole number from 1 to 64", type(steps) is int and 1 <= steps <= 64)}
        for name, (limit, kept) in limits.items():
            if not kept:
                raise ValueError(f"{name} {str(asked[name])[:40]!r}: must be {limit}")
        if self.words:                                   # free text has no unknown words
            self.words([prompt])
        return asked | {"id": str(request.get("id"))}

    def make(self, asked: dict, emit) -> None:
        """Make what is asked for, and emit it as it comes. Others wait, and are told."""
        while not self.making.acquire(timeout=0.2):
            emit({"wait": "busy with another request: waiting"})
        try:
            if asked["mode"] == "stream":
                self.stream(asked, emit)
            elif asked["mode"] == "compare":
                for name in self.models:
                    self.clip(asked | {"model": name}, emit, name)
            elif asked["mode"] == "strip":
                for steps in (1, 2, 4, 8, 16, 32):
                    self.clip(asked | {"steps": steps}, emit, f"{steps} step{'s' * (steps > 1)}")
            else:
                self.clip(asked, emit, "after step", each=True)
        finally:
            self.running = self.next_prompt = None
            self.making.release()

    def settings(self, asked: dict):
        """(pipeline, what pipeline.latents is asked for), as sample.py has them."""
        folder, sampler, _ = self.models[asked["model"]]
        pipeline = self.load(folder)
        return pipeline, {
            "captions": [asked["prompt"]], "seeds": [asked["seed"]], "sampler": sampler,
            "grid": flowmap.time_grid(asked["steps"], pipeline.config["shift"]),
            "guidance": pipeline.default_guidance(sampler)}

    def clip(self, asked: dict, emit, label: str, each: bool = False) -> None:
        """A clip; each: as it is after each step."""
        pipeline, options = self.settings(asked)
        steps, seen, started = asked["steps"], [], time.time()
        progress = {"making": label, "of": steps * len(pipeline.chunks)}

        def on_step(z):
            seen.append(z.cpu())
            emit(progress | {"step": len(seen)})
        z_0 = torch.cat(list(latents(pipeline, **options, on_step=on_step)), 1).cpu()
        shown = [(label, f"{time.time() - started:.2f} s", z_0)]
        if each:                                         # step k of every chunk
            at = "t =" if options["sampler"] == "euler" else "clean, before noise of t ="
            shown = [(f"{label} {k + 1} of {steps}", f"{at} {options['grid'][k + 1]:.2f}",
                      torch.cat(seen[k::steps], 1)) for k in range(steps)]
        for name, about, z in shown:
            emit({"clip": name, "about": about, "command": self.command(asked),
                  "frames": pictures(pipeline.codec.decode(z)[0])})

    def stream(self, asked: dict, emit) -> None:
        """Chunks without end, a second ahead of what is seen."""
        pipeline, options = self.settings(asked)
        prompts = {}
        chunks = itertools.chain(pipeline.chunks, itertools.repeat(max(pipeline.chunks)))
        pieces = stream(pipeline, **options, chunks=chunks, prompt_at=prompts,
                        on_step=lambda z: emit({}))
        self.running, frames, started = asked["id"], 0, time.time()
        for m in itertools.count():
            begun = time.time()
            piece = next(pieces)[0]
            frames += len(piece)
            emit({"clip": asked["model"], "chunk": m, "frames": pictures(piece),
                  "seconds": round(time.time() - begun, 3), "of": frames, "prompt": prompts.get(m),
                  "command": self.command(asked, prompts, frames)})
            while frames / pipeline.fps > time.time() - started + 1:
                time.sleep(0.05)
                emit({})                                         # or end, when nobody looks
            if self.next_prompt:
                prompts[m + 1], self.next_prompt = self.next_prompt, None

    def switch(self, asked: dict, emit) -> None:
        """Another prompt for the stream that runs, from its next chunk on."""
        if self.running is None or asked["id"] != self.running:
            raise ValueError("this stream does not run any more: start it again")
        self.next_prompt = asked["prompt"]
        emit({"switched": asked["prompt"]})

    def command(self, asked: dict, prompts: dict | None = None, frames: int = 0) -> str:
        """sample.py's line for a clip, or for a stream of so many frames."""
        folder, sampler, _ = self.models[asked["model"]]
        sizes = {} if runs.finished(folder) else {f"--{x}": getattr(self.args, x) for x in SIZES}
        flags = {"--ckpt": folder, "--base": self.args.base, "--prompt": asked["prompt"],
                 "--seed": asked["seed"], "--steps": asked["steps"], **sizes,
                 "--sampler": None if sampler == "euler" else sampler}
        if frames:
            flags["--frames"] = frames
        line = [word for flag in flags.items() if flag[1] is not None for word in flag]
        for m, prompt in (prompts or {}).items():
            line += ["--prompt-at", m, prompt]
        line += ["--stream"] if frames else []
        return shlex.join(["python", "sample.py", *map(str, line)])


def pictures(video: torch.Tensor) -> list[str]:
    """Frames (T, 3, H, W) in [-1, 1] as addresses that hold a picture."""
    kind = "png" if video.shape[-1] <= 128 else "jpeg"
    files = [iio.imwrite("<bytes>", x, extension=f".{kind}") for x in to_pixels(video, height=1)]
    return [f"data:image/{kind};base64,{base64.b64encode(file).decode()}" for file in files]


class Handler(BaseHTTPRequestHandler):
    """The page, what it has to know, and answers. Nothing of a request names a file."""
    timeout = 10                             # seconds to send, or to take, the next bytes
    begun = False                            # whether the answer has

    def do_GET(self):
        if not self.is_refused(("/", "/state")):
            state = self.path == "/state" and self.server.player.state()
            self.emit(state or PAGE.read_bytes())

    def do_POST(self):
        answers = {"/make": self.server.player.make, "/prompt": self.server.player.switch}
        if self.is_refused(answers):
            return
        try:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > 10_000:
                raise ValueError("a request says how long it is, at most 10000 bytes")
            asked = self.server.player.check(json.loads(self.rfile.read(int(length))))
            answers[self.path](asked, self.emit)
        except (ValueError, RuntimeError, FileNotFoundError, PermissionError) as error:
            self.emit({"error": str(error)}, 400)

    def handle(self):
        try:
            super().handle()
        except OSError:
            pass                                                 # a closed tab

    def is_refused(self, paths) -> bool:
        """Whether it is another site's: its pages have another Origin, its name is another Host.
        The port of Host may be that of a forward (ssh -L)."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        own = host.split(":")[0] in ("127.0.0.1", "localhost")
        post = self.command == "POST"
        kind = self.headers.get("Content-Type") if post else "application/json"
        right = (own and origin in (f"http://{host}", "" if post else None)
                 and kind == "application/json" and self.path in paths)
        if not right:
            self.emit({"error": "only the page of this server is answered"}, 403)
        return not right

    def emit(self, event: dict | bytes, status: int = 200) -> None:
        """A line of the answer, or the page; of {} nothing. OSError when nobody reads it."""
        readable = select.select([self.connection], [], [], 0)[0]
        left = readable and not self.connection.recv(1, socket.MSG_PEEK)
        if left or self.server.player.stopping.is_set():
            raise ConnectionError("nobody reads the answer any more")
        if event and not self.begun:
            self.begun = True
            self.send_response(status)
            kind = "text/html" if isinstance(event, bytes) else "application/x-ndjson"
            for name, value in (HEADERS | {"Content-Type": f"{kind}; charset=utf-8"}).items():
                self.send_header(name, value)
            self.end_headers()
        line = event if isinstance(event, bytes) else f"{json.dumps(event)}\n".encode()
        self.wfile.write(line if event else b"")

    log_message = lambda *args: None         # of every request


def main(argv=None) -> None:
    args = parse_args(argv)
    player = Player(args, distributed.start("auto").device)
    try:
        server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    except (OSError, OverflowError) as error:
        raise ValueError(f"--port {args.port}: {error}; give another one, or 0") from None
    server.player = player
    address = f"http://127.0.0.1:{server.server_port}"
    print(f"{address}: {', '.join(player.models)} of {player.source}; Ctrl-C ends it", flush=True)
    if not args.no_browser:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        player.stopping.set()
        player.making.acquire(timeout=0.5)   # a call of the network may take longer,
        os._exit(0)                          # and is not waited for


if __name__ == "__main__":
    cli.run(main)
