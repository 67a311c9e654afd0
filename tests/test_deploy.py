"""The files beside the code that put it into containers: they agree with the code and with each other.

Nothing here builds an image; that needs a container engine.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from scripts.cli import _parse
from scripts.options import OTHER_VARIABLES, all_configs, variable
from server.config import ServerConfig
from tests.server.echo_rag import EchoRag, chat, eventually, serving
from tests.server.live_collections import open_live
from tests.server.things import make_things

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
KNOBS = {variable(field.name): field for cls in all_configs() for field in fields(cls)}
PINNED = re.compile(r"\S+:v?\d+\.\d+(\.\d+)?(-\S+)?")
# what Prometheus' query language has beside metrics and labels
WORDS = {"sum", "max", "by", "le", "rate", "histogram_quantile", "or", "vector", "rate_interval"}


@pytest.fixture(scope="module")
def compose() -> dict:
    return yaml.safe_load((ROOT / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def dashboard() -> dict:
    return json.loads((DEPLOY / "grafana" / "dashboards" / "fusionrag.json").read_text())


@pytest.fixture(scope="module")
def dockerfile() -> list[list[str]]:
    """Its instructions, as words."""
    lines = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text()).splitlines()
    return [line.split() for line in lines if line and not line.startswith("#")]


def described(url: str) -> dict[str, set[str]]:
    """Every sample's name that the server exposes, and its labels' names."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(httpx.get(url + "/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


# --- dashboard ---


def expressions(dashboard: dict) -> dict[str, str]:
    return {f"{p['title']}: {t['refId']}": t["expr"] for p in dashboard["panels"] for t in p["targets"]}


def test_every_metric_and_label_of_the_dashboard_is_exposed(dashboard: dict, tmp_path: Path) -> None:
    with open_live(tmp_path) as opened:
        rag = EchoRag(catalogue=opened.catalogue)
        with (
            serving(rag, ServerConfig(drain_timeout_s=0), live=opened.live) as live,
            httpx.Client(base_url=live.url) as client,
        ):
            make_things(client)
            client.post("/v1/chat/completions", json=chat())
            eventually(lambda: "fusionrag_requests_total" in described(live.url))
            exposed = described(live.url)
    for panel, expression in expressions(dashboard).items():
        names = set(re.findall(r"\b(?:fusionrag|process)_\w+", expression))
        assert names or "vector" in expression, panel
        assert names <= set(exposed), panel
        labels = {label for name in names for label in exposed[name]}
        without_values = re.sub(r'"[^"]*"|\[[^]]*]|\d+(\.\d+)?', "", expression)
        asked = set(re.findall(r"[a-z_]\w*", without_values)) - names - WORDS
        assert asked <= labels, panel


def test_legends_name_labels_that_the_query_keeps(dashboard: dict) -> None:
    for target in (target for panel in dashboard["panels"] for target in panel["targets"]):
        named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        kept = {name for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for name in group.split(", ")}
        assert named == kept - {"le"}, target["expr"]


def test_the_dashboard_shows_what_an_operator_asks_for(dashboard: dict) -> None:
    shown = " ".join(expressions(dashboard).values())
    for metric in ("time_to_first_token", "phase", "tokens", "chunks", "requests_waiting", "http_requests", "ingest"):
        assert f"fusionrag_{metric}" in shown
    assert "fusionrag_event_loop_lag_seconds" in shown


def test_panels_do_not_overlap_and_have_titles_of_their_own(dashboard: dict) -> None:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in dashboard["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) == 23
    titles = [panel["title"] for panel in dashboard["panels"]]
    assert len(titles) == len(set(titles)) and all(titles)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(titles)


def test_panels_use_the_data_source_that_is_provisioned(dashboard: dict, compose: dict) -> None:
    provisioned = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())
    (source,) = provisioned["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in compose["services"]
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}
    assert {t["datasource"]["uid"] for panel in dashboard["panels"] for t in panel["targets"]} == {source["uid"]}


# --- compose ---


def test_every_image_is_pinned_to_a_version(compose: dict, dockerfile: list[list[str]]) -> None:
    images = [service["image"] for service in compose["services"].values()]
    images += [words[1] for words in dockerfile if words[0] == "FROM"]
    assert len(images) == 4
    assert [image for image in images if not PINNED.fullmatch(image)] == []


def test_every_mounted_file_exists_and_lies_where_it_is_looked_for(compose: dict) -> None:
    mounts = {
        target: source
        for service in compose["services"].values()
        for source, target, *_ in (volume.split(":") for volume in service["volumes"])
    }
    for source in mounts.values():
        assert (ROOT / source).exists() if source.startswith(".") else source in compose["volumes"]
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/fusionrag.yml").read_text())
    folder = ROOT / mounts[provider["providers"][0]["options"]["path"]]
    home = Path(compose["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (folder / home.name).exists() and str(home.parent) in mounts
    assert "--config.file=/etc/prometheus/prometheus.yml" in compose["services"]["prometheus"]["command"]
    assert mounts["/etc/prometheus/prometheus.yml"] == "./deploy/prometheus.yml"


def test_prometheus_reads_the_metrics_of_the_server_with_the_operators_key(compose: dict) -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert compose["services"][host]["ports"] == [f"8000:{port}"]
    assert job["metrics_path"] == "/metrics"
    (secret,) = compose["services"]["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert compose["secrets"][secret] == {"environment": "FUSIONRAG_API_KEY"}


def test_nothing_is_reachable_from_elsewhere_without_a_key_or_a_password(compose: dict) -> None:
    services = compose["services"]
    assert services["fusionrag"]["environment"]["FUSIONRAG_API_KEY"].startswith("${FUSIONRAG_API_KEY:?")
    assert services["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_PASSWORD:?")
    for name in ("prometheus", "grafana"):
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])


def test_a_container_is_not_killed_before_its_answers_are_drained(compose: dict) -> None:
    assert int(compose["services"]["fusionrag"]["stop_grace_period"].removesuffix("s")) > ServerConfig().drain_timeout_s


# --- Dockerfile ---


def test_variables_of_the_containers_are_knobs_with_values_that_fit(compose: dict, dockerfile: list[list[str]]) -> None:
    given = dict(word.split("=") for words in dockerfile if words[0] == "ENV" for word in words[1:])
    ours = {name: value for name, value in given.items() if name.startswith("FUSIONRAG_")}
    assert {"FUSIONRAG_HOST", "FUSIONRAG_PORT", "FUSIONRAG_DATA_DIR"} <= set(ours)
    of_compose = {
        n for s in compose["services"].values() for n in s.get("environment", {}) if n.startswith("FUSIONRAG")
    }
    assert set(ours) | of_compose <= set(KNOBS) | set(OTHER_VARIABLES)
    assert (ours["FUSIONRAG_HOST"], ours["FUSIONRAG_PORT"]) == ("0.0.0.0", "8000")


def test_the_image_has_every_package_and_file_that_installing_needs(dockerfile: list[list[str]]) -> None:
    copied = {word for words in dockerfile if words[0] == "COPY" for word in words[1:-1] if not word.startswith("--")}
    assert {"index", "fusionrag", "server", "scripts", "pyproject.toml", "constraints.txt", "README.md"} <= copied
    ignored = set((ROOT / ".dockerignore").read_text().split())
    assert all((ROOT / name).exists() for name in copied) and not copied & ignored


def test_the_image_runs_a_command_that_exists_and_is_not_root(dockerfile: list[list[str]]) -> None:
    (command,) = [json.loads(" ".join(words[1:])) for words in dockerfile if words[0] == "CMD"]
    assert command[0] == "fusionrag" and _parse(command[1:]).command == "serve"
    user = [words[1] for words in dockerfile if words[0] == "USER"][-1]
    assert user not in ("root", "0")
    (check,) = [words for words in dockerfile if words[0] == "HEALTHCHECK"]
    urls = [word for word in shlex.split(" ".join(check)) if word.startswith("http")]
    assert urls == [f"{scheme}://127.0.0.1:$FUSIONRAG_PORT/health" for scheme in ("http", "https")]
