// What the pages do beyond links: live parts, dialogs, calls of the API, uploads with progress, the playground.
"use strict";

const ROOT = document.body.dataset.root;
const CSRF = document.body.dataset.csrf || "";
const api = (path) => `${ROOT}/api/${path}`;
const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

function toast(text) {
  const line = document.createElement("p");
  line.textContent = text;
  line.setAttribute("role", "status");
  // What is behind an open dialog can neither be seen well nor is it read out.
  ($("dialog[open]") || $("#toast")).append(line);
  setTimeout(() => line.remove(), 6000);
}

async function copyOf(place) {
  try {
    await navigator.clipboard.writeText(place.textContent);
    toast("Copied.");
  } catch { // browsers have a clipboard for pages that came by TLS or from this machine
    getSelection().selectAllChildren(place);
    toast("It is selected: copy it with Ctrl+C.");
  }
}

function localTimes(within = document) {
  for (const time of $$("time[datetime]", within)) {
    const moment = new Date(time.dateTime);
    if (Number.isNaN(moment.getTime())) continue;
    time.textContent = moment.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
    time.title = time.dateTime;
  }
}

function signIn() {
  location.assign(`${ROOT}/sign-in?next=${encodeURIComponent(location.pathname + location.search)}`);
}

// --- calls ----------------------------------------------------------------------------------------------

async function call(method, path, body, headers = {}) {
  const sent = { method, headers: { "X-CSRF-Token": CSRF, ...headers } };
  if (body !== undefined) {
    sent.headers["Content-Type"] = "application/json";
    sent.body = JSON.stringify(body);
  }
  const answer = await fetch(api(path), sent);
  if (answer.status === 401) signIn();
  return answer;
}

async function problem(answer) {
  try {
    const { error } = await answer.json();
    return error.code && error.code !== "console" ? `${error.message} (${error.code})` : error.message;
  } catch {
    return `The server answered with status ${answer.status}.`;
  }
}

function then(what, document_) {
  if (what === "reload") location.reload();
  else if (what === "secret") {
    $$("dialog[open]").forEach((open) => open.close());
    $("#secret .secret").textContent = document_.key;
    $("#secret").showModal();
  } else if (what) location.assign(what.replace("{id}", encodeURIComponent(document_?.id ?? "")));
}

function confirmed(text) {
  const dialog = $("#confirm");
  $("#confirm-text").textContent = text;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

function put(body, name, value) {
  const [outer, inner] = name.split(".");
  if (inner === undefined) body[outer] = value;
  else (body[outer] ??= {})[inner] = value;
}

function bodyOf(form) {
  const body = {};
  for (const field of form.elements) {
    if (!field.name) continue;
    const type = field.dataset.type;
    if (type === "boolean") put(body, field.name, field.checked);
    else if (type === "list") {
      body[field.name] ??= [];
      if (field.checked) body[field.name].push(field.value);
    } else if (field.value === "") {
      if ("null" in field.dataset) put(body, field.name, null);
      else if (!("optional" in field.dataset)) put(body, field.name, "");
    } else put(body, field.name, type === "number" ? Number(field.value) : field.value);
  }
  if (form.dataset.shape === "split") {
    const { version, share } = body;
    return { split: { [form.dataset.live]: 100 - share, [version]: share } };
  }
  return body;
}

async function send(element, body) {
  const { api: path, method, then: what, busy } = element.dataset;
  const button = element.matches("button") ? element : $("button:not([type=button])", element);
  const before = button.textContent;
  button.disabled = true;
  if (busy) button.textContent = busy;
  try {
    const answer = await call(method, path, body);
    if (answer.ok) {
      then(what, answer.status === 204 ? null : await answer.json());
      return null;
    }
    return await problem(answer);
  } catch (error) {
    return `The server cannot be reached: ${error.message}`;
  } finally {
    button.disabled = false;
    button.textContent = before;
  }
}

document.addEventListener("submit", async (event) => {
  const form = event.target;
  if (form.dataset.api) {
    event.preventDefault();
    const failed = await send(form, bodyOf(form));
    const place = $(".error", form);
    place.hidden = !failed;
    place.textContent = failed || "";
  } else if (form.dataset.upload) {
    event.preventDefault();
    upload(form);
  } else if (form.id === "playground") {
    event.preventDefault();
    ask(form);
  }
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const { open, copy } = button.dataset;
  if (open) $(`#${open}`).showModal();
  else if ("close" in button.dataset) button.closest("dialog").close();
  else if ("reload" in button.dataset) location.reload();
  else if (copy) await copyOf($(copy));
  else if (button.dataset.api) {
    if (button.dataset.confirm && !(await confirmed(button.dataset.confirm))) return;
    const body = button.dataset.body;
    const failed = await send(button, body === undefined ? undefined : JSON.parse(body));
    if (failed) toast(failed);
  }
});

document.addEventListener("change", (event) => {
  if ("submit" in event.target.dataset) event.target.form.requestSubmit();
});

// A secret is gone with its dialog, and the list behind it has one more row.
$("#secret")?.addEventListener("close", () => location.reload());

// --- live parts -----------------------------------------------------------------------------------------

for (const part of $$("[data-refresh]")) {
  const every = Number(part.dataset.every) * 1000;
  const again = async () => {
    try {
      if (!document.hidden && !part.contains(document.activeElement)) {
        const answer = await fetch(part.dataset.refresh, { headers: { "X-Fragment": "1" } });
        if (answer.status === 401) return signIn();
        if (answer.ok) {
          part.innerHTML = await answer.text();
          localTimes(part);
        }
        part.classList.toggle("stale", !answer.ok);
      }
    } catch {
      part.classList.add("stale");
    }
    setTimeout(again, every);
  };
  setTimeout(again, every);
}

// --- uploads --------------------------------------------------------------------------------------------

const FILES = ["adapter_config.json", "adapter_model.safetensors"];

function showFiles(form) {
  const list = $(".files", form);
  list.replaceChildren();
  for (const file of form.elements.files.files) {
    const item = document.createElement("li");
    item.textContent = `${file.name}, ${(file.size / 1024).toFixed(1)} KiB`;
    list.append(item);
  }
}

for (const zone of $$(".dropzone")) {
  const input = $("input[type=file]", zone);
  zone.addEventListener("dragover", (event) => {
    event.preventDefault();
    zone.classList.add("over");
  });
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    input.files = event.dataTransfer.files;
    showFiles(zone.closest("form"));
  });
  input.addEventListener("change", () => showFiles(zone.closest("form")));
}

function upload(form) {
  const fields = form.elements;
  const files = [...fields.files.files];
  const data = new FormData();
  const archive = files.length === 1 && /\.(tar|tar\.gz|tgz|zip)$/i.test(files[0].name);
  for (const file of files) data.append(archive ? "archive" : file.name, file, file.name);
  const error = $(".error", form);
  const status = $(".status", form);
  const bar = $("progress", form);
  const missing = archive ? [] : FILES.filter((name) => !files.some((file) => file.name === name));
  error.hidden = missing.length === 0;
  error.textContent = missing.length ? `Choose ${missing.join(" and ")} too.` : "";
  if (missing.length) return;
  const button = $("button:not([type=button])", form);
  const name = encodeURIComponent(fields.adapter.value);
  const request = new XMLHttpRequest();
  const query = new URLSearchParams();
  if (fields.allow_no_effect.checked) query.set("allow_no_effect", "true");
  if (fields.rollout.checked) query.set("rollout", "standard");
  request.open("POST", api(`${form.dataset.upload}/${name}/versions?${query}`));
  request.setRequestHeader("X-CSRF-Token", CSRF);
  request.upload.addEventListener("progress", (event) => {
    bar.value = event.lengthComputable ? event.loaded / event.total : 0;
    status.textContent = bar.value < 1 ? `${Math.round(bar.value * 100)} % sent` : "Inspecting, then asking the engine …";
  });
  const failed = (text) => {
    button.disabled = false;
    bar.hidden = true;
    status.textContent = "";
    error.hidden = false;
    error.replaceChildren(...text.split("\n").map((line) => {
      const part = document.createElement("p");
      part.textContent = line;
      return part;
    }));
  };
  request.addEventListener("error", () => failed("The connection broke before the server had everything."));
  request.addEventListener("load", () => {
    if (request.status === 401) return signIn();
    let answer = {};
    try {
      answer = JSON.parse(request.responseText);
    } catch { /* shown by its status */ }
    if (request.status === 201) {
      status.textContent = `Version ${answer.version} is there${answer.rollout ? ", and its rollout has begun" : ""}.`;
      setTimeout(() => location.reload(), 600);
      return;
    }
    const { message, code, cure } = answer.error || { message: `The server answered with status ${request.status}.` };
    failed([message, cure, code && `Code: ${code}`].filter(Boolean).join("\n"));
  });
  button.disabled = true;
  bar.hidden = false;
  bar.value = 0;
  request.send(data);
}

// --- the playground -------------------------------------------------------------------------------------

const TOP = 5;
let running = null;

function asked(form) {
  const fields = form.elements;
  const system = fields.system.value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: fields.prompt.value }];
  return { messages, max_tokens: Number(fields.max_tokens.value), temperature: Number(fields.temperature.value) };
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((l) => l.startsWith("data: "));
      if (line && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function one(form, place, signal) {
  const said = $(".said", place);
  const figures = $(".figures-line", place);
  said.replaceChildren();
  $(".tokens", place).hidden = true;
  const model = $("select", place).value;
  if (!model) {
    figures.textContent = "";
    return null;
  }
  const began = performance.now();
  const tokens = [];
  let first = null;
  figures.textContent = "waiting …";
  const tenant = form.dataset.tenant;
  const headers = tenant ? { "X-Playground": tenant } : {};
  const body = { ...asked(form), model, stream: true, logprobs: true, top_logprobs: TOP };
  try {
    const sent = {
      method: "POST",
      headers: { "Content-Type": "application/json", "X-CSRF-Token": CSRF, ...headers },
      body: JSON.stringify(body),
      signal,
    };
    const answer = await fetch(api("v1/chat/completions"), sent);
    if (answer.status === 401 && tenant) throw new Error("The console's key for this has ended. Load the page again.");
    if (!answer.ok) throw new Error(await problem(answer));
    for await (const event of events(answer)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices?.[0];
      if (!choice) continue;
      first ??= choice.delta?.content ? performance.now() - began : null;
      for (const token of choice.logprobs?.content ?? []) {
        tokens.push(token);
        const piece = document.createElement("span");
        piece.textContent = token.token;
        piece.className = token.logprob > -0.7 ? "p-high" : token.logprob > -2.3 ? "p-mid" : "p-low";
        piece.title = `${token.logprob.toFixed(3)}`;
        said.append(piece);
      }
      if (!choice.logprobs && choice.delta?.content) said.append(choice.delta.content);
    }
    const total = (performance.now() - began) / 1000;
    const rate = tokens.length > 1 ? ((tokens.length - 1) / (total - (first ?? 0) / 1000)).toFixed(1) : "–";
    figures.textContent = `first token ${first === null ? "–" : Math.round(first)} ms, ${tokens.length} tokens, ${rate} per second`;
  } catch (error) {
    figures.textContent = error.name === "AbortError" ? "stopped" : error.message;
  }
  return tokens;
}

// How far a token's log-probability is from what the first model gave the same token at the same place; null
// where that is not among its likeliest.
function apart(token, theirs) {
  const found = theirs && [theirs, ...(theirs.top_logprobs ?? [])].find((one) => one.token === token.token);
  return found ? token.logprob - found.logprob : null;
}

const signed = (number) => `${number >= 0 ? "+" : "\u2212"}${Math.abs(number).toFixed(3)}`;

// Up to the token at which two answers part both models were given the same, and can be compared.
function compare(place, tokens, base) {
  const parts = tokens.findIndex((token, at) => base[at]?.token !== token.token);
  const end = parts < 0 ? tokens.length : parts + 1;
  const differences = tokens.slice(0, end).map((token, at) => apart(token, base[at]));
  const pieces = $$(".said span", place);
  differences.forEach((difference, at) => {
    const beside = difference === null ? `not among the ${TOP} likeliest of the first model` : `${signed(difference)} beside the first model`;
    pieces[at].title = `${tokens[at].logprob.toFixed(3)}, ${beside}`;
  });
  const known = differences.filter((difference) => difference !== null);
  const sum = known.reduce((all, difference) => all + Math.abs(difference), 0);
  const mean = known.length ? `, mean difference ${(sum / known.length).toFixed(3)} over ${known.length} tokens` : "";
  if (parts >= 0) pieces[parts].classList.add("turn");
  const turn = parts < 0 ? "says the same as the first model" : `parts from the first model at token ${parts + 1}`;
  if (tokens.length) $(".figures-line", place).textContent += `; ${turn}${mean}`;
  return differences;
}

function tokenRows(place, tokens, differences) {
  const cell = (text, kind = "td") => {
    const made = document.createElement(kind);
    made.textContent = text;
    return made;
  };
  const rows = tokens.map((token, at) => {
    const row = document.createElement("tr");
    const shown = cell("");
    shown.append(cell(token.token, "code"));
    row.append(cell(String(at + 1)), shown, cell(token.logprob.toFixed(3)));
    if (differences) {
      const difference = differences[at];
      row.append(cell(difference === undefined ? "" : difference === null ? `not among its ${TOP}` : signed(difference)));
    }
    return row;
  });
  $(".tokens tbody", place).replaceChildren(...rows);
  $(".tokens", place).hidden = rows.length === 0;
}

async function ask(form) {
  running = new AbortController();
  const [button, stop] = [$("button:not([type=button])", form), $("[data-stop]", form)];
  button.disabled = true;
  stop.disabled = false;
  const places = $$(".answer", form);
  const said = await Promise.all(places.map((place) => one(form, place, running.signal)));
  places.forEach((place, at) => {
    if (said[at]) tokenRows(place, said[at], at && said[0] ? compare(place, said[at], said[0]) : null);
  });
  button.disabled = false;
  stop.disabled = true;
}

function snippets(form) {
  const body = { model: $(".answer select", form).value, ...asked(form) };
  const here = location.origin + ROOT.replace(/\/console$/, "");
  const json = JSON.stringify(body, null, 2);
  const system = body.messages.find((message) => message.role === "system");
  const python = (value) => JSON.stringify(value);
  const texts = {
    curl: `curl ${here}/v1/chat/completions \\\n  -H "Authorization: Bearer $LORAPLEX_KEY" -H "Content-Type: application/json" \\\n  -d '${json.replaceAll("'", "'\\''")}'`,
    openai: `import os\nfrom openai import OpenAI\n\nclient = OpenAI(base_url=${python(`${here}/v1`)}, api_key=os.environ["LORAPLEX_KEY"])\nanswer = client.chat.completions.create(\n    model=${python(body.model)},\n    messages=${python(body.messages)},\n    max_tokens=${body.max_tokens},\n    temperature=${body.temperature},\n)\nprint(answer.choices[0].message.content)`,
    anthropic: `import os\nfrom anthropic import Anthropic\n\nclient = Anthropic(base_url=${python(here)}, api_key=os.environ["LORAPLEX_KEY"])\nanswer = client.messages.create(\n    model=${python(body.model)},${system ? `\n    system=${python(system.content)},` : ""}\n    messages=${python(body.messages.filter((message) => message.role !== "system"))},\n    max_tokens=${body.max_tokens},\n    temperature=${body.temperature},\n)\nprint(answer.content[0].text)`,
  };
  for (const place of $$("[data-snippet]")) place.textContent = texts[place.dataset.snippet];
}

const playground = $("#playground");
if (playground) {
  $("[data-stop]", playground).addEventListener("click", () => running?.abort());
  playground.addEventListener("input", () => snippets(playground));
  snippets(playground);
}

localTimes();
