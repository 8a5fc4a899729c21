// Makes the page out of openapi.json: an index, every operation with a form to try it, every schema.
// It is all text nodes: nothing of the document, or of an answer, is ever read as HTML.

const methods = ["get", "put", "post", "patch", "delete"];
const token = document.querySelector("#token input");
const filter = document.querySelector("nav input");
const notice = document.querySelector("#notice");
const given = new Map(); // what was filled in for a parameter of a path goes for every operation: most are about one session
let api;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

// --- text: paragraphs, lists and code, of what Markdown has ---------------------------------------------------------

function inline(text) {
  return text.split(/(`[^`]+`)/).map((part) =>
    part.startsWith("`") && part.length > 2 ? make("code", {}, part.slice(1, -1)) : part);
}

function prose(text = "") {
  return text.trim().split(/\n\s*\n/).filter(Boolean).map((block) =>
    block.startsWith("- ")
      ? make("ul", {}, block.slice(2).split("\n- ").map((item) => make("li", {}, inline(item))))
      : make("p", {}, inline(block)));
}

// --- schemas --------------------------------------------------------------------------------------------------------

const nameOf = (reference) => reference.split("/").at(-1);

function follow(value) {
  if (!value?.$ref) return value;
  return value.$ref.slice(2).split("/").reduce((inner, step) => inner[step], api);
}

function bounds(schema) {
  const between = (low, high, unit) =>
    low === undefined && high === undefined ? [] :
      [high === undefined ? `at least ${low}${unit}` : low === undefined ? `up to ${high}${unit}` : `${low} to ${high}${unit}`];
  return [
    ...between(schema.minLength, schema.maxLength, " characters"),
    ...between(schema.minimum, schema.maximum, ""),
    ...between(schema.minItems, schema.maxItems, " items"),
    ...(schema.default === undefined ? [] : [`${JSON.stringify(schema.default)} unless given`]),
  ];
}

function kind(schema) {
  if (schema.$ref) return [make("a", { href: `#schema-${nameOf(schema.$ref)}` }, nameOf(schema.$ref))];
  if (schema.anyOf) return schema.anyOf.flatMap((each, number) => (number ? [" or ", ...kind(each)] : kind(each)));
  if (schema.enum) return [schema.enum.map((each) => JSON.stringify(each)).join(", ")];
  const limits = bounds(schema);
  const tail = limits.length ? [` (${limits.join("; ")})`] : [];
  if (schema.type === "array") return ["array of ", ...(Object.keys(schema.items ?? {}).length ? kind(schema.items) : ["anything"]), ...tail];
  const name = { "date-time": "time", binary: "bytes" }[schema.format] ?? [schema.type ?? "anything"].flat().join(" or ");
  return [name, ...tail];
}

function rows(schema) {
  const required = new Set(schema.required);
  return Object.entries(schema.properties ?? {}).map(([name, each]) => make("tr", {},
    make("td", {}, name, required.has(name) ? make("span", { class: "must", title: "required" }, " *") : null),
    make("td", {}, make("span", { class: "kind" }, kind(each)), prose(each.description))));
}

function shape(schema) {
  const followed = follow(schema);
  return followed.properties
    ? [make("p", { class: "kind" }, kind(schema)), make("table", {}, rows(followed))]
    : [make("p", { class: "kind" }, kind(schema))];
}

// --- trying an operation --------------------------------------------------------------------------------------------

function field(parameter) {
  const schema = follow(parameter.schema);
  const attributes = { name: parameter.name, "data-in": parameter.in, "aria-label": parameter.name };
  if (schema.enum) {
    return make("select", attributes, make("option", { value: "" }, "—"), schema.enum.map((each) => make("option", {}, each)));
  }
  const input = make("input", { ...attributes, required: parameter.required, spellcheck: "false", autocomplete: "off" });
  if (parameter.in === "path") {
    input.value = given.get(parameter.name) ?? "";
    input.addEventListener("input", () => {
      given.set(input.name, input.value);
      for (const other of document.querySelectorAll(`input[data-in="path"][name="${input.name}"]`)) other.value = input.value;
    });
  }
  return input;
}

function bodyFields(content) {
  const types = Object.keys(content);
  const select = make("select", { "aria-label": "Content-Type" }, types.map((type) => make("option", {}, type)));
  const file = make("input", { type: "file", "aria-label": "File" });
  const text = make("textarea", { "aria-label": "Body", spellcheck: "false" });
  const isText = () => content[select.value].schema.format !== "binary";
  const show = () => { text.hidden = !isText(); file.hidden = isText(); };
  text.value = JSON.stringify(content[types[0]].example, null, 2) ?? "";
  select.addEventListener("change", show);
  show();
  return {
    elements: [make("div", { class: "row" }, make("span", { class: "kind" }, "Content-Type"), select), make("div", { class: "row" }, text, file)],
    read: () => isText()
      ? [select.value, text.value || undefined]
      : [file.files[0]?.type || select.value, file.files[0]],
  };
}

function request(path, method, form, body) {
  const root = api.servers[0].url.replace(/\/$/, "");
  const headers = {};
  const query = new URLSearchParams();
  let target = path;
  for (const input of form.querySelectorAll("[data-in]")) {
    if (input.dataset.in === "path") target = target.replace(`{${input.name}}`, encodeURIComponent(input.value));
    else if (input.value && input.dataset.in === "query") query.set(input.name, input.value);
    else if (input.value) headers[input.name] = input.value;
  }
  const [type, data] = body?.read() ?? [];
  if (data !== undefined) headers["Content-Type"] = type;
  const url = new URL(root + target + (query.size ? `?${query}` : ""), location.origin);
  return { url, options: { method: method.toUpperCase(), headers, body: data } };
}

const authorized = (headers) => (token.value ? { ...headers, Authorization: `Bearer ${token.value}` } : headers);
const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

function curl({ url, options }) {
  const headers = token.value ? ["-H \"Authorization: Bearer $TOKEN\""] : [];
  headers.push(...Object.entries(options.headers).map(([name, value]) => `-H ${quoted(`${name}: ${value}`)}`));
  const data = options.body instanceof File ? [`--data-binary @${quoted(options.body.name)}`] : options.body ? [`-d ${quoted(options.body)}`] : [];
  return ["curl", ...(options.method === "GET" ? [] : [`-X ${options.method}`]), ...headers, ...data, quoted(url.href)].join(" ");
}

async function answer({ url, options }) {
  const began = performance.now();
  const response = await fetch(url, { ...options, headers: authorized(options.headers) });
  const data = await response.blob();
  const took = `${Math.round(performance.now() - began)} ms`;
  const type = response.headers.get("content-type") ?? "";
  let text = `${data.size} bytes`;
  if (/json|^text\//.test(type)) {
    text = await data.text();
    try { text = JSON.stringify(JSON.parse(text), null, 2); } catch { /* shown as it came */ }
  }
  const headers = ["location", "retry-after", "www-authenticate", "allow"].filter((name) => response.headers.has(name));
  return [
    make("p", { class: `status ${response.ok ? "good" : "bad"}` }, `${response.status} ${response.statusText}`,
      make("span", { class: "kind" }, `  ${[took, type].filter(Boolean).join(" · ")}`)),
    headers.map((name) => make("div", {}, make("code", {}, `${name}: ${response.headers.get(name)}`))),
    data.size ? make("pre", { tabindex: "0" }, text) : null,
  ];
}

function trial(path, method, operation, parameters) {
  const content = follow(operation.requestBody)?.content;
  const body = content && bodyFields(content);
  const out = make("div", { role: "status" });
  const send = make("button", { class: "send" }, "Send");
  const shown = make("button", { type: "button" }, "curl");
  const form = make("form", {},
    make("h3", {}, "Try it"),
    parameters.length ? make("table", {}, parameters.map((each) => make("tr", {},
      make("td", {}, each.name, each.required ? make("span", { class: "must", title: "required" }, " *") : null),
      make("td", {}, field(each), prose(each.description), make("span", { class: "kind" }, kind(each.schema)))))) : null,
    body?.elements,
    make("div", { class: "row" }, send, shown),
    out);
  shown.addEventListener("click", () => out.replaceChildren(make("pre", { tabindex: "0" }, curl(request(path, method, form, body)))));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    send.disabled = true;
    try {
      out.replaceChildren(...(await answer(request(path, method, form, body))).flat().filter(Boolean));
    } catch (error) {
      out.replaceChildren(make("p", { class: "status bad" }, `No answer: ${error.message}`));
    } finally {
      send.disabled = false;
    }
  });
  return form;
}

// --- the page -------------------------------------------------------------------------------------------------------

function response(status, said) {
  const each = follow(said);
  const schemas = Object.entries(each.content ?? {}).map(([type, { schema }]) =>
    make("div", { class: "kind" }, type, schema && Object.keys(schema).length ? [": ", ...kind(schema)] : null));
  const headers = Object.keys(each.headers ?? {}).map((name) => make("div", { class: "kind" }, make("code", {}, name)));
  return make("tr", {}, make("td", {}, status), make("td", {}, prose(each.description), schemas, headers));
}

function details(path, method, operation, shared) {
  const parameters = [...shared, ...(operation.parameters ?? [])].map(follow);
  const content = Object.values(follow(operation.requestBody)?.content ?? {});
  return make("div", { class: "inside" },
    prose(operation.description),
    content.length ? [make("h3", {}, "Body"), shape(content[0].schema)] : null,
    trial(path, method, operation, parameters),
    make("h3", {}, "Answers"),
    make("table", {}, Object.entries(operation.responses ?? {}).sort().map(([status, said]) => response(status, said))));
}

// What is in a card is made when it is opened for the first time.
function card(attributes, summary, inside) {
  const element = make("details", attributes, make("summary", {}, summary));
  element.addEventListener("toggle", () => { if (element.open && element.childElementCount === 1) element.append(inside()); });
  return element;
}

function operations() {
  return Object.entries(api.paths).flatMap(([path, item]) =>
    methods.filter((method) => item[method]).map((method) => ({ path, method, operation: item[method], shared: item.parameters ?? [] })));
}

function render() {
  const all = operations();
  const index = [];
  const sections = [make("div", { class: "about" }, prose(api.info.description))];
  for (const tag of api.tags) {
    const own = all.filter(({ operation }) => operation.tags?.includes(tag.name));
    index.push(make("h2", {}, tag.name), own.map(({ method, operation }) =>
      make("a", { href: `#${operation.operationId}` }, make("span", { class: `method ${method}` }, method.toUpperCase()), operation.summary ?? operation.operationId)));
    sections.push(make("section", {}, make("h2", {}, tag.name), make("div", { class: "about" }, prose(tag.description)),
      own.map(({ path, method, operation, shared }) => card(
        { class: "operation", id: operation.operationId },
        [make("span", { class: `method ${method}` }, method.toUpperCase()),
          make("span", { class: "path" }, path.split(/({\w+})/).map((part) => (part.startsWith("{") ? make("i", {}, part) : part))),
          make("span", {}, operation.summary ?? "")],
        () => details(path, method, operation, shared)))));
  }
  sections.push(make("section", {}, make("h2", {}, "Schemas"), Object.entries(api.components.schemas).map(([name, schema]) =>
    card({ class: "schema", id: `schema-${name}` }, name, () => make("div", { class: "inside" }, prose(schema.description), shape(schema))))));
  document.querySelector("#version").textContent = api.info.version;
  document.querySelector("#index").replaceChildren(...index.flat());
  document.querySelector("#operations").replaceChildren(...sections);
}

function narrow() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const fits = (element) => words.every((word) => element.textContent.toLowerCase().includes(word));
  for (const link of document.querySelectorAll("#index a")) link.hidden = !fits(link);
  for (const each of document.querySelectorAll("main details")) each.hidden = !fits(each.querySelector("summary"));
  for (const each of document.querySelectorAll("main section")) each.hidden = !each.querySelector("details:not([hidden])");
}

function jump() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target?.tagName === "DETAILS") {
    target.open = true;
    target.scrollIntoView();
  }
}

async function load() {
  let problem = "";
  try {
    const response = await fetch("openapi.json", { headers: authorized({}) });
    const said = await response.json();
    if (response.ok) api = said;
    else problem = response.status === 401 ? "This server asks for a token: fill it in above." : `${said.title}: ${said.detail}.`;
    document.querySelector("#token").classList.toggle("wanted", response.status === 401);
  } catch (error) {
    problem = `The server does not answer: ${error.message}.`;
  }
  notice.hidden = !problem;
  notice.replaceChildren(problem, problem ? make("span", {}, " ", make("button", { onclick: load }, "Try again")) : "");
  if (problem) return;
  render();
  narrow();
  jump();
}

filter.addEventListener("input", narrow);
document.querySelector("#token").addEventListener("submit", (event) => { event.preventDefault(); load(); });
token.addEventListener("change", () => { if (!api) load(); });
window.addEventListener("hashchange", jump);
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !/^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName)) {
    event.preventDefault();
    filter.focus();
  }
});
load();
