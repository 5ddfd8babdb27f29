#!/usr/bin/python3
"""Records the first steps of the README in a terminal, as the animated picture first-steps.svg.

    record.py PYTHON

PYTHON is an interpreter that has the package hexz, such as target/hexz/bin/python. hexz-nbd and
nbdcopy have to be in PATH, and port 10809 has to be free. The picture shows what the commands have
printed, wrapped like in a terminal.
"""

import html
import os
import pathlib
import subprocess
import sys
import tempfile

# Commands, and whether they keep running. Before the last ones, another terminal is opened.
PACK = """hexz-tools/bin/python -c 'import hexz; hexz.pack("disk.img", "snap.hexz")'"""
SIZES = "du -bh disk.img snap.hexz"
SERVE = "hexz-nbd snap.hexz"
CLIENT = [
    "nbdinfo --size nbd://localhost",
    "nbdcopy nbd://localhost copy.img",
    "cmp disk.img copy.img && echo identical",
]
IMAGE = "/sbin/mke2fs -q -t ext4 -d /usr/share/common-licenses disk.img 16M"

COLUMNS = 98
CHARACTER = 8.4
LINE = 20
MARGIN = 20
TITLE = 30

# Seconds.
TYPED_PER_CHARACTER = 0.03
PAUSE = 0.7
AT_THE_END = 5


def run(command):
    """Returns the lines that a command prints."""
    ended = subprocess.run(
        ["bash", "-c", command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if ended.returncode != 0:
        raise SystemExit("%s: %s" % (command, ended.stdout))
    return ended.stdout.expandtabs().splitlines()


def record(python):
    """Returns the lines of the terminal, each with its kind: command, output or note."""
    os.makedirs("hexz-tools/bin")
    # A link would lose the packages of the environment.
    pathlib.Path("hexz-tools/bin/python").write_text('#!/bin/sh\nexec "%s" "$@"\n' % python)
    os.chmod("hexz-tools/bin/python", 0o755)
    run(IMAGE)
    lines = []
    for command in (PACK, SIZES):
        lines.append(("command", command))
        lines += [("output", line) for line in run(command)]
    lines.append(("command", SERVE))
    server = subprocess.Popen(SERVE.split(), stderr=subprocess.PIPE, text=True)
    try:
        for line in server.stderr:
            if "ready: " in line:
                lines.append(("output", line.rstrip()))
                break
        lines.append(("note", "another terminal"))
        for command in CLIENT:
            lines.append(("command", command))
            lines += [("output", line) for line in run(command)]
    finally:
        server.terminate()
        server.communicate()
    return [wrapped for kind, text in lines for wrapped in wrap(kind, text)]


def wrap(kind, text):
    return [(kind, text[at : at + COLUMNS]) for at in range(0, len(text), COLUMNS)]


def draw(lines):
    """Returns the picture. Without animations, it shows the last frame."""
    times, now = [], 0.5
    for kind, text in lines:
        typing = len(text) * TYPED_PER_CHARACTER if kind == "command" else 0
        times.append((now, now + typing))
        now += typing + (PAUSE if kind != "output" else 0.2)
    total = now + AT_THE_END

    rules, texts = [], []
    for number, ((kind, text), (begin, end)) in enumerate(zip(lines, times)):
        y = TITLE + MARGIN + LINE * number
        begin, end = 100 * begin / total, 100 * end / total
        rules.append(
            "@keyframes shown%d { 0%%, %.2f%% { opacity: 0 } %.2f%%, 100%% { opacity: 1 } }"
            % (number, begin, begin + 0.01)
        )
        animation = "animation: shown%d %.1fs infinite" % (number, total)
        if kind == "command":
            rules.append(
                "@keyframes typed%d { 0%%, %.2f%% { clip-path: inset(0 100%% 0 0);"
                " animation-timing-function: steps(%d) }"
                " %.2f%%, 100%% { clip-path: inset(0 0 0 0) } }"
                % (number, begin, len(text), end)
            )
            typed = "animation: typed%d %.1fs infinite" % (number, total)
            texts.append(
                '<text class="prompt" x="%d" y="%d" style="%s">$</text>' % (MARGIN, y, animation)
            )
            texts.append(element(kind, MARGIN + 2 * CHARACTER, y, typed, text))
        elif kind == "note":
            texts.append(
                '<path class="rule" d="M0 %d H%d" style="%s"/>' % (y - 5, width(), animation)
            )
            texts.append(
                '<rect class="background" x="%d" y="%d" width="%d" height="%d" style="%s"/>'
                % (MARGIN, y - 15, (len(text) + 2) * CHARACTER, LINE, animation)
            )
            texts.append(element(kind, MARGIN + CHARACTER, y, animation, text))
        else:
            texts.append(element(kind, MARGIN, y, animation, text))

    height = TITLE + MARGIN + LINE * len(lines)
    said = "; ".join(text for kind, text in lines if kind == "command")
    return PICTURE % {
        "width": width(),
        "height": height,
        "title": html.escape("Terminal: " + said),
        "rules": "\n".join(rules),
        "texts": "\n".join(texts),
    }


def width():
    return round(COLUMNS * CHARACTER) + 2 * MARGIN


def element(kind, x, y, style, text):
    return '<text class="%s" x="%.1f" y="%d" textLength="%.1f" style="%s">%s</text>' % (
        kind,
        x,
        y,
        len(text) * CHARACTER,
        style,
        html.escape(text, quote=False),
    )


PICTURE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %(width)d %(height)d" role="img">
<title>%(title)s</title>
<style>
text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre }
.background { fill: #0d1117 }
.prompt { fill: #7ee787 }
.command { fill: #f0f6fc }
.output { fill: #9da7b3 }
.note { fill: #79c0ff }
.rule { stroke: #30363d }
@media (prefers-reduced-motion: reduce) { text, path, rect { animation: none !important } }
%(rules)s
</style>
<rect class="background" width="%(width)d" height="%(height)d" rx="8"/>
<circle cx="20" cy="17" r="6" fill="#ff5f56"/>
<circle cx="40" cy="17" r="6" fill="#ffbd2e"/>
<circle cx="60" cy="17" r="6" fill="#27c93f"/>
%(texts)s
</svg>
"""


def main():
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    python = os.path.abspath(sys.argv[1])
    picture = pathlib.Path(__file__).resolve().with_name("first-steps.svg")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        lines = record(python)
        os.chdir("/")
    picture.write_text(draw(lines))


if __name__ == "__main__":
    main()
