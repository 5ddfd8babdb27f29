#!/usr/bin/python3
"""Follows README.md in a clean Debian, from nothing to verified bytes.

    tests/first-hour/run.py [--help]

The commands are taken from the page, and typed as they are, by a user of the new system who may use
sudo. Their output is compared with the page. What is printed is the time that each of them took. As
root: the system is a folder, in mount and process namespaces that end with the test.
"""

import argparse
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
INSIDE = "HEXZ_NBD_FIRST_HOUR_INSIDE"
# Sections of a page that are followed, or all.
PAGES = {"README.md": ["Install", "Try it"], "docs/create-snapshots.md": None}
# Blocks that can't be run in a folder, by the reasons that the pages give.
NOT_RUN = ["needs root"]
USER = "you"
HOME = f"/home/{USER}"
CLONE = f"{HOME}/hexz-nbd"
# Settings of this machine's network.
PASSED = ["http_proxy", "https_proxy", "no_proxy", "PIP_INDEX_URL"]
PATIENCE = 3 * 3600


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    installed = parser.add_mutually_exclusive_group()
    installed.add_argument(
        "--program", type=pathlib.Path, help="install this program instead of building it"
    )
    installed.add_argument(
        "--package", type=pathlib.Path, help="install this Debian package instead of building it"
    )
    parser.add_argument(
        "--toolchain",
        type=pathlib.Path,
        help="use the Rust in this folder, which `rustc --print sysroot` prints, instead of rustup",
    )
    parser.add_argument(
        "--ca",
        type=pathlib.Path,
        help="trust these certificates (PEM): for networks whose proxy has a CA of its own",
    )
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        default=ROOT / "target/first-hour",
        help="where the system is created, on a file system with 8 GB if something is built",
    )
    parser.add_argument("page", nargs="?", default="README.md", choices=PAGES)
    return parser.parse_args()


class Block:
    """Commands that are typed one after another, with the output that the page shows."""

    def __init__(self, line, section, before, reason):
        self.line = line
        self.section = section
        # A page says where commands are typed while a server runs.
        self.is_elsewhere = "another terminal" in before
        # Why the documentation tests don't run the block.
        self.reason = reason
        self.commands = []

    def add(self, lines, has_prompts):
        lines = iter(lines)
        for line in lines:
            if has_prompts and not line.startswith("$ "):
                self.commands[-1][1].append(line)
                continue
            text = line.removeprefix("$ ") if has_prompts else line
            while text.endswith("\\"):
                text += "\n" + next(lines)
            if text:
                self.commands.append((text, []))


def blocks(page):
    """Returns the blocks of commands; tests/integration/documents/page.rs describes the markup."""
    found, section, before, reason = [], "", "", None
    lines = enumerate((ROOT / page).read_text().splitlines(), 1)
    was_blank, pushed = True, []
    while pushed or (following := next(lines, None)):
        number, line = pushed.pop() if pushed else following
        starts, was_blank = was_blank, not line.strip()
        if line.startswith("## "):
            section = line.removeprefix("## ")
        if note := re.fullmatch(r"<!-- (?:not run: )?(.*) -->", line):
            reason, was_blank = note[1], True
        elif line.startswith("```"):
            inside = []
            while (following := next(lines))[1] != "```":
                inside.append(following[1])
            if line == "```console":
                found.append(Block(number, section, before, reason))
                found[-1].add(inside, True)
            before, reason = "", None
        elif starts and line.startswith("    "):
            inside = [line[4:]]
            while (following := next(lines, None)) and re.match(r"    |$", following[1]):
                inside.append(following[1][4:])
            pushed = [following] if following else []
            found.append(Block(number, section, before, reason))
            found[-1].add(inside, False)
            before, reason, was_blank = "", None, True
        else:
            before += line + " "
    return found


def pattern(shown):
    """Returns the expression for output that a page shows, in which … stands for any text."""
    lines = [
        r"(?:.*\n)*" if line == "…" else ".*".join(map(re.escape, line.split("…"))) + r"\n"
        for line in shown
    ]
    return re.compile("".join(lines))


class Failed(Exception):
    pass


class Terminal:
    """A login shell of the user."""

    MARK = "=== the command has ended with"

    def __init__(self, root, variables):
        environment = {"HOME": HOME, "USER": USER, "LOGNAME": USER, "LANG": "C.UTF-8", **variables}
        self.shell = subprocess.Popen(
            ["chroot", f"--userspec={USER}:{USER}", root, "/usr/bin/env", "-i"]
            + [f"{name}={value}" for name, value in environment.items()]
            + ["PATH=/usr/local/bin:/usr/bin:/bin", "bash", "--login"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.printed = ""
        self.changed = threading.Condition()
        threading.Thread(target=self.read, daemon=True).start()
        self.run(f"cd {CLONE}", [])

    def read(self):
        while text := self.shell.stdout.readline():
            with self.changed:
                self.printed += text
                self.changed.notify()

    def type(self, command):
        self.printed = ""
        # Nobody is there to answer questions.
        self.shell.stdin.write(
            f"eval {shlex.quote(command)} < /dev/null; printf '\\n{self.MARK} %s\\n' $?\n"
        )
        self.shell.stdin.flush()

    def wait_for(self, expression, command, seconds):
        """Waits until the output contains an expression, and returns the match."""

        def found():
            return re.search(expression, self.printed) or self.shell.poll() is not None

        with self.changed:
            match = self.changed.wait_for(found, seconds)
            if not isinstance(match, re.Match):
                raise Failed(f"{command}\n{self.printed}")
            return match

    def end(self, command, shown):
        """Waits for the end of a command."""
        code = self.wait_for(f"\n{self.MARK} ([0-9]+)\n", command, PATIENCE)
        printed = self.printed[: code.start()].rstrip("\n") + "\n"
        if code[1] != "0":
            raise Failed(f"{command}\n{printed}\nit ended with {code[1]}")
        if shown and not pattern(shown).fullmatch(printed):
            raise Failed(f"{command}\n{printed}\nis not\n" + "\n".join(shown))

    def run(self, command, shown):
        self.type(command)
        self.end(command, shown)

    def interrupt(self, command):
        """Types Ctrl-C, which ends a server."""
        children = pathlib.Path(f"/proc/{self.shell.pid}/task/{self.shell.pid}/children")
        for child in children.read_text().split():
            os.kill(int(child), signal.SIGINT)
        self.end(command, [])


class System:
    """A new Debian, with the terminals of its user."""

    def __init__(self, options):
        self.options = options
        self.root = options.folder / "root"
        variables = {name: os.environ[name] for name in PASSED if name in os.environ}
        if options.ca:
            shutil.copy(options.ca, self.root / "etc/first-hour.pem")
            names = ["PIP_CERT", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "CARGO_HTTP_CAINFO"]
            variables |= dict.fromkeys(names, "/etc/first-hour.pem")
        self.variables = variables
        self.terminal = None
        # The terminal and the command of the server that runs.
        self.serving = None
        self.total = 0

    def prepare(self):
        """Makes what an installed Debian has, and debootstrap doesn't: a user who may use sudo, and
        whom apt doesn't ask.
        """
        root = self.root
        for arguments in (
            ["--make-rprivate", "/"],
            ["-t", "proc", "proc", "/proc"],
            ["-t", "proc", "proc", root / "proc"],
            ["--rbind", "/dev", root / "dev"],
            ["-t", "tmpfs", "tmpfs", root / "run"],
        ):
            subprocess.run(["mount", *arguments], check=True)
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        shutil.copy("/etc/hosts", root / "etc/hosts")
        (root / "etc/hostname").write_text("localhost\n")
        (root / "etc/apt/apt.conf.d/90yes").write_text('APT::Get::Assume-Yes "true";\n')
        policy = root / "usr/sbin/policy-rc.d"
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
        self.inside("apt-get", "update", "-q")
        self.inside("apt-get", "install", "-q", "--no-install-recommends", "sudo")
        self.inside("useradd", "--create-home", "--shell", "/bin/bash", USER)
        sudoers = root / "etc/sudoers.d/first-hour"
        sudoers.write_text(f"{USER} ALL=(ALL:ALL) NOPASSWD: ALL\n")
        sudoers.chmod(0o440)
        self.copy_repository()
        self.inside("chown", "--recursive", f"{USER}:{USER}", CLONE)
        if self.options.toolchain:
            (root / "opt/rust").mkdir()
            mounted = ["--bind", "-o", "ro", self.options.toolchain, root / "opt/rust"]
            subprocess.run(["mount", *mounted], check=True)
        self.terminal = Terminal(self.root, self.variables)

    def copy_repository(self):
        """Copies what a clone would contain, with changes that aren't committed yet."""
        git = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others"]
        listed = subprocess.run(
            [*git, "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
        )
        for name in filter(None, listed.stdout.split("\0")):
            source, target = ROOT / name, pathlib.Path(f"{self.root}{CLONE}/{name}")
            if os.path.lexists(source):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)

    def inside(self, *command):
        ended = subprocess.run(
            ["chroot", self.root, *command], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if ended.returncode:
            raise Failed(f"{shlex.join(command)}\n{ended.stdout}{ended.stderr}")

    def timed(self, command, action):
        started = time.monotonic()
        action()
        seconds = time.monotonic() - started
        self.total += seconds
        print(f"{seconds:8.1f} s  {command.splitlines()[0]}", flush=True)

    def run(self, command):
        self.timed(command, lambda: self.terminal.run(command, []))

    def install_given(self):
        """Installs what the options name."""
        given = self.options.program or self.options.package
        copied = f"/tmp/{given.name}"
        shutil.copy(given, str(self.root) + copied)
        if self.options.package:
            self.run(f"sudo apt install {copied}")
        else:
            self.run(f"sudo install {copied} /usr/local/bin/hexz-nbd")

    def use_toolchain(self):
        """Does what rustup does at its end."""
        path = 'export PATH="$HOME/.cargo/bin:/opt/rust/bin:$PATH"'
        self.run(f"mkdir -p ~/.cargo && echo {shlex.quote(path)} > ~/.cargo/env")
        self.run("echo '. \"$HOME/.cargo/env\"' >> ~/.profile")
        self.run('. "$HOME/.cargo/env"')

    def follow(self, block):
        if self.serving and not block.is_elsewhere:
            self.stop()
        terminal = self.terminal
        if block.is_elsewhere:
            terminal = Terminal(self.root, self.variables)
        for command, shown in block.commands:
            if any("ready: " in line for line in shown):
                terminal.type(command)
                started = pattern(shown)
                self.timed(command, lambda: terminal.wait_for(started, command, 60))
                self.serving = (terminal, command)
            else:
                self.timed(command, lambda: terminal.run(command, shown))

    def stop(self):
        terminal, command = self.serving
        self.serving = None
        self.timed(f"Ctrl-C: {command}", lambda: terminal.interrupt(command))


def follow(options):
    """Follows the page, in namespaces of its own."""
    system = System(options)
    system.prepare()
    page = options.page
    sections = PAGES[page]
    followed = [b for b in blocks(page) if not sections or b.section in sections]
    lacking = set(sections or []) - {block.section for block in followed}
    if lacking:
        raise Failed(f"{page} has no commands in {', '.join(lacking)}")
    is_given = options.program or options.package
    if is_given:
        print("instead of building the program:")
        system.install_given()
        followed = [block for block in followed if block.section != "Install"]
    elif not sections:
        raise Failed(f"{page} doesn't build the program: name one with --program or --package")
    if page == "docs/create-snapshots.md":
        # One of the names of docs/README.md.
        archive = ROOT / "tests/archives/base-zstd.hxz"
        shutil.copy(archive, f"{system.root}{CLONE}/monday.hexz")
    print(f"{page}, from line {followed[0].line}:", flush=True)
    for block in followed:
        if block.reason in NOT_RUN:
            print(f"{page}:{block.line} is not run: it {block.reason}")
        elif block.reason == "installs Rust" and options.toolchain:
            print("instead of rustup:")
            system.use_toolchain()
        else:
            try:
                system.follow(block)
            except Failed as failure:
                raise Failed(f"{page}:{block.line}: {failure}") from None
    if system.serving:
        system.stop()
    commands = [command for block in followed for command in block.commands]
    if sections and not any(shown == ["identical"] for _, shown in commands):
        raise Failed(f"{page} doesn't compare what was read")
    print(f"{system.total:8.1f} s  in total, and nothing went wrong")


def main():
    options = arguments()
    if os.environ.get(INSIDE):
        try:
            return follow(options)
        except Failed as failure:
            sys.exit(f"FAILED: {failure}")
    if os.geteuid():
        sys.exit(f"{sys.argv[0]} takes root; make first-hour calls it by sudo")
    base = ROOT / "target/package-root.tar"
    subprocess.run([ROOT / "tests/package/root.sh", base], check=True)
    root = options.folder / "root"
    # Left by a test that was killed; its mounts have ended with it.
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    subprocess.run(["tar", "-C", root, "-xf", base], check=True)
    root.chmod(0o755)
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
    try:
        ended = subprocess.run(
            [*unshare, sys.executable, __file__, *sys.argv[1:]],
            env={**os.environ, INSIDE: "1"},
        )
    finally:
        shutil.rmtree(root)
    return ended.returncode


if __name__ == "__main__":
    sys.exit(main())
