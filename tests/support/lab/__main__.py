"""`python -m tests.support.lab [shell|demo|run -- CMD…]`: a person's way into the lab (as root).

`shell` (the default) opens a shell in which the providers' names lead to the lab's server; `run`
runs one command in it. `demo` meters a real client live: a command under `halton-meter run`,
talking to the lab's stand-ins, stored under HALTON_METER_HOME.
"""

from __future__ import annotations

import json
import os
import shlex
import sys

from tests.support.lab.lab import Lab
from tests.support.lab.scenario import Scenario

HALTON_METER = [sys.executable, "-m", "halton_meter"]


def _body(provider: str, n: int) -> str:
    messages = [{"role": "user", "content": f"What did this cost? {Scenario(n=n).marker}"}]
    models = {"anthropic": "claude-haiku-4-5", "openai": "gpt-5-mini"}
    body = {"model": models[provider], "messages": messages, "stream": True}
    if provider == "openai":
        body["stream_options"] = {"include_usage": True}
    return json.dumps(body)


def demo(lab: Lab) -> int:
    """Three calls by curl, not configured in any way, metered from outside."""
    urls = {
        "anthropic": "https://api.anthropic.com/v1/messages",
        "openai": "https://api.openai.com/v1/chat/completions",
    }
    calls = [("anthropic", 700), ("openai", 1200), ("anthropic", 2500)]
    script = "\n".join(
        f"curl -sS -o /dev/null -w '  %{{http_code}} %{{url}} %{{size_download}} bytes\\n' "
        f"{urls[provider]} -d {shlex.quote(_body(provider, n))}"
        for provider, n in calls
    )
    print("$ sudo halton-meter run -- sh -c 'curl https://api.anthropic.com/… ; …'", flush=True)
    home = os.environ.get("HALTON_METER_HOME", str(lab.folder / "state"))
    environment = lab.environment(HALTON_METER_HOME=home, HALTON_PROJECT="demo")
    # Root's own run: the demo's store belongs to whoever typed make demo as root.
    command = [*HALTON_METER, "run", "--", "sh", "-c", script]
    code = lab.popen(command, env=environment).wait()
    served = [entry for entry in lab.ledger() if entry["state"] == "done"]
    output = sum(entry["tokens"]["output"] for entry in served)
    print(f"The server's own ledger: {len(served)} requests, {output:,} tokens out.", flush=True)
    return code


def main() -> int:
    """Open the lab and do what was asked."""
    what, *rest = sys.argv[1:] or ["shell"]
    if what not in ("shell", "demo", "run"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        with Lab() as lab:
            if what == "demo":
                return demo(lab)
            command = [argument for argument in rest if argument != "--"] or ["/bin/bash", "--norc"]
            environment = lab.environment(TERM=os.environ.get("TERM", "dumb"), PS1="lab# ")
            return lab.popen(command, env=environment).wait()
    except PermissionError as error:
        print(f"{error}: sudo {sys.executable} -m tests.support.lab {what}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
