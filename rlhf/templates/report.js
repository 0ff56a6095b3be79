"use strict";
// Shows the samples, a page at a time. Texts come from strangers: they are only ever set as textContent.
(() => {
  const PAGE = 20;
  const samples = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const query = byId("query"), order = byId("order"), list = byId("list");
  const haystacks = samples.map((s) => [s.subreddit, s.title, s.post, s.reference, s.sft, s.ppo].join("\n").toLowerCase());
  let shown = [], page = 0;

  function element(tag, text, className) {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  }

  const fixed = (value, digits) => value.toFixed(digits).replace("-", "−");
  const signed = (value, digits) => (value > 0 ? "+" : "") + fixed(value, digits);

  function summary(sample, key, name) {
    const box = element("div");
    box.append(element("h4", name, "c-" + key), element("p", sample[key] || "(empty)"));
    const facts = [];
    if (typeof sample["score_" + key] === "number") facts.push("score " + fixed(sample["score_" + key], 2));
    if (typeof sample["gold_" + key] === "number") facts.push("gold " + fixed(sample["gold_" + key], 0));
    if (typeof sample["rouge1_" + key] === "number") facts.push("ROUGE-1 " + fixed(sample["rouge1_" + key], 2));
    if (typeof sample["tokens_" + key] === "number") facts.push(sample["tokens_" + key] + " tokens");
    box.append(element("small", facts.join(" · ")));
    return box;
  }

  function card(sample) {
    const item = element("li"), head = element("h3", sample.title || "(no title)");
    head.append(element("span", "r/" + sample.subreddit));
    const gain = sample.gain;
    head.append(element("span", "reward " + signed(gain, 2), "change " + (gain >= 0 ? "up" : "down")));
    const texts = element("div", undefined, "texts");
    texts.append(summary(sample, "reference", "Reference"), summary(sample, "sft", "SFT"), summary(sample, "ppo", "PPO"));
    const more = element("details"), handle = element("summary", "Post");
    more.append(handle);
    more.addEventListener("toggle", () => { if (more.open && !more.querySelector("p")) more.append(element("p", sample.post)); });
    item.append(head, texts, more);
    return item;
  }

  function draw() {
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    page = Math.min(page, pages - 1);
    list.replaceChildren(...shown.slice(page * PAGE, (page + 1) * PAGE).map((index) => card(samples[index])));
    byId("found").textContent = shown.length === samples.length
      ? samples.length + " samples" : shown.length + " of " + samples.length + " samples";
    byId("page").textContent = "Page " + (page + 1) + " of " + pages;
    byId("previous").disabled = page === 0;
    byId("next").disabled = page >= pages - 1;
  }

  function select() {
    const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
    const [key, direction] = order.value.split(":");
    const sign = direction === "down" ? -1 : 1;
    shown = samples.map((_, index) => index).filter((index) => words.every((word) => haystacks[index].includes(word)));
    if (key !== "index") shown.sort((a, b) => sign * (samples[a][key] - samples[b][key]) || a - b);
    page = 0;
    draw();
  }

  function turn(step) {
    page += step;
    draw();
    byId("samples").scrollIntoView();
  }

  let timer;
  query.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(select, 120); });
  query.form.addEventListener("submit", (event) => event.preventDefault());
  order.addEventListener("change", select);
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  select();
})();
