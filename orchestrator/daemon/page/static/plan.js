// Who sends what to whom: a map of the edges, what each carried last and how fast, and the tensors behind it.

import { ask, Refused } from "/page/api.js";
import { cells, h, keyed, rate, say, seconds, set, size, svg, table } from "/page/dom.js";

const ROWS = 40;
const CELL = 14;
const MANY = 64; // rows or columns of the map; of more, neighbours are taken together
const EDGE_HEADS = ["From", "To", "Plan", "Descriptors", "Packed", "Last moved", "Last rate"];
const TENSOR_HEADS = ["Tensor", "Count", "Type", "Bytes", "From", "To", "How", "Slot"];
const END_HEADS = ["Who", "Peers", "Bytes", "Descriptors"];

export class PlanView {
  constructor(section) {
    this.summary = h("p", { text: "The plan is not here yet." });
    this.bottleneck = table("How long it takes, by transport", ["Transport", "At least", "Bottleneck"], "wide");
    this.by = h("select", { id: "map-by", on: { change: () => this.draw() } }, h("option", { value: "rate", text: "measured rate" }), h("option", { value: "bytes", text: "bytes of the plan" }));
    this.map = svg("svg", { role: "img" });
    this.mapNote = h("p", { class: "faint", role: "status" });
    this.edges = table("Edges", EDGE_HEADS, "wide");
    this.find = h("input", { id: "find", type: "search", autocomplete: "off", on: { input: () => this.draw() } });
    this.tensors = table("Tensors", TENSOR_HEADS, "wide");
    this.senders = table("Senders", END_HEADS, "wide");
    this.receivers = table("Receivers", END_HEADS, "wide");
    this.unneeded = h("p", { class: "faint" });
    this.content = h("div", { hidden: true },
      h("h2", { text: "Edges" }), h("p", { class: "row" }, h("label", { for: "map-by", text: "Shade by" }), this.by), h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Map of edges" }, this.map), this.mapNote,
      h("p", { class: "row" }, h("label", { for: "find", text: "Find a rank or tensor" }), this.find), this.edges.node,
      h("h2", { text: "Tensors" }), this.tensors.node, this.unneeded,
      h("h2", { text: "Time on the wire" }), this.bottleneck.node,
      h("details", {}, h("summary", { text: "Ends" }), this.senders.node, this.receivers.node));
    section.append(this.summary, this.content);
  }

  /** Ask anew; `plan` stays what it was where the daemon is busy. */
  async load() {
    try {
      const rates = (await ask("/plan/rates")).edges;
      this.rates = new Map(rates.map(([source, target, bytes, time]) => [`${source} ${target}`, { bytes, time }]));
      this.plan = await ask("/plan/explanation");
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      if (!this.plan) say(this.summary, error.message);
    }
    this.draw();
  }

  draw() {
    const { plan } = this;
    if (!plan) return;
    this.content.hidden = false;
    const moved = plan.moved;
    say(this.summary, `Plan ${plan.root.slice(0, 12)}: ${size(moved.direct_bytes + moved.packed_bytes)} over ${plan.edge_count} edges in ${moved.descriptors} descriptors, ${size(moved.packed_bytes)} of it packed.`);
    rows(this.bottleneck, Object.keys(plan.seconds), (name) => name, (name) => [name, seconds(plan.seconds[name]), plan.bottleneck[name]]);
    this.drawMap();
    const wanted = this.find.value.toLowerCase();
    const edges = plan.edges.filter((e) => `${e.source} ${e.target}`.toLowerCase().includes(wanted));
    const tensors = plan.tensors.filter((t) => t.name.toLowerCase().includes(wanted));
    rows(this.edges, (edges.length || !tensors.length ? edges : plan.edges).slice(0, ROWS), (e) => `${e.source} ${e.target}`, (e) => {
      const last = this.rates.get(`${e.source} ${e.target}`);
      return [e.source, e.target, size(total(e)), `${e.moved.descriptors}`, size(e.moved.packed_bytes), last ? size(last.bytes) : "–", last ? rate(last.bytes, last.time) : "–"];
    });
    rows(this.tensors, (tensors.length || !edges.length ? tensors : plan.tensors).slice(0, ROWS), (t) => `${t.name} ${t.dtype} ${t.shape}`,
      (t) => [t.name, `${t.tensors}`, `${t.dtype} ${t.shape.join("×")}`, size(total(t)), `${t.sources}`, `${t.targets}`, t.how, `${t.slot} ${t.reason}`]);
    for (const [one, ends] of [[this.senders, plan.senders], [this.receivers, plan.receivers]])
      rows(one, ends.slice(0, ROWS), (e) => e.member, (e) => [e.member, `${e.peers}`, size(total(e)), `${e.moved.descriptors}`]);
    say(this.unneeded, plan.unneeded.length ? `Held by the trainer and needed by no engine: ${plan.unneeded.join(", ")}` : "");
  }

  drawMap() {
    const edges = this.plan.edges;
    const [sources, targets] = [bins(edges.map((e) => e.source)), bins(edges.map((e) => e.target))];
    const sums = new Map();
    for (const edge of edges) {
      const key = `${sources.of.get(edge.source)} ${targets.of.get(edge.target)}`;
      const sum = sums.get(key) ?? { bytes: 0, moved: 0, slowest: Infinity };
      const last = this.rates.get(`${edge.source} ${edge.target}`);
      sum.bytes += total(edge);
      if (last?.time) [sum.moved, sum.slowest] = [sum.moved + last.bytes, Math.min(sum.slowest, last.bytes / last.time)];
      sums.set(key, sum);
    }
    const byRate = this.by.value === "rate";
    const valueOf = (sum) => (byRate ? (sum.slowest === Infinity ? 0 : sum.slowest) : sum.bytes);
    const most = Math.max(1e-12, ...[...sums.values()].map(valueOf));
    const [left, top] = [110, 16];
    const shapes = sources.names.map((name, y) => svg("text", { x: left - 6, y: top + y * CELL + CELL - 3, "text-anchor": "end", text: name }));
    for (const [key, sum] of sums) {
      const [y, x] = key.split(" ").map(Number);
      const value = valueOf(sum);
      const cell = svg("rect", { x: left + x * CELL, y: top + y * CELL, width: CELL - 1, height: CELL - 1, class: value ? "cell" : "cell none" },
        svg("title", { text: `${sources.names[y]} to ${targets.names[x]}: ${size(sum.bytes)} planned, ${sum.moved ? `slowest edge ${rate(sum.slowest, 1)}` : "not measured yet"}` }));
      cell.style.fillOpacity = value ? 0.15 + 0.85 * (value / most) : 1;
      shapes.push(cell);
    }
    const wide = left + targets.names.length * CELL + 8;
    const high = top + sources.names.length * CELL + 8;
    this.map.replaceChildren(...shapes);
    set(this.map, "viewBox", `0 0 ${wide} ${high}`);
    set(this.map, "width", wide);
    set(this.map, "height", high);
    const measured = [...this.rates.entries()].filter(([, r]) => r.time).map(([edge, r]) => [edge, r.bytes / r.time]).sort((a, b) => a[1] - b[1]);
    const slowest = measured.length ? `Slowest last time: ${measured[0][0].replace(" ", " to ")}, ${rate(measured[0][1], 1)}; fastest ${rate(measured.at(-1)[1], 1)}.` : "No edge has been measured yet.";
    say(this.mapNote, `${slowest} Rows send, columns receive (${targets.names[0]} to ${targets.names.at(-1)}); the stronger, the ${byRate ? "faster" : "more"}.`);
    set(this.map, "aria-label", `Map of ${edges.length} edges. ${this.mapNote.textContent}`);
  }
}

function total(report) {
  return report.moved.direct_bytes + report.moved.packed_bytes;
}

/** The distinct names in order, many of them taken together: `of` name → place, `names` of the places. */
function bins(all) {
  const distinct = [...new Set(all)].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  const width = Math.ceil(distinct.length / MANY);
  const names = [];
  for (let at = 0; at < distinct.length; at += width) names.push(width === 1 ? distinct[at] : `${distinct[at]} …`);
  return { of: new Map(distinct.map((name, at) => [name, Math.floor(at / width)])), names };
}

function rows({ node, body }, items, keyOf, textsOf) {
  const heads = [...node.querySelectorAll("thead th")].map((head) => head.textContent);
  keyed(body, items, keyOf, () => h("tr", {}, cells(heads)), (row, item) => textsOf(item).forEach((text, at) => say(row.children[at], text)));
}

