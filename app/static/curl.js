// The line that does in a shell what a button does here, and a way to copy it.

import { key } from "./api.js";

// Invisible characters, and those that a terminal acts upon when pasted; in JSON an escape means the same.
const UNSAFE = /[\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
const escape = (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`;
const quote = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

export function curlLine(path, body) {
  const json = JSON.stringify(body).replace(UNSAFE, escape);
  return [
    `curl -sS ${quote(new URL(path, document.baseURI).href)}`,
    `-H ${quote("Content-Type: application/json")}`,
    ...(key() ? ['-H "Authorization: Bearer $KEY"'] : []),
    `-d ${quote(json)}`,
  ].join(" \\\n  ");
}

// Where the clipboard is not permitted, the text is shown, selected, below the button.
export async function copy(button, text) {
  const row = button.parentElement;
  row.parentElement.querySelector(".manual")?.remove();
  let said = "Copied";
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    said = "Selected";
    const manual = document.createElement("textarea");
    Object.assign(manual, { className: "manual", readOnly: true, value: text, rows: 5 });
    manual.setAttribute("aria-label", "curl line: copy it from here");
    row.after(manual);
    manual.select();
  }
  button.dataset.said = said;
  const spoken = said === "Copied" ? "curl line copied" : "Copy the selected curl line";
  document.getElementById("spoken").textContent = spoken;
  setTimeout(() => delete button.dataset.said, 2000);
}
