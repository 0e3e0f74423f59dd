"""play.py: what its server answers and refuses, and the page in a real browser."""
import argparse
import base64
import http.client
import http.server
import io
import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import weakref
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import media
import play
import sample

ROOT = Path(__file__).parent.parent
PROMPT, OTHER = "a red circle moving left", "a blue square moving up"
STREAM = {"mode": "stream", "model": "student, chunk by chunk"}


@pytest.fixture(scope="module")
def server(finished):
    args = argparse.Namespace(run_dir=finished, ckpt=None, base=None, frames=81, height=480,
                              width=832)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), play.Handler)
    server.player = play.Player(args, "cpu")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def send(server, path="/make", body=None, method="POST", **headers):
    """The server's reply to the page; headers, and what is asked for, are to be changed."""
    asked = {"id": "page", "mode": "compare", "model": "student", "prompt": PROMPT, "seed": 3,
             "steps": 2}
    if body is None or isinstance(body, dict):
        body = json.dumps(asked | (body or {}))
    host = f"127.0.0.1:{server.server_port}"
    given = {"Host": host, "Origin": f"http://{host}", "Content-Type": "application/json"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, body if method == "POST" else None,
                       {name: value for name, value in given.items() if value is not None})
    return connection.getresponse()


def lines(reply, clips_only=True):
    """What comes, as it comes."""
    for line in reply:
        event = json.loads(line)
        if "clip" in event or not clips_only:
            yield event


def pixels(event) -> np.ndarray:
    """The frames (T, H, W, 3) of a clip or chunk."""
    data = [address.removeprefix("data:image/png;base64,") for address in event["frames"]]
    return np.stack([iio.imread(io.BytesIO(base64.b64decode(frame))) for frame in data])


def by_command(command: str, monkeypatch) -> np.ndarray:
    """The frames of the clip that sample.py makes."""
    videos = []
    monkeypatch.setattr(sample, "write_clip", lambda path, video, fps: videos.append(video))
    monkeypatch.setattr(sample, "stream_to", lambda path, pieces, fps: videos.append(
        torch.cat([piece[0] for piece in pieces])))
    words = shlex.split(command)
    assert words[:2] == ["python", "sample.py"]
    sample.main(words[2:])
    return media.to_pixels(videos[0], 1)


def is_free(server, seconds: float = 5) -> bool:
    """Whether nothing is being made any more."""
    free = server.player.making.acquire(timeout=seconds)
    if free:
        server.player.making.release()
    return free


def test_every_clip_is_that_of_its_command(server, monkeypatch):
    clips = list(lines(send(server)))
    form = ", chunk by chunk"
    assert [clip["clip"] for clip in clips] == [
        "teacher", "flow map", "student", "consistency sampler", "flow map" + form,
        "student" + form, "consistency sampler" + form]
    for clip in clips:
        assert np.array_equal(pixels(clip), by_command(clip["command"], monkeypatch)), clip["clip"]


def test_the_strip_has_the_clips_of_its_steps(server, monkeypatch):
    clips = list(lines(send(server, body={"mode": "strip"})))
    names = [clip["clip"] for clip in clips]
    assert names == ["1 step", "2 steps", "4 steps", "8 steps", "16 steps", "32 steps"]
    assert np.array_equal(pixels(clips[1]), by_command(clips[1]["command"], monkeypatch))
    assert not np.array_equal(pixels(clips[1]), pixels(clips[0]))


@pytest.mark.parametrize("model", ["student", "student, chunk by chunk"])
def test_the_last_of_each_step_is_the_clip(server, monkeypatch, model):
    clips = list(lines(send(server, body={"mode": "steps", "model": model, "steps": 3})))
    assert [clip["about"][:4] for clip in clips] == ["t = "] * 3
    assert clips[2]["about"] == "t = 0.00" and clips[2]["clip"] == "after step 3 of 3"
    assert np.array_equal(pixels(clips[2]), by_command(clips[2]["command"], monkeypatch))
    assert not np.array_equal(pixels(clips[2]), pixels(clips[1]))


def test_a_stream_goes_on_past_the_clip_and_takes_another_prompt(server, monkeypatch):
    reply = send(server, body=STREAM)
    coming = lines(reply)
    chunks = list(itertools.islice(coming, 3))
    other = send(server, "/prompt", STREAM | {"id": "another", "prompt": OTHER})
    assert other.status == 400 and b"does not run" in other.read()
    other = send(server, "/prompt", STREAM | {"prompt": "a blue cube"})
    assert other.status == 400 and b"unknown words: 'cube'" in other.read()
    assert send(server, "/prompt", STREAM | {"prompt": OTHER}).status == 200
    while not any(chunk["prompt"] for chunk in chunks) or len(chunks) < 7:
        chunks.append(next(coming))
    reply.close()
    assert [chunk["chunk"] for chunk in chunks] == list(range(len(chunks)))
    assert chunks[-1]["of"] == 2 * len(chunks) > 8               # the clip has 8 frames
    assert f"--prompt-at {[c['prompt'] for c in chunks].index(OTHER)} " in chunks[-1]["command"]
    frames = np.concatenate([pixels(chunk) for chunk in chunks])
    assert np.array_equal(frames, by_command(chunks[-1]["command"], monkeypatch))


def test_one_at_a_time_others_are_told_and_a_closed_tab_ends_its_own(server):
    first = send(server, body=STREAM)
    next(lines(first))
    second = send(server, body={"mode": "steps", "steps": 1})
    waits = lines(second, clips_only=False)
    assert next(waits) == {"wait": "busy with another request: waiting"}
    first.close()
    started = time.time()
    rest = [event for event in waits if "wait" not in event]
    assert time.time() - started < 5 and rest[-1]["clip"] == "after step 1 of 1"
    # One that leaves while it waits is not made.
    first, third = send(server, body=STREAM), send(server, body=STREAM)
    assert "wait" in next(lines(third, clips_only=False))
    third.close()
    first.close()
    assert is_free(server) and server.player.running is None


ELSEWHERE = [{"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Origin": "null"},
             {"Origin": None}, {"Host": "evil.example", "Origin": "http://evil.example"},
             {"Content_Type": "text/plain"}, {"Origin": "http://127.0.0.1:1"},
             {"Host": "127.0.0.1.evil.example:80", "Origin": "http://127.0.0.1.evil.example:80"}]


def test_the_page_is_answered_through_a_forwarded_port(server):
    for host in ("localhost:9000", "localhost"):                 # the latter is port 80
        there = {"Host": host, "Origin": f"http://{host}"}
        assert send(server, "/state", method="GET", **there).status == 200


@pytest.mark.parametrize("headers", ELSEWHERE, ids=map(str, ELSEWHERE))
def test_another_site_is_refused(server, headers):
    for path in ("/make", "/prompt"):
        reply = send(server, path, **headers)
        assert reply.status == 403 and json.loads(reply.read()).keys() == {"error"}
    if "Origin" in headers and headers["Origin"] or "Host" in headers:
        for path in ("/", "/state"):
            assert send(server, path, method="GET", **headers).status == 403


@pytest.mark.parametrize("method, path", [("GET", "/play.py"), ("GET", "/../play.py"),
                                          ("GET", "//etc/passwd"), ("GET", "/make"),
                                          ("POST", "/"), ("POST", "/play.html")])
def test_no_path_is_that_of_a_file(server, method, path):
    assert send(server, path, method=method).status == 403


def test_the_page_may_load_nothing_from_elsewhere(server):
    reply = send(server, "/", method="GET", Origin=None)
    text = reply.read().decode()
    assert text == play.PAGE.read_text() and "frame-ancestors 'none'" in reply.headers[
        "Content-Security-Policy"]
    assert not re.search(r"(src|href)=.?(https?:)?//|@import|innerHTML|\bcdn\b", text)
    assert server.server_address[0] == "127.0.0.1"


WRONG = [({"prompt": "a red cirkle"}, "unknown words: 'cirkle' (nearest known: 'circle')"),
         ({"prompt": ""}, "prompt '': must be text of 1 to 2000 letters"),
         ({"prompt": "a " * 1001}, "must be text of 1 to 2000"), ({"prompt": 3}, "prompt '3'"),
         ({"seed": -1}, "seed '-1': must be a whole number from 0"), ({"seed": None}, "'None'"),
         ({"seed": 2**31}, "seed"), ({"steps": 65}, "steps '65': must be a whole number from 1 to"),
         ({"steps": 1.5}, "steps '1.5'"), ({"steps": True}, "steps 'True'"),
         ({"model": "/etc/passwd"}, "model '/etc/passwd': must be one of teacher"),
         ({"model": ["student"]}, "model"), ({"mode": "all"}, "mode 'all': must be one of compare"),
         ({"mode": "stream"}, "model 'student': must be one of flow map, chunk by chunk"),
         ("[1]", "an object"), ("{", "Expecting"), ("é", ""),
         ("[" * 9000, ""), ("x" * 10_001, "at most 10000 bytes")]


@pytest.mark.parametrize("body, message", WRONG, ids=[str(case[0])[:30] for case in WRONG])
def test_wrong_input_is_a_message(server, body, message):
    reply = send(server, body=body if isinstance(body, dict) else body.encode("latin1"))
    error = json.loads(reply.read())["error"]
    assert reply.status == 400 and message in error and len(error) < 300
    assert is_free(server, 0)


def test_of_large_networks_one_is_there_at_a_time(finished, monkeypatch):
    alive = weakref.WeakSet()

    class Large:
        words, fps = None, 16

    def load(folder, *args, **options):
        assert not alive
        made = Large()
        alive.add(made)
        return made
    monkeypatch.setattr(play, "load_pipeline", load)
    args = argparse.Namespace(run_dir=finished, ckpt=None, base="wan", **play.SIZES)
    player = play.Player(args, "cpu")
    for folder, _, _ in player.models.values():
        assert player.load(folder) is player.load(folder)
    assert len(alive) == 1 < len({folder for folder, _, _ in player.models.values()})


def test_a_port_that_is_taken_is_named(server, finished):
    with pytest.raises(ValueError, match=f"--port {server.server_port}: "):
        play.main(["--run-dir", str(finished), "--no-browser", "--port", str(server.server_port)])


def test_ctrl_c_ends_it_within_a_second_whatever_it_makes(finished):
    command = [sys.executable, str(ROOT / "play.py"), "--run-dir", str(finished), "--no-browser",
               "--port", "0"]
    def heard():                                     # what runs in the background ignores it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        said = process.stdout.readline()
        port = int(re.match(r"http://127.0.0.1:(\d+): teacher, ", said)[1])
        reply = send(argparse.Namespace(server_port=port), body=STREAM)
        next(lines(reply))
        process.send_signal(signal.SIGINT)
        started = time.time()
        try:
            assert process.wait(10) == 0 and time.time() - started < 1
        finally:
            process.kill()


# --- in a real browser

class Browser:
    """Headless Chromium, driven by WebDriver's protocol."""

    def __init__(self):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE,
                                       text=True)
        said = next(line for line in self.driver.stdout if "successfully on port" in line)
        self.at = f"http://127.0.0.1:{re.search(r'on port ([0-9]+)', said)[1]}/session"
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu",
                            "--disable-dev-shm-usage", "--window-size=1280,900"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options}
        made = self.ask("", {"capabilities": {"alwaysMatch": wanted}})
        self.at += f"/{made['sessionId']}"

    def ask(self, path, body=None, method=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.at + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read())["value"]

    def open(self, address):
        self.ask("/url", {"url": address})

    def run(self, script):
        return self.ask("/execute/sync", {"script": f"return {script}", "args": []})

    def wait(self, script, seconds: float = 120):
        """What the script gives, once it gives something."""
        end = time.time() + seconds
        while not (found := self.run(script)):
            assert time.time() < end, f"never: {script}; {self.run('document.body.innerText')}"
            time.sleep(0.05)
        return found

    def find(self, css) -> list[str]:
        return [next(iter(found.values())) for found in
                self.ask("/elements", {"using": "css selector", "value": css})]

    def type(self, css, keys):
        self.ask(f"/element/{self.find(css)[0]}/value", {"text": keys})

    def click(self, css):
        self.ask(f"/element/{self.find(css)[0]}/click", {})

    def resize(self, width, height):
        """Of the page; a window has a least width."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.ask("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})

    def close(self):
        self.ask("", method="DELETE")
        self.driver.terminate()
        self.driver.wait()


@pytest.fixture(scope="module")
def browser():
    if not shutil.which("chromedriver"):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def page(browser, server):
    """The page, with its first clips."""
    browser.open(f"http://127.0.0.1:{server.server_port}")
    browser.wait("document.querySelectorAll('figure').length == 7 && !request")
    yield browser
    browser.open("about:blank")
    assert is_free(server)                           # a closed tab ends what it asked for


SHOWN = "cells.get('student').images.map(image => image.src).join()"


def test_page_the_slider_changes_the_clip(page):
    before = page.run(SHOWN)
    drawn = "document.querySelectorAll('canvas')[2].toDataURL()"
    assert page.run("document.querySelectorAll('canvas')[2].width") == 16
    page.click("#play")                              # no frame changes by itself now
    still = page.run(drawn)
    page.type("#steps", "\ue012\ue012")              # twice the left arrow: 2 steps
    assert page.run("document.querySelector('#count').value") == "2"
    page.wait(f"!request && {SHOWN} != '{before}'")
    assert page.run(drawn) != still
    assert "--steps 2" in page.run("cells.get('student').command")


def test_page_the_stream_grows_and_the_prompt_switches(page):
    page.type("#mode", "\ue010")                     # the End key: the last view
    page.wait("asked.mode == 'stream' && cells.get(asked.model)?.live")
    live = "cells.get('student, chunk by chunk').images.length"
    some = page.wait(f"{live} > 8 && {live}")        # the clip has 8 frames
    page.wait(f"{live} > {some}")
    page.type("#prompt select", "blue")
    page.wait("document.querySelector('#bars .new')")
    page.click("figure:not(.old) button")
    command = page.run("document.querySelector('#line').textContent")
    assert "--stream" in command
    assert "'a blue circle moving left'" in command.split("--prompt-at")[1]
    page.click("#play")                              # after a long pause it shows what is new
    made = "cells.get('student, chunk by chunk')"
    page.run(f"({made}.images = Array(600).fill({made}.images[0]), {made}.at = 0)")
    page.wait(f"{made}.images.length == 500 && {made}.at == 0")
    page.click("#play")
    page.wait(f"{made}.at >= 460 && {made}.at < 500", 5)
    # A prompt that changes along with something else begins another stream.
    page.run("(before = asked.id, $('seed').value = 7, $('prompt').querySelector('select').value "
             "= 'green')")
    page.click("#go")
    page.wait(f"asked.id != before && asked.seed == 7 && {made}?.live")
    page.click("#stop")
    stopped = page.run(live)
    time.sleep(0.5)
    assert page.run(live) == stopped and page.run("cells.size") == 1


def test_page_every_view_and_errors(page):
    down, home = "\ue015", "\ue011"
    for key, view, count in ((down, "steps", 4), (down, "strip", 6), (home, "compare", 7)):
        page.type("#mode", key)
        page.wait(f"asked.mode == '{view}' && !request && cells.size == {count}")
    page.type("#seed", "9999999999999")
    assert "seed" in page.wait("document.querySelector('[role=alert]').textContent")
    page.run("(document.querySelector('#seed').value = 5)")
    page.click("#go")
    page.wait("!request && !document.querySelector('[role=alert]').textContent && cells.size == 7")


def test_page_is_usable_by_name_by_keyboard_and_on_a_phone(page):
    page.run("(document.querySelector('#which').hidden = false)")
    controls = page.find("input, select, button, canvas, form")
    names = [page.ask(f"/element/{control}/computedlabel") for control in controls]
    assert len(names) > 20 and all(names), names
    page.run("document.querySelector('#steps').focus()")
    page.type("#steps", "\ue010")                    # the End key
    assert page.run("document.querySelector('#count').value") == "64"
    page.type("#steps", "\ue011")
    for width in (320, 390, 1280):
        page.resize(width, 800)
        assert page.run("document.documentElement.scrollWidth") <= width
