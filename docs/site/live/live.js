// The page: weights and engines, images, videos and cameras, and the times of what is shown.

import { availableEngines, ENGINES, Network } from "./engine.js";
import { checkModel } from "./onnx.js";
import { encodeLabels } from "./png.js";
import { View } from "./view.js";

const MAX_SIDE = 4096; // pixels: larger images are reduced
const STREAM_SIDE = 960; // of a frame of a video or a camera
const SAMPLES = 3;
const RECENT = 30; // frames, for the rate and the median
const $ = (id) => document.getElementById(id);
const view = new View();
const video = $("video");
const state = {
  models: [],
  network: null,
  before: undefined, // weights to return to after a sample
  source: null, // { name, bitmap } of an image, { name, stream } of a video or a camera
  facing: "environment",
  opening: 0, // number of networks that were asked for: only the last one is kept
  busy: false,
  recent: [],
};

function say(text) {
  $("status").textContent = text;
}

function complain(error) {
  const sentence = error?.message ?? error ?? "";
  $("trouble").textContent = sentence.charAt(0).toUpperCase() + sentence.slice(1);
  $("trouble").hidden = !sentence;
}

// Runs a handler of an event; its error is shown.
function handle(handler) {
  return async (...args) => {
    complain("");
    try {
      await handler(...args);
    } catch (error) {
      say("");
      complain(error);
    }
  };
}

async function fetchFile(name) {
  const response = await fetch(name).catch(() => null);
  if (!response?.ok) throw new Error(`${name} is missing here: build the page with utils/serve.py`);
  return response;
}

// Weights and engine

async function readModel(entry) {
  entry.bytes ??= new Uint8Array(await (await fetchFile(entry.file)).arrayBuffer());
  entry.info ??= checkModel(entry.bytes, entry.name);
  return entry;
}

function about({ name, dataset, images, miou, scored, limits, terms, bytes }) {
  const score = miou ? `mIoU ${miou.toFixed(3)}${scored ? ` on ${scored} val images` : ""}.` : "";
  const megabytes = `${(bytes.length / 1e6).toFixed(1)} MB.`;
  return [`${name}, ${dataset ?? "own file"}${images ? `, ${images}` : ""}.`, score, limits, terms, megabytes].filter(Boolean).join(" ");
}

async function openNetwork() {
  const opening = ++state.opening;
  const entry = state.models[$("weights").value];
  say(`Loading ${entry.name} ...`);
  await readModel(entry);
  const choice = $("engine").value;
  const engines = choice === "auto" ? state.engines : [choice];
  let network;
  try {
    network = await Network.open(entry.bytes, entry.info, engines);
  } catch (error) {
    const advice = choice === "auto" ? "export the file again" : "choose another engine";
    throw new Error(`${entry.name} does not run here (${error.message}): ${advice}`);
  }
  if (opening !== state.opening) return network.close();
  state.network?.close();
  Object.assign(state, { network, busy: false, recent: [] });
  view.setClasses(entry.info.classes, entry.info.colors);
  view.sorted = false;
  $("about").textContent = about(entry);
  say(`${entry.name} is ready: ${ENGINES[network.engine]}.`);
  if (state.source?.bitmap) await showImage();
  else if (state.source && video.paused) await predict(await toBitmap(video, STREAM_SIDE));
  else if (!state.source) view.setEmpty(true); // what is shown has other classes
}

async function addOwnModel(file) {
  const entry = { name: file.name, bytes: new Uint8Array(await file.arrayBuffer()) };
  await readModel(entry);
  $("weights").add(new Option(entry.name, state.models.push(entry) - 1, false, true));
  state.before = undefined;
  await openNetwork();
}

// Samples are drawings, and are shown with the weights that were trained on drawings. Returns whether
// the weights, and with them what is shown, have changed.
async function matchWeights(drawn) {
  const chosen = Number($("weights").value);
  const wanted = drawn ? state.models.findIndex(({ dataset }) => dataset === "toy streets") : state.before;
  if (wanted === undefined || wanted < 0 || wanted === chosen) return false;
  state.before = drawn ? chosen : undefined;
  $("weights").value = wanted;
  await openNetwork();
  return true;
}

// Images, videos and cameras

function setSource(source) {
  say("");
  state.source?.bitmap?.close();
  state.source?.stream?.getTracks?.().forEach((track) => track.stop());
  if (video.src) URL.revokeObjectURL(video.src);
  video.pause();
  video.srcObject = null;
  video.removeAttribute("src");
  Object.assign(state, { source, recent: [] });
  view.sorted = false;
  const camera = Boolean(source?.stream?.getTracks);
  $("camera").textContent = camera ? "Stop camera" : "Camera";
  $("camera").setAttribute("aria-pressed", camera);
  $("facing").hidden = !camera;
  $("pause").hidden = !source?.stream;
  $("pause").textContent = "Pause";
  $("pause").setAttribute("aria-pressed", false);
}

async function toBitmap(image, maxSide) {
  const width = image.videoWidth ?? image.width;
  const height = image.videoHeight ?? image.height;
  const scale = Math.min(1, maxSide / Math.max(width, height));
  const smaller = scale < 1 && { resizeWidth: Math.round(scale * width), resizeHeight: Math.round(scale * height), resizeQuality: "medium" };
  return createImageBitmap(image, { ...smaller });
}

async function takeFile(file, drawn = false) {
  if (!file) return;
  if (file.name.toLowerCase().endsWith(".onnx")) return addOwnModel(file);
  if (file.type.startsWith("video/")) return takeVideo(file);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw new Error(`${file.name} is no image or video that this browser can read: give a JPEG, PNG or WebP file`);
  }
  setSource({ name: file.name, bitmap: Math.max(bitmap.width, bitmap.height) > MAX_SIDE ? await toBitmap(bitmap, MAX_SIDE) : bitmap });
  if (!(await matchWeights(drawn))) await showImage();
}

async function takeVideo(file) {
  await matchWeights(false);
  const source = { name: file.name, stream: true };
  setSource(source);
  video.src = URL.createObjectURL(file);
  try {
    await video.play();
  } catch {
    if (source !== state.source) return; // another one was chosen meanwhile
    setSource(null);
    throw new Error(`${file.name} is no video that this browser can play: give an MP4 or WebM file`);
  }
  nextFrame();
}

async function startCamera() {
  const wanted = { width: { ideal: 640 }, facingMode: state.facing };
  let stream;
  await matchWeights(false);
  try {
    setSource(null);
    stream = await navigator.mediaDevices.getUserMedia({ video: wanted });
  } catch (error) {
    throw new Error(`the browser gives no camera (${error.message}): connect or allow one`);
  }
  setSource({ name: "camera", stream });
  video.srcObject = stream;
  await video.play();
  nextFrame();
}

// Frames that arrive while the network is busy are dropped.
function nextFrame() {
  const { source } = state;
  if (!source?.stream) return;
  video.requestVideoFrameCallback(async () => {
    if (source !== state.source) return;
    nextFrame();
    if (!state.busy && state.network) await predict(await toBitmap(video, STREAM_SIDE)).catch(complain);
  });
}

async function showImage() {
  if (!state.network) return;
  const { source } = state;
  while (state.busy) await new Promise((done) => setTimeout(done, 20));
  if (source !== state.source) return;
  say(`Predicting ${source.name} ...`);
  await predict(await createImageBitmap(source.bitmap));
  say("");
}

async function predict(bitmap) {
  const { network, source } = state;
  state.busy = true;
  try {
    const result = await network.run(bitmap);
    if (network !== state.network || source !== state.source) return result.bitmap.close();
    view.show(result, Boolean(source.stream));
    showFacts(source, network, result);
  } finally {
    if (network === state.network) state.busy = false;
  }
}

function showFacts(source, network, { width, height, network: ms, total }) {
  state.recent = [...state.recent, { at: performance.now(), total }].slice(-RECENT);
  const { recent } = state;
  const span = recent.at(-1).at - recent[0].at;
  const median = recent.map((r) => r.total).sort((a, b) => a - b)[recent.length >> 1];
  const rate = span && source.stream ? (1000 * (recent.length - 1)) / span : null;
  const facts = [
    ["wide", source.stream?.getTracks ? "source" : "file", source.name],
    ["wide", "engine", ENGINES[network.engine]],
    [rate ? "" : "half", "network", `${ms.toFixed(0)} ms`],
    [rate ? "" : "half", "whole", `${total.toFixed(0)} ms`],
    ...(rate ? [["", `p50 of ${recent.length}`, `${median.toFixed(0)} ms`], ["", "FPS", rate.toFixed(1)]] : []),
    ["half", "image", `${width} × ${height}`],
    ["half", "network input", `${network.info.size[1]} × ${network.info.size[0]}`],
  ];
  $("facts").replaceChildren(
    ...facts.map(([kind, term, value]) => {
      const pair = document.createElement("div");
      pair.className = kind;
      pair.append(document.createElement("dt"), document.createElement("dd"));
      pair.firstChild.textContent = term;
      pair.lastChild.textContent = value;
      return pair;
    }),
  );
}

function save(blob, suffix) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = `${(state.source?.name ?? "image").replace(/\.\w+$/, "")}_${suffix}.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// Controls

function connect() {
  $("choose").onclick = $("invitation").onclick = () => $("file").click();
  $("own").onclick = () => $("model").click();
  for (const input of [$("file"), $("model")]) {
    input.onchange = handle(async () => {
      const [file] = input.files;
      input.value = ""; // the same file can be chosen again
      await takeFile(file);
    });
  }
  $("engine").onchange = handle(openNetwork);
  $("weights").onchange = handle(() => {
    state.before = undefined;
    return openNetwork();
  });
  $("camera").onclick = handle(() => (state.source?.stream?.getTracks ? setSource(null) : startCamera()));
  $("facing").onclick = handle(() => {
    state.facing = state.facing === "user" ? "environment" : "user";
    return startCamera();
  });
  $("pause").onclick = () => {
    video.paused ? video.play() : video.pause();
    $("pause").textContent = video.paused ? "Resume" : "Pause";
    $("pause").setAttribute("aria-pressed", video.paused);
    state.recent = [];
  };
  $("save-labels").onclick = handle(async () => {
    const { labels, width, height } = view.result;
    save(await encodeLabels(labels, width, height), "labels");
  });
  $("save-overlay").onclick = () => view.compose().toBlob((blob) => save(blob, "overlay"));
  addEventListener("dragover", (event) => {
    event.preventDefault();
    $("stage").classList.add("over");
  });
  addEventListener("dragleave", () => $("stage").classList.remove("over"));
  addEventListener("drop", handle(async (event) => {
    event.preventDefault();
    $("stage").classList.remove("over");
    await takeFile(event.dataTransfer.files[0]);
  }));
  addEventListener("paste", handle((event) => takeFile(event.clipboardData.files[0])));
  for (let number = 1; number <= SAMPLES; number++) {
    const button = document.createElement("button");
    button.type = "button";
    button.innerHTML = `<img src="sample-${number}.jpg" alt="Toy street ${number}" width="68" height="34">`;
    button.onclick = handle(async () => {
      const name = `sample-${number}.jpg`;
      await takeFile(new File([await (await fetchFile(name)).blob()], name, { type: "image/jpeg" }), true);
    });
    $("samples").append(button);
  }
}

// Threads need cross-origin isolation. A service worker adds its headers where the host does not.
async function isolate() {
  if (crossOriginIsolated || !navigator.serviceWorker || sessionStorage.isolated) return;
  sessionStorage.isolated = "tried";
  await navigator.serviceWorker.register("sw.js");
  await navigator.serviceWorker.ready;
  location.reload();
  await new Promise(() => {});
}

const start = handle(async () => {
  await isolate().catch(() => {}); // private windows have no service workers: one thread
  connect();
  state.models = await (await fetchFile("models.json")).json();
  state.models.forEach(({ bytes, ...entry }, index) => {
    state.models[index] = entry;
    $("weights").add(new Option(entry.name, index));
  });
  state.engines = await availableEngines();
  $("engine").add(new Option("Automatic", "auto"));
  for (const [engine, name] of Object.entries(ENGINES)) {
    $("engine").add(new Option(name, engine));
    $("engine").lastChild.disabled = !state.engines.includes(engine);
  }
  await openNetwork();
});
start();
