// Where the nodes of the KV tree are drawn: x is the position of their tokens, each branch has a row of its own.

const ALONE = 0;

/** Places nodes, as GET /v1/cache lists them: [{node, start, row, from}], `from` being the parent's row. */
export function layout(nodes) {
  const children = new Map();
  const ids = new Set(nodes.map((node) => node.id));
  for (const node of nodes) {
    // A node whose parent was left out of the list is drawn as a root.
    const parent = ids.has(node.parent) ? node.parent : ALONE;
    children.set(parent, [...(children.get(parent) ?? []), node]);
  }
  const reach = reaches(nodes, children);
  const before = (a, b) => reach.get(b.id) - reach.get(a.id);
  for (const siblings of children.values()) siblings.sort(before);
  const placed = [];
  const taken = [];
  for (const root of children.get(ALONE) ?? []) {
    placeChain({ root, start: 0, from: taken.length - 1, isRoot: true }, children, placed, taken);
  }
  return { placed, rows: taken.length, width: Math.max(1, ...placed.map(({ start, node }) => start + node.tokens)) };
}

/** How many tokens the longest way through and below each node has. */
function reaches(nodes, children) {
  const reach = new Map();
  // Parents come before children, so that from the end each node finds its children done.
  for (const node of nodes.toReversed()) {
    const below = (children.get(node.id) ?? []).map((child) => reach.get(child.id) ?? 0);
    reach.set(node.id, node.tokens + Math.max(0, ...below));
  }
  return reach;
}

/** A node with the longest way below it in one row, then the branches of all of them, the rightmost first, so that no
 * line to a branch has to cross a bar. */
function placeChain(first, children, placed, taken) {
  const pending = [first];
  while (pending.length) {
    const { root, start, from, isRoot } = pending.pop();
    const { chain, branches, end } = chainOf(root, start, children);
    const row = freeRow(taken, from + 1, start, end);
    (taken[row] ??= []).push([start, end]);
    for (const link of chain) {
      placed.push({ ...link, row, from: link.node === root && !isRoot ? from : null });
    }
    pending.push(...branches.map(([node, at]) => ({ root: node, start: at, from: row, isRoot: false })));
  }
}

function chainOf(root, start, children) {
  const chain = [];
  const branches = [];
  let end = start;
  for (let node = root; node; ) {
    chain.push({ node, start: end });
    end += node.tokens;
    const [next, ...others] = children.get(node.id) ?? [];
    branches.push(...others.map((other) => [other, end]));
    node = next;
  }
  return { chain, branches, end };
}

function freeRow(taken, first, start, end) {
  const overlaps = ([a, b]) => a < end && start < b;
  const crosses = ([a, b]) => a < start && start < b;
  let row = first;
  while ((taken[row] ??= []).some(overlaps)) {
    if (taken[row].some(crosses)) return freshRow(taken);
    row += 1;
  }
  return row;
}

function freshRow(taken) {
  taken.push([]);
  return taken.length - 1;
}
