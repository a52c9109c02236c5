// A round as a waterfall: its phases, and under them what each engine, rank and writer had done when.

import { h, keyed, rate, say, seconds, set, size } from "/page/dom.js";

const MANY = 24; // ranks, and half as many engines; of more only those that are behind are shown, unless asked for

// What a lane's segments are: from mark to mark.
const RANK = [["quiesced", "quiescing"], ["exposed", "exposing"], ["verified", "verifying"], ["left", "switching"]];

export class Lanes {
  constructor() {
    this.all = false;
    this.title = h("h2", { text: "Round" });
    this.sentence = h("p");
    this.body = h("tbody");
    this.more = h("button", { type: "button", hidden: true, "aria-expanded": "false", on: { click: () => {
      this.all = !this.all;
      this.draw(this.round);
    } } });
    const heads = h("tr", {}, ["Who", "When", "How far"].map((text) => h("th", { scope: "col", text })));
    this.key = h("ul", { class: "key", "aria-label": "Colours" });
    const table = h("table", { class: "lanes", "aria-label": "The round in time" }, h("thead", { class: "unseen" }, heads), this.body);
    this.node = h("section", { class: "panel", "aria-label": "Round" }, this.title, this.sentence, table, this.key, this.more);
  }

  draw(round) {
    this.round = round;
    this.node.hidden = !round;
    if (!round) return;
    const name = `${round.kind} of step ${round.version.step}`;
    say(this.title, round.over ? `Last round: ${name}` : `Round under way: ${name}`);
    const attempt = round.attempt > 1 ? `, attempt ${round.attempt}` : "";
    const how = round.over ? (round.decided ? `committed in ${seconds(round.elapsed)}` : `given up after ${seconds(round.elapsed)}`) : `${round.phase} for ${seconds(round.elapsed - (round.phases.at(-1)?.[1] ?? 0))}`;
    say(this.sentence, `${round.round}${attempt}: ${how}${round.reason ? `: ${round.reason}` : ""}`);
    set(this.node, "data-running", !round.over);
    const rows = this.rows(round);
    keyed(this.body, rows, (row) => row.key, makeRow, (node, row) => drawRow(node, row, round.elapsed));
    this.drawKey(rows);
    this.more.hidden = isSmall(round);
    say(this.more, this.all ? "Show only those that are behind" : `Show all ${round.engines.length} engines and ${ranksOf(round)} ranks`);
    set(this.more, "aria-expanded", String(this.all));
  }

  /** Each colour that is there, and how long that phase took; an engine's stall is a colour, too. */
  drawKey(rows) {
    const took = new Map(rows[0].segments.map(([phase, from, to]) => [phase, seconds(to - from)]));
    const colours = [...new Set(rows.flatMap((row) => row.segments.map(([phase]) => phase)))];
    keyed(this.key, colours, (colour) => colour, (colour) => h("li", {}, h("span", { class: `swatch p-${colour}`, "aria-hidden": "true" }), h("span")),
      (node, colour) => say(node.lastChild, colour === "stall" ? "does not serve" : `${colour} ${took.get(colour) ?? ""}`));
  }

  rows(round) {
    const phases = round.phases.map(([phase, at], place) => ({ phase, at, until: round.phases[place + 1]?.[1] ?? round.elapsed }));
    const rows = [{ key: "phases", kind: "phases", name: "Phases", says: `${seconds(round.elapsed)} in all`, segments: phases.map((p) => [p.phase, p.at, p.until]) }];
    const few = this.all || isSmall(round);
    const shown = (lanes) => (few ? lanes : lanes.slice(0, MANY / 4));
    const inOrder = (lanes) => (few ? [...lanes].sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true })) : lanes);
    for (const lane of inOrder(shown(round.writers))) rows.push(writerRow(lane, phases, round));
    const ranks = inOrder(shown(round.ranks));
    for (const engine of few ? round.engines : behind(round.engines, ranks)) {
      rows.push(engineRow(engine, round));
      for (const lane of ranks) if (lane.engine === engine.name) rows.push(rankRow(lane, phases));
    }
    return rows;
  }
}

function ranksOf(round) {
  return round.ranks.length + round.writers.length + round.more;
}

function isSmall(round) {
  return ranksOf(round) <= MANY && round.engines.length <= MANY / 2;
}

/** Engines in trouble, those of the ranks that are shown, and those that have come least far: MANY / 2 of them. */
function behind(engines, ranks) {
  const order = (engine) => (engine.trouble ? 0 : ranks.some((rank) => rank.engine === engine.name) ? 1 : 2);
  return [...engines].sort((a, b) => order(a) - order(b) || Object.keys(a.marks).length - Object.keys(b.marks).length).slice(0, MANY / 2);
}

function engineRow(lane, round) {
  const { asked, resume, serves } = lane.marks;
  const switched = lane.marks.switch;
  const back = resume ?? serves;
  const segments = [];
  if (asked !== undefined) segments.push(["stall", asked, back ?? round.elapsed]);
  else if (switched !== undefined) segments.push(["switching", Math.max(0, switched - 0.004 * round.elapsed), switched]);
  const said = [];
  if (lane.trouble) said.push(`left out: ${lane.trouble}`);
  if (asked !== undefined) said.push(back === undefined ? `stands still for ${seconds(round.elapsed - asked)}` : `stood still ${seconds(back - asked)}`);
  else if (switched !== undefined) said.push(`switched at ${seconds(switched)}`);
  else if (round.over) said.push("served on");
  else said.push(lane.lands === "live" ? "serves" : "serves while it lands");
  if (serves !== undefined) said.push(`has it at ${seconds(serves)}`);
  return { key: `e ${lane.name}`, kind: "engine", name: lane.name, note: lane.lands, says: said.join(", "), segments, bad: lane.trouble !== "" };
}

function rankRow(lane, phases) {
  const segments = [];
  let from = 0;
  for (const [mark, phase] of RANK) {
    const at = lane.marks[mark];
    if (at === undefined) continue;
    // From when it could begin: the phase before it may have been over in no time and have no beginning of its own.
    const began = (phases.find((p) => p.phase === phase) ?? phases.findLast((p) => p.at <= at))?.at ?? 0;
    segments.push([phase, Math.min(at, Math.max(from, began)), at]);
    from = at;
  }
  const done = RANK.map(([mark]) => mark).filter((mark) => lane.marks[mark] !== undefined);
  const says = lane.trouble || (done.length ? `${done.at(-1)} at ${seconds(lane.marks[done.at(-1)])}` : "has said nothing yet");
  return { key: `r ${lane.name}`, kind: "rank", name: lane.name, says, segments, bad: lane.trouble !== "" };
}

function writerRow(lane, phases, round) {
  const writing = phases.find((p) => p.phase === "writing")?.at;
  const closed = lane.marks.closed;
  const segments = writing === undefined ? [] : [["writing", writing, closed ?? round.elapsed]];
  const moved = lane.bytes ? `${size(lane.bytes)}, ${rate(lane.bytes, lane.seconds)}` : "";
  const says = lane.trouble || (closed !== undefined ? `closed at ${seconds(closed)}${moved ? `: ${moved}` : ""}` : writing === undefined ? "waits for its grant" : "writes");
  return { key: `w ${lane.name}`, kind: "writer", name: lane.name, note: "writer", says, segments, bad: lane.trouble !== "" };
}

function makeRow(row) {
  return h("tr", { class: row.kind }, h("th", { scope: "row" }, h("span"), h("small")), h("td", { class: "track", "aria-hidden": "true" }, h("div")), h("td", { class: "says" }));
}

function drawRow(node, row, elapsed) {
  const [who, track, says] = node.children;
  say(who.firstChild, row.name);
  who.title = row.name;
  say(who.lastChild, row.note ?? "");
  say(says, row.says);
  says.title = row.says;
  set(node, "data-bad", row.bad);
  const all = Math.max(elapsed, 0.001);
  keyed(track.firstChild, row.segments.map(([phase, from, to], place) => ({ phase, from, to, place })), (s) => `${s.place} ${s.phase}`,
    (s) => h("i", { class: `p-${s.phase}` }),
    (bar, s) => {
      bar.style.left = `${(100 * s.from) / all}%`;
      bar.style.width = `max(2px, ${(100 * (s.to - s.from)) / all}%)`;
      bar.title = `${s.phase}: ${seconds(s.to - s.from)}`;
    });
}
