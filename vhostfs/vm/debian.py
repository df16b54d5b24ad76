# SPDX-License-Identifier: Apache-2.0
"""A private apt root: resolves, downloads and opens Debian packages without touching the host's own apt.

Must not know what the packages are for. Every download is checked by apt against Debian's archive keyring.
Specification: sources.list(5), apt.conf(5), deb(5), deb-control(5).
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tarfile
import time
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from vhostfs.vm.cache import Progress, locked, quiet, write_atomically
from vhostfs.vm.errors import VmError

KEYRINGS = (
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
)
LISTS_MAX_AGE_S = 7 * 24 * 3600
_CODENAMES = frozenset(
    {"buster", "bullseye", "bookworm", "trixie", "forky", "duke", "sid"}
    | {"unstable", "testing", "stable", "oldstable", "oldoldstable"}
)
_SCHEMES = frozenset({"http", "https", "file", "mirror+file", "mirror+http"})
_PACKAGE_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
# What of the host's own configuration the private root keeps: how to reach the network, nothing else.
# Hooks, cache folders and pins of the host must not run or apply here.
_KEPT_OPTIONS = re.compile(
    r"Acquire::(https?|ftp|socks|tor)(::|$)|Acquire::(Retries|ForceIPv[46]|Check-Valid-Until|Check-Date|Proxy)",
    re.IGNORECASE,
)


class Release(Enum):
    """A Debian release together with the suites of it that are used."""

    BOOKWORM = "bookworm"
    TRIXIE = "trixie"

    @property
    def archive_suites(self) -> tuple[str, ...]:
        """Suites on the main archive."""
        name = self.value
        if self is Release.TRIXIE:
            return (name, f"{name}-updates", f"{name}-backports")
        return (name, f"{name}-updates")

    @property
    def security_suite(self) -> str:
        """The suite on the security archive."""
        return f"{self.value}-security"


@dataclass(frozen=True, slots=True)
class Mirrors:
    """Base URIs of Debian's two archives."""

    archive: str
    security: str


OFFICIAL = Mirrors("http://deb.debian.org/debian", "http://deb.debian.org/debian-security")


@dataclass(frozen=True, slots=True)
class Source:
    """One (URI, suite) pair of binary packages that the host's apt uses."""

    uri: str
    suite: str


def parse_one_line_sources(text: str) -> list[Source]:
    """The sources of a sources.list in one-line format; lines that are not understood are passed over."""
    found = []
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[[^\]]*\]\s+)?(\S+)\s+(\S+)", line)
        if match:
            found.append(Source(match[1], match[2]))
    return found


def parse_deb822_sources(text: str) -> list[Source]:
    """The enabled binary sources of a .sources file in deb822 format."""
    found = []
    for stanza in parse_stanzas(text):
        fields = {name.lower(): value.split() for name, value in stanza.items()}
        if fields.get("enabled", ["yes"])[:1] in (["no"], ["false"], ["0"]):
            continue
        if "deb" not in fields.get("types", []):
            continue
        for uri in fields.get("uris", []):
            found += [Source(uri, suite) for suite in fields.get("suites", [])]
    return found


def parse_stanzas(text: str) -> Iterator[dict[str, str]]:
    """The stanzas of a deb822 text, comment lines left out, continued lines joined by a newline."""
    stanza: dict[str, str] = {}
    last = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if stanza:
                yield stanza
            stanza, last = {}, ""
        elif line[0] in " \t":
            if last:
                stanza[last] += "\n" + line.strip()
        elif ":" in line:
            last, _, value = line.partition(":")
            stanza[last] = value.strip()


def choose_mirrors(sources: Iterable[Source]) -> Mirrors:
    """The host's own mirrors of Debian's archives, the official ones where it has none.

    Only sources with a Debian codename as suite count: another distribution's or vendor's are not taken.
    """
    archive = security = None
    for source in sources:
        suite = source.suite.rstrip("/")
        if suite.partition("-")[0].partition("/")[0] not in _CODENAMES:
            continue
        if urllib.parse.urlsplit(source.uri).scheme not in _SCHEMES:
            continue
        uri = source.uri.rstrip("/") if not source.uri.startswith("mirror+") else source.uri
        if suite.endswith(("-security", "/updates")):
            security = security or uri
        elif suite in _CODENAMES and _is_whole_archive(uri):
            archive = archive or uri
    return Mirrors(archive or OFFICIAL.archive, security or OFFICIAL.security)


def _is_whole_archive(uri: str) -> bool:
    # Vendors' repositories use Debian's codenames as suites too, but not Debian's path.
    return uri.startswith("mirror+file:") or bool(re.search(r"/debian$", urllib.parse.urlsplit(uri).path))


def host_sources(etc_apt: Path = Path("/etc/apt")) -> list[Source]:
    """Every readable source of the host's apt, in apt's order."""
    found: list[Source] = []
    files = [etc_apt / "sources.list"]
    with contextlib.suppress(OSError):
        files += sorted((etc_apt / "sources.list.d").iterdir())
    for path in files:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if path.suffix == ".list":
            found += parse_one_line_sources(text)
        elif path.suffix == ".sources":
            found += parse_deb822_sources(text)
    return found


def sources_text(release: Release, mirrors: Mirrors, keyring: Path, types: str = "deb") -> str:
    """The private root's sources in deb822 format; `types` is "deb" or "deb-src"."""
    return (
        f"Types: {types}\nURIs: {mirrors.archive}\nSuites: {' '.join(release.archive_suites)}\n"
        f"Components: main\nSigned-By: {keyring}\n\n"
        f"Types: {types}\nURIs: {mirrors.security}\nSuites: {release.security_suite}\n"
        f"Components: main\nSigned-By: {keyring}\n"
    )


def configuration_text(root: Path, host_dump: str, is_root: bool) -> str:
    """The private root's apt.conf: all folders inside `root`, the host's network options, nothing else of
    the host's.

    `host_dump` is the output of `apt-config dump`.
    """
    lines = [
        f'Dir "{root}/";',
        'Dir::Etc "etc";',
        'Dir::Etc::parts "/dev/null";',
        'Dir::Etc::main "/dev/null";',
        'Dir::Etc::sourcelist "/dev/null";',
        'Dir::Etc::sourceparts "sources.list.d";',
        'Dir::Etc::preferences "/dev/null";',
        'Dir::Etc::preferencesparts "/dev/null";',
        'Dir::Etc::netrc "/etc/apt/auth.conf";',
        'Dir::Etc::netrcparts "/etc/apt/auth.conf.d";',
        'Dir::Etc::trusted "/dev/null";',
        'Dir::Etc::trustedparts "/dev/null";',
        'Dir::State "state";',
        'Dir::State::lists "lists";',
        f'Dir::State::status "{root}/state/status";',
        'Dir::Cache "cache";',
        'Dir::Cache::archives "archives";',
        f'Dir::Log "{root}/log";',
        'APT::Architecture "amd64";',
        'APT::Architectures { "amd64"; };',
        'APT::Install-Recommends "false";',
        'APT::Install-Suggests "false";',
        'APT::Get::Assume-Yes "true";',
        'Acquire::Languages "none";',
        # Without a privilege to drop, and in a cache that the sandbox user may not enter.
        'APT::Sandbox::User "root";' if is_root else 'APT::Sandbox::User "";',
    ]
    for line in host_dump.splitlines():
        if _KEPT_OPTIONS.match(line) and not re.search(r'\s"";$', line):
            lines.append(line)
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class AptRoot:
    """One release's private apt root in `path`; make one with `open_root`."""

    release: Release
    path: Path
    progress: Progress = quiet
    types: str = "deb"
    """What it knows of: binary packages ("deb") or source packages ("deb-src")."""

    def resolve(self, packages: Iterable[str]) -> list[Path]:
        """Downloads `packages` with all they depend on; returns the .deb files, sorted by name.

        A name may carry a suite as apt writes it ("qemu-system-x86/trixie-backports"). Raises VmError.
        """
        wanted = sorted(set(packages))
        for name in wanted:
            if not _PACKAGE_NAME.fullmatch(name.partition("/")[0]):
                raise VmError(f"{name!r} is not the name of a Debian package")
        backports = [name.partition("/")[2] for name in wanted if "/" in name]
        target = ["-t", backports[0]] if backports else []
        with locked(self.path / "lock", self.progress):
            self._refresh()
            return self._download(["install", *target, "--download-only", "--", *wanted], ", ".join(wanted))

    def download(self, package: str, suite: str | None = None, *, version: str | None = None) -> Path:
        """Downloads `package` alone, without what it depends on: of `suite`, or exactly `version`, else the
        newest."""
        name = f"{package}={version}" if version else f"{package}/{suite}" if suite else package
        with locked(self.path / "lock", self.progress):
            if self._refresh():
                return self._download_alone(package, name)
            try:
                return self._download_alone(package, name)
            except VmError:
                # The mirror may have moved on since the lists were fetched.
                self._refresh(force=True)
                return self._download_alone(package, name)

    def download_source(self, package: str, suite: str) -> list[Path]:
        """Downloads the files of the source package `package` of `suite`, the .dsc first.

        Only of a root for source packages. Raises VmError.
        """
        name = f"{package}/{suite}"
        folder = self.path / "cache" / "sources"
        with locked(self.path / "lock", self.progress):
            self._refresh()
            folder.mkdir(exist_ok=True)
            try:
                return self._download_source(name, folder)
            except VmError:
                # The mirror may have moved on since the lists were fetched.
                self._refresh(force=True)
                return self._download_source(name, folder)

    def _download_source(self, name: str, folder: Path) -> list[Path]:
        empty = self.path / "cache" / "nothing"
        empty.mkdir(exist_ok=True)
        command = ["source", "--download-only", name]
        text = self._apt(["--print-uris", *command], cwd=empty)
        files = re.findall(r"^'[^']*' (\S+) \d+ SHA256:", text, re.MULTILINE)
        paths = sorted((folder / file for file in files), key=lambda path: path.suffix != ".dsc")
        if not paths or paths[0].suffix != ".dsc":
            raise VmError(f"apt found no source package {name}")
        if not all(path.exists() for path in paths):
            self.progress(f"downloading the source of {name}")
        # Also what is there already is checked, and what is there in part is completed.
        self._apt(command, cwd=folder)
        return paths

    def _download_alone(self, package: str, name: str) -> Path:
        target = self.path / "cache" / "archives"
        wanted = target / self._uris(["download", name])[0]
        if not wanted.exists():
            self.progress(f"downloading {package}")
            staging = target / "single"
            staging.mkdir(exist_ok=True)
            self._apt(["download", name], cwd=staging)
            for file in staging.iterdir():
                file.rename(target / file.name)
            if not wanted.exists():
                raise VmError(f"apt said that it downloaded {package} but {wanted} is not there")
        return wanted

    def names(self, prefix: str) -> list[str]:
        """The packages of the release whose names begin with `prefix`, in no order."""
        with locked(self.path / "lock", self.progress):
            self._refresh()
            return self._run(["apt-cache", "pkgnames", prefix], self.path).split()

    def dependencies(self, package: str, suite: str | None = None) -> list[str]:
        """The names in the Depends field of the newest `package` (of `suite`), in order; empty if there is
        none."""
        with locked(self.path / "lock", self.progress):
            self._refresh()
            options = ["-t", suite] if suite else []
            try:
                text = self._run(["apt-cache", *options, "show", "--no-all-versions", package], self.path)
            except VmError:
                return []
        depends = next((stanza.get("Depends", "") for stanza in parse_stanzas(text)), "")
        return [clause.split()[0] for clause in re.split(r"[,|]", depends) if clause.strip()]

    def refresh(self) -> None:
        """Fetches the package lists anew however young they are."""
        with locked(self.path / "lock", self.progress):
            self._refresh(force=True)

    def _download(self, arguments: list[str], what: str) -> list[Path]:
        archives = self.path / "cache" / "archives"
        names = self._uris(arguments)
        missing = [name for name in names if not (archives / name).exists()]
        if missing:
            self.progress(f"downloading {len(missing)} Debian packages for {what}")
            try:
                self._apt(arguments)
            except VmError:
                # The mirror may have moved on since the lists were fetched.
                self._refresh(force=True)
                names = self._uris(arguments)
                self._apt(arguments)
        paths = sorted(archives / name for name in names)
        for path in paths:
            if not path.exists():
                raise VmError(f"apt said that it downloaded {what} but {path} is not there")
        return paths

    def _uris(self, arguments: list[str]) -> list[str]:
        # Already downloaded files are left out of --print-uris, hence an empty archive folder for the
        # question.
        empty = self.path / "cache" / "nothing"
        (empty / "partial").mkdir(parents=True, exist_ok=True)
        text = self._apt([f"-oDir::Cache::archives={empty}", "--print-uris", *arguments])
        names = re.findall(r"^'[^']*' (\S+\.deb) ", text, re.MULTILINE)
        if not names:
            raise VmError(f"apt found nothing to download for {arguments[-1]}")
        return [str(name) for name in names]

    def _refresh(self, force: bool = False) -> bool:
        """True when the lists were fetched now."""
        stamp = self.path / "updated"
        try:
            age_s = time.time() - stamp.stat().st_mtime
        except OSError:
            age_s = float("inf")
        if not force and 0 <= age_s < LISTS_MAX_AGE_S:
            return False
        keyring = next((path for path in KEYRINGS if path.exists()), None)
        if keyring is None:
            raise VmError(
                f"Debian's archive keyring is not at {KEYRINGS[0]}: "
                "install the package debian-archive-keyring"
            )
        mirrors = choose_mirrors(host_sources())
        for choice in dict.fromkeys((mirrors, OFFICIAL)):
            self.progress(f"fetching the package lists of Debian {self.release.value}")
            write_atomically(
                self.path / "etc/sources.list.d/debian.sources",
                sources_text(self.release, choice, keyring, self.types),
            )
            try:
                self._apt(["-oAPT::Update::Error-Mode=any", "update"])
            except VmError as error:
                failure = error
            else:
                write_atomically(stamp, "")
                return True
        if stamp.exists() and not force:
            self.progress("no new package lists could be fetched; going on with the old ones")
            return False
        raise failure

    def _apt(self, arguments: list[str], cwd: Path | None = None) -> str:
        return self._run(["apt-get", "-q", *arguments], cwd or self.path)

    def _run(self, command: list[str], cwd: Path) -> str:
        return run_tool(command, cwd=cwd, environment={"APT_CONFIG": str(self.path / "apt.conf")})


def open_root(release: Release, cache: Path, progress: Progress = quiet, *, sources: bool = False) -> AptRoot:
    """The private apt root of `release` under `cache`, for binary packages or else for `sources`, laid out if
    it is not there yet; fetches nothing."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise VmError(
            "apt-get and dpkg-deb are needed to fetch Debian packages: "
            "run this on Debian or a system made from it"
        )
    path = cache / "apt" / (f"{release.value}-sources" if sources else release.value)
    with locked(path / "lock", progress):
        for folder in ("etc/sources.list.d", "state/lists/partial", "cache/archives/partial", "log"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        (path / "state" / "status").touch()
        dump = run_tool(["apt-config", "dump"], cwd=path, environment={})
        write_atomically(path / "apt.conf", configuration_text(path, dump, os.geteuid() == 0))
    return AptRoot(release, path, progress, "deb-src" if sources else "deb")


def run_tool(command: list[str], *, cwd: Path, environment: Mapping[str, str]) -> str:
    """Runs a tool of the host to its end and returns its stdout; raises VmError with its last complaint."""
    env = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", **environment}
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except FileNotFoundError as error:
        raise VmError(f"{command[0]} is not installed") from error
    if done.returncode != 0:
        complaints = [line for line in done.stderr.splitlines() if line.startswith(("E:", "W:"))]
        said = complaints or done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise VmError(f"{command[0]} failed: {' '.join(said[:3])}")
    return done.stdout


@contextlib.contextmanager
def package_files(deb: Path) -> Iterator[tarfile.TarFile]:
    """Opens the file tree of a binary package as a tar stream: read it once, in order, member by member."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as stream:
                yield stream
        except tarfile.TarError as error:
            raise VmError(f"{deb} is not a readable Debian package: {error}") from error
        finally:
            while process.stdout.read(1 << 16):
                pass
    if process.returncode != 0:
        raise VmError(f"dpkg-deb could not read {deb}; remove the file and try again")
