// Puts the page together: who is signed in, which view is shown, and what comes over the stream.

import { ask, Follower, holdsToken, keep, signedIn } from "/page/api.js";
import { AuditView } from "/page/audit.js";
import { ago, say, set } from "/page/dom.js";
import { FleetView } from "/page/fleet.js";
import { HistoryView } from "/page/history.js";
import { PlanView } from "/page/plan.js";
import { aged, MAX_ROUNDS, now, remember, state } from "/page/state.js";

const THEME = "weightsync.theme";
const THEMES = ["system", "light", "dark"];
const byId = (id) => document.getElementById(id);

const views = {
  fleet: new FleetView(byId("view-fleet")),
  history: new HistoryView(byId("view-history")),
  plan: new PlanView(byId("view-plan")),
  audit: new AuditView(byId("view-audit")),
};
let shown = "";
let drawing = false;
let link = ["off", ""];
let announced = "";

const follower = new Follower(heard, (word, why) => {
  if (word === "denied") signOut(holdsToken() ? `The daemon refused: ${why}.` : "");
  else if (word !== link[0] || why !== link[1]) {
    link = [word, why];
    draw();
  }
});

function heard(name, data) {
  if (name === "viewer") {
    state.viewer = data;
    arrive();
  } else if (name === "status") {
    state.status = data;
    state.offset = data.unix_time - Date.now() / 1000;
    state.lanes = aged(state.lanes, data.round);
    announce(data);
  } else if (name === "lanes") state.lanes = data && { ...data, engines: data.engines.map(whole), ranks: data.ranks.map(whole), writers: data.writers.map(whole) };
  else if (name === "ended") {
    remember([data]);
    load();
  }
  draw();
}

/** A lane with what the daemon leaves out, because it is nothing. */
function whole(lane) {
  return { engine: "", lands: "", bytes: 0, seconds: 0, trouble: "", ...lane };
}

/** Signed in, or back: what happened meanwhile is asked for. */
async function arrive() {
  byId("sign-in").hidden = true;
  byId("views").hidden = byId("sign-out").hidden = false;
  route();
  await attempt(async () => remember((await ask(`/rounds?last=${MAX_ROUNDS}`)).rounds));
  draw();
}

/** What the shown view asks for besides the stream. */
function load() {
  return attempt(() => views[shown]?.load?.());
}

/** A question that fails is asked again after the next round, or when the view is opened; the stream says what is wrong. */
async function attempt(asked) {
  try {
    await asked();
  } catch (error) {
    console.warn("weightsync:", error);
  }
}

/** Read out what matters: commits and problems, not every phase. */
function announce(status) {
  const worst = status.problems.map((p) => `${p.severity}: ${p.what}`).slice(0, 3);
  const text = [status.committed ? `Step ${status.committed.step} is committed.` : "", ...worst].join(" ");
  const word = status.problems.some((p) => p.severity === "critical") ? "critical" : status.problems.length ? "degraded" : "well";
  document.title = `${{ critical: "✖ ", degraded: "▲ ", well: "" }[word]}${status.run} · weightsync`;
  if (text === announced) return;
  announced = text;
  say(byId("announce"), text);
}

function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    const [word, why] = link;
    const age = state.status ? now() - state.status.unix_time : 0;
    set(byId("link"), "data-state", word);
    say(byId("link"), word === "live" ? "live" : word === "off" ? "not signed in" : `not live: ${why}${state.status ? `; this is ${ago(age)} old` : ""}`);
    set(byId("main"), "data-stale", word === "waiting");
    say(byId("run"), state.status?.run ?? "");
    if (shown === "fleet" || shown === "history") views[shown].draw();
  });
}

// ------------------------------------------------------------------------------------------------------------ views
function route() {
  if (!signedIn() || !byId("sign-in").hidden) return;
  const wanted = location.hash.slice(1);
  const next = views[wanted] ? wanted : shown || "fleet";
  for (const name of Object.keys(views)) byId(`view-${name}`).hidden = name !== next;
  for (const anchor of byId("views").children) set(anchor, "aria-current", anchor.hash === `#${next}` && "page");
  const moved = shown !== "" && shown !== next;
  shown = next;
  if (moved) {
    byId(`title-${next}`).focus({ preventScroll: true });
    scrollTo(0, 0);
  }
  load();
  draw();
}

function signOut(why) {
  keep("");
  follower.stop();
  Object.assign(state, { status: null, lanes: null, rounds: [], viewer: { credential: "", acts: false } });
  [link, shown, announced] = [["off", ""], "", ""];
  byId("dialog").close();
  byId("said").replaceChildren();
  byId("views").hidden = byId("sign-out").hidden = true;
  for (const name of Object.keys(views)) byId(`view-${name}`).hidden = true;
  byId("sign-in").hidden = false;
  document.title = "weightsync";
  say(byId("sign-in-error"), why);
  byId("token").value = "";
  byId("token").focus();
  draw();
}

byId("sign-in-form").addEventListener("submit", (event) => {
  event.preventDefault();
  say(byId("sign-in-error"), "");
  keep(byId("token").value.trim());
  byId("token").value = "";
  follower.start();
});
byId("sign-out").addEventListener("click", () => signOut(""));
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  byId("main").focus();
});
addEventListener("hashchange", route);
setInterval(draw, 1000); // ages grow also while nothing comes

// ------------------------------------------------------------------------------------------------------------ theme
function theme(name) {
  sessionStorage.setItem(THEME, name);
  set(document.documentElement, "data-theme", name === "system" ? "" : name);
  say(byId("theme"), `Theme: ${name}`);
}
byId("theme").addEventListener("click", () => theme(THEMES[(THEMES.indexOf(sessionStorage.getItem(THEME) ?? "system") + 1) % THEMES.length]));
theme(sessionStorage.getItem(THEME) ?? "system");

if (signedIn()) follower.start();
else signOut("");
