"""What a pull request may not do to what is published, in a clone and in the workflow itself."""

from __future__ import annotations

import os
import re
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

from tests.attack.frame import TRIES, Try
from tests.attack.verdict import require

AREA = "CI guards, in a clone"
ROOT = Path(__file__).parents[2]
RUN = "mkdir -p results/aaaaaaaaaaaa; cd results/aaaaaaaaaaaa; echo {} > run.json; echo 1 > rounds.parquet; cd ../.."
PACK = "mkdir -p results/digits; echo 1 > results/digits/runs.parquet; echo 1 > results/digits/counts.parquet"
CHANGES = {
    "a changed run": "echo more >> results/aaaaaaaaaaaa/run.json",
    "a removed run": "git rm -qr results/aaaaaaaaaaaa",
    "a renamed run": "git mv results/aaaaaaaaaaaa results/bbbbbbbbbbbb",
    "a run that becomes a link": "rm results/aaaaaaaaaaaa/run.json; ln -s /etc/passwd results/aaaaaaaaaaaa/run.json",
    "a changed pack": "echo more >> results/digits/counts.parquet",
    "a removed pack": "git rm -qr results/digits",
    "a verified.json": "echo {} > results/verified.json",
    "another mode": "chmod +x results/aaaaaaaaaaaa/run.json",
    "a folder in the place of a run": "rm -r results/aaaaaaaaaaaa; ln -s /tmp results/aaaaaaaaaaaa",
    "attributes that hide": "echo '* -diff' > results/.gitattributes; echo more >> results/aaaaaaaaaaaa/run.json",
    "a name with a line of its own": 'git mv results/aaaaaaaaaaaa "results/b\nb"',
}


def _workflows() -> list[dict[Any, Any]]:
    import yaml  # type: ignore[import-untyped]

    return [yaml.safe_load(file.read_text()) for file in sorted((ROOT / ".github" / "workflows").glob("*.yml"))]


def _steps() -> list[dict[str, Any]]:
    return [step for each in _workflows() for job in each["jobs"].values() for step in job["steps"]]


def _guarded(change: str) -> None:
    script = next(step["run"] for step in _steps() if "stays as it is" in step.get("name", ""))
    git = "git -c user.name=a -c user.email=a@b"

    def shell(text: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-e", "-c", text], capture_output=True, text=True, env={**os.environ, **environment}, check=False
        )

    shell(f"git init -q .; {RUN}; {PACK}; git add .; {git} commit -qm one").check_returncode()
    base = shell("git rev-parse HEAD").stdout.strip()
    shell(f"{change}; git add -A .; {git} commit -qm two").check_returncode()
    done = shell(script, BASE=base)
    require(done.returncode != 0, "it goes through")
    require("Traceback" not in done.stdout + done.stderr, "a traceback")


for name, change in CHANGES.items():
    TRIES.append(Try(area=AREA, name=name, act=partial(_guarded, change)))


def _by_commit() -> None:
    used = [step["uses"] for step in _steps() if "uses" in step]
    loose = [each for each in used if not re.search(r"@[0-9a-f]{40}$", each)]
    require(not loose, f"by a tag, which may move: {', '.join(loose)}")


def _no_credentials() -> None:
    those = [step for step in _steps() if "actions/checkout" in step.get("uses", "")]
    kept = [step for step in those if (step.get("with") or {}).get("persist-credentials") is not False]
    require(not kept, f"{len(kept)} of {len(those)} checkouts leave credentials to strangers' code")


def _no_rights_for_strangers() -> None:
    """What runs with the branch's own rights may read, and runs nothing of a stranger's."""
    for asked in _workflows():
        if "pull_request_target" in str(asked.get("on", asked.get(True))):
            words = " ".join(step.get("run", "") for job in asked["jobs"].values() for step in job["steps"])
            harmless = asked["permissions"] == {"contents": "read"} and not re.search(
                r"pip|pytest|bench |python", words
            )
            require(harmless, "strangers' code runs with the branch's own rights")


def _owners() -> None:
    files = [ROOT / place / "CODEOWNERS" for place in (".github", "", "docs")]
    text = "".join(file.read_text() for file in files if file.exists())
    lacking = [path for path in (".github/", "bench/", "results/verified.json", ".gitattributes") if path not in text]
    require(not lacking, f"nobody owns {', '.join(lacking)}")


def _least_rights() -> None:
    wide = [each["permissions"] for each in _workflows() if each["permissions"] != {"contents": "read"}]
    require(not wide, f"{wide}")


for act in (_by_commit, _no_credentials, _no_rights_for_strangers, _owners, _least_rights):
    TRIES.append(Try(area=AREA, name=f"the workflow: {act.__name__.strip('_').replace('_', ' ')}", act=act))
