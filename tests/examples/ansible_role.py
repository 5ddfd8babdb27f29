"""Checks examples/ansible: syntax, ansible-lint's strictest profile, and the configuration that the
role writes."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from nginx_slice import expect

HOST = "gateway-1.example.org"


def check(root, program, tools):
    binaries = pathlib.Path(sys.executable).parent
    with tempfile.TemporaryDirectory(prefix="hexz-nbd-ansible-") as temporary:
        folder = pathlib.Path(temporary)
        shutil.copytree(root / "examples/ansible", folder / "ansible")
        environment = {
            **os.environ,
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "HOME": temporary,
            "ANSIBLE_NOCOLOR": "1",
        }

        def run(name, *words):
            done = subprocess.run(
                [binaries / name, *words],
                cwd=folder / "ansible",
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            expect(done.returncode == 0, f"{name}: {done.stdout}{done.stderr}")

        run("ansible-playbook", "-i", "inventory.yml", "site.yml", "--syntax-check")
        run("ansible-lint", "--offline", "--strict", "--profile", "production", "--nocolor", ".")
        yield "the playbook's syntax is right, and ansible-lint's production profile is met"

        # The role's template, with the variables of the inventory.
        for words in (["init"], ["server", HOST]):
            subprocess.run([program, "pki", *words], cwd=folder, check=True, capture_output=True)
        (folder / "archives").mkdir()
        # As a part of the role, so that its defaults apply.
        (folder / "ansible/roles/hexz_nbd/tasks/render.yml").write_text(
            "- ansible.builtin.template:\n    src: hexz-nbd.toml.j2\n"
            f"    dest: {folder}/hexz-nbd.toml\n    mode: '0644'\n"
        )
        (folder / "ansible/render.yml").write_text(
            "- hosts: gateways[0]\n  connection: local\n  gather_facts: false\n  tasks:\n"
            "    - ansible.builtin.import_role:\n        name: hexz_nbd\n"
            "        tasks_from: render.yml\n"
        )
        run(
            "ansible-playbook",
            "-i",
            "inventory.yml",
            "render.yml",
            "-e",
            '{"hexz_nbd_options": {"max-connections": 1000, "watch": true}}',
            "-e",
            f"hexz_nbd_export_dir={folder}/archives",
            "-e",
            f"ansible_python_interpreter={sys.executable}",
        )
        text = (folder / "hexz-nbd.toml").read_text()
        expect("max-connections = 1000\nwatch = true" in text and "192.0.2.10" in text, text)
        text = text.replace("/etc/hexz-nbd", f"{folder}/pki/servers/{HOST}")
        (folder / "hexz-nbd.toml").write_text(text)
        command = [program, "--config", folder / "hexz-nbd.toml", "--check-config"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        expect(done.returncode == 0, f"--check-config: {done.stderr}")
        yield "the configuration that the role writes is valid"
