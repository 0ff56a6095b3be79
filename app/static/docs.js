// The page at `/docs`: the service's OpenAPI document, to be read by people.

import { getJson } from "./api.js";
import { curlLine } from "./curl.js";
import { $, element } from "./view.js";

const METHODS = ["get", "post", "put", "patch", "delete"];
const LIMITS = {
  minimum: (limit) => `at least ${limit}`,
  exclusiveMinimum: (limit) => `above ${limit}`,
  maximum: (limit) => `at most ${limit}`,
  exclusiveMaximum: (limit) => `below ${limit}`,
  minLength: (limit) => `at least ${limit} long`,
  maxLength: (limit) => `at most ${limit} long`,
  minItems: (limit) => `at least ${limit} of them`,
  maxItems: (limit) => `at most ${limit} of them`,
  pattern: (limit) => `like ${limit}`,
};
let components = {};

const nameOf = (reference) => reference.split("/").at(-1);
const resolve = (schema) => (schema?.$ref ? components[nameOf(schema.$ref)] : (schema ?? {}));

// Text with `code` in it.
function prose(text, tag = "p") {
  const parts = (text ?? "").split("`").map((part, index) => (index % 2 ? element("code", "", part) : part));
  const paragraph = element(tag, "prose");
  paragraph.append(...parts);
  return paragraph;
}

function fold(id, title, content) {
  const details = document.createElement("details");
  details.id = id;
  const summary = element("summary", "");
  summary.append(...title);
  details.append(summary, ...content);
  return details;
}

function table(headings, rows) {
  const box = element("div", "scroll");
  const body = document.createElement("table");
  body.createTHead().insertRow().append(...headings.map((heading) => element("th", "", heading)));
  const lines = body.createTBody();
  for (const cells of rows) {
    const line = lines.insertRow();
    for (const cell of cells) line.insertCell().append(...cell);
  }
  box.append(body);
  return box;
}

// The type of a value, as nodes: a schema of its own is a link to it.
function typeOf(schema) {
  if (schema.$ref) {
    const link = element("a", "", nameOf(schema.$ref));
    link.href = `#schema-${nameOf(schema.$ref)}`;
    return [link];
  }
  const several = schema.anyOf ?? schema.oneOf ?? schema.allOf;
  if (several) return several.flatMap((one, index) => (index ? [" or ", ...typeOf(one)] : typeOf(one)));
  if (schema.enum) return [schema.enum.map((value) => JSON.stringify(value)).join(" or ")];
  if ("const" in schema) return [JSON.stringify(schema.const)];
  if (schema.type === "array") return ["list of ", ...typeOf(schema.items ?? {})];
  return [schema.type ?? "anything"];
}

function remarks(schema) {
  const limits = Object.assign({}, ...(schema.anyOf ?? []), schema);
  const told = Object.keys(LIMITS).filter((key) => key in limits).map((key) => LIMITS[key](limits[key]));
  if ((schema.default ?? null) !== null) told.push(`${JSON.stringify(schema.default)} when absent`);
  return [prose([schema.description, told.join(", ")].filter(Boolean).join("; "), "span")];
}

function fieldsOf(schema) {
  const required = new Set(schema.required ?? []);
  const rows = Object.entries(schema.properties ?? {}).map(([name, property]) => {
    const label = [element("code", "", name)];
    if (required.has(name)) label.push(element("small", "", " required"));
    return [label, typeOf(property), remarks(property)];
  });
  if (rows.length) return table(["Field", "Type", "Meaning"], rows);
  const line = element("p", "");
  line.append(...typeOf(schema));
  return line;
}

// The example that the schema gives, or the smallest value that it allows.
function exampleOf(schema, media = {}) {
  const given = media.example ?? Object.values(media.examples ?? {})[0]?.value;
  if (given !== undefined) return given;
  const whole = resolve(schema);
  if (whole.examples?.length) return whole.examples[0];
  if (whole.default !== undefined) return whole.default;
  if (whole.enum) return whole.enum[0];
  if ("const" in whole) return whole.const;
  if (whole.anyOf) return exampleOf(whole.anyOf[0]);
  if (whole.type === "array") return [exampleOf(whole.items)];
  if (whole.type === "string") return "…";
  if (whole.type === "integer" || whole.type === "number") return whole.minimum ?? 1;
  if (whole.type === "boolean") return false;
  const entries = (whole.required ?? []).map((name) => [name, exampleOf(whole.properties[name])]);
  return Object.fromEntries(entries);
}

function code(text) {
  const block = element("pre", "", text);
  block.tabIndex = 0;
  return block;
}

function bodyOf(path, operation) {
  const media = operation.requestBody?.content?.["application/json"];
  if (!media) return [];
  const whole = resolve(media.schema);
  const line = curlLine(path.slice(1), exampleOf(media.schema, media));
  const fields = [element("h3", "", "Body"), prose(whole.description), fieldsOf(whole)];
  return [...fields, element("h3", "", "Example"), code(line)];
}

function parametersOf(operation) {
  const rows = (operation.parameters ?? []).map(({ name, in: place, required, schema = {}, description }) => [
    [element("code", "", name), element("small", "", required ? ` ${place}, required` : ` ${place}`)],
    typeOf(schema),
    remarks({ ...schema, description: description ?? schema.description }),
  ]);
  return rows.length ? [element("h3", "", "Parameters"), table(["Name", "Type", "Meaning"], rows)] : [];
}

function answersOf(operation) {
  const rows = Object.entries(operation.responses ?? {}).map(([status, { description, content = {} }]) => {
    const kinds = Object.entries(content).flatMap(([kind, { schema = {} }]) => {
      const line = element("div", "");
      const type = Object.keys(schema).length ? [...typeOf(schema), " "] : [];
      line.append(...type, element("small", "", kind));
      return [line];
    });
    return [[element("code", "", status)], kinds, [prose(description, "span")]];
  });
  return [element("h3", "", "Answers"), table(["Status", "Body", "Meaning"], rows)];
}

// Summaries are often made from names of functions; the first paragraph of the description says more.
function showOperation(path, method, operation) {
  const [brief, ...more] = (operation.description ?? operation.summary ?? "").split("\n\n");
  const title = [element("b", `method ${method}`, method), element("code", "", path), prose(brief, "span")];
  title.at(-1).classList.add("hint");
  return fold(`${method}-${path}`, title, [
    ...more.map((paragraph) => prose(paragraph)),
    ...parametersOf(operation),
    ...bodyOf(path, operation),
    ...answersOf(operation),
  ]);
}

function showSchema([name, schema]) {
  const title = [element("code", "", name), element("span", "hint", schema.description ?? "")];
  return fold(`schema-${name}`, title, [fieldsOf(schema)]);
}

// A link into something folded opens it.
function unfold() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!(target instanceof HTMLDetailsElement)) return;
  target.open = true;
  target.scrollIntoView();
}

function show({ info, paths, components: { schemas = {} } = {} }) {
  components = schemas;
  $("api-title").textContent = `${info.title} ${info.version}`;
  $("api-description").replaceWith(prose(info.description));
  const operations = Object.entries(paths).flatMap(([path, item]) =>
    METHODS.filter((method) => item[method]).map((method) => showOperation(path, method, item[method])),
  );
  $("operations").replaceChildren(...operations);
  $("schemas").replaceChildren(...Object.entries(schemas).map(showSchema));
  unfold();
}

addEventListener("hashchange", unfold);
getJson("openapi.json").then(show, (problem) => ($("api-description").textContent = problem.message));
