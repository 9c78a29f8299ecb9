// The page: one conversation at a time, an answer streamed into it, and what the user sets.

import { Api, ApiError } from "./api.js";
import { markdown, Store, title } from "./store.js";
import { make, MessageView } from "./view.js";

const $ = (id) => document.getElementById(id);
const store = new Store();
const api = new Api(() => store.key);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const FIELDS = ["system", ...NUMBERS];

let current = store.conversations[0] ?? store.create();
let running = null; // the AbortController of the answer being written

// --- conversations ------------------------------------------------------------------------------------

function showConversations() {
  const list = $("conversations");
  list.replaceChildren();
  for (const each of store.conversations) {
    const item = make("li", { className: each === current ? "current" : "" });
    const name = each.title || "New conversation";
    const open = make("button", { type: "button", className: "open", textContent: name, title: name });
    if (each === current) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => choose(each));
    const remove = make("button", { type: "button", textContent: "\u00d7", title: `Delete ${name}` });
    remove.setAttribute("aria-label", `Delete ${name}`);
    remove.addEventListener("click", () => forget(each));
    item.append(open, remove);
    list.append(item);
  }
  $("export").disabled = !current.messages.length;
}

function choose(conversation) {
  running?.abort();
  current = conversation;
  showSide(false);
  showAll();
  $("prompt").focus();
}

function forget(conversation) {
  if (!confirm(`Delete "${conversation.title || "New conversation"}"?`)) return;
  if (conversation === current) running?.abort();
  store.remove(conversation.id);
  if (conversation === current) current = store.conversations[0] ?? store.create();
  showAll();
}

function startNew() {
  choose(current.messages.length ? store.create() : current);
}

function exportCurrent() {
  const file = new Blob([markdown(current)], { type: "text/markdown" });
  const link = make("a", { href: URL.createObjectURL(file), download: `${title(current.title) || "conversation"}.md` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// --- messages -----------------------------------------------------------------------------------------

function showAll() {
  showConversations();
  showMessages();
}

function showMessages() {
  const log = $("log");
  log.replaceChildren();
  if (!current.messages.length) {
    log.append(make("p", { className: "empty", textContent: "Ask the model something." }));
    return null;
  }
  let last = null;
  for (const message of current.messages) {
    last = new MessageView(message);
    log.append(last.element);
  }
  if (!running && last.message.role === "assistant") last.offer("Regenerate", regenerate);
  if (!running && last.message.role === "user") last.offer("Answer this", () => answer());
  log.scrollTop = log.scrollHeight;
  return last;
}

function regenerate() {
  if (running) return;
  current.messages.pop();
  answer();
}

function send(event) {
  event.preventDefault();
  const text = $("prompt").value;
  if (running || !text.trim()) return;
  $("prompt").value = "";
  fitPrompt();
  if (!current.messages.length) current.title = title(text);
  current.messages.push({ role: "user", content: text });
  answer();
}

async function answer() {
  const conversation = current;
  const history = conversation.messages.map(({ role, content }) => ({ role, content }));
  const message = { role: "assistant", content: "", reasoning: "" };
  conversation.messages.push(message);
  running = new AbortController();
  const mine = running;
  showError("");
  showRunning(true);
  showConversations();
  const view = showMessages();
  const clock = { start: performance.now(), first: 0, last: 0 };
  let drawn = false;
  const draw = () => {
    drawn = false;
    if (conversation !== current) return;
    const log = $("log");
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    view.update(running === mine);
    if (atEnd) log.scrollTop = log.scrollHeight;
  };
  view.update(true);
  try {
    const done = await api.chat(
      { model: $("model").value, messages: withSystem(history), ...sampling() },
      (delta) => {
        clock.last = performance.now();
        clock.first ||= clock.last;
        message.content += delta.content;
        message.reasoning += delta.reasoning;
        if (!drawn) requestAnimationFrame(draw); // many tokens, one drawing
        drawn = true;
      },
      mine.signal,
    );
    message.facts = facts(done, clock);
  } catch (error) {
    if (error.name === "AbortError") message.facts = "stopped";
    else if (error instanceof ApiError && error.status === 401) await askKey(error.message);
    else showError(error instanceof ApiError ? `The server says: ${error.message}` : String(error));
  } finally {
    if (running === mine) running = null;
    if (!message.content && !message.reasoning) conversation.messages.pop();
    if (!message.reasoning) delete message.reasoning;
    if (!store.save()) showError("This browser cannot keep the conversation: its storage is full or switched off.");
    showRunning(Boolean(running));
    if (conversation === current) showAll();
    showModel();
  }
}

function withSystem(history) {
  const system = $("system").value.trim();
  return system ? [{ role: "system", content: system }, ...history] : history;
}

function sampling() {
  const chosen = {};
  for (const name of NUMBERS) {
    const value = $(name).value;
    if (value !== "" && $(name).checkValidity()) chosen[name] = Number(value);
  }
  return chosen;
}

function facts({ usage, finishReason }, clock) {
  const parts = [];
  const tokens = usage?.completion_tokens ?? 0;
  if (tokens > 1 && clock.last > clock.first) {
    parts.push(`${((1000 * (tokens - 1)) / (clock.last - clock.first)).toFixed(1)} tokens/s`);
  }
  if (clock.first) parts.push(`first token after ${((clock.first - clock.start) / 1000).toFixed(2)} s`);
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    parts.push(`${usage.prompt_tokens} tokens in${cached ? ` (${cached} reused)` : ""}, ${tokens} out`);
  }
  if (finishReason === "length") parts.push("cut at the length limit");
  return parts.join(" \u00b7 ");
}

// --- the model, settings, the key ---------------------------------------------------------------------

async function showModels() {
  try {
    const names = await api.models();
    $("model").replaceChildren(...names.map((name) => make("option", { value: name, textContent: name })));
    if (names.includes(store.settings.model)) $("model").value = store.settings.model;
    showError("");
    await showModel();
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) {
      await askKey(error.message);
      return await showModels();
    }
    showError(`The server says: ${error.message}`);
  }
}

async function showModel() {
  const name = $("model").value;
  if (!name) return;
  try {
    const about = await api.model(name);
    const known = about.facts ?? {};
    const parts = [
      about.state,
      known.quant && `${[known.quant].flat().join(" + ")} weights`,
      known.runner && `${known.runner} runner${known.device === known.runner ? "" : ` on ${known.device}`}`,
      about.memory_bytes && `${Math.ceil(about.memory_bytes / 2 ** 20)} MiB planned`,
      about.limits?.context_tokens && `${about.limits.context_tokens} tokens of context`,
    ];
    $("status").textContent = [name, ...parts].filter(Boolean).join(" \u00b7 ");
    $("facts").textContent = known.model ? `Loaded from ${known.model}` : "";
  } catch {
    $("status").textContent = name;
  }
}

function loadSettings() {
  for (const name of FIELDS) {
    $(name).value = store.settings[name] ?? "";
    $(name).addEventListener("change", () => {
      store.settings[name] = $(name).value;
      store.saveSettings();
    });
  }
  $("model").addEventListener("change", () => {
    store.settings.model = $("model").value;
    store.saveSettings();
    showModel();
  });
}

function askKey(message) {
  const dialog = $("key-dialog");
  $("key-text").textContent = store.key ? `The key was not taken: ${message}` : "This server asks for an API key.";
  $("key").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        if ($("key").value) store.setKey($("key").value, $("key-keep").checked);
        resolve();
      },
      { once: true },
    );
  });
}

// --- small things -------------------------------------------------------------------------------------

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function showRunning(on) {
  $("send").hidden = on;
  $("stop").hidden = !on;
}

function showSide(on) {
  $("side").classList.toggle("shown", on);
  $("menu").setAttribute("aria-expanded", String(on));
}

function fitPrompt() {
  const box = $("prompt");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

$("composer").addEventListener("submit", send);
$("prompt").addEventListener("input", fitPrompt);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", startNew);
$("export").addEventListener("click", exportCurrent);
$("menu").addEventListener("click", () => showSide(!$("side").classList.contains("shown")));
$("options-toggle").addEventListener("click", () => {
  const hidden = ($("options").hidden = !$("options").hidden);
  $("options-toggle").setAttribute("aria-expanded", String(!hidden));
});
$("options").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("key-dialog").open) return;
  if ($("side").classList.contains("shown")) showSide(false);
  else running?.abort();
});
document.querySelector("main").addEventListener("click", (event) => {
  if (event.target.id !== "menu") showSide(false);
});

loadSettings();
showAll();
showModels();
$("prompt").focus();
