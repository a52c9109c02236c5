// Speaks with the daemon that this page came from. The token is in this tab's memory and sessionStorage, never in a
// cookie: no other site can make this browser act.

const KEY = "weightsync.token";
const SILENCE_MS = 8000; // a status comes every second
const BACKOFF_MS = [250, 500, 1000, 2000, 4000, 8000];

let token = sessionStorage.getItem(KEY) ?? "";

/** What the daemon answered instead; `message` is its sentence. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function holdsToken() {
  return token !== "";
}

export function signedIn() {
  return holdsToken() || location.protocol === "https:"; // there a certificate may be credential enough
}

export function keep(value) {
  token = value;
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

function request(path, options = {}) {
  const headers = { ...options.headers };
  if (token) headers.Authorization = `Bearer ${token}`;
  return fetch(path, { ...options, headers, credentials: "omit", cache: "no-store", redirect: "error" });
}

async function checked(answer) {
  if (!answer.ok) throw new Refused(answer.status, (await answer.text()).trim() || `HTTP ${answer.status}`);
  return answer;
}

/** GET of JSON. Throws Refused, or TypeError where nobody answers. */
export async function ask(path) {
  return (await checked(await request(path, { signal: AbortSignal.timeout(30000) }))).json();
}

/** An operator's verb; the daemon's sentence of what happens now. Throws as `ask`. */
export async function order(verb, target, reason, by) {
  const body = JSON.stringify({ target, reason, by });
  const options = { method: "POST", body, headers: { "Content-Type": "application/json" } };
  const answer = await checked(await request(`/verbs/${encodeURIComponent(verb)}`, { ...options, signal: AbortSignal.timeout(30000) }));
  return (await answer.json()).says;
}

/** Follows the stream while the page is seen. `heard(name, data)`; `state("live" | "waiting" | "denied", why)`. */
export class Follower {
  constructor(heard, state) {
    [this.heard, this.state, this.running] = [heard, state, false];
    document.addEventListener("visibilitychange", () => this.look());
  }

  start() {
    this.wanted = true;
    this.look();
  }

  stop() {
    this.wanted = false;
    this.abort?.abort();
  }

  /** A hidden page holds no stream: a browser has six connections for all tabs of one server. */
  look() {
    if (document.hidden) this.abort?.abort();
    else if (this.wanted && !this.running) this.run();
    else this.wake?.();
  }

  async run() {
    this.running = true;
    let failures = 0;
    while (this.wanted && !document.hidden) {
      try {
        await this.once(() => (failures = 0));
        failures = 0;
      } catch (error) {
        if (!this.wanted || document.hidden) break;
        if (error instanceof Refused && (error.status === 401 || error.status === 403)) {
          this.wanted = false;
          this.state("denied", error.message);
          break;
        }
        this.state("waiting", error instanceof Refused ? error.message : "the daemon does not answer");
        const pause = BACKOFF_MS[Math.min(failures++, BACKOFF_MS.length - 1)] * (0.5 + Math.random());
        await new Promise((resolve) => {
          this.wake = resolve;
          setTimeout(resolve, pause);
        });
      }
    }
    this.running = false;
  }

  async once(well) {
    const abort = (this.abort = new AbortController());
    let silence = setTimeout(() => abort.abort(), SILENCE_MS);
    try {
      const answer = await checked(await request("/stream", { signal: abort.signal }));
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        clearTimeout(silence);
        silence = setTimeout(() => abort.abort(), SILENCE_MS);
        text += value;
        for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) this.tell(text.slice(0, end));
        well();
        this.state("live", "");
      }
    } finally {
      clearTimeout(silence);
    }
  }

  tell(event) {
    const at = event.indexOf("\ndata: ");
    this.heard(event.slice("event: ".length, at), JSON.parse(event.slice(at + "\ndata: ".length)));
  }
}
