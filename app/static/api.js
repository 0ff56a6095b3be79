// Talking to the service: requests, problems and streams of events.

// The key is kept for this tab only, and only until the next load where the browser forbids storage.
const storage = (() => {
  try {
    return window.sessionStorage;
  } catch {
    return null;
  }
})();
let apiKey = storage?.getItem("api-key") ?? "";

export const key = () => apiKey;

export function setKey(value) {
  apiKey = value;
  if (value) storage?.setItem("api-key", value);
  else storage?.removeItem("api-key");
}

// An error as the service tells it (RFC 9457), or one of the same form for what happens on the way.
export class Problem extends Error {
  constructor({ title, detail = "", status = 0, errors = [], request_id = "" }, retryAfter = null) {
    super(title);
    Object.assign(this, { title, detail, status, errors: errors ?? [], requestId: request_id, retryAfter });
  }
}

async function problemOf(response) {
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const text = await response.text();
  let told;
  try {
    told = JSON.parse(text);
  } catch {
    told = {}; // something between here and the service answered in its own words
  }
  const title = told.title ?? `The service answered ${response.status}`;
  return new Problem({ ...told, title, status: response.status }, Number.isNaN(seconds) ? null : seconds);
}

async function send(path, { body, accept = "application/json", signal } = {}) {
  const headers = { Accept: accept };
  if (body) headers["Content-Type"] = "application/json";
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  const init = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
  const response = await fetch(new URL(path, document.baseURI), init).catch(rethrow);
  if (!response.ok) throw await problemOf(response);
  return response;
}

// What stops a fetch: the person, or the lack of an answer.
function rethrow(error) {
  if (error.name === "AbortError") throw error;
  throw new Problem({ title: "The service cannot be reached", detail: "Is it running? Nothing you typed is lost." });
}

export const getJson = async (path) => (await send(path)).json();
export const postJson = async (path, body, signal) => (await send(path, { body, signal })).json();

// Is it ready, and if not, what is it doing? The probe then answers 503 with the reason, which is no error here.
export async function health() {
  try {
    const answer = await fetch(new URL("readyz", document.baseURI), { cache: "no-store" });
    const { status, phase } = await answer.json();
    const state = { starting: "Starting", draining: "Stopping", failed: "Failed" }[status] ?? "Not ready";
    return { ready: answer.ok, text: `${state}: ${phase}` };
  } catch {
    return { ready: false, text: "The service cannot be reached; trying again" };
  }
}

async function* serverEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read().catch(rethrow);
    if (done) return;
    buffer += value.replaceAll("\r", ""); // lines may end in CRLF; JSON has no bare CR
    const blocks = buffer.split("\n\n");
    buffer = blocks.pop();
    yield* blocks.map(parseEvent).filter((event) => event.data);
  }
}

function parseEvent(block) {
  const event = { name: "message", data: "" };
  for (const line of block.split("\n")) {
    const [, field, value] = /^([a-z]+): ?(.*)$/s.exec(line) ?? []; // a comment has no field
    if (field === "event") event.name = value;
    if (field === "data") event.data += value;
  }
  return event;
}

// Summarises one post; calls onToken(TokenEvent) as it is written. Returns the Summary with step and seed.
export async function summarize(body, { onToken, signal }) {
  const response = await send("summarize", { body, accept: "text/event-stream", signal });
  let summary = null;
  for await (const { name, data } of serverEvents(response.body)) {
    const told = JSON.parse(data);
    if (name === "token") onToken(told);
    else if (name === "result") summary = told;
    else if (name === "done") return { ...summary, step: told.step, seed: told.seed };
    else if (name === "error") throw new Problem(told);
  }
  throw new Problem({ title: "The answer broke off", detail: "The connection closed before the summary was done." });
}
