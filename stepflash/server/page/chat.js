// The chat page: one conversation with the server that served the page, over its public API.
//
// `conversation` is a list of messages exactly as the API takes them; `view` draws one message. Answers are
// streamed into a message of that list, so that a stopped answer is simply a shorter one.

import { markdown } from "./markdown.js";
import * as tools from "./tools.js";

const $ = (id) => document.getElementById(id);
const MAX_TOOL_ROUNDS = 8;
const EXAMPLES = [
  "What is 17 * 23 - 48?",
  "Sort these words: pear, apple, fig, cherry",
  "How many days are there from 3 March to 20 April?",
];
const DEFAULTS = { system: "", temperature: "", maxTokens: "", thinking: true, tools: false, theme: "" };

const settings = { ...DEFAULTS, ...load("stepflash-settings") };
let conversation = load("stepflash-conversation") ?? [];
let model = { id: "", max_model_len: 0 };
let running = null; // AbortController of the answer under way

function load(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

function save(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    // Private windows and full disks: the page works, it only forgets.
  }
}

// ---- drawing

function element(name, className, ...children) {
  const node = document.createElement(name);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

/** The parts of an answer on the page, updated as its message grows. */
class AnswerView {
  constructor() {
    this.node = element("article", "answer");
    this.thought = this.body = null;
    this.calls = [];
    this.footer = this.node.appendChild(element("div", "foot"));
    $("messages").append(this.node);
  }

  update(message) {
    if (message.reasoning_content && !this.thought) {
      this.thought = element("details", "thought", element("summary", "", "Thinking"), element("div"));
      this.thought.open = true;
      this.footer.before(this.thought);
    }
    if (this.thought) this.thought.lastChild.textContent = message.reasoning_content;
    if (message.content) {
      if (!this.body) {
        this.fold();
        this.body = element("div", "text");
        this.footer.before(this.body);
      }
      this.body.replaceChildren(...markdown(message.content));
    }
    for (const [index, call] of (message.tool_calls ?? []).entries()) {
      if (!this.calls[index]) {
        this.fold();
        this.calls[index] = element("details", "call", element("summary"), element("pre"));
        this.footer.before(this.calls[index]);
      }
      const [summary, pre] = this.calls[index].children;
      summary.textContent = call.function.name;
      pre.textContent = call.function.arguments;
    }
  }

  result(index, text) {
    const call = this.calls[index];
    call.append(element("pre", "result", `= ${text}`));
    call.open = true;
  }

  fold() {
    if (!this.thought) return;
    this.thought.open = false;
    this.thought.firstChild.textContent = "Thought";
  }

  foot(...children) {
    this.footer.replaceChildren(...children);
  }
}

function drawUser(text) {
  $("messages").append(element("div", "user", element("div", "", text)));
}

function draw() {
  for (const node of [...$("messages").children]) if (node.id !== "welcome") node.remove();
  $("welcome").hidden = conversation.length > 0;
  let view = null;
  for (const message of conversation) {
    if (message.role === "user") drawUser(message.content);
    if (message.role === "tool") view?.result(view.numResults++, message.content);
    if (message.role === "assistant") {
      view = new AnswerView();
      view.numResults = 0;
      view.update(message);
      view.fold();
    }
  }
  $("messages").scrollTop = $("messages").scrollHeight;
}

/** Follow the text unless the reader has scrolled up. */
function following(update) {
  const box = $("messages");
  const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  update();
  if (isAtEnd) box.scrollTop = box.scrollHeight;
}

function drawContext(usage) {
  if (!usage || !model.max_model_len) return;
  const [meter, label] = $("context").children;
  meter.value = usage.total_tokens / model.max_model_len;
  label.textContent = `${usage.total_tokens.toLocaleString()} of ${model.max_model_len.toLocaleString()}`;
  $("context").hidden = false;
}

function speed(usage, firstAt) {
  const details = usage.completion_tokens_details;
  const parts = [`${usage.completion_tokens} tokens`];
  const seconds = (performance.now() - firstAt) / 1000;
  if (seconds > 0.05) parts.push(`${(usage.completion_tokens / seconds).toFixed(1)} tok/s`);
  if (details.drafted_tokens && details.num_steps) {
    parts.push(`${(details.accepted_draft_tokens / details.num_steps).toFixed(2)} drafts accepted a step`);
  }
  const cached = usage.prompt_tokens_details.cached_tokens;
  if (cached) parts.push(`${cached} of ${usage.prompt_tokens} prompt tokens cached`);
  return parts.join(" \u00b7 ");
}

// ---- talking to the server

function requestBody() {
  const messages = settings.system ? [{ role: "system", content: settings.system }, ...conversation] : conversation;
  const body = {
    model: model.id,
    messages,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  if (settings.temperature !== "") body.temperature = Number(settings.temperature);
  if (settings.maxTokens !== "") body.max_tokens = Number(settings.maxTokens);
  if (!settings.thinking) body.reasoning_effort = "none";
  if (settings.tools) body.tools = tools.definitions;
  return body;
}

/** The data frames of a streamed reply. */
async function* frames(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** Add a delta of the stream to the message it belongs to. */
function add(message, delta) {
  if (delta.reasoning_content) message.reasoning_content = (message.reasoning_content ?? "") + delta.reasoning_content;
  if (delta.content) message.content += delta.content;
  for (const { index, ...call } of delta.tool_calls ?? []) {
    message.tool_calls ??= [];
    if (call.id) message.tool_calls[index] = structuredClone(call);
    else message.tool_calls[index].function.arguments += call.function.arguments;
  }
}

/** Stream one answer into the conversation; returns how it ended. */
async function answer(signal) {
  const request = JSON.stringify(requestBody());
  const message = { role: "assistant", content: "" };
  conversation.push(message);
  const view = new AnswerView();
  view.node.classList.add("running");
  let firstAt = performance.now();
  let reason = null;
  let usage = null;
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: request,
      signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of frames(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage?.completion_tokens) {
        if (!usage) firstAt = performance.now();
        usage = chunk.usage;
      }
      const choice = chunk.choices[0];
      if (choice) {
        add(message, choice.delta);
        reason = choice.finish_reason ?? reason;
      }
      following(() => {
        view.update(message);
        if (usage) view.foot(speed(usage, firstAt));
      });
    }
    if (reason === "length") view.foot(`${speed(usage, firstAt)} \u00b7 cut at the token limit`);
  } catch (error) {
    const isStop = error.name === "AbortError";
    reason = isStop ? "stopped" : "error";
    const note = element("span", isStop ? "" : "error", isStop ? "stopped" : error.message);
    following(() => view.foot(...(usage ? [speed(usage, firstAt)] : []), note));
    // A call that was cut has no valid arguments; an empty answer is no message.
    delete message.tool_calls;
    if (!message.content && !message.reasoning_content) conversation.pop();
  } finally {
    view.node.classList.remove("running");
    drawContext(usage);
  }
  return { reason, message, view };
}

/** Answer the last message, running tools as long as the model asks for them. */
async function respond() {
  running = new AbortController();
  setRunning(true);
  try {
    for (let round = 0; round < MAX_TOOL_ROUNDS; round++) {
      const { reason, message, view } = await answer(running.signal);
      if (reason !== "tool_calls") {
        offerAgain(view);
        break;
      }
      for (const [index, call] of message.tool_calls.entries()) {
        const content = tools.run(call.function.name, call.function.arguments);
        conversation.push({ role: "tool", tool_call_id: call.id, content });
        following(() => view.result(index, content));
      }
    }
  } finally {
    running = null;
    setRunning(false);
    save("stepflash-conversation", conversation);
  }
}

function offerAgain(view) {
  const copy = element("button", "", "Copy");
  copy.type = "button";
  copy.onclick = () => navigator.clipboard?.writeText(conversation.findLast((m) => m.role === "assistant")?.content ?? "");
  const again = element("button", "", "Again");
  again.type = "button";
  again.onclick = () => {
    if (running) return;
    const lastUser = conversation.findLastIndex((message) => message.role === "user");
    conversation = conversation.slice(0, lastUser + 1);
    draw();
    respond();
  };
  for (const button of document.querySelectorAll(".foot button")) button.remove();
  following(() => view.footer.append(copy, again));
}

// ---- the controls

function setRunning(isRunning) {
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
}

function submit(text) {
  if (running || !text.trim()) return;
  $("welcome").hidden = true;
  conversation.push({ role: "user", content: text });
  drawUser(text);
  $("messages").scrollTop = $("messages").scrollHeight;
  respond();
}

function fitInput() {
  const input = $("input");
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}

function newConversation() {
  running?.abort();
  conversation = [];
  save("stepflash-conversation", conversation);
  $("context").hidden = true;
  draw();
  $("input").focus();
}

function applyTheme() {
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
  else delete document.documentElement.dataset.theme;
}

function openSettings() {
  for (const field of $("settings").querySelectorAll("[name]")) {
    if (field.type === "checkbox") field.checked = settings[field.name];
    else field.value = settings[field.name];
  }
  $("settings").showModal();
}

function takeSettings() {
  for (const field of $("settings").querySelectorAll("[name]")) {
    settings[field.name] = field.type === "checkbox" ? field.checked : field.value;
  }
  save("stepflash-settings", settings);
  applyTheme();
}

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const text = $("input").value;
  if (running || !text.trim()) return;
  $("input").value = "";
  fitInput();
  submit(text);
};
$("input").oninput = fitInput;
$("input").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
};
$("stop").onclick = () => running?.abort();
$("new").onclick = newConversation;
$("open-settings").onclick = openSettings;
$("settings").onclose = takeSettings;
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("settings").open) running?.abort();
  if (event.altKey && event.code === "KeyN") newConversation();
  if (event.altKey && event.code === "KeyS") openSettings();
});

for (const text of EXAMPLES) {
  const button = element("button", "", text);
  button.type = "button";
  button.onclick = () => submit(text);
  $("examples").append(element("li", "", button));
}
applyTheme();
draw();
fetch("v1/models")
  .then((response) => response.json())
  .then(({ data }) => {
    model = data[0];
    $("model").textContent = model.id;
  })
  .catch(() => {
    $("model").textContent = "the server does not answer";
  });
