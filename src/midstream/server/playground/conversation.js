// The conversation: its turns, and what of them is sent.

/** Turns: {role, content, documents}. Documents stand in the user turn in which they were given. */
export const turns = [];

/** The messages of a request. */
export function wire(some = turns) {
  return some.map(({ role, content, documents }) =>
    documents?.length ? { role, content, documents } : { role, content },
  );
}

/** The turns up to the one that an intrinsic judges, or null where there is none yet. */
export function judged(reads) {
  if (reads === "any") return turns.length ? turns.slice() : null;
  const last = turns.findLastIndex((turn) => turn.role === reads);
  return last < 0 ? null : turns.slice(0, last + 1);
}
