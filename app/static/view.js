// Showing things. Whatever people or models wrote goes in as text, never as markup.

export const $ = (id) => document.getElementById(id);

export function element(tag, className, text = "") {
  return Object.assign(document.createElement(tag), { className, textContent: text });
}

export function signed(number) {
  const text = Math.abs(number).toFixed(2);
  if (text === "0.00") return text;
  return (number < 0 ? "−" : "+") + text;
}

const say = (text) => ($("spoken").textContent = text);
const count = (number, thing) => `${number} ${thing}${number === 1 ? "" : "s"}`;
const FINISH = { stop: "ended by itself", length: "stopped at the token limit" };

// The service

export function setStatus(state, text) {
  $("status").dataset.state = state;
  $("status").textContent = text;
}

export function showServed(models) {
  const [{ run, dtype, device }] = models;
  const steps = models.map(({ id, step }) => `${id === "reward" ? "reward model" : id.toUpperCase()} step ${step}`);
  $("served").textContent = [`Run ${run}`, ...steps, `${dtype} on ${device}`].join(" · ");
  setStatus("ready", `Ready: ${run}`);
}

// Scores

export function showScore(box, score) {
  box.querySelector(".number").textContent = score === null ? "–" : signed(score);
  const bar = box.querySelector(".bar");
  if (score === null) delete bar.dataset.score;
  else bar.dataset.score = score;
  paintBars();
}

// All bars share one scale with 0 in the middle, so that they can be compared.
function paintBars() {
  const bars = [...document.querySelectorAll(".bar")];
  const scores = bars.filter((bar) => bar.dataset.score).map((bar) => Math.abs(bar.dataset.score));
  const reach = Math.max(2, ...scores);
  for (const bar of bars) {
    const share = (Number(bar.dataset.score ?? 0) / reach) * 50;
    bar.classList.toggle("below", share < 0);
    bar.style.setProperty("--left", `${Math.min(50, 50 + share)}%`);
    bar.style.setProperty("--width", `${Math.abs(share)}%`);
  }
}

// Summaries

export function startWriting(card) {
  const text = card.querySelector(".text");
  text.classList.remove("empty");
  text.classList.add("writing");
  text.textContent = "";
  card.querySelector(".meta").textContent = "";
  showScore(card, null);
}

export function addText(card, text) {
  card.querySelector(".text").textContent += text;
}

export function stopWriting(card, why = "") {
  card.querySelector(".text").classList.remove("writing");
  card.querySelector(".meta").textContent = why;
}

export function showSummary(card, summary) {
  stopWriting(card, facts(summary));
  card.querySelector(".text").textContent = summary.summary;
  if (summary.cut_tokens) card.querySelector(".meta").append(element("em", "", cutNote(summary)));
  showScore(card, summary.score);
}

const facts = (one) => `${count(one.completion_tokens, "token")}, ${FINISH[one.finish_reason]}. `;
const cutNote = (summary) => `The post was too long: ${count(summary.cut_tokens, "token")} of it left out.`;

export function announceSummaries(summaries) {
  say(summaries.map(([policy, { score }]) => `${policy.toUpperCase()}’s summary scores ${signed(score)}`).join(". "));
}

// Candidates

export function startCandidates(list, number) {
  list.replaceChildren(...Array.from({ length: number }, candidateRow));
}

export function showCandidates(list, summary) {
  list.replaceChildren(...summary.candidates.map(candidateRow));
  summary.candidates.forEach((candidate, index) => showSummary(list.children[index], { ...candidate, cut_tokens: 0 }));
  list.firstElementChild.querySelector(".meta").prepend(element("em", "", "Best. "));
  if (summary.cut_tokens) list.append(element("li", "note", cutNote(summary)));
  say(`${count(summary.candidates.length, "candidate")}, the best scores ${signed(summary.score)}`);
}

// Nothing came: a problem tells why, and empty rows tell nothing.
export function dropUnwritten(list) {
  if ([...list.querySelectorAll(".text")].every((text) => !text.textContent)) list.replaceChildren();
}

function candidateRow() {
  const row = element("li", "candidate");
  row.append($("score-template").content.cloneNode(true), element("p", "text writing"), element("p", "meta"));
  return row;
}

// A summary of one's own

export function showOwnScore({ score, reference_score: reference, delta }) {
  showScore($("own"), score);
  const direction = delta > 0 ? "better than" : "worse than";
  const compared = delta === null ? "" : `${signed(Math.abs(delta)).slice(1)} ${direction} PPO’s ${signed(reference)}`;
  $("delta").textContent = delta === null ? "Summarise the post as well, and this is compared with PPO’s." : compared;
  say(`Your summary scores ${signed(score)}. ${compared}`);
}

// Problems

const RETRY = new Set([0, 408, 429, 500, 502, 503, 504]);
const timers = new WeakMap();

export function clearProblem(form) {
  const box = form.querySelector(".problem");
  clearInterval(timers.get(box));
  box.hidden = true;
  for (const input of document.querySelectorAll(`[data-wrong-for="${form.id}"]`)) {
    input.removeAttribute("aria-invalid");
    delete input.dataset.wrongFor;
    $(`${input.id}-error`).textContent = "";
  }
}

export function showProblem(form, problem, retry) {
  const box = form.querySelector(".problem");
  const placed = problem.errors.map((error) => markField(form, error));
  const others = problem.errors.filter(({ message }, index) => !placed[index] && !problem.detail.includes(message));
  const list = element("ul", "");
  list.append(...others.map(({ field, message }) => element("li", "", field ? `${field}: ${message}` : message)));
  const [message, button] = box.children;
  box.hidden = false;
  message.replaceChildren(element("strong", "", problem.title), element("p", "", problem.detail), list);
  if (problem.requestId) message.append(element("small", "", `Request ${problem.requestId}`));
  button.hidden = !RETRY.has(problem.status);
  button.onclick = retry;
  countDown(box, button, problem.retryAfter ?? 0);
  box.scrollIntoView({ block: "nearest" });
  placed.find(Boolean)?.focus();
}

// Puts a message beside the input that the field names; null when the page has no such input.
function markField(form, { field, message }) {
  if (field === "body") return null; // the whole request, not a post's body
  const names = field.split(".").reverse().map((part) => ({ posts: "body", post: "body" })[part] ?? part);
  const find = (name) => form.elements.namedItem(name) ?? $("post-form").elements.namedItem(name);
  const input = names.map(find).find(Boolean);
  if (!input) return null;
  input.setAttribute("aria-invalid", "true");
  input.dataset.wrongFor = form.id;
  $(`${input.id}-error`).textContent = message;
  input.closest("details")?.setAttribute("open", "");
  return input;
}

function countDown(box, button, seconds) {
  const end = performance.now() + seconds * 1000;
  const show = () => {
    const left = Math.ceil((end - performance.now()) / 1000);
    button.disabled = left > 0;
    button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
    if (left <= 0) clearInterval(timers.get(box));
  };
  clearInterval(timers.get(box));
  timers.set(box, setInterval(show, 250));
  show();
}
