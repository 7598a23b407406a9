// A network in a worker, with the fastest engine that the browser has.

const cores = navigator.hardwareConcurrency || 1;
export const THREADS = Math.min(4, cores > 2 ? Math.ceil(cores / 2) : cores);
export const ENGINES = {
  webgpu: "WebGPU",
  threads: `WebAssembly, ${THREADS} threads`,
  single: "WebAssembly, 1 thread",
};

// Engines of this browser, fastest first. A software GPU is slower than WebAssembly.
export async function availableEngines() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const software = adapter?.info?.isFallbackAdapter ?? adapter?.isFallbackAdapter;
  const engines = crossOriginIsolated && THREADS > 1 ? ["threads", "single"] : ["single"];
  if (adapter) software ? engines.push("webgpu") : engines.unshift("webgpu");
  return engines;
}

export class Network {
  constructor(engine) {
    this.engine = engine;
    this.worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  }

  // Opens a checked file with the first of `engines` that can run it.
  static async open(bytes, info, engines, threads = THREADS) {
    let reason;
    for (const engine of engines) {
      const network = new Network(engine);
      try {
        await network.ask({ bytes, info, engine, threads: engine === "threads" ? threads : 1 });
        return Object.assign(network, { info });
      } catch (error) {
        network.close();
        reason = error;
      }
    }
    throw reason;
  }

  // Resolves to the label map of a bitmap, which comes back with it. One call at a time.
  run(bitmap) {
    return this.ask({ bitmap }, [bitmap]);
  }

  ask(message, transfer = []) {
    return new Promise((resolve, reject) => {
      this.worker.onmessage = ({ data }) => (data.error ? reject(new Error(data.error)) : resolve(data));
      this.worker.onerror = (event) => {
        event.preventDefault();
        reject(new Error(event.message || "the worker cannot be started"));
      };
      this.worker.postMessage(message, transfer);
    });
  }

  close() {
    this.worker.terminate();
  }
}
