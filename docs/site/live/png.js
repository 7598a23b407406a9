// Writes a label map as a grayscale PNG, whose values are the class indices.

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? (n >>> 1) ^ 0xedb88320 : n >>> 1;
  return n;
});

function chunk(name, data) {
  const bytes = new Uint8Array(data.length + 12);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  bytes.set(new TextEncoder().encode(name), 4);
  bytes.set(data, 8);
  let crc = ~0;
  for (const byte of bytes.subarray(4, -4)) crc = TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
  view.setUint32(data.length + 8, ~crc);
  return bytes;
}

export async function encodeLabels(labels, width, height) {
  const rows = new Uint8Array(height * (width + 1)); // each begins with its filter, 0
  for (let y = 0; y < height; y++) rows.set(labels.subarray(y * width, (y + 1) * width), y * (width + 1) + 1);
  const stream = new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"));
  const head = new Uint8Array(13);
  new DataView(head.buffer).setUint32(0, width);
  new DataView(head.buffer).setUint32(4, height);
  head[8] = 8; // bits; the other values are 0: grayscale, deflate, no interlacing
  const packed = new Uint8Array(await new Response(stream).arrayBuffer());
  const signature = Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a);
  const parts = [signature, chunk("IHDR", head), chunk("IDAT", packed), chunk("IEND", new Uint8Array())];
  return new Blob(parts, { type: "image/png" });
}
