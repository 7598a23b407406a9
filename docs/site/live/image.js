// Pre- and postprocessing of lednet.Predictor: antialiased resize, and upsampling with argmax.

const BITS = 22; // of the fixed-point weights, as in Pillow

// First source pixel and fixed-point weights of each target pixel of a triangle filter.
function filter(from, to) {
  const scale = from / to;
  const support = Math.max(scale, 1);
  const starts = new Int32Array(to);
  const weights = [];
  for (let i = 0; i < to; i++) {
    const center = (i + 0.5) * scale;
    const start = Math.max(0, Math.floor(center - support + 0.5));
    const stop = Math.min(from, Math.floor(center + support + 0.5));
    const row = [];
    for (let x = start; x < stop; x++) row.push(Math.max(0, 1 - Math.abs(x - center + 0.5) / support));
    const sum = row.reduce((a, b) => a + b);
    starts[i] = start;
    weights.push(Int32Array.from(row, (w) => Math.round((w / sum) * 2 ** BITS)));
  }
  return { starts, weights };
}

const filters = new Map();
function cachedFilter(from, to) {
  const key = `${from} ${to}`;
  if (filters.size > 20) filters.clear();
  if (!filters.has(key)) filters.set(key, filter(from, to));
  return filters.get(key);
}

// RGBA (height, width, 4) to RGB (toHeight, toWidth, 3), all uint8.
export function resizeToRgb(rgba, width, height, toWidth, toHeight) {
  const half = 1 << (BITS - 1);
  const rows = new Uint8Array(height * toWidth * 3); // columns are done first
  const { starts, weights } = cachedFilter(width, toWidth);
  for (let y = 0, to = 0; y < height; y++) {
    for (let x = 0; x < toWidth; x++) {
      const row = weights[x];
      let r = half, g = half, b = half;
      for (let k = 0, at = (y * width + starts[x]) * 4; k < row.length; k++, at += 4) {
        r += rgba[at] * row[k];
        g += rgba[at + 1] * row[k];
        b += rgba[at + 2] * row[k];
      }
      rows[to++] = r >> BITS;
      rows[to++] = g >> BITS;
      rows[to++] = b >> BITS;
    }
  }
  if (height === toHeight) return rows;
  const output = new Uint8Array(toHeight * toWidth * 3);
  const vertical = cachedFilter(height, toHeight);
  const stride = toWidth * 3;
  const sums = new Int32Array(stride);
  for (let y = 0; y < toHeight; y++) {
    sums.fill(half);
    vertical.weights[y].forEach((weight, k) => {
      const from = (vertical.starts[y] + k) * stride;
      for (let i = 0; i < stride; i++) sums[i] += rows[from + i] * weight;
    });
    for (let i = 0; i < stride; i++) output[y * stride + i] = sums[i] >> BITS;
  }
  return output;
}

// Two interpolations in one: from `low` logits to the network's size with aligned corners, then to
// `to` pixels without. Each target has three consecutive source logits.
function taps(low, network, to) {
  const starts = new Int32Array(to);
  const weights = new Float32Array(to * 3);
  for (let i = 0; i < to; i++) {
    const position = network === to ? i : Math.min(Math.max(((i + 0.5) * network) / to - 0.5, 0), network - 1);
    const first = Math.floor(position);
    for (const [pixel, share] of [[first, 1 - position + first], [first + 1, position - first]]) {
      if (!share) continue;
      const at = (pixel * (low - 1)) / Math.max(network - 1, 1);
      const cell = Math.min(Math.floor(at), Math.max(low - 2, 0));
      if (pixel === first) starts[i] = cell;
      const k = 3 * i + cell - starts[i];
      weights[k] += share * (1 - at + cell);
      weights[k + 1] += share * (at - cell);
    }
  }
  return { starts, weights };
}

// Logits (C, h, w) of a network of `network` = [height, width] pixels to class indices `to`.
//
// Every weight is positive: where one class is the largest at all sources of a pixel, it is the
// largest there. Only other pixels are interpolated for every class.
export function upsampleArgmax(logits, [channels, h, w], network, to) {
  const [height, width] = to;
  const labels = new Uint8Array(height * width);
  const vertical = taps(h, network[0], height);
  const horizontal = taps(w, network[1], width);
  const row = new Float32Array(channels * (w + 2)); // two spare columns, which have no weight
  const best = new Uint8Array(w + 2);
  for (let y = 0; y < height; y++) {
    row.fill(0);
    for (let k = 0; k < 3; k++) {
      const weight = vertical.weights[3 * y + k];
      if (!weight) continue;
      const from = (vertical.starts[y] + k) * w;
      for (let c = 0; c < channels; c++)
        for (let x = 0; x < w; x++) row[x * channels + c] += weight * logits[c * h * w + from + x];
    }
    for (let x = 0; x < w; x++) {
      let top = 0;
      for (let c = 1; c < channels; c++) if (row[x * channels + c] > row[x * channels + top]) top = c;
      best[x] = top;
    }
    for (let x = 0; x < width; x++) {
      const start = horizontal.starts[x];
      const a = horizontal.weights[3 * x];
      const b = horizontal.weights[3 * x + 1];
      const d = horizontal.weights[3 * x + 2];
      let label = a ? best[start] : best[start + 1];
      if ((b && best[start + 1] !== label) || (d && best[start + 2] !== label)) {
        const at = start * channels;
        let top = -Infinity;
        for (let c = 0; c < channels; c++) {
          const score = a * row[at + c] + b * row[at + channels + c] + d * row[at + 2 * channels + c];
          if (score > top) {
            top = score;
            label = c;
          }
        }
      }
      labels[y * width + x] = label;
    }
  }
  return labels;
}
