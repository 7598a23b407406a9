// Reads inputs, outputs and metadata of an ONNX file, which is a protocol buffer, and checks them.

const MAX_BYTES = 200e6;
const MAX_SIDE = 4096;
const TYPES = { 1: "float32", 2: "uint8" }; // of TensorProto.DataType, those of our files

function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) {
      if (at >= bytes.length || scale > 2 ** 63) throw new RangeError("damaged");
      value += (bytes[at] & 127) * scale;
      if (bytes[at++] < 128) return value;
    }
  };
  while (at < bytes.length) {
    const key = varint();
    const number = Math.floor(key / 8);
    if (key % 8 === 0) yield [number, varint()];
    else if (key % 8 === 1) at += 8;
    else if (key % 8 === 5) at += 4;
    else if (key % 8 === 2) {
      const length = varint();
      if (at + length > bytes.length) throw new RangeError("damaged");
      yield [number, bytes.subarray(at, (at += length))];
    } else throw new RangeError("damaged");
  }
}

function message(bytes) {
  const found = {};
  for (const [number, value] of fields(bytes)) (found[number] ??= []).push(value);
  return found;
}

const text = (bytes) => (bytes ? new TextDecoder().decode(bytes) : "");

// ValueInfoProto: name = 1, type = 2 { tensor_type = 1 { elem_type = 1, shape = 2 { dim = 1 } } }
function valueInfo(bytes) {
  const info = message(bytes);
  const tensor = message(message(info[2][0])[1][0]);
  const dims = message(tensor[2][0])[1].map((dim) => message(dim)[1]?.[0] ?? null);
  return { name: text(info[1][0]), type: TYPES[tensor[1][0]], dims };
}

// ModelProto: graph = 7 { input = 11, output = 12 }, metadata_props = 14 { key = 1, value = 2 }
function read(bytes) {
  const model = message(bytes);
  const graph = message(model[7][0]);
  const metadata = {};
  for (const entry of model[14] ?? []) {
    const { 1: key, 2: value } = message(entry);
    metadata[text(key?.[0])] = text(value?.[0]);
  }
  return { inputs: graph[11].map(valueInfo), outputs: graph[12].map(valueInfo), metadata };
}

// Names and size of a network file, or an Error whose message is one sentence.
export function checkModel(bytes, name) {
  const refuse = (reason) => {
    throw new Error(`${name} ${reason}`);
  };
  const again = "export it with utils/export_model.py --format onnx --output logits";
  if (bytes.length > MAX_BYTES) refuse("is larger than 200 MB: give a smaller file");
  let file;
  try {
    file = read(bytes);
  } catch {
    refuse(`is damaged or no ONNX file: ${again}`);
  }
  const { inputs: [input], outputs: [output], metadata } = file;
  if (metadata.output === "labels") refuse(`returns labels instead of logits: ${again}`);
  if (file.inputs.length !== 1 || input.type !== "uint8" || input.dims.length !== 4 || input.dims[3] !== 3)
    refuse(`does not take one uint8 image (1, H, W, 3): ${again}`);
  if (file.outputs.length !== 1 || output.type !== "float32" || output.dims.length !== 4)
    refuse(`does not return one float32 array of logits (1, C, h, w): ${again}`);
  let size, classes, colors;
  try {
    [size, classes, colors] = ["size", "classes", "colors"].map((key) => JSON.parse(metadata[key]));
  } catch {
    refuse(`does not name its size, classes and colors: ${again}`);
  }
  const fits = (side, fixed) => Number.isInteger(side) && side >= 8 && side <= MAX_SIDE && (fixed ?? side) === side;
  if (!Array.isArray(size) || size.length !== 2 || ![0, 1].every((i) => fits(size[i], input.dims[i + 1])))
    refuse(`has an input size of ${JSON.stringify(size)}, which does not suit its graph: ${again}`);
  const isColor = (c) => Array.isArray(c) && c.length === 3 && c.every((v) => Number.isInteger(v) && v >= 0 && v < 256);
  const outputs = output.dims[1] ?? classes.length + 1;
  if (!Array.isArray(classes) || !classes.every((c) => typeof c === "string") || classes.length !== outputs - 1)
    refuse(`has ${outputs} outputs, which are not its classes and void: ${again}`);
  if (!Array.isArray(colors) || colors.length !== classes.length || !colors.every(isColor))
    refuse(`has no color for each class: ${again}`);
  return { input: input.name, output: output.name, size, classes, colors, dataset: metadata.dataset };
}
