// Rounds that have ended: charts of what they cost, what became of each, and one of them in full.

import { cells, clock, h, keyed, rate, say, seconds, set, size, svg, table } from "/page/dom.js";
import { state, stood, without } from "/page/state.js";

const ROWS = 50; // of the table; charts have all
const HEADS = ["Round", "When", "Step", "Outcome", "Stall", "Moved", "Rate", "Total", "Why"];
const PHASES = ["pausing", "quiescing", "marking", "exposing", "writing", "verifying", "deciding", "switching", "recording"];
const [WIDE, HIGH] = [640, 96];

const CHARTS = [
  ["Stall", (row) => stood(row) / 1000, seconds],
  ["Moved", (row) => row.bytes, size],
  ["Rate", (row) => row.wire_gb_per_s * 1e9, (value) => `${size(value)}/s`],
];

export class HistoryView {
  constructor(section) {
    this.summary = h("p");
    this.charts = CHARTS.map(([title]) => {
      const drawing = svg("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", preserveAspectRatio: "none" });
      const caption = h("figcaption", {}, h("strong", { text: title }), h("span"));
      return { drawing, caption, node: h("figure", {}, caption, drawing) };
    });
    this.failures = h("ul", { class: "problems", "aria-label": "Failures" });
    this.one = h("section", { class: "panel", "aria-label": "One round", "aria-live": "polite", hidden: true });
    this.rows = table("Rounds, newest first", HEADS);
    this.rows.node.classList.add("rounds");
    section.append(this.summary, h("div", { class: "charts" }, this.charts.map((chart) => chart.node)), h("h2", { text: "Failures" }), this.failures,
      this.one, h("h2", { text: "Rounds" }), this.rows.node);
  }

  draw() {
    const rows = state.rounds;
    if (this.drawn === rows) return;
    this.drawn = rows;
    const failed = rows.filter((row) => row.outcome !== "committed");
    say(this.summary, rows.length ? `The last ${rows.length} rounds, since ${clock(rows[0].unix_time)}: ${failed.length} failed.` : "No round has ended yet.");
    this.charts.forEach((chart, at) => drawChart(chart, CHARTS[at], rows));
    const newest = failed.slice(-10).reverse();
    this.failures.hidden = !newest.length;
    keyed(this.failures, newest, (row) => row.round, (row) => h("li", { class: "degraded" }, h("strong", { text: `Step ${row.step}` }),
      h("span", { text: `${row.reason || row.outcome}${row.fault ? ` (${row.fault})` : ""}` }), h("span", { class: "fix", text: `${row.kind} ${row.round}, attempt ${row.attempt}, ${clock(row.unix_time)}` })));
    set(this.failures.previousElementSibling, "hidden", newest.length ? false : "hidden");
    keyed(this.rows.body, rows.slice(-ROWS).reverse(), (row) => row.round, (row) => this.row(row));
  }

  row(row) {
    const made = cells(HEADS);
    const open = h("button", { type: "button", class: "link-like", text: row.round, "aria-label": `Show round ${row.round}`, on: { click: () => this.show(row) } });
    made[0].append(open);
    const why = [row.outcome === "committed" ? "" : row.reason, without(row)].filter(Boolean).join("; ");
    const texts = [clock(row.unix_time), `${row.step}${row.kind === "publish" ? "" : ` (${row.kind})`}`, "", seconds(stood(row) / 1000), row.bytes ? size(row.bytes) : "–",
      row.wire_gb_per_s ? rate(row.wire_gb_per_s * 1e9, 1) : "–", seconds(row.total_ms / 1000), why];
    texts.forEach((text, at) => say(made[at + 1], text));
    made[3].append(h("span", { class: "pill", "data-state": row.outcome === "committed" ? "serving" : "torn", text: row.outcome }));
    return h("tr", {}, made);
  }

  show(row) {
    const phases = PHASES.filter((phase) => row.times_ms[phase] !== undefined);
    const all = Math.max(1e-9, ...phases.map((phase) => row.times_ms[phase]));
    const bars = phases.map((phase) => {
      const bar = h("i", { class: `p-${phase}` });
      bar.style.width = `max(2px, ${(100 * row.times_ms[phase]) / all}%)`;
      return h("tr", {}, h("th", { scope: "row", text: phase }), h("td", { class: "track", "aria-hidden": "true" }, h("div", {}, bar)), h("td", { class: "says", text: seconds(row.times_ms[phase] / 1000) }));
    });
    const engines = row.engines.map((name) => `${name}${row.modes[name] ? ` (${row.modes[name]}${row.stalls_ms[name] === undefined ? "" : `, stood still ${seconds(row.stalls_ms[name] / 1000)}`})` : ""}`);
    const from = Object.entries(row.lenders).map(([taker, lender]) => `${taker} from ${lender}`);
    const facts = [`Engines: ${engines.join(", ")}.`];
    if (row.left_out.length) facts.push(`${without(row)}.`);
    if (from.length) facts.push(`${size(row.trainer_bytes)} left the trainer; from another engine: ${from.join(", ")}.`);
    this.one.hidden = false;
    this.one.replaceChildren(h("h2", { text: `Round ${row.round}: ${row.kind} of step ${row.step}, ${row.outcome}`, tabindex: "-1" }),
      h("p", { text: row.outcome !== "committed" && row.reason ? row.reason : `Engines stood still ${seconds(stood(row) / 1000)} at most; from the first that served it to the last ${seconds(row.skew_ms / 1000)}.` }),
      h("table", { class: "lanes", "aria-label": "Phases" }, h("tbody", {}, bars)), h("p", { class: "faint", text: facts.join(" ") }));
    this.one.firstChild.focus();
  }
}

function drawChart({ drawing, caption }, [title, valueOf, textOf], rows) {
  const values = rows.map(valueOf);
  const most = Math.max(1e-12, ...values);
  const good = values.filter((_, at) => rows[at].outcome === "committed").sort((a, b) => a - b);
  const middle = good.length ? textOf(good[Math.floor(good.length / 2)]) : "–";
  const said = rows.length ? ` median ${middle}, most ${textOf(most < 1e-11 ? 0 : most)}` : " nothing yet";
  say(caption.lastChild, said);
  drawing.setAttribute("aria-label", `${title} of each round:${said}`);
  const step = WIDE / Math.max(rows.length, 20);
  drawing.replaceChildren(...rows.map((row, at) => {
    const failed = row.outcome !== "committed";
    const height = failed ? HIGH : Math.max(1, (HIGH * values[at]) / most);
    return svg("rect", { x: at * step, y: HIGH - height, width: Math.max(1, step - 1), height, class: failed ? "failed" : "bar" },
      svg("title", { text: `${row.round}, step ${row.step}: ${failed ? row.reason : textOf(values[at])}` }));
  }));
}
