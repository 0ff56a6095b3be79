// The page at `/`: which button does what, and what the service is doing.

import { getJson, health, key, postJson, Problem, setKey, summarize } from "./api.js";
import { copy, curlLine } from "./curl.js";
import { EXAMPLES } from "./examples.js";
import * as requests from "./requests.js";
import * as view from "./view.js";

const { $ } = view;
const { answers, fields } = requests;
const POLICIES = ["sft", "ppo"];
const cardOf = (policy) => document.querySelector(`[data-policy=${policy}]`);
let served = POLICIES;
let ready = false;
let afterKey = null; // what waits for an API key

// Summaries, candidates, scores

async function write(name, request, targets, signal, onToken) {
  answers.delete(name);
  try {
    const answer = await summarize(request, { signal, onToken });
    answers.set(name, { ...answer, request });
    return answer;
  } catch (error) {
    for (const target of targets) view.stopWriting(target, signal.aborted ? "Cancelled." : "Not finished.");
    throw error;
  }
}

async function writeCard(policy, signal) {
  const card = cardOf(policy);
  view.startWriting(card);
  const onToken = ({ text }) => view.addText(card, text);
  view.showSummary(card, await write(policy, requests.summaryRequest(policy), [card], signal, onToken));
}

async function writeAll(signal, policies = served) {
  $("stale").hidden = true;
  $("cards").scrollIntoView({ block: "nearest" });
  const outcomes = await Promise.allSettled(policies.map((policy) => writeCard(policy, signal)));
  const failed = outcomes.filter(({ status }) => status === "rejected").map(({ reason }) => reason);
  if (!failed.length) return view.announceSummaries(served.map((policy) => [policy, answers.get(policy)]));
  const again = policies.filter((_, index) => outcomes[index].status === "rejected");
  throw Object.assign(failed.find((reason) => reason instanceof Problem) ?? failed[0], { again });
}

async function draw(signal) {
  const list = $("candidates");
  const request = requests.drawRequest();
  view.startCandidates(list, request.best_of);
  const onToken = ({ candidate, text }) => view.addText(list.children[candidate], text);
  try {
    view.showCandidates(list, await write("draw", request, list.children, signal, onToken));
  } finally {
    view.dropUnwritten(list);
  }
}

async function scoreOwn(signal) {
  view.showOwnScore((await postJson("score", requests.scoreRequest(), signal)).results[0]);
}

// Lets a form do its work: one at a time, to be cancelled, with its problems shown and tried again.
function connectForm(form, work) {
  const [go, cancel] = form.querySelectorAll(".go, .cancel");
  let controller = null;

  async function run(again) {
    if (controller) return;
    controller = new AbortController();
    go.setAttribute("aria-disabled", "true");
    cancel.hidden = false;
    view.clearProblem(form);
    try {
      await work(controller.signal, again);
    } catch (error) {
      if (error instanceof Problem) fail(form, error, () => run(error.again));
      else if (error.name !== "AbortError") throw error;
    } finally {
      controller = null;
      go.removeAttribute("aria-disabled");
      if (document.activeElement === cancel) go.focus();
      cancel.hidden = true;
    }
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (ready && isComplete(form)) run();
  });
  cancel.addEventListener("click", () => controller.abort());
  form.addEventListener("keydown", (event) => {
    if (event.key === "Escape") controller?.abort();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
}

// Says beside the first input that is wrong what is wrong with it; one that is folded away cannot be shown.
function isComplete(form) {
  if ($("settings").querySelector(":invalid")) $("settings").open = true;
  return $("post-form").reportValidity() && form.reportValidity();
}

function fail(form, problem, retry) {
  if (problem.status === 401) return askForKey(problem, retry);
  view.showProblem(form, problem, retry);
  if (problem.status === 503 || problem.status === 0) connect();
}

function connectCurl(button, form, line) {
  button.addEventListener("click", () => isComplete(form) && copy(button, line()));
}

// The API key

function askForKey(problem, retry) {
  afterKey = retry;
  $("key-problem").textContent = problem.detail;
  $("key-form").hidden = false;
  $("key").select();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  $("key-form").hidden = true;
  $("show-key").hidden = !key();
  fields.body.focus();
  afterKey?.();
  afterKey = null;
});
$("show-key").addEventListener("click", () => {
  $("key-problem").textContent = "";
  $("key-form").hidden = false;
  $("key").focus();
});

// The service: wait until it is ready, then learn what it serves

let connecting = null;
const connect = () => (connecting ??= waitAndLearn().finally(() => (connecting = null)));

async function waitAndLearn() {
  enable(false);
  for (let state = await health(); !state.ready; state = await health()) {
    view.setStatus("busy", state.text);
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  try {
    showModels((await getJson("v1/models")).models);
    enable(true);
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    view.setStatus("failed", error.title);
    if (error.status === 401) askForKey(error, connect);
    else setTimeout(connect, 1000);
  }
}

function enable(state) {
  ready = state;
  for (const button of document.querySelectorAll(".go")) button.disabled = !ready;
}

function showModels(models) {
  served = POLICIES.filter((policy) => models.some(({ id }) => id === policy));
  for (const policy of POLICIES) cardOf(policy).hidden = !served.includes(policy);
  $("cards").classList.toggle("single", served.length === 1);
  const chosen = $("model").value;
  $("model").replaceChildren(...served.toReversed().map((policy) => new Option(policy.toUpperCase(), policy)));
  $("model").value = served.includes(chosen) ? chosen : served.at(-1);
  fields.max_new_tokens.max = Math.max(...models.map((model) => model.max_new_tokens ?? 1));
  view.showServed(models);
}

// Examples. What a person had typed stays at hand.

const PARTS = ["subreddit", "title", "body"];
const known = [...EXAMPLES];

function addExample(example) {
  const button = view.element("button", "chip", example.name);
  Object.assign(button, { type: "button", title: example.about ?? "" });
  button.addEventListener("click", () => {
    keepDraft();
    for (const part of PARTS) fields[part].value = example[part];
    noticeChange();
  });
  $("examples").append(button);
}

function keepDraft() {
  const draft = Object.fromEntries(PARTS.map((part) => [part, fields[part].value]));
  if (!draft.body.trim() || known.some((one) => PARTS.every((part) => one[part] === draft[part]))) return;
  known.push(draft);
  addExample({ ...draft, name: "Your text" });
}

function noticeChange() {
  fields.subreddit.disabled = fields.title.disabled = requests.isWholePrompt();
  $("post-hint").classList.toggle("strong", requests.isWholePrompt());
  const last = served.map((policy) => answers.get(policy)).find(Boolean);
  $("stale").hidden = !last || requests.isAboutThisPost(last);
}

EXAMPLES.forEach(addExample);
$("post-form").addEventListener("input", noticeChange);
connectForm($("post-form"), writeAll);
connectForm($("draw-form"), draw);
connectForm($("score-form"), scoreOwn);
for (const policy of POLICIES) {
  const line = () => curlLine("summarize", requests.repeatable(policy, requests.summaryRequest(policy)));
  connectCurl(cardOf(policy).querySelector(".curl"), $("post-form"), line);
}
const drawLine = () => curlLine("summarize", requests.repeatable("draw", requests.drawRequest()));
connectCurl($("draw-curl"), $("draw-form"), drawLine);
connectCurl($("score-curl"), $("score-form"), () => curlLine("score", requests.scoreRequest()));
if (/Mac|iPhone|iPad/.test(navigator.platform)) document.querySelector("kbd").textContent = "⌘ ↵";
$("show-key").hidden = !key();
noticeChange();
connect();
