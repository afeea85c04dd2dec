
"use strict";
const MAX_LISTED = 50; // clips at one place
const SHORT = 80; // characters of a value in the tip
const PLACES = 65535; // steps of the map's longer side
const NEAREST = 10; // in the map, where there are no neighbours by embedding
const RATE = 16000, WINDOW = 512, HOP = 160, BANDS = 80, RANGE_DB = 70; // of the spectrogram

const get = (id) => document.getElementById(id);
const player = get("player"), now = get("now"), canvas = get("points"), tip = get("tip");
let data, audio, places, codes, order; // order: the rows in random order, so that no colour is always on top
let hidden; // of each colour
let visible, matches = null, marked = new Uint32Array(0); // rows: drawn; found, or null; found and drawn
let turn = -1; // which of the matches was chosen last
let chosen = null, near = [];
let view = { x: 0.5, y: 0.5, zoom: 1 }, extent;
let paint; // draws the map
let asked = false;

// Data

function bytesOf(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}
const array = (kind, text) => new kind(bytesOf(text).buffer); // little-endian, as every browser's machine is

async function load() {
  const stream = new Blob([bytesOf(get("data").textContent)]).stream().pipeThrough(new DecompressionStream("gzip"));
  data = JSON.parse(await new Response(stream).text());
  audio = JSON.parse(get("audio").textContent);
  places = array(Uint16Array, data.places);
  codes = array(Uint8Array, data.color.codes);
  for (const column of data.columns) {
    const kind = { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array }[column.bytes];
    column.codes = column.codes && array(kind, column.codes);
    column.lower = null; // made by the first search
  }
  if (data.neighbors) {
    data.neighbors.rows = array(Int32Array, data.neighbors.rows);
    data.neighbors.similarity = array(Float32Array, data.neighbors.similarity);
  }
  order = shuffled(data.count);
  hidden = new Uint8Array(data.color.palette.length);
  extent = [0, 1].map((axis) => {
    let low = PLACES, high = 0;
    for (let i = axis; i < places.length; i += 2) {
      if (places[i] < low) low = places[i];
      if (places[i] > high) high = places[i];
    }
    return Math.max(high - low, 1) / PLACES;
  });
}

function shuffled(count) {
  const rows = new Uint32Array(count);
  let state = 1;
  for (let i = 0; i < count; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0; // the same at each opening
    const j = Math.floor((state / 4294967296) * (i + 1));
    rows[i] = rows[j];
    rows[j] = i;
  }
  return rows;
}

const value = (column, row) => column.values[column.codes ? column.codes[row] : row]; // undefined: none
const nameOf = (row) => value(data.columns[0], row);
const short = (text) => (text.length > SHORT ? text.slice(0, SHORT - 1) + "\u2026" : text);
const number = (count) => count.toLocaleString("en");

// The map: places are from 0 to 1, and the view's centre too

const scale = () =>
  0.92 * view.zoom * Math.min(canvas.clientWidth / extent[0], canvas.clientHeight / extent[1]); // pixels per 1

function toScreen(row) {
  const k = scale();
  return [
    canvas.clientWidth / 2 + (places[2 * row] / PLACES - view.x) * k,
    canvas.clientHeight / 2 - (places[2 * row + 1] / PLACES - view.y) * k,
  ];
}

const pointSize = () =>
  Math.max(1.5, Math.min(8, 240 / Math.sqrt(data.count))) * Math.min(3, Math.max(1, view.zoom) ** 0.35); // pixels
const opacity = () => (data.count > 100000 ? 0.55 : 0.85);

function draw() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(drawNow);
}

function drawNow() {
  asked = false;
  const size = pointSize();
  const passes = [{ rows: "visible", size, alpha: matches ? 0.12 * opacity() : opacity() }];
  if (matches) passes.push({ rows: "marked", size: Math.max(size * 1.3, 5), alpha: 1 });
  if (near.length) passes.push({ rows: "near", size: Math.max(size * 1.2, 7), alpha: 1, ring: 0.5 });
  if (chosen !== null) passes.push({ rows: "chosen", size: Math.max(size * 1.8, 13), alpha: 1, ring: 1 });
  paint(passes);
}

const rowsOf = (which) =>
  ({ visible, marked, near: Uint32Array.from(near), chosen: Uint32Array.of(chosen) })[which];

const VERTEX = `#version 300 es
layout(location = 0) in vec2 place;
layout(location = 1) in uint code;
uniform sampler2D palette;
uniform vec2 center, scale;
uniform float size;
out vec3 color;
void main() {
  gl_Position = vec4((place - center) * scale, 0.0, 1.0);
  gl_PointSize = size;
  color = texelFetch(palette, ivec2(int(code), 0), 0).rgb;
}`;
const FRAGMENT = `#version 300 es
precision highp float;
in vec3 color;
uniform float alpha, ring, size;
out vec4 result;
void main() {
  float radius = length(gl_PointCoord - 0.5) * size; // pixels
  float inside = clamp(0.5 * size - radius, 0.0, 1.0) * alpha;
  float edge = ring * step(0.5 * size - 2.5, radius);
  result = vec4(mix(color, vec3(0.11, 0.14, 0.19), edge), 1.0) * inside;
}`;

function withWebgl(gl) {
  const program = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
  gl.useProgram(program);
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ARRAY_BUFFER, places, gl.STATIC_DRAW);
  gl.vertexAttribPointer(0, 2, gl.UNSIGNED_SHORT, true, 0, 0);
  gl.enableVertexAttribArray(0);
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ARRAY_BUFFER, codes, gl.STATIC_DRAW);
  gl.vertexAttribIPointer(1, 1, gl.UNSIGNED_BYTE, 0, 0);
  gl.enableVertexAttribArray(1);
  const colors = new Uint8Array(data.color.palette.flatMap((hex) => [...rgb(hex), 255]));
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, colors.length / 4, 1, 0, gl.RGBA, gl.UNSIGNED_BYTE, colors);
  gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
  gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  gl.clearColor(1, 1, 1, 1);
  const uniform = (name) => gl.getUniformLocation(program, name);
  const at = Object.fromEntries(["center", "scale", "size", "alpha", "ring"].map((name) => [name, uniform(name)]));
  const held = {}; // index buffers: one a kind of rows, filled again when these are others
  return (passes) => {
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.clear(gl.COLOR_BUFFER_BIT);
    const k = scale();
    gl.uniform2f(at.center, view.x, view.y);
    gl.uniform2f(at.scale, (2 * k) / canvas.clientWidth, (2 * k) / canvas.clientHeight);
    for (const pass of passes) {
      const rows = rowsOf(pass.rows);
      const index = (held[pass.rows] ??= { buffer: gl.createBuffer(), rows: null });
      gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, index.buffer);
      if (index.rows !== rows) gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, rows, gl.DYNAMIC_DRAW);
      index.rows = rows;
      gl.uniform1f(at.size, pass.size * devicePixelRatio);
      gl.uniform1f(at.alpha, pass.alpha);
      gl.uniform1f(at.ring, pass.ring ?? 0);
      gl.drawElements(gl.POINTS, rows.length, gl.UNSIGNED_INT, 0);
    }
  };
}

// For browsers without WebGL 2: slow with a million points.
function withoutWebgl(context) {
  return (passes) => {
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    context.fillStyle = "#fff";
    context.fillRect(0, 0, canvas.clientWidth, canvas.clientHeight);
    for (const pass of passes) {
      context.globalAlpha = pass.alpha;
      context.strokeStyle = "#1d2330";
      context.lineWidth = 2;
      for (const row of rowsOf(pass.rows)) {
        context.fillStyle = data.color.palette[codes[row]];
        context.beginPath();
        context.arc(...toScreen(row), pass.size / 2, 0, 2 * Math.PI);
        context.fill();
        if (pass.ring) context.stroke();
      }
    }
  };
}

const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

function startDrawing() {
  const gl = canvas.getContext("webgl2", { alpha: false });
  paint = gl ? withWebgl(gl) : withoutWebgl(canvas.getContext("2d"));
  // Telephones take the context from pages in the background.
  canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
  canvas.addEventListener("webglcontextrestored", () => { paint = withWebgl(gl); draw(); });
  new ResizeObserver(() => {
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * devicePixelRatio));
    canvas.height = Math.max(1, Math.round(canvas.clientHeight * devicePixelRatio));
    drawNow(); // a canvas of a new size is empty
  }).observe(canvas);
}

// Which rows are drawn

function choose(rows) { // those of a colour that is not hidden, in the order of drawing
  return rows.filter((row) => !hidden[codes[row]]);
}

function changed() {
  visible = hidden.some(Boolean) ? choose(order) : order;
  marked = matches ? choose(matches) : new Uint32Array(0);
  draw();
}

// The rows nearest to a place, closest first, within a radius: [row, ...].
function closest(x, y, radius, count, without = -1) {
  const rows = [], distances = [];
  let limit = radius * radius;
  for (let i = 0; i < data.count; i++) {
    const dx = places[2 * i] - x, dy = places[2 * i + 1] - y;
    const distance = dx * dx + dy * dy;
    if (distance > limit || i === without || hidden[codes[i]]) continue;
    let at = rows.length;
    while (at > 0 && distances[at - 1] > distance) at--;
    if (at >= count) continue;
    rows.splice(at, 0, i);
    distances.splice(at, 0, distance);
    if (rows.length > count) {
      rows.pop();
      distances.pop();
    }
    if (rows.length === count) limit = distances[count - 1];
  }
  return rows;
}

function under(x, y, radius) { // the row at a place of the screen, or null
  const k = scale() / PLACES;
  const found = closest(
    view.x * PLACES + (x - canvas.clientWidth / 2) / k,
    view.y * PLACES - (y - canvas.clientHeight / 2) / k,
    (radius + pointSize() / 2) / k,
    1
  );
  return found.length ? found[0] : null;
}

function sharing(row) { // rows whose points cover a row's point, itself first, and how many there are
  const radius = (pointSize() / 2) / (scale() / PLACES);
  const x = places[2 * row], y = places[2 * row + 1];
  let count = 0;
  for (let i = 0; i < data.count; i++) {
    const dx = places[2 * i] - x, dy = places[2 * i + 1] - y;
    if (dx * dx + dy * dy <= radius * radius && !hidden[codes[i]]) count++;
  }
  return { rows: [row, ...closest(x, y, radius, MAX_LISTED - 1, row)], count };
}

// The view

function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
  const before = scale();
  view.zoom = Math.min(2000, Math.max(0.5, view.zoom * factor));
  const moved = 1 / before - 1 / scale();
  view.x += (x - canvas.clientWidth / 2) * moved;
  view.y -= (y - canvas.clientHeight / 2) * moved;
  tip.hidden = true;
  draw();
}

function pan(dx, dy) {
  view.x -= dx / scale();
  view.y += dy / scale();
  tip.hidden = true;
  draw();
}

function show(row) { // bring a row onto the screen
  const [x, y] = toScreen(row);
  if (x < 10 || y < 10 || x > canvas.clientWidth - 10 || y > canvas.clientHeight - 10) {
    view.x = places[2 * row] / PLACES;
    view.y = places[2 * row + 1] / PLACES;
  }
  draw();
}

// A clip

const element = (kind, ...content) => {
  const made = document.createElement(kind);
  made.append(...content); // texts stay texts
  return made;
};

const described = (row) =>
  data.columns.slice(1).map((column) => [column.name, value(column, row)]).filter(([, text]) => text !== undefined);

function list(id, title, rows, notes = []) {
  get(id).hidden = !rows.length;
  get(id).querySelector("h2").textContent = title;
  get(id).querySelector("ol").replaceChildren(
    ...rows.map((row, i) => {
      const button = element("button", element("span", nameOf(row) + (row in audio ? " \u266a" : "")));
      if (notes[i]) button.append(element("small", notes[i]));
      button.type = "button";
      button.addEventListener("click", () => { open(row); show(row); });
      return element("li", button);
    })
  );
}

function neighbors(row) {
  const found = data.neighbors;
  if (!found) {
    near = closest(places[2 * row], places[2 * row + 1], 2 * PLACES, NEAREST, row);
    const why = `over ${number(data.maxSearched)} clips, embeddings are not compared`;
    list("near", `Nearest in the map (${why})`, near);
    return;
  }
  const at = Array.from({ length: found.each }, (_, i) => row * found.each + i).filter((i) => found.rows[i] >= 0);
  near = at.map((i) => found.rows[i]);
  list("near", "Most similar, by cosine of the embeddings", near, at.map((i) => found.similarity[i].toFixed(3)));
}

const say = (state) => { now.textContent = state + ": " + nameOf(chosen); };

function open(row) { // describe a clip and play it; stop it where it plays
  if (row === chosen && !player.paused) {
    player.pause();
    return;
  }
  if (row !== chosen) describe(row);
  draw();
  player.pause();
  if (!(row in audio)) {
    now.textContent = "No sound of " + nameOf(row) + ": " + (data.silent[row] ?? data.silentElse);
    return;
  }
  player.src = "data:audio/mpeg;base64," + audio[row];
  player.play().catch((error) => {
    if (error.name !== "AbortError") now.textContent = "Cannot play: " + error.message; // abort: another was chosen
  });
}

function describe(row) {
  chosen = row;
  get("clip").replaceChildren(
    ...described(row).flatMap(([name, text]) => [element("dt", name), element("dd", text)])
  );
  const { rows, count } = sharing(row);
  const more = count > rows.length ? `, of which ${rows.length} are listed: zoom in` : "";
  list("here", `${number(count)} clips at this place${more}`, count > 1 ? rows : []);
  neighbors(row);
  get("panel").scrollTop = get("panel").parentElement.scrollTop = 0; // the latter scrolls on telephones
  get("sound").hidden = true;
  if (row in audio) drawSound(row);
}

// The spectrogram

async function drawSound(row) {
  let sound;
  try {
    const decoder = new OfflineAudioContext(1, 1, RATE);
    sound = await decoder.decodeAudioData(bytesOf(audio[row]).buffer);
  } catch {
    return; // the player says why
  }
  if (row !== chosen) return;
  const levels = logMel(sound.getChannelData(0));
  const frames = levels.length / BANDS;
  const target = get("spectrogram"), context = target.getContext("2d");
  target.width = frames;
  target.height = BANDS;
  const image = context.createImageData(frames, BANDS);
  const colors = data.spectrum.map(rgb);
  let loudest = -Infinity;
  for (const level of levels) loudest = Math.max(loudest, level);
  for (let t = 0; t < frames; t++) {
    for (let band = 0; band < BANDS; band++) {
      const level = Math.max(0, 1 + (levels[t * BANDS + band] - loudest) / RANGE_DB);
      image.data.set([...colors[Math.round(255 * level)], 255], 4 * ((BANDS - 1 - band) * frames + t));
    }
  }
  context.putImageData(image, 0, 0);
  get("seconds").textContent = sound.duration.toFixed(1) + " s";
  get("sound").hidden = false;
}

function logMel(samples) { // decibels, [frames * BANDS]
  const frames = 1 + Math.max(0, Math.floor((samples.length - WINDOW) / HOP));
  const filters = melFilters();
  const hann = Float64Array.from({ length: WINDOW }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / WINDOW));
  const real = new Float64Array(WINDOW), imaginary = new Float64Array(WINDOW);
  const levels = new Float32Array(frames * BANDS);
  for (let t = 0; t < frames; t++) {
    for (let i = 0; i < WINDOW; i++) real[i] = hann[i] * (samples[t * HOP + i] ?? 0);
    imaginary.fill(0);
    fourier(real, imaginary);
    filters.forEach(([first, weights], band) => {
      let power = 1e-10; // of silence: the logarithm is finite
      weights.forEach((weight, i) => { power += weight * (real[first + i] ** 2 + imaginary[first + i] ** 2); });
      levels[t * BANDS + band] = 10 * Math.log10(power);
    });
  }
  return levels;
}

function melFilters() { // triangles, evenly spaced in mel: [first bin, weights] of each band
  const mel = (hertz) => 2595 * Math.log10(1 + hertz / 700), hertz = (mels) => 700 * (10 ** (mels / 2595) - 1);
  const edge = (i) => (hertz((i * mel(RATE / 2)) / (BANDS + 1)) * WINDOW) / RATE; // bins
  return Array.from({ length: BANDS }, (_, band) => {
    const middle = edge(band + 1);
    const low = Math.min(edge(band), middle - 1), high = Math.max(edge(band + 2), middle + 1); // a bin at least
    const first = Math.max(0, Math.ceil(low)), last = Math.min(WINDOW / 2, Math.floor(high));
    const weights = Array.from({ length: last - first + 1 }, (_, i) =>
      Math.max(0, Math.min((first + i - low) / (middle - low), (high - first - i) / (high - middle)))
    );
    return [first, weights];
  });
}

function fourier(real, imaginary) { // in place; the length is a power of two
  const n = real.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) {
      [real[i], real[j]] = [real[j], real[i]];
      [imaginary[i], imaginary[j]] = [imaginary[j], imaginary[i]];
    }
  }
  for (let half = 1; half < n; half *= 2) {
    for (let k = 0; k < half; k++) {
      const c = Math.cos((Math.PI * k) / half), s = -Math.sin((Math.PI * k) / half);
      for (let i = k; i < n; i += 2 * half) {
        const j = i + half;
        const re = real[j] * c - imaginary[j] * s, im = real[j] * s + imaginary[j] * c;
        real[j] = real[i] - re;
        imaginary[j] = imaginary[i] - im;
        real[i] += re;
        imaginary[i] += im;
      }
    }
  }
}

function moveHead() {
  get("head").style.left = (100 * player.currentTime) / (player.duration || 1) + "%";
  if (!player.paused) requestAnimationFrame(moveHead);
}

// The search

function search(text) {
  const wanted = text.trim().toLowerCase();
  turn = -1;
  if (!wanted) {
    matches = null;
    get("count").textContent = "";
    changed();
    return;
  }
  const hits = new Uint8Array(data.count);
  for (const column of data.columns) {
    column.lower ??= column.values.map((text) => text.toLowerCase());
    const found = Uint8Array.from(column.lower, (text) => (text.includes(wanted) ? 1 : 0));
    if (!found.includes(1)) continue;
    for (let i = 0; i < data.count; i++) hits[i] |= column.codes ? found[column.codes[i]] : found[i];
  }
  let count = 0;
  for (const hit of hits) count += hit;
  matches = new Uint32Array(count);
  for (let i = 0, at = 0; i < data.count; i++) if (hits[i]) matches[at++] = i;
  changed();
  sayMatches();
}

function sayMatches() {
  const unseen = matches.length - marked.length;
  get("count").textContent =
    `${number(matches.length)} of ${number(data.count)} clips match` +
    (turn < 0 ? "" : `; chosen: ${number(turn + 1)}`) +
    (unseen ? `, ${number(unseen)} of them hidden` : "");
}

function next(step) {
  if (!matches || !matches.length) return;
  turn = turn < 0 && step < 0 ? matches.length - 1 : (turn + step + matches.length) % matches.length;
  player.pause(); // not: stop it where it plays
  open(matches[turn]);
  show(matches[turn]);
  sayMatches();
}

function startSearch() {
  const query = get("query");
  let timer = null, searched = "";
  const update = () => {
    clearTimeout(timer);
    timer = null;
    if (query.value === searched) return;
    searched = query.value;
    search(searched);
  };
  query.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(update, 150); });
  let back = false;
  query.addEventListener("keydown", (event) => { back = event.key === "Enter" && event.shiftKey; });
  get("search").addEventListener("submit", (event) => {
    event.preventDefault();
    update();
    next(back ? -1 : 1);
    back = false;
  });
}

// The legend

function startLegend() {
  const color = data.color;
  const legend = get("legend"), items = legend.querySelector("ul");
  legend.querySelector("summary").textContent = color.column;
  legend.open = !matchMedia("(max-width: 760px)").matches;
  const counts = new Uint32Array(color.palette.length);
  for (const code of codes) counts[code]++;
  if (color.range) {
    const texts = color.range.map((end) => element("span", String(+end.toPrecision(5))));
    const bar = element("div"), ends = element("div", ...texts);
    bar.id = "scale";
    bar.style.background = `linear-gradient(to right, ${color.palette.slice(0, -1).join(", ")})`;
    ends.style.cssText = "display: flex; justify-content: space-between";
    items.before(bar, ends);
  }
  const none = color.palette.length - 1;
  const named = color.names.map((name, code) => [name, code]);
  if (color.none) named.push([color.none, none]);
  const buttons = named.map(([name, code]) => {
    const swatch = element("i"), count = element("small", number(counts[code]));
    const button = element("button", swatch, element("span", name), count);
    swatch.style.background = color.palette[code];
    button.type = "button";
    button.title = "Hide or show; double click: show alone, or all again";
    button.addEventListener("click", () => set((other) => (other === code ? !hidden[other] : hidden[other])));
    button.addEventListener("dblclick", () => {
      const alone = hidden.every((is, other) => is || other === code);
      set((other) => !alone && other !== code);
    });
    items.append(element("li", button));
    return [button, code];
  });
  const set = (isHidden) => {
    hidden = hidden.map((_, code) => (isHidden(code) ? 1 : 0));
    for (const [button, code] of buttons) button.setAttribute("aria-pressed", String(!hidden[code]));
    changed();
    if (matches) sayMatches();
  };
  set(() => false);
}

// The pointer

function startPointer() {
  const down = new Map(); // pointers on the map
  let moved = 0, gesture = false;
  const position = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    if (!down.size) [moved, gesture] = [0, false];
    down.set(event.pointerId, position(event));
    if (down.size > 1) gesture = true;
  });
  let hovered = null;
  canvas.addEventListener("pointermove", (event) => {
    const at = position(event), before = down.get(event.pointerId);
    if (!before) {
      if (event.pointerType !== "mouse") return;
      if (!hovered) requestAnimationFrame(() => { point(...hovered); hovered = null; });
      hovered = at;
      return;
    }
    const [dx, dy] = [at[0] - before[0], at[1] - before[1]];
    moved += Math.hypot(dx, dy);
    if (down.size === 1 && (moved > 5 || gesture)) pan(dx, dy);
    if (down.size === 2) {
      const other = [...down].find(([id]) => id !== event.pointerId)[1];
      const apart = (a) => Math.hypot(a[0] - other[0], a[1] - other[1]);
      pan(dx / 2, dy / 2);
      zoom(Math.max(apart(at), 1) / Math.max(apart(before), 1), (at[0] + other[0]) / 2, (at[1] + other[1]) / 2);
    }
    if (down.size > 1 || moved > 5 || gesture) down.set(event.pointerId, at);
  });
  const up = (event) => {
    const at = down.get(event.pointerId);
    down.delete(event.pointerId);
    if (!at || down.size || gesture || moved > 5 || event.type === "pointercancel") return;
    const row = under(...at, event.pointerType === "mouse" ? 4 : 16); // a finger is less precise
    if (row !== null) open(row);
  };
  canvas.addEventListener("pointerup", up);
  canvas.addEventListener("pointercancel", up);
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-0.0015 * event.deltaY * (event.deltaMode ? 16 : 1)), ...position(event));
  }, { passive: false });
}

function point(x, y) { // show what is under the mouse
  const row = under(x, y, 4);
  tip.hidden = row === null;
  canvas.style.cursor = row === null ? "crosshair" : "pointer";
  if (row === null) return;
  const others = sharing(row).count - 1;
  tip.textContent = [
    short(nameOf(row)),
    ...described(row).map(([name, text]) => name + ": " + short(text)),
    ...(others ? [`and ${number(others)} more here`] : []),
  ].join("\n");
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  tip.style.left = Math.max(0, Math.min(x + 12, width - tip.offsetWidth - 4)) + "px";
  tip.style.top = Math.max(0, y + 12 + tip.offsetHeight > height ? y - 12 - tip.offsetHeight : y + 12) + "px";
}

// The buttons, the player

function save() {
  drawNow(); // what was drawn lasts until the next frame
  canvas.toBlob((blob) => {
    const link = element("a");
    link.href = URL.createObjectURL(blob);
    link.download = "map.png";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
}

function startControls() {
  get("in").addEventListener("click", () => zoom(1.6));
  get("out").addEventListener("click", () => zoom(1 / 1.6));
  get("reset").addEventListener("click", () => { view = { x: 0.5, y: 0.5, zoom: 1 }; draw(); });
  get("save").addEventListener("click", save);
  player.addEventListener("playing", () => { say("Playing"); moveHead(); });
  player.addEventListener("pause", () => { if (chosen !== null && chosen in audio) say("Stopped"); });
  player.addEventListener("ended", () => say("Played"));
}

load().then(() => {
  visible = order;
  startDrawing();
  startLegend();
  startSearch();
  startPointer();
  startControls();
  now.textContent = "Click a point to play its clip.";
  document.body.dataset.ready = "true";
}).catch((error) => { now.textContent = "This page cannot be shown: " + error.message; throw error; });
