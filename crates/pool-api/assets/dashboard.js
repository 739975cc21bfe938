// The dashboard: pictures by GET, news by one event stream, wishes by POST. Whatever comes from the daemon is put into the
// page as text, never as markup.

const $ = (id) => document.getElementById(id);
const KEPT_EVENTS = 200;
const LOG_LINES = 500;
/** News come together: one look for all of them, at most so often. */
const LOOK_AFTER_MS = 150;
/** Memory moves without news. */
const LOOK_EVERY_MS = 5000;
const RETRY_MS = 1500;

let token = sessionStorage.getItem("token") ?? "";
let pools = [];

/** An element with children; strings become text. */
function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") node.className = value;
    else if (key === "data") Object.assign(node.dataset, value);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.filter((c) => c != null && c !== false));
  return node;
}

function bytes(n) {
  if (n == null) return "–";
  const gib = n / 2 ** 30;
  return gib >= 1 ? `${gib.toFixed(1)} GiB` : `${Math.round(n / 2 ** 20)} MiB`;
}

function span(ms) {
  const s = Math.max(0, Math.round(ms / 1000));
  if (s < 60) return `${s} s`;
  return s < 3600 ? `${Math.floor(s / 60)} min ${s % 60} s` : `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
}

const clock = (at) => new Date(at).toLocaleTimeString();

// --- the API -----------------------------------------------------------------------------------------------------------

class Refused extends Error {
  constructor(status, problem) {
    super(problem.hint ? `${problem.detail}: ${problem.hint}` : problem.detail ?? `answer ${status}`);
    this.status = status;
  }
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (token) headers.Authorization = `Bearer ${token}`;
  if (options.body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { ...options, headers, cache: "no-store" });
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({}));
  if (answer.status === 401) askForToken();
  throw new Refused(answer.status, problem);
}

const get = async (path) => (await call(path)).json();

function askForToken() {
  const dialog = $("login");
  if (dialog.open) return;
  dialog.onclose = () => {
    token = $("token").value;
    sessionStorage.setItem("token", token);
    $("token").value = "";
    look();
  };
  dialog.showModal();
}

/** The events of a stream of server-sent events, until it ends; the first, `open`, is that it began. */
async function* events(path, lastId, signal) {
  const headers = { Accept: "text/event-stream" };
  if (lastId) headers["Last-Event-ID"] = lastId;
  const answer = await call(path, { headers, signal });
  yield { type: "open", id: "", data: "" };
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value.replaceAll("\r\n", "\n");
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      const event = { type: "message", id: "", data: [] };
      for (const line of text.slice(0, end).split("\n")) {
        const [, name, rest] = /^([^:]*):? ?(.*)$/.exec(line) ?? [];
        if (name === "data") event.data.push(rest);
        else if (name === "event") event.type = rest;
        else if (name === "id") event.id = rest;
      }
      text = text.slice(end + 2);
      if (event.data.length) yield { ...event, data: event.data.join("\n") };
    }
  }
}

// --- what is shown -----------------------------------------------------------------------------------------------------

const GOOD = new Set(["ready"]);
const BAD = new Set(["failed", "fenced", "lost"]);
const BETWEEN = new Set(["suspect", "draining", "stopping", "waiting", "unknown"]);

function mood(state) {
  if (GOOD.has(state) || state === "ok") return "ok";
  if (BAD.has(state)) return "bad";
  if (BETWEEN.has(state)) return "warn";
  return state === "idle" ? "quiet" : "busy";
}

const chip = (state) => el("span", { class: `chip ${mood(state)}` }, state);

function deviceCard(device) {
  const ours = Math.max(device.vram_reserved_bytes, device.vram_used_bytes - device.vram_foreign_bytes);
  const parts = [["kept", device.vram_driver_bytes], ["ours", ours], ["foreign", device.vram_foreign_bytes]];
  const share = (n) => `${Math.min(100, (100 * n) / Math.max(1, device.vram_total_bytes))}%`;
  const bar = el("div", { class: "bar", role: "img", "aria-label": `${bytes(device.vram_free_bytes)} of ${bytes(device.vram_total_bytes)} free` });
  for (const [kind, n] of parts) {
    const part = el("span", { class: kind });
    part.style.flexBasis = share(n);
    bar.append(part);
  }
  const users = pools.filter((p) => p.live && p.devices.includes(device.uuid)).map((p) => p.pool_id);
  const facts = [
    device.utilisation_percent == null ? null : `${device.utilisation_percent} % busy`,
    device.compute_capability == null ? null : `compute ${device.compute_capability}`,
    device.mig == null ? null : `slice ${device.mig.profile}`,
    device.pci_bus_id,
  ].filter(Boolean);
  return el(
    "li",
    { class: "card", data: { device: device.uuid } },
    el("div", { class: "row" }, el("h3", {}, `${device.index} · ${device.name}`), chip(device.health)),
    bar,
    el("div", { class: "legend" }, `${bytes(device.vram_total_bytes)} · engines ${bytes(ours)} · others ${bytes(device.vram_foreign_bytes)} · free ${bytes(device.vram_free_bytes)}`),
    el("div", { class: "legend" }, users.length ? `used by ${users.join(", ")}` : "used by no pool"),
    facts.length ? el("div", { class: "legend" }, facts.join(" · ")) : null,
    device.health_detail ? el("p", { class: "reason warn" }, device.health_detail) : null,
    device.health === "fenced" ? el("div", { class: "row" }, button("Unfence", () => unfence(device))) : null,
  );
}

const button = (label, act, disabled = false, of = "") =>
  el("button", { type: "button", onclick: act, disabled, "aria-label": of ? `${label} ${of}` : label }, label);

function replicaLine(replica) {
  const waits = replica.backoff.next_start_in_ms;
  const facts = [
    replica.device_mask,
    replica.live ? `generation ${replica.generation}` : null,
    replica.restart_count ? `${replica.restart_count} restarts` : null,
    replica.breaker === "closed" ? null : `breaker ${replica.breaker}`,
    replica.proof ? `proof: ${replica.proof}` : null,
  ].filter(Boolean);
  return el(
    "div",
    { class: "row", data: { replica: replica.replica_id } },
    el("span", {}, replica.replica_id),
    chip(replica.state),
    el("span", { class: "legend" }, facts.join(" · ")),
    waits == null ? null : el("span", { class: "legend warn", data: { until: String(Date.now() + waits) } }, `next start in ${span(waits)}`),
  );
}

function poolCard(pool) {
  const id = pool.pool_id;
  const waiting = pool.leases_waiting ? ` · ${pool.leases_waiting} waiting` : "";
  const trouble = pool.reason && !pool.ready ? pool.reason : pool.last_error && !pool.ready ? pool.last_error.detail : "";
  return el(
    "li",
    { class: "card", data: { pool: id, state: pool.state } },
    el("div", { class: "row" }, el("h3", {}, id), chip(pool.state), pool.hold ? el("span", { class: "chip warn" }, "on hold") : null),
    el("div", { class: "legend" }, `${pool.model_id} · ${pool.engine}${pool.engine_version ? ` ${pool.engine_version}` : ""}`),
    el("div", {}, `${pool.active_leases} of ${pool.slots_total} slots in use${waiting}`),
    trouble ? el("p", { class: `reason ${mood(pool.state)}` }, trouble) : null,
    ...pool.replicas.map(replicaLine),
    el(
      "div",
      { class: "row" },
      button("Preload", () => verb(id, "preload"), pool.ready && pool.ready_replicas === pool.replicas.length, id),
      button("Drain", () => verb(id, "drain"), pool.hold && !pool.live, id),
      button("Resume", () => verb(id, "resume"), !pool.hold && !pool.draining, id),
      button("Reload", () => verb(id, "reload"), false, id),
      button("Plan", () => plan(id), false, id),
      button("Logs", () => logs(id), false, id),
    ),
  );
}

/** Puts new cards in the place of the old; what has the focus keeps it. */
function show(list, cards) {
  const focused = list.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
  list.replaceChildren(...(cards.length ? cards : [el("li", { class: "quiet" }, "none")]));
  if (focused) [...list.querySelectorAll("button")].find((b) => b.getAttribute("aria-label") === focused)?.focus();
}

function showLeases(leases) {
  const who = (l) => [l.job_id && `job ${l.job_id}`, l.session_id && `session ${l.session_id}`, l.tenant_id].filter(Boolean).join(", ") || "–";
  const rows = leases.map((l) =>
    el("tr", {}, el("td", {}, l.pool_id), el("td", {}, `${l.replica_id} · ${l.slot}`), el("td", {}, who(l)), el("td", {}, clock(l.expires_at))));
  $("leases").replaceChildren(...(rows.length ? rows : [el("tr", {}, el("td", { colspan: "4", class: "quiet" }, "none"))]));
}

function banner(text) {
  $("problem").textContent = text ?? "";
  $("problem").hidden = !text;
}

function connection(text, kind) {
  if ($("connection").textContent === text) return;
  $("connection").textContent = text;
  $("connection").className = `chip ${kind}`;
}

let looking = false;
let again = false;

/** Looks at everything; one look at a time, and once more if there were news meanwhile. */
async function look() {
  if (looking) {
    again = true;
    return;
  }
  looking = true;
  try {
    const [node, listed, leases] = await Promise.all([get("/v1/node"), get("/v1/pools"), get("/v1/leases")]);
    pools = listed;
    $("version").textContent = `${node.version} · ${node.profile}${node.driver ? ` · driver ${node.driver}` : ""}`;
    $("simulated").hidden = !node.simulated;
    banner(node.problem);
    show($("devices"), node.devices.filter((d) => !d.mig_parent).map(deviceCard));
    show($("pools"), pools.map(poolCard));
    showLeases(leases);
  } catch (error) {
    banner(error instanceof Refused ? error.message : "The daemon does not answer.");
  } finally {
    looking = false;
    if (again) {
      again = false;
      soon();
    }
  }
}

let planned = 0;

function soon() {
  if (planned) return;
  planned = setTimeout(() => {
    planned = 0;
    look();
  }, LOOK_AFTER_MS);
}

// --- what can be done --------------------------------------------------------------------------------------------------

/** Asks before something is done; gives what was typed, or null. */
function confirmed(title, text, yes, field) {
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  $("confirm-yes").textContent = yes;
  $("confirm-field").hidden = !field;
  $("confirm-field").firstElementChild.textContent = field?.label ?? "";
  $("confirm-input").value = field?.value ?? "";
  const dialog = $("confirm");
  dialog.returnValue = "";
  return new Promise((resolve) => {
    dialog.onclose = () => resolve(dialog.returnValue === "yes" ? $("confirm-input").value : null);
    dialog.showModal();
  });
}

const ASKED = {
  preload: ["Preload", "Starts its engines and lifts a hold."],
  drain: ["Drain", "New requests are refused at once. Those that run have until the deadline; then the engine is stopped."],
  resume: ["Resume", "Gives up a running drain, or lifts the hold."],
  reload: ["Reload", "Replaces the engine; if the new one cannot serve, the old one serves on."],
};

async function verb(id, name) {
  const [label, text] = ASKED[name];
  const pool = pools.find((p) => p.pool_id === id);
  const field = name === "reload" ? { label: "Model", value: pool?.model ?? "" } : name === "drain" ? { label: "Deadline in seconds (empty: as the pool says)", value: "" } : null;
  const typed = await confirmed(`${label} ${id}?`, text, label, field);
  if (typed === null) return;
  const body = {};
  if (name === "reload" && typed.trim()) body.new_model_ref = typed.trim();
  if (name === "drain" && typed.trim()) {
    const seconds = Number(typed);
    if (!Number.isFinite(seconds) || seconds < 0) return banner("A deadline is a number of seconds.");
    body.deadline_ms = Math.round(seconds * 1000);
  }
  try {
    const operation = await (await call(`/v1/pools/${encodeURIComponent(id)}/${name}`, { method: "POST", body: JSON.stringify(body) })).json();
    note(`${label} of ${id}: ${operation.state}`);
    follow(operation);
  } catch (error) {
    note(`${label} of ${id} was refused: ${error.message}`, "bad");
  }
  soon();
}

/** Tells how an operation ends. */
async function follow(operation) {
  try {
    while (operation.state === "running") operation = await get(`/v1/operations/${encodeURIComponent(operation.operation_id)}?wait_ms=20000`);
    const good = operation.state === "succeeded";
    note(`${operation.verb} of ${operation.pool_id}: ${good ? operation.outcome : operation.problem}`, good ? "ok" : "bad");
  } catch {
    // The stream of events tells what becomes of the pool.
  }
  soon();
}

async function unfence(device) {
  const text = "Only if nothing of an engine is left on it: its memory is promised to others at once.";
  if ((await confirmed(`Unfence device ${device.index}?`, text, "Unfence")) === null) return;
  try {
    await call(`/v1/devices/${encodeURIComponent(device.uuid)}/unfence`, { method: "POST", body: "{}" });
  } catch (error) {
    note(`Unfence was refused: ${error.message}`, "bad");
  }
  soon();
}

function panel(title, ...body) {
  $("panel-title").textContent = title;
  $("panel-body").replaceChildren(...body);
  if (!$("panel").open) $("panel").showModal();
}

async function plan(id) {
  try {
    const p = await memoryPlan(id);
    const head = ["Device", "Weights", "KV cache", "Compute", "Runtime", "Margin", "Needed", "Room"];
    const row = (d) => {
      const e = d.estimate;
      const cells = [e.weights_bytes, e.kv_bytes, e.compute_bytes, e.runtime_bytes, e.margin_bytes, d.promised_bytes, d.room_bytes];
      return el("tr", {}, el("td", {}, String(d.index)), ...cells.map((n) => el("td", { class: "number" }, bytes(n))));
    };
    const table = el("table", {}, el("thead", {}, el("tr", {}, ...head.map((h, i) => el("th", { scope: "col", class: i ? "number" : "" }, h)))), el("tbody", {}, ...p.devices.map(row)));
    const facts = [p.fits ? "It fits now." : `It does not fit now: ${p.reason}`, p.context ? `Context ${p.context} tokens.` : "", p.learnt ? "Figures of earlier runs." : "Estimated."].filter(Boolean);
    panel(`Memory plan of ${id}`, el("p", {}, facts.join(" ")), el("div", { class: "scroll" }, table), ...p.remedies.map((r) => el("p", {}, r)));
  } catch (error) {
    note(`No plan of ${id}: ${error.message}`, "bad");
  }
}

const memoryPlan = async (id) => (await call("/v1/plan", { method: "POST", body: JSON.stringify({ pool: id }) })).json();

async function logs(id) {
  const text = el("pre", { tabindex: "0", "aria-label": `Log of ${id}` });
  panel(`Log of ${id}`, text);
  const stop = new AbortController();
  $("panel").onclose = () => stop.abort();
  const lines = [];
  try {
    for await (const event of events(`/v1/pools/${encodeURIComponent(id)}/logs?follow=true`, "", stop.signal)) {
      if (event.type === "open") continue;
      const atEnd = text.scrollTop + text.clientHeight >= text.scrollHeight - 4;
      lines.push(lineOf(event.data));
      lines.splice(0, Math.max(0, lines.length - LOG_LINES));
      text.textContent = lines.join("\n");
      if (atEnd) text.scrollTop = text.scrollHeight;
    }
  } catch (error) {
    if (!stop.signal.aborted) text.textContent += `\n${error.message}`;
  }
}

function lineOf(data) {
  try {
    return JSON.parse(data).line ?? data;
  } catch {
    return data;
  }
}

// --- news --------------------------------------------------------------------------------------------------------------

function note(text, kind = "", at = Date.now()) {
  const list = $("events");
  list.prepend(el("li", { class: kind }, el("time", {}, clock(at)), text));
  while (list.childElementCount > KEPT_EVENTS) list.lastElementChild.remove();
}

const ALARMS = new Set(["engine_failed", "breaker_opened", "fenced", "reload_broken", "device_suspected"]);
const WARNINGS = new Set(["suspected", "restart_planned", "start_delayed", "reload_undone", "gap"]);

async function listen() {
  let last = "";
  for (;;) {
    try {
      for await (const event of events(`/v1/events?tail=${last ? KEPT_EVENTS : 50}`, last)) {
        connection("live", "ok");
        if (event.id) last = event.id;
        if (event.type === "open") {
          soon();
          continue;
        }
        const told = JSON.parse(event.data);
        note(told.human, ALARMS.has(told.event) ? "bad" : WARNINGS.has(told.event ?? event.type) ? "warn" : "", told.at ?? Date.now());
        soon();
      }
    } catch {
      // Looks say what is wrong.
    }
    connection("reconnecting", "warn");
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

setInterval(() => {
  for (const node of document.querySelectorAll("[data-until]")) node.textContent = `next start in ${span(Number(node.dataset.until) - Date.now())}`;
}, 1000);
setInterval(() => document.hidden || look(), LOOK_EVERY_MS);
look();
listen();
