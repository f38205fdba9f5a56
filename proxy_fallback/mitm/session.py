"""One mitmproxy of our own, in a thread: behind the edge, or for as long as one command runs.

It listens on a loopback port that the system chooses, decrypts provider hosts only and tunnels
every other host raw. Its CA lies in a folder of the user's, key mode 0600. It changes nothing on
the system; setup/ makes clients use and trust it (one_command.py, trust.py).
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import re
import ssl
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from proxy_fallback.mitm.addon import MeterAddon
    from proxy_fallback.mitm.edge_only import EdgeOnly

START_SECONDS_MAX = 20.0
STOP_SECONDS_MAX = 10.0
# Apps for mitmproxy's local mode, as `init --redirect` gives them to the service.
REDIRECT_VARIABLE = "HALTON_METER_REDIRECT"


class ProxyError(Exception):
    """Mitmproxy could not be started; the text says why."""


def host_patterns(hosts: Iterable[str]) -> list[str]:
    """Patterns for mitmproxy's `allow_hosts` for exact names and `*.suffix` names, any port."""
    patterns = []
    for host in hosts:
        name = re.escape(host.removeprefix("*."))
        patterns.append(rf"^(.+\.)?{name}:\d+$" if host.startswith("*.") else rf"^{name}:\d+$")
    return patterns


class ProxySession:
    """A running proxy: it listens on 127.0.0.1 at `port`; `ca_file` is what clients must trust.

    With `edge_only` only the edge is admitted, without it every client.
    """

    def __init__(
        self,
        addon: MeterAddon,
        hosts: Iterable[str],
        ca_folder: Path,
        upstream: tuple[str, int] | None = None,
        edge_only: EdgeOnly | None = None,
    ) -> None:
        self._addon = addon
        self._edge_only = edge_only
        self._upstream = upstream
        self._patterns = host_patterns(hosts)
        self._folder = ca_folder
        self._loop: asyncio.AbstractEventLoop | None = None
        self._master: Any = None
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="proxy", daemon=True)
        self.port = 0

    @property
    def ca_file(self) -> Path:
        """The CA's certificate, PEM."""
        return self._folder / "mitmproxy-ca-cert.pem"

    def start(self) -> None:
        """Start listening; raises ProxyError when that fails or takes too long."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._thread.start()
        if not self._ready.wait(START_SECONDS_MAX) or self._failure is not None or not self.port:
            reason = self._failure or f"no port after {START_SECONDS_MAX:.0f} s"
            raise ProxyError(f"mitmproxy does not listen: {reason}")
        for key in self._folder.glob("mitmproxy-ca.p*"):
            key.chmod(0o600)

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call a function in mitmproxy's own loop: at once, unless that hangs."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        """End the proxy; connections still open are closed."""
        running = self._loop is not None and not self._loop.is_closed()
        if running and self._loop is not None and self._master is not None:
            self._loop.call_soon_threadsafe(self._addon.will_end)
            self._loop.call_soon_threadsafe(self._master.shutdown)
            self._thread.join(STOP_SECONDS_MAX)

    def _serve(self) -> None:
        previous = os.umask(0o077)
        try:
            asyncio.run(self._main())
        except BaseException as error:  # start() raises it
            self._failure = error
        finally:
            os.umask(previous)
            self._ready.set()

    async def _main(self) -> None:
        _spare_the_other_addons()
        from mitmproxy.addons import core, next_layer, proxyserver, tlsconfig
        from mitmproxy.master import Master
        from mitmproxy.options import Options

        logging.getLogger("mitmproxy").setLevel(logging.CRITICAL)
        self._loop = asyncio.get_running_loop()
        settings: dict[str, Any] = {
            "listen_host": "127.0.0.1",
            "listen_port": 0,
            "confdir": str(self._folder),
            # One pattern: matching some hundred one by one takes milliseconds per connection.
            "allow_hosts": ["|".join(self._patterns)],
            # Names copied from the provider's certificate (*.googleapis.com) would break the CA's
            # name constraints; the client sees only the name that it requested.
            "upstream_cert": False,
        }
        roots = self._upstream_roots()
        if roots is not None:
            settings["ssl_verify_upstream_trusted_ca"] = roots
        if self._upstream is not None:
            host, port = self._upstream
            name = f"[{host}]" if ":" in host else host
            settings["mode"] = [f"upstream:http://{name}:{port}"]
        if apps := os.environ.get(REDIRECT_VARIABLE):
            # macOS: capture these apps when they bypass their proxy settings.
            settings["mode"] = [*settings.get("mode", ["regular"]), f"local:{apps}"]
        options = Options(**settings)
        self._master = Master(options, with_termlog=False)
        # Only what carries traffic: mitmproxy's thirty other addons run at every event, and some of
        # them change flows.
        carriers = (core.Core, proxyserver.Proxyserver, next_layer.NextLayer, tlsconfig.TlsConfig)
        self._master.addons.add(*(each() for each in carriers))
        # Odd headers are for the provider and the client to judge.
        setattr(options, "validate_inbound_headers", False)  # noqa: B010 (defined at run time)
        first = () if self._edge_only is None else (self._edge_only,)  # its hooks run first
        self._master.addons.add(*first, self._addon, _Listening(self))
        _show_one_name(self._master.addons.get("tlsconfig"))
        await self._master.run()

    def _upstream_roots(self) -> str | None:
        """The PEM file of roots that providers' certificates are checked against.

        SSL_CERT_FILE alone if it is set, as clients do; else the system's roots (with a company's
        own) and certifi's. None means mitmproxy's default, certifi's.
        """
        named = os.environ.get("SSL_CERT_FILE")
        if named and os.path.exists(named):
            return named
        system = ssl.get_default_verify_paths().cafile
        if system is None:
            return None
        import certifi

        roots = self._folder / "upstream-roots.pem"
        try:
            roots.write_bytes(
                Path(system).read_bytes() + b"\n" + Path(certifi.where()).read_bytes()
            )
        except OSError:  # a full disk: use the system's own
            return system
        return str(roots)

    def listening(self, port: int) -> None:
        """Called once the port is known."""
        self.port = port
        self._ready.set()


def _spare_the_other_addons() -> None:
    """Make mitmproxy's package of addons without running its `__init__`: that imports all of them,
    with flask, ldap3 and jinja2, which takes longer than all of the rest (0.32 of 0.58 s).
    """
    name = "mitmproxy.addons"
    if name not in sys.modules and (spec := importlib.util.find_spec(name)) is not None:
        sys.modules[name] = importlib.util.module_from_spec(spec)


def _show_one_name(tlsconfig: Any) -> None:
    """Make certificates name the host that the client requested (SNI) and nothing else.

    mitmproxy adds the address that it connects to, which the CA's constraints exclude; redirected
    connections have only an address.
    """
    from cryptography import x509

    original = tlsconfig.get_cert

    def get_cert(context: Any) -> Any:
        sni = context.client.sni
        if not sni:
            return original(context)
        name = sni.encode("idna").decode()
        return tlsconfig.certstore.get_cert(name, [x509.DNSName(name)], None)

    tlsconfig.get_cert = get_cert


class _Listening:
    """Gives the session its port once mitmproxy listens."""

    def __init__(self, session: ProxySession) -> None:
        self._session = session

    def running(self) -> None:
        """Report the port; a hook of mitmproxy's, called when its servers are up."""
        from mitmproxy import ctx

        addons: Any = ctx.master.addons
        server = addons.get("proxyserver")
        for address in server.listen_addrs():
            self._session.listening(address[1])
            return
