"""What run, status and start say, without root."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from click.testing import CliRunner

from halton_meter.cli import main
from halton_meter.cli.output import harmless
from halton_meter.cli.run import reached, summary_lines
from halton_meter.cli.status import (
    _coverage_lines,
    _metered_lines,
    _worse,
    proxy_lines,
    status_lines,
)
from halton_meter.cli.summary_file import write_summary
from halton_meter.cli.systemd_unit import unit_text
from halton_meter.coverage import Coverage, Part
from halton_meter.live.result import RunLimit, RunResult
from halton_meter.live.totals import Line, Totals
from proxy_fallback.setup import service_files

OUTAGE = {
    "from": "2026-11-23T09:30:05.000000Z",
    "to": "2026-11-23T09:31:00.000000Z",
    "cause": "C",
}


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """People read local time; here that is UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def totals(**models: Line) -> Totals:
    made = Totals()
    for name, line in models.items():
        made.models[name] = line
        made.total.add(line)
    return made


def line(requests: int, usd: str, marginal: str | None = None, unpriced: int = 0) -> Line:
    return Line(requests, 1200, 34, Decimal(usd), Decimal(marginal or usd), unpriced)


def test_a_run_of_one_model_is_told_in_one_line() -> None:
    told = summary_lines(RunResult(totals(haiku=line(1, "0.0042"))))
    assert told == ["1 request, 1,200 tokens in, 34 out, $0.004200 list price"]


def test_a_run_does_not_take_unknown_tokens_for_none() -> None:
    guessed = Line(1, list_usd=Decimal("0.000024"), marginal_usd=Decimal("0.000024"))
    guessed.unknown = guessed.estimated = 1
    made = totals(haiku=guessed)
    made.aborted = 1
    assert summary_lines(RunResult(made)) == [
        "1 request, tokens not known, $0.000024 list price (estimated)",
        "  which and why: halton-meter events --flag estimated",
        "  1 interrupted",
    ]
    both = summary_lines(RunResult(totals(haiku=guessed, big=line(3, "1.5"))))
    assert both[0] == (
        "4 requests, 1,200 tokens in, 34 out (of 1 request not known), "
        "$1.5000 list price (1 request estimated)"
    )
    assert Totals.of_json(made.as_json()) == made


def test_a_run_names_the_command_that_sets_a_price() -> None:
    made = totals(odd=line(1, "0", unpriced=1))
    made.without_price["odd"] = "openai"
    again = Totals.of_json(made.as_json())
    said = "  Set a price: halton-meter pricing set odd --provider openai --rate input=USD"
    assert any(each.startswith(said) for each in summary_lines(RunResult(again)))


def test_a_limit_that_the_last_answers_reached_is_told() -> None:
    result = RunResult(totals(big=line(3, "1.5"), odd=line(1, "0", unpriced=1)))
    assert reached(RunLimit(), result) is None
    assert reached(RunLimit("1.51"), RunResult(totals(big=line(3, "1.5")))) is None
    result.held = reached(RunLimit("1.51"), result)
    assert result.held is not None
    assert result.held["holds"] == "not_known"
    assert (
        "  limit of $1.5100: nobody knows whether it was reached (1 request unpriced)"
        in summary_lines(result)
    )
    result.held = reached(RunLimit("1.25"), result)
    assert result.held is not None
    assert (result.held["holds"], result.held["spent_usd"]) == ("passed", "1.5")
    assert (
        "  limit of $1.2500: the last answers reached it, at no less than $1.5000, $0.2500 over it"
        in summary_lines(result)
    )


def test_a_run_tells_what_has_no_price_and_what_a_plan_pays() -> None:
    told = summary_lines(
        RunResult(totals(big=line(3, "1.5", marginal="0"), odd=line(2, "0", unpriced=2)))
    )
    assert told[0] == (
        "5 requests, 2,400 tokens in, 68 out, "
        "at least $1.5000 list price (2 requests unpriced), $0.0000+ billed"
    )
    assert told[1].split()[-1] == "billed"
    assert told[2].split() == ["odd", "2", "1,200", "in", "34", "out", "unpriced"]


def test_a_run_shows_outages_losses_and_what_was_not_metered() -> None:
    unseen = {
        "pid": 7,
        "process": "/usr/bin/codex",
        "stack": "rustls",
        "state": "unsupported",
        "advice": "use the proxy",
    }
    seen = unseen | {"state": "metered", "advice": None}
    partly = seen | {"process": "/usr/bin/both", "advice": "it has rustls as well"}
    metered = RunResult(
        totals(m=line(1, "1")),
        losses={"ring_full_bytes": 1234},
        coverage=[seen, unseen, partly],
        outages=[(0, 2_500_000_000, "the capture helper died")],
    )
    metered.totals.gapped = 1
    assert summary_lines(metered)[1:] == [
        "  1 incomplete (bytes lost)",
        "  outage: nothing metered for 2.5 s: the capture helper died",
        "  1,234 bytes lost: the capture buffer was full (ring_full_bytes)",
        "  not metered: /usr/bin/codex (rustls); destination unknown",
        "    use the proxy",
        "  /usr/bin/both may be only partly metered:",
        "    it has rustls as well",
    ]


def test_what_was_asked_past_the_meter_is_not_told_as_nothing_spent() -> None:
    missed = Coverage(is_known=True)
    missed.add(Part("/usr/bin/app", "api.openai.com", "rustls", "not_probed"), 1, 900)
    unknown = "no request was metered; what the command spent is not known"
    outage = (0, 1_000_000_000, "the worker was killed")
    for result in (
        RunResult(connections=missed),
        RunResult(outages=[outage]),
        RunResult(still_running=["sleep"]),
        RunResult(losses={"ran_as_another_user": 1}),
        RunResult(losses={"refused_other_user": 2}),
    ):
        assert summary_lines(result)[0] == unknown
    seen = Coverage(is_known=True)
    seen.add(Part("/usr/bin/app", "api.openai.com", "OpenSSL", None), 1, 900)
    nothing = "0 requests, 0 tokens in, 0 out, $0.0000 list price"
    assert summary_lines(RunResult(connections=seen))[0] == nothing


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (
            {"ran_as_another_user": 1},
            "  1 program of the command ran as another user: not metered. "
            "Use: sudo halton-meter start --user NAME",
        ),
        (
            {"refused_other_user": 2},
            "  2 connections of another user's program refused by the proxy, which serves you and "
            "root alone. Use: sudo halton-meter start --user NAME",
        ),
    ],
)
def test_what_a_command_did_as_another_user_is_said(losses: dict[str, int], said: str) -> None:
    lines = summary_lines(RunResult(losses=losses))
    assert said in lines
    assert not any("lost:" in line for line in lines)


def test_status_names_a_damaged_database(tmp_path: Path) -> None:
    (tmp_path / "meter.duckdb").write_bytes(b"no database" * 1000)
    env = {"HALTON_METER_HOME": str(tmp_path)}
    said = CliRunner().invoke(main, ["status"], env=env).output
    assert f"database: {tmp_path}/meter.duckdb is damaged: " in said
    told = json.loads(CliRunner().invoke(main, ["status", "--json"], env=env).output)
    assert "is damaged" in told["database_error"]
    (tmp_path / "meter.duckdb").rename(tmp_path / "meter.duckdb.damaged-20260101T000000")
    said = CliRunner().invoke(main, ["status"], env=env).output
    assert "damaged database set aside, its events are missing in reports" in said


def test_a_command_that_never_ran_has_no_line_about_coverage() -> None:
    nothing = Coverage(is_known=True)
    assert len(summary_lines(RunResult(connections=nothing, exit_code=127))) == 1
    (_, said) = summary_lines(RunResult(connections=nothing, exit_code=1))
    assert said == "  coverage: no connection to a provider carried a request"


def test_status_without_a_service(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["status"], env={"HALTON_METER_HOME": str(tmp_path)})
    assert done.exit_code == 1
    assert "sudo halton-meter start" in done.output


def test_status_for_people() -> None:
    found = {
        "health": "degraded",
        "uptime_s": 7200.0,
        "probes": 12,
        "loader": "libbpf",
        "events": 3,
        "bytes": 4096,
        "totals": {"list_usd": "0.5"},
        "last_event_at": None,
        "home": "/h",
        "journal_waiting": 1,
        "restarts": 1,
        "store_error": None,
        "losses": {"ring_full_bytes": 7},
        "outages": [OUTAGE],
        "coverage": [
            {
                "pid": 5,
                "process": "/usr/bin/curl",
                "host": "api.x.ai",
                "stack": "openssl",
                "state": "metered",
                "advice": None,
            }
        ],
    }
    assert status_lines(found) == [
        "uprobes degraded, up 2 h 00 min, 12 probes attached through libbpf",
        "  3 requests since the last restart from 4,096 bytes of plaintext, $0.5 list price",
        "  data folder /h; 1 event waits in the journal",
        "  restarted 1 time: see the outages",
        "  7 bytes lost: the capture buffer was full (ring_full_bytes)",
        "  outage: 2026-11-23 09:30:05 UTC to 2026-11-23 09:31:00 UTC: C",
        "processes that talk to providers:",
        "        5 metered         /usr/bin/curl (openssl) -> api.x.ai",
    ]


def test_a_restart_without_an_outage_refers_to_none() -> None:
    found = {
        "health": "ok",
        "uptime_s": 60.0,
        "probes": 12,
        "loader": "libbpf",
        "events": 0,
        "bytes": 0,
        "totals": {"list_usd": "0"},
        "last_event_at": None,
        "home": "/h",
        "journal_waiting": 0,
        "restarts": 2,
        "store_error": None,
        "losses": {},
        "outages": [],
        "coverage": [],
    }
    said = "  restarted 2 times: the kernel kept copying meanwhile, nothing was missed"
    assert said in status_lines(found)


PROXY = {
    "health": "degraded",
    "uptime_s": 90.0,
    "addresses": ["127.0.0.1:8081"],
    "connections": 3,
    "events": 12,
    "totals": {"list_usd": "0.5"},
    "last_event_at": None,
    "home": "/h",
    "journal_waiting": 0,
    "store_error": None,
    "certificate_usable": True,
    "restarts": 2,
    "worker": {"state": "waiting", "trouble": "it was killed by SIGKILL"},
    "bypassed": [{"host": "api.x.ai", "cause": "worker_down", "connections": 7}],
    "refused": [{"host": "api.x.ai", "program": "/usr/bin/java"}],
    "losses": {"flows_over_limit": 1},
    "outages": [OUTAGE],
}


def test_status_of_the_proxy_tells_what_went_by_unmetered_and_what_to_do() -> None:
    found = {"health": "degraded", "uprobes_health": "stopped", "home": "/h", "proxy": PROXY}
    assert status_lines(found) == [
        "proxy degraded, up 90.0 s on 127.0.0.1:8081; 3 connections open",
        "  12 requests since the last restart, $0.5 list price",
        "  data folder /h; 0 events wait in the journal",
        "  not metering, traffic goes on unmetered (waiting: it was killed by SIGKILL)",
        "  restarted 2 times: see the outages",
        "  unmetered: 7 connections to api.x.ai (worker down)",
        "  /usr/bin/java does not trust the proxy certificate for api.x.ai; "
        "its traffic is not metered",
        "    halton-meter init, then restart that program",
        "  1 request not followed: too many at once (flows_over_limit)",
        "  outage: 2026-11-23 09:30:05 UTC to 2026-11-23 09:31:00 UTC: C",
    ]


def test_status_of_a_proxy_that_is_well_or_paused_or_lacks_a_certificate() -> None:
    well = PROXY | {"health": "ok", "bypassed": [], "refused": [], "losses": None, "outages": []}
    well |= {"worker": {"state": "ready", "trouble": None}, "restarts": 0}
    assert len(proxy_lines(well)) == 4
    assert proxy_lines(well)[-1] == "  nothing lost, no outages"
    paused = proxy_lines(well | {"health": "paused", "worker": PROXY["worker"]})
    assert "to meter: halton-meter start" in paused[3]
    counts = {"accepted": 9, "refused_other_user": 1, "refused_gone": 2}
    assert proxy_lines(well | {"counts": counts})[3:-1] == [
        "  refused: 1 connection by other users of this machine; the proxy serves its owner and "
        "root",
    ]
    expired = proxy_lines(well | {"certificate_usable": False})
    assert any("halton-meter init" in line for line in expired)


@pytest.mark.parametrize(
    ("uprobes", "proxy", "both"),
    [
        ("stopped", "ok", "ok"),
        ("ok", "degraded", "degraded"),
        ("degraded", "ok", "degraded"),
        ("ok", "ok", "ok"),
    ],
)
def test_the_health_of_both_services(uprobes: str, proxy: str, both: str) -> None:
    assert _worse(uprobes, proxy) == both


def test_run_wants_a_command_or_a_shell(tmp_path: Path) -> None:
    for arguments in (["run"], ["run", "--shell", "true"]):
        done = CliRunner().invoke(main, arguments, env={"HALTON_METER_HOME": str(tmp_path)})
        assert done.exit_code == 2
        assert "--shell" in done.output


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("none/x.json", "there is no folder {}/none"),
        ("file/x.json", "{}/file is not a folder"),
    ],
)
def test_a_summary_that_cannot_be_written_keeps_the_command_from_starting(
    tmp_path: Path, named: str, why: str
) -> None:
    (tmp_path / "file").touch()
    ran = tmp_path / "ran"
    arguments = ["run", "--json-summary", str(tmp_path / named), "--", "touch", str(ran)]
    done = CliRunner().invoke(main, arguments, env={"HALTON_METER_HOME": str(tmp_path / "home")})
    assert done.exit_code == 2
    path = tmp_path / named
    assert f"the summary cannot be written to {path}: {why.format(tmp_path)}" in done.output
    assert not ran.exists()


def test_a_summary_that_fails_at_the_end_says_so_in_plain_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_summary(f"{tmp_path}/gone/x.json", {})
    said = f"the summary cannot be written to {tmp_path}/gone/x.json: no such file or directory\n"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("then", ["stop", "end"])
def test_what_follows_at_a_limit_needs_one(then: str) -> None:
    done = CliRunner().invoke(main, ["run", "--at-limit", then, "--", "true"])
    assert done.exit_code == 2
    assert f"--at-limit {then} needs a limit\n  fix: add it: --max-usd 2" in done.output


def test_run_does_not_promise_to_see_java_by_uprobes(tmp_path: Path) -> None:
    arguments = ["run", "--via", "uprobes", "--java", "true"]
    done = CliRunner().invoke(main, arguments, env={"HALTON_METER_HOME": str(tmp_path)})
    assert done.exit_code == 2
    assert "--via proxy" in done.output


def test_no_word_can_add_a_setting_to_roots_unit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="control characters"):
        unit_text(["/bin/true"], tmp_path / "x\nExecStartPre=/bin/evil")


def test_a_programs_path_does_not_speak_to_the_terminal() -> None:
    line = {"pid": 7, "process": "/tmp/\x1b]0;owned\x07x", "host": "api.openai.com"}
    told = {"state": "metered", "stack": "OpenSSL", "advice": None}
    (_, said) = map(harmless, _coverage_lines([line | told]))
    assert "\x1b" not in said
    assert "/tmp/?]0;owned?x (OpenSSL) -> api.openai.com" in said


def test_lines_that_say_the_same_are_one() -> None:
    told = {"process": "/usr/bin/curl", "stack": "OpenSSL", "state": "metered", "advice": None}
    lines = [{**told, "pid": pid, "host": "api.openai.com"} for pid in range(5, 76)]
    lines.append({**told, "pid": 9, "host": "api.x.ai"})
    assert _coverage_lines(lines) == [
        "processes that talk to providers:",
        "        5 metered         /usr/bin/curl (OpenSSL) -> api.openai.com, 71 processes",
        "        9 metered         /usr/bin/curl (OpenSSL) -> api.x.ai",
    ]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
def test_systemd_accepts_the_unit_and_finds_it_hardened(tmp_path: Path) -> None:
    unit = tmp_path / "halton-meter.service"
    home = tmp_path / 'a home with 100 % $odd "characters"'
    home.mkdir()
    unit.write_text(unit_text(["/bin/true", "-m", "a b"], home))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    about_ours = [text for text in verified.stderr.splitlines() if "halton-meter" in text]
    assert about_ours == []
    # Ten times the exposure, of 10; what is left is in the docstring of unit_text.
    judged = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=39", str(unit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert judged.returncode == 0, judged.stdout[-400:]


LIMITS = ("MemoryMax", "MemorySwapMax", "TasksMax", "LimitNOFILE", "LimitCORE", "OOMPolicy")


@pytest.mark.parametrize("whose", ["root's", "the person's"])
def test_units_have_limits_and_leave_no_plaintext_behind(tmp_path: Path, whose: str) -> None:
    root = unit_text(["/bin/true"], tmp_path)
    text = root if whose == "root's" else service_files.service_unit("x", ["/bin/true"], {})
    settings = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    assert set(LIMITS) <= settings.keys()
    # Neither a core file nor the swap holds a prompt.
    assert (settings["LimitCORE"], settings["MemorySwapMax"]) == ("0", "0")
    # One process that takes too much must not take the supervisor and the edge along.
    assert settings["OOMPolicy"] == "continue"


def test_daemon_in_the_background_is_not_what_one_wants() -> None:
    done = CliRunner().invoke(main, ["daemon"])
    assert done.exit_code == 2
    assert "sudo halton-meter start" in done.output


def test_show_unit_prints_and_changes_nothing(tmp_path: Path) -> None:
    environment = {"HALTON_METER_HOME": str(tmp_path / "h")}
    done = CliRunner().invoke(main, ["start", "--show-unit", "--all-users"], env=environment)
    assert done.exit_code == 0
    assert "NoNewPrivileges=yes" in done.output
    assert "--all-users" in done.output
    assert not (tmp_path / "h").exists()


def test_status_says_of_which_requests_the_price_is_not_known() -> None:
    found = {"events": 0, "totals": {"requests": 0, "list_usd": "0"}, "last_event_at": None}
    found |= {"restarts": 0, "home": "/h", "journal_waiting": 0, "store_error": None}
    assert _metered_lines(found)[0] == "  0 requests, $0 list price; no request yet"
    found |= {"events": 3, "totals": totals(odd=line(1, "0", unpriced=1)).as_json()}
    assert _metered_lines(found)[0] == "  3 requests, list price not known (1 request unpriced)"
    found["totals"] = totals(odd=line(3, "0.5", unpriced=1)).as_json()
    assert _metered_lines(found)[0] == (
        "  3 requests, at least $0.5 list price (1 request unpriced)"
    )


def test_stop_where_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("halton_meter.cli.stop.has_systemd", lambda: False)
    monkeypatch.setattr(
        "halton_meter.live.control.ask_service", lambda *of, **named: asked.append((of, named))
    )
    done = CliRunner().invoke(main, ["stop"], env={"HALTON_METER_HOME": str(tmp_path)})
    assert (done.exit_code, done.output) == (0, "no service was running\n")
    assert asked
