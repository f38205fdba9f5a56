"""How long the price book takes to load and to price an event (aims: 30 ms and 20 µs).

Load is timed in fresh processes, from an imported interpreter to a usable book, and again to the
first price, which parses one model's section. Times are CPU seconds of the process, the least of
several runs, because other work on the machine would otherwise be measured too. What an event
takes is also given as a multiple of reading a usage object as JSON, the least that anybody does.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from halton_meter.model import Certainty, Outcome, Source, Tokens, Usage, UsageEvent

LOAD_MS_AIM = 30.0
PRICE_US_AIM = 20.0
_AT_NS = 1_795_440_000 * 10**9
_EVENTS = 200  # few at a time, and often: what else runs disturbs a long run always
_LOADS, _REPEATS = 5, 200
_TOY_LOADS, _TOY_REPEATS = 1, 1
_USAGE = json.dumps({"input_tokens": 12, "cache_read_input_tokens": 80_000, "output_tokens": 420})

_LOAD = """
import time
from pricing.book import PriceBook
from bench.pricing_bench import events
event = events()["Claude, four buckets"]
started = time.process_time()
book = PriceBook.load()
loaded = time.process_time()
book.price(event)
print((loaded - started) * 1e3, (time.process_time() - loaded) * 1e3)
"""


def _event(provider: str, *parts: Usage, **conditions: str) -> UsageEvent:
    return UsageEvent(
        id="bench",
        provider=provider,
        host=None,
        endpoint="bench",
        kind="chat",
        model=parts[-1].model,
        request_model=parts[-1].model,
        response_id=None,
        streaming=True,
        http_status=200,
        error_class=None,
        outcome=Outcome.COMPLETE,
        source=Source.PCAP,
        parts=parts,
        certainty=Certainty.REPORTED,
        at_ns=_AT_NS,
        ttft_ms=None,
        duration_ms=None,
        conditions=conditions,
    )


def events() -> dict[str, UsageEvent]:
    """The events priced, by what they are."""
    chat = Tokens(input=1200, cache_read=4096, output=350, reasoning=128)
    claude = Tokens(input=12, cache_read=80_000, cache_write_5m=900, output=420)
    both = Tokens(input=12, cache_read=5, cache_write_5m=50, cache_write_1h=50, output=10)
    gemini = Tokens(input=1000, output=300, audio_input=700)
    return {
        "GPT, two buckets of input": _event("openai", Usage("gpt-5.6-sol", chat)),
        "Claude, four buckets": _event(
            "anthropic",
            Usage("claude-opus-5-5", claude),
            service_tier="standard",
            inference_geo="us",
        ),
        "Gemini, audio, grounded": _event(
            "gemini",
            Usage("gemini-2.5-flash", gemini, {"grounding_prompts": 1}),
            grounding="search",
        ),
        "Whisper, by the second": _event(
            "groq", Usage("whisper-large-v3", units={"audio_seconds": Decimal("3.2")})
        ),
        "Claude, three iterations": _event(
            "anthropic",
            Usage("claude-opus-5-5", both, label="compaction"),
            Usage("claude-fable-5-2", both, label="advisor"),
            Usage("claude-opus-5-5", both, {"web_search_requests": 2}),
        ),
        "unknown model": _event("openai", Usage("gpt-unheard-of", chat)),
    }


def main(toy: bool = False) -> None:
    """Print load and price times beside their aims."""
    loads_max, repeats = (_TOY_LOADS, _TOY_REPEATS) if toy else (_LOADS, _REPEATS)
    from pricing.book import PriceBook

    loads = []
    for _ in range(loads_max):
        done = subprocess.run([sys.executable, "-c", _LOAD], capture_output=True, check=True)
        loads.append([float(number) for number in done.stdout.split()])
    load_ms, first_ms = (min(column) for column in zip(*loads, strict=True))
    print(f"load            {load_ms:8.2f} ms   (aim {LOAD_MS_AIM:.0f} ms)")
    print(f"first price     {first_ms:8.2f} ms")
    book = PriceBook.load()
    print(f"price book {book.version}, {sum(map(book.model_count, book.providers())):,} models")
    for name, event in events().items():
        book.price(event)
        best, parsed = (
            min(column)
            for column in zip(
                *(
                    (_seconds(book.price, event), _seconds(json.loads, _USAGE))
                    for _ in range(repeats)
                ),
                strict=True,
            )
        )
        print(
            f"{name:<28} {best / _EVENTS * 1e6:6.2f} µs   (aim {PRICE_US_AIM:.0f} µs)   "
            f"{best / parsed:.1f} x json.loads of its usage"
        )


def _seconds(work: Callable[[Any], object], argument: Any) -> float:
    started = time.process_time()
    for _ in range(_EVENTS):
        work(argument)
    return time.process_time() - started


if __name__ == "__main__":
    main()
