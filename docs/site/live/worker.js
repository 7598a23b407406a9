// Runs the network: one image at a time, from a bitmap to a label map.

import { resizeToRgb, upsampleArgmax } from "./image.js";

const RUNTIMES = { // module and WebAssembly of ONNX Runtime Web
  wasm: ["ort.wasm.min.mjs", "ort-wasm-simd-threaded"],
  webgpu: ["ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify"],
  jspi: ["ort.jspi.min.mjs", "ort-wasm-simd-threaded.jspi"],
};
const canvas = new OffscreenCanvas(1, 1);
const context = canvas.getContext("2d", { alpha: false, willReadFrequently: true });
let ort, session, model;

async function open({ bytes, info, engine, threads }) {
  const webgpu = engine === "webgpu";
  const [module, wasm] = RUNTIMES[webgpu ? ("Suspending" in WebAssembly ? "jspi" : "webgpu") : "wasm"];
  const folder = new URL("runtime/", import.meta.url);
  ort = await import(new URL(module, folder));
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = webgpu ? 1 : threads;
  ort.env.wasm.wasmPaths = { mjs: new URL(`${wasm}.mjs`, folder).href, wasm: new URL(`${wasm}.wasm`, folder).href };
  session = await ort.InferenceSession.create(bytes, { executionProviders: [webgpu ? "webgpu" : "wasm"], logSeverityLevel: 3 });
  model = info;
  const [height, width] = model.size;
  const logits = await forward(new Uint8Array(height * width * 3)); // prepares kernels and memory
  if (logits.dims[1] !== model.classes.length + 1) throw new Error("its outputs are not its classes and void");
  return {};
}

async function forward(pixels) {
  const image = new ort.Tensor("uint8", pixels, [1, ...model.size, 3]);
  const { [model.output]: logits } = await session.run({ [model.input]: image });
  const data = await logits.getData();
  const dims = logits.dims;
  logits.dispose();
  return { data, dims };
}

async function predict({ bitmap }) {
  const start = performance.now();
  const { width, height } = bitmap;
  Object.assign(canvas, { width, height });
  context.drawImage(bitmap, 0, 0);
  const rgba = context.getImageData(0, 0, width, height).data;
  const pixels = resizeToRgb(rgba, width, height, model.size[1], model.size[0]);
  const before = performance.now();
  const { data, dims } = await forward(pixels);
  const network = performance.now() - before;
  const labels = upsampleArgmax(data, dims.slice(1), model.size, [height, width]);
  const counts = new Array(dims[1]).fill(0);
  for (const label of labels) counts[label]++;
  return { bitmap, labels, width, height, counts, network, total: performance.now() - start };
}

onmessage = async ({ data }) => {
  try {
    const result = await (data.bitmap ? predict(data) : open(data));
    postMessage(result, result.labels ? [result.bitmap, result.labels.buffer] : []);
  } catch (error) {
    postMessage({ error: String(error.message ?? error) });
  }
};
