"use strict";
// The playground and the live view. Talks to this server alone, by the same API as everyone.

const $ = (id) => document.getElementById(id);
const messages = [];
let under_way = null; // an AbortController while an answer comes

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function show(role, text, kind = "") {
  const item = document.createElement("div");
  item.className = `message ${kind}`;
  const [name, body, note] = ["b", "div", "small"].map((tag) => document.createElement(tag));
  name.textContent = role;
  body.textContent = text;
  item.append(name, body, note);
  $("log").append(item);
  $("log").scrollTop = $("log").scrollHeight;
  return { item, body, note };
}

async function refusal(answer) {
  if (answer.status === 401) $("key-field").hidden = false;
  const text = await answer.text();
  try { return JSON.parse(text).error.message; } catch { return text || answer.statusText; }
}

// Server-sent events of a response, parsed.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

function progress(shown, state) {
  let bar = shown.item.querySelector("progress");
  if (!bar) { bar = document.createElement("progress"); shown.item.append(bar); }
  bar.max = state.total;
  bar.value = state.processed;
  shown.note.textContent = `prompt: ${state.processed} of ${state.total} tokens`;
}

// What the model thinks before it answers, above the answer.
function think(shown, piece) {
  let thought = shown.item.querySelector(".thought");
  if (!thought) {
    thought = document.createElement("p");
    thought.className = "thought";
    shown.item.insertBefore(thought, shown.body);
  }
  thought.textContent += piece;
}

async function ask(text) {
  messages.push({ role: "user", content: text });
  show("you", text);
  const shown = show("model", "");
  const system = $("system").value.trim();
  const body = {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages], stream: true,
    stream_options: { include_usage: true }, return_progress: true,
    temperature: Number($("temperature").value), max_tokens: Number($("tokens").value),
  };
  const begin = performance.now();
  let first = null, tokens = 0;
  under_way = new AbortController();
  busy(true);
  try {
    const answer = await fetch("v1/chat/completions",
      { method: "POST", headers: headers(), body: JSON.stringify(body), signal: under_way.signal });
    if (!answer.ok) throw new Error(await refusal(answer));
    for await (const event of events(answer)) {
      if (event.prompt_progress) progress(shown, event.prompt_progress);
      if (event.usage) tokens = event.usage.completion_tokens;
      const { content, reasoning_content: thought } = event.choices?.[0]?.delta ?? {};
      if (!content && !thought) continue;
      first ??= performance.now();
      shown.item.querySelector("progress")?.remove();
      if (thought) think(shown, thought);
      shown.body.textContent += content ?? "";
      $("log").scrollTop = $("log").scrollHeight;
    }
    const end = performance.now();
    const rate = first && tokens > 1 ? `, ${((tokens - 1) / ((end - first) / 1000)).toFixed(1)} tokens/s after it` : "";
    shown.note.textContent = first
      ? `${tokens} tokens; first token after ${(first - begin).toFixed(0)} ms${rate}` : "no text came";
  } catch (error) {
    shown.item.querySelector("progress")?.remove();
    if (error.name === "AbortError") shown.note.textContent = "stopped";
    else { shown.item.classList.add("error"); shown.body.textContent += error.message; }
  } finally {
    if (shown.item.classList.contains("error")) messages.pop();
    else messages.push({ role: "assistant", content: shown.body.textContent });
    under_way = null;
    busy(false);
    $("prompt").focus();
  }
}

function busy(yes) {
  $("send").disabled = yes;
  $("stop").disabled = !yes;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value;
  if (under_way || !text.trim()) return;
  $("prompt").value = "";
  ask(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("ask").requestSubmit(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") under_way?.abort(); });
$("stop").addEventListener("click", () => under_way?.abort());
$("reset").addEventListener("click", () => {
  under_way?.abort();
  messages.length = 0;
  $("log").replaceChildren();
  $("prompt").focus();
});

// The live view: asked once a second, while the page is seen.
const rates = [];
let drawn = -1;

function draw_rate(value) {
  rates.push(value);
  if (rates.length > 120) rates.shift();
  const most = Math.max(1, ...rates);
  const points = rates.map((rate, i) => `${120 - rates.length + i + 1},${(66 - 60 * rate / most).toFixed(1)}`);
  $("rate").firstElementChild.setAttribute("d", `M${points.join("L")}`);
}

function draw_batch(batch) {
  if (!batch) return;
  const time = `${(batch.seconds * 1000).toFixed(1)} ms`;
  const count = (number, word) => `${number} ${word}${number === 1 ? "" : "s"}`;
  $("plan").textContent = `${count(batch.tokens, "token")} of ${count(batch.sequences, "sequence")} in ${time} · ${batch.plan}`;
  if (!batch.svg) return;
  drawn = batch.number;
  const parsed = new DOMParser().parseFromString(batch.svg, "image/svg+xml").documentElement;
  parsed.removeAttribute("width");
  $("timeline").replaceChildren(document.importNode(parsed, true));
}

const percent = (part) => (part === undefined ? "–" : `${(100 * part).toFixed(part < 0.1 ? 1 : 0)}%`);

async function look() {
  if (document.hidden) return;
  let state;
  try {
    const answer = await fetch(`live?drawn=${drawn}`, { headers: headers() });
    if (!answer.ok) throw new Error(await refusal(answer));
    state = await answer.json();
  } catch (error) {
    $("status").dataset.state = "unreachable";
    $("status").textContent = error instanceof TypeError ? "the server can't be reached" : error.message;
    return;
  }
  $("status").dataset.state = state.status;
  $("status").textContent = [state.status, state.reason].filter(Boolean).join(": ");
  $("model").textContent = state.model;
  $("running").textContent = state.slots ? `${state.running} of ${state.slots}` : state.running;
  $("waiting").textContent = state.waiting;
  $("speed").textContent = state.tokens_per_second.toFixed(1);
  const first = state.time_to_first_token;
  $("first").textContent = first === null ? "–" : `${(first * 1000).toFixed(0)} ms`;
  $("ranks").textContent = state.ranks ?? "–";
  $("memory").textContent = percent(state.memory);
  $("reused").textContent = percent(state.reused);
  $("restarts").textContent = state.restarts ?? "–";
  draw_rate(state.tokens_per_second);
  draw_batch(state.batch);
}

look();
setInterval(look, 1000);
document.addEventListener("visibilitychange", look);
