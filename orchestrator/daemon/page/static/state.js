// What the page knows, in one place. Views draw from it and change nothing in it.

export const MAX_ROUNDS = 200;

export const state = {
  viewer: { credential: "", acts: false },
  status: null,
  lanes: null,
  rounds: [], // oldest first
  offset: 0, // seconds that this browser's clock is behind the daemon's
};

/** The daemon's clock, in unix seconds. */
export function now() {
  return Date.now() / 1000 + state.offset;
}

/** The round's lanes, as old as the status says that it is: they come only when something happens in it. */
export function aged(lanes, progress) {
  if (!lanes || lanes.over || lanes.round !== progress?.round) return lanes;
  return { ...lanes, elapsed: Math.max(lanes.elapsed, progress.elapsed_seconds) };
}

/** Milliseconds that an engine took no step in this round, at most: paused, or to switch. */
export function stood(row) {
  return Math.max(row.stall_ms, row.switch_ms);
}

/** Which engines a round went on without, and why; of one that was committed, its reason says that. */
export function without(row) {
  if (!row.left_out.length) return "";
  return `left out: ${row.outcome === "committed" && row.reason ? row.reason : row.left_out.join(", ")}`;
}

/** Add rows of rounds, newer ones last; a round that is known already counts once. */
export function remember(rows) {
  const known = new Map(state.rounds.map((row) => [row.round, row]));
  for (const row of rows) known.set(row.round, row);
  state.rounds = [...known.values()].sort((a, b) => a.unix_time - b.unix_time).slice(-MAX_ROUNDS);
}
