// The requests that the forms stand for, and the answers to the last ones. JSON leaves out what is undefined.

const $ = (id) => document.getElementById(id);
export const fields = $("post-form").elements;
export const answers = new Map(); // for "sft", "ppo" and "draw": a Summary with its step, its seed and the request

const number = (input) => (input.value === "" ? undefined : input.valueAsNumber);
const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
export const isWholePrompt = () => /^\s*SUBREDDIT:/.test(fields.body.value);
export const isAboutThisPost = (answer) => same(answer.request.posts[0], post());

function post() {
  if (isWholePrompt()) return fields.body.value;
  return { subreddit: fields.subreddit.value, title: fields.title.value, body: fields.body.value };
}

export function summaryRequest(model) {
  return {
    posts: [post()],
    model,
    max_new_tokens: number(fields.max_new_tokens),
    temperature: number(fields.temperature),
    top_p: number(fields.top_p),
    seed: number(fields.seed),
    truncation: fields.truncation.value,
  };
}

export function drawRequest() {
  const { model, best_of, temperature, seed } = $("draw-form").elements;
  const own = { best_of: number(best_of), temperature: number(temperature), seed: number(seed) };
  return { ...summaryRequest(model.value), ...own, return_candidates: true };
}

export function scoreRequest() {
  const ppo = answers.get("ppo");
  const reference = ppo && isAboutThisPost(ppo) ? ppo.summary : undefined;
  return { items: [{ post: post(), summary: $("summary").value, reference }], truncation: fields.truncation.value };
}

// With the seed that was drawn, so that the request gives what is on the screen.
export function repeatable(name, request) {
  const answer = answers.get(name);
  const drawn = request.temperature > 0 && request.seed === undefined && answer && same(answer.request, request);
  return drawn ? { ...request, seed: answer.seed } : request;
}
