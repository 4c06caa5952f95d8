"""A Dockerfile carried out without an engine: each stage is a root of its own, each RUN a shell in it.

A root begins as a bare Debian, made by debootstrap, whatever the FROM line names: what is shown is that every
command works on a machine with nothing installed, not that an image of that name is fine. In the place of an
image of Python there is Debian's Python.

What this machine's apt and pip need to reach their registries is taken along. Needs root, and Debian's
packages debootstrap and util-linux.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

SUITE = "bookworm"
_WAYS_OUT = ("etc/apt", "etc/pip.conf", "etc/xdg/pip", "etc/ssl", "etc/resolv.conf", "etc/hosts")
_LOCAL_PATHS = re.compile(r"(?:file://|find-links=')(/[\w./-]+)")


@dataclass
class Stage:
    """What is between two FROM lines."""

    base: str
    name: str
    lines: list[tuple[str, str]]  # instruction and the rest, continued lines joined


@dataclass
class Image:
    """A root, and what the instructions have said about its processes."""

    root: Path
    environment: dict[str, str]
    folder: str = "/"
    user: str = "root"
    entrypoint: list[str] = field(default_factory=list)
    check: list[str] = field(default_factory=list)

    def argv(self, command: list[str]) -> list[str]:
        """Runs a command inside, with /proc and /dev of its own."""
        inside = f"cd {shlex.quote(self.folder)} && exec {shlex.join(command)}"
        mounts = (
            f"mount --bind /dev {self.root}/dev && mount -t proc proc {self.root}/proc && "
            f"exec chroot --userspec={self.user} {self.root} /bin/sh -c {shlex.quote(inside)}"
        )
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", mounts]

    def run(self, command: list[str], timeout_s: float = 1800) -> str:
        """What it prints."""
        done = subprocess.run(
            self.argv(command),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-4000:]}"
        return done.stdout


def stages_of(dockerfile: str) -> list[Stage]:
    text = re.sub(r"^\s*#.*\n", "", dockerfile, flags=re.M)
    text = text.replace("\\\n", "")
    stages: list[Stage] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(base, name, []))
        elif stages:  # before the first one there are arguments of FROM lines only
            stages[-1].lines.append((instruction, rest.strip()))
    return stages


def build(dockerfile: Path, context: Path, folder: Path) -> Image:
    """Carry all stages out in roots below `folder`; the last one is the image."""
    bare = _bare_root(folder / "bare")
    built: dict[str, Image] = {}
    for number, stage in enumerate(stages_of(dockerfile.read_text())):
        image = _begin(bare, folder / f"stage{number}")
        if "python" in stage.base:
            image.run(["apt-get", "update"])
            image.run(["apt-get", "install", "-y", "--no-install-recommends", "python3", "python3-venv"])
        for instruction, rest in stage.lines:
            _carry_out(instruction, rest, image, context, built)
        built[stage.name] = image
    return image


def _bare_root(root: Path) -> Path:
    mirror = re.search(r"^(?:URIs:|deb(?: \[.*?\])?) *(\S+)", _sources(), re.M)
    assert mirror is not None
    subprocess.run(
        ["debootstrap", "--variant=minbase", "--include=ca-certificates", SUITE, root, mirror[1]], check=True
    )
    return root


def _sources() -> str:
    files = [*Path("/etc/apt/sources.list.d").glob("*.sources"), *Path("/etc/apt").glob("sources.list")]
    return "\n".join(file.read_text() for file in files)


def _begin(bare: Path, root: Path) -> Image:
    subprocess.run(["cp", "-a", bare, root], check=True)
    configuration = subprocess.run(
        ["pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    local = [path.lstrip("/") for path in _LOCAL_PATHS.findall(configuration)]
    for path in (*_WAYS_OUT, *local):
        if (source := Path("/", path)).exists():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-aT", "--remove-destination", source, root / path], check=True)
    ways_out = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("PIP_") or "proxy" in name.lower()
    }
    return Image(
        root, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"} | ways_out
    )


def _carry_out(instruction: str, rest: str, image: Image, context: Path, built: dict[str, Image]) -> None:
    match instruction:
        case "RUN":
            image.run(["/bin/sh", "-c", rest])
        case "COPY":
            _copy(rest.split(), image, context, built)
        case "ENV":
            for word in shlex.split(rest):
                name, _, value = word.partition("=")
                image.environment[name] = value.replace("$PATH", image.environment["PATH"])
        case "ARG":
            name, _, value = rest.partition("=")
            image.environment[name] = value
        case "WORKDIR":
            (image.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            image.folder = rest
        case "USER":
            image.user = rest
        case "ENTRYPOINT":
            image.entrypoint = json.loads(rest)
        case "HEALTHCHECK":
            image.check = json.loads(rest.partition("CMD ")[2])
        case "EXPOSE" | "STOPSIGNAL":
            pass
        case _:
            raise AssertionError(f"{instruction} is not known here")


def _copy(words: list[str], image: Image, context: Path, built: dict[str, Image]) -> None:
    source, ignore = context, _ignored
    if words[0].startswith("--from="):
        source, ignore = built[words.pop(0).removeprefix("--from=")].root, None
    *names, where = words
    target = image.root / str(Path(image.folder, where)).lstrip("/")
    for name in names:
        found = source / name.lstrip("/")
        place = target / found.name if where.endswith("/") else target
        if found.is_dir():
            shutil.copytree(found, place, symlinks=True, ignore=ignore, dirs_exist_ok=True)
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, place)


def _ignored(folder: str, names: list[str]) -> set[str]:
    """As .dockerignore says; and what was compiled here, which a clean clone does not have."""
    return {name for name in names if name == "__pycache__" or name.endswith(".so")}
