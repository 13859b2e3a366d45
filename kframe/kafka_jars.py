"""Apache Kafka's jars from Maven Central: pinned by SHA-256, fetched once into the user's cache."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from kframe.errors import LocalKafkaError

KAFKA_VERSION = "4.2.1"
_MAVEN = "https://repo1.maven.org/maven2"
_AT_ONCE = 8
_TIMEOUT_S = 60


class Jar(NamedTuple):
    """One pinned file."""

    sha256: str
    group: str
    artifact: str
    version: str

    @property
    def file(self) -> str:
        return f"{self.artifact}-{self.version}.jar"

    @property
    def path(self) -> str:
        return f"{self.group.replace('.', '/')}/{self.artifact}/{self.version}/{self.file}"


def kafka_jars(*, progress: bool = True) -> Path:
    """The folder with all of Kafka's jars, fetched if need be.

    Returns
    -------
    Path
        Every file in it has its pinned SHA-256.

    Raises
    ------
    LocalKafkaError
        A file cannot be had. What is already there stays.
    """
    folder = cache_folder() / f"kafka-{KAFKA_VERSION}"
    jars = pinned()
    missing = [jar for jar in jars if not _is_good(folder / jar.file, jar)]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        _fetch_all(missing, folder, progress)
    return folder


def pinned() -> list[Jar]:
    """The list that ships with kframe."""
    lines = files("kframe").joinpath("kafka_jars.txt").read_text().split("\n")
    return [
        Jar(sha, *coordinates.split(":")) for sha, coordinates in (line.split() for line in lines if line)
    ]


def cache_folder() -> Path:
    """``KFRAME_CACHE``, or kframe's folder in the user's cache."""
    if own := os.environ.get("KFRAME_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kframe"


def _is_good(path: Path, jar: Jar) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == jar.sha256
    except OSError:
        return False


def _fetch_all(jars: list[Jar], folder: Path, progress: bool) -> None:
    with (
        ThreadPoolExecutor(_AT_ONCE) as pool,
        tqdm(
            total=len(jars),
            desc=f"Apache Kafka {KAFKA_VERSION}",
            unit=" jars",
            disable=None if progress else True,
        ) as bar,
    ):
        tasks = [pool.submit(_fetch, jar, folder) for jar in jars]
        try:
            for task in as_completed(tasks):
                task.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch(jar: Jar, folder: Path) -> None:
    url = f"{os.environ.get('KFRAME_MAVEN', _MAVEN).rstrip('/')}/{jar.path}"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
            data = response.read()
    except (urllib.error.URLError, OSError) as error:
        raise LocalKafkaError(
            f"Apache Kafka cannot be fetched: {url}: {getattr(error, 'reason', error)}",
            kept=f"Files fetched so far stay in {folder}.",
            hint="Set KFRAME_BOOTSTRAP=host:port to use a Kafka that already runs, KFRAME_MAVEN to a mirror "
            f"of Maven Central, or copy {folder} from another machine.",
        ) from None
    if hashlib.sha256(data).hexdigest() != jar.sha256:
        raise LocalKafkaError(
            f"{url} is not the file that kframe pins (another SHA-256).",
            kept="It was thrown away.",
            hint="A proxy or mirror may have changed it; fetch it from Maven Central itself.",
        )
    part = folder / f".{jar.file}.{os.getpid()}.part"
    part.write_bytes(data)
    os.replace(part, folder / jar.file)
