// Who computed a token: the base model (null) or an adapter, and the colour each of them has everywhere on the page.

const COLOURS = 8;
const order = [];

/** Give the adapters their colours, in this order. */
export function setOwners(names) {
  for (const name of names) colourOf(name);
}

/** The class that sets --owner for whatever is drawn inside. */
export function ownerClass(name) {
  return name === null ? "owner-base" : `owner-${colourOf(name)}`;
}

export const ownerName = (name) => name ?? "base model";

function colourOf(name) {
  if (!order.includes(name)) order.push(name);
  return (order.indexOf(name) % COLOURS) + 1;
}
