// The fleet at a glance: what is wrong, what is served, the round, and every engine.

import { engineButton, fleetButtons } from "/page/actions.js";
import { ago, cells, h, keyed, plural, rate, say, seconds, set, size, table, version } from "/page/dom.js";
import { Lanes } from "/page/lanes.js";
import { now, state, stood } from "/page/state.js";

const MANY = 12; // engines; then there is a filter
const HEADS = ["Engine", "State", "Serves", "Mode", "Ranks", "What it says", ""];
const TRAINER_HEADS = ["Rank", "State", "Staged", "Host"];

export class FleetView {
  constructor(section) {
    this.sentence = h("p", { class: "sentence", id: "sentence" });
    this.tiles = h("dl", { class: "tiles" });
    this.problems = h("ul", { class: "problems", "aria-label": "Problems" });
    this.lanes = new Lanes();
    this.filter = h("input", { id: "filter", type: "search", autocomplete: "off", on: { input: () => this.draw() } });
    this.only = h("input", { id: "only", type: "checkbox", on: { change: () => this.draw() } });
    this.filters = h("p", { class: "row filters", hidden: true }, h("label", { for: "filter", text: "Name contains" }), this.filter,
      h("span", { class: "check" }, this.only, h("label", { for: "only", text: "only those that do not serve the newest" })));
    this.engines = table("Engines", HEADS);
    this.engines.node.classList.add("engines");
    this.trainers = table("Trainer ranks", TRAINER_HEADS);
    this.count = h("h2", { text: "Engines" });
    this.ranks = h("summary", { text: "Trainer ranks" });
    this.waiting = h("ul", { class: "plain", "aria-label": "Versions that wait" });
    this.verbs = h("div", { class: "row verbs", role: "group", "aria-label": "Actions on the fleet" }, fleetButtons());
    this.viewer = h("p", { class: "faint" });
    section.append(this.sentence, this.problems, this.tiles, this.waiting, this.lanes.node, this.count, this.filters, this.engines.node,
      h("details", {}, this.ranks, this.trainers.node), h("h2", { text: "Act on the fleet" }), this.verbs, this.viewer);
  }

  draw() {
    const { status, viewer } = state;
    this.lanes.draw(state.lanes);
    if (!status) return;
    say(this.sentence, status.state);
    this.drawProblems(status.problems);
    this.drawTiles(status);
    keyed(this.waiting, status.waiting, (w) => `${w.version.generation}.${w.version.step}`, () => h("li"),
      (node, w) => say(node, `${version(w.version)} waits for ${w.waits_for}, for ${ago(now() - w.since)}`));
    this.drawEngines(status);
    say(this.ranks, `Trainer ranks (${status.trainers.length})`);
    keyed(this.trainers.body, status.trainers, (t) => t.rank, () => h("tr", {}, cells(TRAINER_HEADS)), (row, t) => {
      fill(row, [`${t.rank}`, `${t.state} ${since(t.since)}`, version(t.staged), `${t.host} ${t.pid}`]);
    });
    this.verbs.hidden = !viewer.acts;
    say(this.viewer, viewer.acts ? "" : `Signed in as ${viewer.credential}: it takes an operator's token to act.`);
  }

  drawProblems(problems) {
    keyed(this.problems, problems, (p) => `${p.what} ${p.about}`, () => h("li", {}, h("strong"), h("span"), h("span", { class: "fix" })), (node, p) => {
      const [head, what, fix] = node.children;
      set(node, "class", p.severity);
      say(head, p.severity === "critical" ? "Critical" : "Degraded");
      say(what, `${p.what}${p.since ? ` (for ${ago(now() - p.since)})` : ""}`);
      say(fix, p.fix ? `Fix: ${p.fix}` : "");
    });
    this.problems.hidden = !problems.length;
  }

  drawTiles(status) {
    const serving = status.engines.filter((e) => current(e, status)).length;
    const last = state.rounds.findLast((row) => row.outcome === "committed");
    const tiles = [
      ["Committed", version(status.committed), status.committed ? `${ago(now() - status.committed.unix_time)} ago, commit ${status.committed.sequence}` : "nothing yet"],
      ["Serve it", `${serving} of ${status.engines.length}`, serving === status.engines.length ? "all engines" : "the others: see below"],
      ["Last stall", last ? seconds(stood(last) / 1000) : "–", last ? `${last.stall_ms ? "" : "to switch, "}of ${seconds(last.total_ms / 1000)} in all` : ""],
      ["Last wire", last?.wire_gb_per_s ? rate(last.wire_gb_per_s * 1e9, 1) : "–", last?.bytes ? size(last.bytes) : ""],
    ];
    if (status.maintenance) tiles.push(["Maintenance", "on", status.maintenance]);
    keyed(this.tiles, tiles, (t) => t[0], () => h("div", {}, h("dt"), h("dd", { class: "value" }), h("dd", { class: "faint" })), (node, texts) => fill(node, texts));
    set(this.tiles.children[1], "data-bad", serving < status.engines.length);
  }

  drawEngines(status) {
    this.filters.hidden = status.engines.length <= MANY;
    const wanted = this.filter.value.toLowerCase();
    const shown = status.engines.filter((e) => this.filters.hidden || (e.name.toLowerCase().includes(wanted) && !(this.only.checked && current(e, status))));
    say(this.count, shown.length === status.engines.length ? `Engines (${shown.length})` : `Engines (${shown.length} of ${status.engines.length})`);
    keyed(this.engines.body, shown, (e) => e.name, (e) => {
      const row = h("tr", {}, cells(HEADS));
      row.children[0].append(h("span", { class: "name" }), h("small"));
      row.children[1].append(h("span", { class: "pill" }), h("small"));
      row.lastChild.append(engineButton(e.name));
      return row;
    }, (row, e) => this.drawEngine(row, e, status));
  }

  drawEngine(row, e, status) {
    const [name, word, serves, mode, ranks, says, act] = row.children;
    fill(name, [e.name, e.role === "both" ? e.url : `${e.role} ${e.url}`]);
    fill(word, [e.state, since(e.since)]);
    set(word.firstChild, "data-state", e.state);
    say(serves, staleness(e, status));
    set(serves, "data-bad", !current(e, status));
    say(mode, e.mode || "–");
    say(ranks, e.ranks_expected ? `${e.ranks_connected}/${e.ranks_expected}` : "none");
    set(ranks, "data-bad", e.ranks_connected < e.ranks_expected || !e.ranks_expected);
    const wishes = [status.holds[e.name] !== undefined && `held: ${status.holds[e.name]}`, status.drains[e.name] !== undefined && `drained: ${status.drains[e.name]}`];
    const left = e.left_out.map((l) => `${plural(l.count, "tensor")} ${l.kind}: ${l.reason}`);
    say(says, [e.fault ? `${e.error} (${e.fault})` : e.error, ...wishes, ...left].filter(Boolean).join("; "));
    says.hidden = !says.textContent && matchMedia("(max-width: 46rem)").matches;
    act.hidden = !state.viewer.acts;
  }
}

function fill(row, texts) {
  texts.forEach((text, at) => say(row.children[at], text));
}

function since(unix) {
  return unix ? `for ${ago(now() - unix)}` : "";
}

function same(a, b) {
  return a !== null && b !== null && a.step === b.step && a.generation === b.generation;
}

function current(engine, status) {
  return (engine.state === "serving" || engine.state === "updating") && same(engine.version, status.committed);
}

/** The version, and how far it is from the committed one. Steps tell that within one start of the trainer only. */
function staleness(engine, status) {
  const { version: has, standby } = engine;
  const beside = standby ? `, ${version(standby)} beside it` : "";
  if (!has) return `nothing${beside}`;
  if (!status.committed || same(has, status.committed)) return `${version(has)}${beside}`;
  if (has.generation !== status.committed.generation) return `${version(has)} of another trainer start${beside}`;
  const behind = status.committed.step - has.step;
  return `${version(has)}, ${behind > 0 ? `${plural(behind, "step")} behind` : "not the committed one"}${beside}`;
}

