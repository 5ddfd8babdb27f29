"""A browser without a window."""

import base64
import json
import os
import subprocess
import time

# Seconds that something may take on a busy machine.
PATIENCE = 60

# Returns the words that are broken in two lines, other than where the page permits it, which is
# where its text nodes end. Digests in sentences may be longer than a line.
BROKEN_WORDS = r"""
(() => {
  const broken = [];
  const boxes = 'h1, td, th, dt, dd, li, .now, .top, .axis, #state';
  for (const box of document.querySelectorAll(boxes)) {
    const texts = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
      for (const { 0: word, index } of texts.currentNode.data.matchAll(/[^ \n]+/g)) {
        const range = document.createRange();
        range.setStart(texts.currentNode, index);
        range.setEnd(texts.currentNode, index + word.length);
        const lines = new Set([...range.getClientRects()].map(line => Math.round(line.top)));
        if (lines.size > 1 && word.length < 32) broken.push(word);
      }
    }
  }
  return broken.join(' ');
})()
"""


class Browser:
    """A browser without a window, which is driven through a pipe."""

    def __init__(self, profile):
        self.requests, requests = os.pipe()
        responses, self.responses = os.pipe()
        command = ["chromium", "--headless=new", "--remote-debugging-pipe", "--no-sandbox"]
        command += ["--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command += ["--hide-scrollbars", f"--user-data-dir={profile}", "about:blank"]

        def connect():
            # The browser expects its pipes at descriptors 3 and 4.
            os.dup2(os.dup(self.requests), 3)
            os.dup2(os.dup(self.responses), 4)
            os.set_inheritable(3, True)
            os.set_inheritable(4, True)

        self.process = subprocess.Popen(
            command, preexec_fn=connect, close_fds=False, stderr=subprocess.DEVNULL
        )
        # Its end is noticed only if nobody else has its pipes.
        os.close(self.requests)
        os.close(self.responses)
        self.write = os.fdopen(requests, "wb", buffering=0)
        self.read = os.fdopen(responses, "rb")
        self.number, self.session, self.console = 0, None, []
        try:
            self.attach()
        except BaseException:
            self.__exit__()
            raise

    def attach(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        self.call("Page.enable")
        self.call("Log.enable")
        self.call("Runtime.enable")

    def call(self, method, **parameters):
        self.number += 1
        request = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            request["sessionId"] = self.session
        self.write.write(json.dumps(request).encode() + b"\0")
        while True:
            message = self.receive()
            if message.get("id") == self.number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def receive(self):
        text = bytearray()
        while (byte := self.read.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has ended")
            text += byte
        message = json.loads(text)
        if message.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
            self.console.append(message["params"])
        return message

    def evaluate(self, script):
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {json.dumps(answer['exceptionDetails'])}")
        return answer["result"].get("value")

    def wait(self, script):
        """Waits until a script returns something else than false, and returns that."""
        deadline = time.monotonic() + PATIENCE
        while not (value := self.evaluate(script)):
            if time.monotonic() > deadline:
                text = self.evaluate("document.body.innerText")
                raise RuntimeError(f"it never happens: {script}; the page shows: {text}")
            time.sleep(0.1)
        return value

    def click(self, element):
        """Clicks the middle of an element, which a script returns."""
        self.evaluate(f"({element}).scrollIntoView({{ block: 'center' }})")
        box = self.evaluate(f"({element}).getBoundingClientRect().toJSON()")
        middle = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **middle)

    def show(self, width, height, scheme):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def picture(self, path, width, scheme, height=None):
        self.show(width, height or 800, scheme)
        whole = height is None
        if whole:
            self.show(width, self.evaluate("document.documentElement.scrollHeight"), scheme)
        overflow = self.evaluate("document.documentElement.scrollWidth > innerWidth")
        if overflow:
            raise RuntimeError(f"{path.name}: the page is wider than the window")
        if broken := self.evaluate(BROKEN_WORDS):
            raise RuntimeError(f"{path.name}: broken within a word: {broken}")
        time.sleep(0.5)
        taken = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(taken["data"]))

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.process.kill()
        self.process.wait()
