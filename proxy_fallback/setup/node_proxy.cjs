// Makes Node use HTTPS_PROXY when it is preloaded (NODE_OPTIONS=--require): Node before 24 ignores
// the variable, and later ones use it for the global agent only.
//
// Every TLS connection that a program opens itself (fetch, https, http2) goes through the proxy by
// CONNECT. A connection over the program's own socket stays as it is: the program has found a proxy
// itself. Trust is unchanged (NODE_EXTRA_CA_CERTS adds the CA), and so is every byte. When the proxy
// cannot be reached or refuses, the connection is made without it: fail open.
"use strict";
const net = require("node:net");
const stream = require("node:stream");
const tls = require("node:tls");

const HEAD_BYTES_MAX = 16384;
const ANSWER_MS_MAX = 30000;

function proxyOf(environment) {
  try {
    const url = new URL(environment.HTTPS_PROXY || environment.https_proxy || "");
    if (url.protocol !== "http:" || url.username) return null;
    return { host: url.hostname.replace(/^\[|\]$/g, ""), port: Number(url.port) || 80 };
  } catch {
    return null;
  }
}

function isLeftOut(host, port, environment) {
  const rules = (environment.NO_PROXY || environment.no_proxy || "").split(/[\s,]+/);
  return rules.some((rule) => {
    if (rule === "*") return true;
    const [name, only] = rule.toLowerCase().replace(/^\*?\./, "").split(":");
    if (!name || (only && Number(only) !== port)) return false;
    return host === name || host.endsWith("." + name);
  });
}

function isLocal(host) {
  return host === "localhost" || host === "::1" || /^127\./.test(host);
}

// Between TLS and the proxy's socket: it holds writes back until the tunnel is open.
class Tunnel extends stream.Duplex {
  constructor(proxy, direct) {
    super();
    this.waiting = null;
    this.kept = true;
    this.goThrough(proxy, direct);
  }

  goThrough(proxy, direct) {
    const { host, port } = direct;
    const raw = (this.raw = net.connect(proxy.port, proxy.host));
    let head = Buffer.alloc(0);
    const instead = () => {
      raw.removeAllListeners();
      raw.on("error", () => {});
      raw.destroy();
      this.carry(net.connect(direct), "connect");
    };
    raw.setTimeout(ANSWER_MS_MAX, instead);
    raw.once("error", instead);
    raw.once("close", instead);
    raw.once("connect", () => {
      const authority = `${net.isIPv6(host) ? `[${host}]` : host}:${port}`;
      raw.write(`CONNECT ${authority} HTTP/1.1\r\nHost: ${authority}\r\n\r\n`);
    });
    raw.on("data", (data) => {
      head = Buffer.concat([head, data]);
      const end = head.indexOf("\r\n\r\n");
      if (end < 0 && head.length < HEAD_BYTES_MAX) return;
      if (!/^HTTP\/1\.[01] 2\d\d/.test(head.toString("latin1", 0, 16))) return instead();
      raw.removeAllListeners();
      raw.setTimeout(0);
      this.carry(raw, null);
      if (head.length > end + 4) this.push(head.subarray(end + 4));
    });
  }

  carry(raw, event) {
    this.raw = raw;
    raw.setNoDelay(true);
    if (!this.kept) raw.unref();
    raw.on("data", (data) => this.push(data) || raw.pause());
    raw.on("end", () => this.push(null));
    raw.on("error", (error) => this.destroy(error));
    raw.on("close", () => this.destroy());
    const stands = () => {
      this.stands = true;
      const waiting = this.waiting;
      this.waiting = null;
      if (waiting) raw.write(waiting[0], waiting[1]);
    };
    if (event) raw.once(event, stands);
    else stands();
  }

  _write(data, encoding, done) {
    if (this.stands) this.raw.write(data, done);
    else this.waiting = [data, done];
  }

  _read() {
    if (this.stands) this.raw.resume();
  }

  _final(done) {
    this.raw.end(done);
  }

  _destroy(error, done) {
    this.raw.destroy();
    done(error);
  }

  keep(kept) {
    this.kept = kept;
    if (kept) this.raw.ref();
    else this.raw.unref();
  }
}

function asOptions(given) {
  const rest = typeof given.at(-1) === "function" ? given.slice(0, -1) : given;
  const options = Object.assign({}, ...rest.filter((each) => each && typeof each === "object"));
  const [port, host] = rest.filter((each) => typeof each !== "object");
  if (port !== undefined) options.port = port;
  if (host !== undefined) options.host = host;
  return options;
}

function install() {
  const proxy = proxyOf(process.env);
  if (!proxy) return;
  const connect = tls.connect;

  tls.connect = function (...given) {
    let tunnel = null;
    let options = null;
    try {
      options = asOptions(given);
      const host = String(options.host || options.servername || "localhost").toLowerCase();
      const port = Number(options.port);
      if (options.socket || options.path || !(port > 0)) return connect.apply(this, given);
      if (isLocal(host) || isLeftOut(host, port, process.env)) return connect.apply(this, given);
      const { lookup, family, hints, localAddress } = options;
      tunnel = new Tunnel(proxy, { host, port, lookup, family, hints, localAddress });
    } catch {
      return connect.apply(this, given);
    }
    const called = typeof given.at(-1) === "function" ? [given.at(-1)] : [];
    const socket = connect.call(this, { ...options, socket: tunnel }, ...called);
    // An idle connection that its pool has unref'd must not keep the program alive.
    for (const [name, kept] of [["ref", true], ["unref", false]]) {
      const original = socket[name];
      socket[name] = function () {
        tunnel.keep(kept);
        return original.call(this);
      };
    }
    return socket;
  };
  require("node:module").syncBuiltinESMExports();
}

try {
  install();
} catch {
  // A fault of ours must not reach the program.
}
