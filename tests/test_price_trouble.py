"""A mistake in the person's own prices ends no metering: bundled ones are used, and it is said."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from halton_meter.cli import main
from halton_meter.cli.run import summary_lines
from halton_meter.cli.status import status_lines
from halton_meter.live.journal_writer import Condition
from halton_meter.live.pipeline import Pipeline
from halton_meter.live.proxy.service import ProxyService
from halton_meter.live.proxy.worker import Job, Pricing
from halton_meter.live.result import RunResult
from halton_meter.live.status import is_well
from halton_meter.problem import Unavailable
from halton_meter.store import Store
from tests.support.stand_in import Service, running

FIXTURE = Path(__file__).parent.parent / "fixtures"
WAY_OUT = "halton-meter pricing reset --all"
BROKEN = "[[override]\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("HALTON_METER_HOME", str(home))
    return home


MISTAKES = [
    (b"[[override]\n", 1),
    (b"# mine\n\n[[override]]\nmodel = \n", 4),
    (b"# mine\n[[override]]\nmodel = 'a'\nfactor = '1'\n[[override]]\nfactor = '1'\n", 5),
    (b"\n\n# \xff\n", 3),
]


@pytest.mark.parametrize(("raw", "line"), MISTAKES)
def test_a_meter_is_made_at_bundled_prices_and_the_trouble_names_file_line_and_command(
    home: Path, raw: bytes, line: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "pricing.toml").write_bytes(raw)
    trouble = Pipeline(home, {}).price_error
    assert trouble is not None
    for words in ("bundled prices are used", f"{home}/pricing.toml:{line}: ", WAY_OUT):
        assert words in trouble
    assert f"halton-meter: {trouble}" in capsys.readouterr().err
    (home / "pricing.toml").unlink()
    assert Pipeline(home, {}).price_error is None


@pytest.mark.parametrize("text", ["override = [3]", "override = 3", "x = " + "[" * 5000])
def test_what_is_valid_or_deep_and_still_no_override_is_no_crash(home: Path, text: str) -> None:
    (home / "pricing.toml").write_text(text)
    assert WAY_OUT in (Pipeline(home, {}).price_error or "")


def test_the_service_meters_and_its_status_says_what_to_do(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "pricing.toml").write_text(BROKEN)
    with running(home, monkeypatch) as service:
        service.exchange(2)
        found = service.wait_for(lambda told: told["events"] == 2, "events")
        assert found["health"] == "degraded"
        said = "\n".join(status_lines(found))
        assert f"{home}/pricing.toml" in said
        assert WAY_OUT in said
        assert "then: halton-meter config reload" in said
        assert WAY_OUT in service.flush()["price_error"]
        assert WAY_OUT in (service.stop().price_error or "")


def test_the_proxys_worker_tells_and_the_service_passes_it_on(home: Path) -> None:
    (home / "pricing.toml").write_text(BROKEN)
    pipeline = Pipeline(home, {})
    trouble = pipeline.price_error
    pricing = Pricing(pipeline, home, lambda _: None)
    pricing.start()
    told = pricing.finish()
    assert told["price_error"] == trouble

    async def passed_on() -> dict[str, Any]:
        service = ProxyService(Job(str(home), False), {})
        service.take({"final": True, **told})
        return await service.status()

    found = asyncio.run(passed_on())
    assert found["price_error"] == trouble
    assert found["health"] == "degraded"


def test_a_run_tells_that_it_was_priced_otherwise() -> None:
    assert "  prices!" in summary_lines(RunResult(price_error="prices!"))


def test_prices_in_trouble_are_not_well(home: Path) -> None:
    assert is_well(Condition(Store(home)).as_json())
    assert not is_well(Condition(Store(home), "prices!").as_json())


def test_replay_says_so_and_exits_with_1(home: Path) -> None:
    (home / "pricing.toml").write_text(BROKEN)
    capture = next(FIXTURE.rglob("*.pcapng"))
    done = CliRunner().invoke(main, ["replay", str(capture)])
    assert isinstance(done.exception, SystemExit)
    assert done.exit_code == 1
    assert done.stderr.startswith("halton-meter: ")
    assert WAY_OUT in done.stderr


def test_doctor_reports_it(home: Path) -> None:
    (home / "pricing.toml").write_text(BROKEN)
    said = CliRunner().invoke(main, ["doctor"]).stdout
    assert f"✗ prices: {home}/pricing.toml:1: " in said
    assert f"    fix: correct that, or drop all of your own prices: {WAY_OUT}\n" in said
    (home / "pricing.toml").write_text('[[override]]\nmodel = "m"\nfactor = "1"\n')
    assert "✓ prices: " in CliRunner().invoke(main, ["doctor"]).stdout


def test_a_metering_process_that_ends_at_once_is_told_with_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ending(*_: object) -> list[str]:
        return [sys.executable, "-c", "raise SystemExit(3)"]

    monkeypatch.setattr("halton_meter.live.own_code.python", ending)
    service = Service(tmp_path)
    monkeypatch.setattr("capture.helper_process.spawn_helper", service.spawn)
    with pytest.raises(Unavailable) as raised:
        service.supervisor.start()
    (problem,) = raised.value.problems
    assert "ended at once" in problem.what
    assert problem.fix == "halton-meter doctor"
