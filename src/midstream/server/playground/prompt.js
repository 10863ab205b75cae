// The tokens of a call's prompt: the text of each, who owns it, and whether it was reused.

import { postJson } from "./api.js";
import { wire } from "./conversation.js";

/** A call's cells: {text, id, owner, reused}. `text` is null where the server does not tell it. */
export async function cellsOf(call, baseModel) {
  call.cells ??= await fetchCells(call, baseModel);
  return call.cells;
}

async function fetchCells(call, baseModel) {
  const rendered = await postJson("tokenize", {
    model: call.owner ?? baseModel,
    messages: wire(call.turns),
    add_generation_prompt: true,
    return_token_strs: true,
  });
  const tokens = rendered.tokens.map((id, i) => ({ id, text: rendered.token_strs[i] }));
  const reused = call.usage.prompt_tokens_details.cached_tokens;
  const start = call.activation ?? Infinity;
  return aligned(tokens, call).map((token, i) => ({
    ...token,
    owner: i >= start ? call.owner : null,
    reused: i < reused,
  }));
}

/** Exactly as many tokens as the prompt had. An intrinsic's own instruction stands between the conversation and the
 * invocation, and only the server knows its text: its tokens are there, without a text. */
function aligned(tokens, call) {
  const total = call.usage.prompt_tokens;
  const missing = total - tokens.length;
  if (missing === 0) return tokens;
  const tail = call.activation ? total - call.activation : 0;
  if (missing < 0 || tail > tokens.length) return Array.from({ length: total }, unknown);
  const seam = tokens.length - tail;
  return [...tokens.slice(0, seam), ...Array.from({ length: missing }, unknown), ...tokens.slice(seam)];
}

const unknown = () => ({ id: null, text: null });

/** Calls made together, as a tree: {calls, cells, children}. `cells` are what these calls share beyond their parent;
 * a segment of one call is what is its own. A shared token counts as reused if none of the calls computed it. */
export function planOf(calls, sequences) {
  return segmentOf(calls.map((call, i) => ({ call, cells: sequences[i] })), 0);
}

function segmentOf(members, start) {
  const calls = members.map(({ call }) => call);
  const first = members[0].cells;
  if (members.length === 1) return { calls, cells: first.slice(start), children: [] };
  const end = partingOf(members, start);
  const cells = first.slice(start, end).map((cell, i) => ({
    ...cell,
    reused: members.every((member) => member.cells[start + i].reused),
  }));
  const groups = Map.groupBy(members, (member) => keyOf(member, end));
  return { calls, cells, children: [...groups.values()].map((group) => segmentOf(group, end)) };
}

function partingOf(members, start) {
  let end = start;
  while (new Set(members.map((member) => keyOf(member, end))).size === 1) end += 1;
  return end;
}

/** Equal for two calls that have the same KV there. Where the token is not known, or there is none, a call is alone. */
function keyOf(member, position) {
  const cell = member.cells[position];
  return cell && cell.id !== null ? `${cell.id} ${cell.owner ?? ""}` : member.call;
}
