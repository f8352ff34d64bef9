// The chat page: one conversation with the server that served the page, over its public API.
//
// `conversation` is a list of messages as the API takes them, answers with their `figures`; `view` draws one message. Answers are
// streamed into a message of that list, so that a stopped answer is simply a shorter one.

import { markdown } from "./markdown.js";
import * as tools from "./tools.js";

const $ = (id) => document.getElementById(id);
const MAX_TOOL_ROUNDS = 8;
const EXAMPLES = [
  "What is 17 * 23?",
  "What day of the week is 10 days after Monday?",
  "How many times does the letter a occur in banana?",
];
const DEFAULTS = {
  system: "",
  effort: "",
  thinkingBudget: "",
  temperature: "",
  maxTokens: "",
  draftDepth: "",
  key: "",
  tools: false,
  theme: "",
};

// A key lasts as long as the tab; everything else is remembered.
const settings = { ...DEFAULTS, ...load("stepflash-settings"), key: load("stepflash-key", sessionStorage) ?? "" };
let conversation = load("stepflash-conversation") ?? [];
let model = { id: "", max_model_len: 0 };
let running = null; // AbortController of the answer under way

function load(key, storage = localStorage) {
  try {
    return JSON.parse(storage.getItem(key));
  } catch {
    return null;
  }
}

function save(key, value, storage = localStorage) {
  try {
    storage.setItem(key, JSON.stringify(value));
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
    this.node.ariaLabel = "Answer";
    this.thought = this.body = null;
    this.shown = ""; // the text that `body` was made of
    this.isFolded = false;
    this.calls = [];
    this.footer = this.node.appendChild(element("div", "foot"));
    $("messages").append(this.node);
  }

  update(message) {
    if (message.reasoning_content && !this.thought) {
      this.thought = element("details", "thought", element("summary", "", "Thinking\u2026"), element("div"));
      this.thought.open = true;
      this.footer.before(this.thought);
    }
    if (this.thought) this.thought.lastChild.textContent = message.reasoning_content;
    if (message.content.trim()) {
      if (!this.body) {
        this.fold(message);
        this.body = element("div", "text");
        this.footer.before(this.body);
      }
      if (this.shown !== message.content) this.body.replaceChildren(...markdown(message.content));
      this.shown = message.content;
    }
    for (const [index, call] of (message.tool_calls ?? []).entries()) {
      if (!this.calls[index]) {
        this.fold(message);
        const summary = element("summary", "", call.function.name, element("span"));
        this.calls[index] = element("details", "call", summary, element("pre"));
        this.footer.before(this.calls[index]);
      }
      const [summary, pre] = this.calls[index].children;
      summary.lastChild.textContent = ` ${shortened(call.function.arguments)}`;
      pre.textContent = indented(call.function.arguments);
    }
  }

  result(index, text) {
    const call = this.calls[index];
    if (!call) return;
    call.append(element("pre", "result", text));
    call.firstChild.lastChild.textContent += ` \u2192 ${shortened(text)}`;
  }

  /** The thought is over: out of the way, but there. */
  fold(message) {
    if (!this.thought || this.isFolded) return;
    this.isFolded = true;
    this.thought.open = false;
    const words = message.reasoning_content.trim().split(/\s+/).length;
    this.thought.firstChild.textContent = `Thought, ${words} word${words === 1 ? "" : "s"}`;
  }

  /** Buttons that copy code, once it is complete. */
  offerCopies() {
    for (const box of this.node.querySelectorAll(".code")) {
      if (!box.querySelector("button")) box.append(copyButton(() => box.querySelector("code").textContent));
    }
  }

  foot(figures, ...notes) {
    this.footer.replaceChildren(...figures.map((figure) => element("span", "", figure)), ...notes);
  }
}

const SHORT = 60;
const shortened = (text) => {
  const line = text.replaceAll(/\s+/g, " ");
  return line.length > SHORT ? `${line.slice(0, SHORT)}\u2026` : line;
};

/** Arguments as they are read best; unfinished ones as they are. */
function indented(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}

function copyButton(text) {
  const button = element("button", "", "Copy");
  button.type = "button";
  button.onclick = async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed here"; // browsers give the clipboard to https and localhost alone
    }
    setTimeout(() => (button.textContent = "Copy"), 1500);
  };
  return button;
}

/** Tell a screen reader; what is drawn is not read aloud while it streams. */
function say(text) {
  $("status").textContent = text;
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
      view.fold(message);
      view.offerCopies();
      view.foot(message.figures ?? []);
    }
  }
  if (view) offerAgain(view);
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
  const of = element("span", "of", ` of ${model.max_model_len.toLocaleString()}`);
  label.replaceChildren(usage.total_tokens.toLocaleString(), of, " tokens");
  $("context").title = "Context used";
  $("context").hidden = false;
}

/** What an answer cost so far, in the words of its footer. */
function speed(usage, firstAt) {
  const details = usage.completion_tokens_details;
  const parts = [`${usage.completion_tokens.toLocaleString()} tokens`];
  const seconds = (performance.now() - firstAt) / 1000;
  // The first token's time is that of the prompt.
  if (seconds > 0.05) parts.push(`${((usage.completion_tokens - 1) / seconds).toFixed(1)} tok/s`);
  if (details.drafted_tokens) {
    const percent = Math.round((100 * details.accepted_draft_tokens) / details.drafted_tokens);
    parts.push(`${details.accepted_draft_tokens.toLocaleString()} drafts accepted (${percent} %)`);
  }
  const cached = usage.prompt_tokens_details.cached_tokens;
  if (cached) parts.push(`${cached.toLocaleString()} of ${usage.prompt_tokens.toLocaleString()} prompt tokens cached`);
  return parts;
}

// ---- talking to the server

function requestBody() {
  const messages = conversation.map(({ figures, ...message }) => message);
  if (settings.system) messages.unshift({ role: "system", content: settings.system });
  const body = {
    ...(model.id && { model: model.id }), // not known yet: the server has only one
    messages,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  if (settings.temperature !== "") body.temperature = Number(settings.temperature);
  if (settings.maxTokens !== "") body.max_tokens = Number(settings.maxTokens);
  if (settings.draftDepth !== "") body.draft_depth = Number(settings.draftDepth);
  if (settings.effort) body.reasoning_effort = settings.effort;
  if (settings.thinkingBudget !== "" && settings.effort !== "none") body.thinking_budget = Number(settings.thinkingBudget);
  if (settings.tools) body.tools = tools.definitions;
  return body;
}

/** Headers of every request; without a key the browser's own login for this page counts. */
function headers() {
  return { "content-type": "application/json", ...(settings.key && { authorization: `Bearer ${settings.key}` }) };
}

/** What went wrong, in the server's words if it has any. */
async function problemOf(response) {
  try {
    return new Error((await response.json()).error.message);
  } catch {
    return new Error(`the server answered with status ${response.status}`);
  }
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
  const show = () =>
    following(() => {
      view.update(message);
      if (usage) view.foot((message.figures = speed(usage, firstAt)));
      drawContext(usage);
    });
  const showSoon = oncePerFrame(show);
  say("Thinking");
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: request,
      signal,
    });
    if (!response.ok) throw await problemOf(response);
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
      showSoon();
    }
    show();
    if (reason === null) throw new Error("the connection broke before the answer was complete");
    if (reason === "length") message.figures?.push("cut at the token limit");
    view.foot(message.figures ?? []);
    say(reason === "length" ? "The answer was cut at the token limit" : "Answer complete");
  } catch (error) {
    show();
    const isStop = error.name === "AbortError";
    reason = isStop ? "stopped" : "error";
    const note = element("span", isStop ? "" : "error", isStop ? "stopped" : error.message);
    following(() => view.foot(message.figures ?? [], note));
    say(note.textContent);
    // A call that was cut has no valid arguments; an empty answer is no message.
    delete message.tool_calls;
    if (!message.content && !message.reasoning_content) conversation.pop();
  } finally {
    showSoon.cancel();
    view.node.classList.remove("running");
    view.fold(message);
    view.offerCopies();
  }
  return { reason, message, view };
}

/** The same function, called at most once a frame however often it is asked for. */
function oncePerFrame(update) {
  let frame = 0;
  const soon = () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      update();
    });
  };
  soon.cancel = () => cancelAnimationFrame(frame);
  return soon;
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
  const copy = copyButton(() => conversation.findLast((m) => m.role === "assistant")?.content ?? "");
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
  const hadFocus = document.activeElement === $("stop");
  $("send").hidden = isRunning;
  $("stop").hidden = !isRunning;
  if (hadFocus && !isRunning) $("input").focus();
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
  input.style.height = `${input.scrollHeight}px`;
  $("send").disabled = !input.value.trim();
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
  showSettings();
  $("settings").showModal();
}

function showSettings() {
  for (const field of $("settings").querySelectorAll("[name]")) {
    if (field.type === "checkbox") field.checked = settings[field.name];
    else field.value = settings[field.name];
  }
}

function takeSettings() {
  for (const field of $("settings").querySelectorAll("[name]")) {
    // What is not allowed is not taken: the field shows the old value next time.
    if (field.validity.valid) settings[field.name] = field.type === "checkbox" ? field.checked : field.value;
  }
  const isNewKey = settings.key !== usedKey;
  save("stepflash-settings", { ...settings, key: "" });
  save("stepflash-key", settings.key, sessionStorage);
  applyTheme();
  if (isNewKey) findModel();
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
$("settings").onclick = (event) => {
  if (event.target === $("settings")) $("settings").close(); // beside the form
};
$("reset").onclick = () => {
  Object.assign(settings, DEFAULTS);
  showSettings();
};
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

let usedKey = settings.key;

/** Ask the server which model it has. */
async function findModel() {
  usedKey = settings.key;
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw await problemOf(response);
    model = (await response.json()).data[0];
    $("model").textContent = model.id;
    $("model").classList.remove("error");
  } catch (error) {
    $("model").textContent = error instanceof TypeError ? "the server does not answer" : error.message;
    $("model").classList.add("error");
  }
}

applyTheme();
draw();
fitInput();
findModel();
