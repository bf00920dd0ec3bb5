#!/usr/bin/env python3
"""Plays a video in an installed Chromium and tells what happened.

Loads FILE in a headless browser, plays its start, seeks to 63 %, plays its end, and decodes its voice with Web
Audio; prints the findings as JSON and exits with 1 where one is wrong. By hand only: no test needs it.
Needs Python 3.9 (standard library only) and `chromium` (or the program named by CHROMIUM).

    scripts/check-playback.py FILE
"""

import http.server
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

TIMEOUT_SECONDS = 90

PAGE = """<!doctype html><title>playback</title><body><script>
const event = (target, name) => new Promise((resolve, reject) => {
  setTimeout(() => reject(new Error('no ' + name)), 20000);
  target.addEventListener(name, resolve, {once: true});
  target.addEventListener('error', () => reject(new Error('media error: ' + target.error?.message)), {once: true});
});
(async () => {
  const found = {};
  try {
    const video = document.createElement('video');
    video.muted = true;
    video.src = '/video.mp4';
    document.body.append(video);
    await event(video, 'loadedmetadata');
    Object.assign(found, {duration: video.duration, width: video.videoWidth, height: video.videoHeight});
    const pause = Math.min(2, video.duration / 2);
    await video.play();
    await new Promise(done => setTimeout(done, pause * 1000));
    video.pause();
    const quality = video.getVideoPlaybackQuality();
    Object.assign(found, {expectedPlayed: pause, played: video.currentTime,
                          frames: quality.totalVideoFrames, dropped: quality.droppedVideoFrames});
    found.seekTo = video.duration * 0.63;
    video.currentTime = found.seekTo;
    await event(video, 'seeked');
    found.seekedTo = video.currentTime;
    video.currentTime = Math.max(0, video.duration - 0.3);
    await event(video, 'seeked');
    video.play();
    await event(video, 'ended');
    found.endedAt = video.currentTime;
    const bytes = await (await fetch('/video.mp4')).arrayBuffer();
    try {
      const voice = await new OfflineAudioContext(1, 48000, 48000).decodeAudioData(bytes);
      found.voice = {duration: voice.duration, channels: voice.numberOfChannels};
      const samples = voice.getChannelData(0), loud = [];
      for (let i = 0; i < samples.length && loud.length < 5; i++)
        if (Math.abs(samples[i]) > 0.3) { loud.push(i); i += 8000; }
      found.voice.loudAt = loud;
    } catch (error) { found.voice = null; }
  } catch (error) { found.error = String(error); }
  await fetch('/found', {method: 'POST', body: JSON.stringify(found)});
})();
</script>"""


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the page and the video, with the ranges that seeking asks for, and takes the findings."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path != "/video.mp4":
            return self.answer(200, PAGE.encode(), "text/html; charset=utf-8")
        size = self.server.video.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        end = min(int(asked[2]) if asked and asked[2] else size - 1, size - 1)
        with self.server.video.open("rb") as file:
            file.seek(start)
            part = file.read(end - start + 1)
        extra = {"Accept-Ranges": "bytes"}
        if asked:
            extra["Content-Range"] = f"bytes {start}-{end}/{size}"
        self.answer(206 if asked else 200, part, "video/mp4", extra)

    def do_POST(self):
        self.server.found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(204, b"", "text/plain")
        self.server.done.set()

    def answer(self, status, body, kind, extra=None):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(extra or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # The browser drops ranges that it no longer wants.

    def handle(self):
        try:
            super().handle()
        except ConnectionResetError:
            pass  # The browser went away.

    def log_message(self, *_):
        pass


def play(video):
    """What the browser finds; None when it does not answer in time."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.video, server.found, server.done = video, None, threading.Event()
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen(
            [os.environ.get("CHROMIUM", "chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
             "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--autoplay-policy=no-user-gesture-required", f"--user-data-dir={profile}",
             f"http://127.0.0.1:{server.server_port}/"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        server.done.wait(TIMEOUT_SECONDS)
        browser.terminate()
        try:
            browser.wait(10)
        except subprocess.TimeoutExpired:
            browser.kill()
    server.shutdown()
    return server.found


def complaints(found):
    if found is None:
        return ["the browser did not answer"]
    if "error" in found:
        return [found["error"]]
    wrong = []
    if found["played"] < found["expectedPlayed"] / 2:
        wrong.append("it hardly played")
    if abs(found["seekedTo"] - found["seekTo"]) > 0.001:
        wrong.append("it did not seek to where it was told")
    if abs(found["endedAt"] - found["duration"]) > 0.05:
        wrong.append("it did not end at its duration")
    if found["voice"] and abs(found["voice"]["duration"] - found["duration"]) > 0.041:
        wrong.append("voice and picture differ by more than a frame")
    return wrong


def main():
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    found = play(Path(sys.argv[1]))
    print(json.dumps(found, indent=1))
    for wrong in complaints(found):
        print(f"wrong: {wrong}", file=sys.stderr)
    raise SystemExit(1 if complaints(found) else 0)


if __name__ == "__main__":
    main()
