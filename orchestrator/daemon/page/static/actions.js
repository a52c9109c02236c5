// The operator's verbs. Each is asked about once more, with what it does, before anything is sent.

import { order, Refused } from "/page/api.js";
import { h, say } from "/page/dom.js";
import { state } from "/page/state.js";

const BY = "weightsync.by";

// Verb → [what the button says, what it does, whether it needs a second yes].
const OF_ENGINE = {
  drain: ["Drain", "takes part in no further round, and its readiness is 503. It serves on until another version is decided.", false],
  hold: ["Hold", "is paused now and serves nobody until it is released.", false],
  release: ["Release", "is neither held, drained nor forgotten any more; it catches up if it has to.", false],
  forget: ["Forget", "is no member any more, until it is released. Do it when its server is gone for good.", true],
};
const OF_FLEET = {
  retry: ["Retry now", "No engine and no version waits for its next attempt any longer.", false],
  abort: ["Abort the round", "The round under way is given up, if nothing is decided yet. Engines that land live may be torn by it, and stay paused until another round repairs them.", true],
  rollback: ["Roll back", "Engines switch back to what they have in standby.", true, "Step (empty: the version before)", false],
  "declare-dead": ["Declare a writer dead", "You have made sure that this trainer process has ended. If it has not, it can still write into engines.", true, "Writer, for example trainer/3", true],
};

const dialog = () => document.getElementById("dialog");

/** The button that opens the verbs of one engine. */
export function engineButton(name) {
  return h("button", { type: "button", "aria-haspopup": "dialog", "aria-label": `Actions on ${name}`, text: "Act…", on: { click: () => choose(name) } });
}

/** The verbs of the fleet, as buttons. */
export function fleetButtons() {
  const buttons = Object.entries(OF_FLEET).map(([verb, [text]]) =>
    h("button", { type: "button", "aria-haspopup": "dialog", text: `${text}…`, on: { click: () => confirm(verb, "", OF_FLEET[verb], text) } }));
  const maintenance = h("button", { type: "button", "aria-haspopup": "dialog", text: "Maintenance…", on: { click: () => {
    const on = !state.status?.maintenance;
    const what = on ? "No round begins until it is switched off; engines go on with what they have." : "Rounds may begin again.";
    confirm("maintenance", on ? "on" : "off", ["", what, false], on ? "Begin maintenance" : "End maintenance");
  } } });
  return [...buttons, maintenance];
}

function choose(engine) {
  const verbs = Object.entries(OF_ENGINE).map(([verb, [text, what]]) =>
    h("li", {}, h("button", { type: "button", text: `${text} ${engine}…`, on: { click: () => confirm(verb, engine, OF_ENGINE[verb], `${text} ${engine}`) } }),
      h("p", { class: "faint", text: `It ${what}` })));
  show(h("h2", { id: "dialog-title", text: `Actions on ${engine}` }), h("ul", { class: "choices" }, verbs), h("p", { class: "row" }, cancel()));
}

function confirm(verb, target, [, what, twice, asks, required], title) {
  const field = asks ? h("input", { id: "act-target", required, autocomplete: "off", maxlength: "200" }) : null;
  const reason = h("input", { id: "act-reason", autocomplete: "off", maxlength: "300" });
  const by = h("input", { id: "act-by", autocomplete: "off", maxlength: "120", value: sessionStorage.getItem(BY) ?? "" });
  const sure = twice ? h("input", { id: "act-sure", type: "checkbox", required: true }) : null;
  const error = h("p", { class: "bad", role: "alert" });
  const send = h("button", { type: "submit", class: twice ? "danger" : "primary", text: title });
  const form = h("form", { on: { submit: async (event) => {
    event.preventDefault();
    send.disabled = true;
    say(error, "");
    sessionStorage.setItem(BY, by.value);
    try {
      const says = await order(verb, field ? field.value.trim() : target, reason.value, by.value);
      dialog().close();
      tell(`${title}: ${says}.`);
    } catch (problem) {
      say(error, problem instanceof Refused ? problem.message : "The daemon does not answer; it may or may not have heard. Look at the fleet before you try again.");
      send.disabled = false;
    }
  } } },
    h("p", { text: OF_ENGINE[verb] ? `${target} ${what}` : what }),
    field && [h("label", { for: "act-target", text: asks }), field],
    h("label", { for: "act-reason", text: "Reason, for the audit log" }), reason,
    h("label", { for: "act-by", text: "Your name, for the audit log" }), by,
    sure && h("p", { class: "check" }, sure, h("label", { for: "act-sure", text: "I know what this does" })),
    error,
    h("p", { class: "row" }, send, cancel()));
  show(h("h2", { id: "dialog-title", text: `${title}?` }), form);
  (field ?? reason).focus();
}

function cancel() {
  return h("button", { type: "button", text: "Cancel", on: { click: () => dialog().close() } });
}

function show(...content) {
  dialog().replaceChildren(...content);
  if (!dialog().open) dialog().showModal();
}

/** A sentence that stays until it is dismissed, and is read out. */
function tell(text) {
  const place = document.getElementById("said");
  place.replaceChildren(h("p", { text }), h("button", { type: "button", text: "Dismiss", on: { click: () => place.replaceChildren() } }));
}
