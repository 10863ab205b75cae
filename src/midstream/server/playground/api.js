// Requests to the server. Paths are relative, so the page also works below a proxy's prefix.

const STORE = "midstream-key";
let key = sessionStorage.getItem(STORE) ?? "";

export const getKey = () => key;

export function setKey(text) {
  key = text.trim();
  if (key) sessionStorage.setItem(STORE, key);
  else sessionStorage.removeItem(STORE);
}

/** An answer that is an error, or no answer at all (status 0). The message is fit to be shown. */
export class ApiError extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const isAbort = (error) => error instanceof DOMException && error.name === "AbortError";

export async function getJson(path) {
  return readJson(await send("GET", path));
}

export async function postJson(path, body, signal) {
  return readJson(await send("POST", path, body, signal));
}

/** The events of a streamed completion, parsed, up to [DONE]. */
export async function* postStream(path, body, signal) {
  const response = await send("POST", path, body, signal);
  let buffer = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { value, done } = await read(reader);
      if (done) throw new ApiError(0, "The answer ended before it was complete: the connection was cut.");
      buffer += value.replaceAll("\r", "");
      const events = buffer.split("\n\n");
      buffer = events.pop();
      for (const event of events) {
        const data = dataOf(event);
        if (data === "[DONE]") return;
        if (data) yield checked(JSON.parse(data));
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function send(method, path, body, signal) {
  const headers = {};
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const options = { method, headers, signal, cache: "no-store", body: body && JSON.stringify(body) };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw isAbort(error) ? error : unreachable();
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function readJson(response) {
  try {
    return await response.json();
  } catch (error) {
    throw isAbort(error) ? error : new ApiError(response.status, "The server's answer could not be read.");
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    throw isAbort(error) ? error : unreachable();
  }
}

function dataOf(event) {
  return event
    .split("\n")
    .filter((line) => line.startsWith("data:"))
    .map((line) => line.slice(5).trimStart())
    .join("\n");
}

function checked(chunk) {
  if (chunk.error) throw new ApiError(chunk.error.status ?? 500, chunk.error.message, chunk.error.code);
  return chunk;
}

async function errorOf(response) {
  let error = null;
  try {
    error = (await response.json()).error;
  } catch {
    // Something before the server answered, such as a proxy; the status has to do.
  }
  return new ApiError(response.status, plain(response, error), error?.code ?? null);
}

function plain(response, error) {
  if (response.status === 401) {
    return key
      ? "The server does not accept this API key. Check it under Settings."
      : "This server asks for an API key. Enter it under Settings.";
  }
  const message = error?.message ?? `The server answered ${response.status} ${response.statusText}`.trim();
  return sentence(message);
}

function sentence(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}

const unreachable = () => new ApiError(0, "The server cannot be reached. Is it still running?");
