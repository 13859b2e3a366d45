"""The README's example and the demo, as a reader would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import kframe as kf

pytestmark = pytest.mark.broker
ROOT = Path(__file__).parents[2]


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("**/*.md"))]
EXAMPLES = [(page, i) for page in PAGES for i in range(len(python_blocks(page)))]


def run(folder: Path, kafka: kf.LocalKafka, *command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "KFRAME_BOOTSTRAP": kafka.brokers}
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize(("page", "i"), EXAMPLES, ids=[f"{p.name}-{i}" for p, i in EXAMPLES])
def test_an_example_runs(page: Path, i: int, kafka: kf.LocalKafka, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(python_blocks(page)[i])
    done = run(tmp_path, kafka, "example.py")
    assert done.returncode == 0, done.stderr


def test_the_demo_is_equal_to_one_pandas_pass(kafka: kf.LocalKafka, tmp_path: Path) -> None:
    done = run(tmp_path, kafka, "-m", "kframe", "demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal: 16 of 16 carriers, 224 of 224 routes" in done.stdout
    assert "336,776 flights landed once each" in done.stdout
    assert "killed (SIGKILL)" in done.stdout


def test_peek_from_the_command_line(
    kafka: kf.LocalKafka, make_topic: Callable[..., str], tmp_path: Path
) -> None:
    topic = make_topic()
    kf.write(pd.DataFrame({"sku": ["a"], "qty": [1]}), topic, brokers=kafka.brokers, progress=False)
    done = run(tmp_path, kafka, "-m", "kframe", "peek", topic, "--brokers", kafka.brokers)
    assert done.returncode == 0, done.stderr
    assert '"qty": "int64"' in done.stdout
