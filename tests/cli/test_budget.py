"""`halton-meter budget`, from setting one to letting go on what it stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from halton_meter.budget import Budget
from halton_meter.cli import main
from halton_meter.cli.budget_view import table
from halton_meter.live.stopping import Stopper, identity
from halton_meter.settings import config
from halton_meter.spending import ledger, stops
from halton_meter.spending.stops import Stop
from halton_meter.store import Store
from tests.support.made import ASKED, made
from tests.support.waiting import WAIT_SECONDS_MAX, wait_until


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    monkeypatch.setenv("HALTON_METER_HOME", str(folder))
    return folder


def budget(*words: str) -> Result:
    return CliRunner().invoke(main, ["budget", *words])


def spend(home: Path, *amounts: str | None, **usage: Any) -> None:
    with Store(home) as store:
        store.append(
            made(f"e{time.time_ns()}-{n}", usd, at_ns=time.time_ns(), caller=ASKED, **usage)
            for n, usd in enumerate(amounts)
        )
        store.flush()


def test_a_budget_is_set_changed_listed_and_removed(home: Path) -> None:
    home.mkdir()
    (home / "config.toml").write_text('# mine\nloader = "auto"  # why\n')
    done = budget("set", "web", "150", "--project", "web*", "--action", "stop")
    assert done.output == (
        "Budget web: $150.00 a month, project web*; at the limit: stop.\n"
        "Spent so far: $0.00 (0 %).\n"
    )
    assert (home / "config.toml").read_text() == (
        '# mine\nloader = "auto"  # why\n\n[budgets.web]\nusd = 150\nproject = "web*"\n'
        'action = "stop"\n'
    )
    assert budget("set", "web", "--per", "day", "--at", "80%,100").exit_code == 0
    assert budget("set", "talk", "$5.50", "--per", "session").exit_code == 0
    listed = [json.loads(line) for line in budget("list", "--json").output.splitlines()]
    assert listed == [
        {"name": "web", "usd": 150, "per": "day", "project": "web*", "at": [80, 100],
         "action": "stop"},
        {"name": "talk", "usd": "5.50", "per": "session"},
    ]  # fmt: skip
    assert budget("remove", "web", "talk").output == "Removed budget web.\nRemoved budget talk.\n"
    assert (home / "config.toml").read_text().strip() == '# mine\nloader = "auto"  # why'
    assert budget("list").output.startswith("No budget yet. Set one: halton-meter budget set")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("set", "web"), "there is no budget 'web' to change; a new one needs its limit"),
        (("set", "a b", "5"), "'a b' is no name for a budget: it has 40 ASCII letters, digits, _"),
        (("set", "a" * 41, "5"), "40 ASCII letters, digits, _ . and - at most, the first a letter"),
        (("set", "a", "-5"), "No such option '-5'; amounts are written without a minus sign"),
        (("set", "web", "12.345"), 'dollars and cents, such as 20 or "12.50", not "12.345"'),
        (("set", "web", "5", "--at", "half"), "write percentages such as 50,80,100"),
        (("set", "web", "5", "--action", "kill"), "'kill' is not one of"),
        (("resume", "--all", "web"), "--all and a name exclude each other"),
    ],
)
def test_wrong_usage_changes_nothing(home: Path, words: tuple[str, ...], said: str) -> None:
    done = budget(*words)
    assert done.exit_code == 2
    assert said in done.output
    assert not (home / "config.toml").exists()


def test_budgets_that_are_set_at_the_same_time_are_all_there(home: Path) -> None:
    budget("set", "first", "1", "--per", "day")
    environment = {**os.environ, "HALTON_METER_HOME": str(home)}
    code = (
        "import sys, threading\n"
        "from halton_meter.cli import config_file, main\n"
        "text = config_file._text\n"
        "def slow(path):\n"
        "    found = text(path)\n"
        "    print('read', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    return found\n"
        "config_file._text = slow\n"
        "config_file.LOCK_S_MAX = 60\n"
        "main(['budget', 'set', sys.argv[1], '5', '--per', 'day'])\n"
    )
    started = []
    for name in ("one", "other"):
        pipe = subprocess.PIPE
        argv = [sys.executable, "-c", code, name]
        begun = subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, env=environment)
        started.append(begun)
        if name == "one":  # the other begins when it has read the file, and has not written it
            assert begun.stdout is not None
            assert begun.stdout.readline() == "read\n"
    one, other = started
    said = [each.communicate("\n", WAIT_SECONDS_MAX)[0] for each in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0), said
    names = {each.name for each in config.read(home).config.budgets}
    assert names == {"first", "one", "other"}


def test_what_would_be_refused_when_read_is_not_written(home: Path) -> None:
    done = budget("set", "web", "5", "--per", "session", "--each", "model")
    assert done.exit_code == 2
    assert 'each = "model" does not go with per = "session"' in done.output
    assert not (home / "config.toml").exists()


def test_an_unknown_name_is_told_with_the_nearest(home: Path) -> None:
    budget("set", "website", "5")
    done = budget("status", "webste")
    assert (done.exit_code, done.output) == (
        1,
        "halton-meter: there is no budget 'webste'\n  fix: did you mean website?\n",
    )


def test_a_configuration_that_is_a_link_stays_one(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    dotfile = tmp_path / "dotfiles.toml"
    dotfile.write_text("")
    dotfile.chmod(0o640)
    (home / "config.toml").symlink_to(dotfile)
    assert budget("set", "web", "5").exit_code == 0
    assert (home / "config.toml").is_symlink()
    assert "[budgets.web]" in dotfile.read_text()
    assert dotfile.stat().st_mode & 0o777 == 0o640


def test_status_shows_sums_forecast_and_what_has_no_price(home: Path) -> None:
    budget("set", "web", "10", "--per", "day", "--project", "web")
    budget("set", "models", "4", "--per", "day", "--each", "model")
    budget("set", "talk", "5", "--per", "session")
    spend(home, "2.50", "6", None)
    spend(home, "1", model="gpt-5", project="api")
    out = budget("status").output
    lines = out.splitlines()
    assert lines[0].split() == ["BUDGET", "SPENT", "LIMIT", "%", "FORECAST", "ENDS"]
    assert lines[1].split()[:5] == ["web", "at", "least", "$8.50", "$10.00"]
    assert any(line.startswith("models claude-opus-5-5  at least $8.50") for line in lines)
    assert any(line.startswith("models gpt-5") and "$1.00" in line for line in lines)
    assert any(line.startswith("talk 0199-a") and "$9.50" in line for line in lines)
    assert "Some requests have no price" in out
    told = json.loads(budget("status", "web", "--json").output)
    assert told["trouble"] is None
    assert [(each["name"], each["spent_usd"]) for each in told["budgets"]] == [("web", "8.5")]
    published = json.loads((home / "budget-status.json").read_text())
    assert {each["name"] for each in published["budgets"]} == {"web", "models", "talk"}


def test_what_is_spent_is_not_known_where_nothing_has_a_price(home: Path) -> None:
    budget("set", "web", "10", "--per", "day")
    spend(home, None)
    line = budget("status").output.splitlines()[1]
    assert "not known (1 unpriced)" in line
    assert "$0.00" not in line.replace("$10.00", "")
    assert budget("check").output == "web: not known (1 unpriced), of $10.00\n"
    said = budget("set", "web", "20").output
    assert "Spent so far: not known (1 unpriced).\n" in said


@pytest.mark.parametrize(
    ("amounts", "words", "code", "word"),
    [
        (("4.99",), (), 0, "under"),
        (("5",), (), 1, "over"),
        (("4",), ("--at", "80"), 1, "over"),
        (("4", None), (), 0, "under"),
        (("4", None), ("--strict",), 3, "not known"),
        (("6", None), ("--strict",), 1, "over"),
    ],
)
def test_check_tells_scripts_by_its_code(
    home: Path, amounts: tuple[str | None, ...], words: tuple[str, ...], code: int, word: str
) -> None:
    budget("set", "web", "5", "--per", "day")
    spend(home, *amounts)
    done = budget("check", "web", "--json", *words)
    assert done.exit_code == code
    assert json.loads(done.output)["result"] == word
    quiet = budget("check", "--quiet", *words)
    assert (quiet.exit_code, quiet.output) == (code, "")


def test_check_of_a_store_that_cannot_be_read_is_not_known(home: Path) -> None:
    budget("set", "web", "5", "--per", "day")
    (home / "meter.duckdb").mkdir()
    done = budget("check")
    assert done.exit_code == 3
    assert "may miss the latest requests" in done.output


def test_check_says_over_for_nothing_else(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget("set", "website", "5", "--per", "day")
    done = budget("check", "webste")
    assert (done.exit_code, done.output) == (
        2,
        "halton-meter: there is no budget 'webste'\n  fix: did you mean website?\n",
    )
    (home / "config.toml").write_text("budgets = 5\n")
    assert budget("check").exit_code == 3
    monkeypatch.setenv("HALTON_METER_HOME", str(home / "config.toml"))
    done = budget("check")
    assert (done.exit_code, "config.toml is not a folder" in done.output) == (3, True)


def test_check_counts_what_is_in_no_database_yet(home: Path) -> None:
    from halton_meter.settings import config
    from halton_meter.spending.spent import of_event
    from halton_meter.spending.sums import Sums

    budget("set", "web", "5", "--per", "day")
    book = ledger.Ledger(home, Sums(config.read(home).config.budgets))
    book.add([of_event(made("live", "6", at_ns=time.time_ns()))])
    assert budget("check", "--quiet").exit_code == 1


# --- resume -------------------------------------------------------------------------------------


def put(home: Path, *held: Stop) -> None:
    folder = ledger.folder_of(home)
    with ledger.locked(folder):
        found = stops.read(folder)
        for each in held:
            found = found.with_stop(each)
        stops.write(folder, found)


def stop(name: str, by: tuple[int, int], **more: Any) -> Stop:
    facts: dict[str, Any] = {
        "budget": None,
        "usd": Decimal(2),
        "limit_usd": Decimal(2),
        "spent_usd": Decimal("2.01"),
        "at_least": False,
        "how": "stopped",
        "since_ns": time.time_ns(),
        "program": "claude",
    }
    return Stop(id=name, by=by, **(facts | more))


def test_nothing_to_resume_is_no_failure(home: Path) -> None:
    done = budget("resume")
    assert (done.exit_code, done.output) == (0, "Nothing is stopped at a limit.\n")
    assert budget("resume", "run-1").exit_code == 1


@pytest.mark.skipif(sys.platform != "linux", reason="who holds it is looked up in /proc")
def test_who_holds_it_is_told_what_is_allowed(home: Path) -> None:
    me = identity(os.getpid())
    put(home, stop("run-1", me), stop("run-2", me), stop("run-3", (me[0], me[1] + 1)))
    done = budget("resume")
    assert done.exit_code == 1  # which of them?
    assert "2 things are stopped: run-1, run-2" in done.output  # the third is nobody's any more
    assert "fix: halton-meter budget resume run-1   (or: --all)" in done.output
    done = budget("resume", "run-1", "--more", "0.50")
    assert done.output == "run-1: claude goes on for another $0.50.\n"
    held = {each.id: each.more_usd for each in stops.read(home / "budgets").stops}
    assert held == {"run-1": Decimal("0.50"), "run-2": None}
    assert budget("resume", "--all").exit_code == 0
    held = {each.id: each.more_usd for each in stops.read(home / "budgets").stops}
    assert held == {"run-1": Decimal(2), "run-2": Decimal(2)}  # as much as the limit is


@pytest.mark.skipif(sys.platform != "linux", reason="pidfd and /proc")
def test_what_nobody_holds_any_more_is_continued(home: Path) -> None:
    budget("set", "web", "2", "--per", "day", "--action", "stop")
    process = subprocess.Popen(["sleep", "1000"])
    stopper = Stopper()
    try:
        stopper.stop([identity(process.pid)])
        key = stops.key_of(Budget("web", Decimal(2), "day"), "2026-03-10", "")
        dead = (process.pid, 1)
        put(home, stop("web", dead, budget="web", key=key, processes=stopper.processes))
        shown = budget("status").output
        assert "claude (1 process) is stopped since" in shown
        assert "go on: halton-meter budget resume web" in shown
        assert budget("resume", "web", "--more", "1").exit_code == 0
        state = Path(f"/proc/{process.pid}/stat")
        wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "S", "it goes on")
        # What was spent beyond the limit is not taken from what is allowed.
        assert stops.read(home / "budgets").more[key] == Decimal("1.01")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_more_may_be_allowed_before_anything_is_stopped(home: Path) -> None:
    budget("set", "web", "5", "--per", "day", "--action", "stop")
    done = budget("resume", "web", "--more", "3")
    assert done.output == "web: another $3.00 this day; nothing was stopped.\n"
    (allowed,) = stops.read(home / "budgets").more.values()
    assert allowed == Decimal(3)
    assert "web: $3.00 more was allowed, it holds at $8.00" in budget("status").output
    told = json.loads(budget("status", "--json").output)
    assert told["allowed"] == [{"name": "web", "of": None, "more_usd": "3", "holds_at_usd": "8"}]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--per", "day"), 0, "web stops nothing: it tells you, and lets go on."),
        (("--per", "day", "--each", "project", "--action", "stop"), 1, "a limit for each project"),
        (("--per", "session", "--action", "stop"), 1, "a limit for each session"),
    ],
)
def test_more_is_not_allowed_where_that_would_change_nothing(
    home: Path, words: tuple[str, ...], code: int, said: str
) -> None:
    budget("set", "web", "5", *words)
    done = budget("resume", "web", "--more", "3")
    assert done.exit_code == code
    assert said in done.output
    assert stops.read(home / "budgets").more == {}


def test_requests_without_a_price_are_in_no_sum_of_any_budget(home: Path) -> None:
    home.mkdir()
    spend(home, "1", None)
    for name in ("daily", "monthly"):
        budget("set", name, "10", "--per", "day" if name == "daily" else "month")
    said = budget("status").output
    assert said.count("at least $1.00  $10.00") == 2
    assert said.endswith(
        "Some requests have no price: they are in no sum. See: halton-meter report --by model\n"
    )


def test_a_budget_for_each_project_names_the_sum_of_those_without_one(home: Path) -> None:
    home.mkdir()
    spend(home, "1", project=None)
    budget("set", "every", "10", "--per", "day", "--each", "project")
    assert "every -  " in budget("status").output
    assert budget("check").output == "every -: under, $1.00 of $10.00 (10 %)\n"


def test_a_forecast_from_a_lower_bound_is_one_too() -> None:
    entry = {
        "name": "web",
        "of": None,
        "each": None,
        "spent_usd": "1",
        "limit_usd": "10",
        "forecast_usd": "3",
        "percent": 10.0,
        "requests": 2,
        "unpriced_requests": 1,
        "at_least": True,
        "ends_at": None,
    }
    assert "at least $3.00" in table([entry])
    assert "at least" not in table([{**entry, "unpriced_requests": 0, "at_least": False}])
