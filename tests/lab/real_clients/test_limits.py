"""Limits hold for clients whose TLS is not OpenSSL's: stopped at the answer that crosses them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.lab.conftest import CLIENTS, HALTON_METER
from tests.lab.real_clients.programs import Unavailable
from tests.lab.real_clients.table import TABLE, installed
from tests.lab.test_limits import home as home
from tests.lab.test_run import as_sudo
from tests.support.lab.lab import Lab
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.slow]

# By the price book: 103 x 1 + 192 x 0.1 + 32 x 1.25 + 23 x 5 dollars a million.
ANSWER_USD = Decimal("0.0002772")
LIMIT_USD = Decimal("0.01")
ANSWERS = 37  # the last crosses it


@pytest.mark.parametrize("slowly", [False, True], ids=["3 ms", "80 ms"])
@pytest.mark.parametrize("name", ["httpr", "tls_client", "curl_cffi"])
def test_a_runaway_client_is_stopped_at_the_answer_that_crosses_the_limit(
    lab: Lab, home: Path, name: str, slowly: bool
) -> None:
    client = next(each for each in TABLE if f"libraries.py {name} " in each.script)
    try:
        variables, _ = installed(client)
    except Unavailable as reason:
        pytest.skip(f"cannot install {client.package}: {reason}")
    asked, summary = len(lab.ledger()), home / "summary.json"
    options = ["--max-usd", str(LIMIT_USD), "--json-summary", str(summary)]
    process: subprocess.Popen[Any] = lab.popen(
        [
            *(*HALTON_METER, "run", "--via", "uprobes", *options, "--"),
            *(variables["PYTHON"], str(CLIENTS / "libraries.py"), name, "1000"),
        ],
        env=as_sudo(lab, home, **variables, **({"ANSWER_SLOWLY": "1"} if slowly else {})),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=(home / "stderr").open("wb"),
    )
    wait_until(lambda: "the command is stopped" in (home / "stderr").read_text(), "the stop")
    served = len(lab.ledger()) - asked
    os.kill(process.pid, signal.SIGINT)
    process.wait(timeout=60)
    told = json.loads(summary.read_text())
    assert served == ANSWERS
    assert told["requests"] - told["aborted_requests"] == ANSWERS
    assert told["aborted_requests"] <= 1  # of rustls a request is read before it waits
    assert Decimal(told["limit"]["spent_usd"]) == ANSWERS * ANSWER_USD
