// The page's three parts: chat, interview, board. What anybody says is text, never markup.

const $ = (id) => document.getElementById(id);
const TOP_P = 0.9;
const NUM_QUESTIONS = 10;
const BOARD_MS = 5000;

let key = "";
let keeps = false;
let voices = [];

// ---- the server -------------------------------------------------------------------------

class ServerError extends Error {}

async function ask(path, body, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    const method = body ? "POST" : "GET";
    response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running?");
  }
  if (response.status === 401) $("key-form").hidden = false;
  if (!response.ok) {
    const found = await response.json().catch(() => null);
    throw new ServerError(found?.error?.message ?? `The server answered ${response.status}.`);
  }
  return response;
}

const askJson = async (path, body) => (await ask(path, body)).json();

// The events of a streamed answer, parsed.
async function* events(response) {
  const decoder = new TextDecoder();
  let held = "";
  for await (const bytes of chunks(response.body)) {
    const parts = (held + decoder.decode(bytes, { stream: true })).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

// Not every browser can iterate over a stream.
async function* chunks(stream) {
  const reader = stream.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Streams an answer into an element; returns its id and text, also when it was stopped.
async function stream(model, messages, element, signal) {
  const body = { model, messages, stream: true, top_p: TOP_P };
  body.temperature = Number($("temperature").value);
  body.max_tokens = Math.round(Number($("max-tokens").value)) || 256;
  const answer = { id: "", text: "", ended: false };
  element.setAttribute("aria-busy", "true");
  try {
    for await (const event of events(await ask("v1/chat/completions", body, signal))) {
      if (event.error) throw new ServerError(event.error.message);
      answer.id = event.id;
      answer.text += event.choices[0]?.delta.content ?? "";
      answer.ended ||= Boolean(event.choices[0]?.finish_reason);
      element.textContent = answer.text;
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  } finally {
    element.setAttribute("aria-busy", "false");
  }
  return answer;
}

// ---- small helpers ----------------------------------------------------------------------

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  if (className) element.className = className;
  return element;
}

// What goes wrong is said at the top of the page.
function tell(error) {
  $("trouble").textContent = error ? error.message : "";
  $("trouble").hidden = !error;
  if (error && !(error instanceof ServerError)) console.error(error);
}

function on(element, type, act) {
  element.addEventListener(type, async (event) => {
    if (type === "submit") event.preventDefault();
    tell(null);
    try {
      await act(event);
    } catch (error) {
      tell(error);
    }
  });
}

// Thumbs, and a place for a better answer. Only where the server keeps them.
function ratings(id, name) {
  const box = make("div", "", "rate");
  const state = make("span");
  state.setAttribute("role", "status");
  const thumbs = ["up", "down"].map((way) => {
    const button = make("button", way === "up" ? "Good" : "Not good");
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-label", `The answer of ${name} is ${way === "up" ? "" : "not "}good`);
    on(button, "click", async () => {
      const wanted = button.getAttribute("aria-pressed") === "true" ? "" : way;
      await askJson("feedback", { answer: id, thumbs: wanted });
      for (const each of thumbs) {
        each.setAttribute("aria-pressed", String(each === button && wanted === way));
      }
      state.textContent = "Kept.";
    });
    return button;
  });
  const details = make("details");
  details.append(make("summary", "A better answer would be ..."));
  const form = make("form");
  const label = make("label", "Your better answer");
  const text = make("textarea");
  text.id = `better-${id}`;
  text.rows = 3;
  label.htmlFor = text.id;
  form.append(label, text, make("button", "Keep it"));
  on(form, "submit", async () => {
    await askJson("feedback", { answer: id, better: text.value });
    state.textContent = text.value.trim() ? "Your answer is kept." : "Taken back.";
    details.open = false;
  });
  details.append(form);
  box.append(...thumbs, details, state);
  return box;
}

// A place for an answer: who gives it, its text, and later its ratings.
function place(name) {
  const said = make("div", "", "said");
  const text = make("div", "", "text");
  said.append(make("div", name, "who"), text);
  return { said, text };
}

// ---- chat -------------------------------------------------------------------------------

const BOTH = "";
let talks = {}; // by voice: its messages
let stopper = null;

function reset() {
  talks = Object.fromEntries(voices.map((name) => [name, []]));
  $("talk").replaceChildren();
}

async function send() {
  const text = $("message").value.trim();
  if (!text || stopper) return;
  const chosen = $("voice").value === BOTH ? voices : [$("voice").value];
  const system = $("system").value.trim();
  const before = system ? [{ role: "system", content: system }] : [];
  stopper = new AbortController();
  $("message").value = "";
  $("send").disabled = true;
  $("stop").hidden = false;
  const turn = make("div", "", "turn");
  const asked = make("div", "", "said user");
  asked.append(make("div", "You", "who"), make("div", text, "text"));
  const answers = make("div", "", "answers");
  turn.append(asked, answers);
  $("talk").append(turn);
  try {
    const results = await Promise.allSettled(
      chosen.map(async (name) => {
        const { said, text: element } = place(name);
        answers.append(said);
        turn.scrollIntoView({ block: "nearest" });
        const messages = [...talks[name], { role: "user", content: text }];
        const answer = await stream(name, [...before, ...messages], element, stopper.signal);
        if (!answer.text.trim()) element.textContent = answer.ended ? "(no words)" : "(stopped)";
        else talks[name] = [...messages, { role: "assistant", content: answer.text }];
        if (keeps && answer.ended) said.append(ratings(answer.id, name));
      }),
    );
    const failed = results.find((result) => result.status === "rejected");
    if (failed) throw failed.reason;
  } finally {
    stopper = null;
    $("send").disabled = false;
    $("stop").hidden = true;
    $("message").focus();
  }
}

on($("chat-form"), "submit", send);
on($("stop"), "click", () => stopper?.abort());
on($("new-chat"), "click", () => {
  stopper?.abort();
  reset();
  $("message").focus();
});
$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("chat-form").requestSubmit();
  }
});

// ---- interview --------------------------------------------------------------------------

let questions = [];
let number = 0;

function show() {
  const done = number >= questions.length;
  $("asked").hidden = done;
  $("compared").hidden = true;
  $("answer-form").hidden = false;
  if (done) {
    $("interview-state").textContent = "That was the last question. Start again for more.";
    return;
  }
  const question = questions[number];
  const labels = [question.category, question.difficulty].filter(Boolean).join(", ");
  $("place").textContent = `Question ${number + 1} of ${questions.length}: ${labels}`;
  $("question").textContent = question.text;
  $("answer").value = "";
  $("follow-answer").value = "";
  $("answer").readOnly = false;
  $("question").focus();
}

async function start() {
  const wanted = new URLSearchParams({ count: NUM_QUESTIONS });
  wanted.set("category", $("category").value);
  wanted.set("difficulty", $("difficulty").value);
  questions = (await askJson(`interview/questions?${wanted}`)).questions;
  number = 0;
  $("interview-state").textContent = "";
  show();
}

async function compare() {
  const question = questions[number];
  const found = await askJson("interview/compare", {
    question: question.id,
    answer: $("answer").value,
  });
  const count = found.points.filter((point) => point.is_covered).length;
  $("score").textContent = `Your answer has ${count} of ${found.points.length} points`;
  $("points").replaceChildren(
    ...found.points.map((point) => {
      const item = make("li", "", point.is_covered ? "has" : "lacks");
      item.append(make("b", point.is_covered ? "has " : "lacks "), document.createTextNode(point.text));
      return item;
    }),
  );
  $("follow").hidden = !found.follow_up;
  $("follow-question").textContent = `A follow-up: ${found.follow_up}`;
  $("grades").hidden = !keeps;
  $("next").hidden = keeps;
  $("answer").readOnly = true;
  $("compared").hidden = false;
  $("score").focus();
  await coach(question);
}

// The one that was chosen for the chat answers, too; of several, the first adapter.
async function coach(question) {
  const name = $("voice").value || voices[1];
  const { said, text } = place(name);
  $("coach-answer").replaceChildren(said);
  const messages = [{ role: "user", content: question.text }];
  const answer = await stream(name, messages, text);
  if (keeps && answer.ended) said.append(ratings(answer.id, name));
}

function next() {
  number += 1;
  show();
}

on($("start-form"), "submit", start);
on($("answer-form"), "submit", compare);
on($("skip"), "click", next);
on($("next"), "click", next);
for (const button of $("grades").querySelectorAll("button")) {
  on(button, "click", async () => {
    const { due } = await askJson("interview/grade", {
      question: questions[number].id,
      answer: $("answer").value,
      grade: button.value,
      follow_up: $("follow-answer").value,
    });
    const when = new Date(due).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
    $("interview-state").textContent = `That question returns ${when}.`;
    next();
  });
}

// ---- board ------------------------------------------------------------------------------

// Lines as `imate_requests_total{adapter="a",code="200"} 3.0`, which is all that is needed here.
function parse(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const parts = /^imate_(\w+?)(?:\{(.*)\})? (\S+)$/.exec(line);
    if (!parts) continue;
    const labels = {};
    for (const [, name, value] of (parts[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[name] = value.replace(/\\(.)/g, (_, char) => (char === "n" ? "\n" : char));
    }
    found.push({ name: parts[1], labels, value: Number(parts[3]) });
  }
  return found;
}

async function look() {
  const entries = parse(await (await ask("metrics")).text());
  const sum = (name, adapter, test = () => true) =>
    entries
      .filter((e) => e.name === name && (adapter === null || e.labels.adapter === adapter) && test(e))
      .reduce((total, e) => total + e.value, 0);
  const mean = (name, adapter) =>
    sum(`${name}_sum`, adapter) / sum(`${name}_count`, adapter);
  const ms = (seconds) => (Number.isFinite(seconds) ? `${(seconds * 1000).toFixed(0)} ms` : "");
  const head = make("tr");
  for (const title of ["", "answers", "tokens", "first token", "each next", "good", "not good"]) {
    const cell = make("th", title);
    cell.scope = "col";
    head.append(cell);
  }
  $("board-head").replaceChildren(head);
  $("board-rows").replaceChildren(
    ...voices.map((name) => {
      const row = make("tr");
      const thumbs = (way) => sum("ratings_total", name, (e) => e.labels.thumbs === way);
      const cells = [
        sum("requests_total", name, (e) => e.labels.code === "200"),
        sum("answer_tokens_total", name),
        ms(mean("first_token_seconds", name)),
        ms(mean("token_seconds", name)),
        thumbs("up"),
        thumbs("down"),
      ];
      const title = make("th", name);
      title.scope = "row";
      row.append(title, ...cells.map((cell) => make("td", String(cell))));
      return row;
    }),
  );
  const refused = sum("requests_total", null, (e) => Number(e.labels.code) >= 400);
  $("board-now").textContent =
    `${sum("running", null)} answered at the moment, ${sum("waiting", null)} wait; ` +
    `${refused} requests were refused.`;
}

on($("refresh"), "click", look);
setInterval(() => {
  if (!$("board").hidden && !document.hidden) look().catch(tell);
}, BOARD_MS);

// ---- the whole --------------------------------------------------------------------------

function turnTo(hash) {
  const name = ["#interview", "#board"].includes(hash) ? hash.slice(1) : "chat";
  for (const section of document.querySelectorAll("main > section")) {
    section.hidden = section.id !== name;
  }
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (name === "board") look().catch(tell);
}

function option(text, value) {
  const element = make("option", text);
  element.value = value;
  return element;
}

async function begin() {
  const [models, first] = await Promise.all([
    askJson("v1/models"),
    askJson("interview/questions?count=1"),
  ]);
  voices = models.data.map((model) => model.id);
  keeps = first.keeps;
  $("voice").replaceChildren(...voices.map((name) => option(name, name)));
  if (voices.length > 1) {
    $("voice").append(option(`${voices.join(" and ")}, side by side`, BOTH));
    $("voice").value = voices[1];
  }
  $("category").replaceChildren(
    option("all", ""),
    ...first.categories.map((name) => option(name, name)),
  );
  $("kept").textContent = keeps
    ? "Conversations, grades and feedback are kept in a file on the server's disk."
    : "Nothing that is said here is kept.";
  $("key-form").hidden = true;
  reset();
}

on($("key-form"), "submit", async () => {
  key = $("key").value;
  await begin();
});
addEventListener("hashchange", () => turnTo(location.hash));
turnTo(location.hash);
begin().catch(tell);
