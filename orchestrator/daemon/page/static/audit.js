// What operators asked for, newest first.

import { ask, Refused } from "/page/api.js";
import { cells, h, keyed, say, table } from "/page/dom.js";

const HEADS = ["Time", "Who", "Asked", "Answer", "Reason", "Number"];

export class AuditView {
  constructor(section) {
    this.summary = h("p", { text: "Nobody has asked for anything yet." });
    this.rows = table("Audit log, newest first", HEADS);
    section.append(this.summary, this.rows.node);
  }

  async load() {
    try {
      const { lines } = await ask("/audit");
      if (lines.length) say(this.summary, `The last ${lines.length} requests. weightsync-orchestrator audit verify proves that none was changed.`);
      keyed(this.rows.body, lines.reverse(), (line) => `${line.number} ${line.time}`, (line) => {
        const row = h("tr", {}, cells(HEADS));
        const texts = [line.time, `${line.who} (${line.credential}, ${line.address})`, `${line.verb} ${line.target}`, line.result, line.reason || "–", `${line.number}`];
        texts.forEach((text, at) => say(row.children[at], text));
        return row;
      });
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      say(this.summary, error.message);
    }
  }
}
