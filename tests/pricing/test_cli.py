"""`halton-meter pricing`, as a person and a script use it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pty
import subprocess
import sys
import tarfile

import pytest
from click.testing import CliRunner

from halton_meter.cli import main
from halton_meter.cli.pricing import pricing
from pricing.files import BUNDLED

RESPONSE = {
    "id": "msg_01ABCDEFGHIJKLMN",
    "type": "message",
    "model": "claude-opus-5-5",
    "content": [],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 1000, "output_tokens": 100},
}
DATA = """provider = "openai"
compiled = 2026-12-01

[[model]]
id = "gpt-4o"
names = ["gpt-4o"]
source = "https://example.org/prices"
[[model.price]]
input = "{usd}"
output = "10"
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path / "home"))

    def call(*arguments, stdin=None):
        return CliRunner().invoke(pricing, arguments, input=stdin)

    return call


def bundle(**files):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name.replace("__", "/") + ".toml")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return raw.getvalue()


# --- explain ---


def test_explain_a_file_as_json_with_line_items(run, tmp_path):
    path = tmp_path / "response.json"
    path.write_text(json.dumps(RESPONSE))
    done = run("explain", "--json", "--at", "2026-11-23", str(path))
    assert done.exit_code == 0, done.stderr
    event = json.loads(done.stdout)
    assert event["list_usd"] == "0.006"
    assert event["at"].startswith("2026-11-23T00:00:00")
    assert [item["what"] for item in event["line_items"]] == ["input", "output"]
    assert {"what", "quantity", "rate", "usd", "source", "dated"} <= set(event["line_items"][0])


def test_explain_prints_json_where_no_person_reads(run):
    done = run("explain", "-", stdin=json.dumps(RESPONSE))
    assert json.loads(done.stdout)["list_usd"] == "0.006"


def test_explain_on_a_terminal_is_for_a_person(tmp_path):
    path = tmp_path / "response.json"
    path.write_text(json.dumps(RESPONSE))
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "halton_meter", "pricing", "explain", str(path)]
    environment = {**os.environ, "HALTON_METER_HOME": str(tmp_path / "home")}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        process.wait(timeout=60)
        shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "list price $0.006, computed from the usage" in shown


def test_explain_standard_input_for_a_person(run):
    done = run("explain", "--text", "--provider", "anthropic", "-", stdin=json.dumps(RESPONSE))
    assert done.exit_code == 0, done.stderr
    assert "list price $0.006, computed from the usage" in done.stdout
    assert "https://" in done.stdout


@pytest.mark.parametrize(
    ("host", "model", "provider", "usd"),
    [
        ("llm.example.com", "our-model", "openai_compatible", "0.0123"),
        ("llm.example.com", "claude-opus-5-5", "openai_compatible", "0.0123"),
        ("gateway.example.com", "gpt-5-mini", "openai", "0.0123"),
        ("gateway.example.com", "our-model", "openai", "0.0123"),
    ],
)
def test_explain_knows_the_hosts_of_the_users_own(run, tmp_path, host, model, provider, usd):
    home = tmp_path / "home"
    home.mkdir()
    text = 'openai_compatible_hosts = ["llm.example.com"]\n[hosts]\n'
    (home / "config.toml").write_text(f'{text}"gateway.example.com" = "gateway"\n')
    usage = {"prompt_tokens": 1000, "completion_tokens": 100, "cost": 0.0123}
    answer = {"object": "chat.completion", "model": model, "choices": [], "usage": usage}
    done = run("explain", "--json", "-", stdin=json.dumps({"host": host, "response": answer}))
    event = json.loads(done.stdout)
    assert (event["provider"], event["host"], event["reported_usd"]) == (provider, host, usd)


def test_explain_takes_the_time_of_the_request_into_account(run):
    body = json.dumps({**RESPONSE, "model": "claude-sonnet-4-6",
                       "usage": {"input_tokens": 300_000, "output_tokens": 0}})  # fmt: skip
    prices = [
        json.loads(run("explain", "--json", "--at", at, "-", stdin=body).stdout)["list_usd"]
        for at in ("2026-03-12T12:00:00Z", "2026-03-13T12:00:00Z")
    ]
    assert prices == ["1.8", "0.9"]


def test_explain_other_names_of_a_provider(run):
    body = json.dumps(
        {
            "modelVersion": "gemini-2.5-pro",
            "usageMetadata": {"promptTokenCount": 8, "candidatesTokenCount": 1},
        }
    )
    for provider in ("google", "gemini"):
        done = run("explain", "--json", "--provider", provider, "-", stdin=body)
        assert json.loads(done.stdout)["list_usd"] == "0.00002"


def test_explain_a_model_without_a_price_names_the_command_that_sets_one(run):
    body = json.dumps({**RESPONSE, "model": "claude-unheard-of"})
    done = run("explain", "-", stdin=body)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["basis"] == "unpriced"
    assert "halton-meter pricing set" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (("explain", "-"), "", "empty"),
        (("explain", "-"), "{}", "--provider"),
        (("explain", "-"), "[" * 100_000, "--provider"),
        (("explain", "-"), '{"a":' * 700 + '"\\ud800"' + "}" * 700, "nested deeper"),
        (("explain", "--provider", "nobody", "-"), json.dumps(RESPONSE), "pricing list"),
        (("explain", "--provider", "openai", "-"), '{"model": "gpt-4o"}', "--provider"),
        (("explain", "no-such-event"), None, "no-such-event"),
    ],
)
def test_what_cannot_be_explained_fails_with_the_next_command(run, arguments, stdin, says):
    done = run(*arguments, stdin=stdin)
    assert done.exit_code == 1
    assert says in done.stderr


def test_a_time_that_is_none_is_wrong_usage(run):
    assert run("explain", "--at", "soon", "-", stdin=json.dumps(RESPONSE)).exit_code == 2


def test_a_stored_event_is_explained_by_its_id_and_an_unpriced_one_is_listed(run, tmp_path):
    from halton_meter.explain.reader import events_of
    from halton_meter.store import Store
    from pricing.book import PriceBook

    book = PriceBook.load()
    at_ns = 1_795_440_000 * 10**9
    bodies = [RESPONSE, {**RESPONSE, "id": "msg_02ABCDEFGHIJKLMN", "model": "claude-unheard-of"}]
    events = [events_of(json.dumps(body).encode(), "anthropic", at_ns)[0] for body in bodies]
    with Store(tmp_path / "home") as store:
        store.append([book.price(event) for event in events])
        store.flush()
    done = run("explain", "--json", events[0].id)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["list_usd"] == "0.006"
    (unpriced,) = json.loads(run("status", "--json").stdout)["unpriced"]
    assert (unpriced["model"], unpriced["requests"]) == ("claude-unheard-of", 1)
    assert unpriced["set"].startswith("halton-meter pricing set")
    assert run("explain", "no-such-event").exit_code == 1


# --- list, status, set, reset ---


def test_list_shows_rates_in_force(run):
    done = run("list", "anthropic", "--model", "claude-opus-5-5", "--json")
    row = json.loads(done.stdout)
    assert row["rates"]["input"] == "4"
    assert row["source"].startswith("https://")
    assert "anthropic" in run("list").stdout
    assert run("list", "nobody").exit_code == 1


def test_list_has_a_model_once_with_all_that_is_known_of_it(run):
    (row,) = map(
        json.loads, run("list", "xai", "--model", "grok-code*", "--json").stdout.split("\n")[:-1]
    )
    assert row["rates"]["input"] == "1"  # the overlay's, not the compiled 0.2
    assert row["long_prompts"] == [
        {"above_tokens": 199_999, "rates": {"input": "2", "cache_read": "0.4", "output": "4"}}
    ]
    assert (
        "prompts over 199,999 tokens: input $2"
        in run("list", "xai", "--model", "grok-code*").stdout
    )
    run("set", "grok-code*", "--factor", "0.5")
    assert "input $0.5" in run("list", "xai", "--model", "grok-code*").stdout


def test_an_override_is_set_used_listed_and_reset(run):
    assert run("set", "claude-opus-5-5", "--discount", "50%").exit_code == 0
    body = json.dumps(RESPONSE)
    assert json.loads(run("explain", "--json", "-", stdin=body).stdout)["list_usd"] == "0.003"
    status = json.loads(run("status", "--json").stdout)
    assert status["overrides"] == ["claude-opus-5-5: x0.5"]
    assert "reprice --dry-run" in run("reset", "claude-opus-5-5").stdout
    assert json.loads(run("explain", "--json", "-", stdin=body).stdout)["list_usd"] == "0.006"
    again = run("reset", "claude-opus-5-5")
    assert again.exit_code == 1
    assert "pricing status" in again.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("set", "gpt-4o"),
        ("set", "gpt-4o", "--rate", "input"),
        ("set", "gpt-4o", "--rate", "input=much"),
        ("set", "gpt-4o", "--factor", "2", "--discount", "5%"),
        ("set", "gpt-4o", "--factor", "2", "--from", "tomorrow"),
        ("reset",),
        ("refresh",),
        ("refresh", "--url", "https://example.org/x.tar.gz"),
        ("refresh", "--undo", "--file", "x"),
    ],
)
def test_wrong_usage_is_told_and_changes_nothing(run, tmp_path, arguments):
    assert run(*arguments).exit_code == 2
    assert not (tmp_path / "home").exists()


def test_a_damaged_overrides_file_names_the_way_out(run, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "pricing.toml").write_text("[[override]")
    done = run("status")
    assert done.exit_code == 1
    assert "pricing reset --all" in done.stderr
    assert run("reset", "--all").exit_code == 0
    assert run("status").exit_code == 0


# --- refresh ---


def test_refresh_from_a_file_adds_prices_and_can_be_undone(run, tmp_path):
    path = tmp_path / "prices.tar.gz"
    text = DATA.format(usd="2.5").replace("gpt-4o", "gpt-99")
    raw = bundle(data__our_cloud=text.replace("openai", "our_cloud"))
    path.write_bytes(raw)
    digest = hashlib.sha256(raw).hexdigest()
    shown = run("refresh", "--file", str(path), "--sha256", digest, "--dry-run")
    assert "our_cloud gpt-99: new, input $2.5" in shown.stdout
    assert not (tmp_path / "home" / "prices").exists()
    assert run("refresh", "--file", str(path)).exit_code == 0
    assert (
        json.loads(run("list", "our_cloud", "--model", "*", "--json").stdout)["model"] == "gpt-99"
    )
    assert "refresh --undo" in run("status").stdout
    assert run("refresh", "--undo").exit_code == 0
    assert "refresh --undo" not in run("status").stdout
    assert run("list", "our_cloud").exit_code == 1


def test_refresh_refuses_a_bundle_that_would_rewrite_history(run, tmp_path):
    path = tmp_path / "prices.tar.gz"
    path.write_bytes(bundle(data__openai=DATA.format(usd="9")))
    done = run("refresh", "--file", str(path))
    assert done.exit_code == 1
    assert "gpt-4o" in done.stderr
    assert not (tmp_path / "home" / "prices").exists()


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"not a bundle", "cannot be read"),
        (bundle(other__x="a = 1"), "holds no data"),
        (bundle(data__x="[[model]\n"), "data/x.toml"),
        (bundle(data__x=DATA.format(usd="x")), "no amount of money"),
    ],
)  # fmt: skip
def test_a_damaged_bundle_is_refused_whole(run, tmp_path, raw, says):
    path = tmp_path / "prices.tar.gz"
    path.write_bytes(raw)
    done = run("refresh", "--file", str(path))
    assert done.exit_code == 1
    assert says in done.stderr
    assert not (tmp_path / "home" / "prices").exists()


def test_a_bundle_with_another_digest_is_refused(run, tmp_path):
    path = tmp_path / "prices.tar.gz"
    path.write_bytes(bundle(data__our_cloud=DATA.format(usd="1")))
    done = run("refresh", "--file", str(path), "--sha256", "0" * 64)
    assert done.exit_code == 1
    assert "SHA-256" in done.stderr


def test_refresh_goes_out_over_https_only(run):
    done = run("refresh", "--url", "http://example.org/p.tar.gz", "--sha256", "0" * 64)
    assert done.exit_code == 1
    assert "https only" in done.stderr


@pytest.mark.parametrize(
    ("body", "why", "command"),
    [
        ({"model": "gpt-77"}, "the model 'gpt-77' is not in the price book", "gpt-77 --provider"),
        (
            {"model": "gpt-4o", "service_tier": "warp"},
            "gpt-4o has no price under service_tier=warp",
            "set gpt-4o --provider openai --rate input=USD --rate output=USD",
        ),
        ({"model": "it's $(x)"}, "is not in the price book", "'it'\"'\"'s $(x)'"),
    ],
)
def test_explain_says_why_there_is_no_price_and_what_would_set_one(run, body, why, command):
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    body = json.dumps({**body, "usage": usage})
    done = run("explain", "--text", "--provider", "openai", "-", stdin=body)
    assert why in done.stdout
    assert command in done.stderr


def test_explain_asks_for_the_model_that_a_response_does_not_name(run):
    body = json.dumps({"usage": {"inputTokens": 1000, "outputTokens": 100, "totalTokens": 1100}})
    asked = ("explain", "--provider", "bedrock", "--text")
    assert "no model is named; if you know it" in run(*asked, "-", stdin=body).stdout
    named = run(*asked, "--model", "amazon.nova-pro-v1:0", "-", stdin=body)
    assert "list price $0.00112," in named.stdout  # 1000 * 0.80 + 100 * 3.20 a million


def test_explain_names_the_rate_that_is_missing(run):
    done = run(
        "explain", "--text", "--provider", "openai", "-", stdin='{"model":"gpt-4o","pages":3}'
    )
    assert "gpt-4o has no price for pages" in done.stdout
    assert "--rate pages_each=USD" in done.stderr


def test_explain_says_what_served_and_which_row_is_for_it(run):
    body = {**RESPONSE, "usage": {**RESPONSE["usage"], "speed": "fast"}}
    done = run("explain", "--text", "-", stdin=json.dumps(body))
    assert "served under speed=fast" in done.stdout
    assert "      speed=fast, http" in done.stdout


def test_list_names_what_was_not_read_at_the_vendors_page(run):
    done = run("list", "bedrock", "--unconfirmed", "--json")
    notes = [json.loads(line)["note"] for line in done.stdout.splitlines()]
    assert notes
    assert all("unconfirmed: " in note for note in notes)
    assert "list --unconfirmed" in run("status").stdout


def test_a_broken_override_file_is_named_with_the_way_out(run, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "pricing.toml").write_text("override = 3\n")
    for arguments in (("status",), ("set", "gpt-4o", "--discount", "10%")):
        done = run(*arguments)
        assert done.exit_code != 0
        assert "pricing.toml" in done.stderr
        assert "halton-meter pricing reset --all" in done.stderr
    assert run("reset", "--all").exit_code == 0
    assert run("status").exit_code == 0


def test_set_refuses_a_rate_that_nothing_is_billed_by(run):
    done = run("set", "gpt-4o", "--rate", "inptu=3")
    assert done.exit_code == 2
    assert "did you mean input?" in done.stderr
    assert run("set", "gpt-4o", "--rate", "web_search_requests_k=3").exit_code == 0


def test_set_again_for_the_same_day_replaces_what_was_set(run):
    run("set", "gpt-4o", "--factor", "2")
    done = run("set", "gpt-4o", "--discount", "10%")
    assert "It replaces gpt-4o: x2" in done.stdout
    assert run("set", "gpt-4o", "--factor", "3", "--from", "2026-12-01").exit_code == 0
    described = [line for line in run("status").stdout.splitlines() if "Override" in line]
    assert described == ["Override: gpt-4o: x0.9", "Override: gpt-4o: x3 from 2026-12-01"]


def test_set_for_a_provider_nobody_knows_says_so(run):
    done = run("set", "m", "--provider", "our-vllm", "--factor", "1")
    assert done.exit_code == 0
    assert "our-vllm" in done.stderr


def test_status_of_an_empty_home_claims_nothing_of_models(run):
    assert "No requests are stored yet" in run("status").stdout


def test_refresh_refuses_an_overlay_that_changes_a_rule_or_a_row(run, tmp_path):
    text = (BUNDLED / "overlay" / "groq.toml").read_text()
    changes = {
        "rule": text.replace('factor = "10"', 'factor = "20"'),
        "row": text.replace('audio_hours = "0.02"', 'audio_hours = "0.03"'),
    }
    for what, changed in changes.items():
        path = tmp_path / f"{what}.tar.gz"
        path.write_bytes(bundle(overlay__groq=changed))
        done = run("refresh", "--file", str(path))
        assert done.exit_code == 1, what
        assert "would rewrite 1 recorded" in done.stderr
    path = tmp_path / "added.tar.gz"
    added = '\n[[model]]\nid = "new-one"\n[[model.price]]\nfrom = 2026-12-01\ninput = "1"\n'
    path.write_bytes(bundle(overlay__groq=text + added))
    assert "groq new-one: new, input $1" in run("refresh", "--file", str(path)).stdout


@pytest.mark.parametrize(
    "name", ["a\x7fb", "a\x07", "a\x1b[1m", "a\x9b", 'a"\\b', "a\nb", "a\tb\x00"]
)
def test_a_name_with_any_character_is_written_so_that_it_is_read_again(run, tmp_path, name):
    from pricing import overrides

    assert run("set", name, "--discount", "10%").exit_code == 0
    assert [each.model for each in overrides.read(tmp_path / "home")] == [name]
    assert run("status").exit_code == 0


def test_what_could_not_be_read_again_is_not_written(run, tmp_path, monkeypatch):
    assert run("set", "m", "--discount", "10%").exit_code == 0
    file = tmp_path / "home" / "pricing.toml"
    before = file.read_bytes()
    assert run("set", "a\udcff", "--discount", "10%").exit_code == 2
    monkeypatch.setattr("pricing.history.toml_value", lambda value: f'"{value}')
    assert run("set", "other", "--discount", "10%").exit_code == 2
    assert file.read_bytes() == before


def test_what_has_no_end_is_read_no_further_than_a_bundle_or_an_answer_goes(run):
    done = run("refresh", "--file", "/dev/zero")
    assert done.exit_code == 1
    assert "the bundle is larger than 32 MB" in done.stderr
    with open("/dev/zero", "rb") as zeros:
        done = run("explain", "-", stdin=zeros)
    assert done.exit_code == 1
    assert done.stderr.startswith(
        "halton-meter: standard input is larger than 64 MB, as no provider's answer is\n  fix: "
    )


@pytest.mark.parametrize("rate", ["NaN", "-1"])
def test_a_rate_that_no_price_has_is_refused(run, rate):
    done = run("set", "gpt-4o", "--rate", f"input={rate}")
    assert (done.exit_code, done.stdout) == (2, "")
    assert f'rates.input: "{rate}" is no amount of money; write it as 0.8' in done.stderr
    assert run("set", "gpt-4o", "--rate", "input=0.00000001").exit_code == 0


def test_a_store_that_cannot_be_read_is_no_store_without_unpriced_models(tmp_path, monkeypatch):
    monkeypatch.setenv("HALTON_METER_HOME", str(tmp_path))
    (tmp_path / "meter.duckdb").write_bytes(b"x" * 9000)
    said = CliRunner().invoke(main, ["pricing", "status"]).output
    assert "Whether each stored request has a price is not known: " in said
    assert "has a price\n" not in said
    told = json.loads(CliRunner().invoke(main, ["pricing", "status", "--json"]).output)
    assert "is damaged" in told["trouble"]
    for command in (("pricing", "explain", "abc"), ("inspect", "abc")):
        failed = CliRunner().invoke(main, command).output
        assert "abc: no such file; stored events cannot be read: " in failed
        assert "is damaged" in failed


@pytest.mark.parametrize(
    ("price", "says"),
    [
        (("--rate", "input=1e999999999"), "is more than 1,000,000, the most that is taken"),
        (("--rate", "input=1e400"), 'rates.input: "1e400" is more than 1,000,000'),
        (("--rate", "input=1000001"), "is more than 1,000,000, the most that is taken"),
        (("--factor", "1e30"), 'factor: "1e30" is more than 1,000'),
        (("--rate", "input=1e-400"), "has more than 30 decimals"),
    ],
)
def test_a_price_that_none_can_have_is_refused(run, price, says):
    done = run("set", "m", *price)
    assert (done.exit_code, says in done.stderr) == (2, True), done.stderr
    assert run("set", "m", "--rate", "input=1000000").exit_code == 0


def test_what_was_not_stated_is_not_shown_as_stated(run):
    body = '{"usage":{"prompt_tokens":-5,"completion_tokens":1e300}}'
    who = ("--provider", "openai", "--model", "gpt-4o", "--text")
    said = run("explain", *who, "-", stdin=body).stdout
    assert "stated: output: an impossible amount\n" in said
    assert '  as the answer has it: {"prompt_tokens":-5,"completion_tokens":' in said
    assert "stated: input" not in said
    assert "1000000000000000000" not in said


def test_what_is_no_file_is_named_as_what_it_is(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in (
        (tmp_path, "a folder"),
        (tmp_path / "pipe", "a pipe"),
        ("/dev/zero", "a dev"),
    ):
        done = run("explain", str(path))
        assert (done.exit_code, f"{path} is {kind}" in done.stderr) == (1, True), done.stderr
