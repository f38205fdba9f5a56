"use strict";
// Everything shown comes from this page's own server and goes in as text, never as markup: names of
// models and projects come from traffic.

const PERIODS = ["today", "7d", "30d", "90d", "all"];
const DIMENSIONS = [
  "model", "project", "provider", "process", "client", "agent", "kind", "git_branch", "error_class",
];
const FILTERS = ["project", "provider", "model"];
const REFRESH_MS = 15000;

const asked = new URLSearchParams(location.hash.slice(1));
let next = null;

const $ = (id) => document.getElementById(id);

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const or = (value, unknown) => (value === null || value === undefined ? unknown : value);

function dollars(text) {
  if (text === null || text === undefined) return "unpriced";
  const amount = Number(text);
  if (amount !== 0 && Math.abs(amount) < 0.0001) return "< $0.0001";
  return "$" + amount.toFixed(amount !== 0 && Math.abs(amount) < 1 ? 4 : 2);
}

// Of a sum: "+" behind one from which unpriced requests are missing.
const sum = (text, figures) => dollars(text) + (figures.unpriced_requests && text !== null ? "+" : "");

const count = (value) => (value === null || value === undefined ? "-" : value.toLocaleString());

function query(extra) {
  const parameters = new URLSearchParams({ period: asked.get("period") || "30d" });
  for (const name of FILTERS) if (asked.has(name)) parameters.set(name, asked.get(name));
  for (const [name, value] of Object.entries(extra)) parameters.set(name, value);
  return parameters.toString();
}

async function fetched(path, extra) {
  const answer = await fetch(`${path}?${query(extra)}`);
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

function ask(name, value) {
  if (value === null) asked.delete(name);
  else asked.set(name, value);
  location.hash = asked.toString();
  show();
}

function choices(id, name, values, standard) {
  const buttons = values.map((value) => {
    const button = element("button", value.replace("_", " "));
    button.type = "button";
    button.setAttribute("aria-pressed", String(value === (asked.get(name) || standard)));
    button.addEventListener("click", () => ask(name, value));
    return button;
  });
  $(id).replaceChildren(...buttons);
}

function filters() {
  const shown = FILTERS.filter((name) => asked.has(name)).map((name) => {
    const button = element("button", `${name}: ${asked.get(name)} ✕`);
    button.addEventListener("click", () => ask(name, null));
    return button;
  });
  $("filters").replaceChildren(...shown);
}

function figure(name, value, note) {
  const made = element("div");
  made.append(element("span", name), element("b", value));
  if (note) made.append(element("span", note));
  return made;
}

function sent(tokens) {
  const names = ["input", "cache_read", "cache_write", "cache_write_5m", "cache_write_1h", "cache_write_12h"];
  const known = names.map((name) => tokens[name]).filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) : null;
}

function totals(figures) {
  $("totals").replaceChildren(
    figure("List price", sum(figures.list_usd, figures), figures.unpriced_requests ? `${count(figures.unpriced_requests)} requests unpriced` : ""),
    figure("Billed", sum(figures.marginal_usd, figures)),
    figure("Requests", count(figures.requests), figures.errors ? `${count(figures.errors)} errors` : ""),
    figure("Tokens in", count(sent(figures.tokens))),
    figure("Tokens out", count(figures.tokens.output)),
  );
}

function row(cells, tag) {
  const made = element("tr");
  for (const [text, className] of cells) made.append(element(tag || "td", text, className));
  return made;
}

function trend(groups) {
  const days = groups.filter((group) => group.key !== null).sort((a, b) => (a.key < b.key ? -1 : 1));
  const most = Math.max(...days.map((day) => Number(day.list_usd || 0)), 0);
  const bars = days.map((day) => {
    const bar = element("div");
    bar.style.height = `${most ? (100 * Number(day.list_usd || 0)) / most : 0}%`;
    bar.title = `${day.key}: ${sum(day.list_usd, day)}, ${count(day.requests)} requests`;
    return bar;
  });
  $("trend").replaceChildren(...bars);
  $("trend").setAttribute("aria-label", days.map((day) => `${day.key} ${sum(day.list_usd, day)}`).join(", "));
}

function groups(report, by) {
  $("groups-title").textContent = `By ${by.replace("_", " ")}`;
  const heads = [[by.replace("_", " ")], ["requests", "number"], ["in", "number"], ["out", "number"], ["list price", "number"], ["share"]];
  const rows = report.groups.map((group) => {
    const made = row([
      [or(group.key, "unknown")],
      [count(group.requests), "number"],
      [count(sent(group.tokens)), "number"],
      [count(group.tokens.output), "number"],
      [sum(group.list_usd, group), "number"],
    ]);
    if (FILTERS.includes(by) && group.key !== null) {
      const button = element("button", group.key);
      button.addEventListener("click", () => ask(by, group.key));
      made.firstChild.replaceChildren(button);
    }
    const share = element("td", null, "share");
    const bar = element("div", null, "bar");
    bar.style.width = `${100 * or(group.share, 0)}%`;
    share.append(bar);
    made.append(share);
    return made;
  });
  $("groups").replaceChildren(row(heads, "th"), ...rows);
}

function coverage(found) {
  const lines = found.unpriced_models.map(
    (model) => `${model.provider} ${or(model.model, "(no model named)")}: ${count(model.requests)} requests unpriced.` +
      (model.set_price ? ` Set a price: ${model.set_price}` : ""),
  );
  const { aborted, gapped } = found.exchanges;
  if (aborted) lines.push(`${count(aborted)} requests interrupted: figures may be too low.`);
  if (gapped) lines.push(`${count(gapped)} requests incomplete (bytes lost): figures may be too low.`);
  if (found.implausible_requests) {
    lines.push(`${count(found.implausible_requests)} requests state amounts that no request can have, and are in no sum.` +
      " See: halton-meter events --flag implausible");
  }
  if (found.estimated_requests) lines.push(`${count(found.estimated_requests)} requests with estimated token counts.`);
  if (found.pending) lines.push(`${count(found.pending)} requests without an answer yet.`);
  if (found.waiting) lines.push(`${count(found.waiting)} requests not in the database yet.`);
  if (Object.keys(found.losses).length) lines.push("The capture lost something. What: halton-meter report");
  if (!lines.length) lines.push("Every request is complete and priced.");
  $("coverage").replaceChildren(...lines.map((line) => element("li", line)));
}

function connections(said) {
  const lines = said === null ? ["Coverage is known for periods alone, not for a model, provider or project."]
    : said.length ? said : ["No connection was counted. Uprobes count them: sudo halton-meter start"];
  $("connections").replaceChildren(...lines.map((line) => element("li", line.trim())));
}

function note(event) {
  if (event.implausible) return "implausible";
  if (event.error_class) return event.error_class;
  if (event.gap) return `incomplete: ${event.gap}`;
  return { complete: "", gapped: "incomplete (bytes lost)", aborted: "interrupted" }[event.outcome];
}

const percent = (part) => (part > 0 && part < 0.005 ? "< 1 %" : `${Math.round(100 * part)} %`);

const time = (text) => {
  const at = new Date(text);
  const sameDay = at.toDateString() === new Date().toDateString();
  const clock = { hour: "2-digit", minute: "2-digit" };
  return sameDay ? at.toLocaleTimeString([], clock) : at.toLocaleString([], { weekday: "short", day: "numeric", month: "short", ...clock });
};

const PLANS = { claude: "Claude plan", chatgpt: "ChatGPT plan" };

function windowNote(found) {
  if (found.has_reset) return `reset ${time(found.resets_at)}; no response since has said how much is used`;
  const notes = [];
  if (found.pace) {
    notes.push(`pace ${found.pace.ratio.toFixed(1)}x`);
    if (found.pace.full_at) notes.push(`100 % at ${time(found.pace.full_at)}`);
    else notes.push(`${percent(found.pace.used_at_reset)} when it resets`);
  }
  if (found.resets_at) notes.push(`resets ${time(found.resets_at)}`);
  return notes.join(", ");
}

function windowUsers(found) {
  const users = or(found.used_by.project, []).filter((share) => share.used_max > 0).slice(0, 5);
  return users.map((share) => {
    const who = share.elsewhere ? "elsewhere" : or(share.key, "unknown");
    const least = Math.floor(100 * share.used_min + 1e-6);
    const most = Math.ceil(100 * share.used_max - 1e-6);
    return `${who} ${percent(share.used_estimate)}` + (least < most ? ` (${least}-${most})` : "");
  }).join(", ");
}

function windowRow(found) {
  const used = found.used === null ? null : Number(found.used);
  const gauge = element("td", null, "share");
  const bar = element("div", null, used >= 0.95 ? "bar alarm" : "bar");
  bar.style.width = `${used === null ? 0 : Math.min(100, 100 * used)}%`;
  gauge.append(bar);
  const made = row([[found.label]]);
  made.append(gauge);
  const cells = [[used === null ? "?" : percent(used), "number"], [windowNote(found)], [windowUsers(found), "dim"]];
  for (const [text, className] of cells) made.append(element("td", text, className));
  return made;
}

function rateRow(found) {
  const left = found.has_reset ? "all" : count(found.remaining);
  const of = found.limit === null ? "" : ` of ${count(found.limit)}`;
  return row([[`${found.label} ${or(found.model, "")}`], [""], [`${left}${of}`, "number"], ["left"], [""]]);
}

function plan(found) {
  const shown = found.accounts.flatMap((account) => {
    const name = account.plan ? or(PLANS[account.plan], account.plan) : `${account.provider} API key`;
    const title = account.account ? `${name}, account ${account.account.slice(0, 6)}` : name;
    const rows = account.windows.flatMap((window) => {
      if (window.kind === "plan" && window.last_used !== null) return [windowRow(window)];
      return window.kind === "rate" ? [rateRow(window)] : [];
    });
    if (!rows.length) return [];
    const table = element("table");
    table.append(...rows);
    const parts = [element("h3", title), table];
    if (Number(account.overage_usd)) parts.push(element("p", `${sum(account.overage_usd, { unpriced_requests: account.overage_unpriced_requests })} billed beyond the plan this month`));
    return parts;
  });
  $("plan").replaceChildren(...shown);
  $("plan-section").hidden = !shown.length;
}

const zone = () => Intl.DateTimeFormat().resolvedOptions().timeZone;

async function requests(before) {
  const page = await fetched("api/requests", before ? { before } : {});
  const rows = page.requests.map((event) => row([
    [new Date(event.at).toLocaleString()],
    [event.provider],
    [or(event.model, "-")],
    [or(event.project, "-")],
    [or(event.process, "-").split("/").pop()],
    [count(sent(event.tokens)), "number"],
    [count(event.tokens.output), "number"],
    [dollars(event.list_usd), "number"],
    [note(event), "dim"],
  ]));
  if (before) $("requests").append(...rows);
  else {
    const heads = [[`time (${zone()})`], ["provider"], ["model"], ["project"], ["process"], ["in", "number"], ["out", "number"], ["list price", "number"], [""]];
    $("requests").replaceChildren(row(heads, "th"), ...rows);
  }
  next = page.next;
  $("more").hidden = next === null;
  $("csv").href = `requests.csv?${query({})}`;
}

async function show() {
  const by = asked.get("by") || "model";
  choices("periods", "period", PERIODS, "30d");
  choices("dimensions", "by", DIMENSIONS, "model");
  filters();
  try {
    const [report, days, limits] = await Promise.all([
      fetched("api/report", { by }), fetched("api/report", { by: "day" }), fetched("api/plan", {}),
    ]);
    totals(report.totals);
    plan(limits);
    trend(days.groups);
    groups(report, by);
    coverage(report.coverage);
    connections(report.coverage_said);
    await requests(null);
    $("problem").textContent = "";
  } catch (error) {
    $("problem").textContent = `${error.message} Is \`halton-meter dashboard\` still running?`;
  }
}

$("more").addEventListener("click", () => next && requests(next));
// Pages that were opened further down are left as they are.
setInterval(() => !document.hidden && window.scrollY === 0 && show(), REFRESH_MS);
show();
