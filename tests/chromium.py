"""A page in headless Chromium, driven over its debugging pipe: what a reader does in the report, without a package."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile

PATH = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    def __init__(self):
        """One browser with one page, and no network."""
        read, self.out = os.pipe()
        self.into, write = os.pipe()
        read, write = (fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (read, write))  # Chromium wants them as 3 and 4
        self.profile = tempfile.mkdtemp()
        command = [PATH, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                   "--proxy-server=localhost:9", "--hide-scrollbars", "--remote-debugging-pipe",
                   f"--user-data-dir={self.profile}", "about:blank"]
        shell = ["bash", "-c", f'exec 3<&{read} 4>&{write}; exec "$@"', "bash", *command]
        self.process = subprocess.Popen(shell, pass_fds=(read, write), stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self.rest, self.count, self.session, self.errors = b"", 0, None, []
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime"):
            self.send(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.rest:
            if not (more := os.read(self.into, 1 << 20)):
                raise RuntimeError("Chromium ended")
            self.rest += more
        one, self.rest = self.rest.split(b"\0", 1)
        one = json.loads(one)
        if one.get("method") == "Runtime.exceptionThrown":
            self.errors.append(one["params"]["exceptionDetails"]["exception"].get("description"))
        return one

    def send(self, method, **params):
        self.count += 1
        session = dict(sessionId=self.session) if self.session else {}
        request = dict(id=self.count, method=method, params=params) | session
        os.write(self.out, json.dumps(request).encode() + b"\0")
        while (answer := self.message()).get("id") != self.count:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def look(self, width=1440, height=1000, media="screen", dark=False):
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self.send("Emulation.setEmulatedMedia", media=media, features=[scheme])

    def open(self, file):
        self.send("Page.navigate", url=file.resolve().as_uri())
        while self.message().get("method") != "Page.loadEventFired":
            pass

    def run(self, script):
        """The value of `script`, which may await."""
        answer = self.send("Runtime.evaluate", expression=f"(async () => {{ {script} }})()", awaitPromise=True,
                           returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description"))
        return answer["result"].get("value")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, text="\r" if key == "Enter" else "",
                      windowsVirtualKeyCode=dict(ArrowRight=39, Enter=13, Escape=27, Tab=9)[key])

    def screenshot(self, file, whole=False):
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))

    def pdf(self, file):
        self.send("Emulation.setEmulatedMedia", media="")
        found = self.send("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        file.write_bytes(base64.b64decode(found["data"]))

    def close(self):
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.profile, ignore_errors=True)
