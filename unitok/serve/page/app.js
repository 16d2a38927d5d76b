// The page: compose a prompt, watch the answer come (/v1/chat/completions), make a part of an image anew (/v1/images/edits).
const $ = (id) => document.getElementById(id);
const parts = [];       // attached to the next prompt: {kind, url, mask}; mask: of an image, URL of what shall be made anew
let messages = [];      // of the chat
let about = {};
let talk = 0;           // number of the conversation
let running = null;     // AbortController of the request that runs

// ---- Small things ---------------------------------------------------------------------------------------------------

function element(name, properties = {}, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = false;
  clearTimeout(fail.timer);
  fail.timer = setTimeout(() => ($("error").hidden = true), 8000);
}

const mode = () => document.querySelector('input[name="mode"]:checked').value;
const bytesOf = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = reject;
    reader.readAsDataURL(blob);
  });
}

function wav(samples, rate) {  // Float32Array -> Blob
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const word = (at, text) => [...text].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  word(0, "RIFF"); view.setUint32(4, 36 + 2 * samples.length, true); word(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, rate, true); view.setUint32(28, 2 * rate, true); view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  word(36, "data"); view.setUint32(40, 2 * samples.length, true);
  samples.forEach((s, i) => view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, s)) * 32767, true));
  return new Blob([view], { type: "audio/wav" });
}

// ---- Composing ------------------------------------------------------------------------------------------------------

function mediaElement(kind, url, alt) {
  if (kind === "image") return element("img", { src: url, alt });
  return element(kind, kind === "video" ? { src: url, controls: true, loop: true, muted: true } : { src: url, controls: true });
}

function showParts() {
  $("parts").replaceChildren(...parts.map((part, i) => {
    const remove = element("button", { type: "button", textContent: "×", title: "Remove", onclick: () => { parts.splice(i, 1); showParts(); } });
    const media = mediaElement(part.kind, part.url, "attached image");
    if (part.kind !== "image") return element("li", {}, media, remove);
    const brush = element("button", { type: "button", textContent: part.mask ? "✓" : "▨", title: "Paint what shall be made anew", className: "brush", onclick: () => paint(part) });
    return element("li", {}, media, brush, remove);
  }));
}

async function attach(blob) {
  const kind = blob.type.split("/")[0];
  if (!["image", "audio", "video"].includes(kind)) return fail(`${blob.name || "This"} is neither an image nor audio or a video.`);
  parts.push({ kind, url: await dataUrl(blob) });
  showParts();
}

$("file").onchange = async (event) => { for (const file of event.target.files) await attach(file); event.target.value = ""; };
document.querySelector("label.button").onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); $("file").click(); } };
addEventListener("paste", (event) => { for (const file of event.clipboardData.files) attach(file); });
for (const name of ["dragover", "dragleave", "drop"]) {
  addEventListener(name, (event) => {
    event.preventDefault();
    $("composer").classList.toggle("over", name === "dragover");
    if (name === "drop") for (const file of event.dataTransfer.files) attach(file);
  });
}

let recorder = null;
$("record").onclick = async () => {
  if (recorder) return recorder.stop();
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ audio: true });
    const pieces = [];
    recorder = new MediaRecorder(stream);
    recorder.ondataavailable = (event) => pieces.push(event.data);
    recorder.onstop = async () => {
      stream.getTracks().forEach((track) => track.stop());
      recorder = null;
      $("record").ariaPressed = "false";
      $("record").textContent = "● Record";
      const context = new AudioContext();
      const audio = await context.decodeAudioData(await new Blob(pieces).arrayBuffer());
      attach(wav(audio.getChannelData(0), audio.sampleRate));
      context.close();
    };
    recorder.start();
    $("record").ariaPressed = "true";
    $("record").textContent = "■ Stop recording";
  } catch { fail("No microphone can be used."); }
};

// ---- Drawing --------------------------------------------------------------------------------------------------------

const COLORS = ["#101010", "#f5f5f5", "#e11e28", "#1eaa3c", "#2846eb", "#f5e128", "#8c28b4", "#28d7e6"];
const pen = $("canvas").getContext("2d");
let last = null;
function clearCanvas() { pen.fillStyle = "#f5f5f5"; pen.fillRect(0, 0, 256, 256); }
$("colors").append(...COLORS.map((color, i) => {
  const swatch = element("span", { title: color });
  swatch.style.background = color;
  return element("label", {}, element("input", { type: "radio", name: "color", value: color, checked: i === 2, ariaLabel: color }), swatch);
}));
let painted = null;     // the attached image whose hole is being painted, and the pen of its mask
const MASK = "rgba(230, 0, 122, 0.5)";
$("draw").onclick = () => { painted = null; clearCanvas(); $("drawing").showModal(); };
$("clear").onclick = () => (painted ? paint(painted.part) : clearCanvas());
$("cancel").onclick = () => $("drawing").close();
$("use").onclick = () => {
  if (painted) useMask();
  else $("canvas").toBlob((blob) => { attach(blob); $("drawing").close(); }, "image/png");
};
async function paint(part) {  // the image, on which the brush marks the hole
  const image = new Image();
  image.src = part.url;
  await image.decode();
  painted = { part, image, pen: element("canvas", { width: 256, height: 256 }).getContext("2d") };
  pen.drawImage(image, 0, 0, 256, 256);
  if (!$("drawing").open) $("drawing").showModal();
}
function useMask() {  // white where the image is to be made, in its own size
  const { part, image, pen: marked } = painted;
  const mask = element("canvas", { width: image.naturalWidth, height: image.naturalHeight }).getContext("2d");
  mask.fillRect(0, 0, image.naturalWidth, image.naturalHeight);
  mask.drawImage(marked.canvas, 0, 0, image.naturalWidth, image.naturalHeight);
  part.mask = mask.canvas.toDataURL();
  showParts();
  $("drawing").close();
}
const place = (event) => { const box = $("canvas").getBoundingClientRect(); return [(event.clientX - box.left) * 256 / box.width, (event.clientY - box.top) * 256 / box.height]; };
$("canvas").onpointerdown = (event) => { $("canvas").setPointerCapture(event.pointerId); last = place(event); stroke(event); };
$("canvas").onpointerup = () => (last = null);
$("canvas").onpointermove = (event) => last && stroke(event);
function stroke(event) {
  const now = place(event), color = painted ? MASK : document.querySelector('input[name="color"]:checked').value;
  for (const [one, strokeStyle] of painted ? [[pen, color], [painted.pen, "white"]] : [[pen, color]]) {
    Object.assign(one, { strokeStyle, lineWidth: $("brush").value, lineCap: "round" });
    one.beginPath(); one.moveTo(...last); one.lineTo(now[0] + 0.01, now[1]); one.stroke();
  }
  last = now;
}

// ---- Settings -------------------------------------------------------------------------------------------------------

const sliders = ["temperature", "top_p", "guidance_scale"];
for (const id of sliders) $(id).oninput = () => { $(id).dataset.set = "yes"; $(id).previousElementSibling.textContent = $(id).value; };
function defaults() {
  for (const id of sliders) { delete $(id).dataset.set; $(id).previousElementSibling.textContent = "the model's"; $(id).value = id === "guidance_scale" ? 1.5 : 1; }
  $("n").value = 1; $("seed").value = ""; $("max_tokens").value = "";
}
$("defaults").onclick = defaults;

function settings() {
  const given = {};
  for (const id of sliders) if ($(id).dataset.set) given[id] = Number($(id).value);
  if ($("max_tokens").value) given.max_tokens = Number($("max_tokens").value);
  given.n = Number($("n").value) || 1;
  given.seed = $("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number($("seed").value);
  return given;
}

function headers() {
  const key = $("key").value || sessionStorage.getItem("key") || "";
  if ($("key").value) sessionStorage.setItem("key", key);
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

// ---- Generating -----------------------------------------------------------------------------------------------------

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const line = text.slice(0, end).split("\n").find((l) => l.startsWith("data: "));
      if (line && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

class AudioOutput {  // plays samples while they come, then is an ordinary player
  constructor(holder, rate, audible) {
    Object.assign(this, { holder, rate, pieces: [] });
    this.label = element("span", { className: "stats", textContent: "audio …" });
    holder.append(this.label);
    if (audible) this.ready = this.open().catch(() => null);
  }
  async open() {
    const context = new AudioContext({ sampleRate: this.rate });
    await context.audioWorklet.addModule("player.js");
    const node = new AudioWorkletNode(context, "player", { outputChannelCount: [1], processorOptions: { start: 0.2 * this.rate } });
    node.connect(context.destination);
    node.port.onmessage = () => context.close();
    return node.port;
  }
  push(base64, channels) {
    const ints = new Int16Array(bytesOf(base64).buffer);
    const samples = Float32Array.from({ length: ints.length / channels }, (_, i) => ints[i * channels] / 32768);
    this.pieces.push(samples);
    this.ready?.then((port) => port?.postMessage(samples));
    this.label.textContent = `${(this.length() / this.rate).toFixed(1)} s of audio …`;
  }
  length() { return this.pieces.reduce((sum, piece) => sum + piece.length, 0); }
  end() {
    this.ended = true;
    this.ready?.then((port) => port?.postMessage("end"));
    const samples = new Float32Array(this.length());
    let at = 0;
    for (const piece of this.pieces) { samples.set(piece, at); at += piece.length; }
    const url = URL.createObjectURL(wav(samples, this.rate));
    this.label.remove();
    this.holder.append(element("audio", { src: url, controls: true }), element("a", { href: url, download: "unitok.wav", textContent: "Download audio" }));
  }
}

class OutputCard {
  constructor(index, source) {  // source: URL of the prompt's last image, on which boxes are drawn where the answer has none
    Object.assign(this, { node: element("div", { className: "output" }), segments: new Map(), index, source });
  }
  holder(segment) {
    if (!this.segments.has(segment)) { const node = element("div", { className: "segment" }); this.node.append(node); this.segments.set(segment, { node }); }
    return this.segments.get(segment);
  }
  async mark({ boxes = [], points = [] }, node) {  // fractions of the width and height of the image before them
    let canvas = [...this.node.querySelectorAll("canvas")].at(-1);
    if (!canvas && this.source) {
      const image = new Image();
      image.src = this.source;
      await image.decode();
      canvas = node.appendChild(element("canvas", { width: image.width, height: image.height, role: "img", ariaLabel: "boxes" }));
      canvas.getContext("2d").drawImage(image, 0, 0);
    }
    node.append(element("p", { className: "stats", textContent: [...boxes, ...points].map((row) => row.map((v) => v.toFixed(3)).join(" ")).join("; ") }));
    if (!canvas) return;
    const { width, height } = canvas, marks = canvas.getContext("2d");
    Object.assign(marks, { strokeStyle: "#e6007a", lineWidth: Math.max(1, width / 128) });
    for (const [x0, y0, x1, y1] of boxes) marks.strokeRect(x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height);
    for (const [x, y] of points) { marks.beginPath(); marks.arc(x * width, y * height, width / 40, 0, 7); marks.stroke(); }
  }
  end() {  // of an answer that was stopped: what has come can be heard
    for (const held of this.segments.values()) if (held.audio && !held.audio.ended) held.audio.end();
  }
  async take(delta) {
    if (!delta.content && !delta.parts && !delta.audio) return;
    const held = this.holder(delta.segment ?? 0);
    if (delta.content) {
      held.text ??= held.node.appendChild(element("p"));
      held.text.textContent += delta.content;
    }
    for (const part of delta.parts ?? []) {
      if (part.boxes || part.points) { await this.mark(part, held.node); continue; }
      if (part.video_url) {
        held.video ??= held.node.appendChild(element("img", { className: "video", alt: "generated video" }));
        held.video.src = part.video_url.url;
        if (part.done) held.node.append(element("a", { href: part.video_url.url, download: "unitok.gif", textContent: "Download video" }));
        continue;
      }
      const image = new Image();
      image.src = part.image_url.url;
      await image.decode();
      held.canvas ??= held.node.appendChild(element("canvas", { width: image.width, height: image.width, role: "img", ariaLabel: "generated image" }));
      if (part.done || image.height > held.canvas.height) held.canvas.height = image.height;
      held.canvas.getContext("2d").drawImage(image, 0, 0);
      held.canvas.dataset.rows = image.height;
      if (part.done) {
        held.canvas.dataset.done = "yes";
        held.node.append(element("a", { href: part.image_url.url, download: "unitok.png", textContent: "Download image" }));
      }
    }
    if (delta.audio) {
      held.audio ??= new AudioOutput(held.node, delta.audio.sample_rate, this.index === 0);
      if (delta.audio.data) held.audio.push(delta.audio.data, delta.audio.channels);
      if (delta.audio.done) held.audio.end();
    }
  }
}

async function generate(content, modalities, given) {
  const chat = mode() === "chat", mine = talk;
  if (chat) given = { ...given, n: 1 };  // a conversation goes on with one answer
  const request = [...(chat ? messages : []), { role: "user", content }];
  $("examples").open = false;
  if (!chat) $("results").replaceChildren();
  $("results").append(promptCard(content));
  const body = { model: about.model, messages: request, roles: chat, stream: true, stream_options: { include_usage: true }, ...given };
  if (modalities.length) body.modalities = modalities;
  const turn = element("article", { className: "turn" });
  const stats = element("span", { className: "stats", textContent: "…" });
  const holder = element("div", { className: "outputs" });
  turn.append(holder, stats);
  $("results").append(turn);
  turn.scrollIntoView({ block: "end", behavior: "smooth" });
  running = new AbortController();
  busy(true);
  const began = performance.now();
  let first = 0, usage = null, said = null;
  const cards = new Map();
  try {
    const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal });
    if (!response.ok) throw new Error((await response.json()).error?.message ?? response.statusText);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) usage = event.usage;
      for (const choice of event.choices) {
        if (choice.message && choice.index === 0) said = choice.message;
        if (!cards.has(choice.index)) { cards.set(choice.index, new OutputCard(choice.index, content.findLast((part) => part.image_url)?.image_url.url)); holder.append(cards.get(choice.index).node); }
        const { delta } = choice;
        if (!first && (delta.content || delta.parts || delta.audio)) { first = performance.now() - began; stats.textContent = `first after ${first.toFixed(0)} ms …`; }
        await cards.get(choice.index).take(delta);
      }
    }
    const seconds = (performance.now() - began) / 1000;
    stats.textContent = `first after ${first.toFixed(0)} ms · ${seconds.toFixed(1)} s · ${((usage?.completion_tokens ?? 0) / seconds).toFixed(0)} tokens per second · seed ${given.seed}`;
    turn.dataset.done = "yes";
    if (chat && said && talk === mine) messages = [...request, said];
  } catch (error) {
    stats.textContent = error.name === "AbortError" ? "stopped" : "failed";
    if (error.name !== "AbortError") fail(error.message);
    for (const card of cards.values()) card.end();
  } finally {
    running = null;
    busy(false);
  }
  const again = element("button", { type: "button", textContent: "Again with another seed", onclick: () => {
    if (running) return;
    if (chat) {
      messages = request.slice(0, -1);
      while (turn.nextElementSibling) turn.nextElementSibling.remove();
      turn.previousElementSibling.remove();
      turn.remove();
    }
    generate(content, modalities, { ...given, seed: Math.floor(Math.random() * 2 ** 31) });
  } });
  turn.append(element("div", { className: "actions" }, again));
}

async function fill(part, prompt, given) {  // make the hole of an image anew
  $("examples").open = false;
  $("results").replaceChildren(promptCard([{ type: "image_url", image_url: { url: part.url } }, { type: "text", text: prompt }]));
  const turn = element("article", { className: "turn" }), holder = element("div", { className: "outputs" });
  const stats = element("span", { className: "stats", textContent: "…" });
  turn.append(holder, stats);
  $("results").append(turn);
  const form = new FormData(), began = performance.now();
  for (const [name, url] of [["image", part.url], ["mask", part.mask]]) form.append(name, new Blob([bytesOf(url.split(",")[1])]), `${name}.png`);
  for (const [name, value] of [["prompt", prompt], ["n", given.n], ["seed", given.seed]]) form.append(name, value);
  running = new AbortController();
  busy(true);
  try {
    const { Authorization } = headers();
    const response = await fetch("v1/images/edits", { method: "POST", headers: Authorization ? { Authorization } : {}, body: form, signal: running.signal });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error?.message ?? response.statusText);
    for (const [index, { b64_json }] of answer.data.entries()) {
      const card = new OutputCard(index);
      holder.append(card.node);
      await card.take({ parts: [{ image_url: { url: `data:image/png;base64,${b64_json}` }, done: true }] });
    }
    stats.textContent = `${((performance.now() - began) / 1000).toFixed(1)} s · seed ${given.seed}`;
    turn.dataset.done = "yes";
  } catch (error) {
    stats.textContent = error.name === "AbortError" ? "stopped" : "failed";
    if (error.name !== "AbortError") fail(error.message);
  } finally {
    running = null;
    busy(false);
  }
}

function promptCard(content) {
  const card = element("article", { className: "turn user" });
  for (const part of content) {
    if (part.type === "text") card.append(element("p", { textContent: part.text }));
    else {
      const kind = part.type.replace("_url", "");
      card.append(mediaElement(kind, part[part.type].url, "image of the prompt"));
    }
  }
  return card;
}

function busy(now) { $("go").hidden = now; $("stop").hidden = !now; }
$("stop").onclick = () => running?.abort();

function chooseModalities() {  // at first an image; in a conversation what the model finds right
  for (const box of document.querySelectorAll("#modalities input")) box.checked = mode() === "single" && about.modalities[box.value] === "image";
}
const chosen = () => [...document.querySelectorAll("#modalities input:checked")].map((box) => box.value);
$("composer").onsubmit = (event) => {
  event.preventDefault();
  if (running) return;
  const holed = parts.find((part) => part.mask), text = $("text").value.trim();
  if (holed) {
    parts.length = 0;
    showParts();
    return void fill(holed, text, settings());
  }
  const content = parts.map(({ kind, url }) => ({ type: `${kind}_url`, [`${kind}_url`]: { url } }));
  if (text) content.push({ type: "text", text });
  if (!content.length) return fail("Write something, or attach an image, audio or a video.");
  parts.length = 0;
  showParts();
  if (mode() === "chat") $("text").value = "";
  generate(content, chosen(), settings());
};
$("text").onkeydown = (event) => { if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("composer").requestSubmit(); } };
for (const radio of document.querySelectorAll('input[name="mode"]')) radio.onchange = () => {
  running?.abort();
  talk += 1;
  messages = [];
  $("results").replaceChildren();
  chooseModalities();
};

function exampleButton({ prompt, modalities, image, mask }) {  // image, mask: data URLs; mask: what of the image is made anew
  const pictures = [image, mask].filter(Boolean).map((src) => element("img", { src, alt: src === mask ? "what is made anew" : "image of the prompt" }));
  const what = mask ? "a part of the image" : modalities.join(", ");
  return element("button", { type: "button", onclick: () => {
    if (running) return;
    $("text").value = prompt.trim();
    for (const box of document.querySelectorAll("#modalities input")) box.checked = modalities.includes(box.value);
    if (mask) return void fill({ url: image, mask }, prompt, settings());
    const content = image ? [{ type: "image_url", image_url: { url: image } }] : [];
    if (prompt) content.push({ type: "text", text: prompt });
    generate(content, modalities, settings());
  } }, ...pictures, element("span", {}, prompt, element("small", { textContent: `→ ${what}` })));
}

// ---- The beginning --------------------------------------------------------------------------------------------------

async function begin() {
  about = await (await fetch("about")).json();
  $("about").textContent = `${about.model} · ${Object.keys(about.modalities).join(", ")}`;
  document.querySelector('input[value="chat"]').disabled = !about.can_chat;
  for (const name of Object.keys(about.modalities)) {
    const box = element("input", { type: "checkbox", value: name });
    $("modalities").append(element("label", {}, box, element("span", { textContent: name })));
  }
  chooseModalities();
  $("text").value = about.examples[0]?.prompt ?? "";
  $("gallery").append(...about.examples.map(exampleButton));
  document.body.dataset.ready = "yes";
}
defaults();
begin().catch(() => fail("The server does not answer."));
