// What takes long, in threads beside the page: a message {task, ...} gives {value} or {problem}.

import { decompress as unzstd } from "fzstd";
import { inflated, unshuffled } from "./inflate.js";
import { weights } from "./weights.js";

const SIGNED = { 1: Uint8Array, 2: Int16Array, 4: Float32Array };

const TASKS = {
  async chunk({ bytes, codec, rawNbytes, itemNbytes, pool }) {
    let raw = codec === "zstd" ? unzstd(bytes) : await inflated(bytes, rawNbytes);
    if (raw.length !== rawNbytes) throw new RangeError(`has ${raw.length} bytes, expected ${rawNbytes}`);
    if (codec !== "deflate") raw = unshuffled(raw, itemNbytes);
    return pool ? pooled(new SIGNED[itemNbytes](raw.buffer, 0, raw.length / itemNbytes), pool) : raw;
  },
  weights,
};

// Of a chunk of weights (head, query, key) that begins at `first`, the largest value of every square of
// 2 ** shift positions: a part of the small picture of all. Codes and the bits of floats that are not
// negative are in the order of their values.
function pooled(values, { shape, chunkShape, first, shift }) {
  const [heads, rows, columns] = chunkShape.map((length, axis) => Math.min(length, shape[axis] - first[axis]));
  const [top, left] = [first[1] >> shift, first[2] >> shift];
  const [height, width] = [((first[1] + rows - 1) >> shift) - top + 1, ((first[2] + columns - 1) >> shift) - left + 1];
  const found = new values.constructor(heads * height * width);
  for (let head = 0; head < heads; head += 1) {
    for (let row = 0; row < rows; row += 1) {
      const from = (head * chunkShape[1] + row) * chunkShape[2];
      const to = (head * height + ((first[1] + row) >> shift) - top) * width - left;
      for (let column = 0; column < columns; column += 1) {
        const value = values[from + column];
        const cell = to + ((first[2] + column) >> shift);
        if (value > found[cell]) found[cell] = value;
      }
    }
  }
  return found;
}

self.onmessage = async ({ data: { id, task, ...given } }) => {
  try {
    const value = await TASKS[task](given);
    self.postMessage({ id, value }, [value.buffer]);
  } catch (error) {
    self.postMessage({ id, problem: error.message });
  }
};
